"""New embedding rows from old ones, for a vocabulary that replaces or extends another.

A row of the new matrix is a copy, a weighted sum of old rows, or the mean of the old rows. `plan_rows` says which, once for the
embeddings and once for the head; `new_matrix` computes it for a matrix, block by block.
"""

from dataclasses import dataclass

import numpy as np
import torch

from dilqur.transplant.matching_pursuit import matching_pursuit, sparsemax

METHODS = (
    "random", "mean", "piece_mean", "weighted_piece_mean", "calibrated_piece_mean", "focus", "orthogonal_matching_pursuit",
)  # fmt: skip
CLASSES = (
    "copied", "byte", "special copied", "from pieces", "from similarity", "mean", "random", "fallback", "special made",
)  # fmt: skip
BLOCK = 1 << 13  # old rows gathered at a time, as float32: 134 MB at a hidden size of 4,096
STEEPNESS_OF = {"embeddings": (2.0,), "head": (-2.0,), "tied": (2.0, -2.0)}  # of weighted_piece_mean's weights


@dataclass
class Part:
    """Rows of one class, all made in the same way: ids (n,) of the new matrix.

    sources is None: the mean of the old rows, with noise if the class is "random". Otherwise row i is the sum of the old rows
    sources[offsets[i]:offsets[i + 1]] times weights; weights is None: a copy of old row sources[i].
    """

    name: str
    ids: np.ndarray
    sources: np.ndarray | None = None
    offsets: np.ndarray | None = None
    weights: np.ndarray | None = None
    calibrated: bool = False


# -- what each row is made of -----------------------------------------------------------------------------------------


def plan_rows(method, vocabulary, matrix="embeddings", space=None, sparsity=64, device="cpu"):
    """list[Part]: how every row below the new tokenizer's size comes from old ones.

    Tokens of both vocabularies and control tokens of the same name are copied, whatever the method; a control token that the old
    tokenizer lacks, and a token with a byte that it lacks, get the mean of the old rows. The rest are made by one of METHODS:

    random                  normal, with the mean and the standard deviation of the old rows in each dimension
    mean                    the mean of the old rows: what transformers' resize_token_embeddings draws new rows around (Hewitt
                            2021, "Initializing New Word Embeddings for Pretrained Language Models"), without the drawing: that
                            adds noise of the rows' covariance, which keeps rows apart where nothing else does
    piece_mean              the mean of the rows of its pieces under the old tokenizer (as fast vocabulary transfer does: Gee et
                            al. 2022, arXiv 2402.09977)
    weighted_piece_mean     pieces i = 1 … k weighted by e^(2i) in the embeddings, where the last one says what comes next, and by
                            e^(-2i) in the head, which has to begin with the first (AdaptiVocab: Nakash et al. 2025, arXiv
                            2503.19693); in a tied matrix by the mean of the two, which is ours
    calibrated_piece_mean   the mean of the pieces, put through a map learned from old tokens (dilqur/transplant/piece_calibration.py)
    focus                   the overlapping tokens' rows, weighted by sparsemax of the cosine similarities in `space` (FOCUS:
                            Dobler and de Melo 2023, arXiv 2305.14481)
    orthogonal_matching_pursuit     at most `sparsity` overlapping tokens whose vectors in `space` add up best to the token's;
                            their rows with the same coefficients (Goddard and Fernandes Neto 2025, arXiv 2506.06607)

    vocabulary: VocabularyMap. matrix: "embeddings", "head", or "tied", which is both. space: float32 (new size, d), vectors of
    the new tokens, for the last two methods; a token whose vector is 0 falls back to `piece_mean`. device: where these compute.
    """
    parts = [
        Part(name, *map(np.array, (list(ids), list(ids.values())))) for name, ids in vocabulary.copied.items() if ids
    ]
    made = [*vocabulary.pieces, *vocabulary.no_pieces]
    if method in ("random", "mean"):
        parts.append(Part(method, np.array(made, np.int64)))
    elif method.endswith("piece_mean"):
        steepness = STEEPNESS_OF[matrix] if method == "weighted_piece_mean" else (0.0,)
        part = from_pieces(vocabulary, vocabulary.pieces, steepness=steepness)
        part.calibrated = method == "calibrated_piece_mean"
        parts.append(part)
    else:
        similar, others = from_similarity(method, vocabulary, space, sparsity, device)
        parts += [similar, from_pieces(vocabulary, others, "fallback")]
    if method not in ("random", "mean"):
        parts.append(Part("fallback", np.array(vocabulary.no_pieces, np.int64)))
    parts.append(Part("special made", np.array(vocabulary.special_made, np.int64)))
    return [part for part in parts if len(part.ids)]


def from_pieces(vocabulary, ids, name="from pieces", steepness=(0.0,)):
    """Part of the tokens `ids`: piece i of a token weighs e^(s · i), normalised; of several s, the mean of these weights."""
    pieces = [vocabulary.pieces[i] for i in ids]
    lengths = np.array([len(p) for p in pieces], np.int64)
    # the largest exponent is 0: nothing overflows
    weights = [sum(_normalised(np.exp(s * (np.arange(k) - (k - 1) * (s > 0)))) for s in steepness) for k in lengths]
    return Part(
        name,
        np.array(list(ids), np.int64),
        np.array([i for p in pieces for i in p], np.int64),
        np.concatenate([[0], lengths.cumsum()]),
        np.concatenate([[], *map(_normalised, weights)]).astype(np.float32),
    )


def _normalised(weights):
    return weights / weights.sum()


def from_similarity(method, vocabulary, space, sparsity, device):
    """(Part of the tokens with a vector, ids of those without), for `focus` and `orthogonal_matching_pursuit`."""
    has = (space != 0).any(1).numpy()
    ids = np.array([i for i in vocabulary.pieces if has[i]] + [i for i in vocabulary.no_pieces if has[i]], np.int64)
    others = [i for i in vocabulary.pieces if not has[i]]
    anchors = np.array([i for i in vocabulary.anchors if has[i]], np.int64)
    if not len(anchors):
        return Part("from similarity", ids[:0]), list(vocabulary.pieces)
    rows = np.array([vocabulary.anchors[i] for i in anchors], np.int64)
    atoms = space[anchors].to(device)
    sources, weights, lengths = [], [], []
    focus = method == "focus"
    if focus:
        atoms = torch.nn.functional.normalize(atoms)
    # of float32: (n, anchors) for one, (n, sparsity, d) too for the other
    block = max(1, (1 << 26) // (len(anchors) + (0 if focus else sparsity * space.shape[1])))
    for at in range(0, len(ids), block):
        targets = space[ids[at : at + block]].to(device)
        if focus:
            dense = sparsemax(torch.nn.functional.normalize(targets) @ atoms.T)
            which, column = dense.nonzero(as_tuple=True)
            lengths.append(torch.bincount(which, minlength=len(targets)))
            sources.append(column)
            weights.append(dense[which, column])
        else:
            chosen, coefficients = matching_pursuit(targets, atoms, sparsity)
            lengths.append(torch.full((len(targets),), chosen.shape[1]))
            sources.append(chosen.flatten())
            weights.append(coefficients.flatten())
    together = [torch.cat(column).cpu().numpy() if column else np.empty(0) for column in (lengths, sources, weights)]
    offsets = np.concatenate([[0], together[0].cumsum()]).astype(np.int64)
    return Part("from similarity", ids, rows[together[1].astype(np.int64)], offsets, together[2]), others


# -- a matrix ---------------------------------------------------------------------------------------------------------


def new_matrix(old, vocabulary, parts, rows, match_norms="none", seed=0, calibration=None):
    """(tensor (rows, hidden) of `old`'s dtype on the CPU, {class: {count, mean norm as made, mean norm as written}}).

    old: (old rows, hidden), of any float dtype; rows past its tokenizer are not used. parts: of `plan_rows`. The arithmetic is
    float32; copies are to the bit. Rows without a token are the mean of all others, so that no logit stands out.
    match_norms: "row" scales each row that is made to the mean norm of the old rows, "class" scales all rows of a class by one
    factor, so that the mean of their norms is that. seed: of the noise of `random`. calibration: Calibration of this matrix.
    """
    out = torch.zeros(rows, old.shape[1], dtype=old.dtype)
    mean, deviation, norm = statistics(old, vocabulary.old_ordinary)
    noise = torch.Generator().manual_seed(seed)
    total, table = torch.zeros(old.shape[1], dtype=torch.float64), {}
    empty = torch.ones(rows, dtype=torch.bool)
    for part in parts:
        copied, factor = part.sources is not None and part.weights is None, 1.0
        if match_norms == "class" and not copied:
            state = noise.get_state()
            made = sum(
                b.norm(dim=1).double().sum().item() for _, b in blocks(part, old, mean, deviation, noise, calibration)
            )
            noise.set_state(state)
            factor = norm * len(part.ids) / made if made else 1.0
        before = after = 0.0
        for ids, block in blocks(part, old, mean, deviation, noise, calibration):
            lengths = block.norm(dim=1)
            before += lengths.double().sum().item()
            if not copied and match_norms != "none":
                block = block * (norm / lengths.clamp(min=1e-12).unsqueeze(1) if match_norms == "row" else factor)
            out[ids] = block.to(old.dtype)
            empty[ids] = False
            after += block.norm(dim=1).double().sum().item()
            total += block.sum(0, dtype=torch.float64)
        row = table.setdefault(part.name, {"count": 0, "norm_made": 0.0, "norm_written": 0.0})
        row["count"] += len(part.ids)
        row["norm_made"] += before
        row["norm_written"] += after
    for row in table.values():
        row["norm_made"], row["norm_written"] = (row[key] / row["count"] for key in ("norm_made", "norm_written"))
    if empty.any():
        padding = (total / (~empty).sum()).float()
        out[empty] = padding.to(old.dtype)
        length = padding.norm().item()
        table["padding"] = {"count": int(empty.sum()), "norm_made": length, "norm_written": length}
    return out, {name: table[name] for name in (*CLASSES, "padding") if name in table}


def blocks(part, old, mean, deviation, noise, calibration=None):
    """Yield (ids, float32 rows) of a Part, a block at a time."""
    widths = np.ones(len(part.ids), np.int64) if part.offsets is None else np.diff(part.offsets)
    for start, stop in _cuts(widths, BLOCK):
        ids = torch.from_numpy(part.ids[start:stop])
        if part.sources is None:
            block = mean.repeat(len(ids), 1)
            if part.name == "random":
                block += deviation * torch.randn(block.shape, generator=noise)
        elif part.weights is None:
            block = old[torch.from_numpy(part.sources[start:stop])].float()
        else:
            block = _sums(part, start, stop, old)
            if part.calibrated:
                block = calibration(block, part.ids[start:stop], widths[start:stop])
        yield ids, block


def _sums(part, start, stop, old):
    inside = slice(part.offsets[start], part.offsets[stop])
    needed, local = np.unique(part.sources[inside], return_inverse=True)
    return torch.nn.functional.embedding_bag(
        torch.from_numpy(local),
        old[torch.from_numpy(needed)].float(),
        torch.from_numpy(part.offsets[start:stop] - part.offsets[start]),
        per_sample_weights=torch.from_numpy(part.weights[inside]),
        mode="sum",
    )


def _cuts(widths, size):
    """(start, stop) of runs whose widths add up to at most `size`, or of one that is wider."""
    start = total = 0
    for i, width in enumerate(widths.tolist()):
        if i > start and total + width > size:
            yield start, i
            start, total = i, 0
        total += width
    if start < len(widths):
        yield start, len(widths)


def statistics(old, ids):
    """(mean (hidden,), standard deviation (hidden,), mean of the norms) of rows of `old`, float32 from sums in float64."""
    first = second = norms = 0.0
    for at in range(0, len(ids), BLOCK // 4):
        block = old[torch.tensor(ids[at : at + BLOCK // 4])].double()
        first, second = first + block.sum(0), second + block.square().sum(0)
        norms += block.norm(dim=1).sum().item()
    mean = first / len(ids)
    variance = (second / len(ids) - mean.square()).clamp(min=0)
    return mean.float(), variance.sqrt().float(), norms / len(ids)
