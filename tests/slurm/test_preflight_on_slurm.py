"""preflight.py and check_nodes.py on a real Slurm of virtual nodes: mistakes only a cluster can have, each planted, each found.

`pytest tests/slurm/test_preflight_on_slurm.py -s` shows the lines, and how many were found.
"""

import contextlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from virtual_cluster import Lab, skip_where_impossible

PARTITIONS = """PartitionName=gpu Nodes=ALL Default=YES MaxTime=20:00:00
PartitionName=short Nodes=n1 MaxTime=1:00:00
PartitionName=project Nodes=ALL MaxTime=20:00:00 AllowAccounts=az123
PartitionName=closed Nodes=ALL MaxTime=20:00:00 State=DOWN"""
found = []


@pytest.fixture(scope="module")
def lab(tree, tmp_path_factory):
    """Three nodes of four fake GPUs, and a recipe `mini`."""
    skip_where_impossible()
    folder = tree / "recipes" / "mini"
    folder.mkdir()
    (folder / "pipeline.txt").write_text("clean data_tools/clean_corpus.py sft_1gpu\n")
    (folder / "clean.yaml").write_text(yaml.safe_dump({"input": ["recipes/quickstart/corpus/az"], "language": "az"}))
    with Lab(tmp_path_factory.mktemp("lab"), tree, 3, gpus=4, LAB_PARTITIONS=PARTITIONS) as running:
        yield running


def said(text):
    print(f"\n{text}", end="")
    found.append(text)


# -- on the login node ------------------------------------------------------------------------------------------------


SUBMIT = """
import json, os, pathlib, sys
from dilqur.preflight.batch_file import read_batch_file
from dilqur.preflight.cluster import check_slurm, check_submit
from dilqur.preflight.findings import Findings
partitions, before = {}, dict(os.environ)
check_slurm(partitions)
for batch, environment in json.loads(sys.argv[1]):
    os.environ.clear()
    os.environ.update({**before, **environment})
    findings = Findings()
    findings.run("", check_submit, read_batch_file(pathlib.Path(f"slurm/{batch}.sbatch")), "mini", partitions)
    print(json.dumps(findings.lines[0]))
"""


@pytest.fixture(scope="module")
def verdicts(lab):
    """{mistake: {"status", "text"}}: one process for all of them, since most of a run of preflight is its imports."""
    cases = json.dumps([[batch, environment] for batch, environment, _ in ON_THE_LOGIN_NODE.values()])
    done = lab.run(sys.executable, "-c", SUBMIT, cases, PYTHONPATH=str(lab.tree))
    return dict(zip(ON_THE_LOGIN_NODE, map(json.loads, done.stdout.splitlines()), strict=True))


ON_THE_LOGIN_NODE = {
    "a partition that does not exist": (
        "sft_1gpu", {"SBATCH_PARTITION": "gpuu"}, "gpuu: no such partition; there are: gpu, short, project, closed"
    ),
    "an account the partition does not let in": (
        "sft_1gpu", {"SBATCH_PARTITION": "project", "SBATCH_ACCOUNT": "az12"}, "is for the accounts az123, not az12: SBATCH_ACCOUNT"
    ),
    "no account for a partition that wants one": (
        "sft_1gpu", {"SBATCH_PARTITION": "project"}, "is for the accounts az123, not for none: SBATCH_ACCOUNT"
    ),
    "more GPUs than a node has": (
        "cpt_p5", {}, "8 GPUs per node are asked for, nodes of the partition gpu have 4 at most: another SBATCH_PARTITION, or --gres=gpu:4"
    ),
    "more nodes than the partition has": (
        "cpt_p4d", {"SBATCH_PARTITION": "short", "SBATCH_GRES": "gpu:4"},
        "2 nodes with 4 GPUs are asked for, the partition short gives a job 1: --nodes=1",
    ),
    "a time the partition does not give": (
        "sft_1gpu", {"SBATCH_PARTITION": "short"}, "--time is 04:00:00, the partition short allows 01:00:00: DILQUR_MAX_TIME=01:00:00"
    ),
    "a partition that is down": ("sft_1gpu", {"SBATCH_PARTITION": "closed"}, "the partition closed is down: choose another"),
    "a kind of node that there is not": (
        "sft_1gpu", {"SBATCH_CONSTRAINT": "a100"}, "sbatch refuses it: Invalid feature specification: SBATCH_CONSTRAINT in slurm/site.env"
    ),
    "a reservation that there is not": ("sft_1gpu", {"SBATCH_RESERVATION": "az"}, "Requested reservation is invalid: SBATCH_RESERVATION"),
    "more memory than a node has": ("sft_1gpu", {"SBATCH_MEM_PER_NODE": "900G"}, "sbatch refuses it: "),
}  # fmt: skip


@pytest.mark.parametrize("mistake", ON_THE_LOGIN_NODE)
def test_it_is_found_before_the_queue(verdicts, mistake):
    (*_, advice), line = ON_THE_LOGIN_NODE[mistake], verdicts[mistake]
    assert line["status"] == "FAIL" and advice in line["text"]
    said(line["text"])


def test_preflight_asks_slurm_as_the_site_file_wants_and_submits_nothing(lab):
    site = lab.tree / "slurm" / "site.env"
    asks = (
        "export SBATCH_PARTITION=project SBATCH_ACCOUNT=az123\nDILQUR_MAX_TIME=2:00:00 DILQUR_GPUS=--gpus-per-node=N\n"
    )
    site.write_text(f"{asks}source slurm/lib/site_sbatch.sh\n")
    try:
        done = lab.run(sys.executable, "scripts/preflight.py", "recipes/mini", PYTHONPATH=str(lab.tree))
    finally:
        site.unlink()
    lines = [line.split(None, 3) for line in done.stdout.splitlines()]
    assert ["ok", "site", "slurm/site.env:", "account az123, partition project"] in lines
    assert ["ok", "sft_1gpu.sbatch", "file", "02:00:00, warned 00:05:00 before its end"] in lines, (
        "four hours without the site"
    )
    (submit,) = [line[3] for line in lines if line[:3] == ["ok", "sft_1gpu.sbatch", "submit"]]
    assert submit.startswith("Slurm would take it, to start at ") and submit.endswith("in partition project")
    assert not lab.run("squeue", "-h").stdout


# -- on the nodes -----------------------------------------------------------------------------------------------------


def check_nodes(
    lab, *flags, nodes=3, options=(), launch=("slurm/lib/launch.sh", "scripts/check_nodes.py"), **environment
):
    """({check: (status, text)} as check_nodes.py says it on `nodes` nodes, all that was printed, exit code)."""
    srun = ("srun", f"--nodes={nodes}", "--kill-on-bad-exit=1", "--wait=0", *options)
    words = (*srun, *launch, "--timeout_s", "20", *flags)
    # /dev/shm is each node's own; /tmp may be the machine's, which all see
    environment = {"DILQUR_LOCAL_DIR": "/dev/shm", **environment}
    done = lab.run(*words, code=None, **environment)
    lines = [line.split(None, 2) for line in done.stdout.splitlines() if line.startswith(("ok ", "FAIL ", "skipped "))]
    return {check: (status, text) for status, check, text in lines}, done.stdout + done.stderr, done.returncode


def on(lab, node, *command):
    """A command in the namespaces of a node."""
    first = subprocess.run(
        ["pgrep", "-P", (lab_folder(lab) / "pid" / node).read_text().strip()], capture_output=True, text=True
    )
    enter = ["nsenter", "-t", first.stdout.split()[0], "--net", "--uts", "--mount", "--pid"]
    quiet = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen([*enter, *command], **quiet)


def lab_folder(lab):
    return Path(lab.environment["LAB_DIR"])


@contextlib.contextmanager
def silence(lab, node, address):
    """What `node` sends to an address goes nowhere."""
    nobody = ("lladdr", "02:00:00:00:00:99", "nud", "permanent")
    assert on(lab, node, "ip", "neigh", "replace", address, "dev", "eth0", *nobody).wait() == 0
    try:
        yield
    finally:
        on(lab, node, "ip", "neigh", "del", address, "dev", "eth0").wait()


def test_the_shipped_batch_file_finds_good_nodes_good(lab):
    options = ("--gres=none", "--nodes=2", "--time=5")
    job = lab.sbatch(*options, "slurm/check_nodes.sbatch", DILQUR_LOCAL_DIR="/dev/shm")
    assert lab.wait(job) == "COMPLETED", lab.log(job)
    lines = [line.split()[:2] for line in lab.log(job).splitlines() if line.startswith(("ok", "skipped"))]
    checks = ["versions", "network", "clocks", "shared", "local", "compute", "all_reduce"]
    assert lines == [["skipped", "gpus"], *(["ok", check] for check in checks)]
    assert not list(lab.tree.glob("**/.check-nodes-*")), "it leaves nothing behind"


def test_folders_that_are_not_what_they_should_be_gpus_torch_does_not_see_and_a_slow_link(lab):
    limit = ("root", "tbf", "rate", "200mbit", "burst", "64kb", "latency", "50ms")
    slow = shutil.which("tc") and on(lab, "n2", "tc", "qdisc", "add", "dev", "eth0", *limit).wait() == 0
    lines, out, code = check_nodes(lab, "--run_dir", "/run", options=["--gres=gpu:1"], DILQUR_LOCAL_DIR=str(lab.tree))
    on(lab, "n2", "tc", "qdisc", "del", "dev", "eth0", "root").wait()
    assert code == 2, out
    planted = {
        "shared": "/run is not shared: n1 does not see what n2 wrote there",
        "local": f"{lab.tree} is not node-local: n1 sees what n2 wrote there",
        "gpus": "n1: no GPU for torch, and Slurm gave it 1",
        **({"links": "GB/s: n2 ("} if slow else {}),
    }
    for check, advice in planted.items():
        status, text = lines[check]
        assert status == "FAIL" and advice in text, out
        said(text)


def test_a_node_without_a_cable_to_the_first_is_named(lab):
    with silence(lab, "n2", "10.77.0.1"):
        lines, out, code = check_nodes(lab, "--timeout_s", "5", nodes=2)
    assert code == 2 and lines["meeting"][1].startswith("n2: not heard of in 5 s"), out
    said(lines["meeting"][1])


def test_two_nodes_that_reach_the_first_but_not_each_other_are_named(lab):
    with silence(lab, "n3", "10.77.0.2"):
        lines, out, code = check_nodes(lab)
    assert code == 2 and lines["network"][0] == "FAIL", out
    assert lines["network"][1].startswith("no connection n2 → n3, n3 → n2: ") and "all_reduce" not in lines
    said(lines["network"][1])


def test_a_port_in_use_is_named_with_its_owner(lab):
    port = 25123
    listen = f"import socket, sys; server = socket.create_server(('', {port})); sys.stdin.read()"
    holder = on(lab, "n1", sys.executable, "-c", listen)
    try:
        # as slurm/lib/launch.sh would, had the job the number 5123
        rank = f'exec "$0" scripts/check_nodes.py --num_machines 2 --num_processes 2 --main_process_ip n1 --main_process_port {port} '
        rank += '--machine_rank "$SLURM_NODEID" --machines n1 n2 "$@"'
        lines, out, code = check_nodes(
            lab, nodes=2, launch=("bash", "-c", rank, sys.executable), PYTHONPATH=str(lab.tree)
        )
    finally:
        holder.communicate()  # at the end of its standard input it ends
    assert code == 2 and lines["meeting"][1].startswith(f"port {port} of n1 is in use"), out
    said(lines["meeting"][1])


def test_a_graphics_card_whose_memory_another_holds_and_a_driver_that_differs(lab):
    """nvidia-smi stands in for a card: n2's is another one than n1's, and somebody is at work there."""
    smi = """#!/bin/bash
case "$1 $(hostname)" in
  --query-gpu*n1) echo '0, GPU-1, NVIDIA H100, 4, 580.82.07' ;;
  --query-gpu*n2) echo '0, GPU-2, NVIDIA H100, 70000, 570.10.01' ;;
  --query-compute-apps*n2) echo 'GPU-2, 4242, /usr/bin/python3, 69900' ;;
esac
"""
    program = lab.tree / "fakes" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text(smi)
    program.chmod(0o755)
    lines, out, code = check_nodes(lab, nodes=2, PATH=f"{program.parent}:{lab.environment['PATH']}")
    assert code == 2, out
    for check, advice in {
        "gpu_in_use": "n2: GPU memory is held by python3 (pid 4242, 73.3 GB): left over from an earlier job? end it",
        "versions": "driver is 580.82.07, but n2 has 570.10.01: use the same environment on all nodes",
        "gpus": "n1: no GPU for torch, and nvidia-smi shows 1",
    }.items():
        assert lines[check][0] == "FAIL" and advice in lines[check][1], out
        said(lines[check][1])


def test_so_many_were_planted_and_found():
    print(f"\n{len(found)} planted mistakes found on Slurm")
