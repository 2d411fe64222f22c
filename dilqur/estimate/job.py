"""A training stage as planning sees it: the model's shape, what of it learns, and how much a step is."""

from dataclasses import dataclass, replace
from fnmatch import fnmatch

from dilqur.data.batches import split_batch
from dilqur.estimate.cost_model import activations, encoder_flops_per_token, parameter_sizes, training_flops_per_token
from dilqur.estimate.lora import Lora, adapter_activations, adapter_flops_per_token, adapter_sizes
from dilqur.kernels.settings import share_recomputed
from dilqur.models.config import is_encoder, neobert_width

BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Job:
    """config: of the model, a dict. sizes: {parameter: elements}. patterns: names that learn, None for all. weight: bytes of a trained
    weight, product: of a number in a matrix product, reduce: of a gradient on the network. masked: share of the tokens that an encoder
    guesses. recomputed: share of the layers. steps: None where they are epochs of shards that are not there. ceiling:
    per_device_train_batch_size. lora: of an adapter, which alone learns then. save_steps: None where only the end is saved.
    read_by_rows: does a rank that shards the model load no more than its shard?"""

    config: dict
    patterns: tuple | None = None
    weight: int = 4
    product: int = 2
    reduce: int = 4
    liger: bool = False
    compiled: bool = False
    fused_loss: bool = False
    recomputed: float = 0.0
    masked: float = 1.0
    max_length: int = 2048
    global_batch: int = 8
    ceiling: int = 8
    steps: int | None = None
    save_steps: int | None = None
    lora: Lora | None = None
    read_by_rows: bool = False

    @classmethod
    def of(cls, settings, config, steps=None):
        """Of TrainingSettings and the model they train."""
        encoder, auto = is_encoder(config), settings.kernels == "auto"
        return cls(
            config=config,
            patterns=tuple(settings.unfrozen_parameters) if settings.unfrozen_parameters else None,
            weight=BYTES[settings.dtype],
            product=2 if settings.bf16 else BYTES[settings.dtype],
            reduce=BYTES[settings.reduce_dtype],
            liger=settings.use_liger_kernel and not encoder,
            compiled=auto if settings.torch_compile is None else settings.torch_compile,
            fused_loss=auto if settings.loss_kernel is None else settings.loss_kernel != "logits",
            recomputed=share_recomputed(settings),
            masked=getattr(settings, "mlm_probability", 1.0),
            max_length=settings.max_length,
            global_batch=settings.global_batch_size,
            ceiling=settings.per_device_train_batch_size,
            steps=steps or settings.max_steps,
            save_steps=settings.save_steps,
            read_by_rows=not encoder and bool(settings.model_name_or_path),
        )

    @classmethod
    def of_adapter(cls, settings, config, steps=None):
        """Of scripts/sft.py's settings and the base."""
        return cls(
            config=config,
            patterns=("*.lora_*",),
            product=2 if settings.bf16 else 4,
            recomputed=float(settings.gradient_checkpointing),
            max_length=settings.max_length,
            global_batch=settings.global_batch_size,
            ceiling=settings.per_device_train_batch_size,
            steps=steps,
            lora=Lora(settings.lora_r, tuple(settings.lora_target_modules), settings.lora_dropout),
        )

    def but(self, **changes):
        return replace(self, **changes)

    # -- parameters -------------------------------------------------------------------------------------------------------

    @property
    def sizes(self):
        return parameter_sizes(self.config) | (adapter_sizes(self.config, self.lora) if self.lora else {})

    @property
    def total(self):
        return sum(self.sizes.values())

    @property
    def trained(self):
        return sum(size for name, size in self.sizes.items() if self._learns(name))

    @property
    def embeddings_only(self):
        """Do the layers stay as they are, so that their products need no gradient of their weights?"""
        return bool(self.patterns) and not any(self._learns(name) for name in self.sizes if _layer(name))

    @property
    def frozen_weight(self):
        """Bytes of a weight that does not learn."""
        return self.product if self.lora else self.weight

    @property
    def mixed(self):
        """bfloat16 matmuls beside fp32 weights."""
        return self.product < self.weight

    def units(self):
        """(elements that FSDP2 keeps gathered all the time: the head, with the embeddings where they are tied, and the final norm;
        elements of the largest layer)"""
        layers, tail = {}, 0
        tied = not any(name.startswith(("lm_head", "decoder")) for name in self.sizes)
        for name, size in self.sizes.items():
            if number := _layer(name):
                layers[number] = layers.get(number, 0) + size
            elif ("embed" not in name and name != "model.encoder.weight") or tied:
                tail += size
        return tail, max(layers.values())

    def _learns(self, name):
        names = (name, "lm_head.weight") if self.config.get("tie_word_embeddings") and "embed" in name else (name,)
        return not self.patterns or any(fnmatch(n, pattern) for pattern in self.patterns for n in names)

    # -- a step -----------------------------------------------------------------------------------------------------------

    @property
    def tokens(self):
        """Of a step, over all GPUs."""
        return self.global_batch * self.max_length

    def split(self, gpus, ceiling=None):
        """(sequences of a micro-batch on a GPU, micro-batches of a step). Raises InputError where they do not divide."""
        return split_batch(self.global_batch, ceiling or self.ceiling, gpus)

    def activations(self, residual=None):
        """residual: bytes of a number between the layers."""
        if self.lora:
            return adapter_activations(self.config, self.product, self.lora, self.max_length)
        fused = {"liger": self.liger, "compiled": self.compiled, "fused_loss": self.fused_loss}
        return activations(
            self.config, self.product, residual, **fused, frozen=self.embeddings_only, masked=self.masked
        )

    def flops_per_token(self):
        """Of the model; for what it computes, `computed_flops_per_token`."""
        config = self.config
        if self.lora:
            return adapter_flops_per_token(config, self.max_length, self.lora)
        if is_encoder(config):
            width = neobert_width if config["model_type"] == "neobert" else int
            names = ("hidden_size", "num_hidden_layers", "vocab_size")
            hidden, layers, vocab = (config[name] for name in names)
            inner = width(config["intermediate_size"])
            return encoder_flops_per_token(hidden, inner, layers, vocab, self.max_length, self.masked)
        return training_flops_per_token(config, self.max_length, self.embeddings_only)

    def computed_flops_per_token(self):
        """With the layers' second forward pass under gradient checkpointing, a third of what they take where all of it learns, and an
        adapter's, 2 a parameter; and with the head's second one in TRL's loss."""
        head = 2 * self.masked * self.config["vocab_size"] * self.config["hidden_size"]
        forward = self.but(patterns=None, lora=None).flops_per_token() / 3 - head
        if self.lora:
            return self.flops_per_token() + head + self.recomputed * (forward + 2 * self.trained)
        return self.flops_per_token() + self.recomputed * forward


def _layer(name):
    """The number, a str, of the layer a parameter belongs to; None for the embeddings, the head and what is between."""
    return next((word for word in name.split(".") if word.isdecimal()), None)
