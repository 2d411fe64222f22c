"""DDP, FSDP2 and ZeRO-1, 2, 3 on two processes: the same run under each, killed or not.

The first phase under DDP, FSDP2 and ZeRO-3 is a real launch on a CPU with the accelerate file of a cluster; all other runs are forked from
a process that has imported everything (fork_launch.py), and shared between tests.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from same_state import differing_tensors, differing_weights

from dilqur.checkpoint.writer import best_checkpoint

STRATEGIES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
LAUNCHED = ("ddp", "fsdp2", "zero3")  # slurm/test_lab.py launches ZeRO-2, whose file is ZeRO-1's but for a number
BATCH, EMBEDDING_STEPS, STEPS, SAVED = 8, 6, 24, 20  # SAVED: the last checkpoint before the end, one every 4 steps
ROUNDING = 1e-5  # relative: fp32 sums in another order, some 100 roundings of 6e-8


@contextlib.contextmanager
def launch(strategy, flags, log, program=ROOT / "scripts" / "cpt.py", processes=2, **environment):
    """The process of a real `accelerate launch`; it and all its workers are gone at the end, whatever happens."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes)]
    launcher += ["--num_machines", "1", "--main_process_port", "0"]
    config = ["--config_file", ROOT / "accelerate_configs" / f"{strategy}.yaml", program]
    with log.open("w") as out:
        process = subprocess.Popen(
            [*launcher, *config, *map(str, flags)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    try:
        yield process
    finally:
        kill(process)


def kill(process):
    """SIGKILL for all at once, workers too: each of them leads a process group of its own."""
    with contextlib.suppress(psutil.NoSuchProcess):
        tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for member in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.send_signal(signal.SIGKILL)
        psutil.wait_procs(tree, timeout=60)
    process.wait(60)


class Runs:
    """Runs of cpt.py by name, each done once; "single" is one process without a launcher."""

    def __init__(self, folder, server, made, tiny_model):
        self.folder, self.server, self.tiny_model, self.shards = folder, server, tiny_model, made / "shards"

    def flags(self, *flags, model):
        # two sequences per device at once: two processes accumulate two micro-batches
        shape = f"--max_length 64 --global_batch_size {BATCH} --per_device_train_batch_size 2 --save_steps 4".split()
        data = ("--datasets", f"{{path: {self.shards}}}")
        return ("--model_name_or_path", model, *data, *shape, "--learning_rate", "1e-3", *flags)

    def start(self, strategy, name, *flags, model, processes=None):
        """The folder of the finished run."""
        folder, log = self.folder / strategy / name, self.folder / f"{strategy}-{name}.log"
        if (folder / "manifest.json").exists():
            return folder
        flags = self.flags(*flags, "--output_dir", folder, model=model)
        processes = processes or {"single": 1, "hsdp": 4}.get(strategy, 2)
        start = launch if name == "phase-1" and strategy in LAUNCHED else self.server.launch
        with start(strategy, flags, log, processes=processes) as process:
            assert process.wait(300) == 0, log.read_text()
        shown = "1 process" if processes == 1 else f"{processes} processes"
        named = {"hsdp": "fsdp2", "fsdp2_offload": "fsdp2"}.get(strategy, strategy)
        assert re.search(rf"^strategy +{named}, {shown} on cpu$", log.read_text(), re.M), log.read_text()
        return folder

    def embeddings(self, strategy):
        """Phase 1: only the embeddings."""
        frozen = ("--unfrozen_parameters", "*embed_tokens*", "--max_steps", EMBEDDING_STEPS)
        return self.start(strategy, "phase-1", *frozen, model=self.tiny_model)

    def full_flags(self):
        return ("--continue_data", "true", "--max_steps", STEPS)

    def full(self, strategy):
        """Phase 2: all weights, from phase 1 of the same strategy, going on in its data."""
        return self.start(strategy, "phase-2", *self.full_flags(), model=self.embeddings(strategy))


@pytest.fixture(scope="module")
def runs(tmp_path_factory, server, made, tiny_model):
    return Runs(tmp_path_factory.mktemp("strategies"), server, made, tiny_model)


def metrics(folder, *names):
    """{step: the numbers of `names`}."""
    return {step: tuple(record[name] for name in names) for step, record in records(folder).items()}


def records(folder):
    """{step: all that metrics.jsonl has of it}."""
    return {r["step"]: r for r in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())}


def flat(numbers):
    return [number for step in sorted(numbers) for number in numbers[step]]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_losses_of_both_phases_are_those_of_one_process(runs, strategy):
    for phase, steps in ((runs.embeddings, EMBEDDING_STEPS), (runs.full, STEPS)):
        expected, found = metrics(phase("single"), "loss", "grad_norm"), metrics(phase(strategy), "loss", "grad_norm")
        assert list(found) == list(range(1, steps + 1))
        assert flat(found) == pytest.approx(flat(expected), rel=ROUNDING)
    data = json.loads((runs.full(strategy) / "manifest.json").read_text())["result"]["data"]
    assert data["start_position"] == EMBEDDING_STEPS * BATCH


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_frozen_weights_come_out_as_they_went_in_and_the_tied_head_stays_tied(runs, strategy):
    before, phase_1, phase_2 = (
        load_file(folder / "model.safetensors")
        for folder in (runs.tiny_model, runs.embeddings(strategy) / "model", runs.full(strategy) / "model")
    )
    assert before.keys() == phase_1.keys() == phase_2.keys()  # no lm_head of its own
    changed = {name for name in before if not torch.equal(before[name], phase_1[name])}
    assert changed == {"model.embed_tokens.weight"}
    assert not any(torch.equal(phase_1[name], phase_2[name]) for name in before)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_killed_and_started_again_it_gives_the_numbers_of_an_uninterrupted_run_to_the_bit(runs, strategy):
    expected, folder = (
        metrics(runs.full(strategy), "loss", "grad_norm", "learning_rate"),
        runs.folder / strategy / "killed",
    )
    flags = runs.flags(*runs.full_flags(), "--output_dir", folder, model=runs.embeddings(strategy))
    log = runs.folder / f"{strategy}-killed.log"
    with runs.server.launch(strategy, flags, log) as process:
        while not steps_beyond_a_checkpoint(folder):
            assert process.poll() is None, log.read_text()
            time.sleep(0.005)
        process.kill()
    assert not (folder / "manifest.json").exists(), "it had finished before it was killed: the test did not test"
    with runs.server.launch(strategy, flags, log) as process:
        assert process.wait(300) == 0, log.read_text()
    resumed = int(re.search(rf"^resumed +{folder}/checkpoints/step-(\d+)$", log.read_text(), re.M)[1])
    assert 4 <= resumed < STEPS
    assert metrics(folder, "loss", "grad_norm", "learning_rate") == expected
    ours, theirs = (load_file(f / "model" / "model.safetensors") for f in (folder, runs.full(strategy)))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_four_processes_go_on_to_the_bit_as_well(runs):
    """On three and more, DDP's sums depend on the order of its buckets, which its first backward changes."""
    whole = runs.start("ddp", "four", "--max_steps", 8, model=runs.tiny_model, processes=4)
    resume = ("--resume_from_checkpoint", whole / "checkpoints" / "step-0000004")
    again = runs.start("ddp", "four-again", "--max_steps", 8, *resume, model=runs.tiny_model, processes=4)
    expected, found = metrics(whole, "loss", "grad_norm"), metrics(again, "loss", "grad_norm")
    assert found == {step: expected[step] for step in range(5, 9)}


def steps_beyond_a_checkpoint(folder):
    """How many steps are in metrics.jsonl past the newest complete checkpoint; 0 without one."""
    try:
        lines = (folder / "metrics.jsonl").read_text().count("\n")
        newest = max(p.parent.name for p in folder.glob("checkpoints/step-*/COMPLETE"))
    except (FileNotFoundError, ValueError):
        return 0
    return max(0, lines - int(newest.removeprefix("step-")))


@pytest.mark.parametrize(
    ("saved_by", "read_by"),  # every way to own pieces is written and read by another; zero1 has that of zero2
    [
        ("single", "fsdp2"),
        ("fsdp2", "zero2"),
        ("zero2", "zero3"),
        ("zero3", "hsdp"),
        ("hsdp", "fsdp2_offload"),
        ("fsdp2_offload", "single"),
    ],
)
def test_a_checkpoint_of_one_strategy_goes_on_under_another_and_on_another_number_of_processes(runs, saved_by, read_by):
    checkpoint = runs.full(saved_by) / "checkpoints" / f"step-{SAVED:07d}"
    resume = ("--resume_from_checkpoint", checkpoint)
    model = runs.embeddings(saved_by)  # frozen weights, if there were any, come from there
    folder = runs.start(read_by, f"from-{saved_by}", *runs.full_flags(), *resume, model=model)
    found, expected = metrics(folder, "loss", "grad_norm"), metrics(runs.full(saved_by), "loss", "grad_norm")
    assert list(found) == list(range(SAVED + 1, STEPS + 1))
    assert flat(found) == pytest.approx(flat({step: expected[step] for step in found}), rel=ROUNDING)


@pytest.mark.parametrize("strategy", ["fsdp2", "zero1", "zero2", "zero3"])
def test_master_weights_begin_as_the_models_in_fp32(runs, strategy):
    """Under ZeRO DeepSpeed makes them of bfloat16 copies, 2e-4 off."""
    folder = runs.start(
        strategy, "begun", "--max_steps", 1, "--bf16", "true", "--learning_rate", "1e-12", model=runs.tiny_model
    )
    before, after = (load_file(f / "model.safetensors") for f in (runs.tiny_model, folder / "model"))
    off = {name: (after[name] - before[name]).abs().max().item() for name in before}
    assert max(off.values()) < 1e-9 and not any(torch.equal(w, w.bfloat16().float()) for w in before.values())


def evaluated_before_saving(shards, every=4):
    return ("--eval_datasets", f"{{path: {shards}}}", "--max_eval_samples", 16, "--eval_steps", every)


@pytest.mark.parametrize("strategy", ["fsdp2", "fsdp2_offload", "hsdp"])
def test_what_is_saved_right_after_an_evaluation_is_what_is_saved_without_one(runs, strategy):
    """A forward pass without a backward one leaves FSDP2's last group gathered, in bfloat16; all strategies: matrix.py."""
    flags = ("--max_steps", 8, "--bf16", "true")
    plain = runs.start(strategy, "bf16-not-evaluated", *flags, model=runs.tiny_model)
    best = (*evaluated_before_saving(runs.shards), "--load_best_model_at_end", "true")
    evaluated = runs.start(strategy, "bf16-evaluated", *flags, *best, model=runs.tiny_model)
    assert metrics(evaluated, "loss", "grad_norm") == metrics(plain, "loss", "grad_norm")
    for step in ("step-0000004", "step-0000008"):
        assert differing_tensors(*(run / "checkpoints" / step for run in (plain, evaluated))) == []
    assert best_checkpoint(evaluated / "checkpoints").name == "step-0000008"
    assert differing_weights(plain / "model", evaluated / "model") == []


# -- what a recipe can ask of them ------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero2"])
def test_compiled_layer_by_layer_it_learns_the_same(runs, strategy):
    folder = runs.start(strategy, "compiled", "--max_steps", 4, "--torch_compile", "true", model=runs.tiny_model)
    plain = runs.start(strategy, "plain", "--max_steps", 4, model=runs.tiny_model)
    expected, found = metrics(plain, "loss", "grad_norm"), metrics(folder, "loss", "grad_norm")
    assert flat(found) == pytest.approx(flat(expected), rel=ROUNDING)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero2", "zero3"])
def test_head_and_loss_in_one_learn_the_same_where_the_heads_weight_is_gathered_for_them(runs, strategy):
    """The tied head, whose weight the embeddings have too; evaluated on the way, without gradients."""
    flags = ("--max_steps", 4, *evaluated_before_saving(runs.shards, every=2))
    fused = runs.start(strategy, "chunked", *flags, "--loss_kernel", "chunked", model=runs.tiny_model)
    plain = runs.start("single", "evaluated", *flags, model=runs.tiny_model)
    for names in (("loss", "grad_norm"), ("eval_loss",)):
        expected, found = (
            {s: [r[n] for n in names] for s, r in records(f).items() if names[0] in r} for f in (plain, fused)
        )
        assert flat(found) == pytest.approx(flat(expected), rel=ROUNDING)
    trainer = json.loads((fused / "checkpoints" / "step-0000004" / "trainer.json").read_text())
    assert trainer["kernels"]["loss_kernel"] == "chunked"


def test_in_bfloat16_alone_a_resume_under_another_strategy_goes_on_and_a_parameter_has_two_bytes(runs):
    only = ("--max_steps", 8, "--dtype", "bfloat16")
    ddp = runs.start("ddp", "bf16", *only, model=runs.tiny_model)
    resume = ("--resume_from_checkpoint", ddp / "checkpoints" / "step-0000004")
    fsdp2 = runs.start("fsdp2", "bf16", *only, *resume, model=runs.tiny_model)
    expected, found = metrics(ddp, "loss"), metrics(fsdp2, "loss")
    # gradients are summed in bfloat16 here and in fp32 there: 3 significant digits of them, of a loss that moves by 0.1
    assert flat(found) == pytest.approx([expected[step][0] for step in found], abs=2e-3)
    weights = load_file(ddp / "model" / "model.safetensors")
    assert all(torch.equal(w, w.bfloat16().float()) for w in weights.values())  # model/ is fp32, these bits are there
    state = sum(f.stat().st_size for f in (ddp / "checkpoints" / "step-0000008").glob("*.safetensors"))
    assert state / sum(w.numel() for w in weights.values()) == pytest.approx(6, rel=0.1)  # weight and two moments


@pytest.mark.parametrize(
    ("strategy", "flags", "says"),
    [
        (
            "zero2",
            ("--dtype", "bfloat16"),
            "dtype: bfloat16 does not work under zero2: DeepSpeed keeps fp32 master weights",
        ),
        ("zero3", ("--torch_compile", "true"), "torch_compile: true does not work under zero3"),
    ],
)
def test_what_a_strategy_cannot_do_is_an_error_before_anything_is_loaded(runs, tmp_path, strategy, flags, says):
    refused(runs, tmp_path, strategy, flags, says)


@pytest.mark.parametrize(
    ("variable", "says"),
    [
        ("FSDP_ACTIVATION_CHECKPOINTING", "fsdp_activation_checkpointing"),
        ("ACCELERATE_DYNAMO_BACKEND", "dynamo_backend"),
    ],
)
def test_what_an_accelerate_config_says_and_nobody_would_do_is_refused(runs, tmp_path, variable, says):
    refused(runs, tmp_path, "fsdp2", (), f"{says} of the accelerate config is not used", **{variable: "true"})


def test_an_accelerate_config_that_would_send_the_weights_from_the_first_rank_is_the_same_run(runs, tmp_path):
    """As `accelerate config` has it by default: on the meta device there are none to send."""
    plain = runs.start("fsdp2", "plain", "--max_steps", 4, model=runs.tiny_model)
    flags = runs.flags("--max_steps", 4, "--output_dir", tmp_path / "run", model=runs.tiny_model)
    efficient = {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
    with runs.server.launch("fsdp2", flags, tmp_path / "log", **efficient) as process:
        assert process.wait(120) == 0, (tmp_path / "log").read_text()
    assert metrics(tmp_path / "run", "loss", "grad_norm") == metrics(plain, "loss", "grad_norm")


def refused(runs, tmp_path, strategy, flags, says, **environment):
    flags = runs.flags(*flags, "--max_steps", 4, "--output_dir", tmp_path / "run", model=runs.tiny_model)
    with runs.server.launch(strategy, flags, tmp_path / "log", **environment) as process:
        assert process.wait(120) == 2
    assert says in (tmp_path / "log").read_text()
    assert not (tmp_path / "run").exists()
