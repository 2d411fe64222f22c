"""Whole words are masked, the same for every encoder; how often they were seen and how they end."""

import collections

import numpy as np
import pytest

from dilqur.evals.masked_words import classes, count_words, passages

TEXT = "Bakı Azərbaycanın paytaxtıdır, ən böyük şəhəridir. Şəhər Xəzər dənizinin sahilindədir (1918-ci ildən)."

WORDS = ["Bakı", "Azərbaycanın", "paytaxtıdır", "ən", "böyük", "şəhəridir", "Şəhər", "Xəzər", "dənizinin"]
WORDS += ["sahilindədir", "ci", "ildən", "Bir", "söz"]


def test_passages_hold_every_word_once_and_mask_words_alone():
    cut = passages([TEXT, "Bir söz"], 4, 1.0, seed=1)
    words = [p.text[a:b] for p in cut for a, b in p.words]
    assert words == WORDS
    assert "1918" not in words and "Azərbaycanın" in words and "ci" in words
    assert [p.document for p in cut] == [0, 0, 0, 1] and all(len(p.words) <= 4 for p in cut)


def test_the_drawn_words_depend_on_their_place_and_the_seed_alone():
    texts = [TEXT] * 200
    drawn, whole = (passages(texts, n, 0.15, seed=3) for n in (5, 1000))
    of = [collections.Counter((p.document, p.text[a:b]) for p in ps for a, b in p.words) for ps in (drawn, whole)]
    assert of[0] == of[1]
    n = 200 * (len(WORDS) - 2)
    assert abs(of[0].total() / n - 0.15) < 4 * np.sqrt(0.15 * 0.85 / n)
    assert passages(texts, 5, 0.15, seed=4) != drawn


def test_only_the_wanted_words_are_counted():
    assert count_words([TEXT, "Bakı, Bakı!"], {"Bakı", "ildən"}) == {"Bakı": 3, "ildən": 1}


def test_how_often_and_which_ending():
    seen = collections.Counter({"ev": 1, "kitablar": 10, "dağlar": 999, "və": 1000})
    often, ending, endings = classes({"ev", "kitablar", "dağlar", "və", "yeni", "evlərdən"}, seen)
    assert often == {
        "yeni": "never",
        "evlərdən": "never",
        "ev": "1 to 9 times",
        "kitablar": "10 to 99",
        "dağlar": "100 to 999",
        "və": "1,000 or more",
    }
    assert ending["kitablar"] == ending["dağlar"] == "lar" and ending["ev"] is None and endings[0] == "lar"


@pytest.mark.parametrize(("word", "ending"), [("evlərdən", "dən"), ("ən", None), ("evin", "in"), ("kitab", None)])
def test_of_given_suffixes_the_longest_counts_and_something_is_before_it(word, ending):
    assert classes({word}, collections.Counter(), ["ən", "dən", "in"])[1][word] == ending
