"""What a Llama or a NeoBERT of a given config has in parameters, and what training it costs: memory, floating-point operations."""

from dataclasses import dataclass

from dilqur.models.config import neobert_width


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


@dataclass(frozen=True)
class Activations:
    """Bytes for each token that a training step holds on a GPU. layer: {part: bytes} of what a layer's forward pass keeps for its backward
    pass; layer_input: what gradient checkpointing keeps of it instead; ends: the final norm and the ids; loss: kept for the loss's backward
    pass; loss_peak: of the loss at its largest, gradients included; working: gradients inside a layer while it is gone back through.
    whole: bytes besides, however many tokens there are."""

    layer: dict
    layers: int
    layer_input: float
    ends: float
    loss: float
    loss_peak: float
    working: float
    whole: float = 0.0

    def kept(self, recomputed=0.0):
        """At the end of the forward pass. recomputed: share of the layers under gradient checkpointing."""
        each = recomputed * self.layer_input + (1 - recomputed) * sum(self.layer.values())
        return self.layers * each + self.ends + self.loss

    def peak(self, recomputed=0.0):
        """When the backward pass begins: in the loss or, where that is small, in the last layer."""
        again = (
            sum(self.layer.values()) if recomputed == 1 else 0.0
        )  # else the last layer is one of those that kept theirs
        return self.kept(recomputed) - self.loss + max(self.loss_peak, again + self.working)


def activations(
    config,
    bytes_each,
    residual=None,
    liger=False,
    compiled=False,
    fused_loss=False,
    frozen=False,
    masked=1.0,
    fused_norms=True,
):
    """Activations of a Llama or a NeoBERT of this config, attention being one that keeps no scores (flash, SDPA), as in Korthikanti et al.
    2022 (arXiv 2205.05198, section 4), by what each of our models' operations saves. Raises UnknownArchitecture, KeyError.

    bytes_each: of a number in a matrix product. residual: of one between the layers; under autocast (DDP) it is fp32 beside bf16 products,
    each of which then keeps its own copy of its input; None: as in the products. liger: its layers and its loss, of a Llama. compiled: the
    layers, which then keep what Liger's do. fused_loss: one of dilqur/kernels/fused_cross_entropy.py. frozen: only the embeddings and the
    head learn, so that no product keeps its input. masked: share of tokens an encoder's head sees. fused_norms: of a NeoBERT, as on a GPU;
    torch's norm on a CPU is many operations."""
    c, residual = bytes_each, residual or bytes_each
    copies = residual != c
    hidden, heads, layers = (config[k] for k in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    learn = not frozen
    if (kind := config.get("model_type", "llama")) in ("neobert", "eurobert"):
        width = (neobert_width if kind == "neobert" else int)(config["intermediate_size"])
        unfused = 8  # its input and the normed one, both in fp32
        norm = (residual if fused_norms or compiled else unfused) + learn * c
        parts = {"norms": 2 * norm * hidden, "attention": 6 * c * hidden}
        parts["feed_forward"] = (2 + learn + (not compiled)) * c * width
        ends, working = (residual if fused_norms else unfused) * hidden, 3 * c * width + 2 * residual * hidden
    elif kind == "llama":
        head = config.get("head_dim") or hidden // heads
        keys, inner = head * (config.get("num_key_value_heads") or heads), config["intermediate_size"]
        # transformers' norm upcasts its input; the residual in fp32 is that already. What its weight multiplies is kept if that learns
        fused = liger or compiled
        norm = 4 + learn * residual
        inside = residual if fused else norm
        inputs = learn * c * (5 if copies else 2)  # of q, k, v together and of gate and up together, or of each
        parts = {"norms": (2 * inside + inputs) * hidden, "attention": c * (2 * heads * head + 2 * keys)}
        parts["feed_forward"] = c * inner * ((2 if fused else 3) + learn)
        ends, working = (residual if liger else norm) * hidden, c * inner * (1 if fused else 3) + 2 * residual * hidden
    else:
        raise UnknownArchitecture(f"the size of a {kind} is not known here")
    parts["statistics"] = 4 * (heads + 2)  # of attention's softmax and both norms, fp32
    head, vocab = masked * c * hidden, config["vocab_size"]  # what goes into the head
    ends += 2 * 8 + head
    if liger:  # the gradient of its input, made in the forward pass, and a chunk's logits, rounded up to a power of two
        return Activations(parts, layers, residual * hidden, ends, head, 3 * head, working, c * vocab * hidden)
    if fused_loss:  # the gradient of its input is kept in the input's place; that of the weight in fp32
        return Activations(parts, layers, residual * hidden, ends, 0, head, working, 4 * vocab * hidden)
    # log-softmax, and in the backward pass the gradients of and behind it, all fp32
    return Activations(parts, layers, residual * hidden, ends, 4 * masked * vocab, 12 * masked * vocab, working)


# Dense bfloat16 matmuls with fp32 sums, floating-point operations per second: NVIDIA's data sheets, without sparsity.
PEAK_FLOPS = {"A100": 312e12, "H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12, "A10G": 70e12}


def peak_flops(gpu):
    """Of one GPU by the name the driver gives it ("NVIDIA H100 80GB HBM3"); None for what is not known here."""
    return next((flops for name, flops in PEAK_FLOPS.items() if gpu and name in gpu), None)
