"""decontamination: a document that quotes a benchmark is found and its item named; one that does not is left alone."""

import functools
import gzip
import json
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dilqur.cleaning.decontamination import NgramIndex
from dilqur.cleaning.normalise import normalise
from dilqur.common.errors import InputError

QUESTION = (
    "Azərbaycanın paytaxtı olan Bakı şəhəri hansı dənizin sahilində yerləşir və əhalisi nə qədərdir, bilirsinizmi?"
)
SHORT = "Ən hündür dağ hansıdır axı?"  # five words
AROUND = "Bu gün dərsdə maraqlı bir sual verildi. {} Heç kim dərhal cavab tapa bilmədi."


@pytest.fixture(scope="module")
def index():
    return NgramIndex([("sual-1", QUESTION), ("sual-2", SHORT), ("sual-3", "Niyə belədir?")])


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (QUESTION, "sual-1"),
        (QUESTION.upper().replace("İ", "I"), "sual-1"),
        (" ".join(QUESTION.replace(",", "").split()[:13]), "sual-1"),
        (QUESTION.replace(" ", "\n— "), "sual-1"),
        (" ".join(QUESTION.split()[:12]), None),  # one word short of a 13-gram
        (QUESTION.replace("dənizin", "çayın"), None),
        (SHORT, "sual-2"),
        ("ən hündür DAĞ hansıdır, axı", "sual-2"),
        ("hündür dağ hansıdır axı", None),
        ("Niyə belədir?", None),  # too short to say anything
        (f"{SHORT} {QUESTION}", "sual-2"),
        (f"{QUESTION} {SHORT}", "sual-1"),
    ],
)
def test_a_quotation_is_found_in_a_document(index, text, name):
    assert index.match(text) == name
    assert index.match(AROUND.format(text)) == name


def test_items_too_short_to_look_for_are_counted(index):
    assert index.names == ["sual-1", "sual-2"] and index.too_short == 1


@given(
    st.lists(st.lists(st.sampled_from("abcd"), min_size=5, max_size=12), min_size=1, max_size=5),
    st.lists(st.sampled_from("abcd"), max_size=30),
)
def test_it_finds_what_a_plain_search_finds(items, words):
    n = 7

    def quoted(item):
        runs = [item] if len(item) < n else [item[i : i + n] for i in range(len(item) - n + 1)]
        return any(run == words[i : i + len(run)] for run in runs for i in range(len(words)))

    found = NgramIndex([(str(i), " ".join(item)) for i, item in enumerate(items)], n).match(" ".join(words))
    expected = [str(i) for i, item in enumerate(items) if quoted(item)]
    assert found in expected if expected else found is None


def test_nothing_is_found_in_nothing(index):
    assert index.match("") is None
    assert NgramIndex([]).match(QUESTION) is None


def test_every_string_of_a_json_file_and_every_line_of_a_text_is_an_item(tmp_path):
    record = {"id": 7, "question": {"text": "bir iki üç dörd beş altı"}, "choices": ["yox", "on min beş yüz altı il"]}
    with gzip.open(tmp_path / "a.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    (tmp_path / "b.txt").write_text(f"{SHORT}\n\n{QUESTION}\n", encoding="utf-8")
    files = [tmp_path / "a.jsonl.gz", tmp_path / "b.txt"]
    index = NgramIndex.from_files(files)
    assert index.match("bir iki üç dörd beş altı") == f"{files[0]}:1 question.text"
    assert index.match("on min beş yüz altı il") == f"{files[0]}:1 choices.1"
    assert index.match(QUESTION) == f"{files[1]}:3"


def test_a_benchmark_written_with_other_code_points_is_found_all_the_same(tmp_path):
    """Decomposed letters, soft hyphens, and a dot left over from a capital: the documents have lost them."""
    raw = unicodedata.normalize("NFD", QUESTION).replace("dəniz", "də\u00adniz").replace("hansı", "\u200bhansı")
    (tmp_path / "a.txt").write_text(raw, encoding="utf-8")
    assert NgramIndex.from_files([tmp_path / "a.txt"]).match(AROUND.format(QUESTION))
    (tmp_path / "b.txt").write_text(QUESTION.replace("ə", "ǝ"), encoding="utf-8")
    as_here = functools.partial(normalise, replace={"ǝ": "ə"})
    assert NgramIndex.from_files([tmp_path / "b.txt"], normalizer=as_here).match(QUESTION)


def test_files_that_cannot_be_used_are_named(tmp_path):
    (tmp_path / "a.csv").write_text("a")
    (tmp_path / "b.txt").write_text("qısa")
    (tmp_path / "c.jsonl").write_text('{"text": "bir"}\n{')
    for name, words in (
        ("none.txt", "no such file"),
        ("a.csv", "benchmarks are .jsonl or .txt files"),
        ("b.txt", "no text of 5 words"),
        ("c.jsonl", "c.jsonl:2: broken JSON"),
    ):
        with pytest.raises(InputError) as problem:
            NgramIndex.from_files([tmp_path / name])
        assert words in str(problem.value)


def test_runs_of_too_few_words_are_refused():
    with pytest.raises(InputError, match="n-grams of 3 words are in every text; take 5 or more"):
        NgramIndex([], n=3)
