"""What a benchmark measured, as benchmark.json has it: medians, utilisation, comparisons."""

from dilqur.benchmarking.figures import loss_parity, over_rounds, utilisation
from dilqur.benchmarking.variants import same_training
from dilqur.estimate.cost_model import UnknownArchitecture, peak_flops
from dilqur.estimate.job import Job
from dilqur.models.config import is_encoder, new_model_config, read_config
from dilqur.pipeline.settings_parser import to_dict


def flops_of(settings, kind):
    """({"half": a token's floating-point operations, a causal mask saving half of the attention, "whole": with all of it, as PaLM
    counts}, parameters); ({}, None) of a model whose sizes are not known. An encoder's attention is whole in both. kind: of the
    program."""
    new = settings.model_config
    config = new_model_config(kind, new) if new else read_config(settings.model_name_or_path)
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
    whole = machine["gpus"] and not machine["gpus"][0]["mig"]
    peak = peak_flops(machine["gpus"][0]["name"]) if whole else None
    first = benchmark.variants[0].name
    out = {}
    for variant in benchmark.variants:
        row, resolved = rows[variant.name], benchmark.resolve(variant)
        figures, keys = over_rounds(row["rounds"]), to_dict(resolved)
        flops, size = flops_of(resolved, benchmark.kind)
        used = (
            utilisation(figures["tokens_per_second"]["median"], flops, settings.num_processes, peak)
            if figures
            else None
        )
        parity, note = None, None
        if variant.name != first and settings.parity_steps and row["losses"] and rows[first]["losses"]:
            same = same_training(benchmark.program.settings, benchmark.values[first], benchmark.values[variant.name])
            parity = loss_parity(rows[first]["losses"], row["losses"], settings.parity_steps) if same else None
            note = None if parity else "a loss is missing" if same else "another training"
        out[variant.name] = {
            "settings": keys, "kernels": row["kernels"], "strategy": variant.strategy,
            "trainer": variant.trainer, "left_out": row["left_out"], "problem": row["problem"] or row["losses_problem"],
            "batch": keys["per_device_train_batch_size"], "flops_per_token": flops, "parameters": size, "figures": figures,
            "utilisation": used, "rounds": row["rounds"], "parity": parity, "parity_note": note,
            "losses": [r["loss"] for r in row["losses"] or []], "evidence": row["evidence"], "largest_batch": row["largest_batch"],
        }  # fmt: skip
    return out
