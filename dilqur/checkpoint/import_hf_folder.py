"""A Hugging Face folder as a checkpoint: what dilqur/checkpoint/export_hf_folder.py wrote, or weights alone."""

import json
from pathlib import Path

import torch
import xxhash

from dilqur.checkpoint.export_hf_folder import STATE_VERSION
from dilqur.checkpoint.import_plain import stored_weights
from dilqur.checkpoint.import_state import TrainingState
from dilqur.checkpoint.local_shards import MOMENTS
from dilqur.common.errors import InputError
from dilqur.models.safetensors_io import read_tensor, stored_tensors, tensor_bytes, torch_dtype

OF_PUBLISHING = ("version", "step", "world_size")  # what `publish` itself puts into trainer.json


def read_folder(folder, model):
    """TrainingState of a Hugging Face folder, with the moments in its optimizer/ where there is one."""
    weights = stored_weights(folder, model)
    path = Path(folder) / "optimizer" / "state.json"
    if not path.parent.exists():
        return weights
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        version, trainer, xxh3, step = state["version"], state["trainer"], state["xxh3"], state["trainer"]["step"]
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{path}: not there or damaged: remove optimizer/ to take the weights alone") from None
    if version > STATE_VERSION:
        raise InputError(f"{path}: version {version} is newer than this program's {STATE_VERSION}")
    stored, moments = dict(weights.stored), {kind: stored_tensors(path.parent / kind) for kind in MOMENTS}
    trained = list(moments["exp_avg"])
    for kind, tensors in moments.items():
        for name, where in tensors.items():
            stored[kind, name] = where.shape, torch_dtype(where.dtype) or torch.uint8

    def read(kind, name):
        tensor = read_tensor(moments[kind][name], name) if kind in moments else weights.read(kind, name)
        if xxhash.xxh3_64_hexdigest(tensor_bytes(tensor.contiguous().view(-1))) != xxh3.get(f"{kind}/{name}"):
            raise InputError(
                f"{folder}: {kind} of {name} is not what {path} vouches for: changed since, or damaged; remove optimizer/ to take "
                "the weights alone"
            )
        return tensor

    return TrainingState(
        format="a Hugging Face folder with its optimizer",
        stored=stored,
        read=read,
        trained=trained,
        step=step,
        optimizer_steps=trainer.get("optimizer_steps", step),
        trainer={key: value for key, value in trainer.items() if key not in OF_PUBLISHING},
    )
