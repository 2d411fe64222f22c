"""One fine-tuning of a Hugging Face encoder on labelled examples, by transformers' Trainer: linear decay after the warm-up, the last step's
weights, no selection of epochs.

Words with tags are joined by spaces and tokenized as text, so that every tokenizer sees what it was made for; a word's tag is predicted at
its first token. A word cut off by `max_length` is said to have no tag, which is wrong.
"""

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

from dilqur.common.constants import IGNORE_INDEX
from dilqur.common.errors import InputError
from dilqur.evals.loading import load_model, refused
from dilqur.kernels.apply import attend_without_cudnn

NONE = ""  # what is predicted for a word that was cut off
# a new head is what is wanted, and one process all there is
for chatty in ("modeling_utils", "distributed.tensor_parallel"):
    logging.getLogger(f"transformers.{chatty}").setLevel(logging.ERROR)


@dataclass(frozen=True)
class TuningSettings:
    """How a fine-tuning is done, but for its learning rate and its seed."""

    max_length: int
    num_train_epochs: float
    per_device_train_batch_size: int
    warmup_ratio: float
    weight_decay: float
    bf16: bool


class Encoder:
    """A model folder to be fine-tuned, again and again. labels: all there are. words: whether they are tags of words. random: its shape
    with random weights."""

    def __init__(self, name, path, labels, words, random=False):
        self.name, self.path, self.labels, self.words, self.random = name, path, labels, words, random
        numbers = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
        with refused(path):
            self.tokenizer = AutoTokenizer.from_pretrained(path)
            self.config = AutoConfig.from_pretrained(path, num_labels=len(labels), **numbers)
        if words and not self.tokenizer.is_fast:
            raise InputError(f"{path}: has no tokenizer.json, which says what token a word begins with")

    def fine_tune(self, train, others, tuning, learning_rate, seed):
        """What the fine-tuned model predicts for each list of Examples in `others`: lists of labels, or of tuples of them."""
        kind = AutoModelForTokenClassification if self.words else AutoModelForSequenceClassification
        set_seed(seed)
        attend_without_cudnn()
        # fp32, whatever the folder has: at 1e-5 most of AdamW's steps are smaller than what bfloat16 can tell apart
        model = load_model(kind, self.path, self.config, torch.float32, self.random)
        collator = DataCollatorForTokenClassification if self.words else DataCollatorWithPadding
        with tempfile.TemporaryDirectory() as scratch:
            arguments = TrainingArguments(
                scratch,
                learning_rate=learning_rate,
                num_train_epochs=tuning.num_train_epochs,
                per_device_train_batch_size=tuning.per_device_train_batch_size,
                per_device_eval_batch_size=2 * tuning.per_device_train_batch_size,
                warmup_steps=tuning.warmup_ratio,
                weight_decay=tuning.weight_decay,
                bf16=tuning.bf16,
                seed=seed,
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=not torch.cuda.is_available(),
                dataloader_pin_memory=torch.cuda.is_available(),
            )
            if arguments.n_gpu > 1:
                arguments._n_gpu = 1  # or it spreads a batch over all it sees, and takes as many times more of them
            trainer = Trainer(
                model, arguments, collator(self.tokenizer), [self._item(e, tuning.max_length)[0] for e in train]
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
            return [self._predict(trainer, examples, tuning.max_length) for examples in others]

    def _predict(self, trainer, examples, max_length):
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
        text, at = " ".join(example.text), 0
        item, first = self.tokenizer(text, truncation=True, max_length=max_length), []
        for word in example.text:
            # its first character may be one that the tokenizer drops
            tokens = (item.char_to_token(character) for character in range(at, at + len(word)))
            first.append(next((token for token in tokens if token is not None), None))
            at += len(word) + 1
        labels = [IGNORE_INDEX] * len(item["input_ids"])
        for at, label in zip(first, example.label, strict=True):
            if at is not None:
                labels[at] = number[label]
        return {**item, "labels": labels}, first
