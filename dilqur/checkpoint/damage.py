"""Checkpoints whose files are whole, and which were wrong when they were saved.

Under FSDP2 an earlier version took what an evaluation had left gathered for the weights themselves: the embeddings or the head, and the
last norm, have zeros for moments, and in a bf16 run weights rounded to bfloat16. Such a run does not go on as it was.
"""

import torch

from dilqur.common.errors import InputError

WHY = (
    "an earlier version saved it wrong, after an evaluation under FSDP2 (--resume_without_optimizer true takes its weights as they "
    "are, and begins new moments)"
)


def refuse_rounded_weights(reader):
    """InputError where a run with fp32 weights left one in bfloat16. reader: a CheckpointReader."""
    fp32 = reader.trainer.get("recipe", {}).get("dtype") == "float32"
    if rounded := [name for name in reader.shapes if fp32 and reader.dtypes["weight", name] == torch.bfloat16]:
        raise InputError(f"{reader.folder}: damaged: {rounded[0]} is rounded to bfloat16: {WHY}")


def refuse_lost_moments(reader, moved):
    """InputError where FSDP2 left a trained parameter nothing but zeros for moments, after a step. moved: names of those that have
    something else."""
    steps = reader.trainer.get("optimizer_steps", reader.trainer["step"])
    lost = sorted(set(reader.shapes) - set(moved))
    fsdp2 = reader.trainer.get("strategy", "fsdp2") == "fsdp2"
    if steps and lost and fsdp2 and "imported" not in reader.trainer:
        raise InputError(f"{reader.folder}: damaged: the moments of {lost[0]} are zero after {steps} steps: {WHY}")
