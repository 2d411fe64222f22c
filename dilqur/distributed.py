"""What DDP, FSDP2 and ZeRO do differently in a step, and all of it: setting up, checking that it is what it says, stepping.

Who owns what of the training state is dilqur/owned_state.py's. Everything also runs on a CPU over gloo, the same code and the
same accelerate files, to debug on a laptop.
"""

import os
from datetime import timedelta

from dilqur.owned_state import flat_partitions, zero_optimizer

# -- setting up -------------------------------------------------------------------------------------------------------


def make_accelerator(bf16, batch, accumulation, max_grad_norm, report_to=(), folder=None):
    """An `Accelerator` for whatever strategy `accelerate launch` asked for.

    batch, accumulation: sequences a micro-batch and micro-batches a step. bf16: matrix products in bfloat16; weights,
    gradients and optimizer stay fp32.
    """
    import torch
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    # rank 0 alone writes model/ at the end, and the others wait: an 8B on a slow file system takes longer than NCCL's 10 min
    process_group = InitProcessGroupKwargs(timeout=timedelta(hours=1))
    arguments = {"kwargs_handlers": [process_group]} if torch.cuda.is_available() else _allow_cpu(process_group)
    accelerator = Accelerator(
        mixed_precision="bf16" if bf16 else "no",
        gradient_accumulation_steps=accumulation,
        log_with=list(report_to) or None,
        project_dir=folder,
        step_scheduler_with_optimizer=False,
        **arguments,
    )
    if (plugin := getattr(accelerator.state, "deepspeed_plugin", None)) is not None:
        plugin.deepspeed_config.update(
            train_micro_batch_size_per_gpu=batch,
            gradient_accumulation_steps=accumulation,
            gradient_clipping=max_grad_norm or 0.0,
            zero_allow_untested_optimizer=True,
        )
        if bf16:  # else micro-batch gradients are added up in bf16
            plugin.deepspeed_config["data_types"] = {"grad_accum_dtype": "fp32"}
    elif strategy(accelerator) == "fsdp2" and bf16:
        from torch.distributed.fsdp import MixedPrecisionPolicy

        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
            torch.bfloat16, torch.float32, torch.float32
        )
    return accelerator


def _allow_cpu(process_group):
    """accelerate turns FSDP and DeepSpeed on for GPUs only: say that gloo on a CPU is such a world. Arguments for Accelerator."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        process_group.backend = "gloo"
        return {"kwargs_handlers": [process_group]}
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        from accelerate.state import PartialState
        from accelerate.utils import DistributedType

        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
        PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
        return {"kwargs_handlers": [process_group]}
    return {"cpu": True, "kwargs_handlers": [process_group]}


def strategy(accelerator):
    """ "single", "ddp", "fsdp2", "zero1", "zero2" or "zero3"."""
    kind = str(accelerator.distributed_type).rpartition(".")[2]
    if kind == "DEEPSPEED":
        return f"zero{accelerator.state.deepspeed_plugin.deepspeed_config['zero_optimization']['stage']}"
    return {"FSDP": "fsdp2", "NO": "single"}.get(kind, "ddp")


def prepare(accelerator, model, optimizer):
    """`accelerator.prepare`, and an AssertionError where the strategy is not what its name says."""
    model, optimizer = accelerator.prepare(model, optimizer)
    name, parameters = strategy(accelerator), list(accelerator.unwrap_model(model).parameters())
    trainable = [p for p in parameters if p.requires_grad]
    if name == "fsdp2":
        from torch.distributed.tensor import DTensor

        assert all(isinstance(p, DTensor) for p in parameters), "fsdp2: a parameter is not sharded"
    elif name == "zero3":
        assert all(hasattr(p, "ds_id") for p in parameters), "zero3: a parameter is not partitioned"
        assert zero_optimizer(optimizer).fp32_partitioned_groups_flat, "zero3: no fp32 partitions"
    elif name in ("zero1", "zero2"):
        partitions = flat_partitions(zero_optimizer(optimizer))
        size = sum(p.numel() for p in partitions)
        assert 0 < size * accelerator.num_processes < sum(p.numel() for p in trainable) + (1 << 20), (
            f"{name}: not partitioned"
        )
        assert all(p.dtype.itemsize == 4 for p in partitions), f"{name}: the master weights are not fp32"
    if name in ("single", "ddp", "fsdp2"):
        assert all(p.dtype.itemsize == 4 for p in trainable), f"{name}: the master weights are not fp32"
    return model, optimizer


def backward_scale(accelerator):
    """What a loss already divided by the global number of tokens is multiplied with, so that the strategy's own averaging
    over ranks and accelerate's over accumulation steps leave the gradient of the whole batch."""
    return accelerator.num_processes * accelerator.gradient_accumulation_steps


def gradient_norm(accelerator, model, max_norm):
    """Clip to `max_norm` (None: do not) and return the norm before clipping, over all parameters and ranks, as float.

    Right after the backward of the last micro-batch. Under ZeRO the engine has clipped, and stepped, by then.
    """
    norm = accelerator.clip_grad_norm_(model.parameters(), max_norm if max_norm else float("inf"))
    if hasattr(norm, "full_tensor"):
        norm = norm.full_tensor()
    return float(norm) if norm is not None else float("nan")


def sum_over_ranks(accelerator, *values):
    """Sum over ranks of each of `values` (numbers or one-element tensors), in float64, as a tuple of floats."""
    import torch

    total = torch.tensor([float(v) for v in values], dtype=torch.float64, device=accelerator.device)
    if accelerator.num_processes > 1:
        torch.distributed.all_reduce(total)
    return tuple(total.tolist())
