"""The second half of cleaning: what of the filtered documents is kept, and in which split, once all of them are known.

Each input file has a folder, `file.work`, with what the filters left of it: documents.jsonl.zst, and for each document of it an
element of about.npy (DOCUMENT) and of signatures.npy (dilqur/near_duplicates.py).
"""

import shutil
from contextlib import ExitStack

import numpy as np
import orjson
import zstandard

from dilqur.atomic import atomic_file
from dilqur.corpus_report import EXAMPLES, length_bins
from dilqur.document_filter import EXCERPT
from dilqur.errors import InputError
from dilqur.input_files import blocks
from dilqur.near_duplicates import cluster
from dilqur.parallel import ordered_map
from dilqur.progress import Progress

DOCUMENT = np.dtype([("bytes", "<u4"), ("chars", "<u4"), ("id", "<u8")])  # UTF-8 bytes, characters, hash of the id
VERDICTS = ("train", "validation", "exact_duplicate", "near_duplicate", "duplicate_id")
TRAIN, VALIDATION, *DROPPED = range(len(VERDICTS))


def judge(settings, files, work):
    """One of VERDICTS (uint8) for every document that the filters left, in the order of the files."""
    paths = [file.work / "signatures.npy" for file in files]
    threshold = settings.near_duplicate_threshold
    exact_first, cluster_first = cluster(paths, work, threshold, settings.memory_gb)
    numbers = np.arange(len(exact_first))
    verdicts = np.full(len(numbers), TRAIN, np.uint8)
    if settings.validation_fraction:
        letters = np.concatenate([np.load(path, mmap_mode="r")["letters"] for path in paths])
        held_out = letters < np.uint64(min(2**64 - 1, int(settings.validation_fraction * 2**64)))
        verdicts[held_out[cluster_first]] = VALIDATION
    if not settings.unique_ids:
        verdicts[cluster_first != numbers] = VERDICTS.index("near_duplicate")
        verdicts[exact_first != numbers] = VERDICTS.index("exact_duplicate")
        return verdicts
    # One after the other: of each text and of each cluster that the step before has left something of, the first stays.
    ids = np.concatenate([np.load(file.work / "about.npy", mmap_mode="r")["id"] for file in files])
    _, first, place = np.unique(ids, return_index=True, return_inverse=True)
    for groups, reason in (
        (first[place], "duplicate_id"),
        (exact_first, "exact_duplicate"),
        (cluster_first, "near_duplicate"),
    ):
        left, stays = verdicts <= VALIDATION, np.full(len(numbers), len(numbers))
        np.minimum.at(stays, groups[left], numbers[left])
        verdicts[left & (numbers != stays[groups])] = VERDICTS.index(reason)
    return verdicts


def frame_of(lines):
    """Lines as a zstd frame. Frames one after the other are a .zst file: what workers have compressed is just put together."""
    return zstandard.compress(b"\n".join([*lines, b""])) if lines else b""


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
                record = orjson.loads(lines[index])
                examples.setdefault(VERDICTS[verdict], []).append((str(record["id"]), record["text"][:EXCERPT]))
        parts = {}
        for split in (TRAIN, VALIDATION):
            if chosen := [lines[index] for index in np.flatnonzero(verdicts == split)]:
                parts[split] = self._encoded(chosen)
        if self.write_dropped:
            records = [
                (VERDICTS[v], orjson.loads(line)) for v, line in zip(verdicts, lines, strict=True) if v > VALIDATION
            ]
            parts["dropped"] = frame_of([orjson.dumps({"reason": reason, **record}) for reason, record in records])
        return block.share, parts, examples

    def _encoded(self, lines):
        if self.output_format == "jsonl.zst":
            return frame_of(lines)
        import pyarrow

        records = [orjson.loads(line) for line in lines]
        columns = {key: [r.get(key) for r in records] for key in ("text", "id", "source", "license", "url")}
        columns = {key: [v if v is None else str(v) for v in values] for key, values in columns.items()}
        return pyarrow.table(columns, schema=pyarrow.schema([(key, pyarrow.string()) for key in columns]))


def write_files(files, verdicts, folder, settings, num_proc):
    """Write the kept documents of every file below `folder`, train/ and validation/. Returns [what was written of each]."""
    lengths = [len(np.load(file.work / "about.npy", mmap_mode="r")) for file in files]
    starts = np.cumsum([0, *lengths]).tolist()
    progress = Progress("write", len(files))

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
                progress.at(file.number + share)
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
