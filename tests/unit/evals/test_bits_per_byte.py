"""Bits per byte: every token once, the first after BOS, the end apart, and the same number however it is cut into windows; kept
by document, for intervals."""

import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from dilqur.common.errors import InputError
from dilqur.evals.bits_per_byte import Score, by_document, compare, score, windows
from dilqur.tokenizer.text_tokenizer import TextTokenizer

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


def test_every_document_has_its_own_nats_whatever_is_scored_beside_it(tiny_model):
    """Eight batches are filled before a model runs, and windows are sorted by length: neither may mix documents."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    tokenizer = TextTokenizer(tiny_model)
    texts = [text * (1 + n % 5) for n, text in enumerate(TEXTS * 10)]
    for batch_size in (1, 3):
        total = score(model, tokenizer, texts, max_length=16, stride=8, batch_size=batch_size)
        alone = [score(model, tokenizer, [text], max_length=16, stride=8, batch_size=2).nats for text in texts]
        assert total.document_nats == pytest.approx(alone, rel=1e-5)  # float32, padded to other widths
        assert total.document_bytes == [len(text.encode()) for text in texts]
        result = total.result()
        bits = sum(total.document_nats) / math.log(2)
        assert result["bits_per_byte"] == pytest.approx(bits / sum(total.document_bytes), rel=1e-12)
        assert (result["documents"], result["utf8_bytes"]) == (len(texts), sum(total.document_bytes))


def test_one_document_is_a_direct_computation(tiny_model):
    """A document of several windows: −log p of each token, computed window by window without any batch."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    tokenizer = TextTokenizer(tiny_model)
    ids = [tokenizer.bos_id, *tokenizer.encode(TEXTS[0]), tokenizer.eos_id]
    nats = 0.0
    for start, stop, first in windows(len(ids), 16, 8):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids[start : stop - 1]])).logits[0].double()
        for at in range(first, min(stop, len(ids) - 1)):  # the last is EOS
            nats -= torch.log_softmax(logits[at - 1 - start], dim=0)[ids[at]].item()
    total = score(model, tokenizer, [TEXTS[1], TEXTS[0]], max_length=16, stride=8, batch_size=4)
    assert total.document_nats[1] == pytest.approx(nats, rel=1e-5)


def scores(n, *shifts, seed=0):
    """{"m0": Score, …}: n documents whose bits per byte vary much between documents, and by `shifts` between models."""
    random = np.random.default_rng(seed)
    sizes = random.integers(100, 5000, n)
    each = random.normal(1.0, 0.3, n)
    return {
        f"m{i}": Score(list(sizes * (each + shift) * math.log(2)), list(map(int, sizes)), 1.0, 9, 9)
        for i, shift in enumerate(shifts)
    }


def test_intervals_hold_the_figure_and_differences_are_paired():
    models = scores(200, 0.0, 0.05)
    nats, utf8_bytes = by_document(models)
    assert (nats.shape, nats.dtype, utf8_bytes.dtype) == ((200, 2), np.float64, np.int64)
    intervals, differences = compare(nats, utf8_bytes, list(models), seed=42)
    for name, model in models.items():
        low, high = intervals[name]
        assert low < model.result()["bits_per_byte"] < high and high - low > 0.03, "documents differ by 0.3"
    # 0.05 more on every document: whichever are drawn, the difference is the same, though the two intervals overlap
    assert list(differences) == ["m1"] and intervals["m1"][0] < intervals["m0"][1]
    assert [differences["m1"]["difference"], *differences["m1"]["interval"]] == pytest.approx([0.05] * 3)
    alone, none = compare(nats[:, :1], utf8_bytes, ["m0"], seed=42)
    assert none == {} and alone["m0"] == pytest.approx(intervals["m0"]), "the draws do not depend on the other models"


def test_few_documents_have_figures_and_no_intervals():
    models = scores(9, 0.0, 0.05)
    intervals, differences = compare(*by_document(models), list(models), seed=42)
    assert intervals == {"m0": None, "m1": None}
    assert differences["m1"]["interval"] is None and differences["m1"]["difference"] == pytest.approx(0.05)


def test_models_that_read_other_documents_are_not_compared():
    with pytest.raises(InputError, match="the documents changed between two models"):
        by_document({"a": Score([1.0], [7]), "b": Score([1.0], [8])})


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
