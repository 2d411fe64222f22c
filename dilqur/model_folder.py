"""A trained model as a Hugging Face folder, put together from files: nothing is built, gathered or run for it."""

import shutil
from pathlib import Path

import torch
from safetensors import safe_open

from dilqur.errors import InputError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def write_model_folder(folder, config, trained, tied, source=None, tokenizer=None):
    """Write config, fp32 weights and tokenizer files to `folder`.

    config: a transformers config. trained: {name: fp32 tensor}, over the weights of `source`, the model folder the run began
    with (None: everything was trained). tied: names that are the same tensor as another one; they are left out.
    tokenizer: where the tokenizer's files lie, `source` if None.
    """
    from huggingface_hub import save_torch_state_dict

    weights = {**(read_weights(source) if source else {}), **trained}
    for name in tied:
        weights.pop(name, None)
    save_torch_state_dict(weights, folder, max_shard_size="5GB")
    config.dtype = torch.float32
    config.use_cache = True
    config.save_pretrained(folder)
    if source and (Path(source) / "generation_config.json").exists():
        shutil.copyfile(Path(source) / "generation_config.json", Path(folder) / "generation_config.json")
    tokenizer = Path(tokenizer or source)
    for name in TOKENIZER_FILES:
        if (tokenizer / name).exists():
            shutil.copyfile(tokenizer / name, Path(folder) / name)


def read_weights(folder):
    """{name: fp32 tensor} of a model folder's safetensors files. Raises InputError where there are none (pickles are not read)."""
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise InputError(f"{folder}: no .safetensors in it; convert the model first")
    weights = {}
    for file in files:
        with safe_open(file, "pt") as opened:
            weights.update({name: opened.get_tensor(name).float() for name in opened.keys()})  # noqa: SIM118, no mapping
    return weights
