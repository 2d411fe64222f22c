"""Looks into token shards: what a sample says, where documents begin, how long they are, whether all of it is whole.

    python data_tools/inspect_tokens.py runs/quickstart/pack/train
    python data_tools/inspect_tokens.py runs/quickstart/pack/train --sample 3 --max_length 64
    python data_tools/inspect_tokens.py runs/quickstart/pack/train --document 0
    python data_tools/inspect_tokens.py verify runs/quickstart/pack/train runs/quickstart/pack/validation

A sample is what training sees: the tokens [i · max_length, (i + 1) · max_length) of the stream. `|` marks where a document
begins. `verify` reads every byte of one or many folders and compares it with the manifest: sizes, checksums, counts, where
documents begin, ids against the vocabulary. A line a folder; the first problem ends it, with its file and exit code 2.
"""

import itertools
import json
import sys
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field

from dilqur.common.constants import Count
from dilqur.common.errors import InputError
from dilqur.data.token_shards import TokenShards
from dilqur.pipeline.inputs import Input
from dilqur.pipeline.program import program
from dilqur.pipeline.settings_parser import setting
from dilqur.tokenizer.text_tokenizer import TextTokenizer


@dataclass(kw_only=True)
class InspectSettings:
    shards: Annotated[str, Input("shards")] = setting("folder of token shards")
    tokenizer: str | None = setting("to decode with; the one the shards were packed with", default=None)
    sample: Count | None = setting("decode this sample", default=None)
    document: Count | None = setting("decode this document", default=None)
    max_length: Annotated[int, Field(ge=1)] = setting("tokens per sample", default=2048)
    json: bool = setting("one JSON object on standard output", default=False)
    check: bool = setting("check the arguments, print nothing else", default=False)


@dataclass(kw_only=True)
class VerifySettings:
    shards: list[Annotated[str, Input("shards")]] = setting("folders of token shards")
    json: bool = setting("one JSON object on standard output", default=False)
    check: bool = setting("check the arguments and the files' sizes", default=False)


READ = 1 << 24  # tokens looked at together: 64 MB


def verify(folder):
    """Read all of a folder of token shards. Returns the counts that were found; raises InputError for the first problem."""
    shards = TokenShards(folder)
    for number, (entry, base) in enumerate(zip(shards.manifest["shards"], shards.shard_starts.tolist(), strict=False)):
        shards.check_shard(number, verify=True)
        offsets, where = shards.offsets(number), f"{folder}/offsets-{number:05d}.npy"
        if offsets[0] != 0 or (np.diff(offsets) < 0).any():
            wrong = int(np.argmax(np.diff(offsets) < 0)) + 1 if offsets[0] == 0 else 0
            raise InputError(
                f"{where}: document {wrong} begins at {offsets[wrong]}, before the one ahead of it; pack again"
            )
        if offsets[-1] != entry["tokens"]:
            raise InputError(
                f"{where}: the documents end at {offsets[-1]}, the tokens at {entry['tokens']}; pack again"
            )
        for first in range(base, base + entry["tokens"], READ):
            ids = shards.read(first, min(READ, base + entry["tokens"] - first))
            outside = (ids < 0) | (ids >= shards.manifest["vocab_size"])
            if outside.any():
                at = int(np.argmax(outside))
                raise InputError(
                    f"{folder}: shard {number}, token {first - base + at}: id {ids[at]} is not below vocab_size "
                    f"{shards.manifest['vocab_size']}; pack again"
                )
    size = sum(stated["bytes"] for entry in shards.manifest["shards"] for stated in entry["files"].values())
    found = {"documents": shards.num_documents, "tokens": shards.num_tokens}
    for name, count in found.items():
        if shards.manifest[name] != count:
            raise InputError(
                f"{folder}/manifest.json: says {shards.manifest[name]} {name}, its shards hold {count}; pack again"
            )
    return {**found, "shards": shards.num_shards, "bytes": size}


def statistics(shards, max_length):
    """Counts of the whole folder: documents, tokens, lengths in tokens, share of documents that a sample's end cuts."""
    lengths, counts, cut = np.empty(0, np.int64), np.empty(0, np.int64), 0
    for shard, base in enumerate(shards.shard_starts[:-1].tolist()):  # a billion documents: a histogram, not a list
        starts = base + shards.offsets(shard)
        cut += int((starts[:-1] // max_length < (starts[1:] - 1) // max_length).sum())
        more = np.unique(np.diff(starts), return_counts=True)
        lengths, place = np.unique(np.concatenate([lengths, more[0]]), return_inverse=True)
        counts = np.bincount(place, np.concatenate([counts, more[1]])).astype(np.int64)
    ranks = np.array([0, 0.1, 0.5, 0.9, 0.99, 1]) * (shards.num_documents - 1)
    percentiles = lengths[np.searchsorted(np.cumsum(counts), ranks, side="right")].tolist()
    return {
        "documents": shards.num_documents,
        "tokens": shards.num_tokens,
        "samples": shards.num_tokens // max_length,
        "utf8_bytes": shards.manifest["utf8_bytes"],
        "bytes_per_token": round(shards.bytes_per_token, 4),
        "tokenizer": shards.manifest["tokenizer"],
        "vocab_size": shards.manifest["vocab_size"],
        "document_tokens": dict(zip(("min", "p10", "median", "p90", "p99", "max"), percentiles, strict=True)),
        "documents_cut_by_samples": round(cut / shards.num_documents, 4),
        "files": shards.num_shards,
    }


def decode(tokenizer, ids, starts):
    """The text of `ids` with `|` before every position of `starts`."""
    cuts = [0, *(int(s) for s in starts if s > 0), len(ids)]
    parts = [tokenizer.decode(ids[a:b]) for a, b in itertools.pairwise(cuts)]
    return "\n| ".join(parts) if not len(starts) or starts[0] > 0 else "| " + "\n| ".join(parts)


@program(InspectSettings, lambda settings: TokenShards(settings.shards).check_files(), positional="shards")
def main(settings, shards):
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


def check_all(settings):
    for folder in settings.shards:
        TokenShards(folder).check_files()


@program(VerifySettings, check_all, positional="shards")
def verify_all(settings):
    out = {}
    for folder in settings.shards:
        found = out[folder] = verify(folder)
        if not settings.json:
            size = f"{found['shards']:,} shards, {found['bytes'] / 1e9:,.3f} GB"
            print(f"{folder}: whole: {found['documents']:,} documents, {found['tokens']:,} tokens, {size}", flush=True)
    if settings.json:
        print(json.dumps(out))


if __name__ == "__main__":
    verify_all(sys.argv[2:]) if sys.argv[1:2] == ["verify"] else main()
