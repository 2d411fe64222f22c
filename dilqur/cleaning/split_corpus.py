"""The second half of cleaning: what of the filtered documents is kept, and in which split, once all of them are known.

What the filters left of each input file lies in its `file.work` (dilqur/cleaning/filter_corpus.py).
"""

import json
import shutil
from contextlib import ExitStack

import numpy as np
import orjson
import zstandard

from dilqur.cleaning.corpus_report import EXAMPLES, length_bins
from dilqur.cleaning.document_filter import EXCERPT
from dilqur.cleaning.filter_corpus import clusters_wanted, frame_of
from dilqur.cleaning.near_duplicates import THRESHOLD, cluster
from dilqur.common.atomic import atomic_file
from dilqur.common.errors import InputError
from dilqur.common.parallel import ordered_map
from dilqur.common.progress import Progress
from dilqur.data.blocks import blocks

VERDICTS = ("train", "validation", "exact_duplicate", "near_duplicate", "duplicate_id")
TRAIN, VALIDATION, *DROPPED = range(len(VERDICTS))
_DOCUMENTS_AT_ONCE = 1 << 16


def judge(settings, files, work):
    """One of VERDICTS (uint8) for every document that the filters left, in the order of the files.

    A cluster of near copies is held out whole or not at all, as its first document says; all but that one are dropped only if
    the settings have a threshold for it. Takes no more memory than `cluster` does, 48 bytes a document.
    """
    paths = [file.work / "signatures.npy" for file in files]
    threshold = settings.near_duplicate_threshold
    searched = (threshold or THRESHOLD) if clusters_wanted(settings) else None
    exact_first, cluster_first = cluster(paths, work, searched, settings.memory_gb)
    verdicts = np.full(len(exact_first), TRAIN, np.uint8)
    if settings.validation_fraction:
        held_out = np.concatenate([_held_out(path, settings.validation_fraction) for path in paths])
        verdicts[held_out[cluster_first]] = VALIDATION
    # One after the other: of each id, text and cluster that the step before has left something of, the first stays.
    if settings.unique_ids:
        ids = np.concatenate([np.load(file.work / "about.npy", mmap_mode="r")["id"] for file in files])
        _drop_all_but_the_first(verdicts, first_with_the_same(ids), "duplicate_id")
    _drop_all_but_the_first(verdicts, exact_first, "exact_duplicate")
    if threshold:
        _drop_all_but_the_first(verdicts, cluster_first, "near_duplicate")
    return verdicts


def _held_out(signatures, fraction):
    """bool (documents,): which would be held out, had none of them a near copy."""
    return np.load(signatures, mmap_mode="r")["letters"] < np.uint64(min(2**64 - 1, int(fraction * 2**64)))


def first_with_the_same(ids):
    """int64 (documents,): the place of the first of the same `ids` (uint64). Takes 33 bytes a document beside them."""
    order = np.argsort(ids, kind="stable")  # equal ones stay in their order
    ordered = ids[order]
    begins = np.ones(len(ids), bool)
    begins[1:] = ordered[1:] != ordered[:-1]
    del ordered
    at = np.arange(len(ids))
    at[~begins] = 0
    np.maximum.accumulate(at, out=at)
    first = np.empty(len(ids), np.int64)
    first[order] = order[at]
    return first


def _drop_all_but_the_first(verdicts, groups, reason):
    """Of the documents with the same number in `groups` that are still to be kept, only the first is kept."""
    stays = np.full(len(verdicts), len(verdicts))
    parts = [slice(i, i + _DOCUMENTS_AT_ONCE) for i in range(0, len(verdicts), _DOCUMENTS_AT_ONCE)]
    for part in parts:
        left = np.flatnonzero(verdicts[part] <= VALIDATION) + part.start
        np.minimum.at(stays, groups[left], left)
    for part in parts:
        left = np.flatnonzero(verdicts[part] <= VALIDATION) + part.start
        verdicts[left[stays[groups[left]] != left]] = VERDICTS.index(reason)


def loads(line):
    """The record of a line of JSON, its id with all its digits: of an integer of over 64 bits orjson makes a float, or nothing."""
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError:
        return json.loads(line)
    return json.loads(line) if isinstance(record["id"], float) and abs(record["id"]) >= 2**63 else record


class BlockWriter:
    """What a worker process does last: the records of a block that are kept, as they go into the output files."""

    def __init__(self, settings):
        self.output_format, self.write_dropped = settings.output_format, settings.write_dropped

    def __call__(self, item):
        block, verdicts = item
        if block is None:  # the end of a file
            return None
        lines, examples = block.data.split(b"\n")[:-1], {}
        for verdict in DROPPED:
            for index in np.flatnonzero(verdicts == verdict)[:EXAMPLES]:
                record = loads(lines[index])
                examples.setdefault(VERDICTS[verdict], []).append((str(record["id"]), record["text"][:EXCERPT]))
        parts = {}
        for split in (TRAIN, VALIDATION):
            if chosen := [lines[index] for index in np.flatnonzero(verdicts == split)]:
                parts[split] = self._encoded(chosen)
        if self.write_dropped:
            gone = [(VERDICTS[v].encode(), line) for v, line in zip(verdicts, lines, strict=True) if v > VALIDATION]
            parts["dropped"] = frame_of([b'{"reason":"%s",%s' % (reason, line[1:]) for reason, line in gone])
        return block.share, parts, examples

    def _encoded(self, lines):
        if self.output_format == "jsonl.zst":
            return frame_of(lines)
        import pyarrow

        records = list(map(loads, lines))
        columns = {key: [r.get(key) for r in records] for key in ("text", "id", "source", "license", "url")}
        columns = {key: [v if v is None else str(v) for v in values] for key, values in columns.items()}
        return pyarrow.table(columns, schema=pyarrow.schema([(key, pyarrow.string()) for key in columns]))


def write_files(files, verdicts, folder, settings, num_proc):
    """Write the kept documents of every file below `folder`, train/ and validation/. Returns [what was written of each]."""
    lengths = [len(np.load(file.work / "about.npy", mmap_mode="r")) for file in files]
    starts = np.cumsum([0, *lengths]).tolist()
    before = np.cumsum([0, *((file.work / "documents.jsonl.zst").stat().st_size for file in files)]).tolist()
    progress = Progress("write", before[-1])

    def blocks_with_verdicts():
        for file, start in zip(files, starts, strict=False):
            for block in blocks(str(file.work / "documents.jsonl.zst")):
                stop = start + block.data.count(b"\n")
                yield block, verdicts[start:stop]
                start = stop
            if start != starts[file.number + 1]:
                raise InputError(f"{file.work}: damaged; remove {file.work.parent}, and start again")
            yield None, None

    encoded, out = ordered_map(BlockWriter(settings), blocks_with_verdicts(), num_proc), []
    for file, start, stop in zip(files, starts, starts[1:], strict=False):
        examples = {}
        with ExitStack() as stack:
            outputs = {}
            if settings.write_dropped:
                dropped = stack.enter_context(atomic_file(folder / "dropped" / f"{file.output}.jsonl.zst"))
                with (file.work / "dropped.jsonl.zst").open("rb") as by_the_filters:
                    shutil.copyfileobj(by_the_filters, dropped)
                dropped.write(zstandard.compress(b""))  # a file of nothing would be no .zst
                outputs["dropped"] = dropped.write
            while (encoded_block := next(encoded)) is not None:
                share, parts, some = encoded_block
                for split, part in parts.items():
                    if split not in outputs:
                        path = folder / VERDICTS[split] / f"{file.output}.{settings.output_format}"
                        outputs[split] = open_output(stack, path, part)
                    outputs[split](part)
                for reason, found in some.items():
                    examples[reason] = (examples.get(reason, []) + found)[:EXAMPLES]
                progress.at(before[file.number] + share * (before[file.number + 1] - before[file.number]))
        about, of_file = np.load(file.work / "about.npy", mmap_mode="r"), verdicts[start:stop]
        counts = {f"kept_{VERDICTS[split]}": int((of_file == split).sum()) for split in (TRAIN, VALIDATION)}
        counts |= {VERDICTS[split]: int((of_file == split).sum()) for split in DROPPED}
        counts |= {f"bytes_{VERDICTS[s]}": int(about["bytes"][of_file == s].sum()) for s in (TRAIN, VALIDATION)}
        kept = length_bins(about["chars"][of_file <= VALIDATION])
        out.append({"counts": counts, "examples": examples, "kept": kept.tolist()})
    progress.close()
    return out


def open_output(stack, path, part):
    """The function that appends a part like `part` to the file `path`, which appears when `stack` closes."""
    file = stack.enter_context(atomic_file(path))
    if isinstance(part, bytes):
        return file.write
    import pyarrow.parquet

    return stack.enter_context(pyarrow.parquet.ParquetWriter(file, part.schema, compression="zstd")).write_table
