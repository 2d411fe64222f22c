"""A Hugging Face folder or another program's checkpoint, read in one process, becomes a checkpoint of this project.

Which program wrote a folder is seen from its file names: nothing is unpickled to find out, and no torch is needed.
"""

import itertools
import json
import math
import re
import secrets
import shutil
from pathlib import Path

from dilqur.checkpoint.import_deepspeed import is_deepspeed, read_deepspeed
from dilqur.checkpoint.import_fsdp import is_sharded, is_whole, read_sharded, read_whole
from dilqur.checkpoint.import_plain import optimizer_file, read_plain
from dilqur.checkpoint.local_shards import MOMENTS
from dilqur.checkpoint.steps import step_folder
from dilqur.common.errors import InputError
from dilqur.models.safetensors_io import read_tensor, stored_tensors, tensor_bytes

FILE_BYTES = 4 << 30  # of one rank's file: small enough to copy
LOOKED_FOR = (
    "index.json (ours), zero_pp_rank_*_optim_states.pt (DeepSpeed), pytorch_model_fsdp_0/ and pytorch_model_fsdp.bin (FSDP), "
    "optimizer.bin and optimizer.pt (accelerate, Trainer)"
)


def import_checkpoint(checkpoints, foreign=None, base=None, step=None):
    """Write another program's checkpoint, the folder `foreign`, as checkpoints/step-N; loads its pickles.

    base: the model folder its run began with; by default `foreign` itself. Without `foreign` it is the Hugging Face folder
    to import. step: N where the source has none. Returns what was written, as a dict. Raises InputError where the source is
    damaged, is of another model, or step-N exists; nothing half-written is left.
    """
    from dilqur.checkpoint.hf_folder import read_folder
    from dilqur.models.config import load_config
    from dilqur.models.parameters import model_parameters

    source, base = Path(foreign or base), base or foreign
    model = model_parameters(load_config(base), base)
    state = _read_foreign(source, model) if foreign else read_folder(source, model)
    names = _trained_names(state, model, source, base)
    if foreign:
        _refuse_other_base(state, names, model, base, source)
    if step is not None and state.trainer:
        raise InputError(f"step: {source} was a checkpoint of step {state.step}; leave it out")
    imported = {"from": str(source), "format": state.format, "model": str(base), "hyperparameters": state.groups}
    trainer = state.trainer or {"imported": imported}
    if state.trained is not None:
        trainer = {**trainer, "optimizer_steps": state.optimizer_steps, "trainable": names}
    step = (state.step or 0) if step is None else step
    return {
        "checkpoint": str(write_checkpoint(checkpoints, step, state, names, trainer)),
        "step": step,
        "optimizer_steps": state.optimizer_steps,
        "parameters": sum(math.prod(model.shapes[name]) for name in names),
        "tensors": len(names),
        "format": state.format,
        "optimizer": state.trained is not None,
        "hyperparameters": state.groups,
    }


def describe_import(result):
    """What `import_checkpoint` returned, in lines: with an optimizer its hyperparameters, without one how to resume."""
    moments = f"moments of {result['optimizer_steps']} steps" if result["optimizer"] else "no optimizer"
    said = f"step {result['step']}, {result['parameters']:,} parameters, {moments}, from {result['format']}"
    lines = [f"{result['checkpoint']}: {said}"]
    for group in result["hyperparameters"]:
        lines.append(f"  its AdamW had {', '.join(f'{key} {value}' for key, value in group.items())}")
    if not result["optimizer"]:
        lines.append("  resume with --resume_without_optimizer true: AdamW begins with zero moments")
    return "\n".join(lines)


# -- which program wrote it -------------------------------------------------------------------------------------------


def is_ours(folder):
    """Is it a checkpoint in this project's format, whole or not?"""
    return any((Path(folder) / name).exists() for name in ("COMPLETE", "index.json", "rank-00000.json"))


def is_mlm(folder):
    """Is a checkpoint of ours one of mlm.py?"""
    try:
        trainer = json.loads((Path(folder) / "trainer.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False  # CheckpointReader names what is wrong
    return "mlm_probability" in (trainer.get("recipe") or {})


def refuse_unread(folder, base, trust_pickle):
    """InputError where `import_checkpoint` could not read another program's checkpoint, or may not."""
    reader_of(folder)
    if not trust_pickle:
        raise InputError(
            f"{folder}: is made of pickles, and loading one runs any code that is in it: give --trust_pickle if you know who "
            "wrote it"
        )
    if not base and not (Path(folder) / "config.json").exists():
        raise InputError(f"{folder}: no config.json in it: give --model_name_or_path, the model its run began with")


def reader_of(folder):
    """The function that makes a TrainingState of (folder, ModelParameters). Raises InputError where the format is unknown,
    or the folder holds two."""
    folder, found = Path(folder), {}
    if is_deepspeed(folder):
        found["DeepSpeed"] = read_deepspeed
    if is_sharded(folder):
        found["FSDP, sharded"] = read_sharded
    if is_whole(folder):
        found["FSDP, whole"] = read_whole  # its optimizer.bin has the name of a plain one
    elif optimizer_file(folder):
        found["one process or DDP"] = read_plain
    if len(found) > 1:
        raise InputError(f"{folder}: holds two formats, {' and '.join(found)}: move one of them elsewhere")
    if not found:
        raise InputError(f"{folder}: no checkpoint known here: looked for {LOOKED_FOR}{_hint(folder)}")
    return next(iter(found.values()))


def _hint(folder):
    inside = sorted(p for p in folder.glob("*-*") if re.fullmatch(r"(step|checkpoint)-\d+", p.name))
    if inside:
        return f"; name one of those in it, such as {inside[-1]}"
    return "; a Hugging Face folder is --model_name_or_path" if (folder / "config.json").exists() else ""


def _read_foreign(folder, model):
    state = reader_of(folder)(folder, model)
    path = folder / "trainer_state.json"  # the Trainer's step also counts those skipped by an fp16 scaler
    if path.exists():
        try:
            state.step = int(json.loads(path.read_text(encoding="utf-8"))["global_step"])
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{path}: damaged: no global_step in it") from None
    return state


# -- is it the checkpoint of this model? ------------------------------------------------------------------------------


def _trained_names(state, model, source, base):
    """The names of `state` to keep, in the model's order. model: the ModelParameters of `base`.

    Raises InputError where a weight or a moment is missing, has another shape, or belongs to no parameter of the model.
    """
    known = set(model.shapes) | set(model.every)
    if strange := sorted({name for _, name in state.stored if name not in known}):
        raise InputError(
            f"{source}: holds {strange[0]}, which the model of {base} does not have: not a checkpoint of it"
        )
    names = model.shapes if state.trained is None else set(map(model.first_name, state.trained))
    if not names:
        raise InputError(f"{source}: its optimizer holds no parameter")
    for name, expected in model.shapes.items():
        for kind in ("weight", *(MOMENTS if state.trained is not None and name in names else ())):
            if (kind, name) not in state.stored:
                raise InputError(f"{source}: holds no {kind} of {name}, which the model of {base} has")
            shape, dtype = state.stored[kind, name]
            if tuple(shape) != expected:
                raise InputError(
                    f"{source}: {kind} of {name} is {_shape(shape)}, the model of {base} has {_shape(expected)}"
                )
            if not dtype.is_floating_point or dtype.itemsize not in (2, 4):
                raise InputError(
                    f"{source}: {kind} of {name} is {dtype}; only float32, bfloat16 and float16 are imported"
                )
    return [name for name in model.shapes if name in names]


def _shape(shape):
    return " × ".join(map(str, shape)) or "a scalar"


def _refuse_other_base(state, names, model, base, source):
    """Checkpoints of ours leave out frozen weights, as `base` has them: InputError where those of `state` differ from them.
    Compared in the narrower of the two dtypes: bf16 training may have rounded what it froze."""
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


# -- write ------------------------------------------------------------------------------------------------------------


def write_checkpoint(checkpoints, step, state, names, trainer):
    """Write `names` of `state` as checkpoints/step-N, in files of about FILE_BYTES; returns the folder.

    float16, which the format does not know, becomes float32, exactly. trainer: a dict for trainer.json. Raises InputError
    where step-N exists; nothing half-written is left.
    """
    from dilqur.checkpoint.format import chunks_of, publish, size_of, write_rank

    checkpoints, final = Path(checkpoints), step_folder(checkpoints, step)
    if final.exists():
        raise InputError(f"{final}: is there already: remove it, or choose another --output_dir")
    kinds = ("weight", *(MOMENTS if state.trained is not None else ()))
    dtypes = {(kind, name): _kept(state.stored[kind, name][1]) for kind in kinds for name in names}
    chunks = []
    for (kind, name), dtype in sorted(dtypes.items(), key=lambda item: -item[1].itemsize):  # F32 first, for alignment
        chunks += chunks_of(kind, name, 0, math.prod(state.stored[kind, name][0]), dtype)
    ends = dict(zip((c["key"] for c in chunks), itertools.accumulate(map(size_of, chunks)), strict=True))
    files = [list(group) for _, group in itertools.groupby(chunks, lambda c: (ends[c["key"]] - 1) // FILE_BYTES)]
    part = checkpoints / f".tmp-{step}-{secrets.token_hex(4)}"
    part.mkdir(parents=True)
    try:
        for rank, inside in enumerate(files):
            shapes = {chunk["name"]: list(state.stored["weight", chunk["name"]][0]) for chunk in inside}
            write_rank(part, rank, inside, shapes, _bytes_of(inside, state, dtypes))
        publish(part, final, step, len(files), trainer)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return final


def _kept(dtype):
    import torch

    return torch.float32 if dtype == torch.float16 else dtype


def _bytes_of(chunks, state, dtypes):
    """The bytes of each chunk, with one tensor in memory at a time."""
    for key, inside in itertools.groupby(chunks, lambda chunk: (chunk["kind"], chunk["name"])):
        flat = state.read(*key).to(dtypes[key]).contiguous().view(-1)
        for chunk in inside:
            yield tensor_bytes(flat[chunk["start"] : chunk["start"] + chunk["length"]])
        del flat  # before the next one is read
