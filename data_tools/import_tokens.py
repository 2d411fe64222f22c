"""Brings the token files of other tools into our token shards: converted, or left where they are and referred to.

    python -c "import numpy as n; n.load('runs/quickstart/pack/train/tokens-00000.npy').astype('u2').tofile('runs/quickstart/train.bin')"
    python data_tools/import_tokens.py --input runs/quickstart/train.bin --dtype uint16 --tokenizer runs/quickstart/tokenizer \
        --output_dir runs/try/copied
    python data_tools/import_tokens.py --input runs/quickstart/train.bin --dtype uint16 --tokenizer runs/quickstart/tokenizer \
        --by_reference true --output_dir runs/try/referred

flat       ids one after the other (nanoGPT; llm.c with its header of 1,024 bytes); a document ends after --eos_id, by default
           the tokenizer's EOS, or begins at --bos_id
megatron   X.bin with X.idx beside it (Megatron-LM, NeMo, datatrove's MegatronDocumentTokenizer)
datatrove  X.ds with X.ds.index (datatrove, nanotron)

Every id is checked against the tokenizer. The format is described in dilqur/data/token_shards.py; by reference, a shard is one
foreign file, of which only the document boundaries are written.
"""

import itertools
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from dilqur.common.errors import InputError, program
from dilqur.common.hashing import file_checksum
from dilqur.common.progress import Progress
from dilqur.data.foreign_tokens import datatrove, flat, megatron
from dilqur.data.npy_stream import save_npy
from dilqur.data.shard_writer import ShardWriter, remove_leftovers, summary
from dilqur.data.token_shards import MAX_ID
from dilqur.pipeline.inputs import Input, TokenizerPath
from dilqur.pipeline.manifest import file_identity
from dilqur.pipeline.settings_parser import parse
from dilqur.pipeline.stage import Stage, StageSettings
from dilqur.tokenizer.text_tokenizer import TextTokenizer

# 4 MB as int32, and ten times that for what is computed from them; a longer document is taken whole
TOKENS_AT_ONCE = 1 << 20
SUFFIXES = {".bin": "flat", ".ds": "datatrove"}
READABLE = ("uint16", "uint32", "int32")  # what a shard by reference may hold

Id = Annotated[int, Field(ge=0, le=MAX_ID)]


@dataclass(kw_only=True)
class ImportSettings(StageSettings):
    input: list[Annotated[str, Input("token_files")]] = field(
        metadata={"help": ".bin or .ds files, or folders of them; an index is found beside its file"}
    )
    tokenizer: TokenizerPath = field(metadata={"help": "the tokenizer the ids are of: its folder or tokenizer.json"})
    format: Literal["flat", "megatron", "datatrove"] | None = field(
        default=None, metadata={"help": "none: by name, .ds datatrove, .bin with an .idx megatron, else flat"}
    )
    dtype: Literal["uint16", "uint32"] | None = field(
        default=None, metadata={"help": "of a flat file without header; the others say it themselves"}
    )
    eos_id: Id | None = field(default=None, metadata={"help": "a flat file's documents end with it; none: tokenizer's"})
    bos_id: Id | None = field(default=None, metadata={"help": "a flat file's documents begin with it (instead of EOS)"})
    by_reference: bool = field(
        default=False, metadata={"help": "leave the tokens where they are; that file must then stay as it is"}
    )
    shard_tokens: Annotated[int, Field(ge=1)] = field(
        default=1 << 28, metadata={"help": "tokens a shard, unless by reference (268 M are 1 GB)"}
    )


def open_files(settings):
    """A TokenFile for each input, their headers and indexes read and checked."""
    paths = []
    for item in map(Path, settings.input):
        if item.is_dir():
            paths += (found := sorted(p for p in item.iterdir() if p.suffix in SUFFIXES and p.is_file()))
            if not found:
                raise InputError(f"{item}: no .bin or .ds file in this folder")
        else:
            paths.append(item.with_suffix(".bin") if item.suffix == ".idx" else item)
    files, readers = [], {"flat": flat, "megatron": megatron, "datatrove": datatrove}
    for path in {os.path.realpath(path): path for path in paths}.values():  # no file twice, whatever the way to it
        if not path.is_file():
            raise InputError(f"{path}: not there, though an index of it is")
        kind = settings.format or SUFFIXES.get(path.suffix, "flat")
        if not settings.format and path.suffix == ".bin" and path.with_suffix(".idx").exists():
            kind = "megatron"
        files.append(readers[kind](path, settings.dtype))
        if not files[-1].tokens:
            raise InputError(f"{path}: no token in there: nothing to import")
        if settings.by_reference and files[-1].dtype.name not in READABLE:
            raise InputError(
                f"{path}: {files[-1].dtype.name} ids cannot be read by reference; leave --by_reference out"
            )
    return files


# -- documents --------------------------------------------------------------------------------------------------------


def split_documents(file, token, at):
    """Find out where the documents of a flat file end: after each `token` (at "eos") or before it (at "bos")."""
    found, stops = [], [*range(TOKENS_AT_ONCE, file.tokens, TOKENS_AT_ONCE), file.tokens]
    for start, ids in file.chunks(stops):
        found.append(np.flatnonzero(ids == token) + (start + (at == "eos")))
    ends = np.concatenate(found)
    if not len(ends):
        raise InputError(
            f"{file.path}: the id {token}, at which its documents are to be split, is not in it: give another --eos_id or "
            "--bos_id, or another --dtype"
        )
    ends = ends[ends > 0]  # a BOS at the very beginning ends nothing
    file.ends = ends if len(ends) and ends[-1] == file.tokens else np.append(ends, file.tokens)
    file.split_at = at


def groups(ends):
    """Yield (first, last) for runs of whole documents of TOKENS_AT_ONCE tokens at most, or of a single one."""
    first = 0
    while first < len(ends):
        start = int(ends[first - 1]) if first else 0
        last = max(first + 1, int(np.searchsorted(ends, start + TOKENS_AT_ONCE, side="right")))
        yield first, last
        first = last


class Utf8Bytes:
    """Counts the UTF-8 bytes of the text that tokens stand for; control tokens stand for none.

    In byte-level BPE a character of a token is a byte, so that a table does; every other tokenizer has to decode.
    """

    def __init__(self, tokenizer):
        self.tokenizer, self.table = tokenizer, None
        spec = json.loads(tokenizer.backend.to_str())
        decoder = spec["decoder"] or {}
        if "ByteLevel" in [d["type"] for d in decoder.get("decoders", [decoder]) if d]:
            self.table = np.zeros(tokenizer.size, np.int64)
            for token, i in tokenizer.backend.get_vocab(with_added_tokens=False).items():
                self.table[i] = len(token)
            for i, token in tokenizer.backend.get_added_tokens_decoder().items():
                self.table[i] = 0 if token.special else len(token.content.encode("utf-8"))

    def __call__(self, ids, lengths):
        """int64 (documents,). ids (total,), lengths (documents,)."""
        edges = np.concatenate([[0], np.cumsum(lengths)])
        if self.table is not None:
            return np.diff(np.concatenate([[0], np.cumsum(self.table[ids])])[edges])
        parts = [ids[a:b].tolist() for a, b in itertools.pairwise(edges)]
        texts = self.tokenizer.backend.decode_batch(parts, skip_special_tokens=True)
        return np.array([len(text.encode("utf-8")) for text in texts], np.int64)


class Checked:
    """Reads whole documents of TokenFiles, checks every id, and counts what the manifest says of them.

    boundaries: {"bos": id, "eos": id}, or None for an id. always: whether every document so far begins, or ends, with it.
    """

    def __init__(self, tokenizer, boundaries, progress):
        self.tokenizer, self.utf8_bytes, self.progress, self.behind = tokenizer, Utf8Bytes(tokenizer), progress, 0
        self.boundaries, self.always = boundaries, {name: i is not None for name, i in boundaries.items()}

    def documents(self, file):
        """Yield (ids, lengths, utf8_bytes) for runs of whole documents."""
        runs = list(groups(file.ends))
        for (first, last), (start, ids) in zip(runs, file.chunks(file.ends[last - 1] for _, last in runs), strict=True):
            ends = file.ends[first:last]
            lengths = np.diff(ends, prepend=start)
            self._check(file, ids, start)
            self._look_at_boundaries(file, ids, lengths)
            yield ids, lengths, self.utf8_bytes(ids, lengths)
            self.behind += ids.nbytes
            self.progress.at(self.behind)

    def _look_at_boundaries(self, file, ids, lengths):
        stops = np.cumsum(lengths)
        for name, at in (("bos", stops - lengths), ("eos", stops - 1)):
            if self.always[name] and name != file.split_at:  # only what was cut off at a file's ends has no such token
                self.always[name] = bool((lengths > 0).all() and (ids[at] == self.boundaries[name]).all())

    def _check(self, file, ids, start):
        if not len(ids) or (int(ids.min()) >= 0 and int(ids.max()) < self.tokenizer.size):
            return
        at = int(np.flatnonzero((ids < 0) | (ids >= self.tokenizer.size))[0])
        document, wrong = int(np.searchsorted(file.ends, start + at, side="right")), int(ids[at])
        limit = (
            f"more than int32 holds ({MAX_ID})"
            if wrong > MAX_ID
            else f"not below {self.tokenizer.size}, the size of {self.tokenizer.path}"
        )
        raise InputError(
            f"{file.path}: document {document} (from 0), token {start + at}: the id {wrong} is {limit}: the tokens of another "
            "tokenizer, or another --dtype"
        )


# -- shards -----------------------------------------------------------------------------------------------------------


def convert(files, checked, settings, folder):
    """Copy the tokens of `files` into int32 shards. Returns the manifest's fields."""
    with ShardWriter(folder, settings.shard_tokens) as writer:
        for file in files:
            for ids, lengths, size in checked.documents(file):
                writer.add(ids, lengths, {"utf8_bytes": size})
        fields = writer.close()
    remove_leftovers(folder, fields["shards"])
    return fields


def refer(files, checked, folder):
    """Write the document boundaries of `files`, one shard for each. Returns the manifest's fields."""
    shards = []
    for number, file in enumerate(files):
        size = sum(int(utf8.sum()) for _, _, utf8 in checked.documents(file))
        offsets = np.concatenate([[0], file.ends]).astype(np.int64)
        path = folder / f"offsets-{number:05d}.npy"
        save_npy(path, offsets)
        shards.append(
            {
                "documents": len(file.ends),
                "tokens": file.tokens,
                "utf8_bytes": size,
                "tokens_file": {
                    "path": str(file.path.resolve()),
                    "dtype": file.dtype.name,
                    "offset_bytes": file.offset,
                    "bytes": file.path.stat().st_size,
                    "xxh3": file_checksum(file.path),
                },
                "files": {path.name: {"bytes": path.stat().st_size, "xxh3": file_checksum(path)}},
            }
        )
    dtypes = {file.dtype.name for file in files}
    return summary(shards, dtypes.pop() if len(dtypes) == 1 else None)  # of all shards; each says its own


def check_space(files, folder):
    """InputError if int32 shards of `files` do not fit on the disk of `folder`."""
    there = next(p for p in [folder.absolute(), *folder.absolute().parents] if p.exists())
    needed, free = sum(4 * file.tokens for file in files), shutil.disk_usage(there).free
    if needed > free:
        raise InputError(
            f"{folder}: {needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB free: free some, choose another "
            "--output_dir, or give --by_reference true"
        )


@program
def main():
    settings = parse(ImportSettings, __doc__)
    stage = Stage(settings, __file__)
    stage.refuse_finished()
    tokenizer = TextTokenizer(settings.tokenizer)
    files = open_files(settings)
    given = {name: i for name, i in (("bos", settings.bos_id), ("eos", settings.eos_id)) if i is not None}
    boundaries = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, **given}
    split_at = "bos" if "bos" in given else "eos"
    if flat_files := [file for file in files if file.ends is None]:
        if len(given) == 2:
            raise InputError("give --eos_id (documents end with it) or --bos_id (they begin with it), not both")
        if boundaries[split_at] is None:
            raise InputError(f"{tokenizer.path}: has no EOS to split the documents at; give --eos_id or --bos_id")
    if inside := [file.path for file in files if stage.folder.resolve() in file.path.resolve().parents]:
        raise InputError(f"{inside[0]}: lies in the folder that is to be written; choose another --output_dir")
    if not settings.by_reference:
        check_space(files, stage.folder)
    for path in (p for file in files for p in (file.path, *file.index)):
        stage.inputs.setdefault(str(path), "token_files")
    if settings.check:
        return print(f"{stage.name}: ok")
    stage.open()

    for file in flat_files:
        split_documents(file, boundaries[split_at], split_at)
    progress = Progress(stage.name, sum(file.tokens * file.dtype.itemsize for file in files))
    checked = Checked(tokenizer, boundaries, progress)
    fields = (
        refer(files, checked, stage.folder)
        if settings.by_reference
        else convert(files, checked, settings, stage.folder)
    )
    progress.close()
    sources = {str(p): file_identity(p) for file in files for p in (file.path, *file.index)}
    for file in files:
        file.refuse_changed()  # what was hashed is what was read
    manifest = {
        **fields,
        "words": None,  # not known: tokens do not say where they were
        "tokenizer": str(tokenizer.path),
        "tokenizer_sha256": tokenizer.hash,
        "vocab_size": tokenizer.size,
        **{f"{name}_id": boundaries[name] if always else None for name, always in checked.always.items()},
        "bad_records": 0,
        "sources": sources,
    }
    result = {key: manifest[key] for key in ("documents", "tokens", "utf8_bytes")}
    stage.finish(result, hashed=sources, **manifest)
    print(
        f"{stage.folder}: {manifest['documents']:,} documents, {manifest['tokens']:,} tokens, "
        f"{manifest['utf8_bytes'] / manifest['tokens']:.2f} bytes a token{', by reference' if settings.by_reference else ''}"
    )
    return None


if __name__ == "__main__":
    main()
