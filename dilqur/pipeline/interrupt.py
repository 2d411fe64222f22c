"""When to stop before the end: a STOP file, a signal, a step, a number of minutes, the end of the Slurm job.

Where the Slurm signal ends up: the trap in slurm/lib/run_stages.sh touches STOP in the stage's folder; rank 0 sees it here,
between two steps; the loop tells the other ranks, all save the same step and exit 0, and REQUEUE says there is more to do.
TERM and USR1 sent to the processes themselves, by a launcher that is told to end or by hand, do the same, on any rank.
"""

import os
import signal
import subprocess
import threading
import time
from datetime import datetime
from pathlib import Path

CLOCK_S = 1.0  # a file's time comes from a coarser clock than time.time(), and may lie a little before it


class Interrupt:
    """Asked between steps, and between the batches of an evaluation. margin_s: seconds before the job's end that saving a
    checkpoint may need; `observe_duration` raises it where steps and saves take longer."""

    def __init__(self, folder, max_minutes=None, stop_at_step=None, margin_s=300):
        self.stop_file, self.requeue_file = Path(folder) / "STOP", Path(folder) / "REQUEUE"
        self.stop_at_step, self.margin_s, self.signalled = stop_at_step, margin_s, None
        self._longest = {}
        self.started, self.job_end = time.time(), _slurm_end_time()
        self.minutes_end = self.started + 60 * max_minutes if max_minutes else None

    def listen(self):
        """From now on TERM and USR1 only leave a note, the second and third as well: a save is not disturbed by them."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGUSR1):
                signal.signal(number, self._note)

    def _note(self, number, frame):
        self.signalled = signal.Signals(number).name

    def observe_duration(self, what, seconds):
        """A step or a save took so long: begin to stop early enough for twice both."""
        self._longest[what] = max(seconds, self._longest.get(what, 0.0))
        self.margin_s = max(self.margin_s, 2 * sum(self._longest.values()))

    def clear_stale(self):
        """Remove the markers an earlier run left; a STOP that came while this one was starting stays."""
        self.requeue_file.unlink(missing_ok=True)
        born = float(os.environ.get("DILQUR_STAGE_STARTED", self.started))
        if self.stop_file.exists() and self.stop_file.stat().st_mtime < born - CLOCK_S:
            self.stop_file.unlink()

    def stop_reason(self, step):
        """Why to stop after `step` steps, or None."""
        if self.stop_at_step is not None and step >= self.stop_at_step:
            return f"stop_at_step {self.stop_at_step}"
        return self.urgent_reason()

    def urgent_reason(self):
        """Why to stop even in the middle of an evaluation, or None."""
        if self.signalled:
            return f"{self.signalled} came"
        if self.stop_file.exists():
            return f"{self.stop_file} is there"
        if self.job_end is not None and time.time() > self.job_end - self.margin_s:
            return "the time is up"
        if self.minutes_end is not None and time.time() > self.minutes_end:
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
