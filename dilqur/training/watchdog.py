"""Finds a hang: a rank that makes no progress writes where every thread of it is, names its node, and ends the run.

One rank that waits for a broken disk makes all others wait for it in a collective, without end and without a word. The rank to
look at is the one whose line does not say that it waits for the others.
"""

import contextlib
import faulthandler
import os
import socket
import sys
import threading
import time
from pathlib import Path

SIGTERM_GRACE_S = 45
GIL_HELD_S = 120  # if Python's own thread cannot run either, faulthandler's does, this much later


class Watchdog:
    """Tell it what comes next by `at`; when nothing has been told for `minutes` (None: never), or for SIGTERM_GRACE_S seconds
    after the launcher has told this rank to end, because another has failed, it writes
    FOLDER/hang-rank-00003.txt, leaves a REQUEUE marker, and exits with code 1: the launcher ends the other ranks."""

    def __init__(self, folder, rank, minutes, interrupt=None):
        """interrupt: the Interrupt that hears of a TERM."""
        self.folder, self.rank, self.seconds = Path(folder), rank, minutes and 60 * minutes
        self.interrupt, self._patient = interrupt, False
        self.doing, self.since, self._file, self._ended = "starting", time.monotonic(), None, threading.Event()
        if self.seconds:
            self.path = self.folder / f"hang-rank-{rank:05d}.txt"
            if self.path.exists() and self.path.stat().st_size:  # what the run before wrote is still to be read
                self.path.rename(self.path.with_name(f"hang-{int(self.path.stat().st_mtime)}-rank-{rank:05d}.txt"))
            self._file = self.path.open("w")
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
            self.at("starting")

    def at(self, doing, patient=False):
        """doing: what begins now, e.g. "step 12, waiting for the other ranks". patient: it may take long after a TERM: a save."""
        self.doing, self.since, self._patient = doing, time.monotonic(), patient
        if self._file:
            faulthandler.dump_traceback_later(self.seconds + GIL_HELD_S, exit=True, file=self._file)

    def stop(self):
        """The training is over: nobody watches any more, and no empty file stays."""
        self._ended.set()
        if self._file:
            faulthandler.cancel_dump_traceback_later()
            self._file.close()
            self.path.unlink(missing_ok=True)
            self._file = None

    def _watch(self):
        often = min(10, self.seconds / 4)
        while not self._ended.wait(often):
            quiet = time.monotonic() - self.since
            told_to_end = self.interrupt and self.interrupt.signalled == "SIGTERM" and not self._patient
            if quiet > (SIGTERM_GRACE_S if told_to_end else self.seconds):
                who = f"rank {self.rank} on {socket.gethostname()}"
                line = f"{who}: nothing happened for {quiet / 60:.1f} minutes, while {self.doing}"
                self._file.write(f"{line}\n\n")
                self._file.flush()
                faulthandler.dump_traceback(self._file, all_threads=True)
                self._dump_nccl()
                print(f"error: {line}; where it stands: {self.path}", file=sys.stderr, flush=True)
                (self.folder / "REQUEUE").touch()
                time.sleep(2 * often)  # the others wait for this one, and find out as well: let them write
                os._exit(1)

    def _dump_nccl(self):
        """NCCL's flight recorder: the last collectives of this rank, and which of them have not ended. On GPUs."""
        torch = sys.modules.get("torch")
        with contextlib.suppress(Exception):  # not in every build
            dump = torch._C._distributed_c10d._dump_nccl_trace()
            self.path.with_suffix(".nccl.pickle").write_bytes(dump)
