"""What is trained, how fast: frozen parameters, weight-decay groups, AdamW, schedules."""

import fnmatch
import math

from dilqur.errors import InputError

SCHEDULES = ("cosine", "linear", "constant")


def freeze_all_but(model, patterns):
    """Leave only the parameters trainable whose names match one of the glob `patterns` ("*embed_tokens*"); None: all.

    A tied weight counts under any of its names. Returns the trainable names. InputError for a pattern that matches nothing.
    """
    if not patterns:
        return [name for name, _ in model.named_parameters()]
    matched, trainable = set(), set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        hits = {p for p in patterns if fnmatch.fnmatch(name, p)}
        matched |= hits
        if hits:
            trainable.add(id(parameter))
    if missing := set(patterns) - matched:
        names = ", ".join(
            sorted({n.split(".layers.")[0] if ".layers." in n else n for n, _ in model.named_parameters()})
        )
        raise InputError(f"unfrozen_parameters: {sorted(missing)[0]!r} matches no parameter of the model ({names}, …)")
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trainable)
    return [name for name, p in model.named_parameters() if p.requires_grad]


def make_optimizer(model, learning_rate, betas, epsilon, weight_decay, fused):
    """AdamW over the trainable parameters; decay on matrices only (norms and biases are vectors)."""
    import torch

    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=learning_rate, betas=tuple(betas), eps=epsilon, fused=fused
    )


def learning_rate_at(step, schedule, peak, warmup_steps, max_steps, min_ratio=0.0):
    """Learning rate of step `step` (from 0): linear warm-up to `peak`, then the schedule down to min_ratio · peak at max_steps.

    cosine: peak · (min_ratio + (1 − min_ratio) · (1 + cos πt) / 2), t the share of the steps after the warm-up
    (Loshchilov and Hutter 2017, arXiv:1608.03983, eq. 5).
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    t = (step - warmup_steps) / max(1, max_steps - warmup_steps)
    fall = {"cosine": (1 + math.cos(math.pi * t)) / 2, "linear": 1 - t, "constant": 1.0}[schedule]
    return peak * (min_ratio + (1 - min_ratio) * fall)
