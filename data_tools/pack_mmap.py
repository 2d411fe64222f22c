"""Tokenises text into int32 token shards that are read by memory-mapping (this is not TRL's "packing" of samples).

    python data_tools/pack_mmap.py --input recipes/quickstart/corpus/az --tokenizer runs/quickstart/tokenizer --output_dir runs/try/shards
    python data_tools/pack_mmap.py --config recipes/quickstart/pack.yaml --check

Each document becomes BOS, its tokens, EOS, whole and in the order of the input; text that spells a control token stays
text. With `datasets` in a recipe every one gets a folder of its own, OUTPUT_DIR/NAME; with --input alone the shards lie
in OUTPUT_DIR itself. The format is described in docs/data.md.

Killed, it goes on after the last full shard when it is started again, to the same bytes. On several nodes each packs a part
of the files, and a last call puts the parts together, in a moment (--finish true only makes sure that they are there):

    python data_tools/pack_mmap.py --config recipes/quickstart/pack.yaml --output_dir runs/try/parts --shard 0 --of 2
    python data_tools/pack_mmap.py --config recipes/quickstart/pack.yaml --output_dir runs/try/parts --shard 1 --of 2
    python data_tools/pack_mmap.py --config recipes/quickstart/pack.yaml --output_dir runs/try/parts --of 2 --finish true
"""

import collections
import contextlib
import itertools
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Required

import numpy as np
import orjson
import regex
import xxhash
from typing_extensions import TypedDict

from dilqur.common.atomic import write_json
from dilqur.common.constants import Positive
from dilqur.common.errors import InputError
from dilqur.common.parallel import cores, ordered_map, part_of
from dilqur.common.paths import expand, identity_of, warn_of_left_out
from dilqur.common.progress import Progress
from dilqur.data.blocks import BLOCK_BYTES, blocks
from dilqur.data.documents import ReadingSettings, Skipped, documents, read
from dilqur.data.pack_journal import Journal, all_there
from dilqur.data.shard_writer import ShardWriter, remove_leftovers, summary
from dilqur.pipeline.inputs import Documents, TokenizerPath
from dilqur.pipeline.manifest import unchanged
from dilqur.pipeline.parts import ParallelSettings
from dilqur.pipeline.program import program
from dilqur.pipeline.settings_parser import setting
from dilqur.pipeline.stage import StageSettings
from dilqur.tokenizer.engines import ENGINES, agree, choose_engine
from dilqur.tokenizer.text_tokenizer import TextTokenizer
from dilqur.tokenizer.whole_words import WholeWords

RESERVED_NAMES = ("parts", "manifest.json")  # names in OUTPUT_DIR that no dataset can have
PARTS, PART = "parts/*-of-*", "parts/{:05d}-of-{:05d}"
COMPARED = 10_000  # characters of a document: `tokenizers` takes a hundred times a text's memory
BATCH = 64  # documents a call of the tokenizer: more is no faster, and its results fill the caches


class Dataset(TypedDict, total=False):
    __pydantic_config__ = {"extra": "forbid"}
    name: Required[str]
    input: Required[list[Documents]]


@dataclass(kw_only=True)
class PackSettings(StageSettings, ReadingSettings, ParallelSettings):
    tokenizer: TokenizerPath = setting("folder with a tokenizer.json, or that file")
    input: list[Documents] | None = setting("files, folders or globs: one dataset in OUTPUT_DIR", default=None)
    datasets: list[Dataset] | None = setting("{name: …, input: […]}: a folder for each", default=None)
    id_field: str | None = setting("key or column of a document's id, to be kept in ids-*.jsonl", default=None)
    add_bos: bool = setting("begin each document with the tokenizer's BOS", default=True)
    add_eos: bool = setting("end each document with the tokenizer's EOS", default=True)
    shard_tokens: Positive = setting("tokens a shard (268 M are 1 GB)", default=1 << 28)
    engine: str = setting(
        f"{', '.join(ENGINES)}: a fast one is used only where it gives the ids of tokenizers",
        default="auto",
        on_resume="free",
    )


# -- a block --------------------------------------------------------------------------------------------------------------


@dataclass
class PackedBlock:
    """n documents as tokens. ids int32 (total,); lengths int64 (n,); counts {name: int64 (n,)}; bad: what was skipped."""

    file: int  # number of the file
    index: int  # of the block in it
    share: float  # of the file that is read
    ids: np.ndarray
    lengths: np.ndarray
    counts: dict
    names: list | None
    bad: list

    def without(self, n):
        """What ShardWriter.add takes, without the first n documents."""
        counts = {name: values[n:] for name, values in self.counts.items()}
        return self.ids[int(self.lengths[:n].sum()) :], self.lengths[n:], counts, self.names and self.names[n:]


def is_id(value):
    """Is it text, or a number that JSON parsers give back as it was? They make floats of integers over 64 bits."""
    if isinstance(value, float):
        return abs(value) < 2**53
    return isinstance(value, str) or (
        isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**64
    )


class BlockPacker:
    """What a worker process does: parse a block, encode its documents, put BOS and EOS around them, count."""

    def __init__(self, tokenizer, engine, settings):
        self.settings, self.engine, self.to_say = settings, engine, None
        self.oracle, _ = choose_engine("tokenizers", tokenizer, [])
        self.words = WholeWords(tokenizer)
        self.bos = [tokenizer.bos_id] if settings.add_bos else []
        self.eos = [tokenizer.eos_id] if settings.add_eos else []

    def __call__(self, numbered):
        number, block = numbered
        settings, bad, kept, names = self.settings, [], [], []
        on_error = bad.append if settings.on_error == "skip" else None
        for document in documents(block, settings.text_field, settings.sample_by, on_error):
            if settings.id_field:
                name = document.record.get(settings.id_field)
                if not is_id(name):
                    message = (
                        f"{document.where}: the id {settings.id_field!r} is {str(name)[:40]!r}, not text or a number that keeps "
                        "its digits"
                    )
                    if not on_error:
                        raise InputError(f"{message}; see --id_field")
                    bad.append(message)
                    continue
                names.append(name)
            kept.append(document)
        texts = [document.text for document in kept]
        parts = [self.engine.encode(texts[i : i + BATCH]) for i in range(0, len(texts), BATCH)]
        ids = np.concatenate([ids for ids, _ in parts] or [np.empty(0, np.int32)])
        lengths = np.concatenate([lengths for _, lengths in parts] or [np.empty(0, np.int64)])
        if kept and self.engine.name != self.oracle.name:
            sample = kept[block.index % len(kept)]
            if not agree(self.engine, self.oracle, sample.text[:COMPARED]):
                raise InputError(
                    f"{sample.where}: here {self.engine.name} gives other ids than tokenizers; remove the shards, and pack "
                    "with --engine tokenizers (and please report that text)"
                )
        counts = {
            "words": np.fromiter((len(text.split()) for text in texts), np.int64, len(texts)),
            "utf8_bytes": np.fromiter((len(text.encode("utf-8")) for text in texts), np.int64, len(texts)),
        }
        if self.words.known:
            counts["whole_words"] = self.words.count(ids, lengths)
        ids, lengths = self._with_boundaries(ids, lengths)
        return PackedBlock(
            number, block.index, block.share, ids, lengths, counts, names if settings.id_field else None, bad
        )

    def _with_boundaries(self, ids, lengths):
        """The same documents, each with its BOS before it and its EOS after it."""
        lengths = lengths + len(self.bos) + len(self.eos)
        stops = np.cumsum(lengths)
        out, inside = np.empty(int(lengths.sum()), np.int32), np.ones(int(lengths.sum()), bool)
        for token, at in ((self.bos, stops - lengths), (self.eos, stops - 1)):
            if token:
                out[at], inside[at] = token[0], False
        out[inside] = ids
        return out, lengths


# -- the files of a dataset -----------------------------------------------------------------------------------------------


def pack(files, folder, packer, spec, num_proc, skipped):
    """Write the token shards of `files` to `folder`, going on where an earlier call ended. Returns the manifest's fields."""
    settings, journal = packer.settings, Journal(folder, spec, files)
    start = journal.next
    columns = [settings.text_field, *([settings.id_field] if settings.id_field else [])]
    before = np.cumsum([0, *(identity_of(file)["bytes"] for file in files)])
    progress = Progress(folder.name, int(before[-1]))

    def numbered_blocks():
        for number in range(start["file"], len(files)):
            identity = journal.sources[files[number]] = {}
            for block in blocks(files[number], settings.sample_by, settings.on_error == "skip", columns, identity):
                if number > start["file"] or block.index >= start["block"]:
                    yield number, block

    records, bad = start["records"], start["bad"]
    # of each block that is not in shards yet: (number of its first document, cut at its beginning)
    begins = collections.deque()
    with ShardWriter(folder, settings.shard_tokens, journal.shards) as writer:
        first = writer.documents_in_shards - start["skip"]
        for packed in ordered_map(packer, numbered_blocks(), num_proc):
            cut = {"file": packed.file, "block": packed.index, "records": records, "bad": bad}
            begins.append((first, cut))
            again = start["skip"] if (packed.file, packed.index) == (start["file"], start["block"]) else 0
            cuts = []
            for end in writer.add(*packed.without(again)):
                while len(begins) > 1 and begins[1][0] <= end:
                    begins.popleft()
                cuts.append({**begins[0][1], "skip": end - begins[0][0]})
            if cuts:
                journal.save(writer.shards, cuts)
            if packer.to_say and len(packed.lengths):  # not before: a mistake at the beginning is a line by itself
                packer.to_say = print(packer.to_say, flush=True)
            first += len(packed.lengths)
            records += len(packed.lengths) + len(packed.bad)
            bad += len(packed.bad)
            for message in packed.bad:
                skipped(message)
            size = int(before[packed.file + 1] - before[packed.file])
            progress.at(before[packed.file] + packed.share * size, tokens=f"{writer.tokens:,}")
        fields = writer.close()
        if len(writer.shards) > len(journal.shards):
            journal.save(writer.shards, [{"file": len(files), "block": 0, "skip": 0, "records": records, "bad": bad}])
    progress.close()
    remove_leftovers(folder, writer.shards)
    if records != fields["documents"] + bad:
        raise AssertionError(f"{records} records are not {fields['documents']} documents and {bad} bad ones")
    return {**fields, "records": records, "bad_records": bad, "sources": journal.sources}


# -- parts ----------------------------------------------------------------------------------------------------------------


def join_all(work, folder, parts, spec):
    """{dataset: manifest's fields} of everything that was packed in `parts` parts. InputError where one is not finished."""
    done = {name: [folder / PART.format(i, parts) / name for i in range(parts)] for name, _ in work}
    missing = {str(i) for paths in done.values() for i, path in enumerate(paths) if not (path / "part.json").exists()}
    if missing:
        raise InputError(f"{folder}/parts: not finished: --shard {', '.join(sorted(missing, key=int))} (of {parts})")
    return {name: join(done[name], files, folder / name, spec, folder / "parts") for name, files in work}


def join(parts, files, folder, spec, where):
    """Move the shards that lie in `parts`, folders with a part.json, to `folder` and number them anew. Returns the manifest's
    fields. Killed on the way, it is simply called again. InputError where they are not made of `files` as they are now, each
    once. where: the folder of all parts."""
    folder.mkdir(exist_ok=True)
    shards, total = [], {"records": 0, "bad_records": 0}
    packed = [orjson.loads((part / "part.json").read_bytes()) for part in parts]
    sources = [source for fields in packed for source in fields["sources"].items()]
    times = collections.Counter(file for file, _ in sources)
    wrong = [
        f"{file} is in {times[file] or 'none'} of them" for file in dict.fromkeys([*files, *times]) if times[file] != 1
    ]
    wrong += [f"{file} is in one of them, and not among the files now" for file in times if file not in files]
    wrong += [f"{file} has changed since" for file, was in sources if not unchanged(Path(file), was)]
    if wrong:
        raise InputError(f"{where}: {wrong[0]}; remove that folder, and pack the parts again")
    for part, fields in zip(parts, packed, strict=True):
        if fields["spec"] != spec:
            changed = next(key for key in spec if fields["spec"].get(key) != spec[key])
            raise InputError(
                f"{part}: was packed with {changed} = {fields['spec'].get(changed)!r}, now {spec[changed]!r}"
            )
        for shard in fields["shards"]:
            moved = {}
            for name, about in shard["files"].items():
                kind, suffix = name.split("-")[0], name.split(".")[-1]
                target = folder / f"{kind}-{len(shards):05d}.{suffix}"
                if (part / name).exists():  # else an earlier call has moved it
                    (part / name).replace(target)
                moved[target.name] = about
            shards.append({**shard, "files": moved})
            if not all_there(folder, shards[-1]):
                raise InputError(
                    f"{part}: {', '.join(shard['files'])} are not whole; remove {part}, and pack that part again"
                )
        for key in ("records", "bad_records"):
            total[key] += fields[key]
    remove_leftovers(folder, shards)
    return {**summary(shards), **total, "sources": dict(sources)}


# -- the program ----------------------------------------------------------------------------------------------------------


def check(settings):
    """The TextTokenizer. Raises InputError for settings that do not fit together, or not to it."""
    tokenizer = TextTokenizer(settings.tokenizer)
    if bool(settings.input) == bool(settings.datasets):
        raise InputError("give either --input (one dataset) or, in a recipe, datasets (a list of {name, input})")
    names = [d["name"] for d in settings.datasets or []]
    if len(set(names)) < len(names) or any(not regex.fullmatch(r"\w[\w.-]*", n) or n in RESERVED_NAMES for n in names):
        raise InputError(
            f"datasets: the names {', '.join(names)} must be distinct and plain folder names, not {' or '.join(RESERVED_NAMES)}"
        )
    if settings.engine not in ENGINES:
        raise InputError(f"engine: {settings.engine}: there are {', '.join(ENGINES)}")
    settings.check_parts()
    for wanted, token, what in (
        (settings.add_bos, tokenizer.bos_id, "bos"),
        (settings.add_eos, tokenizer.eos_id, "eos"),
    ):
        if wanted and token is None:
            raise InputError(
                f"{tokenizer.path}: has no {what.upper()} token; give --add_{what} false, or another tokenizer"
            )
    return tokenizer


def sample_of(work, settings):
    """The first documents of up to 16 files: what a fast engine is tried on before it is trusted."""
    files = [file for _, files in work for file in files]
    texts = []
    for file in files[:: max(1, len(files) // 16)][:16]:
        with contextlib.suppress(InputError):  # a damaged file is reported when its turn comes
            found = read([file], settings.text_field, settings.sample_by, on_error=lambda message: None)
            texts += [document.text[:COMPARED] for document in itertools.islice(found, 64)]
    return texts


@program(PackSettings, check)
def main(settings, stage, tokenizer):
    part = None if settings.shard is None else PART.format(settings.shard, settings.of)
    stage.open(part)
    warn_of_left_out(stage.name, settings.input or [path for d in settings.datasets for path in d["input"]])
    if settings.overwrite_output_dir and not settings.finish:
        for unfinished in [*stage.folder.glob(".resume.json"), *stage.folder.glob("*/.resume.json")]:
            unfinished.unlink()
        shutil.rmtree(stage.folder / "parts", ignore_errors=True)
    if not settings.of and (counts := sorted({int(p.name.rpartition("-")[2]) for p in stage.folder.glob(PARTS)})):
        if len(counts) > 1:
            raise InputError(
                f"{stage.folder}/parts: parts of {' and of '.join(map(str, counts))}: remove those not wanted"
            )
        settings.of, settings.finish = counts[0], True  # an array has packed before

    # work: what is packed into which folder; spec: all that decides the bytes
    work = [(d["name"], expand(d["input"])) for d in settings.datasets or [{"name": ".", "input": settings.input}]]
    spec = {
        "tokenizer_sha256": tokenizer.hash,
        "bos_id": tokenizer.bos_id if settings.add_bos else None,
        "eos_id": tokenizer.eos_id if settings.add_eos else None,
        **{k: getattr(settings, k) for k in ("text_field", "id_field", "sample_by", "on_error", "shard_tokens")},
        "parts": settings.of or 1,
        "block_bytes": BLOCK_BYTES,  # places in the journal are counted in blocks
        "files": xxhash.xxh3_64_hexdigest(repr(work).encode()) if settings.of else None,
    }
    if settings.finish:
        fields, about_engine = join_all(work, stage.folder, settings.of, spec), None
    else:
        engine, about_engine = choose_engine(settings.engine, tokenizer, sample_of(work, settings))
        packer, skipped, fields = BlockPacker(tokenizer, engine, settings), Skipped(), {}
        packer.to_say = f"{stage.name}: {about_engine}"
        for name, files in work:
            mine = files if part is None else part_of(files, settings.shard, settings.of)
            folder = stage.folder / (part or "") / name
            (folder / "part.json").unlink(missing_ok=True)
            fields[name] = pack(mine, folder, packer, spec, settings.num_proc or cores(), skipped)
            if part:
                write_json(folder / "part.json", {**fields[name], "spec": spec})
    if part:
        packed = sum(f["documents"] for f in fields.values())
        return print(f"{stage.name}: part {settings.shard} of {settings.of}: {packed:,} documents; then --finish true")

    for name, files in work:
        if not fields[name]["tokens"]:
            what = "no text in its documents" if fields[name]["documents"] else "no document in there"
            raise InputError(f"{' '.join(files)}: {what}: nothing to pack")
    for name, _ in work:
        fields[name].update(tokenizer=str(tokenizer.path), vocab_size=tokenizer.size)
        fields[name].update({key: spec[key] for key in ("tokenizer_sha256", "bos_id", "eos_id")})
        if name != ".":
            write_json(stage.folder / name / "manifest.json", fields[name])
        print(f"{stage.folder / name}: {in_words(fields[name])}")
    counted = ("documents", "tokens", "words", "utf8_bytes", "bad_records")
    result = {key: sum(f[key] for f in fields.values()) for key in counted}
    hashed = {file: identity for f in fields.values() for file, identity in f["sources"].items()}
    stage.finish({**result, "engine": about_engine}, hashed=hashed, **fields.get(".", {}))
    for name, _ in work:
        (stage.folder / name / ".resume.json").unlink(missing_ok=True)
    shutil.rmtree(stage.folder / "parts", ignore_errors=True)
    return None


def in_words(manifest):
    """One line of what was packed: documents, tokens, and what the tokenizer makes of a word (boundary tokens left out)."""
    boundaries = sum(manifest[key] is not None for key in ("bos_id", "eos_id")) * manifest["documents"]
    tokens, words = manifest["tokens"] - boundaries, max(1, manifest["words"])
    whole = f", {manifest['whole_words'] / words:.1%} of the words whole" if "whole_words" in manifest else ""
    dropped = f", {manifest['bad_records']:,} bad records skipped" if manifest["bad_records"] else ""
    return (
        f"{manifest['documents']:,} documents, {manifest['tokens']:,} tokens, "
        f"{manifest['utf8_bytes'] / max(1, tokens):.2f} bytes per token, {tokens / words:.3f} tokens per word{whole}{dropped}"
    )


if __name__ == "__main__":
    main()
