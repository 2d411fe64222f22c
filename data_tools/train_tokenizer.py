r"""Trains a byte-level BPE tokenizer with the Llama-3 configuration on the text of a language, or extends a base tokenizer.

    python data_tools/train_tokenizer.py --input recipes/quickstart/corpus/az --vocab_size 2048 --output_dir runs/try/tok
    python data_tools/train_tokenizer.py --input recipes/quickstart/corpus/az --vocab_sizes 512 1024 2048 --output_dir runs/try/sweep
    python data_tools/train_tokenizer.py --input recipes/quickstart/corpus/az --base_tokenizer runs/quickstart/tokenizer-base \
        --new_tokens 1024 --output_dir runs/try/extended
    python data_tools/train_tokenizer.py --config recipes/quickstart/tokenizer.yaml --check

`vocab_size` counts what Llama 3 counts as its 128,000: the 256 bytes and the merges; the 256 special tokens follow. Of several sizes
the largest is trained once and the others are cut from it, each in OUTPUT_DIR/SIZE. An extension keeps every id and merge of its base
and appends `new_tokens`. The folders load with transformers.AutoTokenizer and with `tokenizers` alone.

Three defaults differ from plain BPE training, and make tokens that other texts of the language need too (docs/vocabulary.md): small sources
count for more (`source_temperature`), and so do rare words (`count_exponent`), and words that were not seen but are likely from those that
were count as well (`unseen_words`). `--source_temperature 1 --count_exponent 1 --unseen_words 0` is plain training.
"""

import re
import sys
from dataclasses import dataclass
from typing import Annotated, Literal, Required

import regex
from pydantic import Field
from typing_extensions import TypedDict

from dilqur.common.atomic import atomic_files
from dilqur.common.errors import InputError
from dilqur.common.parallel import cores
from dilqur.common.paths import COMPRESSIONS, FORMATS, expand
from dilqur.data.documents import ReadingSettings
from dilqur.pipeline.inputs import Documents, TokenizerPath
from dilqur.pipeline.program import program
from dilqur.pipeline.settings_parser import setting
from dilqur.pipeline.stage import StageSettings
from dilqur.tokenizer import encoder_tokens as bert_tokens
from dilqur.tokenizer.bpe_training import (
    Extension,
    cut_merges,
    encoder_tokenizer,
    learn_merges,
    llama3_tokenizer,
    whole_counts,
)
from dilqur.tokenizer.encoder_tokens import CLS, MASK, SEP
from dilqur.tokenizer.llama3 import BOS, CHAT_TEMPLATE, EOS, PAD, PATTERNS
from dilqur.tokenizer.text_tokenizer import TextTokenizer
from dilqur.tokenizer.word_counts import Source, count_words, refuse_other_scripts, word_weights

# a file's source: its name without endings and without the number of a part: wiki-00003.jsonl.zst is wiki
ENDINGS = re.compile(
    rf"(?i)([-_.]\d+)?({'|'.join(map(re.escape, FORMATS))})({'|'.join(map(re.escape, COMPRESSIONS))})?$"
)
Size = Annotated[int, Field(ge=256, le=2**31 - 1)]


class StatedSource(TypedDict, total=False):
    __pydantic_config__ = {"extra": "forbid"}
    name: Required[str]
    input: Required[list[Documents]]
    weight: Annotated[float, Field(gt=0)]


@dataclass(kw_only=True)
class TokenizerSettings(StageSettings, ReadingSettings):
    input: list[Documents] | None = setting(
        "files, folders or globs to learn the merges from; files of one name are one source", default=None
    )
    sources: list[StatedSource] | None = setting(
        "instead: {name: …, input: […], weight: share of the words}; weight for all or none", default=None
    )
    source_temperature: Annotated[float, Field(ge=0, le=1)] = setting(
        "without weights a source counts (its words) ** this: 1 as it is, 0 all alike", default=0.5
    )
    vocab_size: Size | None = setting("bytes and merges, without the control tokens", default=None)
    vocab_sizes: list[Size] | None = setting(
        "several, each a multiple of 128: trained once, in OUTPUT_DIR/SIZE", default=None
    )
    base_tokenizer: TokenizerPath | None = setting("extend this one: byte-level BPE", default=None)
    new_tokens: list[Annotated[int, Field(ge=1)]] | None = setting(
        "tokens to add to base_tokenizer; several: each in OUTPUT_DIR/NUMBER", default=None
    )
    pre_tokenizer: Literal["llama3", "llama3_marks"] | None = setting(
        "what cuts text into words; llama3_marks for scripts with combining vowels; none: llama3, or the base's",
        default=None,
    )
    control_tokens: Literal["llama3", "encoder"] = setting(
        "Llama 3's 256; encoder: 128, with [CLS], [SEP], [MASK] and [PAD]", default="llama3"
    )
    min_frequency: Annotated[int, Field(ge=1)] = setting("a pair seen less often is not merged", default=1)
    count_exponent: Annotated[float, Field(gt=0, le=1)] = setting("a word seen n times counts n ** this", default=0.75)
    unseen_words: Annotated[float, Field(ge=0)] = setting(
        "sightings that a certain word counts for, seen or not; 0: only what was seen", default=3.0
    )
    mixed_scripts: bool = setting("sources may be in different scripts", default=False)
    sample_bytes: Annotated[int, Field(ge=1)] = setting(
        "on disk; of a larger corpus a sample is counted, an equal part of each source", default=2_000_000_000
    )
    num_proc: Annotated[int, Field(ge=1)] | None = setting(
        "processes that count words; none: one a core", default=None, on_resume="free"
    )
    model_max_length: Annotated[int, Field(ge=1)] = setting("noted in tokenizer_config.json", default=131_072)


def check(settings):
    """(the Sources, the Extension of a base or None). Raises InputError."""
    if bool(settings.input) == bool(settings.sources):
        raise InputError("give either --input or, in a recipe, sources (a list of {name, input, weight})")
    given = [key for key in ("vocab_size", "vocab_sizes", "new_tokens") if getattr(settings, key) is not None]
    if len(given) != 1:
        raise InputError(
            f"{' and '.join(given) or 'vocab_size'} {'exclude each other' if given else 'missing'}: give one of vocab_size "
            f"(one tokenizer), vocab_sizes (a sweep), new_tokens (an extension of base_tokenizer)"
        )
    if (settings.base_tokenizer is None) != (settings.new_tokens is None):
        raise InputError("base_tokenizer and new_tokens belong together: what to extend, and by how many tokens")
    if settings.base_tokenizer and settings.pre_tokenizer:
        raise InputError("pre_tokenizer: an extension cuts text as its base does; leave the key out")
    if settings.base_tokenizer and settings.control_tokens != "llama3":
        raise InputError("control_tokens: an extension keeps its base's; leave the key out")
    for key in ("vocab_sizes", "new_tokens"):
        sizes = getattr(settings, key) or []
        if len(set(sizes)) < len(sizes) or getattr(settings, key) == []:
            raise InputError(f"{key}: {sizes}: give each size once, and at least one")
    if wrong := [size for size in settings.vocab_sizes or [] if size % 128]:
        raise InputError(
            f"vocab_sizes: {wrong[0]} is no multiple of 128 (tensor cores); {-(-wrong[0] // 128) * 128} is"
        )
    extension = Extension(TextTokenizer(settings.base_tokenizer)) if settings.base_tokenizer else None
    return sources_of(settings), extension


def sources_of(settings):
    """[Source] of the settings. InputError where a file is in two of them, or only some have a weight."""
    stated = settings.sources or []
    if len({"weight" in source for source in stated}) > 1:
        raise InputError("sources: a weight for each of them, or for none")
    if settings.input:
        found = {}
        for file in expand(settings.input):
            found.setdefault(ENDINGS.sub("", file), []).append(file)
        short = [name.split("/")[-1] for name in found]
        names = [s if short.count(s) == 1 else long for s, long in zip(short, found, strict=True)]
        return [Source(name, files) for name, files in zip(names, found.values(), strict=True)]
    sources, owners = [], {}
    for source in stated:
        name, files = source["name"], expand(source["input"])
        if not name.strip() or name in [s.name for s in sources]:
            raise InputError(f"sources: the name {name!r} must not be empty, and must be there only once")
        for file in files:
            if (owner := owners.setdefault(file, name)) != name:
                raise InputError(f"sources: {file} is in {owner} and in {name}: take it out of one of them")
        sources.append(Source(name, files, source.get("weight")))
    return sources


def save(merges, folder, settings):
    """The files of a new tokenizer that AutoTokenizer reads."""
    from transformers import PreTrainedTokenizerFast

    if settings.control_tokens == "llama3":
        make, roles = llama3_tokenizer, {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
        roles["chat_template"] = CHAT_TEMPLATE
    else:  # a document begins and ends with what BERT calls so
        make, roles = encoder_tokenizer, {"bos_token": CLS, "eos_token": SEP, "pad_token": bert_tokens.PAD}
        roles |= {"cls_token": CLS, "sep_token": SEP, "mask_token": MASK}
    PreTrainedTokenizerFast(
        tokenizer_object=make(merges, settings.pre_tokenizer or "llama3"),
        model_max_length=settings.model_max_length,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        **roles,
    ).save_pretrained(folder)


def save_extension(extension, merges, folder):
    """The base's files, with a longer tokenizer.json."""
    from dilqur.tokenizer.files import copy_tokenizer

    path = extension.base.path
    copy_tokenizer(path.parent if path.name == "tokenizer.json" else path, folder)
    (folder / "tokenizer.json").write_text(extension.tokenizer_json(merges), encoding="utf-8")


def about(tokenizer, extension):
    """What the manifest says of a saved TextTokenizer."""
    ordinary = tokenizer.backend.get_vocab(with_added_tokens=False)
    special = [t.content for t in tokenizer.backend.get_added_tokens_decoder().values() if t.special]
    size = len(ordinary.keys() - special)
    return {
        "vocab_size": size,
        **({"new_tokens": size - len(extension.vocabulary.keys() - special)} if extension else {}),
        "special_tokens": len(special),
        "size": tokenizer.size,
        "tokenizer_sha256": tokenizer.hash,
    }


@program(TokenizerSettings, check, kind="tokenizer")
def main(settings, stage, checked):
    sources, extension = checked
    stage.open()
    cut = extension.words if extension else regex.compile(PATTERNS[settings.pre_tokenizer or "llama3"]).findall
    num_proc = settings.num_proc or cores()
    bad = count_words(sources, settings, cut, settings.sample_bytes, num_proc, f"{stage.name}: count")
    if not settings.mixed_scripts:
        refuse_other_scripts(sources)

    sizes = sorted(settings.vocab_sizes or settings.new_tokens or [settings.vocab_size])
    weights, plain, added = word_weights(
        sources, settings.source_temperature, settings.count_exponent, settings.unseen_words
    )
    counts, factor = whole_counts(weights, plain)
    least = 1 + round((settings.min_frequency - 1) * factor)
    if extension:
        merges = extension.learn(counts, sizes[-1], least)
        reached = extension.new_tokens(merges)
    else:
        merges, reached = learn_merges(counts, sizes[-1], least)
    if reached < sizes[-1]:
        what = "new tokens" if extension else "tokens"
        print(
            f"warning: {sizes[-1]:,} {what} were asked for, and this text gives {reached:,} with min_frequency "
            f"{settings.min_frequency}: {stage.folder} has those; more text gives more",
            file=sys.stderr,
        )

    made = {}
    with atomic_files(stage.folder) as part:
        for size in sizes:
            folder = part if len(sizes) == 1 else part / str(size)
            folder.mkdir(exist_ok=True)
            if extension:
                save_extension(extension, extension.cut(merges, size), folder)
            else:
                save(cut_merges(merges, size), folder, settings)
            made[size] = about(TextTokenizer(folder), extension)
    result = {
        "documents": sum(source.documents for source in sources),
        "utf8_bytes": sum(source.utf8_bytes for source in sources),
        "bad_records": bad,
        "sources": {source.name: source.about() for source in sources},
        "words": len(weights) - added,
        "likely_words_added": added,
        "weight_to_count": factor,
        **(made[sizes[0]] if len(sizes) == 1 else {"sizes": made}),
    }
    stage.finish(result)
    text = f"{result['utf8_bytes'] / 1e6:.2f} MB of text"
    for size, fields in made.items():
        where = stage.folder if len(sizes) == 1 else stage.folder / str(size)
        what = f"{fields['new_tokens']:,} new tokens after" if extension else f"{fields['vocab_size']:,} tokens +"
        print(f"{where}: {what} {fields['special_tokens']} special tokens, from {text}")


if __name__ == "__main__":
    main()
