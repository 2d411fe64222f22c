"""normalise: every way to write a text becomes one, and the result stays as it is."""

import time
import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dilqur.cleaning.normalise import checked_replacements, normalise
from dilqur.common.errors import InputError

SCHWAS = {"ǝ": "ə", "Ǝ": "Ə", "ә": "ə", "Ә": "Ə"}  # the Latin turned e, and the Cyrillic schwa

# Characters that meet each other badly: marks, the i's and schwas, spaces, line ends, invisible ones, Hangul parts.
ODD = st.text(
    alphabet="iıIİeəǝәƏşsç\u0307\u0301\u0323\u0327\u0326 \t\u00a0\u3000\n\r\u2028\x0c\x00\u200b\u200d\ufeff\u1100\u1161k"
)


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("Bak\u0131\u200b \ufeffşə\u00adhəri\x07", "Bakı şəhəri"),  # zero-width, BOM, soft hyphen, bell
        ("\u2067bir\u2069 \u061ciki", "bir iki"),  # direction marks
        ("I\u0307zmir", "İzmir"),  # NFC: one character for the dotted capital
        ("bir\r\niki\rüç\u2028dörd", "bir\niki\nüç\ndörd"),
        ("son\x0cbaş\x85beş", "son\nbaş\nbeş"),  # a page ends, and its last word does not run into the next
        ("  bir \u00a0 iki \t üç  ", "bir iki üç"),
        ("bir \n iki\t\n\tüç", "bir\niki\nüç"),
        ("bir\n\n\n\niki", "bir\n\niki"),
        ("bir\n \n\u00a0\n\niki", "bir\n\niki"),
        ("ailə 👨\u200d👩\u200d👧", "ailə 👨\u200d👩\u200d👧"),  # emoji are joined by an invisible character
        ("می\u200cخواهم", "می\u200cخواهم"),  # and Persian words parted by one
        ("", ""),
        (" \n\u200b ", ""),
    ],
)
def test_text_is_made_one_kind(raw, expected):
    assert normalise(raw) == expected


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("i\u0307sti\u0307qlal", "istiqlal"),  # "İSTİQLAL".lower() in Python
        ("I\u0307stiqlal", "İstiqlal"),
        ("BI\u0307R", "BİR"),
        ("ı\u0307ki", "iki"),
        ("i\u0307\u0307ki", "iki"),
        ("i\u0307\u0301", "í"),  # what is left is composed again
        ("ż e\u0307 g\u0307", "ż ė ġ"),  # the dot belongs to these
        ("Iraq, ılıq, ildırım, İran", "Iraq, ılıq, ildırım, İran"),
    ],
)
def test_dotted_i_is_repaired_where_it_is_asked_for(raw, expected):
    assert normalise(raw, dotted_i=True) == expected


def test_without_it_the_dot_stays():
    assert normalise("i\u0307sti") == "i\u0307sti"


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("Mǝn gǝldim, Ǝli", "Mən gəldim, Əli"),
        ("bәli, nә, Әli", "bəli, nə, Əli"),  # Cyrillic letters inside Latin words
        ("мәктәб вә китаб", "мәктәб вә китаб"),  # and inside Cyrillic ones
        ("ә", "ә"),  # alone it could be either
        ("e\u0331ә", "e\u0331ə"),  # a mark does not part a word
    ],
)
def test_look_alikes_become_the_letter_that_is_meant(raw, expected):
    assert normalise(raw, replace=checked_replacements(SCHWAS)) == expected


def test_a_replacement_may_be_longer_or_a_sign():
    assert normalise("№5 “bir”", replace=checked_replacements({"№": "No.", "“": '"', "”": '"'})) == 'No.5 "bir"'


@given(st.one_of(st.text(), ODD), st.booleans(), st.sampled_from([{}, SCHWAS, {"ş": "ș", "é": "e"}, {"k": ""}]))
@example("ǝ\u0301é", True, {"ǝ": "e", "é": "z"})
@example("ş\u0327", False, {"ş": "ș"})
@example(" k k ", False, {"k": ""})
@example("\nk\nk\n", False, {"k": ""})
@example("a" + "\u0344" * 30, False, {})
@example("a" + ("\u0301" * 20 + "k") * 3, False, {"k": ""})
@example("a" + "\u0323\u0301" * 40 + "b" + "\u0301" * 30 + "c" * 9, True, {})
def test_normalising_twice_is_normalising_once(text, dotted_i, replace):
    once = normalise(text, dotted_i, checked_replacements(replace))
    assert normalise(once, dotted_i, replace) == once
    assert unicodedata.is_normalized("NFC", once)
    assert "  " not in once and "\r" not in once and "\n\n\n" not in once and once == once.strip()


def test_a_letter_under_a_heap_of_marks_takes_no_longer_than_other_text():
    started = time.perf_counter()
    assert normalise("a" + "\u0301\u0323" * 500_000 + " b") == normalise("a" + "\u0301\u0323" * 15) + " b"
    assert time.perf_counter() - started < 10  # NFC of all of them would take hours


def test_marks_that_a_language_writes_are_all_kept():
    for text in ("שָׁלוֹם עֲלֵיכֶם " * 40, "مُحَمَّدٌ " * 40, "ที่นี่ " * 40, "ệ" * 90):
        assert normalise(unicodedata.normalize("NFD", text)) == unicodedata.normalize("NFC", text).strip()
    pile = unicodedata.normalize("NFC", "x" + "\u0316\u0301" * 15)  # thirty
    assert normalise(f"{pile} " * 9) == " ".join([pile] * 9)


@given(ODD)
def test_no_visible_character_is_lost(text):
    def visible(text):
        return [c for c in unicodedata.normalize("NFC", text) if c.isprintable() and not c.isspace()]

    assert visible(normalise(text)) == visible("".join(c for c in text if c not in "\u200b\ufeff\x00"))


@pytest.mark.parametrize(
    ("replace", "words"),
    [
        ({"ab": "c"}, "'ab': 'c' should be one visible character"),
        ({"a": 7}, "'a': 7 should be one visible character"),
        ({"a": "b", "b": "c"}, "'a' becomes 'b', in which 'b' would be replaced again"),
        ({"a": "aa"}, "'a' becomes 'aa'"),
        ({"a": " b"}, "has a space at an end"),
        ({"a": "\u0301"}, "has a space at an end, an invisible character, or is not NFC"),
        ({"a": "e\u0301"}, "is not NFC"),
    ],
)
def test_a_table_that_could_not_work_is_refused(replace, words):
    with pytest.raises(InputError, match="unicode_replace") as problem:
        checked_replacements(replace, "unicode_replace")
    assert words in str(problem.value)
