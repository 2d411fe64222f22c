"""New embedding rows: what both vocabularies have is copied, the rest is the mean of its pieces."""

import pytest
import torch
from conftest import CORPUS

from dilqur.embedding_init import piece_mean, pieces_of
from dilqur.llama3 import BOS, EOT, SPECIAL_TOKENS
from dilqur.tokenizer import TextTokenizer

HIDDEN = 8


@pytest.fixture(scope="module")
def old(tmp_path_factory, run):
    """An English tokenizer: other merges than the Azerbaijani one, and control tokens at other ids."""
    folder = tmp_path_factory.mktemp("english") / "tokenizer"
    run("data_tools/train_tokenizer.py", "--input", CORPUS / "en", "--vocab_size", 700, "--output_dir", folder)
    return TextTokenizer(folder)


@pytest.fixture(scope="module")
def new(made):
    return TextTokenizer(made / "tokenizer")


@pytest.fixture(scope="module")
def matrix(old):
    """The old model's rows; 68 more than it has tokens, with numbers that would be seen if they were used."""
    rows = torch.randn(old.size + 68, HIDDEN, generator=torch.Generator().manual_seed(0))
    rows[old.size :] = 1e9
    return rows


def control(tokenizer):
    return {token: tokenizer.control_id(token) for token in SPECIAL_TOKENS}


def vocabulary(tokenizer):
    return tokenizer.backend.get_vocab(with_added_tokens=False)


@pytest.fixture(scope="module")
def result(old, new, matrix):
    return piece_mean(matrix, old.backend, new.backend, control(old), control(new))


def test_tokens_of_both_vocabularies_keep_their_rows_to_the_bit(old, new, matrix, result):
    out, copied = result
    before, after = vocabulary(old), vocabulary(new)
    shared = before.keys() & after.keys()
    assert 256 < len(shared) < len(after)  # all bytes, and something to do besides
    assert copied == len(shared) + len(SPECIAL_TOKENS)
    assert out.shape == (new.size, HIDDEN)
    assert all(torch.equal(out[after[token]], matrix[before[token]]) for token in shared)


def test_every_other_token_is_the_mean_of_its_pieces(old, new, matrix, result):
    characters = {i: token for token, i in vocabulary(old).items()}
    for token, i in vocabulary(new).items():
        if token not in vocabulary(old):
            pieces = pieces_of(token, vocabulary(old), old.backend)
            assert len(pieces) > 1
            assert "".join(characters[p] for p in pieces) == token  # all its bytes and none twice, half letters too
            torch.testing.assert_close(result[0][i], matrix[pieces].mean(0))


def test_the_pieces_are_those_the_old_model_saw_for_that_word(old, new):
    words = [token for token in vocabulary(new) if "�" not in new.decode([vocabulary(new)[token]]) and len(token) > 3]
    assert len(words) > 300
    for token in words:
        text = new.decode([vocabulary(new)[token]])
        assert pieces_of(token, vocabulary(old), old.backend) == old.encode(text), text


def test_control_tokens_are_matched_by_name_not_by_id(old, new, matrix, result):
    assert old.control_id(BOS) != new.control_id(BOS)  # 700 and 1,024
    assert all(torch.equal(result[0][new.control_id(t)], matrix[old.control_id(t)]) for t in SPECIAL_TOKENS)


def test_a_control_token_the_old_tokenizer_lacks_starts_at_the_average_of_its_vocabulary(old, new, matrix):
    fewer = control(old)
    del fewer[EOT]
    out, copied = piece_mean(matrix, old.backend, new.backend, fewer, control(new))
    torch.testing.assert_close(out[new.control_id(EOT)], matrix[:700].mean(0))
    assert copied == len(vocabulary(old).keys() & vocabulary(new).keys()) + len(SPECIAL_TOKENS) - 1


def test_padding_rows_of_the_old_matrix_are_in_no_row(result):
    assert result[0].abs().max() < 10  # normal numbers; the padding was 1e9


def test_rows_of_a_bfloat16_model_come_out_as_float32_and_exact(old, new, matrix, result):
    half = matrix.bfloat16()
    out, copied = piece_mean(half, old.backend, new.backend, control(old), control(new))
    assert out.dtype == torch.float32
    assert copied == result[1]
    assert torch.equal(out[new.control_id(BOS)], half[old.control_id(BOS)].float())


def test_the_same_vocabulary_gives_the_same_rows(old, matrix):
    out, copied = piece_mean(matrix, old.backend, old.backend, control(old), control(old))
    assert copied == old.size
    assert torch.equal(out, matrix[: old.size])
