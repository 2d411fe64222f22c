"""A model made to compute by the kernels that dilqur/kernels/choose.py has chosen. Parameters keep their names, and so do checkpoints."""

import functools

import torch

from dilqur.common.errors import InputError
from dilqur.kernels.choose import KNOWN_MODELS
from dilqur.kernels.fused_cross_entropy import fuse_loss
from dilqur.kernels.settings import FP8_SMALLEST, share_recomputed, triton_runs
from dilqur.kernels.varlen_attention import attention_for, register_document_attention


def apply_kernels(model, settings, chosen):
    """Before `model` is prepared. settings: a run's. chosen: as `choose` gives it. Raises InputError where the model has no such kernel."""
    on_gpu = torch.cuda.is_available()
    register_document_attention()
    attention = attention_for(chosen["attn_implementation"], settings.intra_document_masking)
    try:
        model.set_attn_implementation(attention)
    except (ImportError, ValueError) as problem:
        raise InputError(f"attn_implementation: {attention}: {str(problem).splitlines()[0]}") from None
    if settings.use_liger_kernel and not triton_runs():
        print("use_liger_kernel: no GPU here, going on without (its kernels are Triton's)", flush=True)
    elif settings.use_liger_kernel:
        from transformers.integrations.liger import apply_liger_kernel

        apply_liger_kernel(model, None)
    if settings.fp8 and not on_gpu:
        print("fp8: no GPU here, its rounding is emulated", flush=True)
    if settings.fp8:
        to_float8(model, emulate=not on_gpu)
    layers = [m for m in model.modules() if type(m).__name__ in model._no_split_modules]
    if share := share_recomputed(settings):
        if chosen["torch_compile"] and settings.activation_memory_budget:
            torch._functorch.config.activation_memory_budget = 1 - share
        else:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            for layer in layers[round(share * len(layers)) :]:
                layer.gradient_checkpointing = False
    if chosen["loss_kernel"] != "logits":
        fuse_loss(model, chosen["loss_kernel"], compiled=chosen["torch_compile"])
    if chosen["torch_compile"]:
        documents = settings.intra_document_masking  # how many there are differs from batch to batch
        whole = not documents and model.config.model_type in KNOWN_MODELS
        how = {"fullgraph": whole, "dynamic": None if documents else False}
        for part in [model.base_model] if chosen["compile_unit"] == "model" else layers:
            _compile_forward(part, **how)


def attend_without_cudnn():
    """For the rest of the process, where batches are padded and attention gets a mask: cuDNN's backward pass has given NaN with one on
    Hopper, for lengths of 64 more than a multiple of 128 and very negative logits (pytorch#196678, trl#7181), and torch takes
    it first there. cpt.py and mlm.py pass no mask."""
    torch.backends.cuda.enable_cudnn_sdp(False)


def _compile_forward(module, **how):
    """`forward` alone: the hooks of a strategy stay outside the graph. And in training alone: the last batch of an evaluation has
    another shape, and each shape would be a graph."""
    plain, compiled = module.forward, torch.compile(module.forward, **how)

    @functools.wraps(plain)
    def forward(*arguments, **named):
        return (compiled if module.training else plain)(*arguments, **named)

    module.forward = forward


def to_float8(model, emulate=False):
    """Large linear layers of `model` compute in float8, scaled by tensor: torchao's recipe of that name. emulate: the same rounding in
    another dtype, on any machine. The head stays as it is, and what has a side below FP8_SMALLEST or one that does not divide by 16.

    Raises InputError where there is no float8 here, or no layer large enough.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    if not emulate and torch.cuda.get_device_capability() < (8, 9):
        raise InputError("fp8: this GPU has no float8 products: they begin with Ada and Hopper")
    head, found = model.get_output_embeddings(), []

    def large(module, name):
        sides = module.weight.shape
        if module is head or min(sides) < FP8_SMALLEST or any(side % 16 for side in sides):
            return False
        found.append(name)
        return True

    convert_to_float8_training(model, module_filter_fn=large, config=Float8LinearConfig(emulate=emulate))
    if not found:
        raise InputError(f"fp8: no linear layer of this model has {FP8_SMALLEST} rows and columns: leave it out")
