r"""Measures variants of a recipe, which differ in keys or strategy, by running the real programs in turn: tokens/s, memory, phases, losses.

    python scripts/benchmark.py --config benchmarks/grids/toy.yaml --check
    python scripts/benchmark.py --recipe recipes/quickstart/cpt-2-full.yaml --output_dir runs/try/benchmark --rounds 1 --warmup_steps 2 \
        --timed_steps 4 --parity_steps 0 --profile false --variants "plain: {}" "recomputed: {gradient_checkpointing: true}"
    benchmarks/run_gpu.sh --dry-run

A variant is `NAME: {KEY: VALUE}` over the recipe, with any key of its program and three more: strategy (an accelerate config), trainer
(true: Hugging Face's Trainer instead of our loop), expect (patterns of kernels that have to run). The first is what the others are
compared with. Each run is processes of its own: the recipe's program, started as slurm/launch.sh does, on `num_processes` GPUs of this
node, and killed when metrics.jsonl has the last step that is wanted: a save is not measured. Out of memory is a result.

OUTPUT_DIR/benchmark.json has every round, with machine, driver, versions and commit; benchmark.md the tables. A benchmark that was cut
short goes on where it was when it is started again. docs/benchmarking.md says how each figure is measured.
"""

import json
import os
import runpy
import shlex
import shutil
import signal
import sys
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import Field

from dilqur.atomic import atomic_file, write_json
from dilqur.benchmarking.benchmark_tables import markdown
from dilqur.benchmarking.figures import largest_batch, loss_parity, over_rounds, round_figures, utilisation
from dilqur.benchmarking.kernel_evidence import evidence
from dilqur.benchmarking.synthetic_inputs import synthetic_inputs
from dilqur.benchmarking.variants import read_variants, recipe_values, same_training
from dilqur.benchmarking.watched_run import command_line, environment, remembered, run_until
from dilqur.cost_model import UnknownArchitecture, peak_flops
from dilqur.errors import InputError, program
from dilqur.planning.job import Job, is_encoder
from dilqur.preflight.node_facts import node_facts
from dilqur.recipe import parse, to_dict
from dilqur.stage import FilePath, Stage, StageSettings, _git, hardware, package_versions, read_config, read_pipeline

ROOT = Path(__file__).resolve().parent.parent
CLASSES = {"cpt": "CptSettings", "mlm": "MlmSettings"}
PROFILED_STEPS = 8  # after the sixth the profile is written
TRY_STEPS = 3  # of a batch that may be too large: the second has the optimizer's state
TOY_MODELS = {
    "cpt": {"vocab_size": 1024, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "tie_word_embeddings": True, "bos_token_id": 300, "eos_token_id": 301, "pad_token_id": 304},
    "mlm": {"vocab_size": 1024, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
            "max_length": 64},
}  # fmt: skip
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]


@dataclass(kw_only=True)
class BenchmarkSettings(StageSettings):
    recipe: FilePath = field(metadata={"help": "of scripts/cpt.py or scripts/mlm.py: what is measured"})
    keys: dict = field(default_factory=dict, metadata={"help": "{KEY: VALUE} over the recipe, for all variants"})
    variants: list[dict] = field(
        metadata={"help": "NAME: {KEY: VALUE}, …; the first is what the others are compared with"}
    )
    strategies: list[str] | None = field(default=None, metadata={"help": "accelerate configs; each variant under each"})
    num_processes: Positive = field(default=1, metadata={"help": "GPUs of this node; without a GPU, processes"})
    accumulation: Positive | None = field(
        default=None,
        metadata={"help": "micro-batches a step, from which global_batch_size follows; none: the recipe's own"},
    )
    synthetic: bool = field(
        default=False, metadata={"help": "random weights and tokens instead of the recipe's inputs"}
    )
    model_config: dict | None = field(default=None, metadata={"help": "with synthetic: the shape, keys of its config"})
    toy: bool = field(default=False, metadata={"help": "the same with a tiny model and few steps, to try it on a CPU"})
    rounds: Positive = field(default=3, metadata={"help": "times every variant is timed, in turn"})
    warmup_steps: Positive = field(default=10, metadata={"help": "steps before the clock starts"})
    timed_steps: Positive = field(default=20, metadata={"help": "steps by the clock"})
    parity_steps: Count = field(default=200, metadata={"help": "steps whose losses are compared; 0: none"})
    profile: bool = field(default=True, metadata={"help": "look, in a run of its own, at which kernels ran"})
    largest_batch: Positive | None = field(
        default=None, metadata={"help": "find the largest batch a device holds, up to this; none: do not"}
    )
    timeout_minutes: Positive = field(default=30, metadata={"help": "that a run may take"})


# -- what is run --------------------------------------------------------------------------------------------------------


class Benchmark:
    """The recipes of all variants, checked, and the runs that are made of them."""

    def __init__(self, settings, folder):
        settings = copy(settings)  # the stage's stay as they were given
        if settings.toy:
            settings.synthetic, settings.accumulation, settings.rounds, settings.largest_batch = True, 1, 1, None
            settings.warmup_steps, settings.timed_steps = 1, 3
            settings.parity_steps = min(settings.parity_steps, 4)
        self.settings, self.folder = settings, Path(folder)
        self.variants = read_variants(settings.variants, settings.strategies, settings.num_processes)
        self.kind = program_of(settings.recipe)
        self.program = ROOT / "scripts" / f"{self.kind}.py"
        self.module = runpy.run_path(str(self.program))
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
        values = recipe_values(self.module[CLASSES[self.kind]], s.recipe, s.keys, variant, *where)
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
            settings = self.module[CLASSES[self.kind]](**values)
        except TypeError as problem:
            raise InputError(f"{self.settings.recipe}: {str(problem).partition('() ')[2]}") from None
        settings.config, settings.output_dir = self.settings.recipe, str(self.folder / "none")
        Stage(settings, self.program)
        return settings

    def check(self, variant):
        """Raises InputError as the variant's program would. A synthetic one's inputs are not there yet: its run says what is wrong."""
        strategy = {"DILQUR_STRATEGY": variant.strategy} if variant.strategy else {}
        with variables(WORLD_SIZE=str(self.settings.num_processes), **strategy):
            self.module["check"](self.resolve(variant))

    def run(self, variant, name, steps, environ=None, **more):
        """The Outcome of a run of `steps` steps, called `name`; its recipe, log and metrics stay in OUTPUT_DIR/runs."""
        settings = self.resolve(variant, **more)
        recipe = self.folder / "runs" / f"{name}.yaml"
        recipe.parent.mkdir(parents=True, exist_ok=True)
        defaults = {f.name: f.default for f in fields(settings)}
        keys = {key: value for key, value in to_dict(settings).items() if value != defaults[key]}
        with atomic_file(recipe, "w", encoding="utf-8") as file:
            yaml.safe_dump(keys, file, sort_keys=False, allow_unicode=True)
        started = ROOT / "benchmarks" / "trainer_baseline.py" if variant.trainer else self.program
        out = recipe.with_suffix("")
        command = command_line(started, recipe, out, self.settings.num_processes, variant.strategy)
        gpus = [gpu["index"] for gpu in self.machine["gpus"]]
        found = {**environment(self.settings.num_processes, gpus, self.folder / "cache"), **(environ or {})}

        def measure():
            shutil.rmtree(out, ignore_errors=True)
            outcome = run_until(command, found, out, steps, 60 * self.settings.timeout_minutes)
            for large in ("checkpoints", "model", "packing"):
                shutil.rmtree(out / large, ignore_errors=True)
            return outcome

        identity = {"keys": keys, "command": command, "steps": steps, "environ": environ}
        identity |= {"host": self.machine["host"], "git": _git()}
        outcome = remembered(out.with_name(f"{name}.json"), identity, measure)
        print(f"{name}: {outcome.problem or f'{steps} steps'}, {outcome.seconds:.0f} s", flush=True)
        return outcome

    @property
    def steps(self):
        """Steps of (a timed run, the run whose losses are compared and that is profiled)."""
        s = self.settings
        timed = s.warmup_steps + s.timed_steps
        return timed, max(s.parity_steps, PROFILED_STEPS if s.profile else 0)

    def measure(self):
        """{variant: what came out of all its runs}."""
        s, (timed, looked) = self.settings, self.steps
        empty = {"problem": None, "kernels": None, "losses": None, "losses_problem": None, "evidence": None}
        rows = {v.name: {"rounds": [], **empty} for v in self.variants}
        ends = f"{s.warmup_steps} {timed}"
        for number in range(1, s.rounds + 1):
            for variant in self.variants:
                row = rows[variant.name]
                if row["problem"]:
                    continue  # it will not be better next time
                outcome = self.run(variant, f"{variant.folder}-round-{number}", timed, {"SYNCHRONIZE_AT": ends})
                row["problem"] = outcome.problem
                if not outcome.problem:
                    figures = round_figures(outcome.records, s.warmup_steps, timed)
                    row["kernels"] = self.kernels_of(f"{variant.folder}-round-{number}").get("chosen")
                    row["rounds"].append({**figures, "resident_gb": outcome.resident_gb, "seconds": outcome.seconds})
        for variant in self.variants:
            row = rows[variant.name]
            if looked and not row["problem"]:
                row |= self.look_at(variant, looked)
            runs = row["problem"] in (None, "out of memory")
            row["largest_batch"] = self.largest(variant) if s.largest_batch and runs else None
        return rows

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
    """ "cpt" or "mlm": as pipeline.txt beside the recipe has it, else by its keys."""
    stem = Path(recipe).stem
    named = {Path(row.program).stem for row in read_pipeline(Path(recipe).parent) if row.recipe == stem}
    kind = named.pop() if named else "mlm" if "mlm_probability:" in Path(recipe).read_text() else "cpt"
    if kind not in CLASSES:
        raise InputError(f"recipe: {recipe} is of {kind}.py: give one of scripts/cpt.py or scripts/mlm.py")
    return kind


@contextmanager
def variables(**values):
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


# -- figures --------------------------------------------------------------------------------------------------------------


def flops_of(settings, defaults):
    """({"half": a token's floating-point operations, a causal mask saving half of the attention, "whole": with all of it, as PaLM
    counts}, parameters); ({}, None) of a model whose sizes are not known. An encoder's attention is whole in both. defaults: keys of a
    model_config that a recipe may leave out."""
    config = {**defaults, **(settings.model_config or read_config(settings.model_name_or_path))}
    try:
        job = Job.of(settings, config)
        if settings.unfrozen_parameters and not job.embeddings_only:
            return {}, None
        half = whole = job.flops_per_token()
        if not is_encoder(config):
            whole += 6 * config["num_hidden_layers"] * config["hidden_size"] * settings.max_length
        return {"half": half, "whole": whole}, job.total
    except (UnknownArchitecture, KeyError):
        return {}, None


def summarise(benchmark, rows):
    """The rows as benchmark.json has them: medians, utilisation and comparisons added, the losses' records left out."""
    settings, machine = benchmark.settings, benchmark.machine
    peak = peak_flops(machine["gpus"][0]["name"]) if machine["gpus"] else None
    first = benchmark.variants[0].name
    out = {}
    for variant in benchmark.variants:
        row, resolved = rows[variant.name], benchmark.resolve(variant)
        figures, keys = over_rounds(row["rounds"]), to_dict(resolved)
        flops, size = flops_of(resolved, benchmark.module.get("MODEL_KEYS", {}))
        used = (
            utilisation(figures["tokens_per_second"]["median"], flops, settings.num_processes, peak)
            if figures
            else None
        )
        parity, note = None, None
        if variant.name != first and settings.parity_steps and row["losses"] and rows[first]["losses"]:
            same = same_training(benchmark.values[first], benchmark.values[variant.name])
            parity = loss_parity(rows[first]["losses"], row["losses"], settings.parity_steps) if same else None
            note = None if parity else "a loss is missing" if same else "another training"
        out[variant.name] = {
            "settings": keys, "kernels": row["kernels"], "strategy": variant.strategy,
            "trainer": variant.trainer, "problem": row["problem"] or row["losses_problem"],
            "batch": keys["per_device_train_batch_size"], "flops_per_token": flops, "parameters": size, "figures": figures,
            "utilisation": used, "rounds": row["rounds"], "parity": parity, "parity_note": note,
            "losses": [r["loss"] for r in row["losses"] or []], "evidence": row["evidence"], "largest_batch": row["largest_batch"],
        }  # fmt: skip
    return out


@program
def main():
    settings = parse(BenchmarkSettings, __doc__)
    stage = Stage(settings, __file__)
    stage.refuse_finished()
    benchmark = Benchmark(settings, stage.folder)
    if not benchmark.settings.synthetic:
        for variant in benchmark.variants:
            benchmark.check(variant)
    runs = len(benchmark.variants) * (benchmark.settings.rounds + bool(benchmark.steps[1]))
    if settings.check:
        return print(f"{stage.name}: ok, {len(benchmark.variants)} variants, {runs} runs")
    stage.open()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # else the run in progress would go on
    facts = node_facts()
    benchmark.machine = {**hardware(), "gpus": facts["gpus"], "driver": facts["driver"]}
    benchmark.make_inputs()

    rows, used = summarise(benchmark, benchmark.measure()), benchmark.settings
    result = {
        "command": shlex.join(["python", *sys.argv]),
        "recipe": used.recipe,
        "synthetic": used.synthetic,
        "num_processes": used.num_processes,
        "rounds": used.rounds,
        "steps": {"warm_up": used.warmup_steps, "timed": used.timed_steps, "parity": used.parity_steps},
        "machine": benchmark.machine,
        "on_gpu": bool(benchmark.machine["gpus"]),
        "packages": package_versions(),
        "git": _git(),
        "settings": to_dict(settings),
        "parameters": next(iter(rows.values()))["parameters"],
        "variants": rows,
    }
    write_json(stage.folder / "benchmark.json", result)
    text = markdown(result)
    with atomic_file(stage.folder / "benchmark.md", "w", encoding="utf-8") as file:
        file.write(text)
    shutil.rmtree(stage.folder / "cache", ignore_errors=True)
    speeds = {name: (row["figures"] or {}).get("tokens_per_second", {}).get("median") for name, row in rows.items()}
    stage.finish({"tokens_per_second": speeds, "problems": {name: row["problem"] for name, row in rows.items()}})
    print(f"\n{text}\n{stage.folder}/benchmark.json")
    return None


if __name__ == "__main__":
    main()
