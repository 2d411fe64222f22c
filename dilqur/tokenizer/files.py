"""The files of a tokenizer that stand in a model folder."""

import shutil
from pathlib import Path

from dilqur.tokenizer.llama3 import PAD
from dilqur.tokenizer.text_tokenizer import TextTokenizer

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


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
