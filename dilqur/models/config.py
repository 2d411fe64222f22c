"""config.json of a model folder, without torch; and which models mlm.py trains: NeoBERT, and EuroBERT made of one."""

import json
from pathlib import Path

from dilqur.common.errors import InputError

LAYOUTS = ("eurobert", "neobert")  # values of model_type


# a NeoBERTConfig's, with its defaults
NEOBERT_KEYS = {
    "model_type": "neobert",
    "hidden_size": 768, "num_hidden_layers": 28, "num_attention_heads": 12, "intermediate_size": 3072, "vocab_size": 30_522,
    "max_length": 1024, "norm_eps": 1e-5, "rope_theta": 10_000.0, "embedding_init_range": 0.02, "decoder_init_range": 0.02,
}  # fmt: skip


def new_model_config(kind, keys):
    """The config, a dict, of a model that a program of `kind` makes of `keys`: of an encoder with its defaults."""
    return {**NEOBERT_KEYS, **keys} if kind == "mlm" else dict(keys)


def is_encoder(config):
    """Is it one that mlm.py trains? config: of a config.json, a dict."""
    return config.get("model_type") in LAYOUTS


def check_length(config, max_length, path, longer=""):
    """Raise InputError where samples of `max_length` tokens have more positions than the model in `path`, whose config this is, has
    positions. longer: how it gets more."""
    positions = config.get("max_position_embeddings")
    if positions and max_length > positions:
        raise InputError(f"max_length {max_length} is more than the {positions} positions of {path}{longer}")


def read_encoder_config(folder):
    """config.json of an encoder, as a dict. Raises InputError for another model's."""
    config = read_config(folder)
    if not is_encoder(config):
        raise InputError(
            f"{folder}: a {config.get('model_type')}: only NeoBERT, and EuroBERT made of it, are trained here"
        )
    return config


def neobert_width(intermediate_size):
    """Of a feed-forward layer, as the reference code reads the key: two thirds of it, up to a multiple of 8."""
    return -(-int(2 * intermediate_size / 3) // 8) * 8


def read_config(folder):
    """config.json of a model folder, as a dict. Raises InputError where it is missing or damaged."""
    path = Path(folder) / "config.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise InputError(f"{path}: cannot be read ({problem}); fetch or convert the model again") from None


def load_config(folder):
    """The transformers config of a model folder. Raises InputError where there is none, or it is damaged."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except (ValueError, OSError, KeyError) as problem:
        raise InputError(f"{folder}: its config.json cannot be read ({str(problem).splitlines()[0]})") from None
