"""What bounded a training run: computing, its network, its data, its checkpoints or its evaluations; from metrics.jsonl.

The time of a run, after its first WARM_UP steps, is that of its steps, evaluations and checkpoint stalls. What had the largest share of
it bounds the run:

data         data_wait_seconds: the slowest rank had no batch yet. What the readers do while the GPU computes costs nothing
checkpoint   checkpoint_stall_seconds: training stood still for a save. Writing goes on behind the steps, and may slow them: not seen
evaluation   eval_seconds
network      only with a profile (`profile: true`) of a GPU run: of the time in which no other kernel ran, as much as NCCL's kernels took.
             At most: a GPU that waited for the program in that time, or for a slower rank, looks the same
compute      the rest. On one process it is just that; on several, without a profile, communication is in it, and it is called
             "compute or network": a metric of a step cannot tell a GPU that computes from one that waits in a collective

Not in it: set-up, the last save and what lies between two starts of a run. Where the slowest rank's step takes longer than the median
rank's, the others wait for it; collectives hide most of that, so that a spread is worth a look, and none proves nothing.
"""

import statistics

WARM_UP = 2  # steps: kernels are compiled, memory is found, caches are cold
WORTH_A_WORD = 0.1  # a share of the time, or a spread
WHAT_HELPS = {
    "data": "more dataloader_num_workers, or local_dir",
    "checkpoint": "more save_steps",
    "evaluation": "more eval_steps, or fewer max_eval_samples",
    "network": "another strategy, reduce_dtype: bfloat16, or more tokens per GPU",
}


def what_bounds(records, processes, operations=None):
    """{"bound": name, "shares": {name: share of the time}, "spread": of the ranks' step times}, or None without any step.

    records: the lines of metrics.jsonl. operations: what profile/operations.json holds, if there is one.
    """
    steps = [r for r in records if r.get("step_seconds")]
    steps = steps[min(WARM_UP, len(steps) - 1) :]
    if not steps:
        return None

    def total(name):
        return sum(r.get(name) or 0.0 for r in steps)

    seconds = {
        "data": total("data_wait_seconds"),
        "checkpoint": total("checkpoint_stall_seconds"),
        "evaluation": total("eval_seconds"),
    }
    busy = total("step_seconds") - seconds["data"]
    if processes == 1:
        seconds["compute"] = busy
    elif (network := _network_share(operations, busy / len(steps))) is not None:
        seconds |= {"network": network * busy, "compute": (1 - network) * busy}
    else:
        seconds["compute or network"] = busy
    whole = sum(seconds.values())
    shares = {name: round(s / whole, 4) for name, s in sorted(seconds.items(), key=lambda item: -item[1])}
    spreads = [1 - r["step_seconds_median"] / r["step_seconds"] for r in steps if "step_seconds_median" in r]
    spread = round(statistics.median(spreads), 4) if spreads and processes > 1 else 0.0
    return {"bound": next(iter(shares)), "shares": shares, "spread": spread}


def _network_share(operations, step_seconds):
    """Of a step without its wait for data: at most so much of it was the network's. None where no GPU's kernels were seen."""
    kernels = [o for o in (operations or {}).get("operations", ()) if o["device"] == "cuda"]
    if not kernels:
        return None
    nccl = sum(o["seconds"] for o in kernels if "nccl" in o["name"].lower()) / operations["steps"]
    others = sum(o["seconds"] for o in kernels if "nccl" not in o["name"].lower()) / operations["steps"]
    return min(nccl, max(0.0, step_seconds - others)) / step_seconds


def in_one_line(found):
    """What `what_bounds` found, in words."""
    at_most = {"network": "at most "}
    shares = [f"{at_most.get(name, '')}{share:.0%} {name}" for name, share in found["shares"].items() if share >= 0.005]
    line = f"bounded by {found['bound']}: {', '.join(shares)}"
    waits = [name for name, share in found["shares"].items() if name in WHAT_HELPS and share >= WORTH_A_WORD]
    if waits:
        line += f"; against {waits[0]}: {WHAT_HELPS[waits[0]]}"
    if found["spread"] >= WORTH_A_WORD:
        line += f"; the slowest rank is {found['spread']:.0%} behind the median: scripts/check_nodes.py says which"
    return line
