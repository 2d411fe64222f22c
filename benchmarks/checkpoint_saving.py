"""What saving a checkpoint costs a run: stall, time until it stands, slower steps meanwhile, memory; against torch's own ways.

    python benchmarks/checkpoint_saving.py --folders /dev/shm /tmp
    python benchmarks/checkpoint_saving.py --folders /dev/shm --processes 2 --rounds 3

The state is that of AdamW on a Llama of 94 million parameters, fp32: 1.1 GB with both moments. Ways, in an order that turns from round
to round, each made anew in a round and used for several saves, the first of which has no buffer yet:

    dilqur               CheckpointWriter of dilqur/checkpoint/writer.py: a copy into a buffer, a thread that writes, checksums, fsync
    dcp.async_save       torch.distributed.checkpoint, by its thread; it makes new buffers for every save
    dcp, kept stager     the same with a DefaultStager that is kept, so that its buffers are
    dcp.save             synchronous

Stall: the call, held against a bare copy just before it: each tensor of the state into its place in a buffer that is kept, nothing
else, which is what a stall cannot be shorter than. Total: until the checkpoint stands and can be loaded. Step: one of a small Llama of
many small operations, some 30 ms on a core, which feels the interpreter's lock and the memory's bandwidth; quiet ones just before each
save are what it is held against. Lost: what the training is behind in the end, the stall and all slower steps. Memory: the highest resident
set of the process during the save above that before the round; what is on a RAM disk is not in it. Two processes are FSDP2's (half of the
state each); all figures are then rank 0's. Writes benchmarks/results/checkpoint_saving.json and prints Markdown tables.
"""

import argparse
import ctypes
import gc
import json
import shutil
import statistics
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

from dilqur.common.constants import ROOT

STATE = {"num_hidden_layers": 6, "hidden_size": 1024, "intermediate_size": 2816, "vocab_size": 16_384}
SMALL = {"num_hidden_layers": 4, "hidden_size": 256, "intermediate_size": 512, "vocab_size": 1024}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4, "tie_word_embeddings": True}
SAVES, QUIET_STEPS = 3, 40  # of a way in a round; before each save
KINDS = ("bare_copy", "stall", "total", "quiet_step", "step", "worst_step", "lost", "memory")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folders", nargs="+", default=["/dev/shm", tempfile.gettempdir()], help="one on each disk")
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2], choices=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "checkpoint_saving.json")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)  # is one of the processes, and writes there
    arguments = parser.parse_args()
    if arguments.worker:
        return measure(Path(arguments.folders[0]), arguments.rounds, arguments.worker)
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    import fork_launch

    fork_launch.import_everything()
    from dilqur.pipeline.manifest import git_commit, hardware

    result = {
        "command": " ".join(["python", *sys.argv]),
        "git": git_commit(),
        "packages": {name: metadata.version(name) for name in ("torch", "accelerate", "transformers", "safetensors")},
        "hardware": hardware(),
        "measured": [],
    }
    for folder in arguments.folders:
        for world in arguments.processes:
            place = Path(tempfile.mkdtemp(dir=folder))  # no TemporaryDirectory: a forked process would remove it, too
            try:
                found, log = place / "found.json", place / "log"
                flags = ["--folders", place, "--rounds", arguments.rounds, "--worker", found]
                strategy = "single" if world == 1 else "fsdp2"
                if fork_launch.Run(strategy, world, flags, log, program=__file__).wait(7200):
                    raise SystemExit(log.read_text())
                measured = {"folder": folder, "processes": world, **json.loads(found.read_text())}
            finally:
                shutil.rmtree(place)
            result["measured"].append(measured)
            print(table(measured), flush=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    return None


# -- one process ------------------------------------------------------------------------------------------------------


def measure(folder, rounds, output):
    """Every way, `rounds` times, into `folder`."""
    import torch

    from dilqur.checkpoint.local_shards import MOMENTS, local_slices
    from dilqur.training.distributed import make_accelerator, prepare, strategy

    accelerator = make_accelerator(bf16=False, batch=1, accumulation=1, max_grad_norm=1.0)
    model, optimizer = prepare(accelerator, llama(STATE), adamw)
    for *_, state in local_slices(model, optimizer, for_read=True):
        for moment in MOMENTS:
            state[moment].uniform_(0, 1e-3)
    step, copy, ways = Step(accelerator), BareCopy(model, optimizer), (Dilqur, AsyncDcp, KeptDcp, Dcp)
    copy()
    size = sum(v.nbytes for *_, state in local_slices(model, optimizer) for v in state.values())
    rows = {way.name: {"first": [], "kept": []} for way in ways}
    for number in range(rounds):
        order = [*ways[number % len(ways) :], *ways[: number % len(ways)]]
        for way in order:
            before = memory("VmRSS")
            saver = way(folder / "saved", accelerator, model, optimizer)
            for save in range(SAVES):
                figures = one_save(saver, copy, step, accelerator, before)
                rows[way.name]["kept" if save else "first"].append(figures)
            saver.close()
            del saver
            gc.collect()
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed is no memory of the next one
    if accelerator.is_main_process:
        about = {"strategy": strategy(accelerator), "parameters": sum(p.numel() for p in model.parameters())}
        write = {**about, "bytes_a_process": size, "rounds": rounds, "saves_a_round": SAVES, "ways": rows}
        output.write_text(json.dumps(write))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def one_save(saver, copy, step, accelerator, before):
    """The figures of KINDS: seconds, and bytes for memory."""
    import torch

    everyone = accelerator.num_processes > 1
    quiet = statistics.mean(step() for _ in range(QUIET_STEPS))
    accelerator.wait_for_everyone()
    began = time.perf_counter()
    copy()
    bare = time.perf_counter() - began
    accelerator.wait_for_everyone()
    forget_peak()
    began = time.perf_counter()
    saver.save()
    stall, steps = time.perf_counter() - began, []
    done = torch.zeros(())
    while not done:  # all ranks step together until all have written
        done.fill_(saver.done())
        if everyone:
            torch.distributed.all_reduce(done, op=torch.distributed.ReduceOp.MIN)
        if not done:
            steps.append(step())
    saver.wait()
    total = time.perf_counter() - began
    peak = memory("VmHWM") - before
    accelerator.wait_for_everyone()
    saver.remove()
    lost = total - len(steps) * quiet
    mean, worst = (statistics.mean(steps), max(steps)) if steps else (None, None)
    return dict(zip(KINDS, (bare, stall, total, quiet, mean, worst, lost, peak), strict=True))


def llama(config):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**config, **HEADS))


def adamw(model):
    import torch

    return torch.optim.AdamW(model.parameters(), lr=1e-4)


class Step:
    """A step of the small model; a gradient goes over the network, as in training. Returns its seconds."""

    def __init__(self, accelerator):
        import torch

        self.model, self.everyone = llama(SMALL).to(accelerator.device), accelerator.num_processes > 1
        self.optimizer = adamw(self.model)
        ids = torch.arange(64, device=accelerator.device)[None]
        self.batch = {"input_ids": ids, "labels": ids}

    def __call__(self):
        import torch

        began = time.perf_counter()
        self.model(**self.batch, use_cache=False).loss.backward()
        if self.everyone:
            torch.distributed.all_reduce(self.model.lm_head.weight.grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - began


def memory(name):
    """Bytes: VmRSS now, VmHWM the highest since `forget_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return 1024 * int(line.split()[1])
    raise KeyError(name)


def forget_peak():
    Path("/proc/self/clear_refs").write_text("5")


# -- ways to save -----------------------------------------------------------------------------------------------------


class BareCopy:
    def __init__(self, model, optimizer):
        self.model, self.optimizer, self.buffer = model, optimizer, None

    def __call__(self):
        import torch

        from dilqur.checkpoint.local_shards import local_slices

        views = [v for *_, state in local_slices(self.model, self.optimizer) for v in state.values()]
        if self.buffer is None:
            size = sum(v.numel() for v in views)
            self.buffer = torch.empty(size, dtype=torch.float32, pin_memory=torch.cuda.is_available())
        at = 0
        for view in views:
            self.buffer[at : at + view.numel()].copy_(view, non_blocking=True)
            at += view.numel()
        if torch.cuda.is_available():
            torch.cuda.synchronize()


class Dilqur:
    name = "dilqur"

    def __init__(self, folder, accelerator, model, optimizer):
        from dilqur.checkpoint.writer import CheckpointWriter

        self.writer = CheckpointWriter(folder, accelerator)
        self.model, self.optimizer, self.step = accelerator.unwrap_model(model), optimizer, 0

    def save(self):
        self.step += 1
        self.writer.save(self.model, self.optimizer, self.step, {})

    def done(self):
        return not self.writer._thread.is_alive()

    def wait(self):
        self.writer.wait()

    def remove(self):
        if self.writer.rank == 0:
            for checkpoint in self.writer.folder.glob("step-*"):
                assert (checkpoint / "COMPLETE").exists()
                shutil.rmtree(checkpoint)

    def close(self):
        self.remove()


class Dcp:
    name = "dcp.save"

    def __init__(self, folder, accelerator, model, optimizer):
        import torch

        from dilqur.checkpoint.local_shards import base_optimizer

        self.folder, self.model, self.optimizer = folder, model, base_optimizer(optimizer)
        self.main, self.stager, self.future = accelerator.is_main_process, self.make_stager(), None
        several = accelerator.num_processes > 1
        self.group = torch.distributed.new_group(backend="gloo") if several else None  # its thread's collectives

    def make_stager(self):
        return None

    def state(self):
        from torch.distributed.checkpoint.state_dict import get_state_dict

        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer}

    def save(self):
        import torch.distributed.checkpoint as dcp

        dcp.save(self.state(), checkpoint_id=str(self.folder), process_group=self.group, no_dist=self.group is None)

    def done(self):
        return self.future is None or self.future.done()

    def wait(self):
        if self.future is not None:
            self.future.result()

    def remove(self):
        if self.main:
            assert (self.folder / ".metadata").exists()
            shutil.rmtree(self.folder)

    def close(self):
        if self.stager:
            self.stager.close()


class AsyncDcp(Dcp):
    name = "dcp.async_save"

    def save(self):
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

        self.future = dcp.async_save(
            self.state(),
            checkpoint_id=str(self.folder),
            process_group=self.group,
            no_dist=self.group is None,
            async_stager=self.stager,
            async_checkpointer_type=AsyncCheckpointerType.THREAD,
        )


class KeptDcp(AsyncDcp):
    name = "dcp, kept stager"

    def make_stager(self):
        import torch
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        pinned = torch.cuda.is_available()
        return DefaultStager(StagingOptions(pinned, False, False, pinned))


# -- tables -----------------------------------------------------------------------------------------------------------


def table(measured):
    lines = [
        f"\n{measured['folder']}, {measured['processes']} process(es), {measured['strategy']}: "
        f"{measured['bytes_a_process'] / 1e9:.2f} GB of state each, {measured['rounds']} rounds",
        "",
        "| | stall, first, s | stall, s | × bare copy | total, s | step, × quiet | worst step, ms | lost, s | memory, × state |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, saves in measured["ways"].items():
        kept, every = saves["kept"], saves["first"] + saves["kept"]
        slower = [s["step"] / s["quiet_step"] for s in kept if s["step"]]
        worst = [s["worst_step"] * 1e3 for s in kept if s["step"]]
        cells = [
            spread([s["stall"] for s in saves["first"]]),
            spread([s["stall"] for s in kept]),
            spread([s["stall"] / s["bare_copy"] for s in kept]),
            spread([s["total"] for s in kept]),
            spread(slower) if slower else "",
            spread(worst, ".0f") if worst else "",
            spread([s["lost"] for s in kept]),
            f"{max(s['memory'] for s in every) / measured['bytes_a_process']:.2f}",
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(values, how=".2f"):
    return f"{statistics.median(values):{how}} ({min(values):{how}} to {max(values):{how}})"


if __name__ == "__main__":
    main()
