"""The keys that say which kernels compute a step, and what of them does not go together."""

import importlib.util
import os
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from dilqur.common.errors import InputError
from dilqur.kernels.varlen_attention import attention_for
from dilqur.pipeline.settings_parser import setting

Attention = Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"]
LossKernel = Literal["logits", "chunked", "liger"]  # dilqur/kernels/fused_cross_entropy.py
LIGER = "liger-kernel==0.8.5"  # what installs it
FP8_SMALLEST = 1024  # a side of a matrix: below, casting costs more than the faster product gains


@dataclass(kw_only=True)
class KernelSettings:
    """The keys, for a run's settings to inherit. None: as `kernels` says."""

    kernels: Literal["plain", "auto"] = setting(
        "auto: chosen for this machine; the four keys after it win over it", default="plain", on_resume="may_change"
    )
    attn_implementation: Attention | None = setting(
        "as in transformers; plain: sdpa", default=None, on_resume="may_change"
    )
    loss_kernel: LossKernel | None = setting(
        "head and loss in one, but for logits (plain)", default=None, on_resume="may_change"
    )
    torch_compile: bool | None = setting("compile compile_unit; plain: false", default=None, on_resume="may_change")
    compile_unit: Literal["layer", "model"] | None = setting(
        "what becomes one graph: each layer, or all between embeddings and head", default=None, on_resume="may_change"
    )
    use_liger_kernel: bool = setting(
        "as in transformers: Liger's layers and loss, patched in; on a GPU only", default=False, on_resume="may_change"
    )
    optim: Literal["adamw_torch", "adamw_torch_fused"] | None = setting(
        "AdamW; none: fused on a GPU", default=None, on_resume="may_change"
    )
    fp8: bool = setting("torchao's float8 products in large layers; Hopper and newer; another training", default=False)
    gradient_checkpointing: bool = setting(
        "recompute activations: less memory, a third slower", default=False, on_resume="may_change"
    )
    activation_memory_budget: Annotated[float, Field(ge=0, le=1)] | None = setting(
        "share of the activations that is kept, the rest recomputed: cheapest first if compiled, else by layer",
        default=None,
        on_resume="may_change",
    )


def check_kernels(settings, strategy):
    """InputError where the keys do not go together, or not with the strategy."""
    s = settings
    attention_for(s.attn_implementation or "sdpa", s.intra_document_masking)
    if s.use_liger_kernel and (s.kernels == "auto" or s.loss_kernel):
        raise InputError(
            "use_liger_kernel has a loss and layers of its own: give that, or kernels: auto or a loss_kernel"
        )
    if s.use_liger_kernel and s.encoder:
        raise InputError(
            "use_liger_kernel: Liger has no layers for a NeoBERT: leave it out, or give loss_kernel: liger"
        )
    if s.use_liger_kernel and s.torch_compile:
        raise InputError(
            "use_liger_kernel does not go with torch_compile: its RoPE cannot be traced (torch.compiler.disable'd), and what its other "
            "layers fuse the compiler fuses too: give loss_kernel: liger instead of it, or torch_compile: false"
        )
    if s.compile_unit and not (s.torch_compile or (s.torch_compile is None and s.kernels == "auto")):
        raise InputError("compile_unit: nothing is compiled without torch_compile: true: leave it out")
    if s.compile_unit == "model" and (why := no_single_graph(s, strategy)):
        raise InputError(f"compile_unit: model does not work {why}: take layer")
    if s.gradient_checkpointing and s.activation_memory_budget is not None:
        raise InputError("gradient_checkpointing is activation_memory_budget: 0: give one of them")
    if s.fp8 and not s.bf16:
        raise InputError("fp8: the layers that it leaves are to compute in bfloat16: give bf16: true, too")
    if s.fp8 and strategy.startswith("zero"):
        raise InputError(
            f"fp8 does not work under {strategy}: DeepSpeed's casts know nothing of it; take ddp.yaml or fsdp2.yaml"
        )
    if s.fp8 and importlib.util.find_spec("torchao") is None:
        raise InputError("fp8: its layers are torchao's: pip install torchao==0.18.0")
    if s.loss_kernel == "liger" and importlib.util.find_spec("liger_kernel") is None:
        raise InputError(f"loss_kernel: liger is not installed: pip install {LIGER}, or take chunked")


def no_single_graph(settings, strategy):
    """Why the whole model can be no one graph, or ""."""
    if strategy not in ("single", "ddp"):
        return f"under {strategy}, which gathers weights or hooks gradients on the way"
    if settings.intra_document_masking:
        return "with intra_document_masking, whose kernel is no part of a graph on every machine"
    if share_recomputed(settings) and not settings.activation_memory_budget:
        return "with gradient_checkpointing, which would cut the graph (activation_memory_budget does not)"
    return ""


def triton_runs():
    """Do Triton's kernels run in this process: on a GPU, or in Triton's interpreter (TRITON_INTERPRET=1), which runs them on a CPU, a
    thousand times slower?"""
    import torch

    return torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"


def in_bfloat16(settings):
    """Are the matrix products?"""
    return settings.bf16 or settings.dtype == "bfloat16"


def share_recomputed(settings):
    """Of the layers' activations, 0 to 1."""
    if settings.activation_memory_budget is not None:
        return 1 - settings.activation_memory_budget
    return float(settings.gradient_checkpointing)
