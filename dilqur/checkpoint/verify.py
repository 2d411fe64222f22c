"""Reads every byte of a checkpoint: all checksums, and every element of every parameter in exactly one piece."""

import json
import math
from concurrent.futures import ThreadPoolExecutor

import torch

from dilqur.checkpoint.damage import refuse_lost_moments, refuse_rounded_weights
from dilqur.checkpoint.format import KINDS, CheckpointReader
from dilqur.checkpoint.local_shards import MOMENTS
from dilqur.checkpoint.steps import step_of
from dilqur.common.errors import InputError

READERS = 4  # threads, each with one piece in memory


def verify_checkpoint(folder):
    """What the checkpoint is, as a dict. Raises InputError with the name of the file that is missing, cut or damaged."""
    reader = CheckpointReader(folder)
    files = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(reader.folder.glob("rank-*.json"))]
    held = {}
    for file in files:
        for piece in file["pieces"]:
            kind = {"fp32": "weight"}.get(piece["kind"], piece["kind"])  # as version 1 called it
            held.setdefault((kind, piece["name"]), []).append((piece["start"], piece["length"], file["file"]))
    kinds = [kind for kind in KINDS if any(kind == k for k, _ in held)]
    for name, shape in reader.shapes.items():
        for kind in kinds:
            _refuse_gaps(reader.folder, kind, name, sorted(held.get((kind, name), [])), math.prod(shape))
    if step_of(reader.folder) not in (None, reader.trainer["step"]):
        raise InputError(f"{reader.folder}: its trainer.json is of step {reader.trainer['step']}")

    moved = set()

    def read(job):
        kind, name, start, length = job
        piece = torch.empty(length, dtype=reader.dtypes[kind, name])
        reader.fill(kind, name, start, piece)
        if kind in MOMENTS and piece.any():
            moved.add(name)

    jobs = [(kind, name, start, length) for (kind, name), pieces in held.items() for start, length, _ in pieces]
    with ThreadPoolExecutor(READERS) as pool:
        for _ in pool.map(read, jobs):
            pass
    refuse_rounded_weights(reader)
    if MOMENTS[0] in kinds:
        refuse_lost_moments(reader, moved)
    return {
        "checkpoint": str(reader.folder),
        "step": reader.trainer["step"],
        "parameters": sum(math.prod(shape) for shape in reader.shapes.values()),
        "tensors": len(reader.shapes),
        "optimizer": kinds == list(KINDS),
        "dtypes": sorted({str(dtype).removeprefix("torch.") for dtype in reader.dtypes.values()}),
        "bytes": sum(path.stat().st_size for path in reader.folder.iterdir()),
        "ranks": len(files),
    }


def describe(result):
    """What `verify_checkpoint` found, in one line."""
    ranks = f"{result['ranks']} rank{'s' * (result['ranks'] > 1)}"
    return (
        f"{result['checkpoint']}: whole: step {result['step']}, {result['parameters']:,} parameters in {result['tensors']} "
        f"tensors, {'both moments' if result['optimizer'] else 'no optimizer'}, {' and '.join(result['dtypes'])}, "
        f"{result['bytes'] / 1e9:,.3f} GB from {ranks}"
    )


def _refuse_gaps(folder, kind, name, pieces, size):
    """pieces: [(start, length, file), …] in order."""
    at = 0
    for start, length, file in pieces:
        if start < at:
            raise InputError(f"{folder / file}: holds {kind}/{name} from element {start}, as another piece does")
        if start > at:
            raise InputError(f"{folder}: no file holds {kind}/{name}[{at}:{start}]")
        at = start + length
    if at != size:
        raise InputError(f"{folder}: no file holds {kind}/{name}[{at}:{size}]")
