r"""Measures variants of a recipe, which differ in keys or strategy, by running the real programs in turn: tokens/s, memory, phases, losses.

    python scripts/benchmark.py --config benchmarks/grids/toy.yaml --check
    python scripts/benchmark.py --recipe recipes/quickstart/cpt-2-full.yaml --output_dir runs/try/benchmark --rounds 1 --warmup_steps 2 \
        --timed_steps 4 --parity_steps 0 --profile false --variants "plain: {}" "recomputed: {gradient_checkpointing: true}"
    benchmarks/run_gpu.sh --dry-run

A variant is `NAME: {KEY: VALUE}` over the recipe, with any key of its program and three more: strategy (an accelerate config), trainer
(true: Hugging Face's Trainer instead of our loop), expect (patterns of kernels that have to run). The first is what the others are
compared with. Each run is processes of its own: the recipe's program, started as slurm/lib/launch.sh does, on `num_processes` GPUs of this
node, and killed when metrics.jsonl has the last step that is wanted: a save is not measured. Out of memory is a result.

OUTPUT_DIR/benchmark.json has every round, with machine, driver, versions and commit; benchmark.md the tables. With max_minutes, or when it
is interrupted, they have what was measured until then; a benchmark that was cut short goes on where it was when it is started again.
--check says about how long it will take. docs/benchmarking.md says how each figure is measured.
"""

import shlex
import shutil
import signal
import sys
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from dilqur.benchmarking.benchmark_tables import NOT_OF_A_SLICE, markdown
from dilqur.benchmarking.runs import Benchmark
from dilqur.benchmarking.summary import summarise
from dilqur.common.atomic import atomic_file, write_json
from dilqur.common.constants import Count, Positive
from dilqur.common.errors import InputError
from dilqur.pipeline.inputs import FilePath
from dilqur.pipeline.manifest import git_commit, hardware, package_versions
from dilqur.pipeline.program import program
from dilqur.pipeline.settings_parser import setting, to_dict
from dilqur.pipeline.stage import StageSettings
from dilqur.preflight.node_facts import node_facts

Minutes = Annotated[float, Field(gt=0)] | None


@dataclass(kw_only=True)
class BenchmarkSettings(StageSettings):
    recipe: FilePath = setting("of scripts/cpt.py or scripts/mlm.py: what is measured")
    keys: dict = setting("{KEY: VALUE} over the recipe, for all variants", default_factory=dict)
    variants: list[dict] = setting("NAME: {KEY: VALUE}, …; the first is what the others are compared with")
    strategies: list[str] | None = setting("accelerate configs; each variant under each", default=None)
    num_processes: Positive = setting("GPUs of this node; without a GPU, processes", default=1)
    accumulation: Positive | None = setting(
        "micro-batches a step, from which global_batch_size follows; none: the recipe's own", default=None
    )
    synthetic: bool = setting("random weights and tokens instead of the recipe's inputs", default=False)
    model_config: dict | None = setting("with synthetic: the shape, keys of its config", default=None)
    toy: bool = setting("the same with a tiny model and few steps, to try it on a CPU", default=False)
    rounds: Positive = setting("times every variant is timed, in turn", default=3)
    warmup_steps: Positive = setting("steps before the clock starts", default=10)
    timed_steps: Positive = setting("steps by the clock", default=20)
    parity_steps: Count = setting("steps whose losses are compared; 0: none", default=200)
    profile: bool = setting("look, in a run of its own, at which kernels ran", default=True)
    largest_batch: Positive | None = setting(
        "find the largest batch a device holds, up to this; none: do not", default=None
    )
    timeout_minutes: Positive = setting("that a run may take", default=30, on_resume="free")
    max_minutes: Minutes = setting(
        "after which no run begins: what comes last is left out; none: all are made", default=None, on_resume="free"
    )
    cut_minutes: Minutes = setting("after which the run in progress is cut", default=None, on_resume="free")


def check(settings):
    """(Benchmark, what is known of this node). Raises InputError as the variants' program would."""
    benchmark = Benchmark(settings, settings.output_dir)
    if not benchmark.settings.synthetic:
        for variant in benchmark.variants:
            benchmark.check(variant)
    return benchmark, node_facts()


def duration(settings, checked):
    """Of --check: how many runs, and about how long they take."""
    benchmark, facts = checked
    runs = len(benchmark.variants) * (benchmark.settings.rounds + bool(benchmark.steps[1]))
    minutes = benchmark.seconds(facts["gpus"][0]["name"] if facts["gpus"] else None) / 60
    return f", {len(benchmark.variants)} variants, {runs} runs, about {minutes:.1f} min"


@program(BenchmarkSettings, check, about=duration)
def main(settings, stage, checked):
    benchmark, facts = checked
    gpu = facts["gpus"][0] if facts["gpus"] else None
    if gpu and gpu["mig"]:
        print(f"{gpu['name']}: {NOT_OF_A_SLICE}")
        if settings.num_processes > 1:
            raise InputError("num_processes: CUDA shows a process one MIG slice, and NCCL joins none: take one process")
    stage.open()
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM)
    )  # else a program that it has started would go on
    benchmark.machine = {**hardware(), "gpus": facts["gpus"], "driver": facts["driver"]}
    benchmark.make_inputs()
    limit = benchmark.time_limit
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, limit.stop)

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
        "git": git_commit(),
        "settings": to_dict(settings),
        "parameters": next(iter(rows.values()))["parameters"],
        "variants": rows,
    }
    write_json(stage.folder / "benchmark.json", result)
    text = markdown(result)
    with atomic_file(stage.folder / "benchmark.md", "w", encoding="utf-8") as file:
        file.write(text)
    print(f"\n{text}\n{stage.folder}/benchmark.json")
    if any(row["left_out"] for row in rows.values()):
        print(f"{stage.name}: not all was measured; started again it goes on", flush=True)
        sys.exit(128 + limit.signal if limit.signal else 0)
    shutil.rmtree(stage.folder / "cache", ignore_errors=True)
    speeds = {name: (row["figures"] or {}).get("tokens_per_second", {}).get("median") for name, row in rows.items()}
    stage.finish({"tokens_per_second": speeds, "problems": {name: row["problem"] for name, row in rows.items()}})


if __name__ == "__main__":
    main()
