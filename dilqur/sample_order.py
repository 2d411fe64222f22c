"""Which sample stands at position p of the stream: a pure function of (seed, p), with nothing in memory and nothing to save.

A sample is the tokens [i · max_length, (i + 1) · max_length) of a dataset. Within a dataset every sample comes once before
any comes twice, in an order that is a permutation without state: a Feistel network over a × b ≥ n with cycle-walking
(Black and Rogaway 2002, "Ciphers with arbitrary finite domains", §6), 6 rounds of the splitmix64 finaliser; 4 rounds
fail a chi-square test at tiny n. Mixture shares are met exactly, up to rounding, in every block of 4,096 positions.
"""

import functools
import math

import numpy as np

from dilqur.errors import InputError

BLOCK = 4096
ROUNDS = 6
_U = np.uint64


class SampleOrder:
    """position → (dataset, sample), for datasets of `sizes` samples mixed by `weights` (shares of the positions).

    weights: None mixes in proportion to the sizes. Raises InputError for an empty dataset, or a share under 1 in 4,096.
    """

    def __init__(self, sizes, seed, weights=None):
        self.sizes, self.seed = list(sizes), seed
        if not self.sizes or min(self.sizes) < 1:
            raise InputError(
                f"a dataset holds less than one sample (samples: {self.sizes}): shorten max_length, or add text"
            )
        weights = list(weights) if weights else self.sizes
        shares = [w / sum(weights) for w in weights]
        self.quotas = _largest_remainder(shares, BLOCK)
        if min(self.quotas) == 0:
            raise InputError(
                f"weights: {min(shares):.5f} of the tokens is less than 1 in {BLOCK}; raise it, or drop that dataset"
            )

    def __getitem__(self, position):
        """(dataset, sample) at `position`, any integer >= 0."""
        block, within = divmod(int(position), BLOCK)
        datasets, samples = self._block(block)
        return int(datasets[within]), int(samples[within])

    @functools.lru_cache(maxsize=4)  # noqa: B019, one order lives as long as its process
    def _block(self, block):
        slots = permute(np.arange(BLOCK), BLOCK, self.seed, stream=0, epoch=block)
        bounds = np.cumsum(self.quotas)
        datasets = np.searchsorted(bounds, slots, side="right")
        samples = np.empty(BLOCK, np.int64)
        for d, (quota, size) in enumerate(zip(self.quotas, self.sizes, strict=True)):
            draws = block * quota + np.arange(quota)  # the how-manieth draws from this dataset these are
            drawn = np.empty(quota, np.int64)
            for epoch in range(draws[0] // size, draws[-1] // size + 1):
                here = draws // size == epoch
                drawn[here] = permute(draws[here] % size, size, self.seed, stream=1 + d, epoch=epoch)
            samples[datasets == d] = drawn
        return datasets, samples


def permute(index, n, seed, stream=0, epoch=0):
    """int64 array: where each `index` (integers in [0, n)) goes in the permutation named (seed, stream, epoch)."""
    a = math.isqrt(n - 1) + 1 if n > 1 else 1
    b = -(-n // a)
    keys = _keys(seed, stream, epoch)

    def network(x):
        left, right = x // _U(b), x % _U(b)  # left in [0, a), right in [0, b)
        for number, key in enumerate(keys):
            if number % 2 == 0:
                left = (left + _mix(right ^ key) % _U(a)) % _U(a)
            else:
                right = (right + _mix(left ^ key) % _U(b)) % _U(b)
        return left * _U(b) + right

    out = network(np.asarray(index).astype(_U))
    outside = np.flatnonzero(out >= n)
    while outside.size:  # walk the cycle until it is back among the first n
        out[outside] = network(out[outside])
        outside = outside[out[outside] >= n]
    return out.astype(np.int64)


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
