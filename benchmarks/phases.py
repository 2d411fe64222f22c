"""What training only the embeddings saves: its step against the step of all weights, beside the bound from floating-point operations.

    python benchmarks/phases.py
    python benchmarks/phases.py --strategies ddp fsdp2 --rounds 3

Two steps, made of what dilqur/training/loop.py makes its own of, in turn in one process, one thread of a CPU or one GPU: the embeddings
(tied to the head) alone, then all weights. The bound is training_flops_per_token of dilqur/estimate/cost_model.py, all weights / embeddings
only, for the same shape; forward and backward are to be held against it, while the optimizer's part saves in proportion to what it does not
hold.

Then, of a tiny model under each strategy on two processes (tests/support/phase_evidence.py): how many elements of gradient and of
each moment all ranks hold, and how many operations the products with weights took, which a backbone without weight gradients
determines exactly. Writes benchmarks/results/phases.json and prints Markdown tables.
"""

import json
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from dilqur.common.atomic import write_json
from dilqur.common.constants import ROOT
from dilqur.common.startup import quiet_libraries
from dilqur.estimate.cost_model import parameter_sizes, training_flops_per_token
from dilqur.pipeline.manifest import git_commit, hardware
from dilqur.pipeline.program import program
from dilqur.pipeline.settings_parser import parse, setting

sys.path.insert(0, str(ROOT / "scripts"))
import cpt

PHASES = {"embeddings only": ["*embed_tokens*"], "all weights": None}
# device: (layers, hidden, inner, heads, key-value heads, vocabulary), (max_length, samples per step)
SHAPES = {
    "cpu": ((8, 384, 1536, 6, 2, 8192), (512, 2)),
    "cuda": ((16, 2048, 8192, 32, 8, 100_352), (2048, 4)),  # Llama 3.2 1B's with a custom vocabulary
}
LLAMA_1B = (16, 2048, 8192, 32, 8, 100_352)
TINY = (3, 64, 128, 4, 2, 1280)  # the vocabulary of tests/support/matrix.py's tokenizer


@dataclass(kw_only=True)
class BenchmarkSettings:
    rounds: int = setting("steps of each kind", default=9)
    strategies: list[str] = setting(
        "whose first step is looked at", default_factory=lambda: ["ddp", "fsdp2", "zero1", "zero2", "zero3"]
    )
    threads: int = setting("of a CPU", default=1)
    output: str = setting("where the JSON goes", default=str(ROOT / "benchmarks" / "results" / "phases.json"))


@program(BenchmarkSettings)
def main(settings):
    quiet_libraries()
    evidence = dict(look_at_first_steps(settings.strategies))  # it forks: before there are threads
    import torch

    torch.set_num_threads(settings.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    result = {
        "command": " ".join(["python", *sys.argv]),
        "git": git_commit(),
        "packages": {name: metadata.version(name) for name in ("torch", "transformers", "accelerate", "deepspeed")},
        "hardware": hardware(),
        "threads": settings.threads,
        "bound_of_llama_3_2_1b_at_2048": round(bound(config_of(LLAMA_1B), 2048), 4),
        **time_steps(settings.rounds, device),
        "first_steps": evidence,
    }
    write_json(Path(settings.output), result)
    print(tables(result))


def config_of(shape):
    names = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    return {**dict(zip((*names, "vocab_size"), shape, strict=True)), "tie_word_embeddings": True}


def bound(config, length):
    return training_flops_per_token(config, length) / training_flops_per_token(config, length, embeddings_only=True)


# -- how long a step takes --------------------------------------------------------------------------------------------


def time_steps(rounds, device):
    import torch

    from dilqur.training.distributed import backward, clip_and_step, make_accelerator, prepare
    from dilqur.training.optimizer import freeze_all_but, make_optimizer

    shape, (length, samples) = SHAPES[device]
    config = config_of(shape)
    flags = ["--model_config", json.dumps(config), "--datasets", "{path: none}", "--learning_rate", "1e-4"]
    flags += ["--max_length", str(length), "--global_batch_size", str(samples)]
    settings = parse(cpt.CptSettings, "", flags)
    accelerator = make_accelerator(device == "cuda", samples, 1, settings.max_grad_norm)
    steps = {}
    for phase, patterns in PHASES.items():
        model, _ = cpt.load_model(settings)  # the same weights: drawn from the seed
        freeze_all_but(model, patterns)
        on_gpu = device == "cuda"
        steps[phase] = prepare(accelerator, model.train(), lambda m, on_gpu=on_gpu: make_optimizer(m, settings, on_gpu))

    def now():
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def step(phase, batch):
        """Seconds of forward and backward, and of clip and optimizer."""
        model, optimizer = steps[phase]
        began = now()
        with accelerator.accumulate(model):
            backward(accelerator, cpt.causal_loss(model, batch, samples * length))
        between = now()
        clip_and_step(accelerator, model, optimizer, settings.max_grad_norm)
        return between - began, now() - between

    seconds = {phase: [] for phase in PHASES}
    for number in range(rounds + 2):  # two to warm up: the moments are made in the first
        ids = torch.randint(
            config["vocab_size"], (samples, length + 1), generator=torch.Generator().manual_seed(number)
        )
        batch = {"input_ids": ids[:, :-1], "labels": ids[:, 1:].contiguous()}
        batch = {name: x.to(accelerator.device) for name, x in batch.items()}
        for phase in PHASES if number % 2 else reversed(PHASES):
            taken = step(phase, batch)
            if number > 1:
                seconds[phase].append([round(s, 4) for s in taken])
    pairs = list(zip(seconds["all weights"], seconds["embeddings only"], strict=True))
    return {
        "config": config,
        "dtype": "bfloat16 autocast" if device == "cuda" else "float32",
        "max_length": length,
        "samples_a_step": samples,
        "seconds_forward_and_backward_then_optimizer": seconds,
        "bound": round(bound(config, length), 4),
        "ratio_forward_and_backward": [round(a[0] / b[0], 4) for a, b in pairs],
        "ratio_step": [round(sum(a) / sum(b), 4) for a, b in pairs],
    }


# -- what it computes and holds ---------------------------------------------------------------------------------------


def look_at_first_steps(strategies):
    """Yield (strategy, {phase: numbers of all ranks together}) of a tiny model on two processes."""
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    import fork_launch
    from matrix import make_data

    if not strategies:
        return
    folder = Path(tempfile.mkdtemp())  # no TemporaryDirectory: a forked process would remove it, too
    try:
        model, shards = make_data(folder)
        fork_launch.import_everything()
        for strategy in strategies:
            yield strategy, {phase: first_step(folder, strategy, phase, model, shards) for phase in PHASES}
    finally:
        shutil.rmtree(folder)


def first_step(folder, strategy, phase, model, shards):
    from fork_launch import run

    evidence = folder / f"{strategy} {phase}"
    evidence.mkdir()
    flags = ["--model_name_or_path", model, "--datasets", f"{{path: {shards}}}", "--max_length", 64]
    flags += ["--global_batch_size", 8, "--per_device_train_batch_size", 2, "--max_steps", 1]
    flags += ["--learning_rate", 1e-3, "--output_dir", evidence / "run"]
    flags += ["--unfrozen_parameters", *PHASES[phase]] if PHASES[phase] else []
    program = ROOT / "tests" / "support" / "phase_evidence.py"
    run(strategy, 2, flags, evidence / "log", program=program, EVIDENCE=str(evidence))
    return together([json.loads(file.read_text()) for file in sorted(evidence.glob("rank-*.json"))])


def together(ranks):
    """Of all ranks; under ddp each rank holds all of it, and the sum is of both."""
    sizes = parameter_sizes(config_of(TINY))
    layers = sum(size for name, size in sizes.items() if "_proj" in name)
    tokens = sum(rank["tokens"] for rank in ranks)
    head = sizes["model.embed_tokens.weight"]
    return {
        "trained": ranks[0]["trained"],
        "frozen": ranks[0]["frozen"],
        "frozen_with_gradient": sorted({name for rank in ranks for name in rank["frozen_with_gradient"]}),
        "gradient_elements": [rank["gradients"] for rank in ranks],
        "elements_of_each_moment": [rank["optimizer"][0] for rank in ranks],
        "master_weight_elements": [rank["master_weights"] for rank in ranks],
        # of the operations a token that the head's three products do not take, a weight of the layers' matrices
        "flops_a_token_and_backbone_weight": (sum(rank["matrix_flops"] for rank in ranks) / tokens - 6 * head) / layers,
    }


# -- tables -----------------------------------------------------------------------------------------------------------


def tables(result):
    machine, config = result["hardware"], result["config"]
    where = ", ".join(machine["gpus"]) or f"{machine['cpu']}, {result['threads']} thread(s)"
    lines = [
        f"{where}; torch {result['packages']['torch']}; {config['num_hidden_layers']} × {config['hidden_size']}, vocabulary "
        f"{config['vocab_size']:,}, tied; {result['samples_a_step']} × {result['max_length']} tokens per step, {result['dtype']}",
        "",
        "| | forward and backward, s | clip and optimizer, s |",
        "|---|---:|---:|",
    ]
    for phase, seconds in result["seconds_forward_and_backward_then_optimizer"].items():
        cells = [f"{statistics.median(s):.3f} ({min(s):.3f} to {max(s):.3f})" for s in zip(*seconds, strict=True)]
        lines.append(f"| {phase} | {' | '.join(cells)} |")
    for name, what in (("ratio_forward_and_backward", "forward and backward"), ("ratio_step", "whole step")):
        ratios = result[name]
        lines.append(
            f"\n{what}: {statistics.median(ratios):.2f} × ({min(ratios):.2f} to {max(ratios):.2f}); bound from "
            f"floating-point operations {result['bound']:.2f} ×"
        )
    lines.append(f"\nbound of Llama 3.2 1B's shape at 2,048: {result['bound_of_llama_3_2_1b_at_2048']:.2f} ×")
    if result["first_steps"]:
        lines += [
            "",
            "| strategy | trained | weights | gradients by rank | each moment by rank | FLOPs per token and weight |",
        ]
        lines += ["|---|---|---:|---:|---:|---:|"]
    for strategy, phases in result["first_steps"].items():
        for phase, found in phases.items():
            by_rank = [" + ".join(f"{n:,}" for n in found[k]) for k in ("gradient_elements", "elements_of_each_moment")]
            flops = f"{found['flops_a_token_and_backbone_weight']:g}"
            lines.append(f"| {strategy} | {phase} | {found['trained']:,} | {' | '.join(by_rank)} | {flops} |")
            assert not found["frozen_with_gradient"], found
    return "\n".join(lines)


if __name__ == "__main__":
    main()
