"""Tokenises text into int32 token shards that are read by memory-mapping (this is not TRL's "packing" of samples).

    python data_tools/pack_mmap.py --input recipes/quickstart/corpus/az --tokenizer runs/quickstart/tokenizer --output_dir runs/try/shards
    python data_tools/pack_mmap.py --config recipes/quickstart/pack.yaml --check

Each document becomes BOS, its tokens, EOS, whole and in the order of the input; text that spells a control token stays
text. With `datasets` in a recipe every one gets a folder of its own, OUTPUT_DIR/NAME; with --input alone the shards lie
in OUTPUT_DIR itself. The format is described in dilqur/token_shards.py.
"""

import itertools
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, Required

from pydantic import Field
from tqdm import tqdm
from typing_extensions import TypedDict

from dilqur.atomic import write_json
from dilqur.documents import expand, is_validation, read
from dilqur.errors import InputError, program
from dilqur.recipe import parse
from dilqur.stage import Documents, Stage, StageSettings, TokenizerPath, file_identity
from dilqur.token_shards import ShardWriter
from dilqur.tokenizer import TextTokenizer

BATCH = 256  # documents handed to the tokenizer at a time: enough for all cores, small enough for any memory


class Dataset(TypedDict, total=False):
    __pydantic_config__ = {"extra": "forbid"}
    name: Required[str]
    input: Required[list[Documents]]


@dataclass(kw_only=True)
class PackSettings(StageSettings):
    tokenizer: TokenizerPath = field(metadata={"help": "folder with a tokenizer.json, or that file"})
    input: list[Documents] | None = field(
        default=None, metadata={"help": "files, folders or globs: one dataset in OUTPUT_DIR"}
    )
    datasets: list[Dataset] | None = field(default=None, metadata={"help": "{name: …, input: […]}: a folder for each"})
    text_field: str = field(default="text", metadata={"help": "key or column that holds the text"})
    sample_by: Literal["line", "paragraph", "document"] = field(
        default="line", metadata={"help": "one document of a .txt"}
    )
    skip_bad_records: bool = field(
        default=False, metadata={"help": "skip and count broken JSON and UTF-8 instead of stopping"}
    )
    add_bos: bool = field(default=True, metadata={"help": "begin each document with the tokenizer's BOS"})
    add_eos: bool = field(default=True, metadata={"help": "end each document with the tokenizer's EOS"})
    shard_tokens: Annotated[int, Field(ge=1)] = field(
        default=1 << 28, metadata={"help": "tokens a shard (268 M are 1 GB)"}
    )
    validation_fraction: Annotated[float, Field(ge=0, lt=1)] = field(
        default=0.0, metadata={"help": "share held out by hash of text into FOLDER/validation (0: clean_corpus did it)"}
    )


def pack(files, tokenizer, settings, folder):
    """Write the token shards of `files` to `folder`. Returns the manifest's fields; the caller writes it, last."""
    writers, totals = {}, {}
    skipped = []

    def bad(message):
        skipped.append(message)
        print(f"skipped: {message}", file=sys.stderr)

    documents = read(files, settings.text_field, settings.sample_by, bad if settings.skip_bad_records else None)
    before = [tokenizer.bos_id] if settings.add_bos else []
    after = [tokenizer.eos_id] if settings.add_eos else []
    bar = tqdm(desc=folder.name, unit="B", unit_scale=True, disable=None)
    while batch := list(itertools.islice(documents, BATCH)):
        for document, ids in zip(batch, tokenizer.encode_batch([d.text for d in batch]), strict=True):
            split = "validation" if is_validation(document.text, settings.validation_fraction) else "train"
            if split not in writers:
                where = folder if split == "train" else folder / "validation"
                writers[split], totals[split] = ShardWriter(where, settings.shard_tokens), {"words": 0, "utf8_bytes": 0}
            writers[split].add(before + ids + after)
            totals[split]["words"] += len(document.text.split())
            totals[split]["utf8_bytes"] += len(document.text.encode("utf-8"))
        bar.update(sum(len(d.text.encode("utf-8")) for d in batch))
    bar.close()
    if "train" not in writers:
        raise InputError(f"{' '.join(files)}: no document in there: nothing to pack")
    common = {
        "tokenizer": str(tokenizer.path),
        "tokenizer_sha256": tokenizer.hash,
        "vocab_size": tokenizer.size,
        "bos_id": tokenizer.bos_id if settings.add_bos else None,
        "eos_id": tokenizer.eos_id if settings.add_eos else None,
        "bad_records": len(skipped),
        "sources": {f: file_identity(Path(f)) for f in files},
    }
    return {split: {**writer.close(), **totals[split], **common} for split, writer in writers.items()}


@program
def main():
    settings = parse(PackSettings, __doc__)
    stage = Stage(settings, __file__)
    if bool(settings.input) == bool(settings.datasets):
        raise InputError("give either --input (one dataset) or, in a recipe, datasets (a list of {name, input})")
    names = [d["name"] for d in settings.datasets or []]
    if len(set(names)) < len(names) or any("/" in n or n.startswith(".") for n in names):
        raise InputError(f"datasets: the names {', '.join(names)} must be distinct and plain folder names")
    stage.refuse_finished()
    tokenizer = TextTokenizer(settings.tokenizer)
    for wanted, token, what in (
        (settings.add_bos, tokenizer.bos_id, "bos"),
        (settings.add_eos, tokenizer.eos_id, "eos"),
    ):
        if wanted and token is None:
            raise InputError(
                f"{tokenizer.path}: has no {what.upper()} token; give --add_{what} false, or another tokenizer"
            )
    if settings.check:
        return print(f"{stage.name}: ok")
    stage.open()

    work = (
        [(stage.folder, settings.input)]
        if settings.input
        else [(stage.folder / d["name"], d["input"]) for d in settings.datasets]
    )
    started, manifests = time.perf_counter(), {}
    for folder, inputs in work:
        for split, manifest in pack(expand(inputs), tokenizer, settings, folder).items():
            where = folder if split == "train" else folder / "validation"
            if where != stage.folder:
                write_json(where / "manifest.json", manifest)
            manifests[where] = manifest
            print(
                f"{where}: {manifest['documents']:,} documents, {manifest['tokens']:,} tokens, "
                f"{manifest['utf8_bytes'] / manifest['tokens']:.2f} bytes a token"
            )
    size = sum(m["utf8_bytes"] for m in manifests.values())
    result = {
        "documents": sum(m["documents"] for m in manifests.values()),
        "tokens": sum(m["tokens"] for m in manifests.values()),
        "utf8_bytes": size,
        "mb_per_second": round(size / 1e6 / (time.perf_counter() - started), 3),
    }
    stage.finish(result, **manifests.get(stage.folder, {}))
    return None


if __name__ == "__main__":
    main()
