"""Checks of the cluster: would Slurm take each batch file, and has it what the file asks for?

Slurm itself says what a batch file asks for under the site's settings (`sbatch -v --test-only`, which submits nothing). What it would take
but never start (a time beyond the partition's, an account the partition does not let in) is compared here, since many clusters
let such a job wait for ever.
"""

import contextlib
import getpass
import re
import subprocess
from dataclasses import dataclass

from dilqur.common.constants import ROOT
from dilqur.common.errors import InputError
from dilqur.preflight.batch_file import clock, gpus_in, seconds_of
from dilqur.preflight.findings import Skipped

SECONDS = 10
ADVICE = {  # words of sbatch's: what to do
    "account": "SBATCH_ACCOUNT in slurm/site.env; sacctmgr show associations user=$USER lists yours",
    "qos": "SBATCH_QOS in slurm/site.env; sacctmgr show qos lists them",
    "feature": "SBATCH_CONSTRAINT in slurm/site.env; sinfo -o '%P %f' lists them",
    "reservation": "SBATCH_RESERVATION; scontrol show reservation lists them",
    "time": "DILQUR_MAX_TIME in slurm/site.env; sinfo -o '%P %l' lists the limits",
    "memory": "DILQUR_OPTIONS in slurm/site.env; sinfo -o '%P %m' lists what nodes have",
    "configuration": "sinfo -o '%P %D %c %m %G %f' lists what nodes have",
}


@dataclass
class Partition:
    """groups: [(nodes, GPUs of each)]; seconds: the longest job, None without a limit; accounts: those let in, None for all."""

    name: str
    is_default: bool
    is_up: bool
    seconds: int | None
    groups: list
    accounts: set | None = None
    max_nodes: int | None = None

    def misfit(self, options, batch_file):
        """Why a job with these options would not run here, and what to do, or None."""
        account = options.get("account") or (self.accounts and default_account())
        if not self.is_up:
            return f"the partition {self.name} is down: choose another, or wait"
        if self.accounts is not None and account not in self.accounts:
            whose = f"is for the accounts {', '.join(sorted(self.accounts))}"
            return f"the partition {self.name} {whose}, not {account or 'for none'}: SBATCH_ACCOUNT in slurm/site.env"
        most = max((gpus for _, gpus in self.groups), default=0)
        if batch_file.gpus > most:
            has = f"have {most} at most" if most else "have none"
            return (
                f"{batch_file.gpus} GPUs per node are asked for, nodes of the partition {self.name} {has}: another SBATCH_PARTITION"
                + (f", or --gres=gpu:{most} and more --nodes" if most else "")
            )
        nodes = sum(number for number, gpus in self.groups if gpus >= batch_file.gpus)
        nodes = min(nodes, self.max_nodes or nodes)
        if batch_file.nodes > nodes:
            with_gpus = f" with {batch_file.gpus} GPUs" if batch_file.gpus else ""
            return (
                f"{batch_file.nodes} nodes{with_gpus} are asked for, the partition {self.name} gives a job {nodes}: --nodes={nodes}, "
                "or another SBATCH_PARTITION"
            )
        if self.seconds and (batch_file.seconds or 0) > self.seconds:
            return (
                f"--time is {clock(batch_file.seconds)}, the partition {self.name} allows {clock(self.seconds)}: "
                f"DILQUR_MAX_TIME={clock(self.seconds)} in slurm/site.env"
            )
        return None


def check_slurm(partitions):
    """Slurm answers. What it says of its partitions is added to `partitions`, {name: Partition}."""
    groups = ask(["sinfo", "-h", "-o", "%P|%G|%D|%l|%a"])
    for line in groups.splitlines():
        name, gres, nodes, limit, state = line.split("|")
        row = partitions.setdefault(
            name.rstrip("*"), Partition(name.rstrip("*"), name.endswith("*"), state == "up", seconds_of(limit), [])
        )
        row.groups.append((int(nodes), gpus_in(gres)))
    for line in ask(["scontrol", "-o", "show", "partition"]).splitlines():
        keys = dict(word.split("=", 1) for word in line.split() if "=" in word)
        if row := partitions.get(keys.get("PartitionName")):
            row.accounts = None if keys.get("AllowAccounts", "ALL") == "ALL" else set(keys["AllowAccounts"].split(","))
            row.max_nodes = int(keys["MaxNodes"]) if keys.get("MaxNodes", "").isdecimal() else None
    return f"{len(partitions)} partitions: {', '.join(partitions)}"


def ask(command):
    """What a command of Slurm's prints. Raises Skipped where there is no Slurm, or none that answers."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except FileNotFoundError:
        raise Skipped("no Slurm here: batch files are checked as far as they say themselves") from None
    except subprocess.TimeoutExpired:
        raise Skipped(f"{command[0]} has not answered in {SECONDS} s: run this again when Slurm does") from None
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise Skipped(f"Slurm does not answer here ({last[0]}): run this again on a login node of the cluster")
    return done.stdout


def default_account():
    """That of this user, which a job has that asks for none; None where Slurm keeps no accounts."""
    with contextlib.suppress(Skipped):
        return ask(["sacctmgr", "-nP", "show", "user", getpass.getuser(), "format=DefaultAccount"]).strip() or None
    return None


def ask_sbatch(batch_file, recipe):
    """Let sbatch read a batch file as it would be submitted: its options are put into `batch_file`, and its verdict is returned,
    (whether it would take it, its words)."""
    script = 'source slurm/lib/read_site.sh >&2; sbatch -v --test-only "$@"'
    command = ["bash", "-c", script, "-", f"slurm/{batch_file.path.name}", recipe]
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        raise Skipped(f"sbatch has not answered in {SECONDS} s: run this again when Slurm does") from None
    listed, _, _ = done.stderr.partition("end of defined options")
    options = dict(re.findall(r"^sbatch: ([\w-]+) +: (.*)$", listed, re.M))
    if options:
        batch_file.options = {"account": options.pop("account", None), **options}
    lines = [line for line in done.stderr.splitlines() if re.search("to start at|error:|failure:|fatal:", line)]
    words = [re.sub("^(sbatch: |error: |fatal: |allocation failure: )+", "", line) for line in lines]
    return done.returncode == 0, "; ".join(words) or f"exit code {done.returncode}"


def check_submit(batch_file, recipe, partitions):
    """Slurm would take the batch file, and a partition has what it asks for. From then on its options are those that sbatch says."""
    if not partitions or not batch_file.path.exists():
        return None
    takes, words = ask_sbatch(batch_file, recipe)
    options = batch_file.options
    there = ", ".join(partitions)
    asked = options["partition"].split(",") if options.get("partition") else []
    asked = asked or re.findall(r"in partition (\S+)", words) or [p.name for p in partitions.values() if p.is_default]
    if not asked:
        raise InputError(f"no partition is asked for, and none is the default one: SBATCH_PARTITION, one of {there}")
    if unknown := [name for name in asked if name not in partitions]:
        raise InputError(
            f"{unknown[0]}: no such partition; there are: {there}: correct it in slurm/site.env (SBATCH_PARTITION)"
        )
    misfits = [partitions[name].misfit(options, batch_file) for name in asked]
    if all(misfits):
        raise InputError(misfits[0])
    if not takes:
        advice = next((what for word, what in ADVICE.items() if word in words.lower()), "ask the cluster's staff")
        raise InputError(f"sbatch refuses it: {words}: {advice}")
    return re.sub(r"^Job \d+ ", "Slurm would take it, ", words)
