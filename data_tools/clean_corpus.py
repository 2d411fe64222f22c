"""Raw documents in (jsonl, parquet, txt; plain, .gz, .zst, .bz2), clean ones out, with a count for every reason one was dropped.

    python data_tools/clean_corpus.py --input recipes/quickstart/corpus/az --language az --output_dir runs/try/clean
    python data_tools/clean_corpus.py --config recipes/quickstart/clean.yaml --check

First every document by itself (dilqur/cleaning/document_filter.py has the steps, --help their settings), then all of them together:
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
import copy
import fcntl
import os
import re
import shutil
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal, Required

import numpy as np
import orjson
import regex
import xxhash
from pydantic import Field
from typing_extensions import TypedDict

from dilqur.cleaning.corpus_report import EXAMPLES, length_bins, write_report
from dilqur.cleaning.document_filter import FilterSettings
from dilqur.cleaning.filter_corpus import BlockFilter, InputFile, filter_files, is_done
from dilqur.cleaning.split_corpus import judge, write_files
from dilqur.common.constants import Fraction
from dilqur.common.errors import InputError
from dilqur.common.parallel import cores, part_of
from dilqur.common.paths import COMPRESSIONS, FORMATS, expand, warn_of_left_out
from dilqur.data.documents import ReadingSettings
from dilqur.pipeline.inputs import Documents
from dilqur.pipeline.manifest import file_identity
from dilqur.pipeline.parts import ParallelSettings
from dilqur.pipeline.program import program
from dilqur.pipeline.settings_parser import keys_that, setting, to_dict
from dilqur.pipeline.stage import StageSettings

PER_SOURCE = (ReadingSettings, FilterSettings)
_KEYS = {f.name: f.type for settings in PER_SOURCE for f in fields(settings)}
Source = TypedDict(
    "Source", {"name": Required[str], "input": Required[list[Documents]], "license": str, **_KEYS}, total=False
)
Source.__pydantic_config__ = {"extra": "forbid"}


@dataclass(kw_only=True)
class CleanSettings(StageSettings, ReadingSettings, FilterSettings, ParallelSettings):
    input: list[Documents] | None = setting("files, folders or globs", default=None)
    sources: list[Source] | None = setting(
        "instead: {name, input, license, and any of the keys of reading and filtering}", default=None
    )
    id_field: str = setting(
        "key of a document's id, text or number; without one it gets SOURCE/FILE:LINE", default="id"
    )
    url_field: str = setting("key of its address, for blocked_urls", default="url")
    unique_ids: bool = setting("drop a document whose id came before", default=False)
    near_duplicate_threshold: Annotated[float, Field(ge=0.3, le=1)] | None = setting(
        "drop what shares so much with an earlier document, e.g. 0.65; none: exact copies only", default=None
    )
    memory_gb: Annotated[float, Field(ge=0.5)] = setting(
        "memory the search for copies may take", default=4.0, on_resume="free"
    )
    validation_fraction: Fraction = setting(
        "share of the documents held out, by hash of text; near copies together", default=0.0
    )
    write_dropped: bool = setting("write what is dropped, with the reason, to dropped/FILE.jsonl.zst", default=False)
    output_format: Literal["jsonl.zst", "parquet"] = setting("what to write", default="jsonl.zst")


RESULTS = ("train", "validation", "dropped", "report.json", "report.md", "lengths.png")
LONGEST_NAME = 255  # bytes of a file's name, on the file systems of Linux
WORK = ".work"  # hidden: nothing in it is taken for a document
VERSION = 2  # of what lies in .work: a file that another version has filtered is filtered again


def list_files(settings, work):
    """(the sources as settings of their own, every InputFile). A file is in one source only."""
    if bool(settings.input) == bool(settings.sources):
        raise InputError("give either --input or, in a recipe, sources (a list of {name, input, …})")
    sources, files, taken, outputs = [], [], {}, set()
    for stated in settings.sources or [{"name": "", "input": settings.input}]:
        source = copy.copy(settings)
        for key, value in stated.items():
            setattr(source, key, value)
        source.license = stated.get("license")
        plain = regex.fullmatch(r"\w[\w.-]*", source.name) and len(source.name.encode()) <= LONGEST_NAME
        if (settings.sources and not plain) or source.name in (s.name for s in sources):
            raise InputError(
                f"sources: the name {source.name!r} must be a plain folder name (letters, digits, _ . -, no more than "
                f"{LONGEST_NAME} bytes), and there only once"
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
            files.append(
                InputFile(len(files), path, len(sources), output, work / xxhash.xxh3_64_hexdigest(path.encode()))
            )
        sources.append(source)
    return sources, files


# -- the program ------------------------------------------------------------------------------------------------------


def check(settings):
    """(the sources, their files, the BlockFilter). Raises InputError."""
    settings.check_parts()
    sources, files = list_files(settings, Path(settings.output_dir) / WORK)
    return sources, files, BlockFilter(settings, sources, files)


@program(CleanSettings, check)
def main(settings, stage, checked):
    (sources, files, block_filter), work = checked, stage.folder / WORK
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
    of_sources, free = [], keys_that(CleanSettings, "free")
    for s in sources:
        values = {k: v for k, v in to_dict(s).items() if k not in (*free, "input", "sources")}
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
