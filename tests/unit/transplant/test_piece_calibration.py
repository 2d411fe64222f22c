"""The map from pieces to rows: learned from tokens the old vocabulary has, and right where there is something to learn."""

import numpy as np
import pytest
import torch

from dilqur.tokenizer.text_tokenizer import TextTokenizer
from dilqur.transplant.piece_calibration import RIDGE, Calibration, Examples, levels, new_levels
from dilqur.transplant.vocabulary_map import VocabularyMap

HIDDEN = 6


@pytest.fixture(scope="module")
def old(english):
    return TextTokenizer(english)


@pytest.fixture(scope="module")
def vocabulary(old, made):
    return VocabularyMap(old, TextTokenizer(made / "tokenizer"))


@pytest.fixture(scope="module")
def examples(old, vocabulary):
    return Examples(old, vocabulary)


@pytest.fixture(scope="module")
def matrix(old):
    return torch.randn(old.size, HIDDEN, generator=torch.Generator().manual_seed(0))


def split(examples):
    return np.split(examples.sources, examples.lengths.cumsum()[:-1])


def test_the_examples_are_old_tokens_in_shorter_pieces(examples, old):
    token = {i: t for t, i in old.backend.get_vocab(with_added_tokens=False).items()}
    for target, pieces in zip(examples.targets.tolist(), split(examples), strict=True):
        assert len(pieces) > 1 and "".join(token[i] for i in pieces.tolist()) == token[target]
    everything = set(range(700)) - {i for i, t in token.items() if len(t) == 1}
    assert set(examples.targets.tolist()) == everything  # each of the 444 merges, at least cut into bytes
    assert examples.lengths.max() > 4 and (examples.lengths == 2).any()  # as coarse and as fine as new tokens are


def test_it_is_ridge_regression(examples, matrix, vocabulary):
    level = new_levels(vocabulary)
    found = Calibration(matrix, examples, level)
    x = np.array(
        [
            [*matrix[pieces].double().mean(0).tolist(), own, np.log(len(pieces))]
            for pieces, own in zip(split(examples), examples.levels, strict=True)
        ]
    )
    y = matrix[examples.targets].double().numpy()
    center, spread, middle = x.mean(0), x.std(0), y.mean(0)
    scaled = (x - center) / spread
    weights = np.linalg.solve(scaled.T @ scaled + RIDGE * len(x) * np.eye(HIDDEN + 2), scaled.T @ (y - middle))
    ids = np.array(list(vocabulary.pieces)[:20])
    means = torch.stack([matrix[vocabulary.pieces[i]].mean(0) for i in ids])
    lengths = np.array([len(vocabulary.pieces[i]) for i in ids])
    new = np.concatenate([means.double().numpy(), level[ids][:, None], np.log(lengths)[:, None]], 1)
    wanted = (new - center) / spread @ weights + middle
    np.testing.assert_allclose(found(means, ids, lengths).numpy(), wanted, atol=1e-4)
    explained = 1 - ((y - middle - scaled @ weights) ** 2).sum() / ((y - middle) ** 2).sum()
    assert found.explained == pytest.approx(explained, abs=1e-4)


def test_a_matrix_that_tells_frequencies_is_understood(old, examples, vocabulary):
    """Rows that are nothing but the log frequency, as a head's largest part is: a rare token's row comes out as a rare one's."""
    direction = torch.arange(1.0, 1 + HIDDEN)
    matrix = torch.zeros(old.size, HIDDEN)
    matrix[:700] = torch.from_numpy(levels(np.arange(700))).unsqueeze(1) * direction
    level = new_levels(vocabulary)
    calibration = Calibration(matrix, examples, level)
    ids = np.array(list(vocabulary.pieces))
    lengths = np.array([len(vocabulary.pieces[i]) for i in ids])
    means = torch.stack([matrix[vocabulary.pieces[i]].mean(0) for i in ids])
    rows = calibration(means, ids, lengths)
    assert calibration.explained > 0.8  # a ridge stays a little short
    assert np.corrcoef(rows[:, 0].numpy(), level[ids])[0, 1] > 0.95
    assert np.corrcoef(means[:, 0].numpy(), level[ids])[0, 1] < 0.5  # the mean of the pieces does not know it


def test_frequencies_come_from_the_text_or_from_the_order_of_the_merges(vocabulary):
    by_id = new_levels(vocabulary)
    assert (np.diff(by_id[256:1024]) < 0).all()  # ids 256 to 1,023: merges in order
    counts = np.zeros(vocabulary.size, np.int64)
    counts[1000], counts[700] = 90, 80
    by_count = new_levels(vocabulary, counts)
    ordinary = by_count[:1024]
    assert ordinary.argmax() == 1000 and (ordinary > ordinary[700]).sum() == 1
    np.testing.assert_array_equal(np.sort(ordinary), np.sort(by_id[:1024]))  # the same ranks, given to others
