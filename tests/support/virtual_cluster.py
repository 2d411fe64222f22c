"""A real Slurm of virtual nodes for the tests in this folder: tests/slurm/lab, and a checkout that all its nodes see."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ENVIRONMENT

LAB = Path(__file__).parents[1] / "slurm" / "lab"
NEEDED = ("slurmctld", "slurmd", "sbatch", "munged", "ip")
ENDED = (
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "NODE_FAIL",
    "PREEMPTED",
    "BOOT_FAIL",
    "DEADLINE",
    "OUT_OF_MEMORY",
)


class Lab:
    """A cluster of `nodes` with `gpus` fake GPUs each, whose jobs run in `tree`. A context manager."""

    def __init__(self, folder, tree, nodes, gpus=1, **settings):
        self.tree, self.nodes = tree, nodes
        inherited = {k: v for k, v in ENVIRONMENT.items() if not k.startswith(("SLURM", "SBATCH", "DILQUR"))}
        venv = {"VIRTUAL_ENV": sys.prefix} if sys.prefix != sys.base_prefix else {}
        self.environment = {**inherited, **venv, "LAB_DIR": str(folder), "LAB_GPUS": str(gpus), **settings}

    def __enter__(self):
        self.ask("up", str(self.nodes))
        return self

    def __exit__(self, *exception):
        self.ask("down")

    def ask(self, *words, code=0, **environment):
        """A command of tests/slurm/lab, as a CompletedProcess."""
        environment = {**self.environment, **environment}
        done = subprocess.run(
            [LAB, *map(str, words)], cwd=self.tree, env=environment, capture_output=True, text=True, timeout=300
        )
        assert code is None or done.returncode == code, f"{words}\n{done.stdout}\n{done.stderr}"
        return done

    def run(self, *words, code=0, **environment):
        """A command on the login node, in the checkout."""
        return self.ask("run", *words, code=code, **environment)

    def sbatch(self, *words, **environment):
        """The number of the submitted job."""
        return self.run("sbatch", "--parsable", *words, **environment).stdout.split(";")[0].strip()

    def job(self, number):
        """What scontrol says of a job, {"JobState": …}."""
        said = self.run("scontrol", "show", "job", "-o", number).stdout
        return dict(word.split("=", 1) for word in said.split() if "=" in word)

    def wait(self, number, state=None, seconds=240):
        """Until a job is in this state, or has ended; its state."""
        end = time.monotonic() + seconds
        while (now := self.job(number)["JobState"]) not in (state, *ENDED):
            assert time.monotonic() < end, f"job {number} is {now} after {seconds} s\n{self.log(number)}"
            time.sleep(0.5)  # asking is five processes
        assert state in (None, now), f"job {number} is {now}, not {state}\n{self.log(number)}"
        return now

    def log(self, number):
        """What a job has printed."""
        return "".join(file.read_text() for file in self.tree.glob(f"*-{number}.out"))


def skip_where_impossible():
    """Skip where no lab can be made, with the reason; with DILQUR_LAB=required that is a failure."""
    missing = [name for name in NEEDED if not shutil.which(name)]
    reason = (
        "needs root" if os.geteuid() else missing and f"needs Debian's Slurm and munge: {', '.join(missing)} missing"
    )
    probe = "ip link add br0 type bridge && ip link add veth-a type veth peer name veth-b && mount -t tmpfs tmpfs /run"
    namespaces = ["unshare", "--net", "--mount", "--uts", "--pid", "--fork", "--mount-proc", "sh", "-c", probe]
    if not reason and subprocess.run(namespaces, capture_output=True).returncode:
        reason = "needs networks and mounts of its own, and this machine's root may not make them"
    if reason:
        assert os.environ.get("DILQUR_LAB") != "required", reason
        pytest.skip(f"a Slurm of virtual nodes {reason}")
