"""New embedding rows: what both vocabularies have is copied, the rest is made by every method as its definition says."""

import json

import numpy as np
import pytest
import torch

from dilqur.tokenizer.llama3 import BOS, EOT
from dilqur.tokenizer.text_tokenizer import TextTokenizer
from dilqur.transplant.embedding_init import METHODS, new_matrix, plan_rows, statistics
from dilqur.transplant.piece_calibration import Calibration, Examples, new_levels
from dilqur.transplant.vocabulary_map import VocabularyMap

HIDDEN, ROWS = 8, 1408  # the new tokenizer has 1,280


@pytest.fixture(scope="module")
def old(english):
    return TextTokenizer(english)


@pytest.fixture(scope="module")
def new(made):
    return TextTokenizer(made / "tokenizer")


@pytest.fixture(scope="module")
def vocabulary(old, new):
    return VocabularyMap(old, new)


@pytest.fixture(scope="module")
def matrix(old):
    """The old model's rows; 68 more than it has tokens, with numbers that would be seen if they were used."""
    rows = torch.randn(old.size + 68, HIDDEN, generator=torch.Generator().manual_seed(0))
    rows[old.size :] = 1e9
    return rows


@pytest.fixture(scope="module")
def space(new):
    """Vectors of the new tokens, as a donor would have them; every third token has none."""
    vectors = torch.randn(new.size, 5, generator=torch.Generator().manual_seed(1))
    vectors[::3] = 0
    return vectors


@pytest.fixture(scope="module")
def make(matrix, old, vocabulary, space):
    """make(method, …) → (rows, table) of `new_matrix`."""
    examples = Examples(old, vocabulary)

    def run(method, kind="embeddings", source=matrix, **more):
        calibration = Calibration(source, examples, new_levels(vocabulary)) if "calibrated" in method else None
        parts = plan_rows(method, vocabulary, kind, space, sparsity=3)
        return new_matrix(source, vocabulary, parts, ROWS, calibration=calibration, **more)

    return run


@pytest.mark.parametrize("method", METHODS)
def test_tokens_of_both_vocabularies_keep_their_rows_to_the_bit_whatever_the_method(make, method, matrix, vocabulary):
    rows, table = make(method, match_norms="row")
    kept = {new_id: old_id for ids in vocabulary.copied.values() for new_id, old_id in ids.items()}
    assert len(kept) > 256 + 256  # bytes and control tokens
    assert torch.equal(rows[list(kept)], matrix[list(kept.values())])
    assert sum(row["count"] for row in table.values()) == ROWS
    assert {name: table[name]["count"] for name in ("copied", "byte", "special copied")} == {
        name: len(ids) for name, ids in vocabulary.copied.items()
    }


@pytest.mark.parametrize("method", METHODS)
def test_padding_of_the_old_matrix_is_in_no_row_and_that_of_the_new_is_the_mean(make, method):
    rows, table = make(method)
    assert rows.abs().max() < 50  # normal numbers; the padding was 1e9
    torch.testing.assert_close(rows[1280:], rows[:1280].mean(0).expand(ROWS - 1280, -1))
    assert table["padding"]["count"] == ROWS - 1280


@pytest.mark.parametrize("method", METHODS)
def test_the_same_vocabulary_in_another_order_gives_the_same_rows_in_that_order(method, old, matrix, tmp_path):
    random = np.random.default_rng(0)  # control tokens stay behind the vocabulary: `tokenizers` wants them there
    spec, order = json.loads(old.content), np.concatenate([random.permutation(700), 700 + random.permutation(256)])
    spec["model"]["vocab"] = {token: int(order[i]) for token, i in spec["model"]["vocab"].items()}
    moved = [{**token, "id": int(order[token["id"]])} for token in spec["added_tokens"]]
    spec["added_tokens"] = sorted(moved, key=lambda token: token["id"])
    spec["post_processor"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    vocabulary = VocabularyMap(old, TextTokenizer(tmp_path))
    parts = plan_rows(method, vocabulary, space=torch.randn(old.size, 5))
    rows, table = new_matrix(matrix, vocabulary, parts, old.size)
    assert torch.equal(rows[order], matrix[: old.size])
    assert set(table) == {"copied", "byte", "special copied"}


def made_rows(method, kind, matrix, vocabulary, space):
    """{new id: row} of the tokens that are made, one at a time and in float64, as the methods are defined."""
    rows, out = matrix.double().numpy(), {}
    anchors = [i for i in vocabulary.anchors if space[i].any()]
    vectors = space.double().numpy()
    for new_id, pieces in vocabulary.pieces.items():
        k = len(pieces)
        if method == "mean":
            weights = dict.fromkeys(range(700), 1 / 700)
        elif method == "weighted_piece_mean":
            up = np.exp(2.0 * np.arange(1, k + 1)) / np.exp(2.0 * np.arange(1, k + 1)).sum()
            each = {"embeddings": up, "head": up[::-1], "tied": (up + up[::-1]) / 2}[kind]
            weights = [(i, w) for i, w in zip(pieces, each, strict=True)]
        elif method == "piece_mean" or not vectors[new_id].any():
            weights = [(i, 1 / k) for i in pieces]
        elif method == "focus":
            unit = lambda v: v / np.linalg.norm(v)  # noqa: E731
            cosine = np.array([unit(vectors[new_id]) @ unit(vectors[i]) for i in anchors])
            low, high = cosine.min() - 1, cosine.max()
            for _ in range(60):  # sparsemax by bisection
                middle = (low + high) / 2
                low, high = (middle, high) if np.maximum(cosine - middle, 0).sum() > 1 else (low, middle)
            weights = [(vocabulary.anchors[i], max(0, c - low)) for i, c in zip(anchors, cosine, strict=True)]
        else:
            chosen, left, atoms = [], vectors[new_id], vectors[anchors]
            for _ in range(3):
                cosine = np.abs(atoms @ left) / np.linalg.norm(atoms, axis=1)
                cosine[chosen] = -1
                chosen.append(int(cosine.argmax()))
                part, *_ = np.linalg.lstsq(atoms[chosen].T, vectors[new_id], rcond=None)
                left = vectors[new_id] - atoms[chosen].T @ part
            weights = [(vocabulary.anchors[anchors[c]], w) for c, w in zip(chosen, part, strict=True)]
        out[new_id] = sum(w * rows[i] for i, w in dict_items(weights))
    return out


def dict_items(weights):
    return weights.items() if isinstance(weights, dict) else weights


@pytest.mark.parametrize("kind", ["embeddings", "head", "tied"])
@pytest.mark.parametrize(
    "method", ["mean", "piece_mean", "weighted_piece_mean", "focus", "orthogonal_matching_pursuit"]
)
def test_every_other_token_is_what_the_method_says(make, method, kind, matrix, vocabulary, space):
    rows, _ = make(method, kind)
    wanted = made_rows(method, kind, matrix, vocabulary, space)
    found = rows[list(wanted)].double().numpy()
    np.testing.assert_allclose(found, np.stack(list(wanted.values())), rtol=1e-3, atol=1e-4)


def test_calibrated_rows_are_the_means_of_the_pieces_put_through_the_map(make, matrix, old, vocabulary):
    rows, table = make("calibrated_piece_mean")
    calibration = Calibration(matrix, Examples(old, vocabulary), new_levels(vocabulary))
    ids = np.array(list(vocabulary.pieces))
    means = torch.stack([matrix[pieces].mean(0) for pieces in vocabulary.pieces.values()])
    lengths = np.array([len(pieces) for pieces in vocabulary.pieces.values()])
    torch.testing.assert_close(rows[ids], calibration(means, ids, lengths))
    assert table["from pieces"]["count"] == len(ids)


def test_random_rows_have_the_old_rows_mean_and_spread_and_follow_the_seed(make, matrix, vocabulary):
    ids = list(vocabulary.pieces)
    one, again, other = (make("random", seed=seed)[0][ids] for seed in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)
    mean, deviation, _ = statistics(matrix, vocabulary.old_ordinary)
    torch.testing.assert_close(mean, matrix[:700].mean(0))
    torch.testing.assert_close(deviation, matrix[:700].std(0, correction=0))
    far = (one.mean(0) - mean).abs() / deviation * len(ids) ** 0.5
    assert far.max() < 5  # standard deviations of a mean of so many
    torch.testing.assert_close(one.std(0), deviation, rtol=0.2, atol=0)


@pytest.mark.parametrize("method", ["piece_mean", "random", "focus"])
def test_norms_are_matched_row_by_row_or_class_by_class(make, method, matrix, vocabulary):
    norm = matrix[:700].norm(dim=1).mean().item()
    plain, before = make(method)
    each, by_row = make(method, match_norms="row")
    factor, by_class = make(method, match_norms="class")
    ids = list(vocabulary.pieces)
    torch.testing.assert_close(each[ids].norm(dim=1), torch.full((len(ids),), norm))
    name = {"piece_mean": "from pieces", "random": "random", "focus": "from similarity"}[method]
    for table in (by_row, by_class):
        assert table[name]["norm_made"] == pytest.approx(before[name]["norm_made"])
        assert table[name]["norm_written"] == pytest.approx(norm, rel=1e-5)
        assert table["copied"]["norm_written"] == table["copied"]["norm_made"]
    similar = [i for i in ids if i % 3] if method == "focus" else ids  # those with a vector are one class
    ratio = factor[similar].norm(dim=1) / plain[similar].norm(dim=1)
    torch.testing.assert_close(ratio, ratio.mean().expand(len(similar)))  # their relations stay


def test_a_token_without_a_vector_falls_back_to_its_pieces_and_is_counted(make, vocabulary, space):
    for method in ("focus", "orthogonal_matching_pursuit"):
        table = make(method)[1]
        without = [i for i in vocabulary.pieces if not space[i].any()]
        assert table["fallback"]["count"] == len(without) > 100
        assert table["from similarity"]["count"] == len(vocabulary.pieces) - len(without)


def test_without_any_overlap_that_has_a_vector_all_fall_back(vocabulary, matrix, new):
    nowhere = torch.zeros(new.size, 5)
    nowhere[list(vocabulary.pieces)] = 1
    for method in ("focus", "orthogonal_matching_pursuit"):
        rows, table = new_matrix(matrix, vocabulary, plan_rows(method, vocabulary, space=nowhere), ROWS)
        plain, _ = new_matrix(matrix, vocabulary, plan_rows("piece_mean", vocabulary), ROWS)
        assert torch.equal(rows, plain) and table["fallback"]["count"] == len(vocabulary.pieces)


def test_a_control_token_the_old_tokenizer_lacks_starts_at_the_average_of_its_vocabulary(old, new, matrix, tmp_path):
    spec = json.loads(old.content)
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] != EOT]
    spec["post_processor"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    vocabulary = VocabularyMap(TextTokenizer(tmp_path), new)
    rows, table = new_matrix(matrix, vocabulary, plan_rows("piece_mean", vocabulary), ROWS)
    torch.testing.assert_close(rows[new.control_id(EOT)], matrix[:700].mean(0))
    assert table["special made"]["count"] == 1


def test_rows_of_a_bfloat16_model_are_copied_to_the_bit_and_made_in_float32(make, matrix, old, new, vocabulary):
    half = matrix.bfloat16()
    rows, _ = make("piece_mean", source=half)
    assert rows.dtype == torch.bfloat16
    assert torch.equal(rows[new.control_id(BOS)], half[old.control_id(BOS)])
    for new_id, pieces in list(vocabulary.pieces.items())[:200]:
        torch.testing.assert_close(rows[new_id], half[pieces].float().mean(0).bfloat16(), rtol=1e-2, atol=1e-3)
