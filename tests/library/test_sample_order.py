"""The order of the samples: a pure function of seed and position, a permutation, a mixture met exactly."""

import math
import time
from collections import Counter

import numpy as np
import pytest

from dilqur.errors import InputError
from dilqur.sample_order import BLOCK, SampleOrder, permute


def first(order, n):
    return [order[p] for p in range(n)]


# -- the promise to a run that goes on --------------------------------------------------------------------------------


def test_the_order_is_the_one_checkpoints_were_written_under():
    # a checkpoint holds the position only: were these numbers to change, every run resumed would read other samples
    order = SampleOrder([100, 37], seed=42, weights=[0.7, 0.3])
    assert first(order, 6) == [(0, 97), (0, 20), (0, 45), (0, 17), (1, 19), (0, 31)]
    assert SampleOrder([10**12], seed=42)[10**12 - 1] == (0, 952384088474)


def test_any_position_is_reached_at_once_however_large_the_data():
    started = time.perf_counter()
    dataset, sample = SampleOrder([10**12], seed=1)[10**15]  # a thousand epochs in
    assert dataset == 0 and 0 <= sample < 10**12
    assert time.perf_counter() - started < 1  # milliseconds; a permutation of 10¹² would be 8 TB


def test_positions_can_be_asked_for_in_any_order_and_by_any_number_of_workers():
    sizes, n = [1000, 300], 3 * BLOCK
    whole = first(SampleOrder(sizes, seed=7), n)
    for workers in (2, 3):
        parts = [SampleOrder(sizes, seed=7) for _ in range(workers)]
        assert [parts[p % workers][p] for p in range(n)] == whole
    backwards = SampleOrder(sizes, seed=7)
    assert [backwards[p] for p in reversed(range(n))] == whole[::-1]


# -- within a dataset -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 1000, BLOCK, BLOCK + 1])
def test_every_sample_comes_once_before_any_comes_twice(size):
    samples = [sample for _, sample in first(SampleOrder([size], seed=3), 3 * size)]
    for epoch in range(3):
        assert sorted(samples[epoch * size : (epoch + 1) * size]) == list(range(size))


def test_so_it_does_for_each_dataset_of_a_mixture():
    sizes = [500, 90]
    drawn = first(SampleOrder(sizes, seed=3, weights=[0.5, 0.5]), 2 * BLOCK)
    for dataset, size in enumerate(sizes):
        samples = [sample for d, sample in drawn if d == dataset]
        assert len(samples) == BLOCK
        for epoch in range(len(samples) // size):
            assert sorted(samples[epoch * size : (epoch + 1) * size]) == list(range(size))


def test_no_two_epochs_and_no_two_seeds_have_the_same_order():
    n = 1000
    orders = [
        tuple(permute(np.arange(n), n, seed, stream, epoch))
        for seed in (42, 43)
        for stream in (0, 1)
        for epoch in (0, 1)
    ]
    assert len(set(orders)) == 8  # seed + epoch would make (42, 1) the order of (43, 0)


# -- the permutation --------------------------------------------------------------------------------------------------


def test_it_is_a_permutation_at_every_size():
    for n in [*range(1, 130), 1023, 1024, 1025, 65_537]:
        assert np.array_equal(np.sort(permute(np.arange(n), n, seed=n)), np.arange(n))


@pytest.mark.parametrize("n", [2, 3, 4, 7, 10])
def test_every_place_is_equally_likely_for_every_sample(n, seeds=1500):
    counts = np.zeros((n, n))
    for seed in range(seeds):
        counts[np.arange(n), permute(np.arange(n), n, seed)] += 1
    chi_square, freedom = ((counts - seeds / n) ** 2 / (seeds / n)).sum(), (n - 1) ** 2
    assert abs(chi_square - freedom) < 5 * math.sqrt(2 * freedom)  # five standard deviations of chi-square


def test_neighbours_in_the_order_are_not_neighbours_in_the_text():
    n = 10_000
    order = permute(np.arange(n), n, seed=5)
    assert (np.diff(order) == 1).sum() <= 6  # one expected; more than 6: once in 10,000 seeds
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.05  # five standard deviations of 1 / √n


# -- the mixture ------------------------------------------------------------------------------------------------------


def test_the_shares_are_met_in_every_block_up_to_rounding():
    order = SampleOrder([1000, 50, 7], seed=11, weights=[0.7, 0.25, 0.05])
    for block in range(4):
        counts = Counter(order[block * BLOCK + i][0] for i in range(BLOCK))
        for dataset, share in enumerate((0.7, 0.25, 0.05)):
            assert abs(counts[dataset] - share * BLOCK) <= 1


def test_without_weights_the_datasets_are_mixed_in_proportion_to_their_sizes():
    counts = Counter(dataset for dataset, _ in first(SampleOrder([300, 100], seed=0), BLOCK))
    assert counts == {0: 3072, 1: 1024}  # three quarters and one quarter of 4,096


@pytest.mark.parametrize(
    ("sizes", "weights", "words"),
    [
        ([10, 0], None, "a dataset holds less than one sample"),
        ([], None, "a dataset holds less than one sample"),
        ([10, 10], [1.0, 0.0001], "weights: 0.00010 of the tokens is less than 1 in 4096"),
    ],
)
def test_a_mixture_that_cannot_be_is_refused(sizes, weights, words):
    with pytest.raises(InputError, match=words):
        SampleOrder(sizes, 0, weights)
