"""A stage that has not run yet: its recipe, what it reads, as far as that is there, and the model it will make."""

import os
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

from dilqur.common.errors import InputError
from dilqur.estimate.cost_model import UnknownArchitecture, parameter_sizes
from dilqur.models.config import new_model_config, read_config
from dilqur.models.published_configs import PUBLISHED
from dilqur.pipeline.inputs import in_hub_cache
from dilqur.pipeline.program import Program
from dilqur.pipeline.rows import PipelineRow, read_pipeline
from dilqur.pipeline.stage import Stage
from dilqur.preflight.batch_file import BatchFile
from dilqur.preflight.findings import Skipped
from dilqur.tokenizer.llama3 import SPECIAL_TOKENS
from dilqur.tokenizer.text_tokenizer import TextTokenizer, padded_size


class DryRunStage(Stage):
    """A stage whose inputs may not be there yet. `later`: {path: the stage above that will make it}."""

    def __init__(self, settings, program):
        self.later = {}
        super().__init__(settings, program)

    def path(self, value, kind, key):
        names = [row.name for row in self.pipeline]
        above, first = names[: names.index(self.name)], value.partition("/")[0]
        waits_for = [n for n in above if not (self.run_dir / n / "manifest.json").exists()]
        if kind == "run" and waits_for:
            self.later[value] = waits_for[-1]
            return value
        if first in names and first not in above:
            raise InputError(f"{key}: {value}: {first} is not above {self.name} in pipeline.txt: move its line up")
        if first in waits_for:
            self.later[str(self.run_dir / value)] = first
            return str(self.run_dir / value)
        return super().path(value, kind, key)


@dataclass
class StagePlan:
    """A row of pipeline.txt with all that its checks look at. processes: in all; keys: recipe and flags together, paths as they
    stand there; config: of the model it reads or makes, None if unknown."""

    row: PipelineRow
    arguments: list
    batch_file: BatchFile
    processes: int
    program: Program | None = None
    settings: object = None
    keys: dict | None = None
    stage: DryRunStage | None = None
    config: dict | None = None

    def there(self, kind):
        """The inputs of this kind that are there already."""
        return [p for p, k in self.stage.inputs.items() if k == kind and p not in self.stage.later]

    @property
    def default_strategy(self):
        """The accelerate config that slurm/lib/launch.sh takes by itself, without its ending."""
        return "fsdp2" if self.row.program == "scripts/cpt.py" else "ddp"

    def strategy_file(self):
        """The accelerate config it would be launched with, as slurm/lib/launch.sh chooses it; None for one process."""
        if self.processes == 1:
            return None
        return os.environ.get("DILQUR_ACCELERATE_CONFIG") or f"accelerate_configs/{self.default_strategy}.yaml"


@dataclass
class Context:
    """What the checks of one stage leave for those of the next. plans: {stage: StagePlan}; gpus: of this machine, as check_gpus;
    seen: folders that were tried; claimed: {(file system, "bytes" or "files"): what the stages so far will take}."""

    verify: bool = False
    on_a_cluster: bool = False
    plans: dict = field(default_factory=dict)
    gpus: list = field(default_factory=list)
    seen: set = field(default_factory=set)
    claimed: dict = field(default_factory=dict)


def rows_of(recipe):
    """(folder, rows of its pipeline.txt, names of those that are meant) of a recipe folder, or of one recipe file: its stage and the
    variants of it. recipe: a Path. Raises InputError where there is none."""
    folder, only = (recipe, None) if recipe.is_dir() else (recipe.parent, recipe.stem)
    rows = read_pipeline(folder)
    if not recipe.exists() or not rows:
        raise InputError(f"{recipe}: no recipe there, or no pipeline.txt that says which program each stage runs")
    chosen = [row.name for row in rows if only in (None, row.recipe)]
    if not chosen:
        raise InputError(f"{folder}/pipeline.txt: no line for {only}, which would say what program reads {recipe}")
    return folder, rows, chosen


def existing(path):
    """The path, or the nearest folder above it that is there."""
    return next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())


def parameters(planned):
    """(trained, all) parameters. Raises InputError for a pattern of unfrozen_parameters that matches none of them."""
    try:
        sizes = parameter_sizes(planned.config)
    except UnknownArchitecture as problem:
        raise Skipped(str(problem)) from None
    except KeyError as missing:
        raise Skipped(f"the model's config has no {missing}") from None
    patterns = getattr(planned.settings, "unfrozen_parameters", None)
    if not patterns:
        return sum(sizes.values()), sum(sizes.values())
    for pattern in patterns:
        if not any(fnmatch(name, pattern) for name in (*sizes, "lm_head.weight")):
            names = ", ".join([*sizes][:3])
            raise InputError(
                f"unfrozen_parameters: {pattern!r} matches no parameter of the model: they are called {names}, …"
            )
    return sum(n for name, n in sizes.items() if any(fnmatch(name, p) for p in patterns)), sum(sizes.values())


def model_config_of(name, plans, places, stated=None):
    """The config, a dict, of the model that the stage `name` reads or makes: of its folder, of the stage above that will make it, of the
    folder or the Hub's cache its path names, `stated`, or that of a published model of the name. Raises InputError where none says it.

    plans: {stage: StagePlan}. places: (run folder, recipe folder).
    """
    planned = plans[name]
    for made in (places[0] / name, places[0] / name / "model"):
        if (made / "config.json").exists():
            return read_config(made)
    if new := planned.keys.get("model_config"):
        return new_model_config(planned.program.kind, new)
    path = planned.keys.get("model_name_or_path")
    if not isinstance(path, str):
        raise InputError(f"{name}: reads no one model")
    if path.partition("/")[0] in plans:
        config = model_config_of(path.partition("/")[0], plans, places, stated)
    elif there := next((found for found in candidates(path, places) if (found / "config.json").exists()), None):
        config = read_config(there)
    elif cached := in_hub_cache(path):
        config = read_config(cached)
    elif stated:
        config = dict(stated)
    elif known := next((name for name in PUBLISHED if Path(path).name.lower() in (name, f"{name}-instruct")), None):
        config = PUBLISHED[known]
    else:
        raise InputError(
            f"model_name_or_path: {path} is not there and its shape is not known: fetch it, or give --model_config"
        )
    if planned.program.kind != "transplant":
        return config
    size = ids_of(planned.keys["tokenizer"], plans, places) or config["vocab_size"]
    return {**config, "vocab_size": padded_size(size, planned.keys["pad_to_multiple_of"])}


def ids_of(tokenizer, plans, places):
    """How many ids a tokenizer has or, where a stage will make it, will have; None where that makes several, or it is not there."""
    for path in candidates(tokenizer, places):
        if (path / "tokenizer.json").exists() or path.is_file():
            return TextTokenizer(path).size
    keys = plans[tokenizer].keys if tokenizer in plans else {}
    if base := keys.get("base_tokenizer"):
        size = ids_of(base, plans, places)
        return size + keys["new_tokens"][0] if size and len(keys["new_tokens"]) == 1 else None
    return keys["vocab_size"] + len(SPECIAL_TOKENS) if keys.get("vocab_size") else None


def candidates(path, places):
    """Where what a recipe calls so may lie: in the run folder, beside the recipe, or as it stands."""
    return [*(place / path for place in places), Path(path)]
