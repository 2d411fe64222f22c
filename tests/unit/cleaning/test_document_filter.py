"""document_filter: the steps work on one way to write a text, and what was to be hidden is shown nowhere."""

import hashlib
import unicodedata

import pytest

from dilqur.cleaning.document_filter import DocumentFilter, FilterSettings
from dilqur.cleaning.text_quality import _sentence_ends
from dilqur.cleaning.word_hashes import _character_values

GOOD = "Bakı Xəzər dənizinin sahilində yerləşən qədim və gözəl bir şəhərdir."
QUESTION = "Azərbaycan Xalq Cümhuriyyəti hansı ildə və hansı şəhərdə elan olunmuşdur?"


def reasons(texts, **settings):
    filter_ = DocumentFilter(FilterSettings(**settings))
    return [filter_.apply(text)[1] for text in texts]


@pytest.mark.parametrize(
    ("written", "settings"),
    [
        (unicodedata.normalize("NFD", QUESTION), {}),
        (QUESTION.replace("Cümhuriyyəti", "Cümhu\u00adriyyəti").replace("hansı", "\ufeffhansı"), {}),
        (QUESTION.replace("ildə", "i\u0301ldə"), {}),
        (QUESTION.replace("ə", "ǝ"), {"replace": {"ǝ": "ə"}}),
        (QUESTION.replace("elan", "i\u0307\u0301lan"), {"dotted_i": True}),
    ],
)
def test_a_document_that_quotes_a_benchmark_letter_by_letter_is_dropped(tmp_path, written, settings):
    (tmp_path / "exam.txt").write_text(written, encoding="utf-8")
    settings = {"benchmarks": [str(tmp_path / "exam.txt")], "benchmark_words": 10, **settings}
    assert reasons([f"{GOOD} {written}", GOOD], **settings) == ["benchmark", None]


def test_boilerplate_lines_are_found_however_the_list_is_written(tmp_path):
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "a.txt").write_text("Bütün hüquqlar qorunur.\nXǝbǝr lenti", encoding="utf-8")
    (tmp_path / "lists" / "b.txt").write_text("i\u0307stifadə qaydaları\n", encoding="utf-8")
    text = f"Xəbər lenti\n{GOOD}\nistifadə qaydaları"
    for named in (tmp_path / "lists", tmp_path / "lists" / "*.txt"):  # a folder, a glob
        settings = FilterSettings(boilerplate_files=[str(named)], dotted_i=True, replace={"ǝ": "ə"})
        assert DocumentFilter(settings).apply(text) == (GOOD, None, {"boilerplate_lines": 2})


def test_patterns_are_not_looked_for_in_a_text_that_is_far_too_long():
    endless = "(a+a+)+b"  # on such a text it would go on until it is stopped with an error
    assert reasons(["a" * 2001], boilerplate_patterns=[endless], max_chars=1000) == ["too_long"]
    boilerplate = "Ana səhifə | Xəbərlər\n" * 4
    assert reasons([boilerplate + GOOD], boilerplate_patterns=["^Ana səhifə"], max_chars=100) == [None]


def test_a_blocked_text_is_counted_as_one_whatever_else_is_wrong_with_it(tmp_path):
    texts = ["qısa", f"{GOOD} {GOOD}", "Menyu\nqısa  mətn", GOOD]
    hashed = ["qısa", f"{GOOD} {GOOD}", "qısa mətn"]  # the last one as it is once it is clean
    lines = [hashlib.sha256(text.encode()).hexdigest() for text in hashed]
    (tmp_path / "hashes.txt").write_text("\n".join(lines))
    settings = {"blocked_hashes": [str(tmp_path / "hashes.txt")], "boilerplate_patterns": ["^Menyu$"]}
    assert reasons(texts, **settings) == ["blocked_text"] * 3 + [None]


def test_an_excerpt_shows_no_personal_data_that_is_masked_or_dropped_and_nothing_of_what_is_blocked():
    settings = {"pii": {"email": "mask", "fin": "drop", "ipv4": "count"}, "pii_patterns": {"fin": r"\b5\w{6}\b"}}
    filter_ = DocumentFilter(FilterSettings(**settings))
    text, reason, _ = filter_.apply("anar@mail.az 5ABC1DE 85.132.44.117")
    assert reason == "too_short"
    assert filter_.excerpt(text, reason) == "email@example.com 0XXX0XX 85.132.44.117"
    assert filter_.excerpt("x" * 195 + " anar@mail.az", "too_long") == "x" * 195 + " emai"
    assert filter_.excerpt(text, "pii_fin") == filter_.excerpt(text, "blocked_text") == ""
    assert DocumentFilter(FilterSettings()).excerpt("anar@mail.az", "too_short") == "anar@mail.az"


def test_the_tables_are_there_before_the_workers_are_whatever_the_shortest_document():
    filter_ = DocumentFilter(FilterSettings(min_chars=5000, min_sentence_line_share=0.1))
    tables = (_character_values, _sentence_ends)
    for table in tables:
        table.cache_clear()
    filter_.prepare()
    built = [table.cache_info().misses for table in tables]
    filter_.apply(" ".join(f"söz{i}" for i in range(2000)))
    assert [table.cache_info().misses for table in tables] == built
