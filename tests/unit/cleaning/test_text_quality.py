"""text_quality: each measure says what its name says, in any script."""

import math
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dilqur.cleaning.text_quality import (
    BoilerplateLines,
    CharacterCounter,
    line_shares,
    repeated_line_share,
    repeated_ngram_share,
)
from dilqur.common.errors import InputError

WORDS = st.lists(st.sampled_from(["bir", "iki", "üç", "dörd", "ə", "I", "ı"]), max_size=40).map(" ".join)


def test_a_line_that_comes_again_counts_with_its_characters():
    assert repeated_line_share("bir\niki\nbir") == 3 / 9
    assert repeated_line_share("bir\n\n\niki") == 0  # empty lines are no repetition
    assert repeated_line_share("") == 0


@given(WORDS, st.integers(1, 7))
def test_repeated_ngrams_are_those_a_plain_loop_finds(text, n):
    words = text.split()
    seen, covered = set(), set()
    for start in range(len(words) - n + 1):
        gram = tuple(words[start : start + n])
        covered.update(range(start, start + n) if gram in seen else ())
        seen.add(gram)
    assert repeated_ngram_share(text, n) == len(covered) / max(1, len(words))


def test_characters_are_counted_by_what_they_are():
    shares = CharacterCounter()("Əli 42 yaşında, ₼5-ə!")
    assert shares.letters == 11 / 18
    assert shares.digits == 3 / 18
    assert shares.symbols == 1 / 18
    assert shares.upper_case == 1 / 11
    assert shares.mean_word_length == 14 / 5  # Əli, 42, yaşında, 5, ə
    assert shares.alphabetic_words == 3 / 4  # all but 42
    assert shares.script == 1


@pytest.mark.parametrize(
    ("script", "text", "share"),
    [
        ("Latin", "Bakı şəhəri, İçərişəhər", 1),
        ("Latin", "Баку и Bakı", 4 / 9),
        ("Cyrillic", "Баку и Bakı", 5 / 9),
        ("Cyrillic", "мәктәб", 1),
        ("Arabic", "کتاب می\u200cخوانم ۱۲", 1),
        ("Georgian", "თბილისი Tbilisi", 1 / 2),
        ("Devanagari", "हिन्दी", 1),
        ("Han", "漢字かな", 1 / 2),
        ("Latin", "oʻzbekcha soʼz", 1),  # the modifier letters of Uzbek belong to all scripts
        ("Latin", "12 + 3", 0),
        ("latn", "ǝƏ", 1),
    ],
)
def test_the_share_of_a_script(script, text, share):
    assert CharacterCounter(script)(text).script == pytest.approx(share)


def test_a_script_that_is_none_is_refused():
    with pytest.raises(InputError, match="script: 'Latinn' is no script of Unicode"):
        CharacterCounter("Latinn")


def test_marks_do_not_part_a_word():
    assert CharacterCounter()("हिन्दी").mean_word_length == 6


def test_marks_are_part_of_the_letters_and_those_on_emoji_are_not():
    assert CharacterCounter()("हिन्दी में, 4 दिन").letters == 12 / 14
    assert CharacterCounter()("e\u0301").letters == 1
    assert CharacterCounter()("❤\ufe0f 1\ufe0f\u20e3").letters == 0


@given(st.text())
def test_shares_are_shares(text):
    shares = CharacterCounter("Latin")(text)
    assert all(0 <= share <= 1 for share in shares if share is not shares.mean_word_length)
    assert shares.mean_word_length <= len(text)
    assert all(0 <= share <= 1 for share in line_shares(text))
    kinds = shares.letters + shares.digits + shares.symbols
    assert kinds <= 1 or math.isclose(kinds, 1)


def test_lines_are_counted_by_how_they_begin_and_end():
    text = "• bir\n- iki\n\nDavamı var...\nCümlə bitdi.\nO dedi: «Gəl!»\nأين أنت؟\n" + "uzun " * 8
    shares = line_shares(text)
    assert shares.bullets == 2 / 7
    assert shares.ellipses == 1 / 7
    assert shares.sentences == 4 / 7
    assert shares.short == 6 / 7


# -- boilerplate ------------------------------------------------------------------------------------------------------


def test_lines_that_a_pattern_touches_go_and_the_rest_stays():
    boilerplate = BoilerplateLines(["^Ana səhifə", "(?i)cookie", "Paylaş\nFacebook\nTwitter"])
    text = "Ana səhifə | Xəbərlər\n\nMətn Ana səhifə haqqındadır.\nBu sayt COOKIE istifadə edir.\n\nSon.\nPaylaş\nFacebook\nTwitter"
    assert boilerplate.apply(text) == ("Mətn Ana səhifə haqqındadır.\n\nSon.", 5)
    assert boilerplate.apply("Təmiz mətn.") == ("Təmiz mətn.", 0)


def test_a_pattern_with_line_ends_around_it_takes_its_own_line_only():
    assert BoilerplateLines([r"\nMenyu\n"]).apply("bir\nMenyu\niki") == ("bir\niki", 1)


@pytest.mark.parametrize("pattern", [r"\n\n", r"\s{2,}"])
def test_a_good_line_is_not_lost_for_the_line_feed_at_its_end(pattern):
    text = "Yaxşı cümlə.\n\nO biri cümlə.\nSon."
    assert BoilerplateLines([pattern]).apply(text) == (text, 0)
    assert BoilerplateLines([pattern + "Son"]).apply("bir\n\nSon.\niki") == ("bir\n\niki", 1)


def test_a_pattern_that_only_looks_ahead_takes_the_line_it_stands_in():
    text = "bir\nbu kuki haqqındadır\niki"
    assert BoilerplateLines(["^(?=.*kuki)"]).apply(text) == ("bir\niki", 1)
    assert BoilerplateLines(["(?<=haqqındadır)$"]).apply(text) == ("bir\niki", 1)
    assert BoilerplateLines(["(?<=iki)$"]).apply(text) == ("bir\nbu kuki haqqındadır", 1)


def test_a_long_text_with_a_match_in_every_line_takes_no_minutes():
    text = "Menyu\nbir söz\n" * 100_000
    started = time.perf_counter()
    left, lines = BoilerplateLines(["^Menyu$"]).apply(text.strip())
    assert lines == 100_000 and left.count("\n") == 99_999
    assert time.perf_counter() - started < 10  # it would, were the lines counted from the start for every match


def test_lines_of_a_file_are_matched_in_full(tmp_path):
    (tmp_path / "lines.txt").write_text("Bütün hüquqlar qorunur.\n\n  # Menyu \n", encoding="utf-8")
    boilerplate = BoilerplateLines(files=[tmp_path / "lines.txt"])
    text = "Bütün hüquqlar qorunur.\nBütün hüquqlar qorunur. 2024\n# Menyu"
    assert boilerplate.apply(text) == ("Bütün hüquqlar qorunur. 2024", 2)


def test_a_pattern_that_could_not_work_is_refused():
    with pytest.raises(InputError, match="boilerplate_patterns: 'a\\*' matches the empty line"):
        BoilerplateLines(["a*"])


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match=r"none[.]txt: boilerplate lines: No such file"):
        BoilerplateLines(files=[tmp_path / "none.txt"])
