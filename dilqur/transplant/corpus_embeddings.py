"""A vector for each token from the text it stands in: tokens with like neighbours get like vectors. No model, no training."""

import numpy as np

WINDOW = 5  # neighbours on each side; one at distance d counts 1/d
SMOOTHING = 0.75  # power of the neighbours' frequencies: or rare neighbours would weigh most
BATCH = 256  # documents encoded at a time
MERGE = 1 << 25  # pairs counted before equal ones are added up


def corpus_embeddings(texts, tokenizer, size, dimension=256, max_tokens=None, seed=0):
    """float32 tensor (size, dimension): singular vectors of the positive pointwise mutual information of neighbouring tokens.

    Levy, Goldberg and Dagan 2015 (TACL 3, 211): PPMI with context distribution smoothing, vectors U·√S of its truncated SVD.
    texts: iterable of str. tokenizer: TextTokenizer whose ids are below `size`. max_tokens: read no further. A token without
    neighbours in the text has a row of zeros. The matrix is symmetric: neighbours on both sides are alike.
    """
    import torch

    keys, counts = _pairs(texts, tokenizer, size, max_tokens)
    dimension = min(dimension, size)
    if not len(keys):
        return torch.zeros(size, dimension)
    rows, columns, values = _ppmi(keys, counts, size)
    matrix = torch.sparse_coo_tensor(
        np.stack([rows, columns]), values, (size, size), check_invariants=False, is_coalesced=True
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        left, singular, _ = torch.svd_lowrank(matrix, q=dimension, niter=4)
    vectors = left * singular.sqrt()
    seen = torch.zeros(size, dtype=torch.bool)
    seen[torch.from_numpy(np.unique(rows))] = True
    return vectors * seen.unsqueeze(1)


def _pairs(texts, tokenizer, size, max_tokens):
    """(keys int64, counts float32): keys are row · size + column, in both directions, sorted and each once."""
    parts, pending, read, batch = [], 0, 0, []

    def add(texts_):
        nonlocal pending, read
        for ids in tokenizer.encode_batch(texts_):
            ids = np.array(ids[: None if max_tokens is None else max(0, max_tokens - read)], np.int64)
            read += len(ids)
            for distance in range(1, min(WINDOW, len(ids) - 1) + 1):
                left, right = ids[:-distance], ids[distance:]
                both = np.concatenate([left * size + right, right * size + left])
                parts.append((both, np.full(len(both), 1 / distance, np.float32)))
                pending += len(both)
        if pending > MERGE:
            parts[:] = [_added_up(parts)]
            pending = 0

    for text in texts:
        batch.append(text)
        if len(batch) == BATCH:
            add(batch)
            batch = []
        if max_tokens is not None and read >= max_tokens:
            break
    add(batch)
    return _added_up(parts)


def _added_up(parts):
    if not parts:
        return np.empty(0, np.int64), np.empty(0, np.float32)
    keys, counts = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    first = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
    return keys[first], np.add.reduceat(counts[order], first, dtype=np.float32)


def _ppmi(keys, counts, size):
    """(rows, columns, values) where log(p(a, b) / (p(a) · p(b)^0.75 normalised)) is above 0."""
    rows, columns = np.divmod(keys, size)
    frequency = np.bincount(rows, counts, minlength=size)
    context = frequency**SMOOTHING
    context /= context.sum()
    values = np.log(counts / (frequency[rows] * context[columns]))
    # smoothing one side only would make the matrix lopsided: the mean of both directions
    values = (values + np.log(counts / (frequency[columns] * context[rows]))) / 2
    kept = values > 0
    return rows[kept], columns[kept], values[kept].astype(np.float32)
