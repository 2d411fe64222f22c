"""The kill campaign, a short one: `python tests/support/kill_training.py --kills 100` is the whole."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.parametrize(("program", "strategy"), [("cpt", "fsdp2"), ("mlm", "zero2")])
def test_killed_again_and_again_a_training_run_loses_nothing(program, strategy):
    command = [sys.executable, ROOT / "tests" / "support" / "kill_training.py", "--kills", "2"]
    command += ["--program", program, "--strategies", strategy, "--steps", "60"]
    done = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["kills"] == 2
    assert result["inside_a_save"] >= 1, "the test does not test"
