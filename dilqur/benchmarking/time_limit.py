"""The time that a benchmark may take: when no run begins any more, when the one in progress is cut, and what becomes of a signal."""

import math
import time


class NoTime(Exception):
    """A run was not made, or not to its end, and why."""


class TimeLimit:
    """begin_s, cut_s: seconds from now after which no run begins, and after which the one in progress is cut; None: never.

    `stop` is a handler of signals: the run in progress ends, no other begins, and what was measured can still be written.
    """

    def __init__(self, begin_s=None, cut_s=None):
        began = time.monotonic()
        self.begin_until, self.cut_at = (began + (math.inf if s is None else s) for s in (begin_s, cut_s))
        self.signal, self.running = None, False

    def stop(self, number, frame=None):
        self.signal = number
        if self.running:
            self.running = False
            raise NoTime("interrupted")

    def run(self, measure, seconds):
        """The outcome of measure(seconds that it may take, `seconds` at most). Raises NoTime where it may not begin, or was cut."""
        now = time.monotonic()
        if self.signal or now >= min(self.begin_until, self.cut_at):
            raise NoTime("interrupted" if self.signal else "no time")
        self.running = True
        try:
            outcome = measure(min(seconds, self.cut_at - now))
        finally:
            self.running = False
        if outcome.problem and time.monotonic() >= self.cut_at:
            raise NoTime(f"cut after {outcome.seconds:.0f} s, when time was up")
        return outcome
