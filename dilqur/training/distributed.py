"""What DDP, FSDP2 and ZeRO do differently in a step, and all of it. The loop calls these functions and names no strategy.

    strategy   accelerate config                weights, gradients, optimizer     steps by              norm over ranks by
    single     none                             here                              AdamW                 nothing to do
    ddp        ddp.yaml                         whole on every rank               AdamW                 nothing to do
    fsdp2      fsdp2.yaml, fsdp2_offload.yaml   DTensors, sharded by rows         AdamW on its rows     all-reduce over shards
               hsdp.yaml                        sharded in a node, replicated over nodes
    zero1      zero1.yaml                       fp32 optimizer partitioned        DeepSpeed's engine    DeepSpeed's
    zero2      zero2.yaml                       gradients partitioned too
    zero3      zero3.yaml                       weights partitioned too

What is in which dtype where a recipe says `bf16: true` and `dtype: float32` (without it all is fp32; with `dtype: bfloat16` the weights and
the optimizer are bfloat16 too, and only the sums named here are fp32):

    strategy      weights       matrix products     between layers   a unit's output   gradients    on the network   optimizer
    single, ddp   fp32          bf16, by autocast   fp32             bf16; loss fp32   fp32         reduce_dtype     fp32
    fsdp2         fp32 shards   bf16, gathered so   bf16             bf16              fp32 shard   reduce_dtype     fp32
    zero1 to 3    bf16 copies   bf16                bf16             bf16              fp32         reduce_dtype     fp32, the masters

reduce_dtype is fp32 unless the recipe says otherwise. Losses are computed in fp32 of whatever the logits are in, and the gradient of the
head's weight is added up in fp32 by each kernel that has the loss in chunks (dilqur/kernels/fused_cross_entropy.py, and Liger's by
`accum_dtype`). FSDP2's units must not cast their outputs: the last norm would hand Liger's loss fp32 beside a head gathered in bf16, which
it cannot multiply. ZeRO's fp32 masters begin as the model's fp32 weights, to the bit, and not as the bfloat16 copies that DeepSpeed makes
them of. The norm of the gradients is summed in float64: `_square`; in ZeRO-2 and 3 by DeepSpeed itself, ZeRO-2 adding over ranks in fp32. A
unit of FSDP2 also casts the fp32 tensors that it is given, such as the sines and cosines of RoPE.

Who owns what of the training state is dilqur/checkpoint/local_shards.py's. Everything also runs on a CPU over gloo, the same code and the
same accelerate files, to debug on a laptop.
"""

import math
import os
from datetime import timedelta

from dilqur.checkpoint.local_shards import base_optimizer, flat_partitions, trained_parameters, zero_optimizer
from dilqur.pipeline.strategy import ZERO

# -- which one, before anything is loaded -----------------------------------------------------------------------------


# -- setting up -------------------------------------------------------------------------------------------------------


def make_accelerator(
    bf16,
    batch,
    accumulation,
    max_grad_norm,
    reduce_dtype="float32",
    report_to=(),
    folder=None,
    hang_minutes=None,
    fp32=True,
):
    """An `Accelerator` for whatever strategy `accelerate launch` asked for.

    batch, accumulation: sequences per micro-batch and micro-batches a step. bf16: matrix products in bfloat16; weights,
    gradients and optimizer stay in the model's dtype. reduce_dtype: of the gradients on the network. hang_minutes: the
    watchdog's, which is to find a hang before a collective gives up waiting. fp32: are weights and gradients.
    """
    import torch
    from accelerate import Accelerator
    from accelerate.utils import (
        DDPCommunicationHookType,
        DistributedDataParallelKwargs,
        GradientAccumulationPlugin,
        InitProcessGroupKwargs,
    )

    # rank 0 alone writes model/ at the end, and the others wait: an 8B on a slow file system takes longer than NCCL's 10 min
    process_group = InitProcessGroupKwargs(timeout=timedelta(minutes=max(60, (hang_minutes or 0) + 10)))
    low, on_gpu = reduce_dtype == "bfloat16", torch.cuda.is_available()
    ddp = DistributedDataParallelKwargs(
        comm_hook=DDPCommunicationHookType.BF16 if low and on_gpu else DDPCommunicationHookType.NO,  # it wants NCCL
        gradient_as_bucket_view=True,
    )
    arguments = {} if on_gpu else allow_cpu(process_group)
    accelerator = Accelerator(
        mixed_precision="bf16" if bf16 else "no",
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=accumulation, sync_each_batch=_reduces_each_micro_batch(fp32)
        ),
        log_with=list(report_to) or None,
        project_dir=folder,
        step_scheduler_with_optimizer=False,
        kwargs_handlers=[process_group, ddp],
        **arguments,
    )
    if (plugin := getattr(accelerator.state, "deepspeed_plugin", None)) is not None:
        plugin.deepspeed_config.update(
            train_micro_batch_size_per_gpu=batch,
            gradient_accumulation_steps=accumulation,
            gradient_clipping=max_grad_norm or 0.0,
            zero_allow_untested_optimizer=True,
            communication_data_type="bf16" if low else "fp32",
        )
        if bf16:  # else micro-batch gradients are added up in bf16
            plugin.deepspeed_config["data_types"] = {"grad_accum_dtype": "fp32"}
    elif strategy(accelerator) == "fsdp2":
        from torch.distributed.fsdp import CPUOffloadPolicy

        if isinstance(accelerator.state.fsdp_plugin.cpu_offload, CPUOffloadPolicy) and not on_gpu:
            accelerator.state.fsdp_plugin.cpu_offload = CPUOffloadPolicy(pin_memory=False)
        accelerator.state.fsdp_plugin.mixed_precision_policy = fsdp2_precision(bf16, reduce_dtype)
    return accelerator


def fsdp2_precision(bf16, reduce_dtype="float32"):
    """FSDP2's row of the table above, a MixedPrecisionPolicy."""
    import torch
    from torch.distributed.fsdp import MixedPrecisionPolicy

    return MixedPrecisionPolicy(torch.bfloat16 if bf16 else None, getattr(torch, reduce_dtype), output_dtype=None)


def _reduces_each_micro_batch(fp32):
    """FSDP2 that adds up micro-batches before it reduces them holds an unsharded fp32 gradient on every GPU, which an 8B has no
    room for: it reduces each, for more traffic. Not in pure bfloat16, where that fp32 sum is what is wanted."""
    return fp32 and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def allow_cpu(process_group):
    """accelerate turns FSDP and DeepSpeed on for GPUs only: say that gloo on a CPU is such a world. Arguments for Accelerator."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        process_group.backend = "gloo"
        return {}
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        from accelerate.state import PartialState
        from accelerate.utils import DistributedType

        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
        PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
        return {}
    return {"cpu": True}


def strategy(accelerator):
    """ "single", "ddp", "fsdp2", "zero1", "zero2" or "zero3"."""
    kind = str(accelerator.distributed_type).rpartition(".")[2]
    if kind == "DEEPSPEED":
        return f"zero{accelerator.state.deepspeed_plugin.deepspeed_config['zero_optimization']['stage']}"
    return {"FSDP": "fsdp2", "NO": "single"}.get(kind, "ddp")


def prepare(accelerator, model, make_optimizer, weights=None):
    """The model and its optimizer as the strategy keeps them; an AssertionError where that is not what its name says.

    make_optimizer(model): a torch optimizer of its trainable parameters. weights: dilqur.training.initial_weights.StoredWeights, from which
    a model on the meta device gets its weights, and ZeRO its fp32 master weights; None: the model has its own."""
    from dilqur.training.initial_weights import HeldWeights, fill

    name = strategy(accelerator)
    dtypes = {p.dtype for p in model.parameters() if p.requires_grad}
    empty = any(p.is_meta for p in model.parameters())
    assert not empty or name in ("fsdp2", "zero3"), f"{name}: a model without weights"
    cast = name in ZERO and accelerator.mixed_precision == "bf16"
    weights = HeldWeights(model) if cast and weights is None else weights
    if name == "fsdp2":
        model, optimizer = _prepare_fsdp2(accelerator, model, make_optimizer)
    else:
        optimizer = make_optimizer(model)
        if empty:
            _partition_empty(accelerator, model)
        model, optimizer = accelerator.prepare(model, optimizer)
    if empty or cast:
        fill(accelerator.unwrap_model(model), optimizer, weights)
    parameters = list(accelerator.unwrap_model(model).parameters())
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
        assert {p.dtype for p in trainable} == dtypes, f"{name}: the master weights have changed their dtype"
    if name in ZERO:
        _step_only_on_finite_gradients(optimizer)
    if name == "zero1" and cast:
        _sum_the_norm_in_float64()
    return model, optimizer


def _prepare_fsdp2(accelerator, model, make_optimizer):
    """The optimizer is made of the shards: accelerate's own way, to exchange the parameters of one that is there, tells them apart by
    where they lie in memory, and on the meta device they lie nowhere."""
    import torch
    from accelerate.utils import fsdp2_prepare_model
    from torch.distributed.fsdp import CPUOffloadPolicy

    if any(p.is_meta for p in model.parameters()):  # else rank 0 would send what it does not have either
        accelerator.state.fsdp_plugin.cpu_ram_efficient_loading = False
    model = fsdp2_prepare_model(accelerator, model)
    offloaded = isinstance(accelerator.state.fsdp_plugin.cpu_offload, CPUOffloadPolicy)

    def materialised(tensor):
        return torch.empty_like(tensor, device="cpu" if offloaded else accelerator.device) if tensor.is_meta else tensor

    model._apply(materialised)
    return model, accelerator.prepare_optimizer(make_optimizer(model))


def _partition_empty(accelerator, model):
    """Give the parameters of a model on the meta device room for this rank's partition, one after the other, as ZeRO-3 has them."""
    import torch
    from deepspeed.runtime.zero import Init

    dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
    config, convert = accelerator.state.deepspeed_plugin.deepspeed_config, None
    zero = {key: value for key, value in config["zero_optimization"].items() if value != "auto"}
    config = {"train_micro_batch_size_per_gpu": config["train_micro_batch_size_per_gpu"], "zero_optimization": zero}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if not parameter.is_meta:  # a tied one comes by twice
                continue
            room = torch.empty(parameter.shape, dtype=dtype, device=accelerator.device)
            torch.utils.swap_tensors(parameter, torch.nn.Parameter(room, requires_grad=parameter.requires_grad))
            if convert:
                convert(param_list=[parameter])
            else:
                Init(module=torch.nn.ParameterList([parameter]), config_dict_or_path=config, dtype=dtype)
                convert = parameter.convert_to_zero_parameters
    for buffer in model.buffers():
        buffer.data = buffer.data.to(accelerator.device)


def _step_only_on_finite_gradients(optimizer):
    """DeepSpeed's engine finds the norm and steps in one go: let the optimizer inside it look at the norm first."""
    base, zero = base_optimizer(optimizer), zero_optimizer(optimizer)
    step = base.step
    base.step = lambda *args, **kwargs: step(*args, **kwargs) if math.isfinite(zero._global_grad_norm) else None


def _sum_the_norm_in_float64():
    """DeepSpeed's BF16_Optimizer, which is its stage 1 in bfloat16, sums it in fp32."""
    import deepspeed.runtime.bf16_optimizer
    import torch
    from deepspeed.runtime.utils import mask_nan_or_inf_with_val_inplace

    def norm_of(input_tensors, **_):
        norm = torch.stack([_square(tensor.detach()) for tensor in input_tensors]).sum().sqrt().float()
        mask_nan_or_inf_with_val_inplace(norm, device=norm.device)
        return norm

    deepspeed.runtime.bf16_optimizer.get_global_norm_of_tensors = norm_of


# -- a step -----------------------------------------------------------------------------------------------------------


def warm_up_ddp_buckets(accelerator, model, loss_of_a_batch):
    """Before a checkpoint is loaded: a backward whose gradients are thrown away, where the strategy adds up otherwise after it.

    DDP puts its buckets into the order in which gradients came, so that on three ranks and more the sums of the first step are
    of another order: a resumed run would not have the bits of one that was never interrupted.
    """
    if strategy(accelerator) == "ddp":
        accelerator.backward(loss_of_a_batch())
        for parameter in model.parameters():
            parameter.grad = None


def backward(accelerator, loss):
    """Gradients of one micro-batch of a step, inside `accelerator.accumulate`.

    loss: what this rank's micro-batch adds to the mean over all tokens of the global batch: divided by their number already.
    The scale undoes the strategies' own averaging over ranks and accelerate's over micro-batches. A loss that is not finite
    is given gradients that are not, so that every rank will see it in the norm.
    """
    import torch

    scale = torch.where(loss.isfinite(), accelerator.num_processes * accelerator.gradient_accumulation_steps, torch.nan)
    loss = loss * scale
    if (wrapper := getattr(accelerator, "deepspeed_engine_wrapped", None)) is None:
        accelerator.backward(loss)
    else:  # accelerate's own would step as well
        wrapper.engine.set_gradient_accumulation_boundary(accelerator.sync_gradients)
        wrapper.engine.backward(loss)


def clip_and_step(accelerator, model, optimizer, max_norm):
    """Clip the gradients to `max_norm` (None: do not), step, and return the norm before clipping, a float.

    The norm is the Euclidean one of all trainable parameters' gradients, the same on every rank. Where it is not finite no
    step is made: weights, moments and Adam's step stay as they are. The gradients are gone afterwards.
    """
    import torch

    if (wrapper := getattr(accelerator, "deepspeed_engine_wrapped", None)) is not None:
        wrapper.engine.step()
        return float(wrapper.engine.get_global_grad_norm())
    gradients = [p.grad for _, p in trained_parameters(model) if p.grad is not None]
    norm = _norm(gradients)
    if math.isfinite(norm):
        if max_norm and norm > max_norm:
            torch._foreach_mul_([getattr(g, "_local_tensor", g) for g in gradients], max_norm / (norm + 1e-6))
        optimizer.step()
    optimizer.zero_grad()
    return norm


def _norm(gradients):
    """The Euclidean norm of all of them, on every rank the same; of shards over the ranks."""
    import torch

    squares = [_square(g.to_local() if hasattr(g, "to_local") else g) for g in gradients]
    square = torch.stack(squares).sum()
    for dimension, placement in enumerate(getattr(gradients[0], "placements", ())):
        if placement.is_shard():
            torch.distributed.all_reduce(square, group=gradients[0].device_mesh.get_group(dimension))
    return square.sqrt().item()


def _square(gradient, run=1024):
    """Sum of squares, float64: of runs of elements in fp32, of these in float64. In fp32 alone torch is wrong by 4 in 1,000 for 50 million
    elements on a CPU, and otherwise on a shard than on the whole; in float64 alone it first makes a copy of twice the size."""
    import torch

    flat = gradient.reshape(-1)
    whole = flat.numel() // run * run
    runs = torch.linalg.vector_norm(flat[:whole].view(-1, run), dim=1, dtype=torch.float32)
    return runs.double().square().sum() + flat[whole:].double().square().sum()


def gather_over_ranks(accelerator, *values):
    """`values` (numbers or one-element tensors) of every rank: a float64 CPU tensor of shape (ranks, values)."""
    import torch

    mine = torch.tensor([[float(v) for v in values]], dtype=torch.float64, device=accelerator.device)
    if accelerator.num_processes == 1:
        return mine.cpu()
    everyones = mine.new_empty(accelerator.num_processes, len(values))
    torch.distributed.all_gather_into_tensor(everyones, mine)
    return everyones.cpu()


def broadcast(accelerator, value):
    """Rank 0's `value`, any Python object, on every rank."""
    import torch

    box = [value]
    if accelerator.num_processes > 1:
        torch.distributed.broadcast_object_list(box)
    return box[0]
