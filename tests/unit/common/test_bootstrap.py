"""bootstrap: intervals of ratios over documents, against what statistics says they should be."""

import numpy as np
import pytest

from dilqur.common.bootstrap import FEWEST, interval, resampled_ratios, resampled_sums


def documents(n, seed, ratio=3.0):
    """(tokens, words) of n documents: their lengths vary, and tokens per word vary around `ratio`, whatever the length."""
    random = np.random.default_rng(seed)
    words = random.lognormal(4, 0.7, n)
    return words * (ratio + 0.5 * random.standard_normal(n)), words


def test_the_interval_of_a_mean_is_that_of_the_normal_distribution():
    values = np.random.default_rng(1).normal(5, 2, 1000)
    low, high = interval(resampled_ratios(values[:, None], np.ones(1000))[:, 0])
    error = values.std() / np.sqrt(1000)
    # the ends are quantiles of 1,000 draws: their own standard error is some 0.08 of the error of the mean
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.3 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.3 * error)


def test_the_error_of_a_ratio_is_that_of_the_delta_method():
    above, below = documents(2000, seed=2)
    ratio = above.sum() / below.sum()
    error = np.sqrt(((above - ratio * below) ** 2).sum()) / below.sum()
    drawn = resampled_ratios(above[:, None], below)[:, 0]
    assert drawn.std() == pytest.approx(error, rel=0.1)  # a standard deviation of 1,000 draws: 2 % of noise


def test_ninety_five_of_a_hundred_intervals_hold_the_true_ratio():
    held = 0
    for seed in range(150):
        above, below = documents(80, seed)
        low, high = interval(resampled_ratios(above[:, None], below, seed)[:, 0])
        held += low <= 3.0 <= high
    assert 0.89 <= held / 150 <= 0.99  # 0.95 ± 0.018; the percentile method is a little narrow with 80 documents


def test_long_documents_count_for_what_they_are():
    above, below = np.array([10.0] * 20 + [9000.0] * 20), np.array([10.0] * 20 + [3000.0] * 20)  # ratios 1 and 3
    low, high = interval(resampled_ratios(above[:, None], below)[:, 0])
    assert 2.98 < low < high < 3, "the mean of the ratios would be 2"


def test_differences_are_paired():
    tokens, words = documents(50, seed=3)
    drawn = resampled_ratios(np.stack([tokens, tokens, tokens - 0.2 * words], axis=1), words)
    assert interval(drawn[:, 0] - drawn[:, 1]) == (0, 0)
    assert interval(drawn[:, 0] - drawn[:, 2]) == pytest.approx((0.2, 0.2)), "though each alone varies by more"
    assert np.subtract(*interval(drawn[:, 0])) < -0.2


def test_the_sums_are_those_of_as_many_documents():
    assert (resampled_sums(np.ones((FEWEST, 2))) == FEWEST).all()


def test_a_seed_decides_the_draws():
    tokens, words = documents(30, seed=4)
    one, same, other = (resampled_ratios(tokens[:, None], words, seed) for seed in (1, 1, 2))
    assert (one == same).all() and (one != other).any()


def test_few_documents_have_no_interval_and_a_draw_without_a_word_is_left_out():
    assert interval(resampled_ratios(np.ones((FEWEST - 1, 1)), np.ones(FEWEST - 1))[:, 0]) is None
    words = np.array([0.0] * 11 + [5.0])  # a third of the draws have no word in them
    drawn = resampled_ratios(2 * words[:, None], words)[:, 0]
    assert np.isnan(drawn).any() and interval(drawn) == (2, 2)
