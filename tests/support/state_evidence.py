"""scripts/cpt.py that says how many bytes of training state a rank holds in its first step.

    EVIDENCE=folder accelerate launch … tests/support/state_evidence.py --config …

Each rank writes FOLDER/rank-N.json: bytes of weights (ZeRO's fp32 partitions too), of both moments after the first step, and of gradients,
the most after any of its backward passes. What several tensors share counts once.
"""

import json
import os
import runpy
import sys
from pathlib import Path

import dilqur.training.loop
import dilqur.training.set_up
from dilqur.checkpoint.local_shards import MOMENTS, base_optimizer, flat_partitions, zero_optimizer

ROOT = Path(__file__).parents[2]
prepare, backward = dilqur.training.set_up.prepare, dilqur.training.loop.backward
clip_and_step = dilqur.training.loop.clip_and_step
seen, most, prepared = {}, [0], []


def size(tensors):
    """Bytes of the memory that these tensors lie in."""
    local = [getattr(t, "_local_tensor", t) for t in tensors if t is not None]
    return sum({s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in local)}.values())


def gradients(model, zero):
    """Bytes of gradients, wherever they lie."""
    parameters = list(model.parameters())
    held = size([g for p in parameters for g in (p.grad, getattr(p, "grad_accum", None))])
    held += size(getattr(zero, "fp32_groups_gradients_flat", []))  # stage 1
    if (flat := getattr(zero, "grad_partitions_flat_buffer", None)) is not None:  # stage 3
        return held + size([flat])
    partitions = (
        getattr(zero, "averaged_gradients", None) or {}
    )  # stage 2: views of what is freed once all of it is known
    return held + sum(g.nbytes for group in partitions.values() for g in group or [])


def watched_prepare(*arguments):
    prepared[:] = prepare(*arguments)
    return prepared


def watched_backward(accelerator, loss):
    backward(accelerator, loss)
    if not seen:
        model, optimizer = prepared
        most[0] = max(most[0], gradients(accelerator.unwrap_model(model), zero_optimizer(optimizer)))


def watched_step(accelerator, model, optimizer, max_norm):
    first = not seen
    if first:
        zero, parameters = zero_optimizer(optimizer), list(accelerator.unwrap_model(model).parameters())
        weights = [getattr(p, "ds_tensor", p) for p in parameters]
        if zero is not None:
            weights += getattr(zero, "fp32_partitioned_groups_flat", None) or flat_partitions(zero)
        seen.update(weights=size(weights), gradients=most[0])
    norm = clip_and_step(accelerator, model, optimizer, max_norm)
    if first:
        states = base_optimizer(optimizer).state.values()
        seen["moments"] = size(state[moment] for state in states for moment in MOMENTS)
        file = Path(os.environ["EVIDENCE"]) / f"rank-{accelerator.process_index}.json"
        file.write_text(json.dumps(seen))
    return norm


dilqur.training.loop.backward, dilqur.training.loop.clip_and_step = watched_backward, watched_step
dilqur.training.set_up.prepare = watched_prepare
sys.argv[0] = str(ROOT / "scripts" / "cpt.py")
runpy.run_path(sys.argv[0], run_name="__main__")
