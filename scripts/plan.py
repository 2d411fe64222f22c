"""Says before a job is submitted what a training stage will take: memory of a GPU, hours, network; and what is fastest.

    python scripts/plan.py recipes/quickstart --gpu A10G
    python scripts/plan.py recipes/llama3.2-1b-az
    python scripts/plan.py --config recipes/llama3.2-1b-az/cpt-2-full.yaml --gpu A100-40GB H100-80GB --nodes 1 2 --price_per_gpu_hour 2 4
    python scripts/plan.py recipes/llama3.1-8b-az/cpt-2-full.yaml --strategy fsdp2 hsdp zero3 --json

A folder: every stage that trains; a recipe: its stage and the variants of it. Each on the GPUs of its batch file unless flags say others,
under all strategies of accelerate_configs/, > before the one that slurm/lib/launch.sh would take. Neither model nor data need be there.
From first principles and data sheets, but for one figure of each kind of GPU, the share of its peak that a published run reached;
--efficiency gives your own. How it is counted, and how near it comes: docs/results/planner.md.
"""

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from pydantic import Field

from dilqur.common.constants import Positive
from dilqur.common.errors import InputError
from dilqur.estimate.hardware import GPUS, gpu_of
from dilqur.estimate.set_up import Site, fastest, set_up
from dilqur.estimate.strategy import names, strategy_of
from dilqur.pipeline.program import program
from dilqur.pipeline.settings_parser import setting
from dilqur.preflight.recipe_stages import training_stages

SHORT_S = 0.02  # a step starts some thousand kernels, at some 5 µs each
Above0 = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@dataclass(kw_only=True)
class PlanSettings:
    recipe: str = setting("folder with a pipeline.txt, or a recipe in one (also as --config)")
    run_dir: str | None = setting("run folder; runs/NAME for recipes/NAME", default=None)
    gpu: list[str] | None = setting(f"{', '.join(GPUS)}; the batch file's", default=None)
    nodes: list[Positive] | None = setting("numbers of nodes; the batch file's", default=None)
    gpus_per_node: Positive | None = setting("the batch file's, or 1", default=None)
    strategy: list[str] | None = setting("accelerate configs, by name or path; all", default=None)
    model_config: dict | None = setting(
        "keys of a config.json, of a model that is not there and not known", default=None
    )
    global_batch_size: Positive | None = setting("instead of the recipe's", default=None)
    efficiency: Annotated[float, Field(gt=0, le=1)] | None = setting(
        "model operations / the GPU's peak: the mfu of a run of yours", default=None
    )
    intra_node_gb_s: Above0 | None = setting("GB/s of a GPU to the others of its node; NVLink's", default=None)
    inter_node_gb_s: Above0 | None = setting("GB/s of a node's network; AWS's of such nodes", default=None)
    disk_gb_s: Above0 = setting("GB/s a job can write", default=1.0)
    price_per_gpu_hour: list[Above0] | None = setting("in any currency; one, or one for each --gpu", default=None)
    json: bool = setting("one JSON object on standard output", default=False)
    check: bool = setting("check the arguments, print nothing else", default=False)


def machines(settings, stage):
    """[(GPU, nodes, GPUs of each, price or None)] that the stage is to be planned for."""
    kinds = [gpu_of(name) for name in settings.gpu] if settings.gpu else [stage.gpu]
    if kinds == [None]:
        raise InputError(f"slurm/{stage.batch_file.path.name} names no GPU that is known here: give --gpu")
    prices = settings.price_per_gpu_hour or [None]
    if len(prices) not in (1, len(kinds)):
        raise InputError(f"--price_per_gpu_hour: {len(prices)} for {len(kinds)} kinds of GPU: give one, or one each")
    measured = {
        "efficiency": settings.efficiency,
        "link": settings.intra_node_gb_s and settings.intra_node_gb_s * 1e9,
        "network": settings.inter_node_gb_s and settings.inter_node_gb_s * 1e9,
    }
    measured = {key: value for key, value in measured.items() if value}
    if settings.efficiency:
        measured["published"] = "given"
    gpus = settings.gpus_per_node or stage.batch_file.gpus or 1
    return [
        (replace(kind, **measured), nodes, gpus, prices[-1 if len(prices) == 1 else number])
        for number, kind in enumerate(kinds)
        for nodes in settings.nodes or [stage.batch_file.nodes]
    ]


def plan(settings, stage):
    """The SetUps of a stage, machine by machine: [(those of all strategies, the one that would be launched, the fastest)]."""
    job = stage.job.but(global_batch=settings.global_batch_size or stage.job.global_batch)
    out = []
    for gpu, nodes, gpus, price in machines(settings, stage):
        site = Site(settings.disk_gb_s * 1e9, price)
        wanted = dict.fromkeys(settings.strategy or names())
        strategies = {strategy.name: strategy for strategy in (strategy_of(name, nodes, gpus) for name in wanted)}
        rows = {name: set_up(job, gpu, strategy, site) for name, strategy in strategies.items()}
        launched = Path(os.environ.get("DILQUR_ACCELERATE_CONFIG") or stage.default_strategy).stem
        chosen = rows.get("single") or rows.get(launched) or next(iter(rows.values()))
        out.append((list(rows.values()), chosen, fastest(chosen, strategies.values())))
    return out


# -- tables -----------------------------------------------------------------------------------------------------------

COLUMNS = (
    "strategy", "state", "other", "each", "largest", "batch", "GB of GPU", "step s", "bound by", "sent GB", "hours",
)  # fmt: skip
LEGEND = """\
state      GB per GPU holds of weights, gradients and AdamW's moments; other: gathered, copied; each: of activations for a sequence
largest    sequences a GPU can take at once; batch: that it would, × micro-batches of a step; GB of GPU: so used, allowances included
sent GB    by a GPU in a step"""


def row(found, mark):
    """The cells of a SetUp."""
    cells = [f"{mark} {found.strategy.name}"]
    if found.memory is None:
        return [*cells, *[""] * (len(COLUMNS) - 1), found.misfit]
    memory, time, batch = found.memory, found.time, found.batch
    cells += [number(memory.state / 1e9 if not found.strategy.offload else 0.0)]
    cells += [number((sum(memory.terms.values()) - memory.state) / 1e9), number(memory.each_sample / 1e9)]
    cells += [str(found.largest_batch), f"{batch} × {found.accumulation}", number(memory.total(batch) / 1e9)]
    cells += [number(time.step), time.bound_by, number(time.sent / 1e9)]
    return [*cells, number(found.hours), "does not fit" if found.misfit else ""]


def number(value):
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def table(rows):
    cells = [["  strategy", *COLUMNS[1:], ""], *rows]
    wide = [max(len(line[column]) for line in cells) for column in range(len(COLUMNS))]
    for line in cells:
        fields = [f"{cell:>{width}}" for cell, width in zip(line[1:-1], wide[1:], strict=True)]
        print("  ".join([f"{line[0]:<{wide[0]}}", *fields, line[-1]]).rstrip())


def details(found):
    """Print the memory of a SetUp term by term, what it costs, and its saves."""
    if found.memory is None:
        return None
    job, memory, activations = found.job, found.memory, found.activations
    tokens, layers = found.batch * job.max_length, job.config["num_hidden_layers"]

    def gigabytes(sizes):
        return ", ".join(f"{name.replace('_', ' ')} {size / 1e9:.3g}" for name, size in sizes.items())

    terms = {**memory.terms, "activations": found.batch * memory.each_sample}
    parts = {part: tokens * size for part, size in activations.layer.items()}
    again = round(job.recomputed * layers)
    how = f"{layers} layers, each"
    if again:
        how = f"{again} layers' inputs, and {layers - again or 'one'} layer{'s, each' * (again < layers)}"
    print(f"memory     {found.strategy.name}, GB: {gigabytes(terms)}")
    print(
        f"           in the activations {how}: {gigabytes(parts)}; the loss {tokens * activations.loss_peak / 1e9:.3g}"
    )
    host = found.host_memory
    print(f"           main memory of a node {sum(host.values()) / 1e9:.3g}: {gigabytes(host)}")
    if found.hours:
        price = f", {number(found.cost)} at the price given" if found.cost else ""
        print(
            f"cost       {number(found.gpu_hours)} GPU hours, {number(found.kwh)} kWh at the boards' power limit{price}"
        )
    size = f"{number(found.checkpoint_bytes / 1e9)} GB"
    if found.save_seconds is None:
        return print(
            f"checkpoint none: a run that is killed starts again; at the end the adapter, {size}, and the merged model"
        )
    stall, write, best = found.save_seconds
    print(
        f"checkpoint {size}, written in {number(write)} s, training waits {number(stall)} s: best saved every "
        f"{max(1, round(best / found.time.step)):,} steps; the recipe says {job.save_steps:,}"
    )


def suggestion(found, fast):
    """A line on the fastest SetUp that fits, as flags."""
    if fast is None:
        return "fastest    none fits: take more GPUs or larger ones"
    changes = [f"DILQUR_ACCELERATE_CONFIG=accelerate_configs/{fast.strategy.name}.yaml"] * (
        fast.strategy.name not in ("single", found.strategy.name)
    )
    if fast.batch > found.job.ceiling or fast.batch < found.batch:
        changes.append(f"per_device_train_batch_size: {fast.batch}")
    if fast.job.recomputed != found.job.recomputed:
        changes.append(f"gradient_checkpointing: {str(bool(fast.job.recomputed)).lower()}")
    what = ", ".join(changes) if changes else "as it is"
    return f"fastest    {what}: {number(fast.time.step)} s a step, {number(fast.memory.total(fast.batch) / 1e9)} GB"


def show(stage, planned):
    job = planned[0][1].job
    what = "all of them" if job.trained == job.total else f"{job.trained:,} of them"
    missing = "no conversations yet" if job.lora else "no shards yet"
    steps = f"{job.steps:,} steps" if job.steps else f"steps unknown ({missing})"
    epoch = f"an epoch is {stage.epoch:,} {stage.unit}" if stage.epoch else missing
    print(
        f"\n{stage.name}: {job.total:,} parameters, {what} trained; {steps} of {job.global_batch:,} × {job.max_length:,} tokens; {epoch}"
    )
    for rows, chosen, fast in planned:
        gpu, strategy = chosen.gpu, chosen.strategy
        print(
            f"\n{strategy.nodes} × {strategy.gpus_per_node} {gpu.name}, {gpu.memory / 1e9:.1f} GB each; "
            f"{100 * gpu.efficiency:.1f} % of {gpu.peak / 1e12:,.0f} TFLOP/s ({gpu.published})\n"
        )
        table([row(found, ">" if found is chosen else " ") for found in rows])
        print()
        details(chosen)
        print(suggestion(chosen, fast))
        if chosen.time and chosen.time.step < SHORT_S:
            print(
                "note       a step this short is spent on starting kernels, which is not counted: it will take longer"
            )


def check(settings):
    """([(TrainingStage, its plan)], {stage: why it is not planned}). Raises InputError."""
    stages, left = training_stages(settings.recipe, settings.run_dir, settings.model_config)
    if not stages:
        why = "; ".join(f"{name}: {reason}" for name, reason in left.items()) or "no stage of it trains a model"
        raise InputError(f"{settings.recipe}: {why}")
    return [(stage, plan(settings, stage)) for stage in stages], left


@program(PlanSettings, check, positional="recipe", config_is_positional=True)
def main(settings, checked):
    planned, left = checked
    if settings.json:
        out = [
            {
                "stage": stage.name,
                "parameters": stage.job.total,
                "trained": stage.job.trained,
                "steps": stage.job.steps,
                "tokens_a_step": rows[0][1].job.tokens,
                f"{stage.unit}_an_epoch": stage.epoch,
                "set_ups": [found.to_dict() for machine, _, _ in rows for found in machine],
                "launched": [chosen.to_dict() for _, chosen, _ in rows],
                "fastest": [fast and fast.to_dict() for _, _, fast in rows],
            }
            for stage, rows in planned
        ]
        return print(json.dumps({"recipe": settings.recipe, "stages": out, "not_planned": left}, ensure_ascii=False))
    print(LEGEND)
    for stage, rows in planned:
        show(stage, rows)
    for name, reason in left.items():
        print(f"\n{name}: not planned: {reason}")


if __name__ == "__main__":
    main()
