"""Which examples a fine-tuning learns from, which choose its learning rate, and which it is measured on."""

import itertools
import sys
from dataclasses import dataclass

import numpy as np

from dilqur.encoder_tasks.labelled_examples import draw, folds, read_examples
from dilqur.errors import InputError


@dataclass(frozen=True)
class Splits:
    """examples: all of them. parts: {seed: (numbers of train, of validation, of test)}. labels: all there are, sorted."""

    examples: list
    parts: dict
    labels: list

    def of(self, numbers):
        return [self.examples[i] for i in numbers]


def read_splits(settings):
    """The Splits of a task with labels. Raises InputError for what is wrong with it."""
    words = settings.task == "token_classification"
    how = (words, settings.text_field, settings.label_field, settings.label_names, settings.paragraphs)
    splits, source = {}, 0
    for name in ("train", "validation", "test"):
        if paths := getattr(settings, name):
            most = settings.max_train_samples if name == "train" else settings.max_eval_samples
            examples = read_examples(paths, *how, first_source=source)
            source = examples[-1].source + 1
            splits[name] = draw(examples, most)
    if settings.test is None:
        examples = splits["train"]
        parts = dict(zip(settings.seeds, fold_parts(examples, len(settings.seeds)), strict=True))
    else:
        if "validation" not in splits:
            first, *others = folds(splits["train"], 10)
            splits["validation"] = [splits["train"][i] for i in first]
            splits["train"] = [splits["train"][i] for fold in others for i in fold]
        known = {e.text for e in splits["train"]}
        if twice := sum(e.text in known for e in splits["test"]):
            print(f"warning: {twice:,} of the {len(splits['test']):,} test examples are in train, too", file=sys.stderr)
        names = ("train", "validation", "test")
        ends = np.cumsum([0, *(len(splits[name]) for name in names)])
        parts = dict.fromkeys(settings.seeds, tuple(range(a, b) for a, b in itertools.pairwise(ends.tolist())))
        examples = [e for name in names for e in splits[name]]
    if not all(part for each in parts.values() for part in each):
        raise InputError(f"train: {len(splits['train'])} examples are too few to keep some for validation")
    labels = sorted({label for e in examples for label in (e.label if words else (e.label,))})
    if len(labels) < 2:
        raise InputError(f"train: every label is {labels[0]!r}: nothing to learn")
    return Splits(examples, parts, labels)


def fold_parts(examples, count):
    """(numbers of train, of validation, of test) for each of `count` folds: it tests on its own and validates on the next."""
    parts = folds(examples, count)
    for i in range(count):
        following = (i + 1) % count
        rest = [number for j, part in enumerate(parts) if j not in (i, following) for number in part]
        yield rest, parts[following], parts[i]
