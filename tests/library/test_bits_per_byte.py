"""Bits per byte: every token once, the first after BOS, the end apart, and the same number however it is cut into windows."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from dilqur.bits_per_byte import score, windows
from dilqur.tokenizer import TextTokenizer

TEXTS = ["Bakı Azərbaycanın paytaxtıdır. " * 6, "Salam! Necəsən?"]


@pytest.mark.parametrize("length", [2, 5, 8, 9, 10, 33])
def test_every_token_but_the_first_is_predicted_once_with_enough_before_it(length):
    predicted = []
    for start, stop, first in windows(length, max_length=8, stride=4):
        assert stop - start <= 9, "the window sees at most 8 tokens and predicts the ninth"
        assert first - start >= min(first, 5), (
            "past the first window, max_length - stride tokens and one more stand before"
        )
        predicted += range(first, stop)
    assert predicted == list(range(1, length))


def test_it_is_the_models_own_loss(tiny_model):
    """One document that fits one window: the figure follows from transformers' own loss."""
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval(),
        TextTokenizer(tiny_model),
    )
    text = TEXTS[1]
    ids = torch.tensor([[tokenizer.bos_id, *tokenizer.encode(text)]])
    with torch.no_grad():
        nats = model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
    total = score(model, tokenizer, [text], max_length=64, stride=32, batch_size=2)
    # 1e-5: float32 sums in another order
    assert total.result()["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(text.encode()), rel=1e-5)
    assert total.utf8_bytes == len(text.encode()) and total.tokens == ids.shape[1] - 1


def test_batches_do_not_change_it(tiny_model):
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval(),
        TextTokenizer(tiny_model),
    )
    alone = score(model, tokenizer, TEXTS, max_length=16, stride=8, batch_size=1).result()
    together = score(model, tokenizer, TEXTS, max_length=16, stride=8, batch_size=16).result()
    assert together["bits_per_byte"] == pytest.approx(
        alone["bits_per_byte"], rel=1e-5
    )  # padding to the right is not seen
    assert together["bits_per_end_of_document"] == pytest.approx(alone["bits_per_end_of_document"], rel=1e-5)
