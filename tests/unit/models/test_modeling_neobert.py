"""The encoder is the function that was published, whatever computes it, and transformers' EuroBERT is the same one."""

import math

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForMaskedLM, EuroBertForMaskedLM

from dilqur.data.varlen import document_kwargs
from dilqur.estimate.cost_model import parameter_sizes
from dilqur.kernels.varlen_attention import attention_for, register_document_attention
from dilqur.models.config import NEOBERT_KEYS
from dilqur.models.modeling_neobert import NeoBERTConfig, NeoBERTLMHead
from dilqur.models.neobert_folder import eurobert_config, eurobert_weights, neobert_weights

LENGTH, VOCABULARY = 48, 300
SMALL = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 100}
TOLERANCE = 1e-5  # of logits, in fp32


def new(attn_implementation="sdpa", scale=5.0, **config):
    """A model whose weights are large enough for attention and gates to do something."""
    torch.manual_seed(0)
    register_document_attention()
    config = NeoBERTConfig(**{**SMALL, "vocab_size": VOCABULARY, "attn_implementation": attn_implementation, **config})
    model = NeoBERTLMHead(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(1 if "norm" in name else scale)
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return new()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(5, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(1))


def published(weights, ids, config):
    """Logits of one sequence, (length, vocabulary), written from the paper's reference code: complex RoPE, one head at a time."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    heads, size = config.num_attention_heads, config.hidden_size // config.num_attention_heads

    def norm(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    frequencies = 10_000.0 ** (-torch.arange(0, size, 2).double() / size)
    turns = torch.polar(torch.ones(()).double(), torch.outer(torch.arange(len(ids)).double(), frequencies))

    def rope(x):
        return torch.view_as_real(torch.view_as_complex(x.reshape(len(x), -1, 2)) * turns).flatten(1)

    x = w["model.encoder.weight"][ids]
    for layer in range(config.num_hidden_layers):
        name = f"model.transformer_encoder.{layer}."
        qkv = norm(x, w[name + "attention_norm.weight"]) @ w[name + "qkv.weight"].T
        out = []
        for head in range(heads):
            q, k, v = qkv[:, head * 3 * size : (head + 1) * 3 * size].split(size, dim=1)
            out.append(torch.softmax(rope(q) @ rope(k).T / math.sqrt(size), dim=-1) @ v)
        x = x + torch.cat(out, 1) @ w[name + "wo.weight"].T
        a, b = (norm(x, w[name + "ffn_norm.weight"]) @ w[name + "ffn.w12.weight"].T).chunk(2, dim=1)
        x = x + (F.silu(a) * b) @ w[name + "ffn.w3.weight"].T
    return norm(x, w["model.layer_norm.weight"]) @ w["decoder.weight"].T + w["decoder.bias"]


@torch.no_grad()
def test_it_is_the_published_function(model, ids):
    logits = model(ids).logits
    expected = torch.stack([published(model.state_dict(), row, model.config) for row in ids])
    assert (logits - expected).abs().max() < TOLERANCE
    assert expected.std() > 0.3, "logits so small would agree by accident"


@torch.no_grad()
@pytest.mark.parametrize("attn_implementation", ["eager", "flex_attention"])
def test_attention_implementations_agree(model, ids, attn_implementation):
    other = new(attn_implementation)
    mask = torch.ones_like(ids)
    mask[1, 30:] = 0
    keep = mask.bool()
    for given in (None, mask):
        difference = (other(ids, given).logits - model(ids, given).logits)[keep].abs().max()
        assert difference < TOLERANCE


@torch.no_grad()
def test_padding_changes_nothing_for_the_rest(model, ids):
    mask = torch.ones_like(ids)
    mask[:, 30:] = 0
    padded = ids.masked_fill(mask == 0, 0)
    assert (model(padded, mask).logits[:, :30] - model(ids[:, :30]).logits).abs().max() < TOLERANCE


@torch.no_grad()
def test_packed_documents_are_each_document_alone_and_see_nothing_of_each_other(model, ids):
    packed = new(attention_for("sdpa", True))
    positions = torch.cat([torch.arange(n) for n in (20, 28, 1, 47)]).view(2, LENGTH)
    logits = packed(ids, **document_kwargs(positions)).logits.flatten(0, 1)
    at = 0
    for length in (20, 28, 1, 47):
        alone = model(ids.view(1, -1)[:, at : at + length]).logits[0]
        assert (logits[at : at + length] - alone).abs().max() < TOLERANCE
        at += length
    other = ids.clone()
    other[0, :20] = 7
    again = packed(other, **document_kwargs(positions)).logits.flatten(0, 1)
    assert torch.equal(again[20:], logits[20:]), "not one bit of the others moves"


# -- transformers' own ------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_exported_it_is_a_plain_eurobert_with_the_same_logits(model, ids, tmp_path):
    theirs = EuroBertForMaskedLM(eurobert_config(model.config, mask_token_id=4))
    theirs.load_state_dict(eurobert_weights(model.state_dict(), model.config))
    theirs.save_pretrained(tmp_path)
    theirs = AutoModelForMaskedLM.from_pretrained(tmp_path).eval()
    assert type(theirs) is EuroBertForMaskedLM
    mask = torch.ones_like(ids)
    mask[1, 30:] = 0
    for given in (None, mask):
        difference = (theirs(ids, attention_mask=given).logits - model(ids, given).logits)[mask.bool()]
        assert difference.abs().max() < TOLERANCE


def test_the_way_back_gives_every_bit(model):
    weights = model.state_dict()
    back = neobert_weights(eurobert_weights(weights, model.config), model.config)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weights[name]) for name in weights)


def test_a_eurobert_that_is_no_neobert_is_refused(model):
    theirs = eurobert_weights(model.state_dict(), model.config)
    theirs["model.layers.1.mlp.up_proj.bias"][3] = 0.5
    with pytest.raises(ValueError, match=r"^model\.layers\.1\.mlp\.up_proj\.bias: not zero"):
        neobert_weights(theirs, model.config)


# -- names, sizes, beginning ------------------------------------------------------------------------------------------


@torch.no_grad()
def test_saved_and_loaded_it_is_the_same(model, ids, tmp_path):
    model.save_pretrained(tmp_path)
    again = NeoBERTLMHead.from_pretrained(tmp_path).eval()
    assert again.config.to_diff_dict() == model.config.to_diff_dict()
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_weights_are_named_as_the_published_ones_are(model):
    layer = "model.transformer_encoder.0."
    parts = ("qkv", "wo", "ffn.w12", "ffn.w3", "attention_norm", "ffn_norm")
    assert {name for name, _ in model.named_parameters() if "transformer_encoder" not in name or layer in name} == {
        "model.encoder.weight",
        "model.layer_norm.weight",
        "decoder.weight",
        "decoder.bias",
        *(f"{layer}{part}.weight" for part in parts),
    }
    assert model.state_dict().keys() == dict(model.named_parameters()).keys(), "no buffers"


@pytest.mark.parametrize(
    ("intermediate_size", "width", "total"), [(3072, 2048, 296_592_640), (4608, 3072, 362_652_928)]
)
def test_the_published_shape_has_more_parameters_than_were_quoted_in_either_reading(intermediate_size, width, total):
    config = NeoBERTConfig(vocab_size=64_000, intermediate_size=intermediate_size)
    assert config.ffn_width == width
    with torch.device("meta"):
        sizes = {name: p.numel() for name, p in NeoBERTLMHead(config).named_parameters()}
    assert sum(sizes.values()) == total
    assert parameter_sizes(config.to_dict()) == sizes
    assert sum(parameter_sizes(eurobert_config(config, mask_token_id=3).to_dict()).values()) == total, (
        "as preflight counts a second phase"
    )


def test_the_keys_that_are_checked_without_torch_are_the_configs_own():
    config = NeoBERTConfig().to_dict()
    assert {key: config[key] for key in NEOBERT_KEYS} == NEOBERT_KEYS


def test_it_begins_as_published_and_so_knows_nothing(ids):
    model = new(scale=1.0)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert (parameter == 1).all()
        elif not name.endswith("bias"):
            assert 0.019 < parameter.abs().max() <= 0.02 and abs(parameter.std() * math.sqrt(3) - 0.02) < 1e-3
    loss = model(ids, labels=ids).loss.item()
    assert loss == pytest.approx(math.log(VOCABULARY), rel=0.02)


def test_at_the_published_shape_it_begins_knowing_nothing():
    """28 × 768 with 64,000 tokens: 2 % of ln(64,000) = 11.07, in training's own loss, forward alone."""
    torch.manual_seed(0)
    model = NeoBERTLMHead(NeoBERTConfig(vocab_size=64_000))
    ids = torch.randint(5, 64_000, (2, 64))
    labels = torch.where(torch.rand(ids.shape) < 0.2, ids, -100)
    where = labels.flatten().ne(-100).nonzero().flatten()
    with torch.inference_mode():
        loss = model(ids.where(labels == -100, 4), labels=labels, masked_positions=where).loss.item()
    assert loss == pytest.approx(math.log(64_000), rel=0.02)


# -- loss -------------------------------------------------------------------------------------------------------------


def test_the_head_on_masked_positions_alone_has_the_loss_and_gradients_of_the_full_one(ids):
    model = new()
    labels = torch.where(torch.rand(ids.shape, generator=torch.Generator().manual_seed(2)) < 0.2, ids, -100)
    where = labels.flatten().ne(-100).nonzero().flatten()
    found = []
    for positions in (None, where):
        model.zero_grad()
        loss = model(ids, labels=labels, masked_positions=positions, num_items_in_batch=17).loss
        loss.backward()
        found.append((loss.item(), [p.grad.clone() for p in model.parameters()]))
    (full, gradients), (few, others) = found
    assert few == pytest.approx(full, rel=1e-6)
    for a, b in zip(gradients, others, strict=True):
        assert (a - b).norm() <= 1e-6 * a.norm()
    mean = model(ids, labels=labels).loss.item()
    assert mean * len(where) / 17 == pytest.approx(full, rel=1e-6)


def test_it_compiles_as_one_graph(ids):
    model = new(num_hidden_layers=1)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(compiled(ids).logits, model(ids).logits)
