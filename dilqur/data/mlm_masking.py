"""Which tokens an encoder has to guess: a pure function of (seed, position in the stream), with nothing to save.

The same positions are masked on any number of ranks and after any resume, and others each time a sample comes round, for then
it stands at another position. Random numbers are NumPy's Philox with the key (seed, position): one generator a sample.

    rule       what stands where a token is to be guessed
    mask       [MASK], always: as NeoBERT does
    80-10-10   [MASK] in 80 %, a random token in 10 %, the token itself in 10 %: as BERT does

    count         how many
    independent   each eligible token with probability `rate`: the number varies from sample to sample, as in the reference code
    fixed         round(rate · eligible tokens) of each sample, at least one: the same number wherever as many are eligible
"""

import functools
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from dilqur.common.constants import IGNORE_INDEX
from dilqur.common.errors import InputError

Rule = Literal["mask", "80-10-10"]
Count = Literal["independent", "fixed"]


@dataclass(frozen=True)
class Masking:
    """special: ids that are never to be guessed and never drawn, such as [CLS], [SEP], [MASK] and [PAD]."""

    mask_id: int
    special: frozenset
    vocab_size: int
    rate: float = 0.2
    rule: Rule = "mask"
    count: Count = "independent"

    def __call__(self, input_ids, positions, seed):
        """(masked input_ids, labels), int64 arrays of the shape of `input_ids`, (samples, length): labels are IGNORE_INDEX where nothing is
        to be guessed. positions: int array (samples,). Raises InputError where count is fixed and a sample has no eligible token."""
        eligible = self._is_ordinary[input_ids]
        numbers = np.stack([_numbers(seed, position, input_ids.shape[1]) for position in positions.tolist()])
        chosen = self._choose(numbers[:, 0], eligible, positions)
        labels = np.where(chosen, input_ids, IGNORE_INDEX)
        if self.rule == "mask":
            return np.where(chosen, self.mask_id, input_ids), labels
        ordinary = np.flatnonzero(self._is_ordinary)
        drawn = ordinary[(numbers[:, 2] * len(ordinary)).astype(np.int64)]
        shown = np.where(numbers[:, 1] < 0.8, self.mask_id, np.where(numbers[:, 1] < 0.9, drawn, input_ids))
        return np.where(chosen, shown, input_ids), labels

    def most(self, samples, length):
        """How many tokens of a batch are to be guessed, and hardly ever more: six standard deviations above the mean where each is by
        itself, up to a multiple of 128. An int."""
        tokens = samples * length
        above = samples / 2 if self.count == "fixed" else 6 * math.sqrt(tokens * self.rate * (1 - self.rate))
        return min(tokens, -(-math.ceil(self.rate * tokens + above) // 128) * 128)

    @functools.cached_property
    def _is_ordinary(self):
        """bool array (vocab_size,)."""
        ordinary = np.ones(self.vocab_size, bool)
        ordinary[list(self.special)] = False
        return ordinary

    def _choose(self, numbers, eligible, positions):
        if self.count == "independent":
            return eligible & (numbers < self.rate)
        many = eligible.sum(1)
        if not many.all():
            empty = positions[np.argmin(many)]
            raise InputError(
                f"masking: the sample at position {empty} has no token that may be masked: take count independent"
            )
        wanted = np.maximum(1, np.rint(self.rate * many).astype(np.int64))
        order = np.argsort(np.where(eligible, numbers, 2.0), axis=1, kind="stable")
        chosen = np.zeros_like(eligible)
        np.put_along_axis(chosen, order, np.arange(eligible.shape[1]) < wanted[:, None], axis=1)
        return chosen


def _numbers(seed, position, length):
    """Three rows of `length` numbers in [0, 1): which tokens, what is shown instead, which random token."""
    return np.random.Generator(np.random.Philox(key=[seed, position])).random((3, length))
