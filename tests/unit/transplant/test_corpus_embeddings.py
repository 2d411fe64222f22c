"""Vectors of tokens from a text: tokens in like company are alike, and the text and the seed alone decide."""

import math
from collections import Counter

import numpy as np
import pytest
import torch

from dilqur.tokenizer.text_tokenizer import TextTokenizer
from dilqur.transplant.corpus_embeddings import SMOOTHING, WINDOW, corpus_embeddings

ANIMALS, TOOLS = ("pişik", "it", "at"), ("balta", "mişar", "çəkic")
TEXTS = [f"{a} yeyir və yatır" for a in ANIMALS] * 9 + [f"{t} kəsir ya qırır" for t in TOOLS] * 9


@pytest.fixture(scope="module")
def words():
    """A tokenizer whose tokens are words, so that one can see what is in the matrix."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = sorted({word for text in TEXTS for word in text.split()} | {"heç"})
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="heç"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()

    class Words:
        ids = {word: i for i, word in enumerate(vocabulary)}
        size = len(vocabulary)

        def encode_batch(self, texts):
            return [tokenizer.encode(text).ids for text in texts]

    return Words()


def slow_ppmi(texts, tokenizer):
    """The matrix that is decomposed, counted pair by pair."""
    pairs, size = Counter(), tokenizer.size
    for ids in tokenizer.encode_batch(texts):
        for i, one in enumerate(ids):
            for j, other in enumerate(ids):
                if i != j and abs(i - j) <= WINDOW:
                    pairs[one, other] += 1 / abs(i - j)
    frequency = [sum(n for (a, _), n in pairs.items() if a == i) for i in range(size)]
    total, smooth = sum(frequency), sum(f**SMOOTHING for f in frequency)
    out = np.zeros((size, size))
    for (a, b), n in pairs.items():
        joint = n / total
        one, other = ((frequency[x] / total) * (frequency[y] ** SMOOTHING / smooth) for x, y in ((a, b), (b, a)))
        out[a, b] = max(0, (math.log(joint / one) + math.log(joint / other)) / 2)
    return out


def test_all_dimensions_give_back_the_matrix_of_mutual_information(words):
    vectors = corpus_embeddings(TEXTS, words, words.size, dimension=words.size).double().numpy()
    matrix = slow_ppmi(TEXTS, words)
    left, singular, _ = np.linalg.svd(matrix)
    wanted = (left * singular) @ left.T
    np.testing.assert_allclose(vectors @ vectors.T, wanted, atol=1e-4)


def test_tokens_in_like_company_are_alike(words):
    vectors = torch.nn.functional.normalize(corpus_embeddings(TEXTS, words, words.size, dimension=4))
    row = lambda word: vectors[words.ids[word]]  # noqa: E731
    assert row("pişik") @ row("it") > 0.9
    assert row("pişik") @ row("balta") < 0.5


def test_a_token_that_is_not_in_the_text_has_a_vector_of_zeros(words):
    vectors = corpus_embeddings(TEXTS, words, words.size, dimension=4)
    assert not vectors[words.ids["heç"]].any()
    assert all(vectors[words.ids[word]].any() for word in (*ANIMALS, *TOOLS))


def test_the_same_text_and_seed_give_the_same_vectors_to_the_bit(made):
    tokenizer = TextTokenizer(made / "tokenizer")
    texts = ["Salam, dünya! Necəsən?", "Bakı Azərbaycanın paytaxtıdır."] * 20
    one, two = (corpus_embeddings(texts, tokenizer, tokenizer.size, 16, seed=3) for _ in range(2))
    assert torch.equal(one, two)


def test_no_more_tokens_are_read_than_asked_for(words):
    few = corpus_embeddings(iter(TEXTS), words, words.size, 4, max_tokens=8)
    assert {word for word, i in words.ids.items() if few[i].any()} == {"pişik", "it", "yeyir", "və", "yatır"}


@pytest.mark.parametrize("texts", [[], [""], ["pişik"]])
def test_a_text_without_neighbours_gives_zeros(words, texts):
    assert not corpus_embeddings(texts, words, words.size, 4).any()
