r"""Pre-trains an encoder, a NeoBERT, by masked language modelling on token shards: from random weights, or going on with one.

    python scripts/mlm.py --config recipes/quickstart-encoder/mlm-1.yaml --check
    accelerate launch --config_file accelerate_configs/ddp.yaml --num_processes 2 \
        scripts/mlm.py --config recipes/quickstart-encoder/mlm-2.yaml --max_steps 8 --output_dir runs/try/mlm

The loop, its checkpoints and its keys are those of scripts/cpt.py; what differs is the model, the loss, and that labels are the tokens that
were masked, by seed and position alone. At the end OUTPUT_DIR/model is a Hugging Face folder that transformers loads as
EuroBertForMaskedLM, the same function, with no code of ours.
"""

import functools
from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field

from dilqur.common.errors import InputError
from dilqur.common.startup import quiet_libraries
from dilqur.data.mlm_masking import Count, Masking, Rule
from dilqur.estimate.cost_model import encoder_flops_per_token, parameter_sizes
from dilqur.models.config import NEOBERT_KEYS, neobert_width, new_model_config, read_encoder_config
from dilqur.pipeline.inputs import TokenizerPath
from dilqur.pipeline.program import program
from dilqur.pipeline.settings_parser import setting
from dilqur.tokenizer.encoder_tokens import MASK
from dilqur.tokenizer.text_tokenizer import TextTokenizer
from dilqur.training.checks import check_model, check_one_model, check_training
from dilqur.training.settings import TrainingSettings


@dataclass(kw_only=True)
class MlmSettings(TrainingSettings):
    encoder: ClassVar = True
    model_config: dict | None = setting("keys of a NeoBERTConfig, to begin with random weights", default=None)
    tokenizer: TokenizerPath | None = setting(
        "with model_config: the tokenizer that goes into model/", default=None, on_resume="may_change"
    )
    max_position_embeddings: Annotated[int, Field(ge=1)] | None = setting(
        "with model_name_or_path: its longest context from now on (RoPE has no weights)", default=None
    )
    mlm_probability: Annotated[float, Field(gt=0, lt=1)] = setting(
        "share of the tokens that are to be guessed", default=0.2
    )
    mask_rule: Rule = setting("what is shown instead of them", default="mask")
    mask_count: Count = setting("each by itself, or the rounded share of each sample", default="independent")

    @property
    def labelled_fraction(self):
        return self.mlm_probability

    def masking(self):
        how = (self.mlm_probability, self.mask_rule, self.mask_count)
        return Masking(*tokens_of(self.tokenizer or self.model_name_or_path), *how)


@functools.cache
def tokens_of(path):
    """(id of [MASK], ids of all control tokens, number of ids) of a tokenizer. Raises InputError where it has no [MASK]."""
    tokenizer = TextTokenizer(path)
    special = {i for i, token in tokenizer.backend.get_added_tokens_decoder().items() if token.special}
    if (mask_id := tokenizer.backend.token_to_id(MASK)) is None or mask_id not in special:
        raise InputError(
            f"{tokenizer.path}: no {MASK} in it: train one with data_tools/train_tokenizer.py --control_tokens encoder"
        )
    return mask_id, frozenset(special), tokenizer.size


def check(settings):
    """InputError for whatever can be seen without torch."""
    check_one_model(settings, "an encoder")
    if settings.model_config:
        config, positions = check_new_config(settings), "max_length in model_config"
    elif settings.tokenizer:
        raise InputError("tokenizer: a model that is continued keeps its own: leave it out")
    else:
        config = read_encoder_config(settings.model_name_or_path)
        positions = f"--max_position_embeddings {settings.max_length}"
    samples, _, _ = check_training(settings)
    tokens_of(settings.tokenizer or settings.model_name_or_path)
    longest = settings.max_position_embeddings or config.get("max_position_embeddings") or config.get("max_length")
    check_model(settings, samples, {**config, "max_position_embeddings": longest}, f": give {positions}")


def check_new_config(settings):
    """The config of a new encoder, a dict. Raises InputError for keys and values that make none."""
    if settings.max_position_embeddings:
        raise InputError("max_position_embeddings: of a new model that is max_length in model_config")
    if unknown := sorted(set(settings.model_config) - set(NEOBERT_KEYS)):
        raise InputError(f"model_config: {unknown[0]}: not a key of a NeoBERT; there are {', '.join(NEOBERT_KEYS)}")
    config = new_model_config("mlm", settings.model_config)
    for name, value in config.items():
        if name != "model_type" and (not isinstance(value, int | float) or value <= 0):
            raise InputError(f"model_config: {name} {value!r}: give a number above 0")
    if config["hidden_size"] % (2 * config["num_attention_heads"]):
        raise InputError(
            f"model_config: hidden_size {config['hidden_size']} does not divide into {config['num_attention_heads']} heads "
            "of an even size"
        )
    return config


def readings(settings, _):
    """Of a new model: how many parameters it has, and would have if intermediate_size were the layer's width; else ""."""
    if not settings.model_config:
        return ""
    config = new_model_config("mlm", settings.model_config)
    size = config["intermediate_size"]
    ours, other = (sum(parameter_sizes({**config, "model_type": kind}).values()) for kind in ("neobert", "eurobert"))
    return (
        f"; {ours:,} parameters, intermediate_size {size:,} being a layer {neobert_width(size):,} wide, as the reference code "
        f"reads it; {other:,} if it were {size:,} wide (intermediate_size {size * 3 // 2:,})"
    )


def load_model(settings):
    """The encoder in `dtype`: from its folder, or new with weights drawn from `seed`."""
    import torch
    from transformers import set_seed

    from dilqur.models.modeling_neobert import NeoBERTLMHead
    from dilqur.models.neobert_folder import new_config, read_encoder

    dtype = getattr(torch, settings.dtype)
    if settings.model_name_or_path:
        longer = {"max_length": settings.max_position_embeddings} if settings.max_position_embeddings else {}
        return read_encoder(settings.model_name_or_path, dtype, **longer)
    set_seed(settings.seed)
    return NeoBERTLMHead(new_config(settings.model_config, settings.tokenizer)).to(dtype)


def masked_loss(model, batch, tokens):
    """Sum of the losses of the masked tokens of `batch` / `tokens`."""
    return model(**batch, num_items_in_batch=tokens).loss


def loss_and_correct(model, batch):
    """Of an evaluation: the summed loss, and how many masked tokens are what the model finds likeliest."""
    labels = batch["labels"].flatten()[batch["masked_positions"]]
    out = model(**batch, num_items_in_batch=1)
    return out.loss, (out.logits.argmax(-1) == labels).sum()


def make_task(settings):
    """What the loop trains: model, losses, how the result is written, FLOPs."""
    from dilqur.models.neobert_folder import write_encoder
    from dilqur.training.run import Task

    model = load_model(settings)
    config = model.config

    def write_model(reader, folder):
        weights = {name: reader.tensor("weight", name) for name in reader.shapes}
        write_encoder(folder, weights, config, settings.tokenizer or settings.model_name_or_path)

    shape = (config.hidden_size, config.ffn_width, config.num_hidden_layers, config.vocab_size)
    flops = encoder_flops_per_token(*shape, settings.max_length, settings.mlm_probability)
    return Task(model, masked_loss, write_model, flops, loss_and_correct)


@program(MlmSettings, check, kind="mlm", about=readings)
def main(settings, stage):
    quiet_libraries()
    from dilqur.training.loop import train

    train(settings, stage, make_task(settings))


if __name__ == "__main__":
    main()
