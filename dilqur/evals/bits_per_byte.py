"""Bits per UTF-8 byte: how well a model predicts a text, comparable between tokenizers.

bits/byte = (sum of −log₂ p over the text's tokens) / (UTF-8 bytes of the text). The first token is predicted after BOS, so
all of the text is scored; the end-of-document token stands for no byte and is reported apart. Nats and bytes are kept for each
document, so that documents can be drawn anew for an interval, and the same ones for every model that is compared.
"""

import math
from dataclasses import dataclass, field

import numpy as np
import torch

from dilqur.common.bootstrap import interval, resampled_ratios
from dilqur.common.errors import InputError


@dataclass
class Score:
    """Of each document, in the order of the texts: the nats of its tokens without BOS and EOS, and its bytes. Of all of them:
    the nats of the EOS tokens, the tokens and the words."""

    document_nats: list[float] = field(default_factory=list)
    document_bytes: list[int] = field(default_factory=list)
    eos_nats: float = 0.0
    tokens: int = 0
    words: int = 0

    @property
    def nats(self):
        return math.fsum(self.document_nats)

    @property
    def utf8_bytes(self):
        return sum(self.document_bytes)

    @property
    def documents(self):
        return len(self.document_bytes)

    def result(self):
        bits = self.nats / math.log(2)
        return {
            "bits_per_byte": bits / self.utf8_bytes,
            "bits_per_token": bits / self.tokens,
            "bits_per_word": bits / max(1, self.words),
            "bits_per_end_of_document": self.eos_nats / math.log(2) / self.documents,
            "tokens": self.tokens,
            "utf8_bytes": self.utf8_bytes,
            "words": self.words,
            "documents": self.documents,
        }


def windows(length, max_length, stride):
    """Yield (start, stop, first): predict the tokens [first, stop) of a sequence of `length` from [start, stop − 1).

    A window sees `max_length` tokens. Every token but token 0 is predicted once; past the first window each has at least
    max_length − stride tokens before it.
    """
    first = 1
    while first < length:
        start = 0 if first == 1 else first - 1 - (max_length - stride)
        stop = min(length, start + max_length + 1)
        yield start, stop, first
        first = stop


@torch.inference_mode()
def score(model, tokenizer, texts, max_length, stride, batch_size, progress=None):
    """Score of `texts` under a causal `model`. tokenizer: TextTokenizer with BOS and EOS. progress: called with bytes done.

    Windows of similar length share a batch, filled up on the right: a causal model does not see what comes after.
    """
    total, pending, device = Score(), [], next(model.parameters()).device
    for text in texts:
        ids = [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
        total.document_nats.append(0.0)
        total.document_bytes.append(len(text.encode("utf-8")))
        total.tokens += len(ids) - 2
        total.words += len(text.split())
        pending += [
            (total.documents - 1, ids[start:stop], first - start, stop == len(ids))
            for start, stop, first in windows(len(ids), max_length, stride)
        ]
        if len(pending) >= 16 * batch_size:
            _score_windows(model, pending, batch_size, device, total)
            pending = []
        if progress:
            progress(total.document_bytes[-1])
    _score_windows(model, pending, batch_size, device, total)
    return total


def _score_windows(model, pending, batch_size, device, total):
    pending.sort(key=lambda window: len(window[1]))
    for at in range(0, len(pending), batch_size):
        batch = pending[at : at + batch_size]
        width = max(len(ids) for _, ids, _, _ in batch) - 1
        inputs, targets = torch.zeros(len(batch), width, dtype=torch.long), torch.full((len(batch), width), -100)
        for row, (_, ids, first, _) in enumerate(batch):
            inputs[row, : len(ids) - 1] = torch.tensor(ids[:-1])
            targets[row, first - 1 : len(ids) - 1] = torch.tensor(ids[first:])
        logits = model(input_ids=inputs.to(device), use_cache=False).logits
        nats = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), targets.flatten().to(device), reduction="none", ignore_index=-100
        )
        nats = nats.view_as(targets).double().cpu()
        for row, (document, ids, _, has_eos) in enumerate(batch):
            eos = float(nats[row, len(ids) - 2]) if has_eos else 0.0
            total.eos_nats += eos
            total.document_nats[document] += float(nats[row].sum()) - eos


def by_document(scores):
    """{name: Score} of models that read the same documents → nats (documents, models), float64, and utf8_bytes (documents,),
    int64, both in the order of the texts. Raises InputError if they did not read the same."""
    first, *others = scores.values()
    if any(other.document_bytes != first.document_bytes for other in others):
        raise InputError("the documents changed between two models; leave them alone, and run it again")
    nats = np.array([model.document_nats for model in scores.values()], np.float64).T
    return nats, np.array(first.document_bytes, np.int64)


def compare(nats, utf8_bytes, names, seed):
    """({name: interval}, {name of each model after the first: {"difference", "interval"}, to the first}) of bits per byte.
    nats, utf8_bytes: as `by_document` gives them. Every resample draws the same documents for all models; an interval is None
    for too few documents."""
    bits = nats.sum(0) / utf8_bytes.sum() / math.log(2)
    resampled = resampled_ratios(nats, utf8_bytes, seed) / math.log(2)
    intervals = {name: interval(resampled[:, i]) for i, name in enumerate(names)}
    differences = {
        name: {"difference": float(bits[i] - bits[0]), "interval": interval(resampled[:, i] - resampled[:, 0])}
        for i, name in enumerate(names)
        if i
    }
    return intervals, differences
