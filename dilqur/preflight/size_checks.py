"""Checks of what a stage will take: space and files on the disk, memory of a GPU, time. Estimates from the model's config.

Each takes (planned, known) and returns what it saw, None where it does not concern the program.
"""

import contextlib
import os
import shutil
import statistics

from dilqur.common.errors import InputError
from dilqur.estimate.cost_model import UnknownArchitecture
from dilqur.estimate.host_memory import host_memory
from dilqur.estimate.job import BYTES, Job
from dilqur.estimate.memory import memory_of
from dilqur.estimate.strategy import strategy_of
from dilqur.pipeline.records import last_records
from dilqur.preflight.batch_file import clock
from dilqur.preflight.findings import Later, Skipped
from dilqur.preflight.planned import existing, parameters
from dilqur.training.settings import TrainingSettings

FEW_FILES = (
    20  # of a stage that trains nothing, and beside a run's checkpoints: config, tokenizer, weights, logs, manifest
)


def check_space(planned, known):
    """Room for the checkpoints and the model, and for those of the stages above."""
    if not planned.config:
        return None
    settings, folder, (trained, total) = planned.settings, planned.stage.folder, parameters(planned)
    number = BYTES[getattr(settings, "dtype", "float32")]
    need, what = number * total, f"a model of about {total:,} parameters"
    if kept := checkpoints_kept(settings):
        need += 3 * number * trained * (kept + 1)  # weight and two moments; the new one stands before the oldest goes
        what = f"about {total:,} parameters, {trained:,} of them trained, {kept} checkpoints"
    there, free = sum(sizes_in(folder)), shutil.disk_usage(existing(folder)).free
    claimed = claim(known, folder, "bytes", need - there)
    text = f"{gb(need)} for {what}; {gb(free)} free"
    if claimed > free:
        more = f"and {gb(claimed)} wanted with the stages above"
        raise InputError(f"{text}, {more}: free some, or lower save_total_limit")
    return text


def check_files(planned, known):
    """The file system lets so many more files be made: many have a limit of their own to that, their inodes."""
    folder, kept = planned.stage.folder, checkpoints_kept(planned.settings)
    need = FEW_FILES + (kept + 1) * (2 * planned.processes + 3) if kept else FEW_FILES  # dilqur/checkpoint/format.py
    statistic = os.statvfs(existing(folder))
    claimed = claim(known, folder, "files", need - len(sizes_in(folder)))
    if not statistic.f_files:
        return None  # this one makes inodes as it needs them
    if claimed > statistic.f_favail:
        raise InputError(
            f"{existing(folder)}: {statistic.f_favail:,} more files can be made there, and about {claimed:,} are wanted with the "
            "stages above, however much space is free: remove some (df -i), or choose another --run_dir"
        )
    return f"about {need:,} files, {statistic.f_favail:,} can be made" if kept else None


def check_memory(planned, known):
    """A GPU holds its share of weights, gradients and AdamW's moments, and the activations of a micro-batch."""
    card, whose = card_of(planned, known)
    settings = planned.settings
    if not card or not planned.config or getattr(settings, "bf16", None) is None:
        return None
    _, total = parameters(planned)
    adapter = planned.program.kind == "sft"
    if not isinstance(settings, TrainingSettings) and not adapter:
        need, what = (2 if settings.bf16 else 4) * total, f"a model of about {total:,} parameters"
        if need > card:
            raise InputError(f"{gb(need)} a GPU for {what}; {whose} {gb(card)}: take a larger GPU, or bf16: true")
        return f"{gb(need)} a GPU for {what}, and what it computes; {whose} {gb(card)}"
    try:
        memory, shards, batch = memory_in(planned)
    except UnknownArchitecture as problem:
        raise Skipped(str(problem)) from None
    state, need = memory.state, memory.allocated(batch)
    text = f"{gb(state)} a GPU for weights, gradients and moments" + (f" sharded over {shards}" if shards > 1 else "")
    text += f", about {gb(need - state)} for what is gathered and the activations of {batch} × {settings.max_length:,} tokens"
    text += f"; {whose} {gb(card)}"
    if state > card:
        more = "a larger GPU, or bf16: true" if adapter else "more GPUs under fsdp2, or freeze more"
        raise InputError(f"{text}: take {more}")
    if need > card:
        fit = max(0, int((card - memory.allocated(0)) // memory.each_sample))
        lower = f"per_device_train_batch_size: {fit}" if fit else "a smaller max_length"
        kernels = "" if adapter else ", kernels: auto"
        raise InputError(f"{text}: take {lower}{kernels} or gradient_checkpointing: true")
    return text


def check_main_memory(planned, known):
    """A node holds the processes, the model while it is loaded, and the copy of the state that a checkpoint is written from."""
    if not planned.config or not isinstance(planned.settings, TrainingSettings):
        return None
    try:
        job, strategy = job_in(planned)
        terms = host_memory(job, strategy)
    except UnknownArchitecture as problem:
        raise Skipped(str(problem)) from None
    need = sum(terms.values())
    text = f"{gb(need)} of main memory a node: " + ", ".join(f"{gb(size)} {what}" for what, size in terms.items())
    here = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if known.gpus and not known.on_a_cluster and need > here:
        raise InputError(f"{text}; this one has {gb(here)}: take more nodes with fewer GPUs each, or fsdp2")
    return text


def check_time(planned, known):
    """The job's time against the steps between two checkpoints and the length of a step, where an earlier start has made some."""
    settings, batch_file = planned.settings, planned.batch_file
    if not isinstance(settings, TrainingSettings) or not batch_file.seconds or batch_file.warning is None:
        return None
    step, save = seconds_of_steps(planned.stage.folder)
    every = f"a checkpoint every {settings.save_steps:,} steps"
    if settings.save_minutes:
        every += f" and {settings.save_minutes:g} minutes"
    if step is None:
        raise Later(f"{every}: how long that is will be known when steps have been made")
    if step + save > batch_file.warning:
        raise InputError(
            f"a step takes {step:.0f} s and a save {save:.0f} s, and the warning comes {batch_file.warning} s before the end: too "
            f"late to save in; #SBATCH --signal=B:USR1@{int(2 * (step + save))} in slurm/{batch_file.path.name}"
        )
    between = min(step * settings.save_steps, 60 * (settings.save_minutes or float("inf")))
    work = batch_file.seconds - batch_file.warning
    text = f"{every}, that is every {clock(between)} at {step:.3g} s a step; the job has {clock(work)}"
    if between > work:
        fit = max(1, int(work / 4 / step))
        raise InputError(f"{text}: a crash would lose all that it did: save_steps: {fit}, or save_minutes: 30")
    return text


# -- sizes and numbers ------------------------------------------------------------------------------------------------


def checkpoints_kept(settings):
    """How many checkpoints stand at the end of a run; 0 of a stage that makes none."""
    if not isinstance(settings, TrainingSettings):
        return 0
    steps = settings.max_steps or 0
    kept = settings.save_total_limit or max(1, steps // settings.save_steps)
    return kept + (steps // settings.save_keep_every if settings.save_keep_every else 0)


def sizes_in(folder):
    """Bytes of each file that is in `folder` already."""
    sizes = []
    for file in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # a running stage tidies up
            sizes.append(file.stat().st_size)
    return sizes


def claim(known, folder, what, more):
    """Note that a stage takes so many `more` bytes or files; all that were claimed on this file system so far."""
    key = (existing(folder).stat().st_dev, what)
    known.claimed[key] = known.claimed.get(key, 0) + max(0, more)
    return known.claimed[key]


def card_of(planned, known):
    """(bytes of memory of the smallest GPU the stage will run on, a clause that says who says so); (None, None) if unknown."""
    here, meant = known.gpus, planned.batch_file.card
    if meant and (known.on_a_cluster or not here):
        return meant, f"slurm/{planned.batch_file.path.name} is for GPUs of"
    return (min(gpu["bytes"] for gpu in here), "the smallest here has") if here else (None, None)


def memory_in(planned):
    """(Memory of a GPU, GPUs among which weights and optimizer are divided, sequences of a micro-batch)."""
    job, strategy = job_in(planned)
    batch, accumulation = job.split(planned.processes)
    return memory_of(job, strategy, accumulation), strategy.shards, batch


def job_in(planned):
    """(Job, Strategy) of a stage as it would be launched."""
    settings, file = planned.settings, planned.batch_file
    nodes = file.nodes if file.nodes * file.gpus == planned.processes else 1
    strategy = strategy_of(planned.strategy_file() or "ddp", nodes, planned.processes // nodes)
    return (Job.of_adapter if planned.program.kind == "sft" else Job.of)(settings, planned.config), strategy


def seconds_of_steps(folder):
    """(median seconds of the last hundred steps, longest stall of a save) of an earlier start; (None, None) if there are none."""
    records = last_records(folder, 100)
    seconds = [record["step_seconds"] for record in records if record.get("step_seconds")]
    stalls = [record.get("checkpoint_stall_seconds") or 0.0 for record in records]
    return (statistics.median(seconds), max(stalls)) if seconds else (None, None)


def gb(size):
    return f"{size / 1e9:,.1f} GB" if size > 1e8 else f"{size / 1e6:,.1f} MB"
