"""What is trained, how fast: frozen parameters, weight-decay groups, AdamW, schedules."""

import fnmatch
import math
from typing import Literal

from dilqur.common.errors import InputError

Schedule = Literal["cosine", "linear", "constant", "warmup_stable_decay"]


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


def make_optimizer(model, settings, on_gpu):
    """AdamW over the trainable parameters; decay on matrices only (norms and biases are vectors).

    settings: TrainingSettings. Where `optim` says nothing, it is fused on a GPU. With dtype: bfloat16 the one that keeps 8 bytes a
    parameter (dilqur/training/bf16_adamw.py).
    """
    import torch

    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [(name, p) for name, p in trainable if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [(name, p) for name, p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    betas = (settings.adam_beta1, settings.adam_beta2)
    arguments = {"lr": settings.learning_rate, "betas": betas, "eps": settings.adam_epsilon}
    if settings.dtype == "bfloat16":
        from dilqur.training.bf16_adamw import BF16AdamW

        return BF16AdamW(groups, **arguments, seed=settings.seed, compiled=on_gpu)
    fused = settings.optim == "adamw_torch_fused" if settings.optim else on_gpu
    return torch.optim.AdamW(groups, **arguments, fused=fused)


def learning_rate_at(step, schedule, peak, warmup_steps, max_steps, min_ratio=0.0, decay_steps=0):
    """Learning rate of step `step` (from 0): linear warm-up to `peak`, then the schedule down to min_ratio · peak at max_steps.

    cosine: peak · (min_ratio + (1 − min_ratio) · (1 + cos πt) / 2), t the share of the steps after the warm-up
    (Loshchilov and Hutter 2017, arXiv:1608.03983, eq. 5). warmup_stable_decay: `peak` until the last `decay_steps`, then
    linearly down (Hu et al. 2024, arXiv:2404.06395, section 4.1, with a linear decay).
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "warmup_stable_decay":
        fall = min(1.0, (max_steps - step) / max(1, decay_steps))
    else:
        t = (step - warmup_steps) / max(1, max_steps - warmup_steps)
        fall = {"cosine": (1 + math.cos(math.pi * t)) / 2, "linear": 1 - t, "constant": 1.0}[schedule]
    return peak * (min_ratio + (1 - min_ratio) * fall)


def set_learning_rate(optimizer, step, settings, max_steps):
    """Set the learning rate of step `step` (from 0) in all groups of `optimizer`, as `settings` schedule it, and return it."""
    schedule = (settings.lr_scheduler_type, settings.learning_rate, settings.warmup_steps, max_steps)
    rate = learning_rate_at(step, *schedule, settings.min_lr_ratio, settings.lr_decay_steps or 0)
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate
