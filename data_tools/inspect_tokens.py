"""Looks into token shards: what a sample says, where documents begin, how long they are.

    python data_tools/inspect_tokens.py runs/quickstart/pack/train
    python data_tools/inspect_tokens.py runs/quickstart/pack/train --sample 3 --max_length 64
    python data_tools/inspect_tokens.py runs/quickstart/pack/train --document 0
    python data_tools/inspect_tokens.py runs/quickstart/pack/train --verify

A sample is what training sees: the tokens [i · max_length, (i + 1) · max_length) of the stream. `|` marks where a document begins.
"""

import itertools
import json
from dataclasses import dataclass, field
from typing import Annotated

import numpy as np
from pydantic import Field

from dilqur.errors import InputError, program
from dilqur.recipe import parse
from dilqur.stage import Input
from dilqur.token_shards import TokenShards
from dilqur.tokenizer import TextTokenizer

Count = Annotated[int, Field(ge=0)]


@dataclass(kw_only=True)
class InspectSettings:
    shards: Annotated[str, Input("shards")] = field(metadata={"help": "folder of token shards"})
    tokenizer: str | None = field(
        default=None, metadata={"help": "to decode with; the one the shards were packed with"}
    )
    sample: Count | None = field(default=None, metadata={"help": "decode this sample"})
    document: Count | None = field(default=None, metadata={"help": "decode this document"})
    max_length: Annotated[int, Field(ge=1)] = field(default=2048, metadata={"help": "tokens a sample"})
    verify: bool = field(default=False, metadata={"help": "read every byte and compare the checksums"})
    json: bool = field(default=False, metadata={"help": "one JSON object on standard output"})
    check: bool = field(default=False, metadata={"help": "check the arguments, print nothing else"})


def statistics(shards, max_length):
    """Counts of the whole folder: documents, tokens, lengths in tokens, share of documents that a sample's end cuts."""
    lengths = shards.document_lengths()
    ends = np.cumsum(lengths)
    cut = (ends - lengths) // max_length != (ends - 1) // max_length
    percentiles = np.percentile(lengths, [0, 10, 50, 90, 99, 100]).astype(int).tolist()
    return {
        "documents": shards.num_documents,
        "tokens": shards.num_tokens,
        "samples": shards.num_tokens // max_length,
        "utf8_bytes": shards.manifest["utf8_bytes"],
        "bytes_per_token": round(shards.bytes_per_token, 4),
        "tokenizer": shards.manifest["tokenizer"],
        "vocab_size": shards.manifest["vocab_size"],
        "document_tokens": dict(zip(("min", "p10", "median", "p90", "p99", "max"), percentiles, strict=True)),
        "documents_cut_by_samples": round(float(cut.mean()), 4),
        "files": len(shards.manifest["shards"]),
    }


def decode(tokenizer, ids, starts):
    """The text of `ids` with `|` before every position of `starts`."""
    cuts = [0, *(int(s) for s in starts if s > 0), len(ids)]
    parts = [tokenizer.decode(ids[a:b]) for a, b in itertools.pairwise(cuts)]
    return "\n| ".join(parts) if not len(starts) or starts[0] > 0 else "| " + "\n| ".join(parts)


@program
def main():
    settings = parse(InspectSettings, __doc__, positional="shards")
    shards = TokenShards(settings.shards, verify=settings.verify and not settings.check)
    if settings.check:
        return print("inspect_tokens: ok")
    out = statistics(shards, settings.max_length)
    if settings.sample is not None or settings.document is not None:
        tokenizer = TextTokenizer(settings.tokenizer or shards.manifest["tokenizer"])
        if tokenizer.hash != shards.manifest["tokenizer_sha256"]:
            raise InputError(
                f"{tokenizer.path}: not the tokenizer {settings.shards} was packed with (its hash differs)"
            )
    if settings.sample is not None:
        if settings.sample >= out["samples"]:
            raise InputError(f"--sample {settings.sample}: there are {out['samples']} of {settings.max_length} tokens")
        start = settings.sample * settings.max_length
        ids, starts = shards.read(start, settings.max_length), shards.document_starts(start, settings.max_length)
        out = {
            "sample": settings.sample,
            "ids": ids.tolist(),
            "document_starts": starts.tolist(),
            "text": decode(tokenizer, ids, starts),
        }
    elif settings.document is not None:
        if settings.document >= shards.num_documents:
            raise InputError(f"--document {settings.document}: there are {shards.num_documents}")
        ids = shards.document(settings.document)
        out = {"document": settings.document, "ids": ids.tolist(), "text": tokenizer.decode(ids)}
    if settings.json:
        print(json.dumps(out, ensure_ascii=False))
    else:
        for name, value in out.items():
            print(f"{name}: {value}")
        if settings.verify:
            print("verified: every checksum is the manifest's")
    return None


if __name__ == "__main__":
    main()
