"""recipe_patterns: a pattern that cannot work is named, instead of a traceback or a program that stands still."""

import pytest

from dilqur.cleaning.recipe_patterns import compiled_pattern, timed_matches
from dilqur.common.errors import InputError


def test_line_ends_are_where_a_line_ends():
    matches = timed_matches(compiled_pattern("^b.*$", "patterns"), "abc\nbc\ncb", "patterns")
    assert [match.span() for match in matches] == [(4, 6)]


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("(Ana", "no regular expression: missing )"),
        (r"\p{Script=Xyz}", "no regular expression: unknown property value"),
        (7, "no regular expression"),
        ("a*", "matches the empty line"),
        ("^$", "matches the empty line"),
    ],
)
def test_a_pattern_that_could_not_work_is_refused(pattern, words):
    with pytest.raises(InputError) as problem:
        compiled_pattern(pattern, "pii_patterns.fin")
    assert str(problem.value).startswith(f"pii_patterns.fin: {pattern!r} ") and words in str(problem.value)


def test_a_pattern_that_never_ends_is_named(monkeypatch):
    monkeypatch.setattr("dilqur.cleaning.recipe_patterns.SECONDS", 0.2)  # a sound pattern needs microseconds here
    pattern = compiled_pattern(r"(\w+\s?)+!$", "patterns")
    with pytest.raises(InputError, match=r"patterns: .* takes over 0[.]2 s on one text of 10,003 characters"):
        timed_matches(pattern, "ab cd efg " * 1000 + "! a", "patterns")
