"""An encoder as a Hugging Face folder that needs no code of ours: a NeoBERT as EuroBertForMaskedLM, the same function; and back. Or with
the published NeoBERT's names and config keys, for which transformers has no class: it wants that model's own code beside it.

q, k     rows from adjacent pairs (x₀, x₁), (x₂, x₃) to halves (x₀, x₂, …, x₁, x₃, …), which rotate_half turns alike
qkv      split into q_proj, k_proj and v_proj; w12 into gate_proj and up_proj
biases   EuroBERT's mlp_bias gives the head one, and the feed-forward layers too: theirs are zero
"""

import torch
from transformers import EuroBertConfig

from dilqur.common.errors import InputError
from dilqur.models.config import read_encoder_config
from dilqur.models.modeling_neobert import NeoBERTConfig, NeoBERTLMHead
from dilqur.models.safetensors_io import read_tensor, stored_tensors, write_shards
from dilqur.tokenizer.encoder_tokens import MASK, PAD
from dilqur.tokenizer.files import copy_tokenizer
from dilqur.tokenizer.text_tokenizer import TextTokenizer

OUTER = {
    "model.encoder.weight": "model.embed_tokens.weight",
    "model.layer_norm.weight": "model.norm.weight",
    "decoder.weight": "lm_head.weight",
    "decoder.bias": "lm_head.bias",
}
NORMS = {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_OWN_KEYS = [key for key in NeoBERTConfig.__annotations__ if key != "model_type"]


def write_encoder(folder, weights, config, tokenizer, layout="eurobert"):
    """Write a NeoBERT into the empty `folder`. weights: {name: tensor} of NeoBERTLMHead; tokenizer: its folder; layout: one of
    encoder_config.LAYOUTS."""
    if layout == "eurobert":
        control = TextTokenizer(tokenizer)
        ids = {"bos_token_id": control.bos_id, "eos_token_id": control.eos_id}
        stored = eurobert_weights(weights, config)
        described = eurobert_config(config, **ids, mask_token_id=control.control_id(MASK))
    else:
        stored = weights
        described = NeoBERTConfig(**{key: getattr(config, key) for key in _OWN_KEYS}, architectures=["NeoBERTLMHead"])
    write_shards(folder, {name: (w.dtype, tuple(w.shape), lambda w=w: w) for name, w in stored.items()})
    described.dtype = next(iter(weights.values())).dtype
    described.save_pretrained(folder)
    copy_tokenizer(tokenizer, folder)


def read_encoder(folder, dtype=torch.float32, **changes):
    """NeoBERTLMHead of a folder: a EuroBERT that `write_encoder` wrote, or a NeoBERT as published. changes: of its config.

    Raises InputError where a weight is missing, one is there that a NeoBERT has no place for, or a shape is another.
    """
    stored, config = stored_tensors(folder), neobert_config(folder)
    weights = {name: read_tensor(where, name).to(dtype) for name, where in stored.items()}
    if "model.embed_tokens.weight" in weights:
        try:
            weights = neobert_weights(weights, config)
        except (KeyError, ValueError, RuntimeError) as problem:
            what = f"{problem.args[0]} is missing" if isinstance(problem, KeyError) else problem
            raise InputError(f"{folder}: no EuroBERT that a NeoBERT could be: {what}") from None
    for key, value in changes.items():
        setattr(config, key, value)
    with torch.device("meta"):
        model = NeoBERTLMHead(config).to(dtype)
    refuse_other_shapes(folder, {name: tuple(w.shape) for name, w in weights.items()}, model)
    model.load_state_dict(weights, assign=True)
    return model


def refuse_other_shapes(source, shapes, model):
    """InputError unless `shapes`, {name: shape}, are those of a NeoBERTLMHead, all of them."""
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    for name in sorted({*expected, *shapes}):
        if name not in shapes:
            raise InputError(f"{source}: {name} is missing: not the whole of a NeoBERT with its decoder")
        if name not in expected:
            raise InputError(f"{source}: {name}: a NeoBERT of its config has no such weight")
        if tuple(shapes[name]) != expected[name]:
            raise InputError(f"{source}: {name} is {list(shapes[name])}, its config says {list(expected[name])}")


def new_config(model_config, tokenizer, **more):
    """NeoBERTConfig of a model that begins with random weights, for the tokenizer of a folder. model_config: its keys."""
    pad = TextTokenizer(tokenizer).backend.token_to_id(PAD)
    return NeoBERTConfig(**model_config, pad_token_id=pad, **more)


def neobert_config(folder):
    """NeoBERTConfig of a folder's config.json, NeoBERT's or EuroBERT's. Raises InputError for another model's."""
    config = read_encoder_config(folder)
    if config["model_type"] == "neobert":
        return NeoBERTConfig(**{key: config[key] for key in _OWN_KEYS if key in config})
    if config.get("num_key_value_heads") not in (None, config["num_attention_heads"]):
        raise InputError(f"{folder}: a EuroBERT with fewer key than query heads is no NeoBERT")
    rope = config.get("rope_parameters") or config
    return NeoBERTConfig(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"] * 3 // 2,
        num_hidden_layers=config["num_hidden_layers"],
        num_attention_heads=config["num_attention_heads"],
        norm_eps=config["rms_norm_eps"],
        rope_theta=rope["rope_theta"],
        max_length=config["max_position_embeddings"],
        pad_token_id=config["pad_token_id"],
    )


def eurobert_config(config, **tokens):
    """EuroBertConfig of a NeoBERTConfig. tokens: ids of special tokens, as bos_token_id, eos_token_id, mask_token_id."""
    return EuroBertConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.ffn_width,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_attention_heads,
        hidden_act="silu",
        max_position_embeddings=config.max_length,
        rms_norm_eps=config.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        attention_bias=False,
        mlp_bias=True,
        tie_word_embeddings=False,
        pad_token_id=config.pad_token_id,
        architectures=["EuroBertForMaskedLM"],
        **{"bos_token_id": None, "eos_token_id": None, "mask_token_id": None, **tokens},
    )


def eurobert_weights(weights, config):
    """{name: tensor} of EuroBertForMaskedLM from those of NeoBERTLMHead, in their dtypes."""
    out = {theirs: weights[ours] for ours, theirs in OUTER.items()}
    heads, hidden, width = config.num_attention_heads, config.hidden_size, config.ffn_width
    for layer in range(config.num_hidden_layers):
        ours, theirs = f"model.transformer_encoder.{layer}.", f"model.layers.{layer}."
        q, k, v = weights[f"{ours}qkv.weight"].view(heads, 3, hidden // heads, hidden).unbind(1)
        attention = {"q": _halves(q), "k": _halves(k), "v": v}
        out |= {f"{theirs}self_attn.{x}_proj.weight": w.reshape(hidden, hidden) for x, w in attention.items()}
        out[f"{theirs}self_attn.o_proj.weight"] = weights[f"{ours}wo.weight"]
        gate, up = weights[f"{ours}ffn.w12.weight"].split(width)
        products = {"gate": gate, "up": up, "down": weights[f"{ours}ffn.w3.weight"]}
        for name, weight in products.items():
            out[f"{theirs}mlp.{name}_proj.weight"] = weight.contiguous()
            out[f"{theirs}mlp.{name}_proj.bias"] = weight.new_zeros(weight.shape[0])
        out |= {f"{theirs}{b}.weight": weights[f"{ours}{a}.weight"] for a, b in NORMS.items()}
    return out


def neobert_weights(weights, config):
    """The way back: {name: tensor} of NeoBERTLMHead from those of EuroBertForMaskedLM. Raises ValueError where a bias of theirs
    that a NeoBERT has no place for is not zero."""
    out = {ours: weights[theirs] for ours, theirs in OUTER.items()}
    heads, hidden = config.num_attention_heads, config.hidden_size
    for layer in range(config.num_hidden_layers):
        ours, theirs = f"model.transformer_encoder.{layer}.", f"model.layers.{layer}."
        q, k, v = (weights[f"{theirs}self_attn.{x}_proj.weight"].view(heads, hidden // heads, hidden) for x in "qkv")
        out[f"{ours}qkv.weight"] = torch.stack((_pairs(q), _pairs(k), v), 1).reshape(3 * hidden, hidden)
        out[f"{ours}wo.weight"] = weights[f"{theirs}self_attn.o_proj.weight"]
        gate, up, down = (weights[f"{theirs}mlp.{x}_proj.weight"] for x in ("gate", "up", "down"))
        out[f"{ours}ffn.w12.weight"], out[f"{ours}ffn.w3.weight"] = torch.cat((gate, up)), down
        for x in ("gate", "up", "down"):
            if weights[f"{theirs}mlp.{x}_proj.bias"].any():
                raise ValueError(f"{theirs}mlp.{x}_proj.bias: not zero: this is no NeoBERT")
        out |= {f"{ours}{a}.weight": weights[f"{theirs}{b}.weight"] for a, b in NORMS.items()}
    return out


def _halves(rows):
    """(heads, head_dim, hidden): rows 0, 2, 4, …, then 1, 3, 5, … of each head."""
    return torch.cat((rows[:, 0::2], rows[:, 1::2]), dim=1)


def _pairs(rows):
    """What `_halves` undid."""
    first, second = rows.chunk(2, dim=1)
    return torch.stack((first, second), dim=2).flatten(1, 2)
