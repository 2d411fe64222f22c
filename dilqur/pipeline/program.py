"""A program: the settings it takes, what it checks, what it runs, and of which kind it is.

    @program(CptSettings, check, kind="cpt")
    def main(settings, stage):
        ...

    if __name__ == "__main__":
        main()

`main` is then a `Program`. Called, it reads recipe and flags, finds the stage's folder, ends where the stage is finished, checks, ends
there with --check, and runs. scripts/preflight.py and scripts/benchmark.py ask the same object, by `load_program`, for its settings and its
check; so can a program of your own, once a row of pipeline.txt names it.
"""

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dilqur.common.constants import ROOT
from dilqur.common.errors import InputError, one_line_errors
from dilqur.pipeline.settings_parser import parse
from dilqur.pipeline.stage import Stage, StageSettings


def nothing(*arguments):
    """What a program does at a point where it has nothing to do."""


@dataclass(frozen=True)
class Program:
    """run(settings[, stage][, checked]): with a stage where the settings are StageSettings, and with what `check` returned unless that
    is None.

    settings: the dataclass of its keys. check(settings): raises InputError for whatever can be seen without torch. kind: what other parts
    know it by: "cpt", "mlm", "sft", "transplant", "tokenizer", or "". inputs(stage): adds inputs that no key names to `stage.inputs`.
    about(settings, checked): what --check says after "ok". needs_folder: False for a program that may just print. positional: the key
    that takes bare words; config_is_positional: --config is another name of it.
    """

    run: Callable
    settings: type
    check: Callable = nothing
    kind: str = ""
    inputs: Callable = nothing
    about: Callable = nothing
    needs_folder: bool = True
    positional: str | None = None
    config_is_positional: bool = False

    @property
    def file(self):
        return self.run.__globals__["__file__"]

    def parse(self, argv=None):
        """Its settings of a command line, sys.argv's by default. Raises InputError."""
        return parse(self.settings, self.run.__globals__["__doc__"], argv, self.positional, self.config_is_positional)

    def prepare(self, argv=None):
        """(settings, Stage or None, what `check` returned). Raises InputError, and AlreadyFinished where there is nothing to do."""
        settings, stage = self.parse(argv), None
        if issubclass(self.settings, StageSettings):
            stage = Stage(settings, self.file, not self.needs_folder)
            self.inputs(stage)
            stage.refuse_finished()
        return settings, stage, self.check(settings)

    def __call__(self, argv=None):
        with one_line_errors():
            settings, stage, checked = self.prepare(argv)
            if getattr(settings, "check", False):
                print(f"{stage.name if stage else Path(self.file).stem}: ok{self.about(settings, checked) or ''}")
            else:
                self.run(*(given for given in (settings, stage, checked) if given is not None))


def program(settings, check=nothing, **more):
    """Decorate a program's `main`: it becomes a Program of these settings, with `more` of its fields."""
    return lambda run: Program(run, settings, check, **more)


def load_program(path):
    """The Program that a file of the checkout defines as `main`; path: relative to it. Raises InputError where there is none."""
    if not (ROOT / path).is_file():
        raise InputError(f"{ROOT / path}: no such program")
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    found = getattr(importlib.import_module(".".join(Path(path).with_suffix("").parts)), "main", None)
    if not isinstance(found, Program):
        raise InputError(f"{ROOT / path}: defines no `main` that is a Program (dilqur/pipeline/program.py)")
    return found
