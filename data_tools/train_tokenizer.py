"""Trains a byte-level BPE tokenizer with the Llama-3 configuration on the text of a language; only the size varies.

    python data_tools/train_tokenizer.py --input recipes/quickstart/corpus/az --vocab_size 2048 --output_dir runs/try/tok
    python data_tools/train_tokenizer.py --config recipes/quickstart/tokenizer.yaml --check

`vocab_size` counts what Llama 3 counts as its 128,000: the 256 bytes and the merges. The 256 special tokens follow. The
folder loads with transformers.AutoTokenizer and with `tokenizers` alone.
"""

from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field
from tqdm import tqdm

from dilqur.atomic import atomic_files
from dilqur.documents import ReadingSettings, read_input
from dilqur.errors import InputError, program
from dilqur.llama3 import BOS, CHAT_TEMPLATE, EOS, PAD, PATTERN, SPECIAL_TOKENS
from dilqur.recipe import parse
from dilqur.stage import Documents, Stage, StageSettings
from dilqur.tokenizer import TextTokenizer


@dataclass(kw_only=True)
class TokenizerSettings(StageSettings, ReadingSettings):
    input: list[Documents] = field(metadata={"help": "files, folders or globs to learn the merges from"})
    vocab_size: Annotated[int, Field(ge=256, le=2**31 - 1)] = field(
        metadata={"help": "bytes and merges, without the 256 special tokens"}
    )
    min_frequency: Annotated[int, Field(ge=1)] = field(
        default=2, metadata={"help": "a pair seen less often is not merged"}
    )
    model_max_length: Annotated[int, Field(ge=1)] = field(
        default=131_072, metadata={"help": "noted in tokenizer_config.json"}
    )


def train(texts, vocab_size, min_frequency):
    """A `tokenizers.Tokenizer` trained on an iterator of str."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=min_frequency,
            show_progress=False,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        ),
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    begin = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[(BOS, begin)]
    )
    return tokenizer


@program
def main():
    settings = parse(TokenizerSettings, __doc__)
    stage = Stage(settings, __file__)
    stage.refuse_finished()
    if settings.check:
        return print(f"{stage.name}: ok")
    stage.open()
    count = {"documents": 0, "utf8_bytes": 0}
    documents, skipped = read_input(settings)

    def texts():
        for document in tqdm(documents, desc=stage.name, disable=None):
            count["documents"] += 1
            count["utf8_bytes"] += len(document.text.encode("utf-8"))
            yield document.text

    backend = train(texts(), settings.vocab_size, settings.min_frequency)
    if not count["documents"]:
        raise InputError(f"{' '.join(settings.input)}: no document in there: nothing to learn from")
    learned = backend.get_vocab_size(with_added_tokens=False)
    if learned < settings.vocab_size:
        raise InputError(
            f"vocab_size {settings.vocab_size} cannot be reached: this text gives {learned:,} tokens with "
            f"min_frequency {settings.min_frequency}; give a smaller vocab_size, or more text"
        )
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=settings.model_max_length,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        chat_template=CHAT_TEMPLATE,
    )
    with atomic_files(stage.folder) as part:
        tokenizer.save_pretrained(part)

    saved = TextTokenizer(stage.folder)
    stage.finish(
        {
            **count,
            "bad_records": skipped.count,
            "vocab_size": learned,
            "special_tokens": len(SPECIAL_TOKENS),
            "size": saved.size,
            "tokenizer_sha256": saved.hash,
        }
    )
    print(
        f"{stage.folder}: {learned:,} tokens + {len(SPECIAL_TOKENS)} special tokens, from {count['utf8_bytes'] / 1e6:.2f} MB of text"
    )
    return None


if __name__ == "__main__":
    main()
