"""From the lines of metrics.jsonl to the figures of a benchmark."""

import statistics

from dilqur.training.profiling import PHASES


def round_figures(records, first, last):
    """Of the steps after `first` up to `last`: {"tokens_per_second" (all), "valid_tokens_per_second", "step_seconds",
    "forward_seconds", …, "data_wait_seconds", "logging_seconds", "peak_memory_gb"}, seconds per step; None for what is not logged.

    The rate is by the clock between the two steps' lines, so that what lies between the steps is in it; logging is that rest,
    of a program that logs phases, whose steps are over when it says so.
    """
    by_step = {r["step"]: r for r in records}
    timed = [by_step[step] for step in range(first + 1, last + 1)]
    seconds, count = by_step[last]["time"] - by_step[first]["time"], last - first

    def mean(name):
        values = [r[name] for r in timed if r.get(name) is not None]
        return sum(values) / count if len(values) == count else None

    steps = mean("step_seconds")
    tokens = [r["tokens_per_second_all"] * r["step_seconds"] for r in timed]
    valid = [r["tokens_per_second"] * r["step_seconds"] for r in timed]
    memory = [r["peak_memory_gb"] for r in timed if "peak_memory_gb" in r]
    return {
        "tokens_per_second": sum(tokens) / seconds,
        "valid_tokens_per_second": sum(valid) / seconds,
        "step_seconds": seconds / count,
        **{f"{phase}_seconds": mean(f"{phase}_seconds") for phase in PHASES},
        "data_wait_seconds": mean("data_wait_seconds"),
        "logging_seconds": max(0.0, seconds / count - steps) if mean("forward_seconds") is not None else None,
        "peak_memory_gb": max(memory, default=None),
        "gpu_throttled": any(r.get("gpu_throttled") for r in timed),
    }


def over_rounds(rounds):
    """{name: {"median", "min", "max"}} of what is a number in the figures of every round."""
    out = {}
    for name in rounds[0] if rounds else ():
        values = [r[name] for r in rounds if isinstance(r[name], (int, float)) and not isinstance(r[name], bool)]
        if len(values) == len(rounds):
            out[name] = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return out


def loss_parity(reference, records, steps):
    """How far the losses of two runs are apart over their first `steps` steps: {"steps", "largest": difference in nats, "at_step",
    "last": at the last one}; None where either is not so long or was not finite."""
    ours, theirs = ({r["step"]: r["loss"] for r in lines} for lines in (records, reference))
    steps = range(1, steps + 1)
    if not steps or any(losses.get(step) is None for losses in (ours, theirs) for step in steps):
        return None
    apart = {step: abs(ours[step] - theirs[step]) for step in steps}
    worst = max(apart, key=apart.get)
    return {"steps": len(steps), "largest": apart[worst], "at_step": worst, "last": apart[steps[-1]]}


def utilisation(tokens_per_second, flops, num_processes, peak):
    """{convention: {"tflops": of a GPU a second, "mfu": of its peak or None}}. flops: {convention: a token's}."""
    each = {name: tokens_per_second * count / num_processes for name, count in flops.items()}
    return {name: {"tflops": rate / 1e12, "mfu": rate / peak if peak else None} for name, rate in each.items()}


def largest_batch(fits, start, ceiling):
    """The largest batch up to `ceiling` for which fits(batch) holds, 0 if none: doubled from `start` or halved, then between the two.
    fits must hold for all smaller ones where it holds for one."""
    known = {}

    def tried(batch):
        return known.setdefault(batch, fits(batch))

    low, high = 0, None
    batch = min(start, ceiling)
    while high is None and batch > low:
        if tried(batch):
            low, batch = batch, min(2 * batch, ceiling)
        else:
            high = batch
    while low == 0 and high > 1:
        if tried(high // 2):
            low = high // 2
        else:
            high //= 2
    while high is not None and high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if tried(middle) else (low, middle)
    return low
