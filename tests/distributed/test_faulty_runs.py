"""What goes wrong on a cluster, on two real processes: a loss that is no number, a rank that dies or hangs, a signal, a full disk."""

import json
import os
import re
import signal
import time

import pytest
from conftest import ROOT
from test_strategies import STRATEGIES, launch

STEPS = 6


@pytest.fixture(scope="module")
def flags(made, tiny_model):
    shape = f"--max_length 64 --global_batch_size 8 --per_device_train_batch_size 2 --max_steps {STEPS}".split()
    data = ("--model_name_or_path", tiny_model, "--datasets", f"{{path: {made}/shards}}")
    return (*data, *shape, "--learning_rate", "1e-3", "--save_steps", 1)


def numbers(folder, *names):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [tuple(r.get(name) for name in names) for r in records]


POISONED = ROOT / "tests" / "support" / "poisoned_cpt.py"


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_loss_that_is_no_number_on_one_rank_is_skipped_by_all_and_the_run_goes_on(server, flags, strategy, tmp_path):
    log, poison = tmp_path / "log", {"program": POISONED, "POISON": "rank=1 steps=3 value=inf"}
    with server.launch(strategy, (*flags, "--output_dir", tmp_path / "run"), log, **poison) as process:
        assert process.wait(300) == 0, log.read_text()
    found = numbers(tmp_path / "run", "grad_norm", "skipped_steps")
    assert [norm is None for norm, _ in found] == [False, False, True, False, False, False]
    assert [skipped for _, skipped in found] == [None, None, 1, 1, 1, 1]
    assert "its samples are the 8 from position 16 on" in log.read_text()
    trainer = json.loads((tmp_path / "run/checkpoints/step-0000006/trainer.json").read_text())
    assert (trainer["skipped_steps"], trainer["optimizer_steps"]) == (1, 5)
    # resumed after the skip: the same numbers, so Adam's own step was counted right
    again = (*flags, "--output_dir", tmp_path / "again", "--resume_from_checkpoint")
    again += (tmp_path / "run/checkpoints/step-0000005", "--max_steps", STEPS)
    with server.launch(strategy, again, log) as process:
        assert process.wait(300) == 0, log.read_text()
    assert numbers(tmp_path / "again", "loss", "grad_norm") == numbers(tmp_path / "run", "loss", "grad_norm")[5:]


def test_a_rank_that_dies_takes_the_others_with_it_within_a_minute_and_its_traceback_is_the_one_shown(flags, tmp_path):
    began = time.monotonic()
    poison = {"program": POISONED, "POISON": "rank=1 steps=3 value=raise"}
    with launch("ddp", (*flags, "--output_dir", tmp_path / "run"), tmp_path / "log", **poison) as process:
        assert process.wait(300) != 0
    said = (tmp_path / "log").read_text()
    assert time.monotonic() - began < 100  # a minute, and the start
    cause = said[said.index("Root Cause") :] if "Root Cause" in said else said
    assert re.search(r"rank\s*:\s*1 ", cause), said[-3000:]
    assert "RuntimeError: poisoned" in cause
    newest = max(p.parent.name for p in (tmp_path / "run").glob("checkpoints/step-*/COMPLETE"))
    assert newest >= "step-0000001"


def test_a_mistake_that_only_the_running_program_can_see_is_in_the_last_words_of_the_launcher(flags, tmp_path):
    missing = (*flags, "--resume_from_checkpoint", tmp_path / "gone", "--output_dir", tmp_path / "run")
    with launch("ddp", missing, tmp_path / "log") as process:
        assert process.wait(300) != 0
    said = (tmp_path / "log").read_text()
    line = f"error: {tmp_path}/gone: no COMPLETE in it: half-written, or no checkpoint"
    assert line in said[said.index("Root Cause") :], said[-3000:]


def test_a_hang_is_found_every_rank_says_where_it_stands_and_the_job_can_be_requeued(flags, tmp_path):
    more = ("--hang_minutes", "0.15", "--output_dir", tmp_path / "run")
    poison = {"program": POISONED, "POISON": "rank=1 steps=3 value=hang"}
    with launch("fsdp2", (*flags, *more), tmp_path / "log", **poison) as process:
        assert process.wait(120) != 0
    said = (tmp_path / "log").read_text()
    assert re.search(
        r"error: rank 1 on \S+: nothing happened for 0\.\d minutes, while step 3, forward and backward", said
    )
    stack = (tmp_path / "run" / "hang-rank-00001.txt").read_text()
    assert "poisoned_cpt.py" in stack
    waiting = (tmp_path / "run" / "hang-rank-00000.txt").read_text()
    assert re.match(
        r"rank 0 on \S+: nothing happened .* while step 3, adding up its numbers over the ranks|rank 0 .* step 3",
        waiting,
    )
    assert (tmp_path / "run" / "REQUEUE").exists()


@pytest.mark.parametrize("to", ["a rank", "the launcher"])
def test_a_signal_saves_and_more_of_them_do_no_harm(server, flags, to, tmp_path):
    long = (*flags, "--max_steps", 2000, "--save_steps", 500, "--output_dir", tmp_path / "run")
    long = (*long, "--dataloader_num_workers", 2)  # they get the signal as well, from a launcher or from Slurm
    start = server.launch if to == "a rank" else launch
    with start("ddp", long, tmp_path / "log") as process:
        while not (tmp_path / "run/metrics.jsonl").exists() or len(numbers(tmp_path / "run", "step")) < 5:
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.05)
        target = process.pids[1] if to == "a rank" else process.pid
        for _ in range(3):
            os.kill(target, signal.SIGUSR1 if to == "a rank" else signal.SIGTERM)
            time.sleep(0.01)
        code = process.wait(60)
        said = (tmp_path / "log").read_text()
    stopped = re.search(r"stopped after step (\d+) of 2000 \((.*)\); the same command goes on", said)
    assert stopped, said
    assert code == 0 or to == "the launcher"
    assert (tmp_path / f"run/checkpoints/step-{int(stopped[1]):07d}/COMPLETE").exists()
    assert (tmp_path / "run/REQUEUE").exists()
    assert len(numbers(tmp_path / "run", "step")) == int(stopped[1])


def test_a_second_process_on_the_same_folder_is_refused(server, run, flags, tmp_path):
    long = (*flags, "--max_steps", 2000, "--output_dir", tmp_path / "run")
    with server.launch("ddp", long, tmp_path / "log") as process:
        while not (tmp_path / "run/metrics.jsonl").exists():
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.05)
        done = run("scripts/cpt.py", *long, code=2)
        assert "is writing this folder; wait for it, or choose another --output_dir" in done.stderr
