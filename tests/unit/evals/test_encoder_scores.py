"""Metrics as sums over examples, held against formulas written out and against each other."""

import numpy as np
import pytest

from dilqur.evals.scores import compare, counts, entities, score


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        ("B-PER I-PER O B-LOC", {("PER", 0, 1), ("LOC", 3, 3)}),
        ("B-PER B-PER I-PER", {("PER", 0, 0), ("PER", 1, 2)}),
        ("I-PER I-PER O", {("PER", 0, 1)}),  # an I that follows nothing begins one, as in conlleval
        ("B-PER I-LOC I-LOC", {("PER", 0, 0), ("LOC", 1, 2)}),
        ("O O", set()),
        ("", set()),
    ],
)
def test_entities_are_those_of_conlleval(tags, found):
    assert entities(tags.split()) == found


def test_accuracy_of_texts_and_of_words():
    above, below = counts("accuracy", ["a", "b", "a"], ["a", "a", "a"], ["a", "b"])
    assert score(above.sum(0), below.sum(0)) == pytest.approx(2 / 3)
    above, below = counts("accuracy", [("N", "V"), ("N",)], [("N", "N"), ("",)], ["N", "V"])
    assert score(above.sum(0), below.sum(0)) == pytest.approx(1 / 3), "a word that was cut off is wrong"


def test_macro_f1_is_the_mean_over_the_labels_of_their_f1():
    random = np.random.default_rng(0)
    labels = ["a", "b", "c"]
    true, said = (random.choice(labels, 500).tolist() for _ in range(2))
    f1 = []
    for label in labels:
        right = sum(t == s == label for t, s in zip(true, said, strict=True))
        precision, recall = right / said.count(label), right / true.count(label)
        f1.append(2 * precision * recall / (precision + recall))
    above, below = counts("macro_f1", true, said, labels)
    assert score(above.sum(0), below.sum(0)) == pytest.approx(np.mean(f1))


def test_a_label_that_neither_occurs_nor_is_said_counts_for_nothing():
    above, below = counts("macro_f1", ["a", "a"], ["a", "a"], ["a", "never"])
    assert score(above.sum(0), below.sum(0)) == 1


def test_entity_f1_wants_kind_and_both_ends():
    true = [("B-PER", "I-PER", "O"), ("B-LOC", "O", "O")]
    said = [("B-PER", "O", "O"), ("B-LOC", "O", "B-ORG")]
    above, below = counts("entity_f1", true, said, [])
    assert score(above.sum(0), below.sum(0)) == pytest.approx(2 * 1 / (2 + 3))  # one of 3 said, one of 2 true


@pytest.mark.filterwarnings("error")
def test_nothing_right_and_nothing_there_is_zero():
    assert score(*(x.sum(0) for x in counts("entity_f1", [("O",)], [("O",)], []))) == 0


def run(right, first=0):
    """What one seed counted: one example a document."""
    return first + np.arange(len(right)), np.array(right, float)[:, None], np.ones((len(right), 1))


def width(figures):
    low, high = figures["m"]["interval"]
    return high - low


def test_intervals_hold_the_truth_as_often_as_they_say_and_differences_are_paired():
    random, inside, paired = np.random.default_rng(0), 0, 0
    for trial in range(60):
        hard = random.random(200)  # of both models, so that their scores move together
        one, two = hard < 0.7, hard < 0.75
        figures = compare({"one": [run(one)] * 3, "two": [run(two)] * 3}, seed=trial)
        low, high = figures["one"]["interval"]
        inside += low <= 0.7 <= high
        low, high = figures["two"]["difference_interval"]
        paired += low <= 0.05 <= high
        assert high - low < 0.09, "unpaired it would be 0.18 wide"
    assert inside >= 52 and paired >= 50


def test_seeds_that_differ_widen_the_interval():
    equal, differing = [run([1, 0] * 100)] * 5, [run([1] * k + [0] * (200 - k)) for k in (60, 80, 100, 120, 140)]
    of_equal, of_differing = compare({"m": equal}), compare({"m": differing})
    assert of_equal["m"]["score"] == of_differing["m"]["score"] == pytest.approx(0.5)
    assert width(of_differing) > 1.3 * width(of_equal)


def test_folds_are_no_seeds_and_the_interval_of_all_is_that_of_one_measurement():
    right = np.random.default_rng(0).random(200) < 0.7
    whole = compare({"m": [run(right)]})
    folds = compare({"m": [run(right[i : i + 40], i) for i in range(0, 200, 40)]})
    assert folds["m"]["score"] == pytest.approx(whole["m"]["score"])
    assert width(folds) == pytest.approx(width(whole), rel=0.1)


def test_documents_are_drawn_as_wholes():
    right = np.repeat([1, 0] * 10, 20)
    together = (np.repeat(np.arange(20), 20), *run(right)[1:])
    assert width(compare({"m": [together]})) > 3 * width(compare({"m": [run(right)]}))


def test_too_few_documents_have_no_interval():
    assert compare({"m": [run([1, 0])]})["m"]["interval"] is None
