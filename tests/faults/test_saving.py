"""A checkpoint that cannot be written while training goes on, and one that cannot be read: nothing that was saved is lost."""

import contextlib
import json
import shutil
import subprocess
import sys
import time

import pytest
from conftest import ROOT, WITHOUT_ROOTS_RIGHTS

STEPS = 200


@pytest.fixture
def flags(made, tiny_model, tmp_path):
    """Of cpt.py, saving after every second step."""
    shape = f"--max_length 64 --global_batch_size 4 --max_steps {STEPS} --learning_rate 1e-3 --save_steps 2".split()
    data = ("--model_name_or_path", tiny_model, "--datasets", f"{{path: {made}/shards}}")
    return (*data, *shape, "--output_dir", tmp_path / "run")


class Process:
    """A running cpt.py, forked or by itself, that writes what it has to say on standard error to a file."""

    def __init__(self, pid, poll, wait, errors):
        self.pid, self.poll, self._wait, self._errors = pid, poll, wait, errors

    def ended(self, seconds):
        """(exit code, what it said)."""
        return self._wait(seconds), self._errors.read_text()


@pytest.fixture
def start(server, flags, tmp_path):
    """Starts cpt.py, through `prefix` if given, and returns the Process; killed at the end."""
    log, errors = tmp_path / "log", tmp_path / "errors"
    with contextlib.ExitStack() as running:

        def begin(*more, prefix=()):
            if not prefix:
                forked = server.launch("single", (*flags, *more), log, processes=1, errors=str(errors))
                process = running.enter_context(forked)
                return Process(process.pids[0], process.poll, process.wait, errors)
            command = [*map(str, (*prefix, sys.executable, ROOT / "scripts" / "cpt.py", *flags, *more))]
            with log.open("w") as out, errors.open("w") as err:
                process = running.enter_context(subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=err))
            running.callback(process.kill)
            return Process(process.pid, process.poll, process.wait, errors)

        yield begin


def step_of(folder):
    """The last step in metrics.jsonl, 0 before the first."""
    try:
        return (folder / "metrics.jsonl").read_text().count("\n")
    except FileNotFoundError:
        return 0


def wait_until(true, process):
    while not true():
        assert process.poll() is None, process.ended(0)
        time.sleep(0.005)


def saved(folder):
    return sorted(marker.parent.name for marker in folder.glob("checkpoints/step-*/COMPLETE"))


def limit(process, size):
    """No file of `process` may grow beyond `size` bytes from now on: to the program the disk is full."""
    subprocess.run(["prlimit", f"--pid={process.pid}", f"--fsize={size}:unlimited"], check=True)


def test_where_the_disk_fills_up_the_run_stops_in_one_line_with_a_complete_checkpoint(start, tmp_path):
    process = start()
    wait_until(lambda: saved(tmp_path / "run"), process)
    limit(process, 100_000)
    code, said = process.ended(120)
    assert code == 2
    (line,) = said.splitlines()
    standing = saved(tmp_path / "run")
    assert line.startswith("error: the checkpoint of step ")
    assert "could not be written (rank 0: [Errno 27] File too large" in line
    assert line.endswith(f"the last complete one is {tmp_path}/run/checkpoints/{standing[-1]}")
    assert not list((tmp_path / "run" / "checkpoints").glob(".tmp-*")), "what fills the disk must not stay there"


def test_told_to_it_goes_on_and_saves_again_when_there_is_room(start, tmp_path):
    process = start("--on_save_failure", "continue")
    wait_until(lambda: saved(tmp_path / "run"), process)
    limit(process, 100_000)
    wait_until(lambda: "could not be written" in (tmp_path / "log").read_text(), process)
    failed_at = step_of(tmp_path / "run")
    standing = saved(tmp_path / "run")
    assert standing, "the one before it is still there"
    wait_until(lambda: step_of(tmp_path / "run") > failed_at + 10, process)
    limit(process, "unlimited")
    code, said = process.ended(300)
    assert code == 0, said
    assert saved(tmp_path / "run")[-1] == f"step-{STEPS:07d}"
    assert step_of(tmp_path / "run") == STEPS


def test_a_folder_that_vanishes_stops_the_run_and_what_was_saved_is_there_when_it_comes_back(start, tmp_path):
    process = start()
    checkpoints, away = tmp_path / "run" / "checkpoints", tmp_path / "away"
    wait_until(lambda: saved(tmp_path / "run"), process)
    checkpoints.rename(away)  # a network file system that is gone
    code, said = process.ended(120)
    assert code == 2
    assert "could not be written (rank 0: [Errno 2] No such file or directory" in said
    away.rename(checkpoints)
    standing = saved(tmp_path / "run")[-1]
    again = start()
    wait_until(lambda: "resumed" in (tmp_path / "log").read_text(), again)
    assert f"/checkpoints/{standing}" in (tmp_path / "log").read_text()


@pytest.mark.parametrize("policy", ["stop", "continue"])
def test_a_folder_that_turns_read_only_costs_no_checkpoint(start, policy, tmp_path):
    process = start("--on_save_failure", policy, prefix=WITHOUT_ROOTS_RIGHTS)
    checkpoints = tmp_path / "run" / "checkpoints"
    wait_until(lambda: saved(tmp_path / "run"), process)
    checkpoints.chmod(0o555)
    try:
        if policy == "continue":
            wait_until(lambda: "could not be written" in (tmp_path / "log").read_text(), process)
            failed_at = step_of(tmp_path / "run")
            wait_until(lambda: step_of(tmp_path / "run") > failed_at + 10, process)
        else:
            code, said = process.ended(120)
            assert code == 2
            assert "could not be written (rank 0: [Errno 13] Permission denied" in said
        standing = saved(tmp_path / "run")
        assert standing
    finally:
        checkpoints.chmod(0o755)
    if policy == "continue":
        code, said = process.ended(300)
        assert code == 0, said
        assert saved(tmp_path / "run")[-1] == f"step-{STEPS:07d}"


def test_a_damaged_checkpoint_is_named_and_the_older_one_is_offered_and_works(run, flags, tmp_path):
    run("scripts/cpt.py", *flags, "--stop_at_step", 6)
    folder = tmp_path / "run"
    assert saved(folder) == ["step-0000004", "step-0000006"]
    whole = folder / "checkpoints" / "step-0000006"
    for name in ("rank-00000.safetensors", "rank-00000.json", "trainer.json", "index.json"):
        content = (whole / name).read_bytes()
        for broken in (content[: len(content) // 2], content[:-3] + bytes([content[-3] ^ 4]) + content[-2:]):
            (whole / name).write_bytes(broken)
            (line,) = run("scripts/cpt.py", *flags, "--stop_at_step", 7, code=2).stderr.splitlines()
            assert f"{whole}/{name}" in line
            way_out = f"move it away (mv {whole} {whole}.damaged) and the same command goes on from step-0000004"
            assert way_out in line
            (whole / name).write_bytes(content)
    shutil.move(whole, f"{whole}.damaged")
    run("scripts/cpt.py", *flags, "--stop_at_step", 7)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == list(range(1, 8))
    assert saved(folder)[-1] == "step-0000007"
