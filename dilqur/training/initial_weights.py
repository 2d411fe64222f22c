"""The weights a run begins with, put where its strategy keeps them: no rank holds a model whole that its strategy shards.

    model, weights = empty_model(folder, dtype)                               shapes, and where the bytes lie
    model, optimizer = prepare(accelerator, model, make_optimizer, weights)   dilqur/training/distributed.py, which calls `fill`

Under FSDP2 and ZeRO-3 each rank reads its own rows from the safetensors files: a node holds an 8B's 31 GB once, and not once for each GPU.
Under bf16 ZeRO DeepSpeed makes its fp32 master weights of bfloat16 copies: here they get the model's own, to the bit.
"""

import torch

from dilqur.checkpoint.local_shards import frozen_shards, local_slices, refresh
from dilqur.common.errors import InputError
from dilqur.models.config import load_config
from dilqur.models.parameters import parameters_of
from dilqur.models.safetensors_io import PART, TORCH_NAMES, equal_bytes, stored_tensors, torch_dtype


def empty_model(folder, dtype):
    """(a causal model of transformers in `dtype`, its parameters on the meta device and its buffers as they are; StoredWeights of the
    model folder); (None, None) where the files have other names or shapes than the model, and transformers has to convert them."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    config = load_config(folder)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()  # each name was given a tensor of its own there
    weights = StoredWeights.of(model, folder)
    if weights is None or any(name in model.state_dict() for name, _ in model.named_buffers()):
        return None, None
    return model, weights


class StoredWeights:
    """A model folder's safetensors files, read in parts of PART bytes: not mapped, so that what is read is not this process's memory."""

    def __init__(self, stored):
        """stored: {name of a parameter: dilqur.models.safetensors_io.Stored}."""
        self.stored = stored

    @classmethod
    def of(cls, model, folder):
        """Those of a model that is not prepared yet; None where its folder does not hold each of its parameters as it is."""
        parameters, inside = parameters_of(model), stored_tensors(folder)
        names = {first: [first, *(n for n, f in parameters.tied.items() if f == first)] for first in parameters.shapes}
        every = {first: [inside[n] for n in names[first] if n in inside] for first in names}
        if not all(every.values()) or not all(
            equal_bytes(s, other) for s, *others in every.values() for other in others
        ):
            return None  # of a head that is tied by config.json and stored as another than the embeddings transformers makes two
        found = {first: stored[0] for first, stored in every.items()}
        fits = all(s.shape == parameters.shapes[n] and s.dtype in TORCH_NAMES for n, s in found.items())
        return cls(found) if fits else None

    def fill(self, name, start, out):
        """Copy the elements [start, start + len(out)) of the flattened parameter into the 1-D tensor `out`, cast to its dtype."""
        stored = self.stored[name]
        dtype = torch_dtype(stored.dtype)
        buffer = torch.empty(min(out.numel(), PART // dtype.itemsize), dtype=dtype)
        with stored.file.open("rb", buffering=0) as file:
            file.seek(stored.begin + start * dtype.itemsize)
            for at in range(0, out.numel(), max(1, buffer.numel())):
                part = buffer[: out.numel() - at]
                read_all(file, memoryview(part.view(torch.uint8).numpy()))
                out[at : at + part.numel()].copy_(part)


def read_all(file, room):
    """Fill `room`, a memoryview of bytes, from an unbuffered file. Raises InputError where it ends before."""
    while room:
        if not (count := file.readinto(room)):
            raise InputError(f"{file.name}: replaced or cut while it was read; fetch or convert the model again")
        room = room[count:]


class HeldWeights:
    """Those of a model in memory, as they are now: what is cast later is a copy."""

    def __init__(self, model):
        self.held = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def fill(self, name, start, out):
        out.copy_(self.held[name].view(-1)[start : start + out.numel()])


@torch.no_grad()
def fill(model, optimizer, weights):
    """Fill what this rank owns of a prepared model from StoredWeights or HeldWeights."""
    for name, _, start, views in local_slices(model, optimizer, for_read=True, moments=False):
        if views:
            weights.fill(name, start, views["weight"])
    for name, start, view in frozen_shards(model):
        weights.fill(name, start, view)
    refresh(optimizer)
