"""What the training loop costs: its tokens/s against a bare PyTorch loop of the same model, optimizer, clip, batch and data.

    python benchmarks/training_loop.py
    python benchmarks/training_loop.py --profile true          and the Python functions in which the loop spends its time

One process, one thread of a CPU, or one GPU. Both loops are run in turn, a step of one and a step of the other (ten on a GPU),
so that what else the machine does meets both: the bare loop is called from inside the loss that dilqur.training.loop.train is given, and
what lies between two such calls is whole steps of the loop with all that belongs to them: reading the batch, the questions to
the other ranks and to the stop file, the schedule, metrics.jsonl and the line in the log. The bare loop does nothing but forward,
backward, clip and step, on batches that lie in memory; on a GPU it never waits for it. Both must have the same losses.

A round is ten turns; its figure for each loop is tokens / seconds, by the clock and by the CPU time of the process, which other
programs disturb less. What the loop adds to a step shows better where the step is short: the same is done with a tiny model.
Writes benchmarks/results/training_loop.json and prints a Markdown table.
"""

import contextlib
import io
import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

import numpy as np

from dilqur.common.atomic import write_json
from dilqur.common.constants import ROOT
from dilqur.common.errors import InputError
from dilqur.common.startup import quiet_libraries
from dilqur.pipeline.manifest import git_commit, hardware
from dilqur.pipeline.program import program
from dilqur.pipeline.settings_parser import parse, setting
from dilqur.pipeline.stage import Stage

sys.path.insert(0, str(ROOT / "scripts"))
import cpt

TURNS, WARM_UP = 10, 5  # turns of a round; turns that are not counted
# device: (layers, hidden, inner, heads, key-value heads, vocabulary), (max_length, samples per step), steps a turn
SHAPES = {
    "cpu": ((6, 256, 1024, 4, 2, 8192), (256, 4), 1),
    "cuda": ((16, 2048, 8192, 32, 8, 100_352), (2048, 4), 10),  # Llama 3.2 1B's with a custom vocabulary
}
TINY = ((2, 64, 128, 4, 2, 1024), (64, 4), 10)  # so that what the loop adds to a step is not lost in the step
SAME = 1e-5  # relative: fp32 losses of two loops that clip in another order of operations, after tens of steps


@dataclass(kw_only=True)
class BenchmarkSettings:
    rounds: int = setting("rounds of ten turns", default=8)
    threads: int = setting("of a CPU", default=1)
    profile: bool = setting("Python's own profile of the loop, after the rounds", default=False)
    output: str = setting("where the JSON goes", default=str(ROOT / "benchmarks" / "results" / "training_loop.json"))


@program(BenchmarkSettings)
def main(settings):
    quiet_libraries()
    import torch

    torch.set_num_threads(settings.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    result = {
        "command": " ".join(["python", *sys.argv]),
        "git": git_commit(),
        "packages": {name: metadata.version(name) for name in ("torch", "transformers", "accelerate")},
        "hardware": hardware(),
        "threads": settings.threads,
        **measure(settings, device, *SHAPES[device], settings.profile),
        "tiny": measure(settings, device, *TINY),
    }
    write_json(Path(settings.output), result)
    print(table(result))


def measure(settings, device, shape, batch, steps_a_turn, profiled=False):
    """What was run, and the figures of each round."""
    (length, samples) = batch
    layers, hidden, inner, heads, key_heads, words = shape
    config = {"num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": inner, "vocab_size": words}
    config |= {"num_attention_heads": heads, "num_key_value_heads": key_heads, "tie_word_embeddings": True}
    steps = (1 + WARM_UP + TURNS * settings.rounds) * steps_a_turn
    with tempfile.TemporaryDirectory() as folder:
        shards = random_shards(Path(folder) / "shards", steps * samples * length, words)
        keys = {"model_config": json.dumps(config), "datasets": f"{{path: {shards}}}", "max_length": length}
        keys |= {"global_batch_size": samples, "per_device_train_batch_size": samples, "bf16": device == "cuda"}
        keys |= {"max_steps": steps, "save_steps": 10**9, "learning_rate": 1e-4, "lr_scheduler_type": "constant"}
        turns, losses = in_turn(flags_of({**keys, "output_dir": f"{folder}/run"}), steps_a_turn)
        if profiled:
            print(profile_of(flags_of({**keys, "output_dir": f"{folder}/profiled", "max_steps": 60})))
    difference = max(abs(a / b - 1) for a, b in losses)
    if device == "cpu" and difference > SAME:
        raise InputError(f"the two loops do not do the same: their losses differ by {difference:.1e}")
    rounds = [turns[at : at + TURNS] for at in range(WARM_UP, len(turns), TURNS)]
    tokens = TURNS * steps_a_turn * samples * length
    out = {"config": config, "dtype": "bfloat16 autocast" if device == "cuda" else "float32", "max_length": length}
    out |= {"samples_a_step": samples, "rounds": len(rounds), "turns_a_round": TURNS, "steps_a_turn": steps_a_turn}
    out |= {"largest_relative_difference_of_losses": difference}
    more = [
        1e3 * statistics.median(turn["loop"][0] - turn["bare"][0] for turn in turns) / steps_a_turn for turns in rounds
    ]
    bare = statistics.median(turn["bare"][0] for turn in turns[WARM_UP:]) / steps_a_turn
    out |= {"bare_step_ms": round(1e3 * bare, 2), "more_a_step_ms": [round(ms, 3) for ms in more]}
    for clock, name in enumerate(("tokens_per_second", "tokens_per_cpu_second")):
        rates = {
            loop: [round(tokens / sum(turn[loop][clock] for turn in turns), 1) for turns in rounds]
            for loop in ("loop", "bare")
        }
        ratios = [round(ours / bare, 4) for ours, bare in zip(rates["loop"], rates["bare"], strict=True)]
        out[name] = {**rates, "ratio": ratios, "median_ratio": statistics.median(ratios)}
    return out


def flags_of(keys):
    return [word for key, value in keys.items() for word in (f"--{key}", str(value))]


def in_turn(flags, steps_a_turn):
    """([{"loop": (seconds, CPU seconds), "bare": …} of each turn], [(loss, bare loss) of each step])."""
    import torch

    settings = parse(cpt.CptSettings, "", flags)
    stage = Stage(settings, __file__)
    bare, on_gpu = BareLoop(settings), torch.cuda.is_available()
    turns, calls, resumed = [], 0, None

    def now():
        if on_gpu:
            torch.cuda.synchronize()
        return np.array([time.perf_counter(), time.process_time()])

    def loss_after_a_turn(model, batch, tokens):
        nonlocal calls, resumed
        if calls % steps_a_turn == 0:
            ours = now()
            bare.steps(steps_a_turn)
            theirs = now()
            if resumed is not None:
                turns.append({"loop": (ours - resumed).tolist(), "bare": (theirs - ours).tolist()})
            resumed = theirs
        calls += 1
        return cpt.causal_loss(model, batch, tokens)

    with contextlib.redirect_stdout(io.StringIO()):  # the log's lines are written, but not shown
        train(settings, stage, loss_after_a_turn)
    lines = (stage.folder / "metrics.jsonl").read_text().splitlines()
    losses = [(json.loads(line)["loss"], loss) for line, loss in zip(lines, bare.losses(), strict=False)]
    return turns, losses


def train(settings, stage, compute_loss):
    from dilqur.training.loop import train

    task = cpt.make_task(settings)
    train(settings, stage, replace(task, compute_loss=compute_loss, write_model=lambda reader, folder: None))


class BareLoop:
    """What one writes by hand; its weights and batches are those of the loop."""

    def __init__(self, settings):
        import torch

        from dilqur.data.batches import TokenSamples
        from dilqur.kernels.apply import apply_kernels
        from dilqur.kernels.choose import Machine, choose
        from dilqur.training.optimizer import make_optimizer

        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.bf16, self.max_norm = settings.bf16, settings.max_grad_norm
        self.model = cpt.load_model(settings)[0].train()
        machine = Machine.here(settings, self.model.config, "single", settings.per_device_train_batch_size)
        apply_kernels(self.model, settings, choose(settings, machine)[0])
        self.model.to(self.device)
        self.optimizer = make_optimizer(self.model, settings, on_gpu=self.device == "cuda")
        samples, size = TokenSamples(settings.datasets, settings.max_length, settings.seed), settings.global_batch_size
        arrays = [samples.batch(range(step * size, (step + 1) * size)) for step in range(settings.max_steps)]
        self.batches = iter([{name: torch.from_numpy(a) for name, a in batch.items()} for batch in arrays])
        self._losses = []

    def steps(self, count):
        import torch

        for _ in range(count):
            batch = {name: x.to(self.device, non_blocking=True) for name, x in next(self.batches).items()}
            with torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
                loss = self.model(**batch, shift_labels=batch["labels"], use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self._losses.append(loss.detach())

    def losses(self):
        return [loss.item() for loss in self._losses]


def profile_of(flags):
    """The loop alone under cProfile, as text: the functions outside torch come first where they take long."""
    import cProfile
    import pstats

    settings = parse(cpt.CptSettings, "", flags)
    profiler, text = cProfile.Profile(), io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()):
        profiler.runcall(train, settings, Stage(settings, __file__), cpt.causal_loss)
    pstats.Stats(profiler, stream=text).sort_stats("cumulative").print_stats("dilqur|accelerate|optim|autograd", 40)
    return text.getvalue()


def random_shards(folder, tokens, words):
    """A folder of token shards: `tokens` random ids, in documents of 1,000."""
    from dilqur.data.shard_writer import ShardWriter

    documents = -(-tokens // 1000)
    with ShardWriter(folder, 1 << 28) as writer:
        writer.add(np.random.default_rng(0).integers(0, words, documents * 1000), np.full(documents, 1000))
        fields = writer.close()
    fields |= {"tokenizer_sha256": "0" * 64, "vocab_size": words, "utf8_bytes": 3 * fields["tokens"], "eos_id": None}
    write_json(folder / "manifest.json", fields)
    return folder


def table(result):
    machine = result["hardware"]
    where = ", ".join(machine["gpus"]) or f"{machine['cpu']}, {result['threads']} thread(s)"
    config = result["config"]
    model = f"{config['num_hidden_layers']} × {config['hidden_size']}, vocabulary {config['vocab_size']:,}"
    lines = [
        f"{where}; torch {result['packages']['torch']}; {model}; {result['samples_a_step']} × {result['max_length']} tokens "
        f"a step, {result['dtype']}; {result['rounds']} rounds",
        "",
        "| by | the loop, tokens/s | bare loop, tokens/s | ratio, median (range) |",
        "|---|---:|---:|---:|",
    ]
    for name, by in (("tokens_per_second", "the clock"), ("tokens_per_cpu_second", "CPU time")):
        rates = result[name]
        cells = [
            f"{statistics.median(rates[x]):,.0f} ({min(rates[x]):,.0f} to {max(rates[x]):,.0f})"
            for x in ("loop", "bare")
        ]
        cells.append(f"{rates['median_ratio']:.3f} ({min(rates['ratio']):.3f} to {max(rates['ratio']):.3f})")
        lines.append(f"| {by} | {' | '.join(cells)} |")
    tiny = result["tiny"]
    more = tiny["more_a_step_ms"]
    lines.append(
        f"\nTo a step of a tiny model, of {tiny['bare_step_ms']:.1f} ms in the bare loop, the loop adds "
        f"{statistics.median(more):.2f} ms ({min(more):.2f} to {max(more):.2f})."
    )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
