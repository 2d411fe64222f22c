"""The kill campaign, a short one: `python tests/faults/kill_training.py --kills 100` is the whole."""

import json
import subprocess
import sys

from conftest import ROOT


def test_killed_again_and_again_a_training_run_loses_nothing():
    command = [sys.executable, ROOT / "tests" / "faults" / "kill_training.py", "--kills", "4"]
    command += ["--strategies", "fsdp2", "--steps", "100"]
    done = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["kills"] == 4
    assert result["inside_a_save"] >= 1, "the test does not test"
