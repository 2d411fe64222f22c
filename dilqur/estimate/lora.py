"""What a LoRA adapter (Hu et al. 2021, arXiv 2106.09685) takes, as peft puts it on a Llama's projections and scripts/sft.py trains it with
TRL: parameters, bytes that are kept for the backward pass, floating-point operations."""

from dataclasses import dataclass, replace

from dilqur.estimate.cost_model import UnknownArchitecture, activations, training_flops_per_token

ONE_GPU = "sft trains an adapter that fits on one GPU and merges it there: launch it with ddp.yaml, or with python"
# Logits that TRL's loss has at a time: TOKEN_CHUNK_SIZE of trl/kernels/chunked_logprob.py × _CHUNKED_LOGPROB_CHUNK_SIZE of
# trl/trainer/utils.py
CHUNK_OF_LOGITS = 4096 * 32_768


@dataclass(frozen=True)
class Lora:
    """rank: r. modules: last names of the projections that get an adapter, in every layer. dropout: on its input, 0 for none. The
    adapter's weights are fp32, whatever the base's are: peft casts them."""

    rank: int
    modules: tuple
    dropout: float = 0.0


def projections(config):
    """{"self_attn.q_proj", …: (inputs, outputs)} of a layer of a Llama of this config. Raises UnknownArchitecture, KeyError."""
    if (kind := config.get("model_type", "llama")) != "llama":
        raise UnknownArchitecture(f"adapters of a {kind} are not known here")
    hidden, heads, inner = (config[key] for key in ("hidden_size", "num_attention_heads", "intermediate_size"))
    head = config.get("head_dim") or hidden // heads
    queries, keys = head * heads, head * (config.get("num_key_value_heads") or heads)
    attention = {"q": (hidden, queries), "k": (hidden, keys), "v": (hidden, keys), "o": (queries, hidden)}
    feed_forward = {"gate": (hidden, inner), "up": (hidden, inner), "down": (inner, hidden)}
    parts = {"self_attn": attention, "mlp": feed_forward}
    return {f"{part}.{name}_proj": shape for part, shapes in parts.items() for name, shape in shapes.items()}


def adapted(config, lora):
    """Those of the projections that have an adapter. Raises UnknownArchitecture where `modules` names another kind of layer."""
    shapes = projections(config)
    if others := set(lora.modules) - {name.split(".")[1] for name in shapes}:
        raise UnknownArchitecture(f"lora_target_modules: an adapter of {', '.join(sorted(others))} is not known here")
    return {name: shape for name, shape in shapes.items() if name.split(".")[1] in lora.modules}


def adapter_sizes(config, lora):
    """{parameter: elements} of the adapter: A is (r, inputs), B is (outputs, r)."""
    return {
        f"model.layers.{layer}.{name}.lora_{matrix}.weight": lora.rank * side
        for layer in range(config["num_hidden_layers"])
        for name, shape in adapted(config, lora).items()
        for matrix, side in zip("AB", shape, strict=True)
    }


def adapter_flops_per_token(config, max_length, lora):
    """Of a training step, by every token: forward and the gradients of activations, 4 a parameter of the frozen matrices, the head too; 6
    a parameter of the adapter, whose weights have gradients besides; attention as in `training_flops_per_token`."""
    frozen = training_flops_per_token(config, max_length, embeddings_only=True)
    head = config["vocab_size"] * config["hidden_size"]
    return frozen - 2 * head + 6 * sum(adapter_sizes(config, lora).values())


def adapter_activations(config, bytes_each, lora, padded_to, fused_dropout=True):
    """Activations of a Llama whose weights are frozen, in the products' dtype, with an adapter. Raises as `adapted`.

    bytes_each: of a number in a matrix product, 2 beside fp32 adapters: autocast. padded_to: tokens of the longest conversation of a
    micro-batch, to which the others are padded: attention then takes a mask, a number of the products' dtype for each pair of tokens,
    and keys and values repeated for every query head (transformers/integrations/sdpa_attention.py); 0 where none is padded.
    fused_dropout: as on a GPU, which keeps a byte for each number; a CPU keeps what it multiplies by.
    """
    modules, c = adapted(config, lora), bytes_each
    frozen = activations(config, c, frozen=True)
    layer = dict(frozen.layer)
    queries, keys = (projections(config)[f"self_attn.{name}_proj"][1] for name in "qk")
    if padded_to:
        layer["attention"] += c * (2 * (queries - keys) + padded_to)
    if lora.dropout or c == 2:  # A keeps its own copy of its input, dropped or cast
        mask = (1 if fused_dropout else 4) if lora.dropout else 0
        inputs = sum((c + mask) * wide for wide, _ in modules.values())
    else:  # what q, k, v share, and gate and up; attention keeps o's anyway
        kept = {"q": "norm", "k": "norm", "v": "norm", "gate": "norm 2", "up": "norm 2", "down": "down"}
        shared = {kept[last]: wide for name, (wide, _) in modules.items() if (last := name.split(".")[1][:-5]) in kept}
        inputs = c * sum(shared.values())
    layer["adapters"] = inputs + c * lora.rank * len(modules)  # and B its input
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    # of the feed-forward layer without adapters, or of the input of down's: fp32, before and behind the dropout
    gradients = max(3 * c, 2 * 4) * inner
    return replace(
        frozen,
        layer=layer,
        ends=frozen.ends + 2 * 4 + 2,  # log Z and entropy in fp32, what is masked twice; the input of the head is in it
        loss=0,
        loss_peak=(4 + c) * hidden,  # the gradient of the head's input, summed in fp32, and as it goes on
        working=gradients + 2 * c * hidden,
    )
