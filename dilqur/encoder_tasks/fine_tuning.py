"""One fine-tuning of a Hugging Face encoder on labelled examples, by transformers' Trainer: linear decay after the warm-up, the last step's
weights, no selection of epochs.

Words with tags are joined by spaces and tokenized as text, so that every tokenizer sees what it was made for; a word's tag is predicted at
its first token. A word cut off by `max_length` is said to have no tag, which is wrong.
"""

import itertools
import logging
import tempfile
from dataclasses import dataclass

import torch
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

from dilqur.batches import IGNORE

NONE = ""  # what is said of a word that was cut off
for chatty in (
    "modeling_utils",
    "distributed.tensor_parallel",
):  # a new head is what is wanted, and one process all there is
    logging.getLogger(f"transformers.{chatty}").setLevel(logging.ERROR)


@dataclass(frozen=True)
class Protocol:
    """How a fine-tuning is done, but for its learning rate and its seed."""

    max_length: int
    num_train_epochs: float
    per_device_train_batch_size: int
    warmup_ratio: float
    weight_decay: float
    bf16: bool


class Encoder:
    """A model folder to be fine-tuned, again and again. labels: all there are. random: its shape with random weights."""

    def __init__(self, path, labels, words, random=False):
        self.path, self.labels, self.words, self.random = path, labels, words, random
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.config = AutoConfig.from_pretrained(
            path,
            num_labels=len(labels),
            id2label=dict(enumerate(labels)),
            label2id={n: i for i, n in enumerate(labels)},
        )

    def fine_tune(self, train, others, protocol, learning_rate, seed):
        """What the fine-tuned model says of each list of Examples in `others`: lists of labels, or of tuples of them."""
        kind = AutoModelForTokenClassification if self.words else AutoModelForSequenceClassification
        set_seed(seed)
        model = kind.from_config(self.config) if self.random else kind.from_pretrained(self.path, config=self.config)
        collator = DataCollatorForTokenClassification if self.words else DataCollatorWithPadding
        with tempfile.TemporaryDirectory() as nowhere:
            arguments = TrainingArguments(
                nowhere,
                learning_rate=learning_rate,
                num_train_epochs=protocol.num_train_epochs,
                per_device_train_batch_size=protocol.per_device_train_batch_size,
                per_device_eval_batch_size=2 * protocol.per_device_train_batch_size,
                warmup_steps=protocol.warmup_ratio,
                weight_decay=protocol.weight_decay,
                bf16=protocol.bf16,
                seed=seed,
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=not torch.cuda.is_available(),
                dataloader_pin_memory=torch.cuda.is_available(),
            )
            trainer = Trainer(
                model, arguments, collator(self.tokenizer), [self._item(e, protocol.max_length)[0] for e in train]
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
            return [self._say(trainer, examples, protocol.max_length) for examples in others]

    def _say(self, trainer, examples, max_length):
        items = [self._item(example, max_length) for example in examples]
        likeliest = trainer.predict([item for item, _ in items]).predictions.argmax(-1)
        if not self.words:
            return [self.labels[i] for i in likeliest]
        return [
            tuple(self.labels[row[at]] if at is not None else NONE for at in first)
            for row, (_, first) in zip(likeliest, items, strict=True)
        ]

    def _item(self, example, max_length):
        """(what the model reads, the first token of each word, None where it was cut off)"""
        number = self.config.label2id
        if not self.words:
            item = self.tokenizer(example.text, truncation=True, max_length=max_length)
            return {**item, "labels": number[example.label]}, None
        text = " ".join(example.text)
        starts = [0, *itertools.accumulate(len(word) + 1 for word in example.text[:-1])]
        item = self.tokenizer(text, truncation=True, max_length=max_length, return_offsets_mapping=True)
        first = first_tokens(text, starts, item.pop("offset_mapping"))
        labels = [IGNORE] * len(item["input_ids"])
        for at, label in zip(first, example.label, strict=True):
            if at is not None:
                labels[at] = number[label]
        return {**item, "labels": labels}, first


def first_tokens(text, starts, offsets):
    """The first token of each word, None where no token begins there. starts: where the words begin in `text`. offsets: (begin, end) of
    each token, which may hold the space before its word."""
    place = {}
    for token, (begin, end) in enumerate(offsets):
        piece = text[begin:end]
        if piece.strip():
            place.setdefault(begin + len(piece) - len(piece.lstrip()), token)
    return [place.get(start) for start in starts]
