"""Everything that happens before the first step: processes, data, model, optimizer, and where an earlier start left off."""

import functools
import gc
import os

import torch
from accelerate.utils import send_to_device

from dilqur.checkpoint.mirror import CheckpointMirror
from dilqur.checkpoint.steps import complete_checkpoints
from dilqur.checkpoint.writer import CheckpointWriter
from dilqur.common.atomic import write_json
from dilqur.common.startup import make_deterministic
from dilqur.data.batches import split_batch, training_batches
from dilqur.estimate.cost_model import peak_flops
from dilqur.kernels.apply import apply_kernels
from dilqur.kernels.choose import Machine, choose, in_words
from dilqur.pipeline.interrupt import Interrupt
from dilqur.training.checks import check_training
from dilqur.training.distributed import broadcast, make_accelerator, prepare, strategy, warm_up_ddp_buckets
from dilqur.training.evaluation import Evaluation
from dilqur.training.metrics import Metrics
from dilqur.training.optimizer import freeze_all_but, make_optimizer
from dilqur.training.profiling import StepPhases, profiler
from dilqur.training.resume import checkpoint_to_resume, fetch_from_mirror, kernels_of, resume, run_identity
from dilqur.training.run import Progress, Run
from dilqur.training.saving import Saving
from dilqur.training.stream import copy_to_node
from dilqur.training.summary import summary
from dilqur.training.watchdog import Watchdog


def set_up(settings, stage, task):
    """The Run of `task`, at its first step or at that of the checkpoint that it goes on from. A collective; raises as `train`."""
    if settings.deterministic:
        make_deterministic()
    copies = before_the_processes_meet(settings, stage)
    world = int(os.environ.get("WORLD_SIZE", 1))
    division = split_batch(settings.global_batch_size, settings.per_device_train_batch_size, world)
    fp32 = settings.dtype == "float32"
    accelerator = make_accelerator(
        settings.bf16 and fp32, *division, settings.max_grad_norm, settings.reduce_dtype, settings.report_to, stage.folder,
        settings.hang_minutes, fp32=fp32,
    )  # fmt: skip
    with accelerator.main_process_first():  # which writes the plan of packing: best_fit
        samples, start, max_steps = check_training(settings, stage.folder, copies)

    writer = make_writer(settings, stage, accelerator)
    complete = broadcast(accelerator, complete_checkpoints(writer.folder) if accelerator.is_main_process else None)
    checkpoint = checkpoint_to_resume(settings, complete)
    trainable = freeze_all_but(task.model, settings.unfrozen_parameters)
    kernels, why = choose_kernels(settings, stage, task.model, accelerator, division[0], checkpoint)
    sizes = sizes_of(task.model)
    on_gpu = accelerator.device.type == "cuda"
    model, optimizer = prepare(
        accelerator, task.model, lambda model: make_optimizer(model, settings, on_gpu), task.weights
    )

    interrupt = Interrupt(stage.folder, settings.max_minutes, settings.stop_at_step)
    watchdog = Watchdog(stage.folder, accelerator.process_index, settings.hang_minutes, interrupt)
    metrics = Metrics(stage.folder, max_steps, accelerator if settings.report_to else None, settings.logging_steps)
    evaluation = Evaluation(settings, accelerator, task.compute_loss, division[0], task.loss_and_correct)
    identity = run_identity(settings, samples, start, trainable, strategy(accelerator), sizes, kernels)
    batches_from = functools.partial(
        training_batches, samples, batch=division[0], accumulation=division[1], rank=accelerator.process_index,
        world_size=world, pin_memory=on_gpu,
    )  # fmt: skip

    first_batch = send_to_device(next(batches_from(start, 1))[0], accelerator.device)
    warm_up_ddp_buckets(accelerator, model, lambda: task.compute_loss(model, first_batch, 1))
    trainer = {}  # of the checkpoint
    if checkpoint:
        trainer = resume(settings, checkpoint, complete, identity, accelerator.unwrap_model(model), optimizer)
        if writer.mirror and checkpoint.parent == writer.folder:
            writer.mirror.push(checkpoint)  # the run before may have been killed while it was copied
    counters = [trainer.get(name, 0) for name in ("step", "skipped_steps", "optimizer_steps")]
    progress = Progress(start, settings.global_batch_size, settings.max_length, *counters)
    given = settings.resume_from_checkpoint
    saved = progress.step if checkpoint and checkpoint.parent == writer.folder else 0
    run = Run(
        settings=settings, stage=stage, task=task, accelerator=accelerator, model=model, optimizer=optimizer, samples=samples,
        batches=batches_from(progress.position, max_steps - progress.step, num_workers=settings.dataloader_num_workers),
        max_steps=max_steps, progress=progress, identity=identity,
        resumed_from=given if given != "auto" else trainer.get("resumed_from"),
        metrics=metrics, evaluation=evaluation, interrupt=interrupt, watchdog=watchdog, writer=writer,
        saving=Saving(settings, writer, interrupt, metrics.say if accelerator.is_main_process else None, saved),
        mirror=writer.mirror, phases=StepPhases(on_gpu),
        profile=profiler(settings, stage.folder, accelerator.is_main_process),
        peak_flops=peak_flops(torch.cuda.get_device_name()) if on_gpu else None,
        dataset_changes={change["step"]: change["datasets"] for change in settings.dataset_changes or []},
    )  # fmt: skip
    due = progress.step and evaluation.due(progress.step, max_steps)
    run.evaluation_missing = bool(due) and trainer.get("eval_loss") is None
    if run.main:
        begin_to_report(run, division, in_words(kernels, why, settings), checkpoint)
    interrupt.listen()
    accelerator.wait_for_everyone()  # rank 0 has removed the markers of an earlier run
    gc.collect()
    gc.freeze()  # what is there now stays: collections during the run need not look at it
    return run


def before_the_processes_meet(settings, stage):
    """What may take longer than a collective waits: copying shards to the node, and a checkpoint from the mirror. Returns {real path: copy}
    of the shards."""
    copies = copy_to_node(settings)
    if os.environ.get("RANK", "0") == "0":
        stage.open()
        fetch_from_mirror(settings, stage.folder / "checkpoints")
    return copies


def make_writer(settings, stage, accelerator):
    """The CheckpointWriter of this rank, on rank 0 with the mirror."""
    keep = {"keep": settings.save_total_limit, "keep_every": settings.save_keep_every}
    mirror = settings.mirror_to and accelerator.is_main_process and CheckpointMirror(settings.mirror_to, **keep)
    return CheckpointWriter(stage.folder / "checkpoints", accelerator, **keep, mirror=mirror or None)


def choose_kernels(settings, stage, model, accelerator, batch_size, checkpoint):
    """({key: value} of the kernels, {key: why}), the same on all ranks, and applied to `model`."""
    machine = Machine.here(settings, model.config, strategy(accelerator), batch_size)
    kernels, why = broadcast(accelerator, choose(settings, machine, kernels_of(checkpoint)))
    apply_kernels(model, settings, kernels)
    if accelerator.is_main_process:
        write_json(stage.folder / "kernels.json", {"chosen": kernels, "why": why})
    model.train()
    return kernels, why


def sizes_of(model):
    """{"parameters", "trainable"}: elements."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return {"parameters": sum(n for n, _ in sizes), "trainable": sum(n for n, learns in sizes if learns)}


def begin_to_report(run, division, kernels, checkpoint):
    """Rank 0: clear what an earlier start left, open metrics.jsonl and trackers, print the summary."""
    run.interrupt.clear_stale()
    run.metrics.start(run.progress.step)
    run.metrics.say(summary(run, division, kernels, checkpoint))
    if run.settings.report_to:
        name = f"{run.stage.folder.parent.name}/{run.stage.name}"
        run.metrics.start_trackers(name, run.progress.step, run.identity["recipe"])
