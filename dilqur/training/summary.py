"""What a run says of itself: the table at its start, with all that was derived from the recipe, and its result at the end."""

import json

from dilqur.common.atomic import atomic_folder
from dilqur.training.bottleneck import in_one_line, what_bounds

USUAL_MFU = 0.4  # of a well-fed GPU; only for a first guess of the hours


def summary(run, division, kernels, checkpoint):
    """The table as text. run: dilqur.training.run.Run. division: (sequences of a micro-batch, micro-batches of a step). kernels: [(name,
    value)]. checkpoint: the folder that it goes on from, or None."""
    settings, samples, max_steps, (start, step) = (
        run.settings,
        run.samples,
        run.max_steps,
        (run.progress.start, run.progress.step),
    )
    (batch_size, accumulation), sizes, flops = division, run.identity["sizes"], run.task.flops_per_token
    batch, tokens, world = settings.global_batch_size, run.progress.tokens_per_step, run.accelerator.num_processes
    end = start + max_steps * batch
    text = samples.utf8_bytes(start, end)
    processes = f"{world} process{'es' * (world > 1)} on {run.accelerator.device.type}"
    rows = [
        ("strategy", f"{run.identity['strategy']}, {processes}"),
        ("parameters", f"{sizes['parameters']:,}, of them trained {sizes['trainable']:,}, {settings.dtype}"),
        ("batch", f"{batch} sequences, {tokens:,} tokens per step"),
        (
            "",
            f"{batch_size * settings.max_length:,} tokens per micro-batch: {batch_size} a device, "
            f"{accumulation} times accumulated",
        ),
        ("steps", f"{step} to {max_steps}"),
        ("data", f"{text / 1e6:,.2f} MB of text seen at the end, from position {start}"),
    ]
    rows[1:1] = kernels
    for (path, epochs), size in zip(samples.epochs(end).items(), samples.sizes, strict=True):
        steps = f", {size / batch:,.1f} steps each" if len(samples.sizes) == 1 else ""
        rows.append(("", f"{epochs:.2f} epochs of {size:,} samples at the end{steps}: {path}"))
    for mixture in samples.mixtures[1:]:
        if mixture["position"] >= start:
            paths = ", ".join(str(d["path"]) for d in mixture["datasets"])
            rows.append(("", f"from step {(mixture['position'] - start) // batch}: {paths}"))
    if settings.packing == "best_fit":
        padding, cut = samples.packing_shares()
        rows.append(("packing", f"best_fit: {padding:.3%} padding, {cut:.2%} of the documents longer than a sample"))
    if flops and run.peak_flops:
        seconds = (max_steps - step) * tokens * flops / (world * run.peak_flops * USUAL_MFU)
        rows.append(("time", f"about {seconds / 3600:,.1f} hours, if {USUAL_MFU:.0%} of the GPU's peak is reached"))
    rows.append(("resumed", str(checkpoint or "no")))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def write_result(run, reader):
    """Rank 0: model/ from the checkpoint that `reader` has open, then the manifest."""
    stage, samples, identity, steps, world = (
        run.stage,
        run.samples,
        run.identity,
        run.progress.step,
        run.accelerator.num_processes,
    )
    with atomic_folder(stage.folder / "model") as folder:
        run.task.write_model(reader, folder)
    records = [json.loads(line) for line in (stage.folder / "metrics.jsonl").read_text().splitlines()]
    tokens, end = steps * run.progress.tokens_per_step, run.progress.position
    rate = "tokens_per_second_all" if samples.masking else "tokens_per_second"  # of masked ones a fifth bears a loss
    steady = sorted(r[rate] for r in records[min(2, len(records) - 1) :] if rate in r)
    last = records[-1] if records else {}  # none where a finished run came to a new machine without its metrics
    profile = stage.folder / "profile" / "operations.json"
    bound = what_bounds(records, world, json.loads(profile.read_text()) if profile.exists() else None)
    result = {
        "steps": steps,
        "tokens": tokens,
        "utf8_bytes_seen": samples.utf8_bytes(run.progress.start, end),
        "loss": last.get("loss"),
        "eval_loss": last.get("eval_loss"),
        "eval_bits_per_byte": last.get("eval_bits_per_byte"),
        **({"eval_accuracy": last["eval_accuracy"]} if "eval_accuracy" in last else {}),
        "tokens_per_second": steady[len(steady) // 2] if steady else None,
        "bounded_by": bound,
        "skipped_steps": run.progress.skipped,
        "model_of_step": reader.trainer["step"],
        "strategy": identity["strategy"],
        "processes": world,
        "kernels": identity["kernels"],
        **identity["sizes"],
        "data": {**identity["data"], "end_position": end, "epochs": samples.epochs(end)},
    }
    stage.finish(result)
    loss = "loss not known" if result["loss"] is None else f"loss {result['loss']:.4f}"
    if bound:
        print(f"{stage.name}: {in_one_line(bound)}", flush=True)
    print(
        f"{stage.name}: {steps} steps, {loss}, {result['tokens_per_second'] or 0:,.0f} tokens/s; {stage.folder}/model",
        flush=True,
    )
