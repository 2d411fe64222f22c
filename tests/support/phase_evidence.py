"""scripts/cpt.py that says what its first step computed and keeps, in numbers of elements: what training only some parameters saves.

    EVIDENCE=folder accelerate launch … tests/support/phase_evidence.py --config …

Each rank writes FOLDER/rank-N.json:

trained, frozen        elements of the whole model's parameters
gradients              elements of gradient this rank holds before the optimizer steps, or of the buffers that ZeRO has for them
frozen_with_gradient   names of frozen parameters that have one
optimizer              elements of each AdamW moment this rank holds after the step
master_weights         elements of ZeRO's flat fp32 partitions, 0 elsewhere
matrix_flops, tokens   floating-point operations of the step's matrix products (aten.mm: those with weights; attention has others),
                       forward and backward, and the tokens this rank has had: 2 a token and weight for each of the three products
                       a trained matrix takes part in, 4 a token and weight in all where the matrix is frozen
"""

import json
import os
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import dilqur.training.loop
import dilqur.training.set_up
from dilqur.checkpoint.local_shards import MOMENTS, base_optimizer, flat_partitions, zero_optimizer

ROOT = Path(__file__).parents[2]
train, clip_and_step = dilqur.training.loop.train, dilqur.training.loop.clip_and_step
warm_up_ddp_buckets = dilqur.training.set_up.warm_up_ddp_buckets
counter, seen, settled = None, {}, False


def counted_train(settings, stage, task):
    def loss(model, batch, tokens):
        global counter
        if settled and counter is None:
            from torch.utils.flop_counter import FlopCounterMode

            counter = FlopCounterMode(display=False)
            counter.__enter__()  # until the optimizer's turn: forward and backward of all micro-batches
        if settled and not seen:
            counter.tokens = getattr(counter, "tokens", 0) + batch["input_ids"].numel()
        return task.compute_loss(model, batch, tokens)

    train(settings, stage, replace(task, compute_loss=loss))


def warm_up_uncounted(*arguments):
    """Its backward is thrown away, and no part of the step."""
    global settled
    warm_up_ddp_buckets(*arguments)
    settled = True


def watched_step(accelerator, model, optimizer, max_norm):
    first = not seen
    if first:
        import torch

        counter.__exit__(None, None, None)
        flops = counter.get_flop_counts()["Global"]
        seen.update(matrix_flops=int(flops.get(torch.ops.aten.mm, 0)), tokens=counter.tokens)
        seen.update(before_the_step(accelerator.unwrap_model(model), zero_optimizer(optimizer)))
    norm = clip_and_step(accelerator, model, optimizer, max_norm)
    if first:
        states = base_optimizer(optimizer).state.values()
        seen["optimizer"] = [sum(elements(state[moment]) for state in states) for moment in MOMENTS]
        file = Path(os.environ["EVIDENCE"]) / f"rank-{accelerator.process_index}.json"
        file.write_text(json.dumps(seen))
    return norm


def before_the_step(model, zero):
    """What there is of gradients."""
    # of the whole, also where it is partitioned
    sizes = {p: getattr(p, "ds_numel", p.numel()) for p in model.parameters()}
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    held = {name: gradient for name, p in model.named_parameters() if (gradient := gradient_of(p)) is not None}
    master = 0
    if zero is None:
        gradients = sum(elements(g) for g in held.values())
    elif (buffer := getattr(zero, "grad_partitions_flat_buffer", None)) is not None:  # zero3
        gradients, master = buffer.numel(), sum(elements(p) for p in zero.fp32_partitioned_groups_flat)
    else:
        gradients = sum(elements(g) for group in zero.averaged_gradients.values() for g in group)
        master = sum(elements(p) for p in flat_partitions(zero))
    return {
        "trained": sum(size for p, size in sizes.items() if p.requires_grad),
        "frozen": sum(size for p, size in sizes.items() if not p.requires_grad),
        "gradients": gradients,
        "frozen_with_gradient": [name for name in frozen if name in held],
        "master_weights": master,
    }


def gradient_of(parameter):
    """Wherever it may lie; DeepSpeed adds micro-batches up in grad_accum."""
    return next((g for name in ("grad", "grad_accum") if (g := getattr(parameter, name, None)) is not None), None)


def elements(tensor):
    """That this rank holds."""
    return (tensor.to_local() if hasattr(tensor, "to_local") else tensor).numel()


dilqur.training.loop.train, dilqur.training.loop.clip_and_step = counted_train, watched_step
dilqur.training.set_up.warm_up_ddp_buckets = warm_up_uncounted
sys.argv[0] = str(ROOT / "scripts" / "cpt.py")
runpy.run_path(sys.argv[0], run_name="__main__")
