"""What it costs, or saves, to keep the documents of a sample apart: tokens/s of forward and backward, at 2,048 and at 131,072 tokens.

    python benchmarks/document_attention.py
    python benchmarks/document_attention.py --shards runs/NAME/pack/web

Rows: documents that see each other (sdpa); within documents (intra_document_masking, dilqur/kernels/varlen_attention.py, with the making
of its arguments); and at 2,048 what transformers' sdpa makes of the same position_ids, a dense mask. All take the same batches, a
round runs each once, in an order that turns; a row's figure is the median of its rounds, with the lowest and the highest. On a
CPU that others use too, tokens a second of its own CPU time say more: all threads together, and waiting ones sleep.

Documents are as long as those of --shards, or drawn from a log-normal distribution with a median of 400 and a mean of 822 tokens, of
which 91 % are shorter than 2,048. Models are Llamas with random weights: on a GPU of the width of Llama 3.2 1B, under autocast to
bfloat16; on a CPU narrow and in fp32, so that attention to all of 131,072 tokens is done in a minute. Their vocabulary is of 256
tokens: the head costs little. Writes benchmarks/document_attention.json and prints a Markdown table.
"""

import os
import statistics
import sys
import time
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import numpy as np

from dilqur.common.atomic import write_json
from dilqur.common.errors import InputError
from dilqur.common.startup import quiet_libraries
from dilqur.data.batches import TokenSamples
from dilqur.data.varlen import document_kwargs
from dilqur.kernels.varlen_attention import attention_for, register_document_attention
from dilqur.pipeline.inputs import ShardsPath
from dilqur.pipeline.manifest import git_commit, hardware
from dilqur.pipeline.program import program

MEDIAN, SPREAD, WORDS = 400, 1.2, 256
APART, TOGETHER, DENSE = "within documents", "documents see each other", "within documents, dense mask"
SHAPES = {  # device, max_length: (samples, layers, hidden, inner, heads, key-value heads)
    ("cpu", 2048): (4, 2, 256, 512, 4, 2),
    ("cpu", 131_072): (1, 1, 32, 64, 2, 1),
    ("cuda", 2048): (8, 16, 2048, 8192, 32, 8),
    ("cuda", 131_072): (1, 2, 2048, 8192, 32, 8),
}


@dataclass(kw_only=True)
class BenchmarkSettings:
    shards: ShardsPath | None = field(
        default=None, metadata={"help": "token shards whose documents' lengths are taken"}
    )
    max_lengths: list[int] = field(default_factory=lambda: [2048, 131_072], metadata={"help": "2048, 131072 or both"})
    rounds: int = field(default=5, metadata={"help": "times each row is run"})
    threads: int = field(default=2, metadata={"help": "of a CPU"})
    output: str = field(default=str(Path(__file__).with_suffix(".json")), metadata={"help": "where the JSON goes"})


@program(BenchmarkSettings)
def main(settings):
    if unknown := [length for length in settings.max_lengths if ("cpu", length) not in SHAPES]:
        raise InputError(f"max_lengths: there is no model for {unknown[0]}: take 2048, 131072 or both")
    quiet_libraries()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch starts its threads
    import torch

    torch.set_num_threads(settings.threads)
    register_document_attention()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    result = {
        "command": " ".join(["python", *sys.argv]),
        "git": git_commit(),
        "packages": {name: metadata.version(name) for name in ("torch", "transformers")},
        "hardware": hardware(),
        "threads": settings.threads,
        "documents": settings.shards or f"log-normal, median {MEDIAN}, spread of the logarithm {SPREAD}",
        "max_lengths": {str(length): measure(settings, device, length) for length in settings.max_lengths},
    }
    write_json(Path(settings.output), result)
    print(table(result))


def measure(settings, device, length):
    """What was run at one max_length, and {row: tokens/s of each round}, by the clock and by the CPU time of the process."""
    samples, layers, hidden, inner, heads, key_heads = SHAPES[device, length]
    batches = [batch_positions(settings.shards, samples, length, number) for number in range(settings.rounds + 1)]
    config = {"num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": inner, "vocab_size": WORDS}
    config |= {"num_attention_heads": heads, "num_key_value_heads": key_heads, "max_position_embeddings": length}
    implementations = {TOGETHER: "sdpa", APART: attention_for("sdpa", True), DENSE: "sdpa"}
    if length > 2048:
        del implementations[DENSE]  # at 131,072 the mask alone is of 17 GB, and more on its way
    rows, cpu_rows = ({row: [] for row in implementations} for _ in range(2))
    model = make_model(config, device)
    if device == "cpu":  # to warm up on; a GPU's memory wants to have seen the whole size once
        batches[0] = batches[0][:, :2048]
    for number, position_ids in enumerate(batches):
        order = list(rows)[number % len(rows) :] + list(rows)[: number % len(rows)]
        for row in order:
            model.set_attn_implementation(implementations[row])
            seconds, cpu_seconds = step(model, device, row, position_ids)
            print(f"max_length {length}, round {number}: {row}: {seconds:.2f} s", flush=True)
            if number:  # the first round warms up
                rows[row].append(round(position_ids.size / seconds, 1))
                cpu_rows[row].append(round(position_ids.size / cpu_seconds, 1))
    lengths = np.concatenate([np.diff([*np.flatnonzero(ids.reshape(-1) == 0), ids.size]) for ids in batches[1:]])
    # of the pairs of tokens in a sample, those that lie in one document: so much of the attention is left
    share = np.square(lengths.astype(float)).sum() / (settings.rounds * samples * float(length) ** 2)
    about = {"samples": samples, "config": config, "dtype": "bfloat16 autocast" if device == "cuda" else "float32"}
    documents = {"count": len(lengths), "mean_length": round(float(lengths.mean()), 1), "longest": int(lengths.max())}
    about |= {"documents": documents, "pairs_within_documents": round(float(share), 4)}
    return {**about, "tokens_per_second": rows, "tokens_per_cpu_second": cpu_rows}


def make_model(config, device):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**config)).to(device).train()


def step(model, device, row, position_ids):
    """Seconds by the clock, and of CPU time, of a forward and a backward of a batch in the CPU's memory, arguments included."""
    import torch

    words = torch.from_numpy(position_ids % WORDS)
    model.zero_grad()
    wait(device)
    started, cpu_started = time.perf_counter(), time.process_time()
    batch = {"input_ids": words, "labels": words, "use_cache": False}
    if row == APART:
        batch |= document_kwargs(position_ids)
    elif row == DENSE:
        batch["position_ids"] = torch.from_numpy(position_ids)
    batch = {name: x.to(device, non_blocking=True) if isinstance(x, torch.Tensor) else x for name, x in batch.items()}
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        loss = model(**batch).loss
    loss.backward()
    wait(device)
    return time.perf_counter() - started, time.process_time() - cpu_started


def wait(device):
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def batch_positions(shards, samples, length, number):
    """int64 array of shape (samples, length): position_ids of batch `number`."""
    if shards:
        stream = TokenSamples([{"path": shards}], length, seed=0, document_boundaries=True)
        return stream.batch(np.arange(number * samples, (number + 1) * samples))["position_ids"]
    draw, rows = np.random.default_rng([number, length]), []
    for _ in range(samples):
        ends = np.cumsum(np.maximum(draw.lognormal(np.log(MEDIAN), SPREAD, length // 50), 1).astype(int))
        begins = np.concatenate([[0], ends[ends < length]])
        rows.append(np.arange(length) - begins[np.searchsorted(begins, np.arange(length), "right") - 1])
    return np.array(rows)


def table(result):
    machine = result["hardware"]
    where = ", ".join(machine["gpus"]) or f"{machine['cpu']}, {result['threads']} threads"
    packages = ", ".join(f"{name} {version}" for name, version in result["packages"].items())
    lines = [f"{where}; {packages}; documents: {result['documents']}", ""]
    lines += [
        "| max_length | layers × width | pairs within documents | attention | tokens/s, median (range) | × | tokens/CPU-s | × |"
    ]
    lines += ["|---:|---|---:|---|---:|---:|---:|---:|"]
    for length, found in result["max_lengths"].items():
        config, clocks = found["config"], (found["tokens_per_second"], found["tokens_per_cpu_second"])
        model = f"{config['num_hidden_layers']} × {config['hidden_size']}, {found['dtype']}"
        for row in clocks[0]:
            cells = [f"{int(length):,}", model, f"{found['pairs_within_documents']:.1%}", row]
            for clock in clocks:
                middle, together = statistics.median(clock[row]), statistics.median(clock[TOGETHER])
                cells += [
                    f"{middle:,.0f} ({min(clock[row]):,.0f} to {max(clock[row]):,.0f})",
                    f"{middle / together:.2f}",
                ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
