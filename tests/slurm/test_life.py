"""All that a cluster does to a job, one after the other, on a real Slurm: each run ends bit-equal to an undisturbed one's.

    DILQUR_LIFE=benchmarks/results/queue_life.json pytest tests/slurm/test_life.py

A quarter of an hour on two free cores; the file gets the seconds that each case cost. test_lab.py has the two that happen most.
"""

import json
import os
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, TINY_LLAMA
from test_lab import DDP, metrics, steps_done, submit, write  # noqa: F401 - write is a fixture
from virtual_cluster import Lab, skip_where_impossible

LIFE = os.environ.get("DILQUR_LIFE")
pytestmark = pytest.mark.skipif(not LIFE, reason="takes a quarter of an hour: DILQUR_LIFE=FILE.json has it run")
STEPS = 800
LONG = {"max_steps": 2500, "save_steps": 500, "hang_minutes": 5}
RUN = {"max_steps": STEPS, "save_steps": 50, "hang_minutes": 5}
# 37 million parameters: a checkpoint of 450 MB takes long enough to cut the power in the middle of
SHAPE = {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 4, "num_attention_heads": 8}
HEAVY = {
    "model_config": {**yaml.safe_load(TINY_LLAMA), **SHAPE},
    "max_steps": 20,
    "save_steps": 5,
    "hang_minutes": 5,
    "global_batch_size": 2,
    "per_device_train_batch_size": 1,
}


@pytest.fixture(scope="module")
def lab(tree, tmp_path_factory):
    skip_where_impossible()
    with Lab(tmp_path_factory.mktemp("lab"), tree, 3) as running:
        yield running


@pytest.fixture(scope="module")
def undisturbed(lab, write):  # noqa: F811
    """(metrics, seconds of a step) of a run that nothing happens to."""
    folder = write("undisturbed", **RUN)
    assert lab.wait(submit(lab, "undisturbed", 2, **DDP)) == "COMPLETED"
    return metrics(folder)


@pytest.fixture(scope="module")
def costs():
    """{case: [{"in the queue", "to go on", "steps lost"} a disturbance]}; at the end into the file, beside those of cases not run."""
    costs = {}
    yield costs
    before = json.loads(Path(LIFE).read_text())["seconds"] if Path(LIFE).exists() else {}
    slurm = subprocess.run(["slurmctld", "-V"], capture_output=True, text=True).stdout.strip()
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    said = {"command": f"DILQUR_LIFE={LIFE} pytest tests/slurm/test_life.py", "slurm": slurm, "commit": commit}
    Path(LIFE).write_text(json.dumps({**said, "seconds": {**before, **costs}}, indent=1) + "\n")


class Watch:
    """A job under observation: what it has lost when it is disturbed."""

    def __init__(self, lab, job, folder):
        self.lab, self.job, self.folder, self.lost = lab, job, folder, []

    def steps(self, more, seconds=300):
        """Until so many more steps are done."""
        goal = steps_done(self.folder) + more
        self.until(lambda: steps_done(self.folder) >= goal, seconds)

    def until(self, what, seconds=300):
        end = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < end, self.lab.log(self.job)
            time.sleep(0.05)

    def restarts(self):
        return int(self.lab.job(self.job)["Restarts"])

    def disturbed(self, restarts):
        """From now until the run is further than it was: the seconds until the job runs again, and from there on."""
        began = time.monotonic()
        self.until(lambda: self.restarts() > restarts and self.lab.job(self.job)["JobState"] == "RUNNING")
        running, step = time.monotonic(), steps_done(self.folder)  # the last one of the start before
        self.until(lambda: steps_done(self.folder) != step)  # the file is cut to the checkpoint, or goes on
        lost = max(0, step - steps_done(self.folder))
        self.until(lambda: steps_done(self.folder) > step)
        seconds = {"in the queue": round(running - began, 1), "to go on": round(time.monotonic() - running, 1)}
        self.lost.append({**seconds, "steps lost": lost})

    def finish(self, undisturbed):
        assert self.lab.wait(self.job, seconds=600) == "COMPLETED", self.lab.log(self.job)
        assert metrics(self.folder) == undisturbed, "bit for bit"
        return self.lost


@pytest.fixture
def start(lab, write):  # noqa: F811
    def start(name, *options, keys=RUN):
        folder = write(name, **keys)
        return Watch(lab, submit(lab, name, 2, *options, **DDP), folder)

    return start


def test_the_time_is_up_three_times_in_a_row(lab, start, write, costs):  # noqa: F811
    """Six minutes, the warning five minutes before their end, as the batch file has it."""
    plain = write("long", **LONG)
    assert lab.wait(submit(lab, "long", 2, **DDP), seconds=900) == "COMPLETED"
    run = start("wall", "--time=6", keys=LONG)
    for restart in range(3):
        run.until(lambda n=restart: (run.folder / "REQUEUE").exists() or run.restarts() > n)
        run.disturbed(restart)
    costs["time limit"] = run.finish(metrics(plain))
    assert run.restarts() >= 3


def test_preempted_by_a_higher_partition(lab, start, undisturbed, costs):
    run = start("preempted")
    run.steps(60)
    words = ("--partition=urgent", "--nodes=3", "--exclusive", "--time=5", "--output=/dev/null", "--wrap=sleep 1")
    lab.sbatch(*words)
    run.disturbed(0)
    costs["preempted"] = run.finish(undisturbed)


def test_cancelled_and_submitted_again(lab, start, undisturbed, costs):
    run = start("cancelled_again")
    run.steps(60)
    lab.run("scancel", run.job)
    assert lab.wait(run.job) == "CANCELLED"
    run.job = submit(lab, "cancelled_again", 2, **DDP)
    run.disturbed(-1)
    costs["scancel"] = run.finish(undisturbed)


def test_a_node_is_lost_in_the_middle_of_a_step(lab, start, undisturbed, costs):
    run = start("crashed")
    run.steps(70)
    lab.ask("crash", "n2")
    run.disturbed(0)
    lab.ask("boot", "n2")
    costs["node lost in a step"] = run.finish(undisturbed)


def test_the_controller_is_restarted(lab, start, undisturbed, costs):
    run = start("controller")
    run.steps(60)
    began, step = time.monotonic(), steps_done(run.folder)
    lab.ask("restart")
    run.until(lambda: steps_done(run.folder) > step)
    assert run.restarts() == 0
    run.lost.append({"in the queue": 0.0, "to go on": round(time.monotonic() - began, 1), "steps lost": 0})
    costs["slurmctld restarted"] = run.finish(undisturbed)


def test_a_node_is_lost_in_the_middle_of_a_save(lab, start, write, costs):  # noqa: F811
    plain = write("heavy", **HEAVY)
    assert lab.wait(submit(lab, "heavy", 2, **DDP), seconds=600) == "COMPLETED"
    run = start("crashed_in_a_save", keys=HEAVY)
    checkpoints = run.folder / "checkpoints"
    run.until(lambda: (checkpoints / "step-0000005/COMPLETE").exists())
    run.until(lambda: any(checkpoints.glob(".tmp-*/*.safetensors*")))
    lab.ask("crash", "n2")
    assert any(checkpoints.glob(".tmp-*")) and not (checkpoints / "step-0000010").exists(), "the test does not test"
    run.disturbed(0)
    lab.ask("boot", "n2")
    costs["node lost in a save"] = run.finish(metrics(plain))
