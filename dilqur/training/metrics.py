"""What a run reports: metrics.jsonl always, accelerate's trackers if asked, a line per step in a log, a bar on a terminal.

loss                     mean nats per token over the global batch; null where the step was skipped
grad_norm                Euclidean norm of all trained gradients, before clipping
learning_rate            of this step
tokens_per_second        loss-bearing (valid) tokens over all ranks / seconds of the step; tokens_per_second_all: padding too
mfu                      floating-point operations the model needs for them / what the GPUs could do (dilqur/estimate/cost_model.py)
step_seconds             slowest rank's; step_seconds_median: the median over ranks. Evaluation and saving are not in it
data_wait_seconds        that the slowest rank waited for its batch
forward_seconds, backward_seconds, optimizer_seconds    slowest rank's, where they run (dilqur/training/profiling.py)
peak_memory_gb           largest over ranks since the start, GiB
skipped_steps            so far: their loss or gradients were not finite
checkpoint_stall_seconds, eval_loss, eval_bits_per_byte, eval_accuracy, eval_seconds    in the steps after which it was done
max_steps, seconds_left  of the run, for --status; by the median of the last hundred steps
gpu_utilization, gpu_power_w, gpu_temperature_c, gpu_throttled           rank 0's GPU, from NVML
"""

import contextlib
import json
import math
import mmap
import os
import secrets
import statistics
import sys
import time
from collections import deque
from datetime import timedelta
from pathlib import Path

from dilqur.common.atomic import atomic_file

FILE_ONLY_METRICS = (  # a log's lines stay short
    "tokens_per_second_all", "step_seconds_median", "forward_seconds", "backward_seconds", "optimizer_seconds",
)  # fmt: skip


class Metrics:
    """Main process only. `start(step)` after a resume drops the lines of steps that will be done again.

    pauses: {what: (seconds it takes, steps between two)}, for the time left: evaluation and saving.
    """

    def __init__(self, folder, max_steps, accelerator=None, logging_steps=1):
        self.path, self.max_steps, self.logging_steps = Path(folder) / "metrics.jsonl", max_steps, logging_steps
        self.accelerator, self.bar, self.file = accelerator, None, None
        self.pauses, self._seconds, self._last = {}, deque(maxlen=100), None

    def start(self, step):
        """Keep the lines up to `step`, and append from there: the file is that of a run without the interruption."""
        self._last = self._cut_after(step) if step > 0 and self.path.exists() and self.path.stat().st_size else None
        self.file = self.path.open("a" if self._last else "w", encoding="utf-8")
        if sys.stderr.isatty() and not os.environ.get("SLURM_JOB_ID"):
            from tqdm import tqdm

            self.bar = tqdm(total=self.max_steps, initial=step, unit="step")

    def _cut_after(self, step):
        """Cut off what comes after the line of `step`, and return that line, or None: from the end, however long the file is."""
        with self.path.open("r+b") as file:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as lines:
                end, record = len(lines), None
                while end > 0 and not record:
                    start = lines.rfind(b"\n", 0, end - 1) + 1
                    with contextlib.suppress(ValueError):  # the last line of a killed run
                        record = json.loads(lines[start:end])
                        record = record if record["step"] <= step and lines[end - 1 : end] == b"\n" else None
                    end = end if record else start
            file.truncate(end)
        return record

    def log(self, step, **values):
        """One step's numbers: a JSON line, the trackers, the bar or a line on standard output."""
        values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        self._seconds.append(values.get("step_seconds") or 0.0)
        seconds_left = round(self.seconds_left(step))
        left = str(timedelta(seconds=seconds_left))
        progress = {"max_steps": self.max_steps, "seconds_left": seconds_left, "time": round(time.time(), 3)}
        self._last = {"step": step, **values, **progress}
        self.file.write(json.dumps(self._last) + "\n")
        self.file.flush()
        self._track(step, values)
        if self.bar is not None:
            self.bar.update(step - self.bar.n)
            self.bar.set_postfix_str(f"loss {values.get('loss') or math.nan:.4f}, {left} left")
        elif step % self.logging_steps == 0 or step == self.max_steps or "eval_loss" in values:
            self.say(f"step {step}/{self.max_steps} | {_line(values)} | left {left}")

    def add(self, step, **values):
        """More numbers of a step that was logged before a resume: those of its evaluation."""
        lines = self.path.read_text(encoding="utf-8").splitlines()
        if self.last(step, "step") is None:  # its line did not come to this machine, or not to the disk
            self._last, lines = {"step": step}, [*lines, ""]
        self._last = {**self._last, **values}
        self.file.close()
        with atomic_file(self.path, "w", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in [*lines[:-1], json.dumps(self._last)])
        self.file = self.path.open("a", encoding="utf-8")
        self._track(step, values)
        self.say(f"step {step}/{self.max_steps} | {_line(values)}")

    def last(self, step, name):
        """A number of `step`, if that is what was logged last, or None."""
        return self._last.get(name) if self._last and self._last["step"] == step else None

    def seconds_left(self, step):
        """By the median of the last hundred steps, and what evaluations and checkpoints will take."""
        if not self._seconds:
            return 0.0
        pauses = sum(seconds / every for seconds, every in self.pauses.values())
        return (self.max_steps - step) * (statistics.median(self._seconds) + pauses)

    def start_trackers(self, name, step, config):
        """TensorBoard and wandb, through accelerate: a resumed run goes on in the same curves and the same wandb run."""
        identity = self.path.with_name("wandb-id")
        if step == 0 or not identity.exists():
            identity.write_text(secrets.token_hex(8))
        arguments = {
            "wandb": {"id": identity.read_text(), "resume": "allow", "name": name, "dir": str(self.path.parent)},
            "tensorboard": {"purge_step": step + 1},
        }
        simple = {k: v for k, v in config.items() if isinstance(v, str | int | float)}
        self.accelerator.init_trackers("dilqur", config=simple, init_kwargs=arguments)

    def _track(self, step, values):
        if self.accelerator is not None:
            self.accelerator.log({k: v for k, v in values.items() if isinstance(v, int | float)}, step=step)

    def say(self, text):
        """A line that does not tear the bar."""
        self.bar.write(text) if self.bar is not None else print(text, flush=True)

    def close(self):
        if self.file:
            self.file.close()
        if self.bar is not None:
            self.bar.close()


def gpu_health():
    """This process's GPU as NVML sees it; {} without one, or where NVML may not be asked."""
    import torch

    if not torch.cuda.is_available():
        return {}
    values = {}
    with contextlib.suppress(Exception):  # not installed, or not allowed in this container: the run goes on
        import pynvml

        pynvml.nvmlInit()
        device = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties('cuda').uuid}")
        values["gpu_utilization"] = pynvml.nvmlDeviceGetUtilizationRates(device).gpu
        values["gpu_power_w"] = pynvml.nvmlDeviceGetPowerUsage(device) / 1000
        values["gpu_temperature_c"] = pynvml.nvmlDeviceGetTemperature(device, pynvml.NVML_TEMPERATURE_GPU)
        slowed = pynvml.nvmlClocksThrottleReasonHwSlowdown | pynvml.nvmlClocksThrottleReasonSwThermalSlowdown
        values["gpu_throttled"] = int(bool(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(device) & slowed))
    return values


def _line(values):
    return " | ".join(
        f"{name} {_show(name, value)}"
        for name, value in values.items()
        if value is not None and name not in FILE_ONLY_METRICS
    )


def _show(name, value):
    if name in ("loss", "eval_loss", "grad_norm"):
        return f"{value:.9g}"  # all the digits of a float32: two logs can be compared line by line
    if name == "learning_rate":
        return f"{value:.3e}"
    return f"{value:,.4g}" if isinstance(value, float) and value < 1000 else f"{value:,.0f}"
