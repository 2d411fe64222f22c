r"""Gives a model another tokenizer: base model + new tokenizer → the same model with a new embedding matrix.

    python scripts/transplant_tokenizer.py --model_name_or_path runs/quickstart/base \
        --tokenizer runs/quickstart/tokenizer --output_dir runs/try/m
    python scripts/transplant_tokenizer.py --config recipes/quickstart/transplant.yaml --check

Tokens of both vocabularies keep their rows; a new one gets the mean of the rows of its pieces under the old tokenizer
(`piece_mean`). Every other weight stays as it is, to the bit; tied embeddings stay tied; special tokens and
generation_config follow the new tokenizer. OUTPUT_DIR is a Hugging Face folder.
"""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from dilqur.atomic import atomic_files
from dilqur.errors import InputError, program
from dilqur.llama3 import BOS, EOS, EOT, PAD
from dilqur.quiet import quiet_libraries
from dilqur.recipe import parse
from dilqur.stage import ModelPath, Stage, StageSettings, TokenizerPath
from dilqur.tokenizer import TextTokenizer


@dataclass(kw_only=True)
class TransplantSettings(StageSettings):
    model_name_or_path: ModelPath = field(
        metadata={"help": "base model: its folder, a stage, or a Hub name in the local cache"}
    )
    tokenizer: TokenizerPath = field(metadata={"help": "folder of the new tokenizer"})
    method: Literal["piece_mean"] = field(default="piece_mean", metadata={"help": "how a new token's row starts"})
    pad_to_multiple_of: Annotated[int, Field(ge=1)] = field(
        default=128, metadata={"help": "rows of the matrix, for tensor cores"}
    )


def special_tokens(tokenizer):
    """{content: id} of a TextTokenizer's control tokens."""
    return {t.content: i for i, t in tokenizer.backend.get_added_tokens_decoder().items() if t.special}


def new_matrix(old, old_tokenizer, new_tokenizer, rows):
    """(float32 tensor (rows, hidden), how many rows were copied); the rows past the tokenizer are the mean of all others."""
    import torch

    from dilqur.embedding_init import piece_mean

    made, copied = piece_mean(
        old, old_tokenizer.backend, new_tokenizer.backend, special_tokens(old_tokenizer), special_tokens(new_tokenizer)
    )
    padding = made.mean(0, keepdim=True).repeat(rows - len(made), 1)
    return torch.cat([made, padding]), copied


def set_special_ids(model, tokenizer):
    """BOS, EOS and PAD of the new tokenizer in config and generation_config; generation ends at EOS and at <|eot_id|>."""
    ids = {token: tokenizer.backend.token_to_id(token) for token in (BOS, EOS, EOT, PAD)}
    for config in (model.config, model.generation_config):
        config.bos_token_id, config.eos_token_id, config.pad_token_id = ids[BOS], ids[EOS], ids[PAD]
    model.generation_config.eos_token_id = [i for i in (ids[EOS], ids[EOT]) if i is not None]


@program
def main():
    settings = parse(TransplantSettings, __doc__)
    stage = Stage(settings, __file__)
    stage.refuse_finished()
    old_tokenizer, new_tokenizer = TextTokenizer(settings.model_name_or_path), TextTokenizer(settings.tokenizer)
    for tokenizer in (old_tokenizer, new_tokenizer):
        if "Ā" not in tokenizer.backend.get_vocab(with_added_tokens=False):  # how byte-level BPE writes the byte 0
            raise InputError(f"{tokenizer.path}: not a byte-level BPE tokenizer; {settings.method} needs both to be")
    if new_tokenizer.hash == old_tokenizer.hash:
        raise InputError(f"tokenizer: {settings.tokenizer} is the tokenizer {settings.model_name_or_path} has already")
    if settings.check:
        return print(f"{stage.name}: ok")
    stage.open()
    quiet_libraries()
    import torch
    from transformers import AutoModelForCausalLM

    from dilqur.model_folder import copy_tokenizer

    model = AutoModelForCausalLM.from_pretrained(settings.model_name_or_path, dtype=torch.float32)
    old, head, tied = (
        model.get_input_embeddings().weight.data,
        model.get_output_embeddings(),
        model.config.tie_word_embeddings,
    )
    rows = -(-new_tokenizer.size // settings.pad_to_multiple_of) * settings.pad_to_multiple_of
    new, copied = new_matrix(old, old_tokenizer, new_tokenizer, rows)
    new_head = None if tied else new_matrix(head.weight.data, old_tokenizer, new_tokenizer, rows)[0]
    model.resize_token_embeddings(rows, mean_resizing=False)
    model.get_input_embeddings().weight.data.copy_(new)
    if new_head is not None:
        model.get_output_embeddings().weight.data.copy_(new_head)
    if (model.get_output_embeddings().weight is model.get_input_embeddings().weight) != tied:
        raise RuntimeError("the model's embeddings changed from tied to untied, or the other way")
    set_special_ids(model, new_tokenizer)

    with atomic_files(stage.folder) as part:
        model.save_pretrained(part)
        copy_tokenizer(settings.tokenizer, part)
        if TextTokenizer(part).hash != new_tokenizer.hash:
            raise RuntimeError("saving the tokenizer changed it")
    result = {
        "rows": rows,
        "copied": copied,
        "made_from_pieces": new_tokenizer.size - copied,
        "padding_rows": rows - new_tokenizer.size,
        "tied": tied,
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokenizer_sha256": new_tokenizer.hash,
    }
    stage.finish(result)
    print(
        f"{stage.folder}: {rows:,} rows, {copied:,} copied, {result['made_from_pieces']:,} from pieces, {result['padding_rows']} padding; "
        f"{result['parameters']:,} parameters"
    )
    return None


if __name__ == "__main__":
    main()
