"""What is masked: the stated share, never a special token, a function of seed and position and of nothing else."""

import math

import numpy as np
import pytest

from dilqur.common.errors import InputError
from dilqur.data.mlm_masking import Masking

MASK, SPECIAL, VOCABULARY, LENGTH = 4, frozenset(range(5)), 1000, 256


@pytest.fixture(scope="module")
def ids():
    """Random tokens, with special ones among them."""
    return np.random.default_rng(0).integers(0, VOCABULARY, (400, LENGTH))


def masking(**more):
    return Masking(MASK, SPECIAL, VOCABULARY, **more)


def are_usual(z):
    """Are these numbers like draws of a standard normal distribution? By the sum of their squares, within 4.5 of its sigmas."""
    return abs((z**2).sum() - z.size) < 4.5 * math.sqrt(2 * z.size)


def test_independent_draws_have_the_binomial_distribution(ids):
    shown, labels = masking()(ids, np.arange(400), seed=1)
    chosen, eligible = labels != -100, ids >= 5
    assert not chosen[~eligible].any()
    assert (shown[chosen] == MASK).all() and (labels[chosen] == ids[chosen]).all()
    assert (shown[~chosen] == ids[~chosen]).all()
    n = eligible.sum()
    assert abs(chosen.sum() / n - 0.2) < 4 * math.sqrt(0.2 * 0.8 / n)
    for axis in (0, 1):  # at each place of a sample, and in each sample, as many as a binomial has
        many = eligible.sum(axis)
        assert are_usual((chosen.sum(axis) - 0.2 * many) / np.sqrt(0.16 * many))


def test_a_fixed_count_is_the_rounded_share_of_each_sample_and_every_place_is_as_likely(ids):
    _, labels = masking(count="fixed")(ids, np.arange(400), seed=1)
    eligible = (ids >= 5).sum(1)
    assert ((labels != -100).sum(1) == np.rint(0.2 * eligible)).all()
    assert not (labels != -100)[ids < 5].any()
    whole = np.full((2000, 50), 7)
    _, labels = masking(count="fixed")(whole, np.arange(2000), seed=1)
    assert ((labels != -100).sum(1) == 10).all()
    assert are_usual(((labels != -100).sum(0) - 400) / math.sqrt(320))


def test_the_rule_of_bert_shows_80_10_10(ids):
    shown, labels = masking(rule="80-10-10")(ids, np.arange(400), seed=1)
    chosen = labels != -100
    n = chosen.sum()
    masked, same = (shown[chosen] == MASK).sum(), (shown[chosen] == ids[chosen]).sum()
    assert abs(masked / n - 0.8) < 4 * math.sqrt(0.16 / n)
    by_chance = 0.1 / (VOCABULARY - len(SPECIAL))  # a random token may be the one that was there
    assert abs(same / n - 0.1 - by_chance) < 4 * math.sqrt(0.09 / n)
    drawn = shown[chosen & (shown != MASK) & (shown != ids)]
    assert drawn.min() >= 5
    expected = len(drawn) / 5  # random tokens are from all over the vocabulary
    assert are_usual((np.histogram(drawn, 5, (5, VOCABULARY))[0] - expected) / math.sqrt(0.8 * expected))
    assert (masking()(ids, np.arange(400), seed=1)[1] == labels).all(), "the same are to be guessed under either rule"


@pytest.mark.parametrize("count", ["independent", "fixed"])
def test_only_seed_and_position_decide(ids, count):
    mask = masking(count=count)
    shown, labels = mask(ids, np.arange(400), seed=1)
    for part in (np.arange(0, 400, 4), np.arange(399, -1, -7), np.array([17])):
        again = mask(ids[part], part, seed=1)
        assert (again[0] == shown[part]).all() and (again[1] == labels[part]).all()
    for other in (mask(ids, np.arange(400), seed=2), mask(ids, np.arange(400, 800), seed=1)):
        overlap = ((other[1] != -100) & (labels != -100)).sum() / (labels != -100).sum()
        assert abs(overlap - 0.2) < 0.02, "another draw, that has nothing to do with the first"


def test_three_rounds_of_the_same_data_mask_it_three_ways(ids):
    drawn = [masking()(ids, np.arange(400) + 400 * n, seed=1)[1] != -100 for n in range(3)]
    twice = (drawn[0] & drawn[1] & (ids >= 5)).sum() / (ids >= 5).sum()
    assert abs(twice - 0.04) < 0.005


def test_a_sample_without_an_eligible_token_has_no_fixed_count():
    ids = np.full((2, 8), 9)
    ids[1] = 3
    with pytest.raises(InputError, match="position 11 has no token that may be masked: take count independent"):
        masking(count="fixed")(ids, np.array([10, 11]), seed=1)
    assert (masking()(ids, np.array([10, 11]), seed=1)[1][1] == -100).all()


def test_at_least_one_is_masked_of_few():
    _, labels = masking(count="fixed")(np.full((3, 2), 9), np.arange(3), seed=1)
    assert ((labels != -100).sum(1) == 1).all()
