"""The runs of a benchmark: the recipes of all variants, checked, and one process tree for each run that is made of them."""

import json
import shutil
from contextlib import contextmanager, suppress
from copy import copy
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import get_type_hints

import yaml

from dilqur.benchmarking.duration import PARAMETERS_S, variant_seconds
from dilqur.benchmarking.figures import largest_batch, round_figures
from dilqur.benchmarking.kernel_evidence import evidence
from dilqur.benchmarking.synthetic_inputs import synthetic_inputs
from dilqur.benchmarking.time_limit import NoTime, TimeLimit
from dilqur.benchmarking.variants import read_variants, recipe_values
from dilqur.benchmarking.watched_run import command_line, launch_environment, remembered, run_until
from dilqur.common.atomic import atomic_file
from dilqur.common.constants import ROOT
from dilqur.common.environment import environment
from dilqur.common.errors import InputError
from dilqur.estimate.cost_model import UnknownArchitecture
from dilqur.estimate.job import Job
from dilqur.models.config import new_model_config, read_config
from dilqur.pipeline.manifest import git_commit
from dilqur.pipeline.program import load_program
from dilqur.pipeline.rows import read_pipeline
from dilqur.pipeline.settings_parser import read_yaml, to_dict
from dilqur.pipeline.stage import Stage

PROGRAMS = ("scripts/cpt.py", "scripts/mlm.py")
PROFILED_STEPS = 8  # after the sixth the profile is written
TRY_STEPS = 3  # of a batch that may be too large: the second has the optimizer's state
TOY_MODELS = {
    "cpt": {"vocab_size": 1024, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "tie_word_embeddings": True, "bos_token_id": 300, "eos_token_id": 301, "pad_token_id": 304},
    "mlm": {"vocab_size": 1024, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
            "max_length": 64},
}  # fmt: skip
TRIES = 8  # of a search for the largest batch


class Benchmark:
    """The recipes of all variants, checked, and the runs that are made of them."""

    def __init__(self, settings, folder):
        settings = copy(settings)  # the stage's stay as they were given
        if settings.toy:
            settings.synthetic, settings.accumulation, settings.rounds, settings.largest_batch = True, 1, 1, None
            settings.warmup_steps, settings.timed_steps = 1, 3
            settings.parity_steps = min(settings.parity_steps, 4)
        self.settings, self.folder = settings, Path(folder)
        seconds = [m and 60 * m for m in (settings.max_minutes, settings.cut_minutes)]
        self.time_limit = TimeLimit(*seconds)
        self.variants = read_variants(settings.variants, settings.strategies, settings.num_processes)
        self.program = program_of(settings.recipe)
        self.kind = self.program.kind
        if any(v.trainer for v in self.variants) and self.kind != "cpt":
            raise InputError("trainer: the Trainer's row is of causal models: leave it out for mlm.py")
        if settings.model_config and not settings.synthetic:
            raise InputError("model_config: that is the shape of a synthetic model: give synthetic: true, too")
        self.values = {v.name: self.values_of(v) for v in self.variants}
        if settings.toy:  # those that differ in size alone are one now
            seen = [(self.values[v.name], v.strategy, v.trainer) for v in self.variants]
            self.variants = [v for at, v in enumerate(self.variants) if seen[at] not in seen[:at]]

    def values_of(self, variant):
        s = self.settings
        where = (s.num_processes, s.accumulation, s.toy)
        values = recipe_values(self.program.settings, s.recipe, s.keys, variant, *where)
        if s.synthetic:
            shape = TOY_MODELS[self.kind] if s.toy else s.model_config or values.get("model_config")
            if not shape:
                raise InputError(f"model_config missing: {s.recipe} continues a model, whose shape it does not say")
            values |= {"continue_data": False, "model_name_or_path": None, "model_config": shape, "local_dir": None}
        return values

    def make_inputs(self):
        """With `synthetic`: the shards, tokenizer and model of all variants, in the run folder beside this benchmark's."""
        if not self.settings.synthetic:
            return
        steps = max(self.steps) + 1
        tokens = max(v["global_batch_size"] * v["max_length"] for v in self.values.values()) * steps
        encoder = self.kind == "mlm"
        for values in self.values.values():
            where = self.folder.parent / "synthetic"
            made = synthetic_inputs(where, values["model_config"], tokens, encoder, with_model=not encoder)
            values["datasets"] = [{"path": str(made / "shards")}]
            if encoder:
                values["tokenizer"] = str(made / "tokenizer")
            else:
                values |= {"model_name_or_path": str(made / "model"), "model_config": None, "tokenizer": None}

    def resolve(self, variant, **more):
        """The settings of a variant's run, as its program would have them, every path found."""
        values = {**self.values[variant.name], **more}
        # the recipe's own schedule, if it is longer than the benchmark
        values["max_steps"] = max(values.get("max_steps") or 0, values.get("warmup_steps", 0) + max(self.steps) + 1)
        try:
            settings = self.program.settings(**values)
        except TypeError as problem:
            raise InputError(f"{self.settings.recipe}: {str(problem).partition('() ')[2]}") from None
        settings.config, settings.output_dir = self.settings.recipe, str(self.folder / "none")
        Stage(settings, self.program.file)
        return settings

    def check(self, variant):
        """Raises InputError as the variant's program would. A synthetic one's inputs are not there yet: its run says what is wrong."""
        strategy = {"DILQUR_ACCELERATE_CONFIG": variant.strategy} if variant.strategy else {}
        with environment(WORLD_SIZE=str(self.settings.num_processes), **strategy):
            self.program.check(self.resolve(variant))

    def run(self, variant, name, steps, environ=None, **more):
        """The Outcome of a run of `steps` steps, called `name`; its recipe, log and metrics stay in OUTPUT_DIR/runs."""
        settings = self.resolve(variant, **more)
        recipe = self.folder / "runs" / f"{name}.yaml"
        recipe.parent.mkdir(parents=True, exist_ok=True)
        defaults = {f.name: f.default for f in fields(settings)}
        keys = {key: value for key, value in to_dict(settings).items() if value != defaults[key]}
        with atomic_file(recipe, "w", encoding="utf-8") as file:
            yaml.safe_dump(keys, file, sort_keys=False, allow_unicode=True)
        started = ROOT / "benchmarks" / "trainer_baseline.py" if variant.trainer else self.program.file
        out = recipe.with_suffix("")
        command = command_line(started, recipe, out, self.settings.num_processes, variant.strategy)
        gpus = [gpu["index"] for gpu in self.machine["gpus"]]
        found = {**launch_environment(self.settings.num_processes, gpus, self.folder / "cache"), **(environ or {})}

        def watch(seconds):
            shutil.rmtree(out, ignore_errors=True)
            outcome = run_until(command, found, out, steps, seconds)
            for large in ("checkpoints", "model", "packing"):
                shutil.rmtree(out / large, ignore_errors=True)
            return outcome

        identity = {"keys": keys, "command": command, "steps": steps, "environ": environ}
        identity |= {"host": self.machine["host"], "git": git_commit()}
        limited = partial(self.time_limit.run, watch, 60 * self.settings.timeout_minutes)
        outcome = remembered(out.with_name(f"{name}.json"), identity, limited)
        print(f"{name}: {outcome.problem or f'{steps} steps'}, {outcome.seconds:.0f} s", flush=True)
        return outcome

    @property
    def steps(self):
        """Steps of (a timed run, the run whose losses are compared and that is profiled)."""
        s = self.settings
        timed = s.warmup_steps + s.timed_steps
        return timed, max(s.parity_steps, PROFILED_STEPS if s.profile else 0)

    def measure(self):
        """{variant: what came out of all its runs}. left_out: [(what, why)] of those that were not made."""
        s, (timed, looked) = self.settings, self.steps
        empty = {
            "problem": None,
            "kernels": None,
            "losses": None,
            "losses_problem": None,
            "evidence": None,
            "largest_batch": None,
        }
        rows = {v.name: {"rounds": [], "left_out": [], **empty} for v in self.variants}
        ends = f"{s.warmup_steps} {timed}"
        for number in range(1, s.rounds + 1):
            for variant in self.variants:
                row = rows[variant.name]
                if row["problem"]:
                    continue  # it will not be better next time
                with in_time(row, f"round {number}"):
                    outcome = self.run(variant, f"{variant.folder}-round-{number}", timed, {"SYNCHRONIZE_AT": ends})
                    row["problem"] = outcome.problem
                    if not outcome.problem:
                        figures = round_figures(outcome.records, s.warmup_steps, timed)
                        row["kernels"] = self.kernels_of(f"{variant.folder}-round-{number}").get("chosen")
                        row["rounds"].append(
                            {**figures, "resident_gb": outcome.resident_gb, "seconds": outcome.seconds}
                        )
        for variant in self.variants:
            row = rows[variant.name]
            if looked and not row["problem"]:
                with in_time(row, "losses and kernels"):
                    row |= self.look_at(variant, looked)
            if s.largest_batch and row["problem"] in (None, "out of memory"):
                with in_time(row, "largest batch"):
                    row["largest_batch"] = self.largest(variant)
        return rows

    def seconds(self, gpu):
        """That all runs that are not made yet will take, about. gpu: its name, None: on CPUs."""
        s, (timed, looked), total, models = self.settings, self.steps, 0.0, {}
        for variant in self.variants:
            names = [(f"round-{n}", timed) for n in range(1, s.rounds + 1)] + [("losses", looked)] * bool(looked)
            runs = [n for name, n in names if not (self.folder / "runs" / f"{variant.folder}-{name}.json").exists()]
            job = self.job(variant)
            total += variant_seconds(job, runs, s.num_processes, gpu, TRIES * bool(s.largest_batch))
            if job and s.synthetic and self.kind == "cpt":
                models[json.dumps(job.config, sort_keys=True)] = job.total / PARAMETERS_S
        return total + sum(models.values()) * (not (self.folder.parent / "synthetic").exists())

    def job(self, variant):
        """As the planner sees a variant; None of a model whose sizes it does not know. A synthetic one's inputs are not there yet."""
        values = self.values[variant.name]
        try:
            if self.settings.synthetic:
                settings = self.program.settings(**{**values, "datasets": []})
                config = new_model_config(self.kind, values["model_config"])
            else:
                settings = self.resolve(variant)
                config = settings.model_config or read_config(settings.model_name_or_path)
            job = Job.of(settings, config)
            return job if job.computed_flops_per_token() else None
        except (UnknownArchitecture, KeyError, TypeError):
            return None

    def look_at(self, variant, steps):
        """Losses of all steps, and the kernels, from a run that is not timed."""
        name = f"{variant.folder}-losses"
        outcome = self.run(variant, name, steps, {"LOG_LOSSES": "1"}, profile=self.settings.profile)
        found = {"losses": outcome.records, "losses_problem": outcome.problem}
        if outcome.problem:
            return found
        if self.settings.profile:
            seen = self.folder / "runs" / name / "profile" / "operations.json"
            operations = json.loads(seen.read_text())["operations"]
            keys = {**to_dict(self.resolve(variant)), **self.kernels_of(name).get("chosen", {})}
            found["evidence"] = evidence(operations, keys, variant.expect)
        return found

    def kernels_of(self, name):
        """{"chosen", "why"} of a run of our loop; {} of another's."""
        said = self.folder / "runs" / name / "kernels.json"
        return json.loads(said.read_text()) if said.exists() else {}

    def largest(self, variant):
        def fits(batch):
            more = {"per_device_train_batch_size": batch, "global_batch_size": batch * self.settings.num_processes}
            return self.run(variant, f"{variant.folder}-batch-{batch}", TRY_STEPS, **more).problem is None

        begin = self.values[variant.name].get("per_device_train_batch_size", 1)
        return largest_batch(fits, begin, self.settings.largest_batch)


def program_of(recipe):
    """The Program of a recipe: as pipeline.txt beside it has it, else the one that knows all its keys. Raises InputError for a recipe that
    is of neither scripts/cpt.py nor scripts/mlm.py."""
    named = {row.program for row in read_pipeline(Path(recipe).parent) if row.recipe == Path(recipe).stem}
    candidates = [load_program(path) for path in PROGRAMS if not named or path in named]
    for candidate in candidates[:-1]:
        with suppress(InputError):
            read_yaml(recipe, get_type_hints(candidate.settings, include_extras=True))
            return candidate
    if not candidates:
        raise InputError(f"recipe: {recipe} is of {named.pop()}: give one of {' or '.join(PROGRAMS)}")
    return candidates[-1]


@contextmanager
def in_time(row, what):
    """Where there is no time for it, `row` says so."""
    try:
        yield
    except NoTime as why:
        row["left_out"].append((what, str(why)))
