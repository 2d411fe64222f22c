"""What the mean of a token's pieces says about its own row, learned from the tokens that a model has.

Every token of the old vocabulary has a row, and pieces: what BPE would cut it into with fewer merges. A ridge regression from
the mean of the pieces' rows, the token's frequency and the number of its pieces to its own row is what a new token's pieces are
put through. The mean alone keeps far too much of the pieces, and knows nothing of how frequent the token is, which is the
first thing a head has to know.
"""

import json

import numpy as np
import torch

from dilqur.common.errors import InputError

CUTS = (2, 8, 32, None)  # the merges that are left for the pieces: a half of them, an eighth, … none
RIDGE = 0.1  # times the number of examples, features scaled to variance 1
MAX_EXAMPLES = 1 << 15  # eight for each feature at a hidden size of 4,096
BLOCK = 1 << 12
ZIPF = 2.7  # Mandelbrot's offset of the ranks


def levels(ranks):
    """Log frequency up to a constant, float32, of tokens with these ranks from 0: Zipf's law with Mandelbrot's offset."""
    return -np.log(np.asarray(ranks, np.float32) + ZIPF)


def new_levels(vocabulary, counts=None):
    """float32 (size,): the level of every id of the new tokenizer. counts: int (size,) how often each occurs in a text; without
    one the ids stand for the ranks, as a merge comes the earlier the more frequent it is."""
    ids = np.array(sorted([*vocabulary.anchors, *vocabulary.pieces, *vocabulary.no_pieces]), np.int64)
    ranks = np.zeros(vocabulary.size, np.int64)
    order = ids if counts is None else ids[np.argsort(-counts[ids], kind="stable")]
    ranks[order] = np.arange(len(order))
    return levels(ranks)


class Examples:
    """Old tokens with pieces. targets: int64 (n,) ids; sources, offsets: their pieces' ids; levels: float32 (n,)."""

    def __init__(self, old_tokenizer, vocabulary):
        from tokenizers.models import BPE

        spec = json.loads(old_tokenizer.backend.to_str())["model"]
        merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in spec["merges"]]
        ids, ranks = spec["vocab"], {i: rank for rank, i in enumerate(vocabulary.old_ordinary)}
        whole = [(left + right, at) for at, (left, right) in enumerate(merges) if ids[left + right] in ranks]
        made = {token for token, _ in whole}
        single = {token: i for token, i in ids.items() if token not in made and i in ranks}
        found = []
        for cut in CUTS:
            left = len(merges) // cut if cut else 0
            known = single | {token: ids[token] for token, at in whole if at < left}
            shorter = BPE(vocab=known, merges=[m for m in merges[:left] if {*m, m[0] + m[1]} <= known.keys()])
            found += [
                (ids[token], [p.id for p in shorter.tokenize(token)])
                for token, at in whole
                if at >= left and ids[token] in ranks
            ]
        found = [(target, pieces) for target, pieces in found if len(pieces) > 1]
        found = found[:: -(-len(found) // MAX_EXAMPLES) or 1]
        if not found:
            raise InputError(f"{old_tokenizer.path}: has no merges to learn from; take method: piece_mean")
        self.targets = np.array([target for target, _ in found], np.int64)
        self.sources = np.array([i for _, pieces in found for i in pieces], np.int64)
        self.lengths = np.array([len(pieces) for _, pieces in found], np.int64)
        self.levels = levels([ranks[target] for target, _ in found])

    def blocks(self, old):
        """Yield (features, targets), float32, a block at a time."""
        offsets = np.concatenate([[0], self.lengths.cumsum()])
        for at in range(0, len(self.targets), BLOCK):
            stop = min(at + BLOCK, len(self.targets))
            inside = self.sources[offsets[at] : offsets[stop]]
            needed, local = np.unique(inside, return_inverse=True)
            means = torch.nn.functional.embedding_bag(
                torch.from_numpy(local),
                old[torch.from_numpy(needed)].float(),
                torch.from_numpy(offsets[at:stop] - offsets[at]),
                mode="mean",
            )
            yield (
                features(means, self.levels[at:stop], self.lengths[at:stop]),
                old[torch.from_numpy(self.targets[at:stop])].float(),
            )


class Calibration:
    """Ridge regression of one matrix's old rows on their pieces, in float64. examples: Examples. levels: of `new_levels`.

    Called with the means of the pieces (n, hidden), the ids of their tokens and the numbers of their pieces, it returns the rows.
    explained: share of the old rows' variance, from 0 to 1.
    """

    def __init__(self, old, examples, levels):
        hidden = old.shape[1]
        sums, squares = (
            torch.zeros(hidden + 2, dtype=torch.float64),
            torch.zeros(hidden + 2, hidden + 2, dtype=torch.float64),
        )
        target_sums, products = (
            torch.zeros(hidden, dtype=torch.float64),
            torch.zeros(hidden + 2, hidden, dtype=torch.float64),
        )
        target_squares, n = 0.0, len(examples.targets)
        for x, y in examples.blocks(old):
            sums += x.double().sum(0)
            target_sums += y.double().sum(0)
            squares += (x.T @ x).double()
            products += (x.T @ y).double()
            target_squares += y.double().square().sum().item()
        self.mean, self.target_mean, self.levels = sums / n, target_sums / n, levels
        squares -= n * torch.outer(self.mean, self.mean)
        products -= n * torch.outer(self.mean, self.target_mean)
        self.scale = (squares.diagonal() / n).clamp(min=0).sqrt().clamp(min=1e-12)
        squares /= torch.outer(self.scale, self.scale)
        products /= self.scale.unsqueeze(1)
        ridge = squares + RIDGE * n * torch.eye(hidden + 2, dtype=torch.float64)
        weights = torch.linalg.solve(ridge, products)
        variance = target_squares - n * self.target_mean.square().sum().item()
        left = variance - 2 * (weights * products).sum().item() + (weights * (squares @ weights)).sum().item()
        self.explained = 1 - left / variance if variance > 0 else 0.0
        self.weights, self.mean = (weights / self.scale.unsqueeze(1)).float(), self.mean.float()
        self.target_mean = self.target_mean.float()

    def __call__(self, means, ids, lengths):
        return (features(means, self.levels[ids], lengths) - self.mean) @ self.weights + self.target_mean


def features(means, levels, lengths):
    """float32 (n, hidden + 2): the mean of the pieces, the level, the log of the number of pieces."""
    more = np.stack([levels, np.log(lengths)], 1).astype(np.float32)
    return torch.cat([means, torch.from_numpy(more)], 1)
