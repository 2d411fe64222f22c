"""Which kernels compute a step: what a recipe can say of them, and what `kernels: auto` chooses. dilqur/kernels/apply.py does it.

    key                   plain     auto on a GPU                                        auto on a CPU
    attn_implementation   sdpa      sdpa                                                 sdpa
    loss_kernel           logits    liger where it is installed, else chunked            chunked, where the logits are more than a chunk
    torch_compile         false     true, if there is a C compiler; not under ZeRO-3     false
    compile_unit          layer     model, for an encoder on whole weights; else layer   layer

A key that the recipe gives wins over both columns, so that each choice can be turned off by itself. What was chosen is printed with its
reason and kept in the checkpoints: a run that goes on computes as it began, where that can be had. Kernels are chosen by rules, not by
autotuning, so that two runs of one recipe on one kind of machine are the same run.
`scripts/benchmark.py` measures the choices against each other; docs/kernels.md says which rules rest on which measurement.
"""

import importlib.util
import os
import shutil
from dataclasses import dataclass, fields
from typing import get_args

from dilqur.common.errors import InputError
from dilqur.kernels.settings import KernelSettings, LossKernel, share_recomputed, triton_runs
from dilqur.kernels.settings import no_single_graph as no_single_graph
from dilqur.pipeline.strategy import CANNOT

PLAIN = {"attn_implementation": "sdpa", "loss_kernel": "logits", "torch_compile": False, "compile_unit": "layer"}
# models whose loss is the cross-entropy of what the head gives, which others scale or cap first, and whose layers are one graph
KNOWN_MODELS = ("llama", "mistral", "qwen2", "qwen3", "neobert")
# of fp32 logits that the chunked loss has at a time: large products, and little beside the activations
CHUNK_BYTES = 512 << 20


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
    strategies, why, _ = CANNOT.get((key, value), ((), None, None))
    if machine.strategy in strategies:
        return f"it does not work under {machine.strategy}: {why}"
    if key == "compile_unit" and value == "model" and (why := no_single_graph(settings, machine.strategy)):
        return f"that does not work {why}"
    for what, values, there, why in NEEDS:
        if key == what and value in values and not there(machine):
            return why.format(model_type=machine.model_type)
    if key == "loss_kernel" and value not in get_args(LossKernel):  # of a checkpoint
        return "this version has none of that name"
    return None


NEEDS = (  # key, values, what a Machine must have for them, why they cannot be had without
    ("loss_kernel", ("chunked", "liger"), lambda here: here.model_type in KNOWN_MODELS,
     "it is not known for a {model_type}, whose logits may be scaled or capped before the loss"),
    ("loss_kernel", ("liger",), lambda here: here.triton, "there is no GPU here"),
    ("loss_kernel", ("liger",), lambda here: here.liger, "it is not installed here"),
    ("attn_implementation", ("flex_attention",), lambda here: here.gpu, "torch has no backward pass of it on a CPU"),
    ("torch_compile", (True,), lambda here: here.c_compiler, "there is no C compiler here (cc, gcc or clang), which it needs"),
)  # fmt: skip


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
    return True, "fuses pointwise operations"


def _unit(settings, machine, chosen):
    if not chosen["torch_compile"]:
        return "layer", "nothing is compiled"
    if machine.encoder and not no_single_graph(settings, machine.strategy):
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
