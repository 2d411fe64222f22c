"""A trained model as a Hugging Face folder, put together from files: nothing is built, gathered or run for it."""

import shutil
from pathlib import Path

import torch
from safetensors import safe_open

from dilqur.errors import InputError
from dilqur.llama3 import PAD
from dilqur.tokenizer import TextTokenizer

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
    copy_tokenizer(tokenizer or source, folder)


def copy_tokenizer(source, folder):
    """The tokenizer's files of a model or tokenizer folder, or a bare tokenizer.json (.gz), into `folder`, ready for AutoTokenizer."""
    source, folder = Path(source), Path(folder)
    if source.is_dir():
        for name in TOKENIZER_FILES:
            if (source / name).exists():
                shutil.copyfile(source / name, folder / name)
        return
    from transformers import PreTrainedTokenizerFast

    tokenizer = TextTokenizer(source)
    pad = PAD if tokenizer.backend.token_to_id(PAD) is not None else None
    (folder / "tokenizer.json").write_bytes(tokenizer.content)
    PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        pad_token=pad,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(folder)


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
