"""How far a long pass over files is: a bar with ETA on a terminal, a line a minute in a log."""

import sys
import time

from tqdm import tqdm

LINE_SECONDS = 60


class Progress:
    """total: bytes on disk that will be read. `at(done, **more)` tells how far; call it as often as you like."""

    def __init__(self, name, total):
        self.name, self.total = name, max(1, total)
        self._bar = tqdm(desc=name, total=total, unit="B", unit_scale=True) if sys.stderr.isatty() else None
        self._started, self._base, self._said = time.monotonic(), None, time.monotonic()

    def at(self, done, **more):
        """done: bytes of the input that are behind. more: what else to show, as name=text."""
        self._base = done if self._base is None else self._base  # a resumed pass begins in the middle
        if self._bar:
            self._bar.set_postfix(more, refresh=False)
            self._bar.update(int(done) - self._bar.n)
            return
        now = time.monotonic()
        if now - self._said >= LINE_SECONDS and done > self._base:
            rate = (done - self._base) / (now - self._started)
            left = (self.total - done) / rate / 60
            shown = "".join(f", {name} {value}" for name, value in more.items())
            print(
                f"{self.name}: {done / 1e9:.2f} of {self.total / 1e9:.2f} GB ({done / self.total:.0%}), "
                f"{rate / 1e6:.1f} MB/s on disk{shown}, {left:.0f} min left",
                file=sys.stderr,
                flush=True,
            )
            self._said = now

    def close(self):
        if self._bar:
            self._bar.close()
