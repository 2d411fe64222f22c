"""Raw documents in (jsonl, parquet, txt; plain, .gz, .zst, .bz2), clean ones out, with a count for every reason one was dropped.

    python data_tools/clean_corpus.py --input recipes/quickstart/corpus/az --language az --output_dir runs/try/clean
    python data_tools/clean_corpus.py --config recipes/quickstart/clean.yaml --check

First every document by itself (dilqur/document_filter.py has the steps, --help their settings), then all of them together:
exact copies, near copies (MinHash) and, if asked, documents of the same id are dropped but for the first one. What is left
goes to OUTPUT_DIR/train/FILE.jsonl.zst, and the share `validation_fraction`, chosen by a hash of the text of the first
document of each cluster of near copies, to OUTPUT_DIR/validation/FILE.jsonl.zst; FILE is the input file's name. Near copies
are held out together also where they are not dropped.

A recipe may have `sources`, each with settings of its own; their files go to train/NAME/ and validation/NAME/:

    sources:
      - {name: web, input: [data/web], license: ODC-BY, min_sentence_line_share: 0.12, pii: {email: mask, phone: mask}}
      - {name: law, input: [data/law], max_repeated_ngram_share: 0.5}

Killed, it goes on with the first file that is not done when it is started again. On several nodes each cleans a part of the
files, and a last call does what needs all of them (--finish true only makes sure that all parts are done):

    python data_tools/clean_corpus.py --config recipes/quickstart/clean.yaml --output_dir runs/try/clean-parts --shard 0 --of 2
    python data_tools/clean_corpus.py --config recipes/quickstart/clean.yaml --output_dir runs/try/clean-parts --shard 1 --of 2
    python data_tools/clean_corpus.py --config recipes/quickstart/clean.yaml --output_dir runs/try/clean-parts --of 2 --finish true

report.md and report.json say what was kept, why the rest was not, with examples; lengths.png shows the lengths.
"""

import collections
import contextlib
import copy
import decimal
import fcntl
import functools
import json
import math
import os
import re
import shutil
import sys
import time
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Required

import numpy as np
import orjson
import xxhash
import zstandard
from pydantic import Field
from typing_extensions import TypedDict

from dilqur.atomic import atomic_file, write_json
from dilqur.corpus_report import EXAMPLES, length_bins, write_report
from dilqur.document_filter import DocumentFilter, FilterSettings
from dilqur.documents import ReadingSettings, Skipped, documents
from dilqur.errors import InputError, program
from dilqur.input_files import COMPRESSIONS, FORMATS, blocks, expand, identity_of, warn_of_left_out
from dilqur.near_duplicates import signatures
from dilqur.npy_stream import npy_stream
from dilqur.parallel import ParallelSettings, cores, ordered_map, part_of
from dilqur.progress import Progress
from dilqur.recipe import parse, to_dict
from dilqur.split_corpus import DOCUMENT, clusters_wanted, frame_of, judge, write_files
from dilqur.stage import Documents, Stage, StageSettings, file_identity

Share = Annotated[float, Field(ge=0, le=1)]

PER_SOURCE = (ReadingSettings, FilterSettings)
_KEYS = {f.name: f.type for settings in PER_SOURCE for f in fields(settings)}
Source = TypedDict(
    "Source", {"name": Required[str], "input": Required[list[Documents]], "license": str, **_KEYS}, total=False
)
Source.__pydantic_config__ = {"extra": "forbid"}


@dataclass(kw_only=True)
class CleanSettings(StageSettings, ReadingSettings, FilterSettings, ParallelSettings):
    harmless: ClassVar = ("memory_gb", *ParallelSettings.harmless)

    input: list[Documents] | None = field(default=None, metadata={"help": "files, folders or globs"})
    sources: list[Source] | None = field(
        default=None, metadata={"help": "instead: {name, input, license, and any of the keys of reading and filtering}"}
    )
    id_field: str = field(
        default="id", metadata={"help": "key of a document's id, text or number; without one it gets SOURCE/FILE:LINE"}
    )
    url_field: str = field(default="url", metadata={"help": "key of its address, for blocked_urls"})
    unique_ids: bool = field(default=False, metadata={"help": "drop a document whose id came before"})
    near_duplicate_threshold: Annotated[float, Field(ge=0.3, le=1)] | None = field(
        default=None,
        metadata={"help": "drop what shares so much with an earlier document, e.g. 0.65; none: exact copies only"},
    )
    memory_gb: Annotated[float, Field(ge=0.5)] = field(
        default=4.0, metadata={"help": "memory the search for copies may take"}
    )
    validation_fraction: Share = field(
        default=0.0, metadata={"help": "share of the documents held out, by hash of text; near copies together"}
    )
    write_dropped: bool = field(
        default=False, metadata={"help": "write what is dropped, with the reason, to dropped/FILE.jsonl.zst"}
    )
    output_format: Literal["jsonl.zst", "parquet"] = field(default="jsonl.zst", metadata={"help": "what to write"})


RESULTS = ("train", "validation", "dropped", "report.json", "report.md", "lengths.png")
LONGEST_NAME = 255  # bytes of a file's name, on the file systems of Linux
VERSION = 2  # of what lies in .work: a file that another version has filtered is filtered again


@dataclass
class File:
    """One input file: its number over all, its source, the name of its output without suffix, and where its work lies."""

    number: int
    path: str
    source: int
    output: str
    work: Path

    @property
    def done(self):
        return self.work / "filtered.json"

    def lock(self):
        """Hold it while filtering: two jobs on one file would write into each other's work. Returns the open lock file."""
        self.work.parent.mkdir(parents=True, exist_ok=True)
        file = self.work.with_suffix(".lock").open("a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{self.path}: another process is cleaning it; wait for that one") from None
        except OSError:  # a file system without locks: as in Stage.open
            pass
        return file


def list_files(settings, work):
    """(the sources as settings of their own, every input File). A file is in one source only."""
    if bool(settings.input) == bool(settings.sources):
        raise InputError("give either --input or, in a recipe, sources (a list of {name, input, …})")
    sources, files, taken, outputs = [], [], {}, set()
    for stated in settings.sources or [{"name": "", "input": settings.input}]:
        source = copy.copy(settings)
        for key, value in stated.items():
            setattr(source, key, value)
        source.license = stated.get("license")
        plain = not settings.sources or re.fullmatch(r"\w[\w.-]{0,99}", source.name)
        if not plain or source.name in (s.name for s in sources):
            raise InputError(
                f"sources: the name {source.name!r} must be a plain folder name (letters, digits, _ . -), and there only once"
            )
        if not stated["input"]:
            raise InputError(f"sources: {source.name}: its input is an empty list")
        for path in expand(stated["input"]):
            real = os.path.realpath(path)  # a link to a file is that file
            if real in taken:
                other, owner = taken[real]
                same = "" if other == path else f", which is {other},"
                raise InputError(
                    f"sources: {path}{same} is in {owner} and in {source.name}; take it out of one of them"
                )
            taken[real] = path, source.name
            name = Path(path).name
            for suffix in (*COMPRESSIONS, *FORMATS):
                name = re.sub(f"{re.escape(suffix)}$", "", name, flags=re.IGNORECASE)
            output, n = str(Path(source.name) / name), 1
            while output in outputs:
                output, n = str(Path(source.name) / f"{name}-{n + 1}"), n + 1
            outputs.add(output)
            if len(f".{Path(output).name}.jsonl.zst.part".encode()) > LONGEST_NAME:
                raise InputError(
                    f"{path}: too long a name: that of its result would have over {LONGEST_NAME} bytes; shorten it"
                )
            files.append(File(len(files), path, len(sources), output, work / xxhash.xxh3_64_hexdigest(path.encode())))
        sources.append(source)
    return sources, files


# -- each document by itself ------------------------------------------------------------------------------------------


@dataclass
class FilteredBlock:
    """What the filters left of a block. frame: its records as compressed jsonl, dropped: the
    others if they are wanted; about: DOCUMENT (n,)."""

    share: float
    frame: bytes
    dropped: bytes
    about: np.ndarray
    signatures: np.ndarray
    counts: collections.Counter
    examples: dict
    read: np.ndarray  # how many documents were read of each length
    bad: list


class BlockFilter:
    """What a worker process does first: parse a block, filter its documents, sign what is left."""

    def __init__(self, settings, sources, files):
        self.settings, self.sources, self.files = settings, sources, files
        self.filters = [DocumentFilter(source) for source in sources]

    def prepare(self):
        """Build the tables that the filters keep, once, before there are worker processes that would each build theirs."""
        for filter_ in self.filters:
            filter_.prepare()
        signatures(["ə 1."])

    def __call__(self, numbered):
        number, block = numbered
        if block is None:  # the end of a file
            return None
        file, settings = self.files[number], self.settings
        source, filter_ = self.sources[file.source], self.filters[file.source]
        counts, examples, bad = collections.Counter(), collections.defaultdict(list), []
        lines, texts, ids, lengths, dropped = [], [], [], [], []
        on_error = bad.append if source.on_error == "skip" else None
        raw_lines = functools.cache(lambda: block.data.split(b"\n"))
        for document in documents(block, source.text_field, source.sample_by, on_error):
            record = document.record
            text, reason, done = filter_.apply(document.text, record.get(settings.url_field))
            counts["read"] += 1
            counts.update({f"done_{name}": n for name, n in done.items()})
            lengths.append(len(text))
            name = own_id(record, settings.id_field, raw_lines, document.line - block.line)
            name = f"{file.output}:{document.line}" if name is None else name
            if reason:
                counts[reason] += 1
                if len(examples[reason]) < EXAMPLES:
                    examples[reason].append((document.where, filter_.excerpt(text, reason)))
                if settings.write_dropped:
                    dropped.append(as_line({"reason": reason, "id": name, "text": text}))
                continue
            kept = {
                "text": text,
                "id": name,
                "source": record.get("source") or source.name or None,
                "license": record.get("license") or source.license,
                "url": record.get(settings.url_field),
            }
            lines.append(as_line({key: value for key, value in kept.items() if value is not None}))
            texts.append(text)
            ids.append(xxhash.xxh3_64_intdigest(str(name).encode()))
        counts.update({"read": len(bad), "bad_record": len(bad)})
        for message in bad[:EXAMPLES]:
            where, _, what = message.partition(": ")
            examples["bad_record"].append((where, what.partition("; --on_error")[0]))
        about = np.empty(len(texts), DOCUMENT)
        about["bytes"], about["chars"], about["id"] = [len(t.encode()) for t in texts], list(map(len, texts)), ids
        return FilteredBlock(
            share=block.share,
            frame=frame_of(lines),
            dropped=frame_of(dropped),
            about=about,
            signatures=signatures(texts, near=clusters_wanted(settings)),
            counts=counts,
            examples=dict(examples),
            read=length_bins(lengths),
            bad=bad,
        )


def filter_files(files, block_filter, specs, num_proc):
    """Filter those of `files` that are not done: FILE.work/documents.jsonl.zst, signatures.npy, about.npy, filtered.json.

    specs: of all files, as `specs_of` returns them.
    """
    left = [file for file in files if not is_done(file, specs)]
    before = np.cumsum([0, *(identity_of(file.path)["bytes"] for file in left)]).tolist()
    at = {file.number: index for index, file in enumerate(left)}
    settings, sources = block_filter.settings, block_filter.sources
    progress, skipped = Progress("filter", before[-1]), Skipped()
    identities = {}

    def numbered_blocks():
        for file in left:
            source, identity = sources[file.source], identities.setdefault(file.number, {})
            columns = [source.text_field, settings.id_field, settings.url_field, "source", "license"]
            for block in blocks(file.path, source.sample_by, source.on_error == "skip", columns, identity):
                yield file.number, block
            yield file.number, None

    block_filter.prepare()
    filtered = ordered_map(block_filter, numbered_blocks(), num_proc)
    for file in left:
        lock = file.lock()
        counts, examples, read = collections.Counter(), {}, length_bins([])
        shutil.rmtree(file.work, ignore_errors=True)
        with (
            atomic_file(file.work / "documents.jsonl.zst") as frames,
            atomic_file(file.work / "dropped.jsonl.zst") as dropped,
            npy_stream(file.work / "signatures.npy", signatures([]).dtype) as sign,
            npy_stream(file.work / "about.npy", DOCUMENT) as describe,
        ):
            while (part := next(filtered)) is not None:
                frames.write(part.frame)
                dropped.write(part.dropped)
                sign(part.signatures)
                describe(part.about)
                counts.update(part.counts)
                read += part.read
                for reason, some in part.examples.items():
                    examples[reason] = (examples.get(reason, []) + some)[:EXAMPLES]
                for message in part.bad:
                    skipped(message)
                index = at[file.number]
                progress.at(before[index] + part.share * (before[index + 1] - before[index]))
            frames.write(zstandard.compress(b""))  # a file of nothing would be no .zst
        write_json(
            file.done,
            {
                "spec": specs[file.number],
                "counts": counts,
                "examples": examples,
                "read": read.tolist(),
                "identity": identities[file.number],
                "path": file.path,
            },
        )
        lock.close()
    progress.close()


def own_id(record, key, raw_lines, index):
    """The id that a record came with, a text or a number; None if it has none.

    raw_lines: a function that returns the lines of JSON, of which the record's is number `index`: orjson makes a float of an
    integer of over 64 bits, and its last digits are in the line alone.
    """
    value = record.get(key)
    if isinstance(value, float) and abs(value) >= 2**63:
        # parquet has no lines; a number may have more digits than Python reads, and a record be nested too deeply for it
        with contextlib.suppress(AttributeError, ValueError, RecursionError):
            value = json.loads(raw_lines()[index])[key]
    if isinstance(value, float) and not math.isfinite(value):  # NaN: what pandas writes where there is none
        return None
    return value if isinstance(value, str | int | float | decimal.Decimal) and not isinstance(value, bool) else None


def as_line(record):
    """`record` as a line of JSON."""
    try:
        return orjson.dumps(record, default=str)
    except TypeError:  # an integer of over 64 bits
        return json.dumps(record, ensure_ascii=False, default=str).encode("utf-8")


def is_done(file, specs):
    """Were this file's documents filtered as they would be now?"""
    try:
        done = orjson.loads(file.done.read_bytes())
    except (FileNotFoundError, orjson.JSONDecodeError):
        return False
    same = done["identity"].items() >= identity_of(file.path).items()
    return same and done["spec"] == specs[file.number] and done["path"] == file.path


# -- the program ------------------------------------------------------------------------------------------------------


@program
def main():
    settings = parse(CleanSettings, __doc__)
    stage = Stage(settings, __file__)
    settings.check_parts()
    stage.refuse_finished()
    work = stage.folder / ".work"  # a hidden folder: nothing in it is taken for a document
    sources, files = list_files(settings, work)
    block_filter = BlockFilter(settings, sources, files)
    if settings.check:
        return print(f"{stage.name}: ok")
    if settings.overwrite_output_dir:
        refuse_running(stage.folder)
    there = [name for name in RESULTS if (stage.folder / name).exists()]
    if there and not work.exists() and not (stage.folder / "manifest.json").exists():
        raise InputError(f"{stage.folder}: holds {there[0]}, which is not of this program; choose another --output_dir")
    stage.open(None if settings.shard is None else f".work/part-{settings.shard:05d}")
    if settings.overwrite_output_dir:  # not before the folder is ours
        shutil.rmtree(work, ignore_errors=True)
    warn_of_left_out(stage.name, [path for source in sources for path in source.input])
    if too_short := sum(filter_.benchmark_items_too_short for filter_ in block_filter.filters):
        print(f"{stage.name}: {too_short:,} texts of the benchmarks are too short to be looked for", file=sys.stderr)

    started, num_proc, specs = time.perf_counter(), settings.num_proc or cores(), specs_of(sources, files)
    if settings.shard is not None:
        chosen = set(part_of([file.path for file in files], settings.shard, settings.of))
        mine = [file for file in files if file.path in chosen]
        filter_files(mine, block_filter, specs, num_proc)
        return print(f"{stage.name}: part {settings.shard} of {settings.of}: {len(mine)} files; then --finish true")
    if settings.finish:
        if missing := [file.path for file in files if not is_done(file, specs)]:
            raise InputError(
                f"{stage.folder}: {len(missing)} files are not done in any part, the first is {missing[0]}"
            )
    else:
        filter_files(files, block_filter, specs, num_proc)

    filtered = [orjson.loads(file.done.read_bytes()) for file in files]
    if not any(f["counts"].get("read", 0) > f["counts"].get("bad_record", 0) for f in filtered):
        shutil.rmtree(work)
        inputs = [path for source in sources for path in source.input]
        raise InputError(f"{' '.join(inputs)}: no document in there: nothing to clean")
    verdicts = judge(settings, files, work)
    whole = work / "whole"
    shutil.rmtree(whole, ignore_errors=True)
    written = write_files(files, verdicts, whole, settings, num_proc)
    report = collect(sources, files, filtered, written)
    counts = report["counts"]
    if not counts["kept_train"]:
        shutil.rmtree(work)
        if held_out := counts["kept_validation"]:
            raise InputError(
                f"all {held_out} documents that are left are held out, none is for training; lower validation_fraction "
                f"({settings.validation_fraction:g})"
            )
        reasons = ", ".join(f"{name} {n:,}" for name, n in report["dropped"].items())
        raise InputError(f"no document of {counts['read']:,} is left ({reasons}): loosen a filter")
    write_report(report, whole)
    for name in RESULTS:  # killed in here, the next start takes away what has been moved and does it all again
        target = stage.folder / name
        shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)
        if (whole / name).exists():
            (whole / name).replace(target)
    size = counts["bytes_train"] + counts["bytes_validation"]
    hashed = {file.path: f["identity"] for file, f in zip(files, filtered, strict=True)}
    result = {**counts, "dropped": report["dropped"], "seconds": round(time.perf_counter() - started, 3)}
    stage.finish(result, hashed=hashed)
    shutil.rmtree(work)
    dropped = "".join(f", {name} {n:,}" for name, n in report["dropped"].items())
    print(
        f"{stage.name}: {counts['read']:,} documents read, {counts['kept_train']:,} to train/, "
        f"{counts['kept_validation']:,} to validation/ ({size / 1e6:,.2f} MB){dropped}"
    )
    return None


def refuse_running(folder):
    """InputError where another process is at work on a file or a part in `folder`: its work would be removed under it."""
    for lock in [folder / ".lock", *sorted((folder / ".work").rglob("*.lock"))]:
        if not lock.exists():
            continue
        with lock.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                owner = file.read().strip() or "another process"
                raise InputError(
                    f"{folder}: {owner} is at work in it ({lock.relative_to(folder)}); wait for it, or end it, before "
                    "--overwrite_output_dir"
                ) from None
            except OSError:  # a file system without locks: as in Stage.open
                pass


def specs_of(sources, files):
    """A hash for each file, of all that decides what the filters make of it: its source's settings and name, what is in the
    files that these name, and its own name. Of a source that changes only its own files are filtered again."""
    of_sources = []
    for s in sources:
        values = {k: v for k, v in to_dict(s).items() if k not in (*s.harmless, "input", "sources")}
        named = {
            *expand([*(s.boilerplate_files or []), *(s.benchmarks or [])]),
            *(s.blocked_urls or []),
            *(s.blocked_hashes or []),
            *([s.language_model] if s.language_model else []),
        }
        contents = [file_identity(Path(file))["xxh3"] for file in sorted(named)]
        of_sources.append([VERSION, values, s.name, s.license, contents])
    return [xxhash.xxh3_64_hexdigest(orjson.dumps([*of_sources[file.source], file.output])) for file in files]


def collect(sources, files, filtered, written):
    """The report: counts, reasons, examples and lengths, over all and by source. Every document that was read is in it."""
    report = {"sources": {}}
    for number, source in enumerate(sources):
        part = {"counts": collections.Counter(), "examples": {}, "read": length_bins([]), "kept": length_bins([])}
        for file, before, after in zip(files, filtered, written, strict=True):
            if file.source != number:
                continue
            part["counts"].update(before["counts"])
            part["counts"].update(after["counts"])
            for reason, some in {**before["examples"], **after["examples"]}.items():
                part["examples"][reason] = (part["examples"].get(reason, []) + some)[:EXAMPLES]
            part["read"] += np.array(before["read"])
            part["kept"] += np.array(after["kept"])
        report["sources"][source.name or "input"] = part
    total = sum((part["counts"] for part in report["sources"].values()), collections.Counter())
    kept = ("kept_train", "kept_validation", "bytes_train", "bytes_validation")
    report["counts"] = {key: total[key] for key in ("read", *kept)}
    reasons = {
        key: n for key, n in sorted(total.items()) if n and key not in report["counts"] and not key.startswith("done_")
    }
    report["dropped"] = reasons
    report["done"] = {key.removeprefix("done_"): n for key, n in sorted(total.items()) if key.startswith("done_")}
    lost = total["read"] - total["kept_train"] - total["kept_validation"] - sum(reasons.values())
    if lost:
        raise AssertionError(f"{lost} of {total['read']} documents are neither kept nor dropped for a reason")
    return report


if __name__ == "__main__":
    main()
