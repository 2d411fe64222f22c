"""What a run reports: metrics.jsonl always, accelerate's trackers if asked, a line a step in a log, a bar on a terminal."""

import json
import os
import sys
import time
from pathlib import Path

from dilqur.atomic import atomic_file


class Metrics:
    """Main process only. `steps(first)` after a resume drops the lines of steps that will be done again."""

    def __init__(self, folder, max_steps, accelerator=None, logging_steps=1):
        self.path, self.max_steps, self.logging_steps = Path(folder) / "metrics.jsonl", max_steps, logging_steps
        self.accelerator, self.bar, self.file = accelerator, None, None

    def start(self, step):
        """Keep the lines up to `step`, and append from there: the file is that of a run without the interruption."""
        kept = []
        if self.path.exists():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                try:
                    record = json.loads(line)
                except json.JSONDecodeError:  # the last line of a killed run
                    continue
                if record["step"] <= step and step > 0:
                    kept.append(line)
        with atomic_file(self.path, "w", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in kept)
        self.file = self.path.open("a", encoding="utf-8")
        if sys.stderr.isatty() and not os.environ.get("SLURM_JOB_ID"):
            from tqdm import tqdm

            self.bar = tqdm(total=self.max_steps, initial=step, unit="step")

    def log(self, step, **values):
        """One step's numbers: a JSON line, the trackers, the bar or a line on standard output."""
        self.file.write(json.dumps({"step": step, **values, "time": round(time.time(), 3)}) + "\n")
        self.file.flush()
        if self.accelerator is not None:
            self.accelerator.log({k: v for k, v in values.items() if isinstance(v, int | float)}, step=step)
        if self.bar is not None:
            self.bar.update(step - self.bar.n)
            self.bar.set_postfix_str(f"loss {values.get('loss', float('nan')):.4f}")
        elif step % self.logging_steps == 0 or step == self.max_steps or "eval_loss" in values:
            self.say(f"step {step}/{self.max_steps} | " + " | ".join(f"{k} {_show(k, v)}" for k, v in values.items()))

    def say(self, text):
        """A line that does not tear the bar."""
        self.bar.write(text) if self.bar is not None else print(text, flush=True)

    def close(self):
        if self.file:
            self.file.close()
        if self.bar is not None:
            self.bar.close()


def _show(name, value):
    if name in ("loss", "eval_loss", "grad_norm"):
        return f"{value:.9g}"  # all the digits of a float32: two logs can be compared line by line
    if name == "learning_rate":
        return f"{value:.3e}"
    return f"{value:,.4g}" if isinstance(value, float) and value < 1000 else f"{value:,.0f}"
