"""What DDP, FSDP2 and ZeRO do differently, and all of it: setting up, checking that it is what it says, and who owns what.

    strategy   accelerate config           weights live in             this rank owns
    single     none                        the module                  everything
    ddp        ddp.yaml                    the module, on every rank   an equal run of rows of each tensor
    fsdp2      fsdp2.yaml                  DTensors, sharded by rows   its local rows
    zero1, 2   zero1.yaml, zero2.yaml      flat fp32 partitions        the fragments of its partition
    zero3      zero3.yaml                  partitioned parameters      its slice of each flattened parameter

Everything also runs on a CPU over gloo, the same code and the same accelerate files, to debug on a laptop.
"""

import os
from datetime import timedelta

MOMENTS = ("exp_avg", "exp_avg_sq")


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
        assert _zero(optimizer).fp32_partitioned_groups_flat, "zero3: no fp32 partitions"
    elif name in ("zero1", "zero2"):
        partitions = _flat_partitions(_zero(optimizer))
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


# -- who owns what ----------------------------------------------------------------------------------------------------


def owned_slices(model, optimizer, for_read=False):
    """Yield (name, shape, start, {"fp32": view, "exp_avg": view, "exp_avg_sq": view}) for every trainable parameter.

    The views are 1-D, alias the live training state, and cover the elements [start, start + len) of the flattened
    parameter that this rank owns; all ranks together own every element once. for_read: what this rank has to fill, which
    under ddp is everything. Frozen parameters are not training state: they are where the model came from.
    """
    base, zero = _base(optimizer), _zero(optimizer)
    for name, parameter in _named(model):
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        if hasattr(parameter, "ds_id"):
            start, views = _owned_zero3(parameter, base, zero)
        elif zero is not None:
            start, views = _owned_zero12(parameter, base, zero)
        elif hasattr(parameter, "to_local"):
            start, views = _owned_fsdp2(parameter, base)
        else:
            start, views = _owned_whole(parameter, base, for_read)
        yield name, shape, start, views


def refresh(optimizer):
    """After writing into the views of `owned_slices`: make the strategy's own low-precision or gathered copies again."""
    zero = _zero(optimizer)
    if zero is None:
        return
    if hasattr(zero, "update_lp_params"):  # zero1, zero2
        zero.update_lp_params()
        return
    whole = list(getattr(zero, "persistent_parameters", []))  # zero3 keeps small parameters gathered between steps
    for group in range(len(zero.fp32_partitioned_groups_flat)):
        zero._reassign_or_swap_out_partitioned_parameters(group)
    if whole:
        whole[0].partition(whole)
        whole[0].all_gather(whole)


def set_optimizer_step(optimizer, step):
    """Tell AdamW how many steps its moments have seen (bias correction)."""
    import torch

    for state in _base(optimizer).state.values():
        if "step" in state:
            state["step"] = torch.full_like(state["step"], step) if torch.is_tensor(state["step"]) else step


def _owned_whole(parameter, base, for_read):
    import torch.distributed as dist

    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() and not for_read else (0, 1)
    rows = parameter.shape[0] if parameter.ndim else 1
    per_row, each = parameter.numel() // max(1, rows), -(-rows // world)
    start, stop = min(rows, rank * each) * per_row, min(rows, (rank + 1) * each) * per_row
    return start, {k: v.view(-1)[start:stop] for k, v in _state(base, parameter, parameter.detach()).items()}


def _owned_fsdp2(parameter, base):
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    size, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    assert tuple(size[1:]) == tuple(parameter.shape[1:]), "only shards of whole rows are one flat range"
    start = offset[0] * (parameter.numel() // parameter.shape[0])
    return start, {k: v.to_local().reshape(-1) for k, v in _state(base, parameter, parameter.detach()).items()}


def _owned_zero12(parameter, base, zero):
    mapping = getattr(parameter, "_hp_mapping", None)
    if mapping is None:  # wholly in another rank's partition
        return 0, {}
    flat, where = _flat_partitions(zero)[mapping.param_group_index], mapping.hp_fragment_address
    views = {k: v.detach().view(-1).narrow(0, where.start, where.numel) for k, v in _state(base, flat, flat).items()}
    return mapping.lp_fragment_address.start, views


def _owned_zero3(parameter, base, zero):
    import torch.distributed as dist

    start = min(parameter.partition_numel() * dist.get_rank(), parameter.ds_numel)
    count = min(parameter.partition_numel(), parameter.ds_numel - start)
    fp32, group = zero._get_fp32_opt_state_partition(parameter, release_swap_buffers=False)
    _, offset, size = zero.grad_position[zero.get_param_id(parameter)]
    flat = zero.fp32_partitioned_groups_flat[group]
    state = _state(base, flat, flat)
    return start, {"fp32": fp32[:count], **{k: state[k].narrow(0, offset, size)[:count] for k in MOMENTS}}


def _state(base, key, fp32):
    """The weight and its moments; moments made as zeros where the optimizer has not stepped yet."""
    import torch

    state = base.state[key]
    for name in MOMENTS:
        if name not in state:
            state[name] = torch.zeros_like(key)
    if "step" not in state:
        on_device = any(g.get("fused") or g.get("capturable") for g in base.param_groups)
        state["step"] = torch.zeros((), dtype=torch.float32, device=key.device if on_device else "cpu")
    return {"fp32": fp32, **{name: state[name] for name in MOMENTS}}


def _named(model):
    """(name, parameter) of the trainable ones; a tied weight once, under its first name; wrappers' prefixes taken off."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield name.replace("_orig_mod.", "").removeprefix("module."), parameter


def _base(optimizer):
    while hasattr(optimizer, "optimizer"):  # accelerate's and DeepSpeed's wrappers
        optimizer = optimizer.optimizer
    return optimizer


def _zero(optimizer):
    """DeepSpeed's own optimizer, or None."""
    while optimizer is not None:
        if any(
            hasattr(optimizer, name)
            for name in (
                "single_partition_of_fp32_groups",
                "fp32_partitioned_groups_flat",
                "fp32_groups_flat_partition",
            )
        ):
            return optimizer
        optimizer = getattr(optimizer, "optimizer", None)
    return None


def _flat_partitions(zero):
    """This rank's flat fp32 partition of each parameter group; DeepSpeed names it after the class it took."""
    return getattr(zero, "single_partition_of_fp32_groups", None) or zero.fp32_groups_flat_partition
