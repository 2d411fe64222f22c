"""Merges learned from word counts: those of `tokenizers` on the text itself; nested sizes; extensions that leave a base as it was."""

import collections
import json
import random
import unicodedata

import pytest
import regex
from conftest import CORPUS

from dilqur.common.errors import InputError
from dilqur.common.paths import expand
from dilqur.data.documents import read
from dilqur.tokenizer.bpe_training import (
    Extension,
    byte_level,
    cut_merges,
    learn_merges,
    llama3_tokenizer,
    whole_counts,
)
from dilqur.tokenizer.llama3 import PATTERN, PATTERN_WITH_MARKS, PATTERNS
from dilqur.tokenizer.text_tokenizer import TextTokenizer


@pytest.fixture(scope="module")
def texts():
    return [document.text for document in read(expand([str(CORPUS / "az")]))]


@pytest.fixture(scope="module")
def counts(texts):
    return collections.Counter(word for text in texts for word in regex.findall(PATTERN, text))


def hugging_face(texts, vocab_size):
    """What `tokenizers` learns from the text, by its own pre-tokenizer."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, min_frequency=1, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


@pytest.mark.parametrize("vocab_size", [256, 300, 1000, 4000])
def test_counts_give_the_merges_that_the_text_itself_gives(texts, counts, vocab_size):
    vocabulary, merges = hugging_face(texts, vocab_size)
    learned, size = learn_merges(counts, vocab_size, 1)
    assert (learned, size) == (merges, vocab_size)
    ours = json.loads(llama3_tokenizer(learned, "llama3").to_str())["model"]
    assert ours["vocab"] == vocabulary
    assert [tuple(pair) for pair in ours["merges"]] == merges


def test_a_smaller_size_cut_from_the_largest_is_the_one_trained_by_itself(counts):
    largest, _ = learn_merges(counts, 6000, 1)
    for size in (256, 257, 512, 1024, 3000, 5999):
        alone, reached = learn_merges(counts, size, 1)
        assert (cut_merges(largest, size), reached) == (alone, size)


def test_cutting_counts_tokens_and_not_merges():
    # ("ab", "c") and ("a", "bc") make the same token
    merges = [("a", "b"), ("b", "c"), ("ab", "c"), ("a", "bc"), ("abc", "d")]
    assert cut_merges(merges, 259) == merges[:3]
    assert cut_merges(merges, 260) == merges


def test_weights_become_whole_numbers_in_proportion():
    weights = {f"w{i}": i / 7 for i in range(1, 5000)}
    counts, factor = whole_counts(weights, exact=False)
    assert factor == 8
    assert abs(sum(counts.values()) / sum(weights.values()) / factor - 1) < 0.001  # fractions go up as often as down
    assert all(abs(counts.get(word, 0) - weight * factor) < 1 for word, weight in weights.items())
    assert whole_counts({"a": 3.0, "b": 5.0}, exact=True) == ({"a": 3, "b": 5}, 1)
    few, factor = whole_counts({"a": 3e6, "b": 1e6, "c": 1.0}, exact=True, max_fed=4000)
    assert 0.9 < factor * 1000 < 1.1
    assert few["a"] in (2999, 3000)


# -- extension --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["specials last", "ids in the vocabulary", "not ignoring merges"])
def base(request, texts, tmp_path_factory):
    """A base with its special tokens behind the vocabulary as Llama 3's are, or as GPT-2's file writes them."""
    english = [document.text for document in read(expand([str(CORPUS / "en")]))]
    words = collections.Counter(word for text in english for word in regex.findall(PATTERN, text))
    spec = json.loads(llama3_tokenizer(learn_merges(words, 1200, 1)[0], "llama3").to_str())
    if request.param == "ids in the vocabulary":
        spec["model"]["vocab"] |= {token["content"]: token["id"] for token in spec["added_tokens"]}
    if request.param == "not ignoring merges":
        spec["model"]["ignore_merges"] = False
    path = tmp_path_factory.mktemp("base") / "tokenizer.json"
    path.write_text(json.dumps(spec))
    return TextTokenizer(path)


@pytest.fixture
def extended(base, counts, tmp_path):
    def extend(new_tokens):
        extension = Extension(base)
        merges = extension.learn(counts, new_tokens, 1)
        path = tmp_path / f"{new_tokens}.json"
        path.write_text(extension.tokenizer_json(merges))
        return TextTokenizer(path), extension, merges

    return extend


def test_an_extension_keeps_every_id_and_adds_exactly_the_tokens_asked_for(base, extended):
    tokenizer, extension, merges = extended(500)
    assert tokenizer.size == base.size + 500
    assert extension.new_tokens(merges) == 500
    old, new = (t.backend.get_vocab(with_added_tokens=True) for t in (base, tokenizer))
    assert old.items() <= new.items()
    assert sorted(set(new.values()) - set(old.values())) == list(range(base.size, base.size + 500))
    special = [{t.content: i for i, t in x.backend.get_added_tokens_decoder().items()} for x in (base, tokenizer)]
    assert special[0] == special[1]


def test_text_without_new_pairs_is_encoded_as_before_and_other_text_shorter(base, extended, texts):
    tokenizer, _, _ = extended(500)
    same, shorter = 0, 0
    for text in [*texts[:40], *(document.text for document in read(expand([str(CORPUS / "en")])))]:
        for word in regex.findall(PATTERN, text):
            before, after = base.encode(word), tokenizer.encode(word)
            if all(id < base.size for id in after):
                assert after == before
                same += 1
            else:
                assert len(after) < len(before)
                assert tokenizer.decode(after) == word
                shorter += 1
    assert same > 1000 < shorter


def test_an_extension_counts_the_words_that_its_base_cuts(base, texts):
    extension = Extension(base)
    assert extension.words != extension.words_of_pre_tokenizer
    for text in [*texts[:20], "a\r\n\n  b\u00a0c 12345!?'ll"]:
        assert extension.words(text) == extension.words_of_pre_tokenizer(text)


def test_extensions_are_nested(extended):
    _, extension, largest = extended(600)
    for size in (1, 100, 599):
        assert extension.cut(largest, size) == extended(size)[2]


def test_control_tokens_in_text_stay_text_in_an_extension(base, extended):
    tokenizer, _, _ = extended(300)
    special = {i for i, t in tokenizer.backend.get_added_tokens_decoder().items() if t.special}
    for content in ("<|eot_id|>", " <|begin_of_text|>x", "a<|end_of_text|>\n<|reserved_special_token_5|>"):
        ids = tokenizer.encode(content)
        assert not special & set(ids)
        assert tokenizer.decode(ids) == content


def test_a_base_that_is_not_byte_level_bpe_is_refused(tmp_path):
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    word_piece = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    sentence_piece = Tokenizer(models.BPE({"▁": 0, "a": 1, "▁a": 2}, [("▁", "a")], byte_fallback=True))
    sentence_piece.pre_tokenizer = pre_tokenizers.Metaspace()
    folding = llama3_tokenizer([], "llama3")
    folding.normalizer = normalizers.NFKC()
    for tokenizer, problem in (
        (word_piece, "its model is WordPiece, not byte-level BPE"),
        (sentence_piece, "BPE of characters (as SentencePiece writes it), not byte-level BPE"),
        (folding, "it normalises text (NFKC)"),
    ):
        path = tmp_path / "tokenizer.json"
        path.write_text(tokenizer.to_str())
        with pytest.raises(InputError, match=problem.replace("(", r"\(").replace(")", r"\)")):
            Extension(TextTokenizer(path))


# -- text ↔ ids -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pre_tokenizer", PATTERNS)
def test_regex_cuts_text_as_the_pre_tokeniser_does(pre_tokenizer):
    cut = regex.compile(PATTERNS[pre_tokenizer]).findall
    pieces = llama3_tokenizer([], pre_tokenizer).pre_tokenizer.pre_tokenize_str
    draw = random.Random(5)
    for _ in range(3000):
        text = random_text(draw)
        assert [byte_level(word) for word in cut(text)] == [piece for piece, _ in pieces(text)]


def test_marks_stay_in_their_word():
    assert regex.findall(PATTERN_WITH_MARKS, "हिन्दी में क्‍या") == ["हिन्दी", " में", " क्‍या"]
    assert len(regex.findall(PATTERN, "हिन्दी")) > 1


ALPHABETS = (
    "abcxyz ABC",
    "əıİiİğüşöçƏĞ\u0307",
    " \t\n\r\u00a0\u2028\x85",
    "0123456789٣४",
    "!?.,'’\"()<|>_-",
    "👩\u200d🚀🇦🇿☺️",
    "\u0301\u0327\u200c\u200d",
    "日本語한국กำ",
)


def random_text(draw):
    """A few words of letters of several scripts, spaces, digits, marks, emoji, and any characters that Unicode 14 knows: what was
    assigned since then is a letter to one library and not yet to the other."""
    parts = []
    for _ in range(draw.randrange(1, 8)):
        if draw.random() < 0.3:
            some = (chr(draw.randrange(0x110000)) for _ in range(3))
            parts += [c for c in some if unicodedata.category(c) not in ("Cn", "Cs")]
        else:
            parts += draw.choices(draw.choice(ALPHABETS), k=draw.randrange(1, 6))
    return "".join(parts)
