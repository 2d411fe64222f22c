"""The local shard of the training state: the one thing a checkpoint has to know of a strategy.

    strategy        weights are in              this rank's shard
    single          the module                  everything
    ddp             the module, on every rank   an equal run of rows of each tensor
    fsdp2           DTensors, sharded by rows   its local rows; with replicas (HSDP), an equal part of them
    zero1, zero2    flat fp32 partitions        the fragments in its partition
    zero3           partitioned parameters      its slice of each flattened parameter

The shards of all ranks hold every element of every trainable parameter exactly once.
"""

import math

MOMENTS = ("exp_avg", "exp_avg_sq")


def local_slices(model, optimizer, for_read=False, moments=True):
    """Yield (name, shape, start, {"weight": view, "exp_avg": view, "exp_avg_sq": view}) for every trainable parameter.

    The views are 1-D, alias the live training state (the fp32 master weights; bfloat16 where training is pure bf16), and
    cover the elements [start, start + len) of the flattened parameter. for_read: the slices this rank has to fill on loading,
    under ddp everything. moments: False for the weights alone. Frozen parameters are no training state: the base model has
    them.
    """
    base, zero = base_optimizer(optimizer), zero_optimizer(optimizer)
    stepped = {id(p) for group in base.param_groups for p in group["params"]}
    kinds = MOMENTS if moments else ()
    for name, parameter in trained_parameters(model):
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        assert zero is not None or id(parameter) in stepped, f"{name} is not what the optimizer steps"
        if hasattr(parameter, "ds_id"):
            start, views = _slice_zero3(parameter, base, zero, for_read, kinds)
        elif zero is not None:
            start, views = _slice_zero12(parameter, base, zero, for_read, kinds)
        elif hasattr(parameter, "to_local"):
            start, views = _slice_fsdp2(parameter, base, for_read, kinds)
        else:
            start, views = _slice_whole(parameter, base, for_read, kinds)
        yield name, shape, start, views


def frozen_shards(model):
    """Yield (name, start, view) of what this rank keeps of the frozen parameters, under the strategies that shard those too."""
    for name, parameter in _between_steps(model):
        if parameter.requires_grad:
            continue
        if hasattr(parameter, "ds_id"):
            start = min(parameter.partition_numel() * _rank(), parameter.ds_numel)
            yield name, start, parameter.ds_tensor.view(-1)[: parameter.ds_numel - start]
        elif hasattr(parameter, "to_local"):
            yield name, first_element(parameter), parameter.detach().to_local().reshape(-1)


def refresh(optimizer):
    """After writing into the views of `local_slices`: make the strategy's own low-precision or gathered copies again."""
    zero = zero_optimizer(optimizer)
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

    for state in base_optimizer(optimizer).state.values():
        if "step" in state:
            state["step"] = torch.full_like(state["step"], step) if torch.is_tensor(state["step"]) else step


def _slice_whole(parameter, base, for_read, kinds):
    import torch.distributed as dist

    rank, world = (_rank(), dist.get_world_size()) if dist.is_initialized() and not for_read else (0, 1)
    rows = parameter.shape[0] if parameter.ndim else 1
    per_row, each = parameter.numel() // max(1, rows), -(-rows // world)
    start, stop = min(rows, rank * each) * per_row, min(rows, (rank + 1) * each) * per_row
    state = _state(base, parameter, parameter.detach(), for_read, kinds)
    return start, {k: v.view(-1)[start:stop] for k, v in state.items()}


def _slice_fsdp2(parameter, base, for_read, kinds):
    start = first_element(parameter)
    views = {
        k: v.to_local().reshape(-1) for k, v in _state(base, parameter, parameter.detach(), for_read, kinds).items()
    }
    if for_read:
        return start, views
    mesh, replica, replicas = parameter.device_mesh, 0, 1
    for dimension, placement in enumerate(parameter.placements):
        if placement.is_replicate():
            replica = replica * mesh.size(dimension) + mesh.get_local_rank(dimension)
            replicas *= mesh.size(dimension)
    each = -(-views["weight"].numel() // replicas)
    return start + replica * each, {k: v[replica * each : (replica + 1) * each] for k, v in views.items()}


def first_element(parameter):
    """Where this rank's rows of a DTensor begin in the flattened parameter. AssertionError unless whole rows are sharded."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    size, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    assert tuple(size[1:]) == tuple(parameter.shape[1:]), "only shards of whole rows are one flat range"
    return offset[0] * math.prod(parameter.shape[1:]) if offset else 0


def _slice_zero12(parameter, base, zero, for_read, kinds):
    mapping = getattr(parameter, "_hp_mapping", None)
    if mapping is None:  # wholly in another rank's partition
        return 0, {}
    flat, where = flat_partitions(zero)[mapping.param_group_index], mapping.hp_fragment_address
    state = _state(base, flat, flat, for_read, kinds)
    views = {k: v.detach().view(-1).narrow(0, where.start, where.numel) for k, v in state.items()}
    return mapping.lp_fragment_address.start, views


def _slice_zero3(parameter, base, zero, for_read, kinds):
    start = min(parameter.partition_numel() * _rank(), parameter.ds_numel)
    count = min(parameter.partition_numel(), parameter.ds_numel - start)
    fp32, group = zero._get_fp32_opt_state_partition(parameter, release_swap_buffers=False)
    _, offset, size = zero.grad_position[zero.get_param_id(parameter)]
    flat = zero.fp32_partitioned_groups_flat[group]
    state = _state(base, flat, flat, for_read, kinds)
    return start, {"weight": fp32[:count], **{k: state[k].narrow(0, offset, size)[:count] for k in kinds}}


def _state(base, key, weight, for_read, kinds):
    """The weight and its moments `kinds`: zeros where the optimizer has not stepped yet, which it keeps only if they are to be filled."""
    import torch

    state = base.state[key] if for_read and kinds else base.state.get(key, {})
    found = {kind: state[kind] if kind in state else torch.zeros_like(key) for kind in kinds}
    if for_read and kinds:
        state.update(found)
        if "step" not in state:
            on_device = any(g.get("fused") or g.get("capturable") for g in base.param_groups)
            state["step"] = torch.zeros((), dtype=torch.float32, device=key.device if on_device else "cpu")
    return {"weight": weight, **found}


def trained_parameters(model):
    """[(name, parameter)] of the trainable ones of a prepared model, as its strategy keeps them between steps: shards, where it shards.
    A tied weight once, under its first name; wrappers' prefixes taken off."""
    return [(name, parameter) for name, parameter in _between_steps(model) if parameter.requires_grad]


def _between_steps(model):
    """Every walk over the parameters of a prepared model is by this function: a forward pass without a backward one, such as an
    evaluation's, leaves FSDP2's last group gathered, in the dtype of the products (by design, pytorch#131965; accelerate#4015 makes
    such a group of embeddings, head and last norm). Those tensors are temporary copies: the optimizer steps others."""
    from torch.distributed.fsdp import FSDPModule

    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.reshard()
    for name, parameter in model.named_parameters():
        assert not units or hasattr(parameter, "to_local"), f"fsdp2: {name} is gathered, and not this rank's shard"
        yield name.replace("_orig_mod.", "").removeprefix("module."), parameter


def _rank():
    import torch.distributed as dist

    return dist.get_rank()


def base_optimizer(optimizer):
    """The torch optimizer inside accelerate's and DeepSpeed's wrappers."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def zero_optimizer(optimizer):
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


def flat_partitions(zero):
    """This rank's flat fp32 partition of each parameter group; DeepSpeed names it after the class it took."""
    return getattr(zero, "single_partition_of_fp32_groups", None) or zero.fp32_groups_flat_partition
