"""How well examples were labelled, as sums over examples: every metric is the mean over classes of one sum divided by another, so that
seeds, folds and a bootstrap only add up.

    accuracy    of texts, or of words           right / all
    macro_f1    mean over the labels of F1      2 · right / (said + true), of each label
    entity_f1   F1 of whole entities            the same of entities in B-I-O tags: kind, first and last word all right (as conlleval)
"""

import numpy as np

from dilqur.bootstrap import FEWEST, RESAMPLES, divide, interval

METRICS = ("accuracy", "macro_f1", "entity_f1")


def entities(tags):
    """{(kind, first, last)} of a sentence's tags: B-X begins an entity, and so does an I-X that follows anything but a B-X or I-X."""
    found, start, kind = set(), None, None
    for i, tag in enumerate((*tags, "O")):
        prefix, _, now = tag.partition("-")
        goes_on = prefix == "I" and now == kind and start is not None
        if start is not None and not goes_on:
            found.add((kind, start, i - 1))
            start = kind = None
        if prefix in ("B", "I") and not goes_on:
            start, kind = i, now
    return found


def counts(metric, true, said, labels):
    """(above, below), float64 (examples, classes), of lists of what is true and what was said: labels, or sequences of them.
    labels: all there are."""
    if metric == "entity_f1":
        pairs = [(entities(t), entities(s)) for t, s in zip(true, said, strict=True)]
        above = [[2.0 * len(t & s)] for t, s in pairs]
        return np.array(above), np.array([[float(len(t) + len(s))] for t, s in pairs])
    true, said = ([(x,) if isinstance(x, str) else x for x in side] for side in (true, said))
    if metric == "accuracy":
        above = [[float(sum(a == b for a, b in zip(t, s, strict=True)))] for t, s in zip(true, said, strict=True)]
        return np.array(above), np.array([[float(len(t))] for t in true])
    number = {label: i for i, label in enumerate(labels)}
    above, below = np.zeros((2, len(true), len(labels)))
    for row, (t, s) in enumerate(zip(true, said, strict=True)):
        for a, b in zip(t, s, strict=True):
            above[row, number[a]] += 2.0 * (a == b)
            below[row, number[a]] += 1
            if b in number:  # else the word was cut off, and nothing said of it
                below[row, number[b]] += 1
    return above, below


def score(above, below):
    """The metric of counts that were summed over examples, (..., classes): the mean over the classes that occur."""
    with np.errstate(all="ignore"):
        return np.nanmean(divide(above, below), axis=-1)


def compare(runs, sources, seed=0):
    """({name: {"score", "scores", "interval"}}, {name of each model after the first: {"difference", "interval"}}).

    runs: {name: [(numbers of the examples, above, below) of each seed]}, the same numbers for every model. sources: of all examples.
    score is the mean of `scores`, one a seed. A resample draws seeds and sources with replacement, the same for all models; an interval is
    None for fewer than 10 sources.
    """
    names, first = list(runs), next(iter(runs.values()))
    _, place = np.unique(sources, return_inverse=True)
    many, random = place.max() + 1, np.random.default_rng(seed)
    figures = {name: [float(score(above.sum(0), below.sum(0))) for _, above, below in runs[name]] for name in names}
    drawn = np.empty((len(names), RESAMPLES if many >= FEWEST else 0))
    for at in range(drawn.shape[1]):
        weights = np.bincount(random.integers(many, size=many), minlength=many)[place]
        chosen = random.integers(len(first), size=len(first))
        for row, name in enumerate(names):
            each = [
                (weights[numbers] @ above, weights[numbers] @ below)
                for numbers, above, below in (runs[name][i] for i in chosen)
            ]
            drawn[row, at] = np.nanmean([score(*sums) for sums in each])
    result = {
        name: {"score": float(np.mean(figures[name])), "scores": figures[name], "interval": interval(drawn[row])}
        for row, name in enumerate(names)
    }
    differences = {
        name: {
            "difference": result[name]["score"] - result[names[0]]["score"],
            "interval": interval(drawn[row] - drawn[0]),
        }
        for row, name in enumerate(names)
        if row
    }
    return result, differences
