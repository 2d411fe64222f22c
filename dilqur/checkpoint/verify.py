"""Is a checkpoint sound? `verify_checkpoint` reads every byte: all checksums, and each element in exactly one chunk.

The two `refuse_…` find checkpoints with whole files but wrong content. An earlier version saved gathered copies right after
an evaluation under FSDP2, not the weights that the optimizer steps: the embeddings or the head, and the last norm, have zero
moments, and in a bf16 run weights rounded to bfloat16.
"""

import math
from concurrent.futures import ThreadPoolExecutor

import torch

from dilqur.checkpoint.format import KINDS, CheckpointReader
from dilqur.checkpoint.local_shards import MOMENTS
from dilqur.checkpoint.steps import step_of
from dilqur.common.errors import InputError

READERS = 4  # threads, each with one chunk in memory
SAVED_WRONG = (
    "an earlier version saved it wrong, after an evaluation under FSDP2 (--resume_without_optimizer true takes its weights as "
    "they are, and begins new moments)"
)


def verify_checkpoint(folder):
    """What the checkpoint is, as a dict. Raises InputError with the name of the file that is missing, cut or damaged."""
    reader, moved = CheckpointReader(folder), set()
    kinds = [kind for kind in KINDS if any(kind == stored for stored, _ in reader.dtypes)]
    for name, shape in reader.shapes.items():
        for kind in kinds:
            _refuse_gaps(reader, kind, name, math.prod(shape))
    if step_of(reader.folder) not in (None, reader.trainer["step"]):
        raise InputError(f"{reader.folder}: its trainer.json is of step {reader.trainer['step']}")

    def read(job):
        (kind, name), chunk = job
        elements = torch.empty(chunk["length"], dtype=reader.dtypes[kind, name])
        reader.fill(kind, name, chunk["start"], elements)
        if kind in MOMENTS and elements.any():
            moved.add(name)

    with ThreadPoolExecutor(READERS) as pool:
        list(pool.map(read, ((key, chunk) for key, chunks in reader.chunks.items() for chunk in chunks)))
    refuse_rounded_weights(reader)
    if MOMENTS[0] in kinds:
        refuse_lost_moments(reader, moved)
    return {
        "checkpoint": str(reader.folder),
        "step": reader.trainer["step"],
        "parameters": sum(map(math.prod, reader.shapes.values())),
        "tensors": len(reader.shapes),
        "optimizer": kinds == list(KINDS),
        "dtypes": sorted({str(dtype).removeprefix("torch.") for dtype in reader.dtypes.values()}),
        "bytes": sum(path.stat().st_size for path in reader.folder.iterdir()),
        "ranks": reader.trainer["world_size"],
    }


def describe(result):
    """What `verify_checkpoint` returned, in one line."""
    return (
        f"{result['checkpoint']}: whole: step {result['step']}, {result['parameters']:,} parameters in {result['tensors']} "
        f"tensors, {'both moments' if result['optimizer'] else 'no optimizer'}, {' and '.join(result['dtypes'])}, "
        f"{result['bytes'] / 1e9:,.3f} GB from {result['ranks']} rank{'s' * (result['ranks'] > 1)}"
    )


def refuse_rounded_weights(reader):
    """InputError where a run with fp32 weights saved one in bfloat16. reader: a CheckpointReader."""
    fp32 = reader.trainer.get("recipe", {}).get("dtype") == "float32"
    if rounded := [name for name in reader.shapes if fp32 and reader.dtypes["weight", name] == torch.bfloat16]:
        raise InputError(f"{reader.folder}: damaged: {rounded[0]} is rounded to bfloat16: {SAVED_WRONG}")


def refuse_lost_moments(reader, moved):
    """InputError where FSDP2 saved only zeros as moments of a trained parameter after a step. moved: names of the parameters
    with a nonzero moment."""
    steps = reader.trainer.get("optimizer_steps", reader.trainer["step"])
    lost = sorted(set(reader.shapes) - set(moved))
    fsdp2 = reader.trainer.get("strategy", "fsdp2") == "fsdp2"
    if steps and lost and fsdp2 and "imported" not in reader.trainer:
        raise InputError(
            f"{reader.folder}: damaged: the moments of {lost[0]} are zero after {steps} steps: {SAVED_WRONG}"
        )


def _refuse_gaps(reader, kind, name, elements):
    """InputError unless the chunks of a tensor hold each of its elements once."""
    at = 0
    for chunk in [*reader.chunks.get((kind, name), ()), {"start": elements, "length": 0}]:
        if chunk["start"] > at:
            raise InputError(f"{reader.folder}: no file holds {kind}/{name}[{at}:{chunk['start']}]")
        if chunk["start"] < at:
            where = chunk.get("path", reader.folder)
            raise InputError(f"{where}: holds {kind}/{name} from element {chunk['start']}, as another chunk does")
        at = chunk["start"] + chunk["length"]
