"""Which models mlm.py trains, by the config.json of their folder, without torch: NeoBERT, and EuroBERT made of one."""

from dilqur.errors import InputError
from dilqur.stage import read_config

LAYOUTS = ("eurobert", "neobert")  # values of model_type


def is_encoder(folder):
    """Does a folder's config.json say that it holds one?"""
    return read_config(folder).get("model_type") in LAYOUTS


def read_encoder_config(folder):
    """config.json of an encoder, as a dict. Raises InputError for another model's."""
    config = read_config(folder)
    if config.get("model_type") not in LAYOUTS:
        raise InputError(
            f"{folder}: a {config.get('model_type')}: only NeoBERT, and EuroBERT made of it, are trained here"
        )
    return config
