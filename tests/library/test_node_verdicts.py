"""What the numbers of all nodes say: each mistake, as numbers, gets its line; good numbers get none."""

import pytest

from dilqur.errors import InputError
from dilqur.preflight import node_verdicts as verdict
from dilqur.preflight.findings import Skipped

HOSTS = ["n1", "n2", "n3"]


def node(used=4 << 20, holders=(), driver="580.82.07", given=1, gpus=1, torch="2.13.0", processes=1):
    shown = [{"index": str(i), "uuid": f"GPU-{i}", "name": "H100", "used": used} for i in range(gpus)]
    facts = {"given": given, "gpus": shown, "holders": list(holders), "driver": driver, "processes": processes}
    return {**facts, "versions": {"Python": "3.11.7", "torch": torch}}


def look(problem=None, seen=None, ahead=0.0):
    return {"problem": problem, "seen": seen or {}, "ahead": ahead}


def seen(n1, n2, n3):
    return [look(seen=n1), look(seen=n2), look(seen=n3)]


def with_second(**odd):
    return [node(), node(**odd), node()]


def h100(*names):
    return dict(zip(HOSTS, ([name] for name in names or ["H100"] * 3), strict=True))


GOOD = [
    (verdict.check_gpus, (HOSTS, [node()] * 3, h100()), "3 × H100, 1 on each of 3 nodes"),
    (verdict.check_holders, (HOSTS, [node()] * 3), "no process holds memory of a GPU"),
    (verdict.check_versions, (HOSTS, [node()] * 3), "driver 580.82.07, Python 3.11.7, torch 2.13.0 on all nodes"),
    (verdict.check_network, (HOSTS, [[], [], []]), "each of 3 nodes reaches the others"),
    (verdict.check_clocks, (HOSTS, [0.0, 0.02, -0.5], [0.0, 0.9, 0.0]), "within 0.500 s of each other"),
    (verdict.check_shared, (HOSTS, "runs", seen({"n2": 0.1}, {"n1": 3.0, "n3": 0.1}, {"n1": 0.1})), "files, after 3.0 s"),
    (verdict.check_local, (HOSTS, "/local", seen({"n2": None}, {"n1": None}, {"n1": None}), [3e9, 1e9, 2e9]), "1.0 GB free at least (n2)"),
    (verdict.check_compute, (HOSTS, ["H100"] * 3, [650e12, 600e12, 700e12]), "650 TFLOP/s a process (median), the slowest 92% of that"),
    (verdict.check_links, (HOSTS, [{"n2": 40e9}, {"n1": 40e9, "n3": 22e9}, {"n2": 22e9, "n1": 30e9}]), "the slowest node 75%"),
    (verdict.check_all_reduce, (8, 1 << 28, [0.001, 0.002], 100, "nccl"), "234.88 GB/s bus bandwidth over 8 processes"),
]  # fmt: skip

MISTAKES = {
    "a node with fewer GPUs": (
        verdict.check_gpus, (HOSTS, with_second(processes=7), h100()), "different numbers of GPUs: n1 1, n2 7, n3 1: leave it out"
    ),
    "a GPU that has fallen off its bus": (
        verdict.check_gpus, (HOSTS, with_second(gpus=0), h100()), "nvidia-smi shows different numbers of GPUs: n1 1, n2 0, n3 1"
    ),
    "a container without --nv": (verdict.check_gpus, (HOSTS, [node()] * 3, h100("H100", None, "H100")), "n2: no GPU for torch, and Slurm"),
    "a card of another kind": (
        verdict.check_gpus, (HOSTS, [node()] * 3, h100("H100", "A100", "H100")), "not all alike (2 × H100, 1 × A100): ask for one kind"
    ),
    "a process of an earlier job": (
        verdict.check_holders, (HOSTS, with_second(holders=[{"pid": 42, "name": "python", "used": 60_000 << 20}])),
        "n2: GPU memory is held by python (pid 42, 62.9 GB)",
    ),
    "memory that nobody seems to hold": (
        verdict.check_holders, (HOSTS, with_second(used=60_000 << 20)), "n2: 62.9 GB of GPU 0 are in use, and by no process"
    ),
    "an older driver": (verdict.check_versions, (HOSTS, with_second(driver="570.1")), "driver is 580.82.07, but n2 has 570.1"),
    "another torch": (verdict.check_versions, (HOSTS, with_second(torch="2.12.0")), "torch is 2.13.0, but n2 has 2.12.0: use the same"),
    "a firewall": (verdict.check_network, (HOSTS, [[], ["n3"], []]), "no connection n2 → n3: "),
    "a clock that is ahead": (verdict.check_clocks, (HOSTS, [0, 2.5, 0], [0, 0, 0]), "n2: its clock is 2.5 s ahead of the other nodes'"),
    "a clock that is behind": (verdict.check_clocks, (HOSTS, [0, 0, -90], [0, 0, 0]), "n3: its clock is 90.0 s behind the other nodes'"),
    "a file server's clock": (
        verdict.check_clocks, (HOSTS, [0, 0, 0], [7, 7, 7.5]), "n3: the clock of the shared folder is 7.5 s ahead of its own"
    ),
    "a folder that one node cannot write": (
        verdict.check_shared, (HOSTS, "runs", [look(), look("read-only file system"), look()]),
        "n2: cannot write to runs (read-only file system): every node writes",
    ),
    "a folder that one node has not mounted": (
        verdict.check_shared, (HOSTS, "runs", seen({"n2": 0.0}, {"n1": 0.0, "n3": None}, {"n1": None})),
        "n2 does not see what n3 wrote there; is the file system mounted on n3?",
    ),
    "a local folder that is not there": (
        verdict.check_local, (HOSTS, "/local", [look(), look(), look("no such file or directory")], [1, 1, 0]),
        "n3: cannot write to /local (no such file or directory): DILQUR_LOCAL_DIR in slurm/site.env",
    ),
    "a local folder that all share": (
        verdict.check_local, (HOSTS, "/scratch", seen({"n2": None}, {"n1": 0.0}, {"n1": None}), [1, 1, 1]),
        "/scratch is not node-local: n2 sees what n1 wrote there",
    ),
    "a slow GPU": (
        verdict.check_compute, (HOSTS, ["H100"] * 3, [650e12, 500e12, 660e12]), "median of 650 TFLOP/s: n2 (500 TFLOP/s, 23% less)"
    ),
    "a slow CPU": (verdict.check_compute, (HOSTS, [None] * 3, [0.1e12, 0.1e12, 0.04e12]), "n3 (0.04 TFLOP/s, 60% less)"),
    "a link at a quarter": (
        verdict.check_links, (HOSTS, [{"n2": 10e9, "n3": 40e9}, {"n1": 10e9, "n3": 10e9}, {"n1": 40e9, "n2": 10e9}]),
        "slower to reach than the median of 40.00 GB/s: n2 (10.00 GB/s)",
    ),
    "Ethernet instead of InfiniBand": (
        verdict.check_all_reduce, (16, 1 << 28, [0.5] * 16, 100, "nccl"), "over 16 processes (nccl, 256 MiB in 500.0 ms), 100 are"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("check", "numbers", "says"), GOOD, ids=lambda value: getattr(value, "__name__", ""))
def test_good_numbers(check, numbers, says):
    assert says in check(*numbers)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_it_is_found(mistake):
    check, numbers, says = MISTAKES[mistake]
    with pytest.raises(InputError) as found:
        check(*numbers)
    assert says in str(found.value) and "\n" not in str(found.value)


def test_without_gpus_the_cpus_are_measured():
    with pytest.raises(Skipped, match="no GPU on n1, n2, n3: the CPUs are measured, over gloo"):
        verdict.check_gpus(HOSTS, [node(gpus=0, given=0, driver=None)] * 3, {host: [None] for host in HOSTS})
    assert verdict.check_holders(HOSTS, [node(gpus=0)] * 3) is None


def test_of_two_nodes_nobody_can_say_which_is_slow():
    assert verdict.check_links(["n1", "n2"], [{"n2": 1.0}, {"n1": 1.0}]) is None


def test_bus_bandwidth_as_in_nccl_tests():
    """Its example: the time of an all-reduce does not tell a link's rate, 2 (n - 1) / n of its bytes do."""
    assert verdict.bus_bandwidth(2, 1e9, 1.0) == 1e9 and verdict.bus_bandwidth(8, 1e9, 1.0) == 1.75e9
