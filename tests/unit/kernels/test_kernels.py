"""What `kernels: auto` chooses on which machine, that a resumed run keeps it, and what is refused before anything is loaded."""

import dataclasses

import pytest
from kernel_settings import settings

from dilqur.common.errors import InputError
from dilqur.kernels.choose import PLAIN, Machine, choose, in_words
from dilqur.kernels.settings import check_kernels

H100 = Machine(gpu=True, triton=True, strategy="fsdp2", encoder=False, logits_bytes=8 << 30)
CPU = Machine(gpu=False, strategy="single", encoder=False, logits_bytes=8 << 20)


def on(machine, **changes):
    return dataclasses.replace(machine, **changes)


@pytest.mark.parametrize(
    ("machine", "keys", "expected"),
    [
        (H100, {}, {"loss_kernel": "liger", "torch_compile": True, "compile_unit": "layer"}),
        (on(H100, liger=False), {}, {"loss_kernel": "chunked"}),
        (on(H100, strategy="zero3"), {}, {"torch_compile": False}),
        (on(H100, c_compiler=False), {}, {"torch_compile": False}),
        (H100, {"intra_document_masking": True}, {"torch_compile": True, "compile_unit": "layer"}),
        (H100, {"torch_compile": False}, {"torch_compile": False, "compile_unit": "layer", "loss_kernel": "liger"}),
        (H100, {"loss_kernel": "logits"}, {"loss_kernel": "logits"}),
        (on(H100, model_type="gemma2"), {}, {"loss_kernel": "logits", "torch_compile": False}),
        (
            on(H100, encoder=True, strategy="ddp"),
            {"gradient_checkpointing": True},
            {"torch_compile": True, "compile_unit": "layer"},
        ),
        (on(H100, encoder=True, strategy="ddp"), {"activation_memory_budget": 0.5}, {"compile_unit": "model"}),
        (on(H100, encoder=True, strategy="ddp"), {}, {"compile_unit": "model", "loss_kernel": "liger"}),
        (on(H100, encoder=True, strategy="zero2"), {}, {"compile_unit": "layer"}),
        (CPU, {}, PLAIN),
        (on(CPU, logits_bytes=2 << 30), {}, {**PLAIN, "loss_kernel": "chunked"}),
    ],
)
def test_what_auto_chooses(machine, keys, expected):
    chosen, why = choose(settings(kernels="auto", **keys), machine)
    assert chosen.keys() == PLAIN.keys()
    assert {key: chosen[key] for key in expected} == expected
    assert why.keys() == PLAIN.keys() - keys.keys(), "a reason for each that was chosen, and for no other"


def test_a_resumed_run_keeps_what_it_began_with_where_that_can_be_had():
    auto = settings(kernels="auto")
    kept, _ = choose(auto, on(H100, liger=False))
    chosen, why = choose(auto, H100, kept)  # Liger has been installed meanwhile
    assert chosen == kept and why["loss_kernel"] == "as this run began"
    kept, _ = choose(auto, H100)
    on_cpu, why = choose(auto, CPU, kept)
    assert on_cpu["loss_kernel"] == "logits"
    assert why["loss_kernel"] == "they are small here; it was liger before, but there is no GPU here"
    chosen, why = choose(auto, H100, {**kept, "loss_kernel": "quack"})  # of an earlier version
    assert chosen["loss_kernel"] == "liger" and "quack before, but this version has none" in why["loss_kernel"]
    encoder = on(H100, encoder=True, strategy="ddp")
    kept_whole, _ = choose(auto, encoder)
    assert kept_whole["compile_unit"] == "model"
    chosen, why = choose(auto, on(encoder, strategy="fsdp2"), kept_whole)  # under another strategy
    assert (
        chosen["compile_unit"] == "layer"
        and "it was model before, but that does not work under fsdp2" in why["compile_unit"]
    )
    chosen, why = choose(auto, on(encoder, strategy="zero3"), kept_whole)
    assert chosen["torch_compile"] is False and "its hooks break the graph" in why["torch_compile"]
    assert choose(settings(kernels="auto", loss_kernel="chunked"), H100, kept)[0]["loss_kernel"] == "chunked"
    assert choose(settings(), H100, kept) == (PLAIN, {}), "plain is plain"


def test_the_table_at_a_runs_start_says_what_and_why():
    run = settings(kernels="auto", gradient_checkpointing=True, loss_kernel="chunked")
    first, *reasons = in_words(*choose(run, H100), run)
    assert first == ("kernels", "attention sdpa, loss chunked, compiled by layer, 100% of the activations recomputed")
    assert ("", "compiled by layer: fuses pointwise operations") in reasons
    assert not any("chunked" in text for _, text in reasons), "what the recipe says needs no reason"
    assert in_words(PLAIN, {}, settings()) == [("kernels", "attention sdpa, loss logits, not compiled")]


@pytest.mark.parametrize(
    ("keys", "strategy", "says"),
    [
        ({"use_liger_kernel": True, "kernels": "auto"}, "ddp", "use_liger_kernel has a loss and layers of its own"),
        (
            {"use_liger_kernel": True, "loss_kernel": "chunked"},
            "ddp",
            "use_liger_kernel has a loss and layers of its own",
        ),
        ({"use_liger_kernel": True, "torch_compile": True}, "ddp", "use_liger_kernel does not go with torch_compile"),
        ({"use_liger_kernel": True, "encoder": True}, "ddp", "use_liger_kernel: Liger has no layers for a NeoBERT"),
        ({"compile_unit": "model"}, "ddp", "compile_unit: nothing is compiled without torch_compile: true"),
        ({"compile_unit": "model", "torch_compile": True}, "fsdp2", "compile_unit: model does not work under fsdp2"),
        (
            {"compile_unit": "model", "torch_compile": True, "gradient_checkpointing": True},
            "ddp",
            "compile_unit: model does not work with gradient_checkpointing, which would cut the graph",
        ),
        (
            {"gradient_checkpointing": True, "activation_memory_budget": 0.5},
            "ddp",
            "gradient_checkpointing is activation_memory",
        ),
        ({"fp8": True}, "ddp", "fp8: the layers that it leaves are to compute in bfloat16"),
        ({"fp8": True, "bf16": True}, "zero2", "fp8 does not work under zero2"),
    ],
)
def test_what_does_not_go_together_is_refused_without_torch(keys, strategy, says):
    with pytest.raises(InputError) as problem:
        check_kernels(settings(**keys), strategy)
    assert str(problem.value).startswith(says)


@pytest.mark.parametrize(
    ("keys", "machine", "says"),
    [
        (
            {"loss_kernel": "chunked"},
            on(CPU, model_type="gemma2"),
            "loss_kernel: chunked: it is not known for a gemma2",
        ),
        ({"loss_kernel": "liger"}, CPU, "loss_kernel: liger: there is no GPU here"),
        (
            {"attn_implementation": "flex_attention"},
            CPU,
            "attn_implementation: flex_attention: torch has no backward pass",
        ),
        ({"loss_kernel": "liger"}, on(H100, liger=False), "loss_kernel: liger: it is not installed here"),
        ({"torch_compile": True}, on(H100, c_compiler=False), "torch_compile: true: there is no C compiler here"),
    ],
)
def test_what_a_recipe_names_and_this_machine_has_not_is_one_line(keys, machine, says):
    with pytest.raises(InputError) as problem:
        choose(settings(**keys), machine)
    assert str(problem.value).startswith(says)
