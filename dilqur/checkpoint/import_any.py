"""Which kind of checkpoint a folder is, by the names of its files: nothing is unpickled to find out, and no torch is needed."""

import json
import re
from pathlib import Path

from dilqur.checkpoint.import_deepspeed import is_deepspeed, read_deepspeed
from dilqur.checkpoint.import_fsdp import is_sharded, is_whole, read_sharded, read_whole
from dilqur.checkpoint.import_plain import optimizer_file, read_plain
from dilqur.common.errors import InputError

LOOKED_FOR = (
    "index.json (ours), zero_pp_rank_*_optim_states.pt (DeepSpeed), pytorch_model_fsdp_0/ and pytorch_model_fsdp.bin (FSDP), "
    "optimizer.bin and optimizer.pt (accelerate, Trainer)"
)


def is_ours(folder):
    """Is it a checkpoint in this project's format, whole or not?"""
    return any((Path(folder) / name).exists() for name in ("COMPLETE", "index.json", "rank-00000.json"))


def reader_of(folder):
    """The function that makes a TrainingState of (folder, ModelParameters). Raises InputError where it is none of the known
    kinds, or two of them."""
    folder = Path(folder)
    found = {}
    if is_deepspeed(folder):
        found["DeepSpeed"] = read_deepspeed
    if is_sharded(folder):
        found["FSDP, sharded"] = read_sharded
    if is_whole(folder):
        found["FSDP, whole"] = read_whole  # its optimizer.bin has the name of a plain one
    elif optimizer_file(folder):
        found["one process or DDP"] = read_plain
    if len(found) > 1:
        raise InputError(f"{folder}: holds two formats, {' and '.join(found)}: move what is not wanted elsewhere")
    if not found:
        raise InputError(f"{folder}: no checkpoint known here: looked for {LOOKED_FOR}{_hint(folder)}")
    return next(iter(found.values()))


def read_foreign(folder, model):
    """TrainingState of another program's checkpoint; loads its pickles. model: ModelParameters, of the model it trained."""
    state = reader_of(folder)(Path(folder), model)
    path = Path(folder) / "trainer_state.json"  # the Trainer's: its step counts those an fp16 scaler skipped, too
    if path.exists():
        try:
            state.step = int(json.loads(path.read_text(encoding="utf-8"))["global_step"])
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{path}: damaged: no global_step in it") from None
    return state


def _hint(folder):
    inside = sorted(p for p in folder.glob("*-*") if re.fullmatch(r"(step|checkpoint)-\d+", p.name))
    if inside:
        return f"; name one of those in it, such as {inside[-1]}"
    return "; a Hugging Face folder is --model_name_or_path" if (folder / "config.json").exists() else ""
