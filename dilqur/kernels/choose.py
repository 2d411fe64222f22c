"""Which kernels compute a step: what a recipe can say of them, and what `kernels: auto` chooses. dilqur/kernels/apply.py does it.

    key                   plain     auto on a GPU                                        auto on a CPU
    attn_implementation   sdpa      sdpa                                                 sdpa
    loss_kernel           logits    liger where it is installed, else chunked            chunked, where the logits are more than a chunk
    torch_compile         false     true, if there is a C compiler; not under ZeRO-3     false
    compile_unit          layer     model, for an encoder on whole weights; else layer   layer

A key that the recipe gives wins over both columns, so that each choice can be turned off by itself. What was chosen is printed with its
reason and kept in the checkpoints: a run that goes on computes as it began, where that can be had. The rules are functions of what is
known before the first step, not of a stopwatch, so that two runs of one recipe on one kind of machine are the same run.
`scripts/benchmark.py` measures the choices against each other; docs/kernels.md says which rules rest on which measurement.
"""

import importlib.util
import os
import shutil
from dataclasses import dataclass, fields
from typing import Annotated, Literal

from pydantic import Field

from dilqur.common.errors import InputError
from dilqur.kernels.varlen_attention import attention_for
from dilqur.pipeline.settings_parser import setting

ATTENTION = ("sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention")
LOSS_KERNELS = ("logits", "chunked", "liger")  # dilqur/kernels/fused_cross_entropy.py
LIGER = "liger-kernel==0.8.5"  # what installs it
PLAIN = {"attn_implementation": "sdpa", "loss_kernel": "logits", "torch_compile": False, "compile_unit": "layer"}
# models whose loss is the cross-entropy of what the head gives, which others scale or cap first, and whose layers are one graph
KNOWN_MODELS = ("llama", "mistral", "qwen2", "qwen3", "neobert")
# of fp32 logits that the chunked loss has at a time: large products, and little beside the activations
CHUNK_BYTES = 512 << 20
FP8_SMALLEST = 1024  # a side of a matrix: below, casting costs more than the faster product gains


@dataclass(kw_only=True)
class KernelSettings:
    """The keys, for a run's settings to inherit. None: as `kernels` says."""

    kernels: Literal["plain", "auto"] = setting(
        "auto: chosen for this machine; the four keys after it win over it", default="plain", on_resume="may_change"
    )
    attn_implementation: Literal[ATTENTION] | None = setting(
        "as in transformers; plain: sdpa", default=None, on_resume="may_change"
    )
    loss_kernel: Literal[LOSS_KERNELS] | None = setting(
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


@dataclass(frozen=True)
class Machine:
    """What the rules look at. logits_bytes: of a micro-batch, in fp32. triton: do its kernels run here. liger: is it installed."""

    gpu: bool
    strategy: str
    encoder: bool
    logits_bytes: int
    model_type: str = "llama"
    triton: bool = False
    liger: bool = True
    c_compiler: bool = True

    @classmethod
    def here(cls, settings, config, strategy, batch_size):
        """Of this process. config: the model's. batch_size: sequences of a micro-batch."""
        import torch

        labels = batch_size * settings.max_length * settings.labelled_fraction
        return cls(
            gpu=torch.cuda.is_available(),
            strategy=strategy,
            encoder=settings.encoder,
            logits_bytes=int(4 * labels * config.vocab_size),
            model_type=config.model_type,
            triton=triton_runs(),
            liger=importlib.util.find_spec("liger_kernel") is not None,
            c_compiler=bool(shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")),
        )


# -- before torch is loaded -------------------------------------------------------------------------------------------


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
    if s.compile_unit == "model" and (why := _no_single_graph(s, strategy)):
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


def _no_single_graph(settings, strategy):
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


# -- the choice -------------------------------------------------------------------------------------------------------


def choose(settings, machine, kept=None):
    """({key: value} of PLAIN's keys, {key: why} of those that were chosen). kept: what a checkpoint says was chosen before, or None.

    Raises InputError where the recipe wants what this machine has not.
    """
    given = {key: getattr(settings, key) for key in PLAIN if getattr(settings, key) is not None}
    for key, value in given.items():
        if problem := _impossible(key, value, settings, machine):
            raise InputError(f"{key}: {str(value).lower() if isinstance(value, bool) else value}: {problem}")
    if settings.kernels == "plain":
        return {**PLAIN, **given}, {}
    chosen, why = {}, {}
    for key, rule in RULES.items():
        if key in given:
            chosen[key] = given[key]
            continue
        chosen[key], why[key] = rule(settings, machine, chosen)
        before = (kept or {}).get(key, chosen[key])
        if before == chosen[key]:
            continue
        if problem := _impossible(key, before, settings, machine):
            why[key] += f"; it was {before} before, but {problem}"
        else:
            chosen[key], why[key] = before, "as this run began"
    return chosen, why


def _impossible(key, value, settings, machine):
    """Why `value` cannot be had here, or None."""
    if key == "loss_kernel" and value not in LOSS_KERNELS:  # of a checkpoint
        return "this version has none of that name"
    if key == "loss_kernel" and value != "logits" and machine.model_type not in KNOWN_MODELS:
        return f"it is not known for a {machine.model_type}, whose logits may be scaled or capped before the loss"
    if key == "loss_kernel" and value == "liger" and not machine.triton:
        return "there is no GPU here"
    if key == "loss_kernel" and value == "liger" and not machine.liger:
        return "it is not installed here"
    if key == "attn_implementation" and value == "flex_attention" and not machine.gpu:
        return "torch has no backward pass of it on a CPU"
    if key == "torch_compile" and value and machine.strategy == "zero3":
        return "ZeRO-3's hooks break the graph"
    if key == "compile_unit" and value == "model" and (why := _no_single_graph(settings, machine.strategy)):
        return f"that does not work {why}"
    if key == "torch_compile" and value and not machine.c_compiler:
        return "there is no C compiler here (cc, gcc or clang), which it needs"
    return None


def _attention(settings, machine, chosen):
    return "sdpa", "torch's own, by its own order of backends"


def _loss(settings, machine, chosen):
    if machine.model_type not in KNOWN_MODELS:
        return "logits", f"what a {machine.model_type} does to them is not known"
    if not machine.gpu:
        large = machine.logits_bytes > CHUNK_BYTES
        return ("chunked", "all logits are more than a chunk") if large else ("logits", "they are small here")
    return ("liger", "fused, and installed") if machine.liger else ("chunked", "liger is not installed")


def _compile(settings, machine, chosen):
    if not machine.gpu:
        return False, "no GPU"
    if machine.model_type not in KNOWN_MODELS:
        return False, f"not tried with a {machine.model_type}"
    if problem := _impossible("torch_compile", True, settings, machine):
        return False, problem
    return True, "fuses what lies between the products"


def _unit(settings, machine, chosen):
    if not chosen["torch_compile"]:
        return "layer", "nothing is compiled"
    if machine.encoder and not _no_single_graph(settings, machine.strategy):
        return "model", "an encoder on whole weights is one graph"
    return "layer", "compiled once for all layers"


RULES = {
    "attn_implementation": _attention,
    "loss_kernel": _loss,
    "torch_compile": _compile,
    "compile_unit": _unit,
}  # in this order: later ones look at earlier ones
assert RULES.keys() == PLAIN.keys() <= {f.name for f in fields(KernelSettings)}


def in_words(chosen, why, settings):
    """[(name, value)] for the table at a run's start."""
    shown = {
        "attn_implementation": f"attention {chosen['attn_implementation']}",
        "loss_kernel": "Liger's layers and loss" if settings.use_liger_kernel else f"loss {chosen['loss_kernel']}",
        "torch_compile": f"compiled by {chosen['compile_unit']}" if chosen["torch_compile"] else "not compiled",
    }
    if share := share_recomputed(settings):
        shown["recomputed"] = f"{share:.0%} of the activations recomputed"
    if settings.fp8:
        shown["fp8"] = "large products in float8"
    rows = [("kernels", ", ".join(shown.values()))]
    return rows + [("", f"{shown[key]}: {why[key]}") for key in shown if key in why]
