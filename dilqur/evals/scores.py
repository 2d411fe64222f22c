"""How well examples were labelled, as sums over examples: every metric is the mean over classes of one sum divided by another, so that
seeds, folds and a bootstrap only add up.

    accuracy    of texts, or of words           right / all
    macro_f1    mean over the labels of F1      2 · right / (said + true), of each label
    entity_f1   F1 of whole entities            the same of entities in B-I-O tags: kind, first and last word all right (as conlleval)
"""

import numpy as np

from dilqur.common.bootstrap import FEWEST, RESAMPLES, interval

METRICS = ("accuracy", "macro_f1", "entity_f1")
RANDOM_WEIGHTS = "random weights"  # what a control without pre-training is called


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


def counts(metric, true, predicted, labels):
    """(numerators, denominators), float64 (examples, classes), of lists of labels, or of sequences of them. labels: all there are."""
    if metric == "entity_f1":
        pairs = [(entities(t), entities(p)) for t, p in zip(true, predicted, strict=True)]
        return np.array([[2.0 * len(t & p)] for t, p in pairs]), np.array([[float(len(t) + len(p))] for t, p in pairs])
    true, predicted = ([(x,) if isinstance(x, str) else x for x in side] for side in (true, predicted))
    if metric == "accuracy":
        right = [[float(sum(a == b for a, b in zip(t, p, strict=True)))] for t, p in zip(true, predicted, strict=True)]
        return np.array(right), np.array([[float(len(t))] for t in true])
    number = {label: i for i, label in enumerate(labels)}
    numerators, denominators = np.zeros((2, len(true), len(labels)))
    for row, (t, p) in enumerate(zip(true, predicted, strict=True)):
        for a, b in zip(t, p, strict=True):
            numerators[row, number[a]] += 2.0 * (a == b)
            denominators[row, number[a]] += 1
            if b in number:  # else the word was cut off, and nothing predicted
                denominators[row, number[b]] += 1
    return numerators, denominators


def score(numerators, denominators):
    """The metric of counts that were summed over examples, (classes,): the mean over the classes that occur, 0 where none does."""
    occurs = denominators > 0
    return float(np.mean(numerators[occurs] / denominators[occurs])) if occurs.any() else 0.0


def compare(runs, seed=0):
    """{name: {"score", "scores", "interval"[, "difference", "difference_interval"]}}; differences are to the first model.

    runs: {name: [(sources, numerators, denominators) of each seed]}, sources being int arrays (examples,), the documents that the examples
    were cut from, the same for every model. score is the mean of `scores`, one a seed. A resample draws documents with replacement, and
    seeds too where all were measured on the same documents; of folds, whose scores differ by their documents already, it takes
    all. The draws are the same for all models. An interval is None for fewer than 10 documents.
    """
    names, first = list(runs), next(iter(runs.values()))
    documents, places = np.unique(np.concatenate([sources for sources, _, _ in first]), return_inverse=True)
    places = np.split(places, np.cumsum([len(sources) for sources, _, _ in first])[:-1])
    folds = any(not np.array_equal(place, places[0]) for place in places)
    random, many = np.random.default_rng(seed), len(documents)
    drawn = np.empty((len(names), RESAMPLES if many >= FEWEST else 0))
    for at in range(drawn.shape[1]):
        weights = np.bincount(random.integers(many, size=many), minlength=many)
        chosen = range(len(first)) if folds or len(first) == 1 else random.integers(len(first), size=len(first))
        for row, name in enumerate(names):
            sums = ((weights[places[i]] @ runs[name][i][1], weights[places[i]] @ runs[name][i][2]) for i in chosen)
            drawn[row, at] = np.mean([score(*both) for both in sums])
    result = {}
    for row, name in enumerate(names):
        scores = [score(above.sum(0), below.sum(0)) for _, above, below in runs[name]]
        result[name] = {"score": float(np.mean(scores)), "scores": scores, "interval": interval(drawn[row])}
        if row:
            result[name]["difference"] = result[name]["score"] - result[names[0]]["score"]
            result[name]["difference_interval"] = interval(drawn[row] - drawn[0])
    return result
