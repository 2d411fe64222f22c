"""The first half of cleaning: every document by itself, in as many processes as there are cores.

Each input file has a folder, `file.work`: documents.jsonl.zst, what the filters left of it; for each of these documents an
element of about.npy (DOCUMENT) and of signatures.npy (dilqur/cleaning/near_duplicates.py); dropped.jsonl.zst; and, when it is
done, filtered.json.
"""

import collections
import contextlib
import decimal
import fcntl
import functools
import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import orjson
import xxhash
import zstandard

from dilqur.cleaning.corpus_report import EXAMPLES, length_bins
from dilqur.cleaning.document_filter import DocumentFilter
from dilqur.cleaning.near_duplicates import signatures
from dilqur.common.atomic import atomic_file, write_json
from dilqur.common.errors import InputError
from dilqur.common.parallel import ordered_map
from dilqur.common.paths import identity_of
from dilqur.common.progress import Progress
from dilqur.data.blocks import blocks
from dilqur.data.documents import Skipped, documents
from dilqur.data.npy_stream import npy_stream

DOCUMENT = np.dtype([("bytes", "<u4"), ("chars", "<u4"), ("id", "<u8")])  # UTF-8 bytes, characters, hash of the id


@dataclass
class InputFile:
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


def clusters_wanted(settings):
    """Are near copies looked for: to be dropped, or to be held out together?"""
    return settings.near_duplicate_threshold is not None or settings.validation_fraction > 0


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


def frame_of(lines):
    """Lines as a zstd frame. Frames one after the other are a .zst file: what workers have compressed is just put together."""
    return zstandard.compress(b"\n".join([*lines, b""])) if lines else b""
