"""The checkpoints of a run folder by their step, without torch."""

from pathlib import Path


def step_folder(checkpoints, step):
    """The name of the checkpoint of `step` under `checkpoints`."""
    return Path(checkpoints) / f"step-{step:07d}"


def step_of(folder):
    """The step in the name of a checkpoint's folder, or None where it is not called as one."""
    digits = Path(folder).name.removeprefix("step-")
    return int(digits) if digits.isdigit() and Path(folder).name.startswith("step-") else None


def complete_checkpoints(checkpoints):
    """The complete checkpoints under `checkpoints`, oldest step first."""
    found = [marker.parent for marker in Path(checkpoints).glob("step-*/COMPLETE")]
    return sorted((folder for folder in found if step_of(folder) is not None), key=step_of)
