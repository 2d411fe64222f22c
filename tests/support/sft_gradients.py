"""scripts/sft.py that writes the gradients of its first step to GRADIENTS and ends: for test_gradients.py."""

import os
import runpy
import sys
from pathlib import Path

import torch
import trl
from transformers import TrainerCallback

ROOT = Path(__file__).parents[2]


class Write(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if os.environ.get("RANK", "0") == "0":
            named = {name.removeprefix("module."): p.grad for name, p in model.named_parameters() if p.grad is not None}
            torch.save(named, os.environ["GRADIENTS"])
        sys.exit(0)


class WritingTrainer(trl.SFTTrainer):
    def __init__(self, *arguments, **named):
        super().__init__(*arguments, **named, callbacks=[Write()])


trl.SFTTrainer = WritingTrainer
sys.argv[0] = str(ROOT / "scripts" / "sft.py")
runpy.run_path(sys.argv[0], run_name="__main__")
