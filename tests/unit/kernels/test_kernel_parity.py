"""Every choice of kernels that runs on a CPU gives the loss and the gradients of plain eager fp32; those of a GPU do where there is one."""

import dataclasses
import functools
import sys
from pathlib import Path

import pytest
import torch
from kernel_settings import CAPTURED, LENGTH, settings
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from dilqur.common.constants import IGNORE_INDEX
from dilqur.common.errors import InputError
from dilqur.kernels import apply as apply_kernels
from dilqur.kernels import fused_cross_entropy as fused_loss
from dilqur.kernels.apply import to_float8
from dilqur.kernels.choose import KNOWN_MODELS, PLAIN, Machine, choose
from dilqur.models.modeling_neobert import NeoBERTConfig, NeoBERTLMHead

VOCABULARY = 1280
CPU = Machine(gpu=False, strategy="single", encoder=False, logits_bytes=0)
ROUNDING = 2e-6  # relative to a gradient's norm: fp32 sums in another order
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def new(kind, **config):
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    if kind == "neobert":
        model = NeoBERTLMHead(NeoBERTConfig(**{**sizes, "intermediate_size": 192, **config}))
        torch.nn.init.normal_(model.decoder.bias, std=0.1)
        return model.train()
    sizes |= {"num_key_value_heads": 2, "intermediate_size": 128, "tie_word_embeddings": kind == "tied llama"}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **config})).train()


def loss_of(model, device="cpu"):
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCABULARY, (3, LENGTH), generator=draw)
    labels = ids.roll(-1, 1)
    labels[torch.rand(ids.shape, generator=draw) < 0.3] = IGNORE_INDEX
    batch = {"input_ids": ids, "labels": labels, "num_items_in_batch": int((labels != IGNORE_INDEX).sum())}
    if isinstance(model, NeoBERTLMHead):
        batch["masked_positions"] = (labels.flatten() != IGNORE_INDEX).nonzero().flatten()
    else:
        batch |= {"shift_labels": labels}
    batch = {name: x.to(device) if torch.is_tensor(x) else x for name, x in batch.items()}
    return model(**batch, **({} if "masked_positions" in batch else {"use_cache": False})).loss


def loss_and_gradients(model, device="cpu"):
    loss = loss_of(model.to(device), device)
    loss.backward()
    return loss.item(), {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(scope="module")
def eager():
    return {kind: loss_and_gradients(new(kind)) for kind in ("llama", "tied llama", "neobert")}


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch):
    """Nothing a choice sets for its process outlives a test; and small chunks, so that there are several."""
    monkeypatch.setattr(fused_loss, "CHUNK_BYTES", 4 * VOCABULARY * 20)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._functorch.config.activation_memory_budget = 1.0


def with_kernels(kind, machine=CPU, **keys):
    model, run = new(kind), settings(**keys)
    chosen, _ = choose(run, dataclasses.replace(machine, encoder=kind == "neobert"))
    apply_kernels.apply_kernels(model, run, chosen)
    return model


def assert_same(found, expected, within=ROUNDING):
    assert found[0] == pytest.approx(expected[0], rel=within)
    assert found[1].keys() == expected[1].keys()
    off = {name: ((found[1][name] - g).norm() / g.norm()).item() for name, g in expected[1].items()}
    assert max(off.values()) < within, off


CHOICES = [
    {"loss_kernel": "chunked"},
    {"attn_implementation": "eager"},
    {"gradient_checkpointing": True},
    {"activation_memory_budget": 0.5},
]


@pytest.mark.parametrize("keys", CHOICES, ids=lambda keys: "-".join(map(str, *keys.items())))
@pytest.mark.parametrize("kind", ["llama", "tied llama", "neobert"])
def test_uncompiled(eager, kind, keys):
    assert_same(loss_and_gradients(with_kernels(kind, **keys)), eager[kind])


@pytest.mark.parametrize(
    ("kind", "keys", "backend"),
    [
        ("tied llama", {"loss_kernel": "chunked"}, "inductor"),
        ("tied llama", {"gradient_checkpointing": True}, CAPTURED),
        ("tied llama", {"activation_memory_budget": 0.5}, CAPTURED),
        ("tied llama", {"compile_unit": "model"}, CAPTURED),
        ("neobert", {}, CAPTURED),
        ("neobert", {"compile_unit": "model", "loss_kernel": "chunked"}, "inductor"),
    ],
    ids=str,
)
def test_compiled_as_one_graph_for_all_layers(eager, monkeypatch, kind, keys, backend):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    model = with_kernels(kind, torch_compile=True, **keys)
    assert list(model.state_dict()) == list(new(kind).state_dict())
    assert_same(loss_and_gradients(model), eager[kind])
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs == 1 + (keys.get("loss_kernel") == "chunked"), "the layers, and what a chunk of the loss does"
    model.eval()
    with torch.no_grad():
        assert loss_of(model).item() == pytest.approx(eager[kind][0], rel=ROUNDING)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs, "an evaluation compiles nothing"


@pytest.mark.parametrize("compiled", [False, True])
def test_a_budget_keeps_less_for_the_backward_pass(compiled, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=CAPTURED))
    kept = {}
    for budget in (None, 0.5):
        model, seen = with_kernels("llama", torch_compile=compiled, activation_memory_budget=budget), {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, seen=seen: (seen.update({x.data_ptr(): x.nbytes}), x)[1], lambda x: x
        ):
            loss_of(model).backward()
        own = {p.data_ptr() for p in model.parameters()}
        kept[budget] = sum(size for where, size in seen.items() if where not in own)
        torch._dynamo.reset()
    assert kept[0.5] < 0.95 * kept[None]


@pytest.mark.parametrize("kind", ["mistral", "qwen2", "qwen3"])
def test_of_other_models_the_chunked_loss_is_their_own_and_their_layers_one_graph(monkeypatch, kind):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=CAPTURED))
    assert kind in KNOWN_MODELS
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    config = AutoConfig.for_model(kind, **sizes, num_key_value_heads=2, head_dim=16)
    found = {}
    for loss in ("logits", "chunked"):
        torch.manual_seed(0)
        model, run = (
            AutoModelForCausalLM.from_config(config).train(),
            settings(loss_kernel=loss, torch_compile=loss == "chunked"),
        )
        apply_kernels.apply_kernels(model, run, choose(run, dataclasses.replace(CPU, model_type=kind))[0])
        found[loss] = loss_and_gradients(model)
    assert_same(found["chunked"], found["logits"])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2, "the layers, and what a chunk of the loss does"


def test_frozen_layers_get_no_gradients_and_the_embeddings_theirs(eager):
    for keys in ({}, {"loss_kernel": "chunked"}):
        model = with_kernels("tied llama", **keys)
        for name, p in model.named_parameters():
            p.requires_grad_("embed" in name)
        loss, gradients = loss_and_gradients(model)
        assert_same(
            (loss, gradients), (eager["tied llama"][0], {name: eager["tied llama"][1][name] for name in gradients})
        )
        assert list(gradients) == ["model.embed_tokens.weight"]


@pytest.mark.parametrize("kind", ["tied llama", "neobert"])
def test_with_bfloat16_products_the_chunked_loss_is_no_further_from_fp32_than_all_logits_are(eager, kind):
    off = {}
    for loss in ("logits", "chunked"):
        with torch.autocast("cpu", torch.bfloat16):
            found = loss_and_gradients(with_kernels(kind, loss_kernel=loss))
        assert found[0] == pytest.approx(eager[kind][0], rel=1e-4)
        off[loss] = max(((found[1][name] - g).norm() / g.norm()).item() for name, g in eager[kind][1].items())
    assert off["chunked"] < 1.1 * off["logits"] < 0.05


def test_the_chunked_loss_never_has_all_logits(monkeypatch):
    """By the largest tensor made on the way: rows of a chunk × vocabulary, or the weight's gradient."""
    largest = 0

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, kinds, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for x in torch.utils._pytree.tree_leaves(out):
                largest = max(largest, x.numel()) if torch.is_tensor(x) else largest
            return out

    model = with_kernels("llama", loss_kernel="chunked")
    with Sizes():
        loss_of(model).backward()
    assert largest == VOCABULARY * 64 > VOCABULARY * 20 and 3 * LENGTH > 64, "all logits would be larger"


def test_fused_adamw_makes_the_same_steps():
    from dilqur.training.optimizer import make_optimizer

    weights = {}
    for optim in ("adamw_torch", "adamw_torch_fused"):
        model, more = new("tied llama"), {"learning_rate": 1e-3, "weight_decay": 0.1, "adam_epsilon": 1e-8}
        run = settings(optim=optim, adam_beta1=0.9, adam_beta2=0.95, **more)
        optimizer = make_optimizer(model, run, on_gpu=False)
        assert optimizer.defaults["fused"] is (optim == "adamw_torch_fused")
        for _ in range(5):
            loss_of(model).backward()
            optimizer.step()
            optimizer.zero_grad()
        weights[optim] = dict(model.named_parameters())
    for name, plain in weights["adamw_torch"].items():
        assert torch.allclose(weights["adamw_torch_fused"][name], plain, rtol=1e-5, atol=1e-7), name


def test_float8_changes_large_layers_alone_and_stays_near(monkeypatch):
    monkeypatch.syspath_prepend(Path(sys.prefix) / "beside")
    pytest.importorskip("torchao", reason="torchao is not installed: `make test` puts it into .venv/beside")
    large = {
        "hidden_size": 1024,
        "intermediate_size": 1024,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "num_hidden_layers": 1,
    }
    plain, model = new("tied llama", **large), new("tied llama", **large)
    to_float8(model, emulate=True)
    changed = {name for name, m in model.named_modules() if type(m).__name__ == "Float8Linear"}
    assert {name.rpartition(".")[2] for name in changed} == {"q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert list(model.state_dict()) == list(plain.state_dict())
    expected, found = loss_and_gradients(plain), loss_and_gradients(model)
    assert found[0] == pytest.approx(expected[0], rel=1e-2) and found[0] != expected[0]
    name = "model.layers.0.mlp.down_proj.weight"
    a, b = expected[1][name].flatten(), found[1][name].flatten()
    assert torch.cosine_similarity(a, b, dim=0) > 0.99
    with pytest.raises(InputError, match="no linear layer of this model has 1024 rows and columns"):
        to_float8(new("llama"), emulate=True)


# -- where a GPU is ---------------------------------------------------------------------------------------------------

GPU_CHOICES = [
    {"loss_kernel": "liger"},
    {"torch_compile": True},
    {"torch_compile": True, "loss_kernel": "liger"},
    {"torch_compile": True, "loss_kernel": "chunked"},
    {"torch_compile": True, "activation_memory_budget": 0.5},
    {"use_liger_kernel": True},
    {"kernels": "auto"},
]


@needs_gpu
@pytest.mark.parametrize("keys", GPU_CHOICES, ids=str)
@pytest.mark.parametrize("kind", ["tied llama", "neobert"])
def test_on_a_gpu_in_bfloat16(eager, kind, keys):
    """No further from fp32 on a CPU than plain bfloat16 on the GPU is, but for a tenth."""
    if kind == "neobert" and keys.get("use_liger_kernel"):
        pytest.skip("Liger patches no NeoBERT")
    keys = {"bf16": True, **keys}
    gpu = Machine.here(settings(**keys), new(kind).config, "single", 3)
    off = {}
    for name, more in (("plain", {"bf16": True}), ("this", keys)):
        try:
            model = with_kernels(kind, gpu, **more)
        except InputError as problem:
            pytest.skip(str(problem))
        with torch.autocast("cuda", torch.bfloat16):
            found = loss_and_gradients(model, "cuda")
        assert found[0] == pytest.approx(eager[kind][0], rel=1e-3)
        off[name] = max(((found[1][n] - g).norm() / g.norm()).item() for n, g in eager[kind][1].items())
    assert off["this"] < 1.1 * off["plain"] + 1e-3, off


def test_plain_is_what_the_defaults_say():
    assert choose(settings(), CPU) == (PLAIN, {})
