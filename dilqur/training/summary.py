"""What a run says of itself: the table at its start, with all that was derived from the recipe, and its result at the end."""

import json

from dilqur.common.atomic import atomic_folder
from dilqur.estimate.cost_model import peak_flops
from dilqur.training.bottleneck import in_one_line, what_bounds

USUAL_MFU = 0.4  # of a well-fed GPU; only for a first guess of the hours


def summary(settings, samples, start, step, max_steps, sizes, where, batch_size, accumulation, resumed, flops):
    """The table as text. where: strategy, processes, device, kernels. flops: a token's, or None. resumed: a folder, or None."""
    batch, tokens = settings.global_batch_size, settings.global_batch_size * settings.max_length
    end = start + max_steps * batch
    text = samples.utf8_bytes(start, end)
    rows = [
        ("strategy", where["strategy"]),
        ("parameters", f"{sizes['parameters']:,}, of them trained {sizes['trainable']:,}, {settings.dtype}"),
        ("batch", f"{batch} sequences, {tokens:,} tokens a step"),
        (
            "",
            f"{batch_size * settings.max_length:,} tokens a micro-batch: {batch_size} a device, "
            f"{accumulation} times accumulated",
        ),
        ("steps", f"{step} to {max_steps}"),
        ("data", f"{text / 1e6:,.2f} MB of text seen at the end, from position {start}"),
    ]
    rows[1:1] = where["kernels"]
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
    if flops and (peak := peak_flops(where["gpu"])):
        seconds = (max_steps - step) * tokens * flops / (where["processes"] * peak * USUAL_MFU)
        rows.append(
            ("time", f"about {seconds / 3600:,.1f} hours, if {USUAL_MFU:.0%} of {where['gpu']}'s peak is reached")
        )
    rows.append(("resumed", str(resumed or "no")))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def write_result(settings, stage, samples, start, steps, reader, write_model, world, identity, skipped):
    """Rank 0: model/ from the checkpoint `reader` has open, then the manifest."""
    with atomic_folder(stage.folder / "model") as folder:
        write_model(reader, folder)
    records = [json.loads(line) for line in (stage.folder / "metrics.jsonl").read_text().splitlines()]
    tokens, end = steps * settings.global_batch_size * settings.max_length, start + steps * settings.global_batch_size
    rate = "tokens_per_second_all" if samples.masking else "tokens_per_second"  # of masked ones a fifth bears a loss
    steady = sorted(r[rate] for r in records[min(2, len(records) - 1) :] if rate in r)
    last = records[-1] if records else {}  # none where a finished run came to a new machine without its metrics
    profile = stage.folder / "profile" / "operations.json"
    bound = what_bounds(records, world, json.loads(profile.read_text()) if profile.exists() else None)
    result = {
        "steps": steps,
        "tokens": tokens,
        "utf8_bytes_seen": samples.utf8_bytes(start, end),
        "loss": last.get("loss"),
        "eval_loss": last.get("eval_loss"),
        "eval_bits_per_byte": last.get("eval_bits_per_byte"),
        **({"eval_accuracy": last["eval_accuracy"]} if "eval_accuracy" in last else {}),
        "tokens_per_second": steady[len(steady) // 2] if steady else None,
        "bounded_by": bound,
        "skipped_steps": skipped,
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
