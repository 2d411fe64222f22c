"""An 8B in shape: what each of 16 ranks holds of Llama 3.1 8B under FSDP2, and a 4-layer cut of it really trained on a CPU.

    python benchmarks/eight_billion.py
    python benchmarks/eight_billion.py --train --folder /tmp/eight                 22 GB of memory and 16 GB of disk, for some minutes
    python benchmarks/eight_billion.py --train --folder /tmp/eight --map_buffer    where there is less memory: 10 GB more of disk

The sizes are not calculated but looked at: the model of recipes/llama3.1-8b-az (vocabulary 100,352, untied) on the meta device, sharded
by accelerate as accelerate_configs/fsdp2.yaml has it, in a process group of 16 of which 15 are not there; what a checkpoint holds is
what dilqur/checkpoint/local_shards.py gives CheckpointWriter to write.

--train makes bfloat16 weights of the same model with fewer layers, in full width, and runs scripts/cpt.py on it on two processes under
accelerate_configs/fsdp2_offload.yaml with `dtype: bfloat16`: three steps, a checkpoint, and in new processes a fourth step from it. State
and checkpoint's buffer both lie in main memory then, 6 bytes a parameter each; --map_buffer puts the buffer into a mapped file, which
the kernel writes out where memory is short. Writes benchmarks/eight_billion.json, each half its own part of it; prints Markdown tables.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from importlib import metadata
from pathlib import Path

from dilqur.common.constants import ROOT
from dilqur.estimate.cost_model import parameter_sizes

RANKS = 16
# Llama 3.1 8B's config.json, but for the vocabulary of recipes/llama3.1-8b-az
LLAMA = {"num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14_336, "vocab_size": 100_352}
LLAMA |= {"num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131_072, "rms_norm_eps": 1e-5}
LLAMA |= {"tie_word_embeddings": False, "bos_token_id": 100_000, "eos_token_id": 100_001, "pad_token_id": 100_004}
ROPE = {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA |= {"rope_parameters": {**ROPE, "original_max_position_embeddings": 8192}}
LENGTH, BATCH, STEPS = 32, 2, 3


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", action="store_true", help="train the cut instead")
    parser.add_argument("--layers", type=int, default=4, help="of the cut")
    parser.add_argument("--map_buffer", action="store_true", help="the checkpoint's copy of the state in a mapped file")
    parser.add_argument("--folder", type=Path, help="for its files; removed at the end")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--run", choices=["make", "first", "resumed"], help=argparse.SUPPRESS)  # a part, as a process
    arguments = parser.parse_args()
    if arguments.run == "make":
        return make_model(arguments.folder, arguments.layers)
    if arguments.run:
        return start(arguments.folder, arguments.run, arguments.map_buffer)
    from dilqur.pipeline.manifest import git_commit, hardware

    result = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    about = {
        "command": " ".join(["python", *sys.argv]),
        "git": git_commit(),
        "packages": {name: metadata.version(name) for name in ("torch", "transformers", "accelerate")},
        "hardware": hardware(),
    }
    if arguments.train:
        arguments.folder = arguments.folder or Path(tempfile.mkdtemp())
        try:
            result["trained"] = {**about, **train(arguments.folder, arguments.layers, arguments.map_buffer)}
        finally:
            shutil.rmtree(arguments.folder, ignore_errors=True)
        print(trained_table(result["trained"]))
    else:
        result["sharded"] = {**about, **sizes()}
        print(sharded_table(result["sharded"]))
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    return None


# -- sizes ------------------------------------------------------------------------------------------------------------


def sizes():
    """What the first and the last of RANKS ranks hold, in fp32 and in bfloat16 alone."""
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    from fork_launch import workers_environment

    os.environ.update(workers_environment("fsdp2", RANKS), LOCAL_RANK="0")
    out = {"config": LLAMA, "ranks": RANKS, "parameters": sum(parameter_sizes(LLAMA).values())}
    for dtype in ("float32", "bfloat16"):
        first, last = (rank_of(rank, dtype) for rank in (0, RANKS - 1))
        assert first == last, "rows divide by the ranks"
        out[dtype] = first
    return out


def rank_of(rank, dtype):
    """{what: (elements, bytes)} of one rank, and bytes of its checkpoint file."""
    import torch
    import torch.distributed as dist
    from accelerate.state import AcceleratorState
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from transformers import LlamaConfig, LlamaForCausalLM

    from dilqur.checkpoint.format import pieces_of
    from dilqur.checkpoint.local_shards import MOMENTS, owned_slices
    from dilqur.training.bf16_adamw import BF16AdamW
    from dilqur.training.distributed import make_accelerator

    os.environ.update(RANK=str(rank), WORLD_SIZE=str(RANKS))
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=RANKS)
    accelerator = make_accelerator(dtype == "float32", 1, 1, 1.0, fp32=dtype == "float32")
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**LLAMA)).to(getattr(torch, dtype))
    # accelerate's own wrapping, without its `prepare`, which tells parameters apart by their addresses: here all are 0
    model = fsdp2_prepare_model(accelerator, model)
    adamw = BF16AdamW if dtype == "bfloat16" else torch.optim.AdamW
    optimizer = adamw(model.named_parameters())
    held = {"weights": [0, 0], "moments": [0, 0]}
    pieces, widest = [], 0
    for name, _, start, state in owned_slices(model, optimizer):
        for kind, view in state.items():
            count = held["moments" if kind in MOMENTS else "weights"]
            count[0], count[1] = count[0] + view.numel(), count[1] + view.nbytes
            pieces += pieces_of(kind, name, start, view.numel(), view.dtype)
    for module in model.modules():  # units of FSDP2: what is gathered at once
        if hasattr(module, "_get_fsdp_state") and (group := module._get_fsdp_state()._fsdp_param_group):
            widest = max(widest, sum(p._orig_size.numel() for p in group.fsdp_params))
    dist.destroy_process_group()
    AcceleratorState._reset_state(reset_partial_state=True)
    held = {"weights": held["weights"], "gradients": list(held["weights"]), "moments": held["moments"]}
    return {
        **held,
        "whole": [held["weights"][0], sum(size for _, size in held.values())],
        "checkpoint_bytes": held["weights"][1] + held["moments"][1],
        "checkpoint_pieces": len(pieces),
        "largest_unit_gathered": widest,
    }


def sharded_table(found):
    lines = [
        f"{found['parameters']:,} parameters, FSDP2 over {found['ranks']} ranks; each of them holds",
        "",
        "| | elements | fp32, GB | bfloat16 alone, GB |",
        "|---|---:|---:|---:|",
    ]
    for what in ("weights", "gradients", "moments", "whole"):
        elements, size = found["float32"][what]
        name = "all of it" if what == "whole" else what
        lines.append(f"| {name} | {elements:,} | {size / 1e9:.2f} | {found['bfloat16'][what][1] / 1e9:.2f} |")
    for name, ranks in (("its checkpoint file", 1), ("the checkpoint", found["ranks"])):
        cells = [f"{ranks * found[dtype]['checkpoint_bytes'] / 1e9:.2f}" for dtype in ("float32", "bfloat16")]
        lines.append(f"| {name} | {ranks * found['float32']['checkpoint_pieces']:,} pieces | {' | '.join(cells)} |")
    unit = found["float32"]["largest_unit_gathered"]
    lines.append(
        f"| largest unit gathered at once, in bfloat16 | {unit:,} | {2 * unit / 1e9:.2f} | {2 * unit / 1e9:.2f} |"
    )
    return "\n".join(lines)


# -- a cut of it, trained ---------------------------------------------------------------------------------------------


def train(folder, layers, map_buffer):
    """Make, train, resume: each in processes of their own, whose memory is watched together."""
    from peak_memory import run_and_watch

    Path("/proc/self/oom_score_adj").write_text("1000")  # should memory be short, these processes go and no others
    folder.mkdir(parents=True, exist_ok=True)
    out = {"config": {**LLAMA, "num_hidden_layers": layers}, "processes": 2, "strategy": "fsdp2_offload"}
    out |= {"dtype": "bfloat16", "max_length": LENGTH, "global_batch_size": BATCH}
    out["checkpoint_buffer"] = "in a mapped file, not in peak_memory_bytes" if map_buffer else "in memory"
    out["parameters"] = sum(parameter_sizes(out["config"]).values())
    for part in ("make", "first", "resumed"):
        command = [sys.executable, __file__, "--folder", str(folder), "--run", part, "--layers", str(layers)]
        command += ["--map_buffer"] * map_buffer
        peak, seconds = run_and_watch(command, ROOT)
        out[part] = {"peak_memory_bytes": peak, "seconds": round(seconds, 1)}
        print(f"{part}: {seconds:.0f} s, {peak / 1e9:.1f} GB at most", flush=True)
        if part != "make":
            saved = sorted((folder / "run" / "checkpoints").glob("step-*"))
            lines = [json.loads(x) for x in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
            out[part] |= {
                "checkpoints": {s.name: sum(f.stat().st_size for f in s.iterdir()) for s in saved},
                "steps": {x["step"]: {k: x[k] for k in ("loss", "grad_norm", "step_seconds")} for x in lines},
                "resumed_from": next(
                    (x.split()[1] for x in (folder / "log").read_text().splitlines() if x.startswith("resumed")), None
                ),
            }
    return out


def make_model(folder, layers):
    """A Hugging Face folder with random bfloat16 weights and the tokenizer of its shards."""
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    from matrix import make_data

    from dilqur.tokenizer.files import copy_tokenizer

    tiny, _ = make_data(folder)
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    set_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(LlamaConfig(**{**LLAMA, "num_hidden_layers": layers})).save_pretrained(folder / "model")
    copy_tokenizer(tiny, folder / "model")


def start(folder, part, map_buffer):
    """cpt.py on two processes until step STEPS, or from there one step further."""
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    import fork_launch

    fork_launch.import_everything()
    if map_buffer:
        put_large_buffers_into_files(folder)
    flags = ["--model_name_or_path", folder / "model", "--datasets", f"{{path: {folder}/shards}}"]
    flags += ["--dtype", "bfloat16", "--attn_implementation", "sdpa"]
    flags += ["--max_length", LENGTH, "--global_batch_size", BATCH, "--per_device_train_batch_size", 1]
    flags += ["--reduce_dtype", "bfloat16", "--max_steps", 1000, "--save_steps", 1000, "--save_total_limit", 1]
    flags += ["--learning_rate", "1e-4", "--output_dir", folder / "run"]
    flags += ["--stop_at_step", STEPS + (part == "resumed")]
    fork_launch.run("fsdp2_offload", 2, flags, folder / "log")


def put_large_buffers_into_files(folder):
    """From now on, in the processes forked from this one: CheckpointWriter's is the only one so large."""
    import torch

    empty = torch.empty

    def mapped(*size, dtype=None, **named):
        if dtype is torch.uint8 and isinstance(size[0], int) and size[0] > 1 << 30:
            return torch.from_file(f"{folder}/buffer-{os.environ['RANK']}", shared=True, size=size[0], dtype=dtype)
        return empty(*size, dtype=dtype, **named)

    torch.empty = mapped


def trained_table(found):
    lines = [
        f"{found['config']['num_hidden_layers']} layers of it, {found['parameters']:,} parameters, {found['processes']} processes of "
        f"{found['hardware']['cpu']}, {found['strategy']}, {found['dtype']}",
        "",
        "| | peak memory of both, GB | step: loss, seconds | checkpoint, GB |",
        "|---|---:|---|---:|",
    ]
    for part, name in (("first", "from the beginning"), ("resumed", "resumed")):
        done = found[part]
        steps = "; ".join(f"{n}: {s['loss']:.4f}, {s['step_seconds']:.0f}" for n, s in done["steps"].items())
        size = list(done["checkpoints"].values())[-1]
        lines.append(f"| {name} | {done['peak_memory_bytes'] / 1e9:.1f} | {steps} | {size / 1e9:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
