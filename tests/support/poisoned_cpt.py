"""scripts/cpt.py whose loss is not a number for chosen samples of one rank, or that raises or hangs there: what a broken record, a
flipped bit or a bad node does.

    POISON="rank=1 steps=3,4 value=nan" accelerate launch … tests/support/poisoned_cpt.py --config …
"""

import os
import runpy
import sys
import time
from dataclasses import replace
from pathlib import Path

import dilqur.training.loop

ROOT = Path(__file__).parents[2]
poison = dict(word.split("=") for word in os.environ["POISON"].split())
steps = {int(step) for step in poison["steps"].split(",")}
train = dilqur.training.loop.train


def poisoned_train(settings, stage, task):
    calls = 0

    def loss(model, batch, tokens):
        nonlocal calls
        value = task.compute_loss(model, batch, tokens)
        if tokens == 1:  # not a step: an evaluation, or what is thrown away before the first
            return value
        calls += 1
        micro_batches = settings.global_batch_size // (
            settings.per_device_train_batch_size * int(os.environ.get("WORLD_SIZE", 1))
        )
        hit = os.environ.get("RANK", "0") == poison["rank"] and -(-calls // micro_batches) in steps
        if hit and poison["value"] == "raise":
            raise RuntimeError("poisoned")
        if hit and poison["value"] == "hang":
            time.sleep(3600)
        return value + float(poison["value"]) if hit else value

    train(settings, stage, replace(task, compute_loss=loss))


dilqur.training.loop.train = poisoned_train
sys.argv[0] = str(ROOT / "scripts" / "cpt.py")
runpy.run_path(sys.argv[0], run_name="__main__")
