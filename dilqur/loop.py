"""The training loop, under cpt.py: settings, set-up, loop, finish.

It knows no strategy: what DDP, FSDP2 and ZeRO do differently is asked of dilqur/distributed.py. A run is a function of its
recipe: the same losses on the same number of processes, to the bit, whether or not it was killed on the way.
"""

import json
import math
import os
import time
from pathlib import Path

from dilqur.atomic import atomic_folder
from dilqur.batches import IGNORE, evaluation_batches, same_past, split_batch, training_batches
from dilqur.errors import InputError
from dilqur.interrupt import Interrupt
from dilqur.metrics import Metrics
from dilqur.optimizer import freeze_all_but, learning_rate_at, make_optimizer
from dilqur.recipe import to_dict
from dilqur.training_settings import check_training, copy_to_node, held_out_samples


def train(settings, stage, model, compute_loss, write_model):
    """Train `model` as `settings` say, in `stage`'s folder; leave `model/` and a manifest there, or a checkpoint and REQUEUE.

    compute_loss(model, batch, tokens): the summed loss of `batch` divided by `tokens`, a 0-d tensor. write_model(trained, folder):
    write the model with the trained weights {name: fp32 tensor} into an empty folder, on rank 0. Raises InputError as `check_training`.
    """
    import torch
    from accelerate.utils import send_to_device

    from dilqur.checkpoint import CheckpointWriter, load_checkpoint
    from dilqur.checkpoint_files import CheckpointReader, complete_checkpoints
    from dilqur.distributed import backward_scale, gradient_norm, make_accelerator, prepare, strategy, sum_over_ranks

    # set-up
    copies = copy_to_node(
        settings
    )  # before the processes know each other: none waits in a collective that could time out
    world = int(os.environ.get("WORLD_SIZE", 1))
    batch_size, accumulation = split_batch(settings.global_batch_size, settings.per_device_train_batch_size, world)
    accelerator = make_accelerator(
        settings.bf16, batch_size, accumulation, settings.max_grad_norm, settings.report_to, stage.folder
    )
    main = accelerator.is_main_process
    if main:
        stage.open()
    with accelerator.main_process_first():  # which writes the plan of packing: best_fit
        samples, start, max_steps = check_training(settings, stage.folder, copies)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trainable = freeze_all_but(model, settings.unfrozen_parameters)
    optimizer = make_optimizer(
        model,
        settings.learning_rate,
        (settings.adam_beta1, settings.adam_beta2),
        settings.adam_epsilon,
        settings.weight_decay,
        fused=torch.cuda.is_available(),
    )
    model.train()
    sizes = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }
    model, optimizer = prepare(accelerator, model, optimizer)
    plain = accelerator.unwrap_model(model)

    interrupt = Interrupt(stage.folder, settings.max_minutes, settings.stop_at_step)
    metrics = Metrics(stage.folder, max_steps, accelerator if settings.report_to else None, settings.logging_steps)
    writer = CheckpointWriter(stage.folder / "checkpoints", accelerator, keep=settings.save_total_limit)
    identity = {
        "recipe": to_dict(settings),
        "seed": settings.seed,
        "data": {"fingerprint": samples.fingerprint(), "start_position": start, "mixtures": samples.mixtures},
        "trainable": trainable,
        "strategy": strategy(accelerator),
        "sizes": sizes,
    }
    step = 0
    if checkpoint := _checkpoint_to_resume(settings, complete_checkpoints(writer.folder)):
        reader = CheckpointReader(checkpoint)
        _refuse_other_run(settings, reader, identity)
        load_checkpoint(reader, plain, optimizer)
        step = reader.trainer["step"]
    if main:
        interrupt.clear_stale()
        metrics.start(step)
        where = f"{strategy(accelerator)}, {world} process{'es' * (world > 1)} on {accelerator.device.type}"
        metrics.say(
            _summary(settings, samples, start, step, max_steps, sizes, where, batch_size, accumulation, checkpoint)
        )
    if settings.report_to:
        accelerator.init_trackers(
            "dilqur", config={k: v for k, v in identity["recipe"].items() if isinstance(v, str | int | float)}
        )
    accelerator.wait_for_everyone()  # clear_stale is over

    def save(after):
        samples_seen = after * settings.global_batch_size
        progress = {"position": start + samples_seen, "tokens": samples_seen * settings.max_length}
        writer.save(plain, optimizer, after, {**identity, **progress})

    def evaluate():
        """Mean loss a token of the held-out samples, over all ranks."""
        model.eval()
        total = count = 0.0
        with torch.no_grad():
            for dataset in settings.eval_datasets:
                held_out = held_out_samples(settings, dataset)
                for batch in evaluation_batches(
                    held_out, batch_size, accelerator.process_index, world, settings.eval_samples
                ):
                    batch = send_to_device(batch, accelerator.device)
                    total += compute_loss(model, batch, 1).item()
                    count += (batch["labels"] != IGNORE).sum().item()
        model.train()
        total, count = sum_over_ranks(accelerator, total, count)
        return total / count

    # loop
    saved_at = step if checkpoint and checkpoint.parent == writer.folder else 0
    scale, stopped, clock = backward_scale(accelerator), None, time.perf_counter()
    stream = training_batches(
        samples,
        start + step * settings.global_batch_size,
        max_steps - step,
        batch_size,
        accumulation,
        accelerator.process_index,
        world,
        settings.dataloader_num_workers,
        pin_memory=torch.cuda.is_available(),
    )
    changes = {change["step"]: change["datasets"] for change in settings.dataset_changes or []}
    while step < max_steps:
        if main and step in changes:
            metrics.say(f"datasets from here on: {changes[step]}")
        reason = interrupt.stop_reason(step) if main else None
        asked = time.perf_counter()
        micro_batches = next(stream)
        data_wait = time.perf_counter() - asked
        valid = sum(int((b["labels"] != IGNORE).sum()) for b in micro_batches)
        # before the first backward, over ranks and micro-batches: the gradient is that of the mean over all these tokens
        tokens, stop = sum_over_ranks(accelerator, valid, reason is not None)
        if stop:
            stopped = reason or "rank 0 said so"
            break
        rate = learning_rate_at(
            step,
            settings.lr_scheduler_type,
            settings.learning_rate,
            settings.warmup_steps,
            max_steps,
            settings.min_lr_ratio,
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = 0.0
        for batch in micro_batches:
            batch = send_to_device(batch, accelerator.device, non_blocking=True)
            with accelerator.accumulate(model):
                part = compute_loss(model, batch, tokens)
                accelerator.backward(part * scale)
                loss += part.detach()
                if accelerator.sync_gradients:
                    norm = gradient_norm(accelerator, model, settings.max_grad_norm)
                    (loss,) = sum_over_ranks(accelerator, loss)
                    if not (math.isfinite(loss) and math.isfinite(norm)):
                        raise InputError(
                            f"{stage.folder}: loss {loss}, gradient norm {norm} at step {step + 1}: nothing of it was saved; "
                            f"the last checkpoint is of step {saved_at}. Lower learning_rate, or look at the data"
                        )
                optimizer.step()
                optimizer.zero_grad()
        step += 1
        seconds, clock = time.perf_counter() - clock, time.perf_counter()
        values = {
            "loss": loss,
            "grad_norm": norm,
            "learning_rate": rate,
            "tokens_per_second": tokens / seconds,
            "step_seconds": seconds,
            "data_wait_seconds": data_wait,
        }
        if torch.cuda.is_available():
            values["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 2**30
        if settings.eval_datasets and (step == max_steps or (settings.eval_steps and step % settings.eval_steps == 0)):
            values["eval_loss"] = evaluate()
            clock = time.perf_counter()
        if main:
            metrics.log(step, **values)
        if step % settings.save_steps == 0:
            save(step)
            saved_at, clock = step, time.perf_counter()

    # finish
    if step > saved_at:
        save(step)
    writer.wait()
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
            _write_result(
                settings,
                stage,
                samples,
                start,
                step,
                CheckpointReader(complete_checkpoints(writer.folder)[-1]),
                write_model,
                world,
                identity,
            )
    if settings.report_to:
        accelerator.end_training()
    accelerator.wait_for_everyone()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _write_result(settings, stage, samples, start, steps, reader, write_model, world, identity):
    """Rank 0: model/ from the last checkpoint, then the manifest."""
    with atomic_folder(stage.folder / "model") as folder:
        write_model(reader.weights(), folder)
    records = [json.loads(line) for line in (stage.folder / "metrics.jsonl").read_text().splitlines()]
    tokens, end = steps * settings.global_batch_size * settings.max_length, start + steps * settings.global_batch_size
    steady = sorted(r["tokens_per_second"] for r in records[min(2, len(records) - 1) :])
    result = {
        "steps": steps,
        "tokens": tokens,
        "utf8_bytes_seen": samples.utf8_bytes(start, end),
        "loss": records[-1]["loss"],
        "eval_loss": records[-1].get("eval_loss"),
        "tokens_per_second": steady[len(steady) // 2],
        "strategy": identity["strategy"],
        "processes": world,
        **identity["sizes"],
        "data": {**identity["data"], "end_position": end, "epochs": samples.epochs(end)},
    }
    stage.finish(result)
    print(
        f"{stage.name}: {steps} steps, loss {result['loss']:.4f}, {result['tokens_per_second']:,.0f} tokens/s; {stage.folder}/model",
        flush=True,
    )


def _checkpoint_to_resume(settings, complete):
    if settings.resume_from_checkpoint == "auto":
        return complete[-1] if complete else None
    return None if settings.resume_from_checkpoint == "none" else Path(settings.resume_from_checkpoint)


def _refuse_other_run(settings, reader, identity):
    """A checkpoint belongs to its recipe: only `may_change` may differ. Raises InputError with the first key that does."""
    then, now = reader.trainer, identity
    for key, value in now["recipe"].items():
        if key in then["recipe"] and then["recipe"][key] != value and key not in settings.may_change:
            raise InputError(
                f"{reader.folder}: made with {key} = {then['recipe'][key]!r}, now {value!r}: that is another run; "
                "choose another --output_dir, or put it back"
            )
    done = [[c for c in run["recipe"].get("dataset_changes") or [] if c["step"] < then["step"]] for run in (then, now)]
    if done[0] != done[1]:
        raise InputError(
            f"{reader.folder}: dataset_changes of steps before its {then['step']} are done and cannot change any more: "
            "put them back (later ones may change)"
        )
    data, was = now["data"], then["data"]
    same = same_past(was["fingerprint"], data["fingerprint"], then["position"])
    if was["start_position"] != data["start_position"] or not same:
        raise InputError(
            f"{reader.folder}: made on other data: datasets, weights or shards have changed: choose another --output_dir, or "
            "put them back"
        )
    if then["trainable"] != now["trainable"]:
        raise InputError(f"{reader.folder}: trained other parameters than this run would")


def _summary(settings, samples, start, step, max_steps, sizes, where, batch_size, accumulation, checkpoint):
    """What was derived from the recipe, as a table: the first thing a log shows."""
    batch, tokens = settings.global_batch_size, settings.global_batch_size * settings.max_length
    end = start + max_steps * batch
    text = samples.utf8_bytes(start, end)
    rows = [
        ("strategy", where),
        ("parameters", f"{sizes['parameters']:,}, of them trained {sizes['trainable']:,}"),
        (
            "batch",
            f"{batch} sequences, {tokens:,} tokens a step: {batch_size} a device, {accumulation} times accumulated",
        ),
        ("steps", f"{step} to {max_steps}"),
        ("data", f"{text / 1e6:,.2f} MB of text seen at the end, from position {start}"),
    ]
    for (path, epochs), size in zip(samples.epochs(end).items(), samples.sizes, strict=True):
        rows.append(("", f"{epochs:.2f} epochs of {size:,} samples at the end: {path}"))
    for mixture in samples.mixtures[1:]:
        if mixture["position"] >= start:
            paths = ", ".join(str(d["path"]) for d in mixture["datasets"])
            rows.append(("", f"from step {(mixture['position'] - start) // batch}: {paths}"))
    if settings.packing == "best_fit":
        padding, cut = samples.packing_shares()
        rows.append(("packing", f"best_fit: {padding:.3%} padding, {cut:.2%} of the documents longer than a sample"))
    rows.append(("resumed", str(checkpoint or "no")))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)
