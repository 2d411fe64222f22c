"""Which sample stands at position p of the stream: a pure function of (seed, p), with nothing in memory and nothing to save.

A sample is a piece of a dataset of a fixed length, a number in [0, size). Within a dataset every sample comes once before
any comes twice, in an order that is a permutation without state: a Feistel network over a × b ≥ n with cycle-walking
(Black and Rogaway 2002, "Ciphers with arbitrary finite domains", §6), 6 rounds of the splitmix64 finaliser; 4 rounds
fail a chi-square test at tiny n. Mixture shares are met exactly, up to rounding, in every block of 4,096 positions.

The mixture may change at given positions. A phase is the stream between two changes: it begins a block of its own, and each
dataset goes on with the draw after its last one, so that "once before any twice" holds across changes as well.
"""

import functools
import math
from bisect import bisect_right
from typing import NamedTuple

import numpy as np

from dilqur.errors import InputError

BLOCK = 4096
ROUNDS = 6
TINY = 16  # up to here the network's rounds favour some places: random numbers are sorted instead
_U = np.uint64


class Phase(NamedTuple):
    """start: its first position. quotas: positions of each dataset in a block. first_block: number of its first block among
    all blocks of the stream. draws: how many samples of each dataset stand before it."""

    start: int
    quotas: list
    first_block: int
    draws: list


class SampleOrder:
    """position → (dataset, sample), for datasets of `sizes` samples mixed by `weights` (shares of the positions).

    weights: None mixes in proportion to the sizes. changes: [(position, weights), …], ascending: from there on these shares;
    0 for a dataset that is not in use yet, or no longer. Raises InputError for an empty dataset, or a share under 1 in 4,096.
    """

    def __init__(self, sizes, seed, weights=None, changes=()):
        self.sizes, self.seed = list(sizes), seed
        if not self.sizes or min(self.sizes) < 1:
            raise InputError(
                f"a dataset holds less than one sample (samples: {self.sizes}): shorten max_length, or add text"
            )
        self.phases = [Phase(0, _quotas(list(weights) if weights else self.sizes), 0, [0] * len(self.sizes))]
        for position, weights in changes:
            last = self.phases[-1]
            if position <= last.start:
                raise ValueError(f"changes: position {position} does not come after {last.start}")
            blocks = -(-(position - last.start) // BLOCK)  # the last one may be cut short
            self.phases.append(Phase(position, _quotas(weights), last.first_block + blocks, self.draws(position)))

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
        phase, (datasets, _) = self.phases[number], self._block(number, block)
        begun = np.bincount(datasets[:within], minlength=len(self.sizes)).tolist()
        return [d + block * q + b for d, q, b in zip(phase.draws, phase.quotas, begun, strict=True)]

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
        datasets = np.searchsorted(np.cumsum(phase.quotas), slots, side="right")
        samples = np.empty(BLOCK, np.int64)
        for d, (quota, size) in enumerate(zip(phase.quotas, self.sizes, strict=True)):
            if quota == 0:
                continue
            draws = phase.draws[d] + block * quota + np.arange(quota)  # the how-manieth from this dataset these are
            drawn = np.empty(quota, np.int64)
            for epoch in range(draws[0] // size, draws[-1] // size + 1):
                here = draws // size == epoch
                drawn[here] = permute(draws[here] % size, size, self.seed, stream=1 + d, epoch=epoch)
            samples[datasets == d] = drawn
        return datasets, samples


def _quotas(weights):
    """Positions of each dataset in a block."""
    shares = [w / sum(weights) for w in weights]
    quotas = _largest_remainder(shares, BLOCK)
    if any(share > 0 and quota == 0 for share, quota in zip(shares, quotas, strict=True)):
        smallest = min(share for share in shares if share > 0)
        raise InputError(
            f"weights: {smallest:.5f} of the tokens is less than 1 in {BLOCK}; raise it, or drop that dataset"
        )
    return quotas


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
