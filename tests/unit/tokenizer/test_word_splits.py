"""word_splits: the pieces of a word as they are shown, and the words that cost the most."""

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from dilqur.common.errors import InputError
from dilqur.tokenizer import word_splits
from dilqur.tokenizer.text_tokenizer import TextTokenizer
from dilqur.tokenizer.word_splits import WordCounts, WordSplitter, choose_words, costly_words


def splitter(tmp_path, model, unknown=None, **parts):
    tokenizer = Tokenizer(model)
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return WordSplitter(TextTokenizer(tmp_path), unknown)


def test_a_byte_that_is_part_of_a_letter_is_shown_as_its_number(tmp_path):
    # byte-level BPE that knows " a" and " aş", and of ə (C9 99) only the bytes: É and Ļ are how it writes them
    vocabulary = {token: i for i, token in enumerate(["a", "Ġ", "Å", "Ł", "É", "Ļ", "Ġa", "ÅŁ", "ĠaÅŁ"])}
    model = models.BPE(vocabulary, [("Ġ", "a"), ("Å", "Ł"), ("Ġa", "ÅŁ")])
    split = splitter(tmp_path, model, pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False))
    assert split("aşə") == ["aş", "‹C9›", "‹99›"]
    assert split("əa") == ["‹C9›", "‹99›", "a"], "the space before is a token of its own, and not shown"


def test_the_byte_tokens_of_sentencepiece_are_shown_likewise(tmp_path):
    vocabulary = {"<unk>": 0, "▁": 1, "s": 2, "<0xC9>": 3, "<0x99>": 4}
    model = models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True)
    split = splitter(tmp_path, model, 0, pre_tokenizer=pre_tokenizers.Metaspace(), decoder=decoders.ByteFallback())
    assert split("sə") == ["s", "‹C9›", "‹99›"]


def test_wordpiece_is_shown_as_the_text_stands_there(tmp_path):
    model = models.WordPiece({"[UNK]": 0, "kitab": 1, "##lar": 2}, unk_token="[UNK]")
    parts = {"normalizer": normalizers.Lowercase(), "pre_tokenizer": pre_tokenizers.BertPreTokenizer()}
    split = splitter(tmp_path, model, 0, **parts)
    assert split("Kitablar") == ["Kitab", "lar"] and split("qələm") == ["[UNK]"]


def test_frequent_words_of_many_tokens_cost_the_most():
    frequent = [("və", 50), ("kitab", 20), ("nəticə", 9), ("evlər", 5), ("a|b", 1)]
    pieces = {
        "və": ["və"],
        "kitab": ["kit", "ab"],
        "nəticə": list("nəticə"),
        "evlər": list("evlər"),
        "a|b": list("a|b"),
    }
    costly = costly_words(frequent, pieces.__getitem__, n=3)
    # beyond a token each: və 0, kitab 20 × 1, nəticə 9 × 5, evlər 5 × 4, a|b 1 × 2; of equal ones the alphabet decides
    assert [(w["word"], w["count"], w["tokens"], w["extra_tokens"]) for w in costly] == [
        ("nəticə", 9, 6, 45),
        ("evlər", 5, 5, 20),
        ("kitab", 20, 2, 20),
    ]
    assert costly[2]["split"] == "kit·ab"


def test_words_to_look_at_are_frequent_and_of_every_length():
    frequent = [("və", 9), ("2024", 9), ("evlər", 8), ("bir", 7), ("kitabxanada", 6), ("dünyanın", 5)]
    assert choose_words(frequent) == ["evlər", "dünyanın", "kitabxanada"], "the most frequent short, middling, long one"
    assert choose_words([]) == []
    hindi = [("।", 9), ("के", 8), ("किताब", 7), ("विद्यालय", 6), ("क्‍ष", 5)]
    assert choose_words(hindi) == ["किताब", "विद्यालय"], "vowel signs are part of a word's letters"
    assert choose_words([("می\u200cشود", 3)]) == ["می\u200cشود"], "and so is what joins letters"


def test_words_are_counted_in_bounded_memory(monkeypatch):
    monkeypatch.setattr(word_splits, "KEPT_WORDS", 100)
    counts = WordCounts()
    for start in range(0, 1000, 50):
        counts.add(["və"] * 3 + ["də"] * 2 + [f"söz{'a' * (start + i)}" for i in range(50)])
        assert len(counts.counts) <= 100
    assert counts.most_frequent(2) == [("və", 60), ("də", 40)] and not counts.complete


def test_words_are_of_letters():
    counts = WordCounts()
    counts.add(["e-poçt", "2009-cu", "www.az", "Bakı'nın", "-", "5", "ə"])
    assert dict(counts.most_frequent(9)).keys() == {"e-poçt", "Bakı'nın", "ə"} and counts.complete


def test_a_tokenizer_without_a_token_for_a_word_is_named(tmp_path):
    split = splitter(tmp_path, models.WordPiece({"a": 0}), pre_tokenizer=pre_tokenizers.Whitespace())
    with pytest.raises(InputError, match="this tokenizer cannot encode the text"):
        split("söz")
