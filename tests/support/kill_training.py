"""SIGKILL for all processes of a training run at random moments, again and again, until it is done: nothing may be lost.

    python tests/support/kill_training.py --kills 100 --output benchmarks/results/kill_training.json
    python tests/support/kill_training.py --program mlm --output benchmarks/results/kill_training_mlm.json      of an encoder
    python tests/support/kill_training.py --kills 4 --strategies fsdp2 --steps 100              a short one

Half of the kills wait for a save to be under way. After each, every complete checkpoint must be whole and the newest must not be older than
before. In the end the losses must be those of a run that was never killed, bit for bit, the weights too, and a ledger of what each step
drew must have each position exactly once, with the same labels: for an encoder, the same tokens masked.
"""

import argparse
import itertools
import json
import random
import tempfile
import time
from importlib import metadata
from pathlib import Path

import fork_launch
import xxhash
from fork_launch import ROOT, Run, run
from matrix import make_data

BATCH, WORLD = 8, 2


def keep_ledger(folder):
    """From the next fork on, workers write {"step", "drawn": [[position, hash of its labels], …]} of every step they draw, one file for
    each start and rank."""
    import os

    import dilqur.data.batches
    import dilqur.training.set_up

    original = dilqur.data.batches.training_batches

    def recorded(samples, start, steps, batch, accumulation, rank, *more, **named):
        drawn, batch_of = [], samples.batch

        def noted(positions):
            arrays = batch_of(positions)
            labels = (xxhash.xxh3_64_hexdigest(row.tobytes()) for row in arrays["labels"])
            drawn.extend(zip(map(int, positions), labels, strict=True))
            return arrays

        samples.batch = noted
        first = start // (batch * accumulation * int(os.environ.get("WORLD_SIZE", 1)))
        with (folder / f"{time.time_ns()}-{rank}.jsonl").open("w") as file:
            steps_of = original(samples, start, steps, batch, accumulation, rank, *more, **named)
            for step, micro_batches in enumerate(steps_of, first + 1):
                file.write(json.dumps({"step": step, "drawn": drawn}) + "\n")
                file.flush()
                drawn.clear()
                yield micro_batches

    folder.mkdir()
    dilqur.training.set_up.training_batches = recorded


def drawn_in_the_surviving_steps(folder):
    """[[position, hash of its labels], …] of what the last start that did a step drew for it, over all ranks, in order."""
    by_step = {}
    for file in sorted(folder.iterdir()):
        for line in file.read_text().splitlines():
            record = json.loads(line)
            rank = file.stem.rpartition("-")[2]
            by_step.setdefault(record["step"], {})[rank] = record["drawn"]
    return sorted(itertools.chain.from_iterable(p for step in by_step.values() for p in step.values()))


def check_checkpoints(folder, newest):
    """All complete ones are whole; returns the newest step. AssertionError if it went back."""
    from dilqur.checkpoint.format import KINDS, CheckpointReader
    from dilqur.checkpoint.steps import complete_checkpoints, step_of

    found = complete_checkpoints(folder)
    for checkpoint in found:
        reader = CheckpointReader(checkpoint)
        for kind, name in itertools.product(KINDS, reader.shapes):
            reader.tensor(kind, name)
        assert reader.trainer["step"] == step_of(checkpoint)
    now = step_of(found[-1]) if found else 0
    assert now >= newest, f"{folder}: the newest checkpoint is of step {now}, and was of {newest}"
    return now


def campaign(program, strategy, kills, steps, folder, flags, seed):
    """{"kills", "inside_a_save", "runs"} of one strategy: when a run is done before it was killed often enough, another begins.
    AssertionError where anything was lost."""
    from safetensors.torch import load_file

    moments, made, inside, whole = random.Random(seed), 0, 0, folder / "whole"
    began = time.monotonic()
    keep_ledger(folder / "ledger")
    run(strategy, WORLD, (*flags, "--output_dir", whole), folder / "whole.log", program=program)
    longest = (time.monotonic() - began) / 5
    expected = drawn_in_the_surviving_steps(folder / "ledger")
    assert [position for position, _ in expected] == list(range(steps * BATCH))
    for number in itertools.count(1):
        out, ledger, newest = folder / f"killed-{number}", folder / f"ledger-{number}", 0
        keep_ledger(ledger)
        while True:
            running = Run(strategy, WORLD, (*flags, "--output_dir", out), folder / "killed.log", program=program)
            if made < kills:
                wait_for_a_moment(running, out, moments, longest, in_a_save=made % 2)
                if running.poll() is None:
                    running.kill()
                    made, inside = made + 1, inside + bool(list(out.glob("checkpoints/.tmp-*")))
                    newest = check_checkpoints(out / "checkpoints", newest)
                    continue
            assert running.wait() == 0, running.log.read_text()[-3000:]
            break
        assert numbers(out) == numbers(whole), "the losses are not those of the uninterrupted run"
        ours, theirs = (load_file(f / "model" / "model.safetensors") for f in (out, whole))
        assert all(ours[name].equal(theirs[name]) for name in theirs), "other weights"
        assert drawn_in_the_surviving_steps(ledger) == expected, "a position was lost, seen twice, or masked otherwise"
        if made >= kills:
            return {"kills": made, "inside_a_save": inside, "runs": number}
    return None


def wait_for_a_moment(running, out, moments, longest, in_a_save):
    """Until it is time to kill, or the run has ended."""
    end = time.monotonic() + moments.uniform(0.1, longest)
    while running.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    if in_a_save:
        while running.poll() is None and not list(out.glob("checkpoints/.tmp-*")):
            time.sleep(0.0002)
        time.sleep(moments.uniform(0, 0.005))


def numbers(folder):
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(r["step"], r["loss"], r["grad_norm"]) for r in records]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", choices=["cpt", "mlm"], default="cpt")
    parser.add_argument("--kills", type=int, default=100, help="in all")
    parser.add_argument("--strategies", nargs="+", default=["ddp", "fsdp2", "zero2", "zero3"])
    parser.add_argument("--steps", type=int, default=400, help="of the run that is killed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", help="JSON")
    arguments = parser.parse_args()
    fork_launch.import_everything()
    from dilqur.pipeline.manifest import git_commit, hardware

    made, began = {}, time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, shards = make_data(folder, arguments.program)
        flags = ("--model_name_or_path", model, "--datasets", f"{{path: {shards}}}", "--max_length", 64)
        flags += ("--global_batch_size", BATCH, "--per_device_train_batch_size", 2, "--max_steps", arguments.steps)
        flags += ("--learning_rate", "1e-3", "--save_steps", 3, "--save_total_limit", 3)
        for number, strategy in enumerate(arguments.strategies):
            share = len(range(number, arguments.kills, len(arguments.strategies)))
            (folder / strategy).mkdir()
            how = (strategy, share, arguments.steps, folder / strategy, flags, arguments.seed + number)
            made[strategy] = campaign(ROOT / "scripts" / f"{arguments.program}.py", *how)
            print(f"{strategy}: {made[strategy]}: same losses, weights and positions, no checkpoint lost", flush=True)
    result = {
        "program": arguments.program,
        "kills": sum(m["kills"] for m in made.values()),
        "inside_a_save": sum(m["inside_a_save"] for m in made.values()),
        "by_strategy": made,
        "steps": arguments.steps,
        "processes": WORLD,
        "seconds": round(time.monotonic() - began),
        "commit": git_commit(),
        "machine": hardware(),
        "versions": {name: metadata.version(name) for name in ("torch", "accelerate", "deepspeed", "transformers")},
    }
    print(json.dumps({k: result[k] for k in ("kills", "inside_a_save", "seconds")}))
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
