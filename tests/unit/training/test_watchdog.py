"""A hang is found, also one that holds Python's lock; a run that goes on is left alone."""

import subprocess
import sys
import time

from dilqur.training.watchdog import Watchdog

HANGING = """
import sys, time
import dilqur.training.watchdog
from dilqur.training.watchdog import Watchdog
dilqur.training.watchdog.GIL_HELD_S = 1
watchdog = Watchdog(sys.argv[1], rank=3, minutes=1 / 60)

def waits_for_a_broken_disk():
    if sys.argv[2] == "sleeping":
        time.sleep(60)
    import ctypes
    ctypes.PyDLL(None).sleep(60)  # holds Python's lock: no Python thread can look

watchdog.at("step 7, reading its batch")
waits_for_a_broken_disk()
"""


def hang(folder, how):
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", HANGING, folder, how], capture_output=True, text=True, timeout=60)
    assert time.monotonic() - began < 30
    return done, (folder / "hang-rank-00003.txt").read_text()


def test_it_says_who_hangs_where_and_since_when_and_the_job_may_be_requeued(tmp_path):
    done, stack = hang(tmp_path, "sleeping")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert (
        line.startswith("error: rank 3 on ") and "minutes, while step 7, reading its batch; where it stands: " in line
    )
    assert "waits_for_a_broken_disk" in stack
    assert (tmp_path / "REQUEUE").exists()


def test_where_no_python_thread_can_run_the_stack_is_written_all_the_same(tmp_path):
    done, stack = hang(tmp_path, "holding the lock")
    assert done.returncode == 1
    assert "waits_for_a_broken_disk" in stack


def test_a_run_that_goes_on_is_left_alone_and_leaves_no_file(tmp_path):
    watchdog = Watchdog(tmp_path, rank=0, minutes=0.5 / 60)
    for _ in range(8):
        time.sleep(0.2)  # 1.6 s in all, three times what it may be silent
        watchdog.at("step")
    watchdog.stop()
    assert list(tmp_path.iterdir()) == []


def test_it_can_be_switched_off(tmp_path):
    watchdog = Watchdog(tmp_path, rank=0, minutes=None)
    watchdog.at("anything")
    watchdog.stop()
    assert list(tmp_path.iterdir()) == []
