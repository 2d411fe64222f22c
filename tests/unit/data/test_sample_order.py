"""The order of the samples: a pure function of seed and position, a permutation, a mixture met exactly."""

import math
import time
from collections import Counter

import numpy as np
import pytest

from dilqur.common.errors import InputError
from dilqur.data.sample_order import BLOCK, CYCLE, SampleOrder, _keys, permute


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


def test_a_batch_is_asked_for_at_once():
    order = SampleOrder([500, 90, 7], seed=3, weights=[0.5, 0.3, 0.2], changes=[(5000, [1, 0, 1]), (9001, [0, 1, 0])])
    positions, whole = np.random.default_rng(0).permutation(2 * 10**4), first(order, 2 * 10**4)
    datasets, samples = order.batch(positions)
    assert list(zip(datasets.tolist(), samples.tolist(), strict=True)) == [whole[p] for p in positions]


# -- a mixture that changes -------------------------------------------------------------------------------------------


CHANGES = [(5000, [0.5, 0.5, 0.0]), (5001, [0.2, 0.3, 0.5]), (5001 + 2 * BLOCK, [0, 0, 1])]


def test_what_comes_before_a_change_does_not_move_nor_does_a_dataset_of_later_count():
    before = first(SampleOrder([700, 300], seed=5, weights=[0.9, 0.1]), 6000)
    after = first(SampleOrder([700, 300, 50], seed=5, weights=[0.9, 0.1, 0], changes=CHANGES), 6000)
    assert after[:5000] == before[:5000]
    assert after[5000:] != before[5000:]
    longer = first(SampleOrder([700, 300, 50], seed=5, weights=[0.9, 0.1, 0], changes=CHANGES[:2]), 6000)
    assert longer == after  # the last change comes after these


def test_every_sample_comes_once_before_any_comes_twice_across_changes():
    sizes = [700, 300, 50]
    drawn = first(SampleOrder(sizes, seed=5, weights=[0.9, 0.1, 0], changes=CHANGES), 5 * BLOCK)
    for dataset, size in enumerate(sizes):
        samples = [sample for d, sample in drawn if d == dataset]
        assert len(samples) > 2 * size
        for epoch in range(len(samples) // size):
            assert sorted(samples[epoch * size : (epoch + 1) * size]) == list(range(size))


def test_the_shares_are_those_of_the_phase_from_its_first_position_on():
    order = SampleOrder([700, 300, 50], seed=5, weights=[0.9, 0.1, 0], changes=CHANGES)
    assert {d for d, _ in first(order, 5001)} == {0, 1}
    counts = Counter(order[5001 + i][0] for i in range(BLOCK))
    assert [counts[d] / BLOCK for d in range(3)] == pytest.approx([0.2, 0.3, 0.5], abs=1 / BLOCK)
    assert {order[5001 + 2 * BLOCK + i][0] for i in range(BLOCK)} == {2}


def test_how_much_of_each_dataset_has_been_seen_is_known_at_any_position():
    order = SampleOrder([700, 300, 50], seed=5, weights=[0.9, 0.1, 0], changes=CHANGES)
    drawn = first(order, 5 * BLOCK)
    for position in (0, 1, 4999, 5000, 5001, 5002, BLOCK, 3 * BLOCK, 5 * BLOCK):
        counts = Counter(d for d, _ in drawn[:position])
        assert order.draws(position) == [counts[d] for d in range(3)]
        assert order.epochs(position) == pytest.approx([counts[0] / 700, counts[1] / 300, counts[2] / 50])


def test_a_late_phase_is_reached_at_once():
    changes = [(10**11 * (i + 1) + i, [1, i + 1]) for i in range(20)]
    started = time.perf_counter()
    order = SampleOrder([10**12, 10**9], 1, [1, 1], changes)
    assert order.draws(10**14)[1] > 10**13
    assert order[10**14] == SampleOrder([10**12, 10**9], 1, [1, 1], changes)[10**14]
    assert time.perf_counter() - started < 1


def test_changes_out_of_order_are_a_mistake_of_the_caller():
    with pytest.raises(ValueError, match="position 5 does not come after 5"):
        SampleOrder([9, 9], 0, [1, 1], [(5, [1, 0]), (5, [0, 1])])


# -- the permutation --------------------------------------------------------------------------------------------------


def test_it_is_a_permutation_at_every_size():
    some = (
        np.random.default_rng(0).integers(600, 5000, 40).tolist()
    )  # benchmarks/reader.py --statistics takes all of them
    for n in [*range(1, 600), *some, 65_537]:
        assert np.array_equal(np.sort(permute(np.arange(n), n, seed=n)), np.arange(n))


@pytest.mark.parametrize("bits", [20, 31, 32, 40, 52])
def test_it_can_be_undone_at_any_size(bits):
    random = np.random.default_rng(bits)
    for n in (random.integers(2 ** (bits - 1), 2**bits, 5)).tolist():
        index = random.integers(0, n, 2000)
        places = permute(index, n, seed=7, stream=2, epoch=3)
        assert ((places >= 0) & (places < n)).all()
        assert [unpermute(place, n, 7, 2, 3) for place in places.tolist()[:200]] == index.tolist()[:200]
        assert len(set(places.tolist())) == len(set(index.tolist()))


def unpermute(place, n, seed, stream, epoch):
    """The index that goes to `place`: the network backwards, in plain integers."""
    a = math.isqrt(n - 1) + 1
    b = -(-n // a)
    while True:
        left, right = divmod(place, b)
        for number, key in reversed(list(enumerate(_keys(seed, stream, epoch).tolist()))):
            if number % 2 == 0:
                left = (left - mix(right ^ key)) % a
            else:
                right = (right - mix(left ^ key)) % b
        place = left * b + right
        if place < n:
            return place


def mix(x):
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


@pytest.mark.parametrize("n", [2, 3, 4, 7, 10])
def test_every_place_is_equally_likely_for_every_sample(n, seeds=1500):
    counts = np.zeros((n, n))
    for seed in range(seeds):
        counts[np.arange(n), permute(np.arange(n), n, seed)] += 1
    # the sums of rows and columns are fixed: (n - 1)² degrees of freedom, and each cell varies n / (n - 1) times as much
    chi_square, freedom = ((counts - seeds / n) ** 2 / (seeds / n)).sum() * (n - 1) / n, (n - 1) ** 2
    # the cube root is nearly normal (Wilson and Hilferty 1931): less than five standard deviations
    deviation = ((chi_square / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    assert abs(deviation) < 5


def test_neighbours_in_the_order_are_not_neighbours_in_the_text():
    n = 10_000
    order = permute(np.arange(n), n, seed=5)
    assert (np.diff(order) == 1).sum() <= 6  # one expected; more than 6: once in 10,000 seeds
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.05  # five standard deviations of 1 / √n


def test_where_a_sample_stands_in_one_epoch_says_nothing_of_the_next():
    n = 10_000
    orders = [permute(np.arange(n), n, seed=5, stream=1, epoch=epoch) for epoch in range(4)]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert abs(np.corrcoef(one, other)[0, 1]) < 0.05  # five standard deviations of 1 / √n
            assert (one == other).sum() <= 7  # one expected; more than 7: once in 100,000 pairs


# -- the mixture ------------------------------------------------------------------------------------------------------


def test_the_shares_are_met_in_every_block_up_to_rounding():
    order = SampleOrder([1000, 50, 7], seed=11, weights=[0.7, 0.25, 0.05])
    for block in range(4):
        counts = Counter(order[block * BLOCK + i][0] for i in range(BLOCK))
        for dataset, share in enumerate((0.7, 0.25, 0.05)):
            assert abs(counts[dataset] - share * BLOCK) <= 1


@pytest.mark.parametrize("size", [10, 100, 123, 150, 366, 5000])
def test_a_small_dataset_beside_a_large_one_has_its_epochs(size):
    order = SampleOrder([10**6, size], seed=1)  # by size: one epoch of each
    assert order.epochs(10**6 + size)[1] == pytest.approx(1, abs=0.05 + 1 / size)  # 0.05: 10 are 10.5 of 2²⁰ positions


@pytest.mark.parametrize("weights", [[0.7, 0.3], [0.9, 0.07, 0.03], [1] * 300, [1e-5, 1, 1], [5, 4, 3, 2, 1, 0, 9.5]])
def test_every_block_is_full_and_a_cycle_of_blocks_has_the_shares(weights):
    (phase,) = SampleOrder([10**6] * len(weights), seed=0, weights=weights).phases
    a_block = np.diff(phase.spread, axis=0)
    assert (a_block >= 0).all() and (a_block.sum(axis=1) == BLOCK).all()
    assert (a_block.max(axis=0) - a_block.min(axis=0) <= 1).all()
    shares = np.array(weights) / sum(weights)
    assert np.abs(phase.spread[-1] - shares * BLOCK * CYCLE).max() <= 1
    # at every block's beginning, not at the cycle's end alone: what is spread out lies evenly
    due = shares * BLOCK * np.arange(CYCLE + 1)[:, None]
    assert np.abs(phase.spread - due).max() < 4


def test_without_weights_the_datasets_are_mixed_in_proportion_to_their_sizes():
    counts = Counter(dataset for dataset, _ in first(SampleOrder([300, 100], seed=0), BLOCK))
    assert counts == {0: 3072, 1: 1024}  # three quarters and one quarter of 4,096


@pytest.mark.parametrize(
    ("sizes", "weights", "words"),
    [
        ([10, 0], None, "a dataset holds less than one sample"),
        ([], None, "a dataset holds less than one sample"),
        ([10, 10, 9], [1.0, 0, 1e-7], "one would have 1.0e-07 of the tokens, less than 1 in 1,048,576"),
        ([10, 10**8], None, "one would have 1.0e-07 of the tokens, less than 1 in 1,048,576"),
    ],
)
def test_a_mixture_that_cannot_be_is_refused(sizes, weights, words):
    with pytest.raises(InputError, match=words):
        SampleOrder(sizes, 0, weights)
