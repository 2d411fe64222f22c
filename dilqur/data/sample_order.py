"""Which sample stands at position p of the stream: a pure function of (seed, p), with nothing in memory and nothing to save.

A sample is a piece of a dataset of a fixed length, a number in [0, size). Within a dataset every sample comes once before
any comes twice, in an order that is a permutation without state: a Feistel network over a × b ≥ n with cycle-walking
(Black and Rogaway 2002, "Ciphers with arbitrary finite domains", §6), 6 rounds of the splitmix64 finaliser; 4 rounds
fail a chi-square test at tiny n. Mixture shares are met up to rounding in every block of 4,096 positions, and to a millionth
of the whole in every 256 blocks: a small dataset has the epochs it was given.

The mixture may change at given positions. A phase is the stream between two changes: it begins a block of its own, and each
dataset goes on with the draw after its last one, so that "once before any twice" holds across changes as well.
"""

import functools
import math
from bisect import bisect_right
from typing import NamedTuple

import numpy as np

from dilqur.common.errors import InputError

BLOCK = 4096
CYCLE = 256  # blocks, over which the shares are met as exactly as whole samples can
ROUNDS = 6
TINY = 16  # up to here the network's rounds favour some places: random numbers are sorted instead
_U = np.uint64


class Phase(NamedTuple):
    """start: its first position. quotas: positions of each dataset in a cycle of blocks. first_block: number of its first
    block among all blocks of the stream. draws: how many samples of each dataset stand before it. spread: int array
    (CYCLE + 1, datasets), how many do before each block of a cycle, from the cycle's beginning."""

    start: int
    quotas: list
    first_block: int
    draws: list
    spread: np.ndarray

    def before(self, block):
        """How many samples of each dataset stand before a block of this phase: a list of int."""
        cycle, place = divmod(block, CYCLE)
        return [d + cycle * q + n for d, q, n in zip(self.draws, self.quotas, self.spread[place].tolist(), strict=True)]


class SampleOrder:
    """position → (dataset, sample), for datasets of `sizes` samples mixed by `weights` (shares of the positions).

    weights: None mixes in proportion to the sizes. changes: [(position, weights), …], ascending: from there on these shares;
    0 for a dataset that is not in use yet, or no longer. Raises InputError for an empty dataset, or a share so small that
    it would have no position in a cycle.
    """

    def __init__(self, sizes, seed, weights=None, changes=()):
        self.sizes, self.seed = list(sizes), seed
        if not self.sizes or min(self.sizes) < 1:
            raise InputError(
                f"a dataset holds less than one sample (samples: {self.sizes}): shorten max_length, or add text"
            )
        first = _quotas(list(weights) if weights else self.sizes)
        self.phases = [Phase(0, first, 0, [0] * len(self.sizes), _assign(first))]
        for position, weights in changes:
            last = self.phases[-1]
            if position <= last.start:
                raise ValueError(f"changes: position {position} does not come after {last.start}")
            blocks = -(-(position - last.start) // BLOCK)  # the last one may be cut short
            quotas, draws = _quotas(weights), self.draws(position)
            self.phases.append(Phase(position, quotas, last.first_block + blocks, draws, _assign(quotas)))

    def __getitem__(self, position):
        """(dataset, sample) at `position`, any integer >= 0."""
        phase, block, within = self._place(int(position))
        datasets, samples = self._block(phase, block)
        return int(datasets[within]), int(samples[within])

    def batch(self, positions):
        """(datasets, samples) at `positions`, int64 arrays of their shape."""
        positions = np.asarray(positions, np.int64)
        low = int(positions.min())
        (phase, block, within), last = self._place(low), self._place(int(positions.max()))
        if (phase, block) == last[:2]:  # nearly always
            inside = positions - (low - within)
            return tuple(values[inside] for values in self._block(phase, block))
        datasets, samples = np.empty_like(positions), np.empty_like(positions)
        places = np.array([self._place(position) for position in positions.ravel().tolist()]).reshape(
            *positions.shape, 3
        )
        for phase, block in sorted(set(map(tuple, places[..., :2].reshape(-1, 2).tolist()))):
            here = (places[..., 0] == phase) & (places[..., 1] == block)
            in_block = self._block(phase, block)
            datasets[here], samples[here] = (values[places[here][:, 2]] for values in in_block)
        return datasets, samples

    def draws(self, position):
        """How many samples of each dataset stand before `position`: a list of int."""
        number, block, within = self._place(position)
        datasets, _ = self._block(number, block)
        begun = np.bincount(datasets[:within], minlength=len(self.sizes)).tolist()
        return [d + b for d, b in zip(self.phases[number].before(block), begun, strict=True)]

    def epochs(self, position):
        """How often each dataset has been seen before `position`: a list of float."""
        return [drawn / size for drawn, size in zip(self.draws(position), self.sizes, strict=True)]

    def _place(self, position):
        phase = bisect_right(self.phases, position, key=lambda p: p.start) - 1
        return phase, *divmod(position - self.phases[phase].start, BLOCK)

    @functools.lru_cache(maxsize=4)  # noqa: B019, one order lives as long as its process
    def _block(self, number, block):
        phase = self.phases[number]
        slots = permute(np.arange(BLOCK), BLOCK, self.seed, stream=0, epoch=phase.first_block + block)
        quotas = np.diff(phase.spread[block % CYCLE :][:2], axis=0)[0]
        datasets = np.searchsorted(np.cumsum(quotas), slots, side="right")
        samples = np.empty(BLOCK, np.int64)
        for d, (quota, before, size) in enumerate(zip(quotas.tolist(), phase.before(block), self.sizes, strict=True)):
            if quota == 0:
                continue
            draws = before + np.arange(quota)  # the how-manieth from this dataset these are
            drawn = np.empty(quota, np.int64)
            for epoch in range(draws[0] // size, draws[-1] // size + 1):
                here = draws // size == epoch
                drawn[here] = permute(draws[here] % size, size, self.seed, stream=1 + d, epoch=epoch)
            samples[datasets == d] = drawn
        return datasets, samples


def _quotas(weights):
    """Positions of each dataset in a cycle of blocks."""
    shares = [w / sum(weights) for w in weights]
    quotas = _largest_remainder(shares, BLOCK * CYCLE)
    if any(share > 0 and quota == 0 for share, quota in zip(shares, quotas, strict=True)):
        smallest = min(share for share in shares if share > 0)
        raise InputError(
            f"datasets: one would have {smallest:.1e} of the tokens, less than 1 in {BLOCK * CYCLE:,}: leave it out, or give "
            "it a larger weight, or more epochs"
        )
    return quotas


def _assign(quotas):
    """int64 (CYCLE + 1, datasets): `quotas` spread over a cycle's blocks, summed up to the beginning of each.

    A dataset has as many positions in each block, or one more. The ones more are spread out in turn, those of one dataset
    after those of the last: so no block gets two for a dataset, and all get equally many (McNaughton 1959's wrap-around
    rule); which block is next goes round in steps of 159, the golden section of 256, so that they lie evenly.
    """
    least, more = np.divmod(np.array(quotas, np.int64), CYCLE)
    table = np.tile(least, (CYCLE, 1))
    blocks = np.arange(more.sum()) * 159 % CYCLE
    np.add.at(table, (blocks, np.repeat(np.arange(len(quotas)), more)), 1)
    return np.concatenate([np.zeros((1, len(quotas)), np.int64), np.cumsum(table, axis=0)])


def permute(index, n, seed, stream=0, epoch=0):
    """int64 array: where each `index` (integers in [0, n)) goes in the permutation named (seed, stream, epoch)."""
    keys = _keys(seed, stream, epoch)
    if n <= TINY:
        return np.argsort(_mix(keys[0] ^ np.arange(n, dtype=_U)), kind="stable")[np.asarray(index)]
    a = math.isqrt(n - 1) + 1
    b = -(-n // a)

    def network(x):
        left = x // _U(b)  # in [0, a)
        right = x - left * _U(b)  # in [0, b)
        for number, key in enumerate(keys):
            if number % 2 == 0:
                left = _remainder(left + _remainder(_mix(right ^ key), a), a)
            else:
                right = _remainder(right + _remainder(_mix(left ^ key), b), b)
        return left * _U(b) + right

    out = network(np.asarray(index).astype(_U))
    outside = np.flatnonzero(out >= n)
    while outside.size:  # walk the cycle until it is back among the first n
        out[outside] = network(out[outside])
        outside = outside[out[outside] >= n]
    return out.astype(np.int64)


def _remainder(x, n):
    """x % n: numpy divides by a constant three times as fast as it takes remainders."""
    return x - x // _U(n) * _U(n)


@functools.lru_cache(maxsize=64)
def _keys(seed, stream, epoch):
    """One key a round. Seed, stream and epoch are mixed in turn: adding them would make (42, 1) the order of (43, 0)."""
    with np.errstate(over="ignore"):
        key = _U(0)
        for part in (seed, stream, epoch):
            key = _mix(np.array([key ^ _mix(np.array([part & (2**64 - 1)], _U))[0]], _U) + _U(0x9E3779B97F4A7C15))[0]
        return _mix(key + np.arange(1, ROUNDS + 1, dtype=_U) * _U(0x9E3779B97F4A7C15))


def _mix(x):
    """The splitmix64 finaliser (Steele, Lea and Flood 2014)."""
    x = (x ^ (x >> _U(30))) * _U(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> _U(27))) * _U(0x94D049BB133111EB)
    return x ^ (x >> _U(31))


def _largest_remainder(shares, total):
    """Integers that add up to `total`, as near to shares · total as can be."""
    exact = [s * total for s in shares]
    out = [math.floor(e) for e in exact]
    for i in sorted(range(len(exact)), key=lambda i: out[i] - exact[i])[: total - sum(out)]:
        out[i] += 1
    return out
