"""Memory of the host that each rank takes to load a model, beside the bound: its shard in fp32, two layers and 1 GB.

    python benchmarks/loading_memory.py                           a 1B with random weights on 4 ranks, under FSDP2 and ZeRO-3
    python benchmarks/loading_memory.py --layers 2 --processes 2

The model folder, fp32 safetensors in the shape of Llama 3.2 1B with 100,352 tokens, is made for it (5 GB in --folder). A rank is a process
of `accelerate launch`, which loads as scripts/cpt.py does and tells its VmHWM, libraries and all, before and after. On a CPU what a GPU
would hold lies in the same memory: the shard, which the bound allows, and ZeRO-3's bfloat16 copy and two buffers for gradients, which are
shown and taken off. Writes benchmarks/results/loading_memory.json.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

from dilqur.common.constants import ROOT

SHAPE = {
    "vocab_size": 100_352,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "head_dim": 64,
}
SHAPE |= {"num_key_value_heads": 8, "tie_word_embeddings": True, "bos_token_id": 300, "eos_token_id": 301}
STRATEGIES = ("fsdp2", "zero3")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--folder", type=Path, help="for the model; a temporary one if left out")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "loading_memory.json")
    parser.add_argument("--rank", choices=STRATEGIES, help=argparse.SUPPRESS)  # one of the processes
    arguments = parser.parse_args()
    if arguments.rank:
        return load(arguments.folder)
    from dilqur.pipeline.manifest import git_commit, hardware

    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        sizes, rows = make_model(Path(folder), arguments.layers), []
        for strategy in STRATEGIES:
            bound = 4 * sizes["parameters"] / arguments.processes + 2 * 4 * sizes["layer"] + 1e9
            for rank, (before, after, copies) in enumerate(launch(strategy, folder, arguments.processes)):
                held = {"before": before, "after": after, "a_gpus": copies, "host": after - copies, "bound": bound}
                rows.append({"strategy": strategy, "rank": rank, **held})
                words = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in held.items())
                print(f"{strategy}, rank {rank}, GB: {words}", flush=True)
    about = {"git": git_commit(), "hardware": hardware(), "torch": metadata.version("torch")}
    command = " ".join(["python", *sys.argv])
    arguments.output.write_text(json.dumps({"command": command, **about, **sizes, "ranks": rows}, indent=1) + "\n")
    return None


def make_model(folder, layers):
    """{"parameters", "layer": of one} of the model folder made, tensor by tensor."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from dilqur.models.safetensors_io import write_shards

    config = LlamaConfig(**SHAPE, num_hidden_layers=layers, architectures=["LlamaForCausalLM"])
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in LlamaForCausalLM(config).named_parameters()}
    config.save_pretrained(folder)
    write_shards(folder, {n: (torch.float32, s, lambda s=s: torch.randn(s) * 0.02) for n, s in shapes.items()})
    layer = sum(s.numel() for name, s in shapes.items() if ".layers.0." in name)
    return {"parameters": sum(s.numel() for s in shapes.values()), "layer": layer}


def launch(strategy, folder, processes):
    """[(bytes before, bytes after, bytes of copies and gradients) of each rank]."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1", "--main_process_port", "0"]
    launcher += ["--num_processes", str(processes), "--config_file", f"accelerate_configs/{strategy}.yaml", __file__]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [*launcher, "--rank", strategy, "--folder", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[:6000])
    return [json.loads((Path(folder) / f"rank-{rank}.json").read_text()) for rank in range(processes)]


def load(folder):
    """One rank: what scripts/cpt.py does before its first step."""
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    from dilqur.checkpoint.local_shards import zero_optimizer
    from dilqur.training.distributed import make_accelerator, prepare
    from dilqur.training.initial_weights import empty_model

    before = peak()
    model, weights = empty_model(folder, torch.float32)
    accelerator = make_accelerator(bf16=True, batch=1, accumulation=1, max_grad_norm=1.0)
    _, optimizer = prepare(accelerator, model, lambda model: torch.optim.AdamW(model.parameters()), weights)
    after, copies = peak(), []
    if zero := zero_optimizer(optimizer):
        copies = [zero.grad_partitions_flat_buffer, *zero.fp16_partitioned_groups_flat]
        copies += zero.fp32_partitioned_groups_flat  # of whose size there is a buffer of gradients, for a moment
    held = [before, after, sum(tensor.nbytes for tensor in copies)]
    (folder / f"rank-{accelerator.process_index}.json").write_text(json.dumps(held))


def peak():
    """Bytes that this process has held at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


if __name__ == "__main__":
    main()
