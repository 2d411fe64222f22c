"""Tokenizers of one training, cut at several sizes: which ones are nested, and where a curve of their sizes has its knee."""

import json

import numpy as np


def nested_families(tokenizers, fewest=3):
    """Lists of the names in {name: TextTokenizer} whose merges begin each other's, the smallest first: byte-level BPE with one
    way to cut text into words, where the merges of each are the first ones of the next. Only lists of at least `fewest`."""
    merges, alike = {}, {}
    for name, tokenizer in tokenizers.items():
        spec = json.loads(tokenizer.backend.to_str())
        if spec["model"]["type"] == "BPE" and "ByteLevel" in json.dumps(spec["pre_tokenizer"]):
            merges[name] = spec["model"]["merges"]
            alike[name] = [spec["normalizer"], spec["pre_tokenizer"], spec["model"].get("ignore_merges", False)]
    families = []
    for name in sorted(merges, key=lambda name: len(merges[name])):
        for family in families:
            last = family[-1]
            if alike[last] == alike[name] and merges[name][: len(merges[last])] == merges[last] != merges[name]:
                family.append(name)
                break
        else:
            families.append([name])
    return [family for family in families if len(family) >= fewest]


def knee(sizes, values):
    """(index, depth) of the knee of a falling curve that flattens out, None where it does not: the point furthest below the
    straight line from the first to the last, with the logarithm of the size and the value both scaled to 0…1 (Satopää et al. 2011,
    "Finding a 'Kneedle' in a Haystack", its difference curve without the smoothing). depth: how far below, 0 to 1; where that is
    little the curve has no corner, and the knee says more of the range that was swept than of the language.

    sizes: (n,), ascending; values: (n,)."""
    x, y = np.log2(np.asarray(sizes, float)), np.asarray(values, float)
    if len(x) < 3 or y[-1] >= y[0]:
        return None
    below = (y[0] - y) / (y[0] - y[-1]) - (x - x[0]) / (x[-1] - x[0])
    best = int(below.argmax())
    return (best, float(below[best])) if below[best] > 1e-9 else None
