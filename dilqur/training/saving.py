"""When a checkpoint is saved, and what happens where that fails: dilqur/checkpoint/writer.py's writer, as the recipe wants it used."""

import time

from dilqur.checkpoint.writer import SaveFailed


class Saving:
    """last: the step of the newest checkpoint that stands or is being written, 0 for none, None after one failed."""

    def __init__(self, settings, writer, interrupt, say, last):
        """say: function that prints a line, on rank 0, None elsewhere. last: the step that the run goes on from."""
        self.settings, self.writer, self.interrupt, self.say, self.last = settings, writer, interrupt, say, last
        self._time = time.monotonic()

    def forget(self, step):
        """What is saved of `step` is not all of it: it is to be saved again."""
        self.last = None if step == self.last else self.last

    def is_overdue(self, step):
        """By `save_minutes`; every rank's clock is another, so the loop asks rank 0's."""
        minutes = self.settings.save_minutes
        return bool(minutes) and step != self.last and time.monotonic() - self._time > 60 * minutes

    def save(self, model, optimizer, step, trainer):
        """Start saving, unless `step` is saved already; returns the seconds that training waited. A collective.

        Raises SaveFailed if the one before failed, unless on_save_failure says continue.
        """
        if step == self.last:
            return 0.0
        began = time.perf_counter()
        try:
            self.writer.save(model, optimizer, step, trainer)
        except SaveFailed as problem:
            self._apply_failure_policy(problem)
            self.writer.save(model, optimizer, step, trainer)
        self.last, self._time = step, time.monotonic()
        self.interrupt.observe_duration("a save", self.writer.seconds)
        return time.perf_counter() - began

    def on_write_error(self):
        """A rank's writer has met an error: all ranks come here at the same step. Raises as `save`."""
        try:
            self.writer.wait()
        except SaveFailed as problem:
            self._apply_failure_policy(problem)

    def _apply_failure_policy(self, problem):
        if self.settings.on_save_failure == "stop":
            raise problem
        self.last = None
        if self.say:
            self.say(f"warning: {problem}; going on, as on_save_failure says")
