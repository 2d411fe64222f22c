"""Forward, backward and optimizer of a step, in seconds, micro-batches added up."""

import time

import pytest
import torch

from dilqur.training.profiling import PHASES, StepPhases


@pytest.mark.parametrize(
    "on_gpu", [False, pytest.param(True, marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
)
def test_phases_are_added_up_over_micro_batches_and_begin_anew_with_each_step(on_gpu):
    def work():
        if on_gpu:
            torch.cuda._sleep(20_000_000)  # cycles, some 10 ms
        else:
            time.sleep(0.01)

    phases, least = StepPhases(on_gpu), 0.002 if on_gpu else 0.01
    for _ in range(2):  # steps
        began = time.perf_counter()
        for _ in range(2):  # micro-batches
            work()  # between two micro-batches: of no phase
            phases.begin()
            work()
            phases.end("forward")
            work()
            work()
            phases.end("backward")
        work()
        phases.end("optimizer")
        if on_gpu:
            torch.cuda.synchronize()
        forward, backward, optimizer = phases.seconds()
        assert PHASES == ("forward", "backward", "optimizer")
        assert forward >= 2 * least and backward >= 4 * least and optimizer >= least
        assert forward + backward + optimizer <= time.perf_counter() - began - 2 * least, "what lies between is in none"
