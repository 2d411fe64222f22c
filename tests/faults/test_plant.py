"""What is planted into a corpus is found by the filters, and hardly anything else is."""

import collections
import json

import pytest
from plant import BENCHMARK, LABELS, found_by_filters, planted_corpus, precision_and_recall, write


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planted")
    return folder, write(folder, seed=3, each=10, real=600)


def test_every_fault_is_planted_and_labelled(planted):
    _, records = planted
    assert collections.Counter(record["planted"] for record in records if record["planted"]) == dict.fromkeys(
        LABELS, 10
    )
    assert sorted(record["id"] for record in records) == list(range(len(records)))
    text = {record["id"]: record["text"] for record in records}
    for record in records:
        assert all(value in record["text"] for value in record.get("values", ()))
        if record["planted"] == "exact_duplicate":
            assert record["text"] == text[record["of"]]
        if record["planted"] == "near_duplicate":
            words, original = record["text"].split(), text[record["of"]].split()
            assert record["text"] != text[record["of"]] and 0 <= len(original) - len(words) <= 0.06 * len(original) + 1


def test_the_same_seed_plants_the_same(planted):
    folder, records = planted
    assert planted_corpus(seed=3, each=10, real=600) == (records, BENCHMARK)
    assert [json.loads(line) for line in (folder / "corpus.jsonl").open(encoding="utf-8")] == records


def test_the_filters_find_what_was_planted(planted):
    folder, records = planted
    scores = precision_and_recall(records, found_by_filters(records, BENCHMARK, folder / "boilerplate.txt"))
    assert len(scores) == 10
    for label, (precision, recall) in scores.items():
        # ten of each: 0.9 is one missed or one too many, which chance may have (of random IPv4 addresses 1.9 % are)
        assert precision >= 0.9 and recall >= 0.9, f"{label}: precision {precision:.2f}, recall {recall:.2f}"
