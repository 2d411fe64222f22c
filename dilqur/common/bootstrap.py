"""Confidence intervals over documents, by the bootstrap: how far a figure moves when the documents are drawn anew.

Tokens per word, bits per byte and the like are a sum over documents divided by another sum. A resample draws n of the n documents
with replacement and divides its own two sums; no ratios are averaged. An interval holds the middle 95 % of 1,000 such ratios
(the percentile method; Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 13). All figures of one call are
taken from the same draws, so that their differences are paired. Documents are drawn as wholes: words of one document are alike.
"""

import numpy as np

RESAMPLES = 1000
FEWEST = 10  # with fewer documents than this the draws say little, and no interval is given
LEVEL = 0.95


def resampled_sums(values, seed=0):
    """values (n, k) of n documents → float64 (RESAMPLES, k): the sums of each resample; (0, k) for fewer than FEWEST documents."""
    values = np.asarray(values, np.float64)
    n, k = values.shape
    if n < FEWEST:
        return np.empty((0, k))
    random = np.random.default_rng(seed)
    return np.stack([np.bincount(random.integers(n, size=n), minlength=n) @ values for _ in range(RESAMPLES)])


def resampled_ratios(numerators, denominators, seed=0):
    """numerators (n, k), denominators (n,) or (n, k) of n documents → float64 (RESAMPLES, k), or (0, k): their ratio in each
    resample, not finite where its denominator is 0."""
    numerators = np.asarray(numerators, np.float64)
    denominators = np.asarray(denominators, np.float64).reshape(len(numerators), -1)
    sums = resampled_sums(np.concatenate([numerators, denominators], axis=1), seed)
    return divide(sums[:, : numerators.shape[1]], sums[:, numerators.shape[1] :])


def interval(resampled):
    """(low, high), floats, of the figures (m,) of m resamples; None where there are none. Of paired figures give the difference."""
    resampled = np.asarray(resampled)[np.isfinite(resampled)]
    if not len(resampled):
        return None
    low, high = np.quantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def divide(above, below):
    """above / below, NaN or infinite where there is nothing to divide by, in silence."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return above / below
