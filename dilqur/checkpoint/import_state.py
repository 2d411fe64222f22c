"""What every reader of an import returns, a TrainingState, and how checkpoints of other programs are unpickled.

A pickle is a program: to load one is to run it. `load_pickle` is called only after the user's --trust_pickle.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field

from dilqur.checkpoint.local_shards import MOMENTS
from dilqur.common.errors import InputError

HYPERPARAMETERS = ("lr", "betas", "eps", "weight_decay")


@dataclass
class TrainingState:
    """Weights and, where there is an optimizer, both AdamW moments.

    stored: {(kind, name): (shape, torch dtype)}; kind is weight, exp_avg or exp_avg_sq. read(kind, name): that tensor, on the
    CPU. trained: the names in the optimizer; None without one. step, optimizer_steps: of the run, and of the moments; None
    where unknown. groups: of the optimizer, [{"lr", "betas", "eps", "weight_decay"}]. trainer: the content of trainer.json,
    where the state once was a checkpoint of ours.
    """

    format: str
    stored: dict
    read: Callable
    trained: list | None = None
    step: int | None = None
    optimizer_steps: int | None = None
    groups: list = field(default_factory=list)
    trainer: dict | None = None


@contextlib.contextmanager
def expected(path, writer):
    """Turns any error inside into an InputError: `path` is not what `writer` writes, or not all of it."""
    try:
        yield
    except (InputError, MemoryError):
        raise
    except ImportError as problem:
        raise InputError(f"{path}: cannot be unpickled without {problem.name}: pip install it") from None
    except Exception as problem:  # which one depends on the content
        said = str(problem).splitlines()[0][:200] if str(problem) else ""
        raise InputError(
            f"{path}: damaged or cut, or not as {writer} writes it ({type(problem).__name__}: {said})"
        ) from None


def load_pickle(path, writer, tensors_only=False):
    """What `torch.save` wrote, its tensors mapped from the file. tensors_only: torch unpickles tensors and plain values alone."""
    import torch

    with expected(path, writer):
        return torch.load(path, map_location="cpu", mmap=True, weights_only=tensors_only)


def adam_steps(source, states, groups):
    """How many steps the moments in `states`, the optimizer's state of each parameter, have seen.

    Raises InputError where they differ, or this is no AdamW. `groups` have the count where an older FusedAdam's states do not.
    """
    for state in states:
        if missing := [kind for kind in MOMENTS if kind not in state]:
            raise InputError(
                f"{source}: its optimizer has no {missing[0]} ({', '.join(map(str, state)) or 'nothing'}): not AdamW"
            )
        if surplus := set(state) - {"step", *MOMENTS}:
            raise InputError(f"{source}: its optimizer keeps {min(surplus)}, too: not a plain AdamW")
    steps = {int(state["step"]) for state in states if "step" in state}
    steps = steps or {int(group["step"]) for group in groups if "step" in group}
    if len(steps) != 1:
        raise InputError(
            f"{source}: its parameters have seen {' and '.join(map(str, sorted(steps))) or 'an unknown number of'} steps; "
            "a checkpoint here has one number for all"
        )
    return steps.pop()


def hyperparameters(groups):
    """[{"lr", "betas", "eps", "weight_decay"}] of an optimizer's groups, which a recipe should repeat."""
    return [{key: _plain(group[key]) for key in HYPERPARAMETERS if key in group} for group in groups]


def _plain(value):
    return [float(v) for v in value] if isinstance(value, tuple | list) else float(value)  # some are tensors
