"""The variants of a benchmark: keys over one recipe each, under a strategy; and the recipe of a run made of them."""

import re
from dataclasses import dataclass, fields
from itertools import product
from pathlib import Path
from typing import get_type_hints

from dilqur.common.errors import InputError
from dilqur.pipeline.settings_parser import check_value, keys_that, read_yaml

OWN_KEYS = ("strategy", "trainer", "expect")  # of a variant, beside those of the recipe
# of the keys that define a training, those that change its losses by rounding alone
PRECISION = ("bf16", "dtype", "fp8")
# so small that any machine runs it in seconds
TOY = {"max_length": 64, "per_device_train_batch_size": 2, "dataloader_num_workers": 0}


@dataclass(frozen=True)
class Variant:
    """keys: of the recipe. strategy: an accelerate config, None: of one process. trainer: run by Hugging Face's Trainer
    (benchmarks/trainer_baseline.py), not by our loop. expect: patterns of kernels that must have run."""

    name: str
    keys: dict
    strategy: str | None = None
    trainer: bool = False
    expect: tuple = ()

    @property
    def folder(self):
        return re.sub(r"[^\w.+-]+", "-", self.name)


def read_variants(tables, strategies, num_processes):
    """[Variant] of [{name: {key: value}}, …], each under each of `strategies`, where there are any. Raises InputError for two of a name,
    a name that is no folder's, and strategies that do not go with the number of processes."""
    variants = []
    for table, strategy in product(tables, strategies or [None]):
        for name, keys in table.items():
            if not isinstance(keys or {}, dict):
                raise InputError(f"variants: {name}: give a table of keys, {{use_liger_kernel: true}}, not {keys!r}")
            own = {key: (keys or {}).get(key) for key in OWN_KEYS}
            rest = {key: value for key, value in (keys or {}).items() if key not in OWN_KEYS}
            chosen = own["strategy"] or strategy
            label = f"{name}, {Path(strategy).stem}" if strategies and len(strategies) > 1 else str(name)
            variants.append(Variant(label, rest, chosen, bool(own["trainer"]), tuple(own["expect"] or ())))
    if not variants:
        raise InputError('variants: give one at least, such as "plain: {}"')
    folders = [v.folder for v in variants]
    for variant in variants:
        if not re.fullmatch(r"\w[\w.,+ -]*", variant.name) or folders.count(variant.folder) > 1:
            raise InputError(f"variants: {variant.name}: each needs a name of its own, of letters, digits and . , + -")
        if num_processes == 1 and variant.strategy:
            raise InputError(
                f"variants: {variant.name}: one process has no strategy: give num_processes, or no strategy"
            )
        if num_processes > 1 and not variant.strategy:
            raise InputError(f"variants: {variant.name}: {num_processes} processes need a strategy: give strategies")
        if variant.strategy and not Path(variant.strategy).is_file():
            raise InputError(f"variants: {variant.name}: {variant.strategy}: no such file")
    return variants


def recipe_values(settings_class, recipe, common, variant, num_processes, accumulation=None, toy=False):
    """{key: value} of a variant's run: the recipe, over it what all variants have in common, over that the variant's own.

    accumulation: makes global_batch_size of per_device_train_batch_size and the processes; None: the recipe's. Raises InputError for
    keys that the program does not know, or values that are not of their type.
    """
    hints = get_type_hints(settings_class, include_extras=True)
    values = read_yaml(recipe, hints)
    for where, keys in (("keys", common), (f"variants: {variant.name}", variant.keys)):
        for key, value in keys.items():
            if key not in hints:
                raise InputError(f"{where}: {key} is no key of {Path(recipe).name}")
            values[key] = check_value(hints[key], value, f"{where}: {key}")
    defaults = {f.name: f.default for f in fields(settings_class)}
    for key, most in TOY.items() if toy else ():
        values[key] = min(most, values.get(key, defaults[key]))
    if accumulation:
        each = values.get("per_device_train_batch_size", defaults["per_device_train_batch_size"])
        values["global_batch_size"] = accumulation * num_processes * each
    metadata = {f.name: f.metadata for f in fields(settings_class)}
    return values | {
        name: about["benchmark"] for name, about in metadata.items() if about.get("benchmark", ...) is not ...
    }


def same_training(settings_class, one, other):
    """Are two variants' settings ({key: value}) such that their losses should be the same, but for rounding?"""
    defines = keys_that(settings_class, None) - {*PRECISION} | {"datasets"}
    return all(one.get(name) == other.get(name) for name in defines)
