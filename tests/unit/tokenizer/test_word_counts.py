"""Counting words by source: sampling, weights, scripts; the same result for any number of processes."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import regex

from dilqur.common.errors import InputError
from dilqur.tokenizer import word_counts
from dilqur.tokenizer.llama3 import PATTERN
from dilqur.tokenizer.word_counts import (
    Source,
    count_words,
    refuse_other_scripts,
    sampling_probabilities,
    weighted_counts,
    word_weights,
)

READING = SimpleNamespace(text_field="text", sample_by="line", on_error="stop")
cut = regex.compile(PATTERN).findall


def write(path, texts):
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    return str(path)


@pytest.fixture
def files(tmp_path):
    rng = np.random.default_rng(3)
    texts = [" ".join(f"söz{n}" for n in rng.zipf(1.5, 60) % 5000) for _ in range(4000)]
    return [write(tmp_path / "large.jsonl", texts), write(tmp_path / "small.jsonl", texts[:40])]


def sources_of(files):
    return [Source(name, [file]) for name, file in zip(("large", "small"), files, strict=True)]


def count(files, sample_bytes=1 << 40, num_proc=1):
    sources = sources_of(files)
    count_words(sources, READING, cut, sample_bytes, num_proc, "count")
    return sources


def test_the_counts_are_those_of_the_text_for_any_number_of_processes(files):
    one, three = count(files), count(files, num_proc=3)
    assert one == three
    texts = [json.loads(line)["text"] for line in Path(files[0]).read_text(encoding="utf-8").splitlines()]
    assert one[0].counts.total() == sum(len(cut(text)) for text in texts)
    assert (one[0].documents, one[0].counted_documents) == (4000, 4000)
    assert one[0].utf8_bytes == sum(len(text.encode()) for text in texts)


def test_a_sample_takes_all_of_a_small_source_and_a_part_of_a_large_one(files):
    sample_bytes = 400_000
    large, small = count(files, sample_bytes, num_proc=2)
    assert small.probability == 1
    assert 0 < large.probability < 0.5
    assert large.documents == 4000
    assert large.counted_documents == pytest.approx(4000 * large.probability, rel=0.15)
    assert count(files, sample_bytes) == [large, small]  # a hash of the text decides
    # divided by the probability, the sample stands for the whole
    whole = weighted_counts(count(files))
    assert sum(weighted_counts([large, small]).values()) == pytest.approx(sum(whole.values()), rel=0.1)


def test_allowances_that_small_sources_leave_over_go_to_the_larger():
    assert sampling_probabilities([10, 100, 1000], 2000).tolist() == [1, 1, 1]
    shares = sampling_probabilities([10, 100, 1000], 310)
    assert shares.tolist() == [1, 1, 0.2]
    assert sampling_probabilities([300, 300], 300).tolist() == [0.5, 0.5]


def made(name, counts, **more):
    source = Source(name, [f"{name}.txt"], **more)
    source.counts.update(counts)
    return source


def test_weights_and_temperature_set_the_shares_of_the_sources():
    def share(sources, temperature=1.0):
        weights = weighted_counts(sources, temperature)
        assert sum(weights.values()) == pytest.approx(1000)
        return weights["a"] / 1000

    def two(**more):
        return [made("one", {"a": 900}, **more), made("two", {"b": 100})]

    assert share(two()) == pytest.approx(0.9)
    assert share(two(), 0.5) == pytest.approx(0.75)
    assert share(two(), 0.0) == pytest.approx(0.5)
    stated = [made("one", {"a": 900}, weight=1.0), made("two", {"b": 100}, weight=3.0)]
    assert share(stated, 0.0) == pytest.approx(0.25)


def test_likely_words_are_added_to_a_corpus_of_few_words_alone(monkeypatch):
    stems, endings = ("kitab", "bazar", "qapı", "tələb", "mavi"), ("", "da", "lar")
    source = made(
        "one", {f" {stem}{ending}": 50 for stem in stems for ending in endings} | {" taxta": 9, " taxtada": 9}
    )
    weights, plain, added = word_weights([source], unseen=3.0)
    assert added > 0 < weights[" taxtalar"] and weights[" taxta"] > 9 and not plain
    monkeypatch.setattr(word_counts, "FEW_WORDS", 10)
    assert word_weights([source], unseen=3.0) == (dict(source.counts), True, 0)


def test_a_source_of_another_script_or_without_words_is_named():
    latin, cyrillic = made("az", {" salam": 90, "123": 500}), made("ru", {" привет": 10, " ok": 1})
    with pytest.raises(InputError, match=r"ru: 97% of its letters are CYRILLIC, and most of the corpus is LATIN"):
        refuse_other_scripts([latin, cyrillic])
    refuse_other_scripts([latin, made("numbers", {"12": 4})])


def test_an_empty_source_is_named(tmp_path, files):
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(
        InputError, match=r"empty: .*empty.txt: no document in there: nothing to learn from; leave it out"
    ):
        count_words(
            [*sources_of(files), Source("empty", [str(tmp_path / "empty.txt")])], READING, cut, 1 << 40, 1, "count"
        )
