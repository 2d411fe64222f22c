"""When to stop before the end: a STOP file, a step, a number of minutes, the end of the Slurm job.

Where the Slurm signal ends up: the trap in slurm/run_stages.sh touches STOP in the stage's folder; rank 0 sees it here,
between two steps; the loop tells the other ranks, all save the same step and exit 0, and REQUEUE says there is more to do.
"""

import os
import subprocess
import time
from datetime import datetime
from pathlib import Path

CLOCK_S = 1.0  # a file's time comes from a coarser clock than time.time(), and may lie a little before it


class Interrupt:
    """Asked by rank 0 once a step. margin_s: seconds before the job's end that saving a checkpoint may need."""

    def __init__(self, folder, max_minutes=None, stop_at_step=None, margin_s=300):
        self.stop_file, self.requeue_file = Path(folder) / "STOP", Path(folder) / "REQUEUE"
        self.stop_at_step, self.started = stop_at_step, time.time()
        ends = [_slurm_end_time(), self.started + 60 * max_minutes if max_minutes else None]
        margins = [margin_s, 0]
        self.deadline = min((end - margin for end, margin in zip(ends, margins, strict=True) if end), default=None)

    def clear_stale(self):
        """Remove the markers an earlier run left; a STOP that came while this one was starting stays."""
        self.requeue_file.unlink(missing_ok=True)
        born = float(os.environ.get("DILQUR_STAGE_STARTED", self.started))
        if self.stop_file.exists() and self.stop_file.stat().st_mtime < born - CLOCK_S:
            self.stop_file.unlink()

    def stop_reason(self, step):
        """Why to stop after `step` steps, or None."""
        if self.stop_file.exists():
            return f"{self.stop_file} is there"
        if self.stop_at_step is not None and step >= self.stop_at_step:
            return f"stop_at_step {self.stop_at_step}"
        if self.deadline is not None and time.time() > self.deadline:
            return "the time is up"
        return None

    def request_requeue(self):
        self.requeue_file.touch()


def _slurm_end_time():
    """End of the Slurm job in seconds since 1970, or None. Slurm before 23 does not export it; squeue knows."""
    job = os.environ.get("SLURM_JOB_ID")
    if not job or os.environ.get("RANK", "0") != "0":
        return None
    if end := os.environ.get("SLURM_JOB_END_TIME"):
        return float(end)
    try:
        answer = subprocess.run(
            ["squeue", "-h", "-j", job, "-O", "EndTime"], capture_output=True, text=True, timeout=60
        )
        return datetime.fromisoformat(answer.stdout.strip()).timestamp()
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None
