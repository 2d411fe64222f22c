"""What a Llama or a NeoBERT of a given config has in parameters, and what training it costs: memory, floating-point operations."""


class UnknownArchitecture(Exception):
    """The sizes of a model of this `model_type` are not known here."""


def parameter_sizes(config):
    """{name: elements} of a model of this config, a dict: a Llama, or a NeoBERT, as which a EuroBERT is trained. Raises UnknownArchitecture
    for others, KeyError for what config lacks."""
    kind = config.get("model_type", "llama")
    if kind in ("neobert", "eurobert"):
        return _neobert_sizes(config, neobert_width if kind == "neobert" else int)
    if kind != "llama":
        raise UnknownArchitecture(f"the size of a {kind} is not known here")
    hidden, heads, inner = (config[k] for k in ("hidden_size", "num_attention_heads", "intermediate_size"))
    width = config.get("head_dim") or hidden // heads
    keys = hidden * width * (config.get("num_key_value_heads") or heads)
    sizes = {"model.embed_tokens.weight": config["vocab_size"] * hidden, "model.norm.weight": hidden}
    if not config.get("tie_word_embeddings"):
        sizes["lm_head.weight"] = config["vocab_size"] * hidden
    layer = {"self_attn.q_proj": hidden * heads * width, "self_attn.k_proj": keys, "self_attn.v_proj": keys}
    layer |= {"self_attn.o_proj": hidden * heads * width, "input_layernorm": hidden, "post_attention_layernorm": hidden}
    layer |= {f"mlp.{name}_proj": hidden * inner for name in ("gate", "up", "down")}
    for number in range(config["num_hidden_layers"]):
        sizes |= {f"model.layers.{number}.{name}.weight": size for name, size in layer.items()}
    return sizes


def neobert_width(intermediate_size):
    """Of a feed-forward layer, as the reference code reads the key: two thirds of it, up to a multiple of 8."""
    return -(-int(2 * intermediate_size / 3) // 8) * 8


def _neobert_sizes(config, width_of):
    hidden, vocab, width = config["hidden_size"], config["vocab_size"], width_of(config["intermediate_size"])
    sizes = {"model.encoder.weight": vocab * hidden, "model.layer_norm.weight": hidden}
    sizes |= {"decoder.weight": vocab * hidden, "decoder.bias": vocab}
    layer = {"qkv": 3 * hidden * hidden, "wo": hidden * hidden, "attention_norm": hidden, "ffn_norm": hidden}
    layer |= {"ffn.w12": 2 * hidden * width, "ffn.w3": width * hidden}
    for number in range(config["num_hidden_layers"]):
        sizes |= {f"model.transformer_encoder.{number}.{name}.weight": size for name, size in layer.items()}
    return sizes


def training_flops_per_token(config, max_length, embeddings_only=False):
    """Floating-point operations a token of a training step: forward, and twice that backward, of every matrix product.

    6 · (parameters of the layers' matrices + of the head) + 6 · layers · hidden · max_length for the attention's two products, half of
    which a causal mask saves (PaLM, Chowdhery et al. 2022, appendix B, has them whole). embeddings_only: the layers are frozen, so that
    the gradients of their matrices, 2 a parameter, are not computed. Looking up an embedding costs nothing.
    """
    layers = sum(
        size for name, size in parameter_sizes(config).items() if "_proj" in name and name.startswith("model.layers")
    )
    head = config["vocab_size"] * config["hidden_size"]
    attention = 6 * config["num_hidden_layers"] * config["hidden_size"] * max_length
    return (4 if embeddings_only else 6) * layers + 6 * head + attention


def encoder_flops_per_token(hidden_size, ffn_width, num_hidden_layers, vocab_size, max_length, masked=1.0):
    """The same of a step of masked language modelling, by every token that is read. Attention looks both ways, so that no mask saves
    half of it; the head computes the share `masked` of the tokens."""
    layers = num_hidden_layers * (4 * hidden_size * hidden_size + 3 * hidden_size * ffn_width)
    return 6 * layers + 6 * masked * vocab_size * hidden_size + 12 * num_hidden_layers * hidden_size * max_length


def activation_bytes_per_token(config, bytes_each, fused, recomputed=False):
    """Bytes that the forward pass of a Llama keeps for the backward pass, about, for each token; logits only where the loss is not
    fused with the head. Raises KeyError for what config lacks.

    A layer keeps, in `bytes_each` a number: both norms' inputs and outputs (4 · hidden), query and attention output (2 · width of all
    heads), key and value, gate, up and their product (3 · intermediate). Without Liger's kernels (`fused` false) also the fp32
    numbers inside the norms and the activated gate, and of a logit its number, its fp32 copy and both gradients: 12 bytes, in fp32 8.
    recomputed: gradient checkpointing keeps the input of each layer, and all of the one layer it is at. Counted as in Korthikanti et al.
    2022 (arXiv 2205.05198, section 4), with flash attention, which keeps no scores.
    """
    hidden, heads, inner = (config[k] for k in ("hidden_size", "num_attention_heads", "intermediate_size"))
    head = config.get("head_dim") or hidden // heads
    keys = head * (config.get("num_key_value_heads") or heads)
    layer = bytes_each * (4 * hidden + 2 * heads * head + 2 * keys + 3 * inner)
    if not fused:
        layer += 2 * 4 * hidden + bytes_each * inner
    layers = config["num_hidden_layers"]
    kept = layers * bytes_each * hidden + layer if recomputed else layers * layer
    return kept if fused else kept + (12 if bytes_each < 4 else 8) * config["vocab_size"]


# Dense bfloat16 products with fp32 sums, floating-point operations a second: NVIDIA's data sheets, without sparsity.
PEAK_FLOPS = {"A100": 312e12, "H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12, "A10G": 70e12}


def peak_flops(gpu):
    """Of one GPU by the name the driver gives it ("NVIDIA H100 80GB HBM3"); None for what is not known here."""
    return next((flops for name, flops in PEAK_FLOPS.items() if gpu and name in gpu), None)
