"""How long forward, backward and optimizer of a step take, where they run, without a wait that would not be there anyway.

On a GPU the marks are events that it passes: they are read when the step is over, for which the loop waits by itself. A phase is then
what lies between two marks on the GPU's main stream: also the time in which it waits there for the network or for the program.
"""

import time

PHASES = ("forward", "backward", "optimizer")


class StepPhases:
    """`begin()`, then `end(phase)` after each; `seconds()` when the GPU is through with the step: [float] of PHASES, added up."""

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
