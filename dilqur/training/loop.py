"""The training loop, under cpt.py: settings, set-up, loop, finish.

It knows no strategy: what DDP, FSDP2 and ZeRO do differently is asked of dilqur/training/distributed.py. A run is a function of its
recipe: the same losses on the same number of processes, to the bit, whether or not it was killed on the way.
"""

import contextlib
import functools
import math
import os
import time

from dilqur.checkpoint.mirror import CheckpointMirror
from dilqur.common.atomic import write_json
from dilqur.common.constants import IGNORE_INDEX
from dilqur.common.errors import EveryRankError
from dilqur.data.batches import split_batch, training_batches
from dilqur.kernels.choose import Machine, choose, in_words
from dilqur.pipeline.interrupt import Interrupt
from dilqur.training.evaluation import SANITY_BATCHES, Evaluation
from dilqur.training.metrics import Metrics, gpu_health
from dilqur.training.optimizer import freeze_all_but, learning_rate_at, make_optimizer
from dilqur.training.resume import checkpoint_to_resume, fetch_from_mirror, kernels_of, resume, run_identity
from dilqur.training.settings import check_training, copy_to_node
from dilqur.training.step_phases import PHASES, StepPhases
from dilqur.training.summary import summary, write_result
from dilqur.training.watchdog import Watchdog

STOPPED_MIRROR_S = 60  # for the copy of the last checkpoint, where the job is about to end


def train(settings, stage, model, compute_loss, write_model, flops_per_token=None, loss_and_correct=None, weights=None):
    """Train `model` as `settings` say, in `stage`'s folder; leave `model/` and a manifest there, or a checkpoint and REQUEUE.

    compute_loss(model, batch, tokens): the summed loss of `batch` divided by `tokens`, a 0-d tensor. write_model(reader, folder):
    write the model with the trained weights of a CheckpointReader into an empty folder, on rank 0. flops_per_token: of a step, for
    the MFU. loss_and_correct(model, batch): of an evaluation, the summed loss and how many labels were foretold, two 0-d tensors;
    None: the loss alone. weights: where those of a model on the meta device lie, as dilqur/training/initial_weights.py has them. Raises
    InputError as `check_training`, and where a checkpoint cannot be read or written.
    """
    import torch
    from accelerate.utils import send_to_device

    from dilqur.checkpoint.format import CheckpointReader, complete_checkpoints
    from dilqur.checkpoint.writer import CheckpointWriter, best_checkpoint
    from dilqur.common.startup import make_deterministic
    from dilqur.estimate.cost_model import peak_flops
    from dilqur.kernels.apply import apply_kernels
    from dilqur.training.distributed import (
        backward,
        broadcast,
        clip_and_step,
        gather_over_ranks,
        make_accelerator,
        prepare,
        settle,
        strategy,
    )
    from dilqur.training.profiling import profiler
    from dilqur.training.saving import Saving

    # -- set-up: model, optimizer, data -----------------------------------------------------------------------------------

    if settings.deterministic:
        make_deterministic()
    # before the processes know each other: none waits in a collective that times out
    copies = copy_to_node(settings)
    if os.environ.get("RANK", "0") == "0":
        stage.open()
        fetch_from_mirror(settings, stage.folder / "checkpoints")
    world = int(os.environ.get("WORLD_SIZE", 1))
    batch_size, accumulation = split_batch(settings.global_batch_size, settings.per_device_train_batch_size, world)
    accelerator = make_accelerator(
        settings.bf16 and settings.dtype == "float32",
        batch_size,
        accumulation,
        settings.max_grad_norm,
        settings.reduce_dtype,
        settings.report_to,
        stage.folder,
        settings.hang_minutes,
        fp32=settings.dtype == "float32",
    )
    main, on_gpu = accelerator.is_main_process, accelerator.device.type == "cuda"
    with accelerator.main_process_first():  # which writes the plan of packing: best_fit
        samples, start, max_steps = check_training(settings, stage.folder, copies)
    keep = {"keep": settings.save_total_limit, "keep_every": settings.save_keep_every}
    mirror = CheckpointMirror(settings.mirror_to, **keep) if settings.mirror_to and main else None
    writer = CheckpointWriter(stage.folder / "checkpoints", accelerator, **keep, mirror=mirror)
    complete = broadcast(accelerator, complete_checkpoints(writer.folder) if main else None)
    checkpoint = checkpoint_to_resume(settings, complete)
    trainable = freeze_all_but(model, settings.unfrozen_parameters)
    machine = Machine.here(settings, model.config, strategy(accelerator), batch_size)
    kernels, why = broadcast(accelerator, choose(settings, machine, kernels_of(checkpoint)))
    apply_kernels(model, settings, kernels)
    if main:
        write_json(stage.folder / "kernels.json", {"chosen": kernels, "why": why})
    model.train()
    sizes = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }
    model, optimizer = prepare(accelerator, model, lambda model: make_optimizer(model, settings, on_gpu), weights)
    plain = accelerator.unwrap_model(model)

    # -- set-up: where it stands ------------------------------------------------------------------------------------------

    interrupt = Interrupt(stage.folder, settings.max_minutes, settings.stop_at_step)
    watchdog = Watchdog(stage.folder, accelerator.process_index, settings.hang_minutes, interrupt)
    metrics = Metrics(stage.folder, max_steps, accelerator if settings.report_to else None, settings.logging_steps)
    evaluation = Evaluation(settings, accelerator, compute_loss, batch_size, loss_and_correct)
    identity = run_identity(settings, samples, start, trainable, strategy(accelerator), sizes, kernels)
    batches_of = functools.partial(
        training_batches,
        samples,
        batch=batch_size,
        accumulation=accumulation,
        rank=accelerator.process_index,
        world_size=world,
        pin_memory=on_gpu,
    )
    first_batch = send_to_device(next(batches_of(start, 1))[0], accelerator.device)
    settle(accelerator, model, lambda: compute_loss(model, first_batch, 1))
    trainer = {}
    if checkpoint:
        trainer = resume(settings, checkpoint, complete, identity, plain, optimizer)
        if mirror and checkpoint.parent == writer.folder:
            mirror.push(checkpoint)  # it may have been killed while that was copied
    step, skipped, optimizer_steps = (trainer.get(name, 0) for name in ("step", "skipped_steps", "optimizer_steps"))
    position = start + step * settings.global_batch_size
    skipped_in_a_row, given = 0, settings.resume_from_checkpoint
    begun_from = given if given != "auto" else trainer.get("resumed_from")
    peak = peak_flops(torch.cuda.get_device_name()) if on_gpu else None
    if main:
        interrupt.clear_stale()
        metrics.start(step)
        where = {
            "strategy": f"{identity['strategy']}, {world} process{'es' * (world > 1)} on {accelerator.device.type}",
            "processes": world,
            "gpu": torch.cuda.get_device_name() if on_gpu else None,
            "kernels": in_words(kernels, why, settings),
        }
        derived = (max_steps, sizes, where, batch_size, accumulation, checkpoint, flops_per_token)
        metrics.say(summary(settings, samples, start, step, *derived))
        if settings.report_to:
            metrics.start_trackers(f"{stage.folder.parent.name}/{stage.name}", step, identity["recipe"])
    interrupt.listen()
    accelerator.wait_for_everyone()  # clear_stale is over

    def stopping():
        return (interrupt.stop_reason(step) if main else interrupt.signalled) is not None

    def interrupted():
        watchdog.at(f"the evaluation of step {step}")
        return (interrupt.urgent_reason() if main else interrupt.signalled) is not None

    def save():
        """Returns the seconds that training waited."""
        watchdog.at(f"saving step {step}", patient=True)
        progress = {
            "position": position,
            "tokens": step * settings.global_batch_size * settings.max_length,
            "skipped_steps": skipped,
            "optimizer_steps": optimizer_steps,
            "resumed_from": begun_from,
            "eval_loss": broadcast(accelerator, metrics.last(step, "eval_loss")),
        }
        return saving.save(plain, optimizer, step, {**identity, **progress})

    saved = step if checkpoint and checkpoint.parent == writer.folder else 0
    saving = Saving(settings, writer, interrupt, metrics.say if main else None, saved)
    if step < max_steps and settings.eval_datasets:
        evaluation.run(model, interrupted, SANITY_BATCHES)
    missing_evaluation = False
    if step and evaluation.due(step, max_steps) and trainer.get("eval_loss") is None:
        # the run was stopped in the middle of it
        results = evaluation.run(model, interrupted)
        missing_evaluation = results is None
        if results and main:
            metrics.add(step, **results)
        saving.forget(step if results else None)  # that checkpoint does not know its evaluation

    # -- loop -------------------------------------------------------------------------------------------------------------

    stopped, stall, mirror_problem = None, 0.0, None
    stream = batches_of(position, max_steps - step, num_workers=settings.dataloader_num_workers)
    changes = {change["step"]: change["datasets"] for change in settings.dataset_changes or []}
    profile = profiler(settings, stage.folder, main)
    phases = StepPhases(on_gpu)  # optimizer: the norm, the clip and the step
    with writer, contextlib.closing(stream):  # what is being written and who reads ahead end with it, however it ends
        while step < max_steps:
            if main and step in changes:
                metrics.say(f"datasets from here on: {changes[step]}")
            watchdog.at(f"step {step + 1}, reading its batch")
            began = time.perf_counter()
            micro_batches = next(stream)
            data_wait = time.perf_counter() - began
            valid = sum(int((b["labels"] != IGNORE_INDEX).sum()) for b in micro_batches)

            # Before the first backward, over ranks and micro-batches: the gradient is that of the mean over all these tokens.
            watchdog.at(f"step {step + 1}, waiting for the other ranks")
            asked = (valid, stopping(), writer.failed, main and saving.is_overdue(step))
            tokens, stop, failed, save_now = gather_over_ranks(accelerator, *asked).sum(0).tolist()
            if failed:
                saving.hear_of_failure()
            if stop:
                stopped = broadcast(accelerator, interrupt.stop_reason(step)) or "a signal came to another rank"
                break
            if save_now and not skipped_in_a_row:
                stall += save()
                began = time.perf_counter()

            watchdog.at(f"step {step + 1}, forward and backward")
            schedule = (settings.lr_scheduler_type, settings.learning_rate, settings.warmup_steps, max_steps)
            rate = learning_rate_at(step, *schedule, settings.min_lr_ratio, settings.lr_decay_steps or 0)
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss = 0.0
            for batch in micro_batches:
                batch = send_to_device(batch, accelerator.device, non_blocking=True)
                phases.begin()
                with accelerator.accumulate(model):
                    part = compute_loss(model, batch, tokens)
                    phases.end("forward")
                    backward(accelerator, part)
                    loss += part.detach()
                phases.end("backward")
            norm = clip_and_step(accelerator, model, optimizer, settings.max_grad_norm)
            phases.end("optimizer")

            watchdog.at(f"step {step + 1}, adding up its numbers over the ranks")
            loss = float(loss)  # on a GPU this waits for all of the step, the optimizer too: only now it is over
            memory = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0
            took = (time.perf_counter() - began, data_wait, *phases.seconds())
            everyones = gather_over_ranks(accelerator, loss, *took, memory)
            slowest = everyones.max(0).values.tolist()
            step += 1
            seconds, position = slowest[1], start + step * settings.global_batch_size
            interrupt.reserve("a step", seconds)
            values = {
                "loss": everyones[:, 0].sum().item(),
                "grad_norm": norm,
                "learning_rate": rate,
                "tokens_per_second": tokens / seconds,
                "tokens_per_second_all": settings.global_batch_size * settings.max_length / seconds,
                "step_seconds": seconds,
                "step_seconds_median": everyones[:, 1].median().item(),
                "data_wait_seconds": slowest[2],
                **{f"{phase}_seconds": slowest[3 + i] for i, phase in enumerate(PHASES)},
            }
            if peak and flops_per_token:
                values["mfu"] = values["tokens_per_second_all"] * flops_per_token / (world * peak)
            if on_gpu:
                values |= {"peak_memory_gb": slowest[-1], **(gpu_health() if main and step % 10 == 0 else {})}
            if stall:
                values["checkpoint_stall_seconds"], stall = stall, 0.0

            skipped_in_a_row = 0 if math.isfinite(norm) else skipped_in_a_row + 1
            optimizer_steps += not skipped_in_a_row
            if skipped_in_a_row:
                skipped += 1
                if main:
                    metrics.say(
                        f"warning: step {step} skipped on all ranks: loss {values['loss']}, gradient norm {norm}; its samples are "
                        f"the {settings.global_batch_size} from position {position - settings.global_batch_size} on"
                    )
            if skipped:
                values["skipped_steps"] = skipped
            if evaluation.due(step, max_steps):
                results = evaluation.run(model, interrupted)
                missing_evaluation = results is None
                values |= results or {}
                metrics.pauses["evaluation"] = (evaluation.seconds, settings.eval_steps or max_steps)
            if main:
                metrics.log(step, **values)
            if mirror and mirror.problem != mirror_problem:
                mirror_problem = mirror.problem
                metrics.say(f"warning: mirror_to {settings.mirror_to}: {mirror_problem or 'works again'}")
            if skipped_in_a_row >= settings.max_skipped_steps:
                writer.wait()
                standing = complete_checkpoints(writer.folder)
                first = position - skipped_in_a_row * settings.global_batch_size
                raise EveryRankError(
                    f"{stage.folder}: {skipped_in_a_row} steps in a row had no finite loss or gradient: the samples of positions "
                    f"{first} to {position - 1}; nothing of them was saved, the last checkpoint is "
                    f"{standing[-1].name if standing else 'none'}. Look at the data there, or lower learning_rate"
                )
            if step % settings.save_steps == 0 and not skipped_in_a_row:
                stall = save()
                metrics.pauses["checkpoint"] = (stall, settings.save_steps)
            profile.step()

    # -- finish -----------------------------------------------------------------------------------------------------------

    profile.stop()
    if missing_evaluation and not stopped:  # the last one was cut short
        stopped = broadcast(accelerator, interrupt.urgent_reason()) or "a signal came to another rank"
    save()
    watchdog.at("waiting for the last checkpoint", patient=True)
    writer.wait()
    watchdog.stop()
    accelerator.wait_for_everyone()  # from here on rank 0's folder is complete for everyone
    if main:
        metrics.close()
        if stopped:
            interrupt.request_requeue()
            print(
                f"{stage.name}: stopped after step {step} of {max_steps} ({stopped}); the same command goes on from there",
                flush=True,
            )
        else:
            best = best_checkpoint(writer.folder) if settings.load_best_model_at_end else None
            reader = CheckpointReader(best or complete_checkpoints(writer.folder)[-1])
            write_result(settings, stage, samples, start, step, reader, write_model, world, identity, skipped)
        # all that matters here is done; a stopped run pushes it again when it goes on
        if mirror and not mirror.wait(STOPPED_MIRROR_S if stopped else None):
            print(f"warning: mirror_to {settings.mirror_to}: {mirror.problem or 'not all is copied yet'}", flush=True)
    accelerator.wait_for_everyone()
    if settings.report_to:
        accelerator.end_training()  # which leaves the process group
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
