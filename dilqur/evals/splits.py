"""Which examples a fine-tuning learns from, which choose its learning rate, and which it is measured on."""

import functools
import itertools
import re
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dilqur.cleaning.normalise import checked_replacements, normalise
from dilqur.common.errors import InputError
from dilqur.evals.labelled_examples import draw, folds, read_examples


class Parts(NamedTuple):
    """Numbers of examples."""

    train: list
    validation: list
    test: list


@dataclass(frozen=True)
class Splits:
    """examples: all of them. parts: {seed: Parts}, folds where they differ. labels: all there are, sorted. test_in_train: how many texts
    of test are in train, too."""

    examples: list
    parts: dict
    labels: list
    test_in_train: int

    def of(self, numbers):
        return [self.examples[i] for i in numbers]


def read_splits(settings):
    """The Splits of a task with labels. Raises InputError for what is wrong with it."""
    words = settings.task == "token_classification"
    clean = functools.partial(
        normalise, dotted_i=settings.dotted_i, replace=checked_replacements(settings.replace or {})
    )
    how = (words, settings.text_field, settings.label_field, settings.label_names, settings.paragraphs, clean)
    splits, source = {}, 0
    for name in ("train", "validation", "test"):
        if paths := getattr(settings, name):
            most = settings.max_train_samples if name == "train" else settings.max_eval_samples
            examples = read_examples(paths, *how, first_source=source)
            source = 1 + max(example.source for example in examples)
            splits[name] = draw(examples, most)
    train = splits["train"]
    if settings.test is None:
        examples = train
        parts = dict(zip(settings.seeds, _fold_parts(train, len(settings.seeds)), strict=True))
    else:
        if "validation" not in splits:
            first, *others = folds(train, 10)
            splits["validation"] = [train[i] for i in first]
            splits["train"] = [train[i] for fold in others for i in fold]
        ends = np.cumsum([0, *(len(splits[name]) for name in Parts._fields)])
        parts = dict.fromkeys(settings.seeds, Parts(*(range(a, b) for a, b in itertools.pairwise(ends.tolist()))))
        examples = [e for name in Parts._fields for e in splits[name]]
    if not all(part for each in parts.values() for part in each):
        documents = len({e.source for e in train})
        raise InputError(f"train: {documents} documents are too few to keep some of them for validation and test")
    labels = sorted({label for e in examples for label in (e.label if words else (e.label,))})
    if len(labels) < 2:
        raise InputError(f"train: every label is {labels[0]!r}: nothing to learn")
    if settings.metric == "entity_f1" and (wrong := [x for x in labels if not re.match(r"O$|[BI]-.", x)]):
        raise InputError(f"entity_f1: the tag {wrong[0]!r} is not O, B-… or I-…; are label_names missing?")
    known = {e.text for e in splits["train"]}
    twice = sum(e.text in known for e in splits.get("test", ()))
    return Splits(examples, parts, labels, twice)


def _fold_parts(examples, count):
    """The Parts of `count` folds: each tests on its own and validates on the next."""
    parts = folds(examples, count)
    for i in range(count):
        following = (i + 1) % count
        rest = [number for j, part in enumerate(parts) if j not in (i, following) for number in part]
        yield Parts(rest, parts[following], parts[i])
