"""A training state from anywhere, written as a checkpoint of this project: one process, tensor by tensor."""

import math
import secrets
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from dilqur.checkpoint.local_shards import MOMENTS
from dilqur.common.errors import InputError
from dilqur.models.safetensors_io import read_tensor, stored_tensors

FILE_BYTES = 4 << 30  # of one rank's file: small enough to copy


@dataclass
class TrainingState:
    """What a folder holds: weights, and where there is an optimizer both AdamW moments.

    stored: {(kind, name): (shape, torch dtype)}, kind being weight, exp_avg or exp_avg_sq. read(kind, name): that tensor on the
    CPU, of that shape and dtype. trained: the names the optimizer holds, None without one. step, optimizer_steps: of the run,
    and that the moments have seen; None where nothing says so. groups: the optimizer's, [{"lr", "betas", "eps",
    "weight_decay"}]. trainer: what trainer.json held, where the state once was a checkpoint of ours.
    """

    format: str
    stored: dict
    read: Callable
    trained: list | None = None
    step: int | None = None
    optimizer_steps: int | None = None
    groups: list = field(default_factory=list)
    trainer: dict | None = None


def trained_names(state, model, source, model_source):
    """The names of `state` to keep, in the model's order. model: a ModelParameters, of `model_source`.

    Raises InputError where a weight or a moment is missing, has another shape, or belongs to no parameter of the model.
    """
    known = set(model.shapes) | set(model.every)
    if strange := sorted({name for _, name in state.stored if name not in known}):
        raise InputError(
            f"{source}: holds {strange[0]}, which the model of {model_source} does not have: not a checkpoint of it"
        )
    names = model.shapes if state.trained is None else dict.fromkeys(map(model.first_name, state.trained))
    if state.trained is not None and not names:
        raise InputError(f"{source}: its optimizer holds no parameter")
    for name, expected in model.shapes.items():
        for kind in ("weight", *(MOMENTS if state.trained is not None and name in names else ())):
            if (kind, name) not in state.stored:
                raise InputError(f"{source}: holds no {kind} of {name}, which the model of {model_source} has")
            shape, dtype = state.stored[kind, name]
            if tuple(shape) != expected:
                raise InputError(
                    f"{source}: {kind} of {name} is {_shape(shape)}, the model of {model_source} has {_shape(expected)}"
                )
            if not dtype.is_floating_point or dtype.itemsize not in (2, 4):
                raise InputError(
                    f"{source}: {kind} of {name} is {dtype}; float32, bfloat16 and float16 can be taken over"
                )
    return [name for name in model.shapes if name in names]


def refuse_other_base(state, names, model, base, source):
    """What was frozen is not in a checkpoint of ours, but comes from the model in `base`: raise InputError where `state`, of
    `source`, says that it was another one. names: the trained ones. model: the ModelParameters of `base`. Compared in the
    narrower dtype of the two: bf16 training may have rounded what it froze."""
    import torch

    frozen = [name for name in model.shapes if name not in names]
    tensors = stored_tensors(base) if frozen else {}
    for name in frozen:
        if name in tensors:
            one, other = state.read("weight", name), read_tensor(tensors[name], name)
            dtype = min(one.dtype, other.dtype, key=lambda t: t.itemsize)
            if not torch.equal(one.to(dtype), other.to(dtype)):
                raise InputError(
                    f"{source}: {name}, which its run did not train, is not that of {base}: give --model_name_or_path, the "
                    "model the run began with"
                )


def write_checkpoint(checkpoints, step, state, names, trainer):
    """Write `names` of `state` as checkpoints/step-N, in files of at most FILE_BYTES; returns the folder.

    float16, which the format does not know, becomes float32, exactly. trainer: a dict for trainer.json. Raises InputError
    where that step is there already; nothing half-written stays.
    """
    from dilqur.checkpoint.format import chunks_of, publish, write_rank
    from dilqur.checkpoint.steps import step_folder

    checkpoints, final = Path(checkpoints), step_folder(checkpoints, step)
    if final.exists():
        raise InputError(f"{final}: is there already: remove it, or choose another --output_dir")
    kinds = ("weight", *(MOMENTS if state.trained is not None else ()))
    dtypes = {(kind, name): _kept(state.stored[kind, name][1]) for kind in kinds for name in names}
    order = sorted(dtypes, key=lambda item: -dtypes[item].itemsize)  # F32 first: what follows stays aligned
    chunks = [
        p
        for kind, name in order
        for p in chunks_of(kind, name, 0, math.prod(state.stored[kind, name][0]), dtypes[kind, name])
    ]
    part = checkpoints / f".tmp-{step}-{secrets.token_hex(4)}"
    part.mkdir(parents=True)
    try:
        files = _files(chunks, dtypes)
        for rank, inside in enumerate(files):
            shapes = {p["name"]: list(state.stored["weight", p["name"]][0]) for p in inside}
            write_rank(part, rank, inside, shapes, _bytes_of(inside, state, dtypes))
        publish(part, final, step, len(files), trainer)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return final


def _kept(dtype):
    import torch

    return torch.float32 if dtype == torch.float16 else dtype


def _files(chunks, dtypes):
    """Runs of chunks of at most FILE_BYTES."""
    files, room = [[]], FILE_BYTES
    for chunk in chunks:
        size = chunk["length"] * dtypes[chunk["kind"], chunk["name"]].itemsize
        if size > room and files[-1]:
            files.append([])
            room = FILE_BYTES
        files[-1].append(chunk)
        room -= size
    return files


def _bytes_of(chunks, state, dtypes):
    """The bytes of each chunk; one tensor is in memory at a time."""
    from dilqur.models.safetensors_io import tensor_bytes

    held, flat = None, None
    for chunk in chunks:
        key = chunk["kind"], chunk["name"]
        if key != held:
            flat = None  # before the next one is read
            held, flat = key, state.read(*key).to(dtypes[key]).contiguous().view(-1)
        yield tensor_bytes(flat[chunk["start"] : chunk["start"] + chunk["length"]])


def _shape(shape):
    return " × ".join(map(str, shape)) or "a scalar"
