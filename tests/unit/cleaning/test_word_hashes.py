"""word_hashes: equal numbers for equal words, other numbers for other words, in every process."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dilqur.cleaning.word_hashes import ngram_hashes, word_hashes


@pytest.mark.parametrize(
    "text",
    [
        "Bakı, şəhər!",
        "BAKI ŞƏHƏR",
        "«bakı» — (şəhər)",
        "baki\nşəhər",
        " \tBakı…şəhər ",
        "BAKİ şəhər",
        "BAKI\u0307 şəhər",
    ],
)
def test_case_and_punctuation_make_no_other_word(text):
    assert word_hashes(text).tolist() == word_hashes("Bakı şəhər").tolist()


def test_unfolded_words_are_what_stands_between_white_space():
    one, two, three = word_hashes("Bakı, bakı Bakı,", folded=False)
    assert one == three != two


@given(st.text())
def test_there_are_as_many_as_words(text):
    assert len(word_hashes(text, folded=False)) == len(text.replace("\u0307", "").split())


@given(st.lists(st.text("abcəı1", min_size=1), min_size=1))
def test_words_are_equal_exactly_where_their_hashes_are(words):
    hashes = word_hashes(" ".join(words), folded=False).tolist()
    assert len(hashes) == len(words) and len(set(hashes)) == len(set(words))
    assert [word_hashes(word, folded=False).tolist() for word in words] == [[h] for h in hashes]


@given(st.integers(0, 30), st.integers(1, 15))
def test_ngrams_are_equal_exactly_where_their_words_are(count, n):
    words = word_hashes(" ".join("ab"[i * i % 5 % 2] for i in range(count)))
    grams = ngram_hashes(words, n).tolist()
    plain = [tuple(words[i : i + n].tolist()) for i in range(count - n + 1)]
    assert len(grams) == len(plain)
    assert [grams.index(g) for g in grams] == [plain.index(g) for g in plain]


def test_there_is_no_word_in_nothing():
    for text in ("", " ", "…!", "\u0307"):
        assert word_hashes(text).dtype == np.uint64 and len(word_hashes(text)) == 0


def test_a_text_longer_than_the_table_of_powers_is_hashed_like_a_short_one():
    text = "bir iki " * 200_000  # 1.6 M characters; the table holds 1 M at first
    assert word_hashes(text)[-2:].tolist() == word_hashes("bir iki").tolist()


def test_another_process_computes_the_same_numbers():
    code = "from dilqur.cleaning.word_hashes import *; print(ngram_hashes(word_hashes('Bir, iki, üç'), 2).tolist())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(ngram_hashes(word_hashes("Bir, iki, üç"), 2).tolist())
