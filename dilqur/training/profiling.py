"""Where the time of a step goes: its phases in every step, and with `profile: true` a trace of a few early ones."""

import time

from dilqur.common.atomic import write_json
from dilqur.common.errors import InputError

PHASES = ("forward", "backward", "optimizer")


class StepPhases:
    """How long the phases take, where they run, without a wait that would not be there anyway: `begin()`, then `end(phase)` after each;
    `seconds()` when the GPU is through with the step: [float] of PHASES, summed.

    On a GPU the marks are events that it passes: they are read when the step is over, for which the loop waits by itself. A phase is then
    what lies between two marks on the GPU's main stream: also the time in which it waits there for the network or for the program.
    """

    def __init__(self, on_gpu):
        self.on_gpu, self.marks = on_gpu, []

    def begin(self):
        self.end(None)

    def end(self, phase):
        if self.on_gpu:
            import torch

            now = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        self.marks.append((phase, now))

    def seconds(self):
        total, before = dict.fromkeys(PHASES, 0.0), None
        for phase, now in self.marks:
            if phase:
                total[phase] += before.elapsed_time(now) / 1e3 if self.on_gpu else now - before
            before = now
        self.marks = []
        return list(total.values())


WAIT, WARMUP, ACTIVE = 2, 1, 3  # steps: not looked at, profiled and thrown away, kept


class _Off:
    def step(self):
        pass

    stop = step


def profiler(settings, folder, main):
    """An object with `step()`, to call after each step, and `stop()`. The trace goes to FOLDER/profile/trace.json.gz (for
    https://ui.perfetto.dev), and beside it operations.json: {"steps": ACTIVE, "operations": [{"name", "device", "seconds" in itself,
    "calls"}, …]}, all of them, the longest first; a GPU's kernels are those of device "cuda". Raises InputError, when the trace is
    there, where use_liger_kernel left no Liger kernel in it."""
    if not settings.profile or not main:
        return _Off()
    import torch
    from torch.profiler import ProfilerActivity, profile, schedule

    on_gpu = torch.cuda.is_available()
    target = folder / "profile" / "trace.json.gz"

    def report(trace):
        target.parent.mkdir(exist_ok=True)
        trace.export_chrome_trace(str(target))
        events = trace.key_averages()
        by = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
        table = events.table(sort_by=by, row_limit=20, max_name_column_width=60)
        (folder / "profile" / "operations.txt").write_text(table)
        write_json(folder / "profile" / "operations.json", {"steps": ACTIVE, "operations": operations(events)})
        print(f"{table}\nprofile of {ACTIVE} steps: {target}", flush=True)
        names = [event.key.lower() for event in events]
        if settings.use_liger_kernel and on_gpu and not any("liger_cross_entropy" in name for name in names):
            raise InputError(
                f"use_liger_kernel: Liger's fused cross-entropy is not among the kernels that ran ({target}): the model's "
                "class is not one it patches, or torch_compile replaced it"
            )

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    which = schedule(wait=WAIT, warmup=WARMUP, active=ACTIVE, repeat=1)
    tracer = profile(activities=activities, schedule=which, on_trace_ready=report)
    tracer.start()
    return tracer


def operations(events):
    """What operations.json holds, of a profile's `key_averages()`."""
    rows = []
    for event in events:
        device = str(event.device_type).rpartition(".")[2].lower()
        if event.key.startswith("ProfilerStep") or (device != "cpu" and event.is_user_annotation):
            continue  # a stretch of time with a name, in which others are
        microseconds = event.self_cpu_time_total if device == "cpu" else event.self_device_time_total
        rows.append({"name": event.key, "device": device, "seconds": microseconds / 1e6, "calls": event.count})
    return sorted(rows, key=lambda row: -row["seconds"])
