"""fertility: three rules of counting tokens per word, pooled over documents, on texts that can be counted by hand."""

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from dilqur.tokenizer.fertility import Batch, Counter, SetCounts, strip_punctuation


@pytest.fixture
def counters(tmp_path):
    """bytes: every byte a token. spaced: " ab" is a token, "ab" at a beginning is two."""
    vocabulary = {token: i for i, token in enumerate(["a", "b", "Ġ", ".", ",", "Ġa", "Ġab"])}
    made = {}
    for name, merges in (("bytes", []), ("spaced", [("Ġ", "a"), ("Ġa", "b")])):
        tokenizer = Tokenizer(models.BPE(vocabulary, merges))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        (tmp_path / name).mkdir()
        tokenizer.save(str(tmp_path / name / "tokenizer.json"))
        made[name] = Counter(tmp_path / name)
    return made


def counted(counters, *texts):
    return SetCounts.of([Batch(list(texts))], counters)


def test_the_three_rules_differ_in_punctuation_and_in_the_space_before_a_word(counters):
    figures = counted(counters, "ab ab, , ab.").figures(seed=0)["spaced"]
    # a b Ġab , Ġ , Ġab . are 8 tokens of 4 words
    assert figures["fertility"] == 2 and figures["tokens"] == 8
    # "ab ab ab" is a b Ġab Ġab, 4 tokens of 3 words: the lone comma is no word any more
    assert figures["fertility_stripped"] == pytest.approx(4 / 3, abs=1e-4)
    # ab | ab, | , | ab. are 2 + 3 + 1 + 3 tokens
    assert figures["fertility_word_by_word"] == pytest.approx(9 / 4)
    assert figures["words_per_131072_tokens"] == 65_536
    assert figures["words_kept_whole"] == 1 / 4, "the comma that stands alone"


@pytest.mark.parametrize(
    ("text", "stripped"),
    [
        ("«Salam», – dedi.", "Salam  dedi"),
        ("e-poçt d'Artanyan", "e-poçt d'Artanyan"),  # only at the ends
        ("(«a»)!? b…", "a b"),
        ("5 + 3 = 8$", "5 + 3 = 8$"),  # symbols are no punctuation
        ("...", ""),
    ],
)
def test_punctuation_goes_at_the_ends_of_words(text, stripped):
    assert strip_punctuation(text) == stripped


def test_documents_are_pooled_and_not_averaged(counters):
    figures = counted(counters, "a", "ab " * 9 + "ab").figures(seed=0)["bytes"]
    assert figures["fertility"] == round((1 + 29) / 11, 4)  # the mean of the ratios would be (1 + 2.9) / 2


def test_the_vocabulary_is_used_rarely_or_not_at_all(counters):
    figures = counted(counters, "a a a a a a", "ab").figures(seed=0)["bytes"]
    # a 7 times, Ġ 5 times, b once; four of seven ids never
    assert figures["vocab_share_used"] == round(3 / 7, 4) and figures["vocab_share_rare"] == round(5 / 7, 4)


def test_two_sets_are_together_what_all_their_documents_are(counters):
    one, two = counted(counters, "ab, ab", "a"), counted(counters, "b. ab ab")
    both = counted(counters, "ab, ab", "a", "b. ab ab")
    assert (one + two).text == both.text == {"documents": 3, "words": 6, "utf8_bytes": 15}
    assert (one + two).figures(seed=0) == both.figures(seed=0)


def test_the_difference_to_the_first_has_an_interval_of_its_own(counters):
    random = np.random.default_rng(0)
    texts = [" ".join(random.choice(["ab", "a", "bbbb"], random.integers(5, 50))) for _ in range(60)]
    figures = counted(counters, *texts).figures(seed=0)
    assert "differences" not in figures["bytes"]
    less = figures["spaced"]["differences"]["fertility"]
    assert less["difference"] == pytest.approx(figures["spaced"]["fertility"] - figures["bytes"]["fertility"], abs=1e-4)
    low, high = less["interval"]
    assert low < less["difference"] < high < 0
    assert figures["bytes"]["intervals"]["fertility"][0] < figures["bytes"]["fertility"]


def test_few_documents_have_figures_and_no_interval(counters):
    figures = counted(counters, *["ab ab"] * 9).figures(seed=0)["spaced"]
    assert figures["fertility"] == 1.5 and set(figures["intervals"].values()) == {None}
    assert counted(counters, *["ab ab"] * 10).figures(seed=0)["spaced"]["intervals"]["fertility"] == [1.5, 1.5]


def test_what_cannot_be_divided_is_none(counters):
    assert counted(counters, "... ,").figures(seed=0)["bytes"]["fertility_stripped"] is None
