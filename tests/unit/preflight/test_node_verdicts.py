"""What the numbers of all nodes say: each mistake, as numbers, gets its line; good numbers get none. And what nvidia-smi says of a node."""

import pytest

from dilqur.common.errors import InputError
from dilqur.preflight import node_verdicts as verdict
from dilqur.preflight.findings import Skipped
from dilqur.preflight.node_facts import node_facts

HOSTS = ["n1", "n2", "n3"]


def node(used=4 << 20, holders=(), driver="580.82.07", given=1, gpus=1, torch="2.13.0", processes=1):
    shown = [{"index": str(i), "uuid": f"GPU-{i}", "name": "H100", "used": used, "mig": False} for i in range(gpus)]
    facts = {"given": given, "gpus": shown, "holders": list(holders), "driver": driver, "processes": processes}
    return {**facts, "versions": {"Python": "3.11.7", "torch": torch}}


def holder(name="python", gpu="GPU-0", used=60_000 << 20):
    return {"pid": 42, "name": name, "used": used, "gpu": gpu}


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
    (verdict.check_gpu_in_use, (HOSTS, [node()] * 3), "no process holds memory of a GPU"),
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
        verdict.check_gpu_in_use, (HOSTS, with_second(holders=[holder()])),
        "n2: GPU memory is held by python (pid 42, 62.9 GB)",
    ),
    "memory that nobody seems to hold": (
        verdict.check_gpu_in_use, (HOSTS, with_second(used=60_000 << 20)), "n2: 62.9 GB of GPU 0 are in use, and by no process"
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
    assert verdict.check_gpu_in_use(HOSTS, [node(gpus=0)] * 3) is None


def test_of_two_nodes_nobody_can_say_which_is_slow():
    assert verdict.check_links(["n1", "n2"], [{"n2": 1.0}, {"n1": 1.0}]) is None


def test_bus_bandwidth_as_in_nccl_tests():
    """Its example: the time of an all-reduce does not tell a link's rate, 2 (n - 1) / n of its bytes do."""
    assert verdict.bus_bandwidth(2, 1e9, 1.0) == 1e9 and verdict.bus_bandwidth(8, 1e9, 1.0) == 1.75e9


# -- a node that is shared --------------------------------------------------------------------------------------------

WHOLE = """GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-afddd1b4-4464-96c8-a712-aaeb0acf1170)
GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-6faf0136-7870-5767-10be-a0827a158829)
GPU 2: NVIDIA H100 80GB HBM3 (UUID: GPU-20d20fc3-bcc7-e715-32d6-ffd646ea062f)
"""
DIVIDED = """GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-838f60d9-651f-9166-ea42-f9da674a6947)
  MIG 3g.20gb     Device  0: (UUID: MIG-ffda444c-c706-57c6-98c9-67c441a0b109)
  MIG 1g.5gb      Device  1: (UUID: MIG-fe9bc608-60f5-5479-8cc4-1827021d27a9)
GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-c92e2d5d-4a69-f1cd-4df0-305f8606705a)
"""
HELD_BY = "GPU-afddd1b4-4464-96c8-a712-aaeb0acf1170, 4242, /usr/bin/python3, 69900"
SERVED_BY = "GPU-6faf0136-7870-5767-10be-a0827a158829, 3892, nvidia-cuda-mps-server, 28"


@pytest.fixture
def smi(tmp_path, monkeypatch):
    """Make nvidia-smi say this, and CUDA_VISIBLE_DEVICES too; returns node_facts with one process."""

    def say(listing, apps=(), used=("4", "4", "4"), visible=None):
        gpus = [line.split(": ") for line in listing.splitlines() if line.startswith("GPU")]
        rows = [
            f"{who[4:]}, {uuid.rstrip(')')}, {name.partition(' (')[0]}, {mib}, 580.82.07"
            for (who, name, uuid), mib in zip(gpus, used, strict=False)
        ]
        answers = {"--query-gpu*": rows, "--query-compute-apps*": apps, "-L": listing.splitlines()}
        cases = "".join(f"{what}) cat <<'EOF'\n" + "\n".join(said) + "\nEOF\n;;\n" for what, said in answers.items())
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\ncase $1 in\n{cases}esac\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        return {**node_facts(), "processes": 1}

    return say


@pytest.mark.parametrize(
    ("visible", "indices"),
    [
        (None, ["0", "1", "2"]),
        ("2,1", ["2", "1"]),
        ("GPU-20d20fc3-bcc7-e715-32d6-ffd646ea062f", ["2"]),
        ("GPU-6faf", ["1"]),
        ("1,9,2", ["1"]),
        ("-1", []),
        ("", []),
    ],
)
def test_the_gpus_of_a_job_are_those_that_cuda_visible_devices_names_in_its_order(smi, visible, indices):
    facts = smi(WHOLE, visible=visible)
    assert [gpu["index"] for gpu in facts["gpus"]] == indices
    assert facts["driver"] == ("580.82.07" if indices else None)


def test_of_a_shared_node_only_the_gpus_that_are_used_have_to_be_free(smi):
    busy = {"apps": [HELD_BY], "used": ("70000", "4", "4")}
    assert verdict.check_gpu_in_use(["n1"], [smi(WHOLE, **busy, visible="1")]) == "no process holds memory of a GPU"
    with pytest.raises(InputError, match=r"held by python3 \(pid 4242.* take free ones \(CUDA_VISIBLE_DEVICES=1\), or"):
        verdict.check_gpu_in_use(["n1"], [smi(WHOLE, **busy)])
    with pytest.raises(InputError) as found:
        verdict.check_gpu_in_use(["n1"], [smi(WHOLE, **busy, visible="0")])
    assert "take free ones" not in str(found.value), "it may use no other"
    with pytest.raises(InputError, match=r"70.* GB of GPU 0 are in use, and by no process .*CUDA_VISIBLE_DEVICES=1"):
        verdict.check_gpu_in_use(["n1"], [smi(WHOLE, used=("67000", "4", "4"))])


def test_an_mps_server_is_a_note_and_its_clients_are_holders(smi):
    said = verdict.check_gpu_in_use(["n1"], [smi(WHOLE, apps=[SERVED_BY], used=("4", "9000", "4"), visible="1")])
    assert "n1: an MPS server (pid 3892) shares GPU 1, of which 9.4 GB are in use" in said
    client = SERVED_BY.replace("nvidia-cuda-mps-server, 28", "/home/u/python, 8900")
    with pytest.raises(InputError, match="held by python"):
        verdict.check_gpu_in_use(["n1"], [smi(WHOLE, apps=[SERVED_BY, client], visible="1")])


@pytest.mark.parametrize(
    ("visible", "names"),
    [
        (None, ["NVIDIA A100-SXM4-40GB MIG 3g.20gb", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA A100-SXM4-40GB"]),
        ("MIG-fe9bc608-60f5-5479-8cc4-1827021d27a9", ["NVIDIA A100-SXM4-40GB MIG 1g.5gb"]),
        ("MIG-GPU-838f60d9-651f-9166-ea42-f9da674a6947/1/0", ["NVIDIA A100-SXM4-40GB MIG"]),
        ("MIG-00000000-of-a-container", ["NVIDIA A100-SXM4-40GB MIG"]),
        ("0", ["NVIDIA A100-SXM4-40GB MIG 3g.20gb"]),
        ("1", ["NVIDIA A100-SXM4-40GB"]),
    ],
)
def test_a_mig_slice_is_a_gpu_of_which_not_all_is_known(smi, visible, names):
    facts = smi(DIVIDED, used=("[Insufficient Permissions]", "4"), visible=visible)
    assert [gpu["name"] for gpu in facts["gpus"]] == names
    assert [gpu["mig"] for gpu in facts["gpus"]] == ["MIG" in name for name in names]
    said = verdict.check_gpu_in_use(["n1"], [facts])
    assert ("is a slice: MFU, power and temperature" in said) is ("MIG" in names[0])
    if visible and facts["gpus"][0]["mig"]:
        index = facts["gpus"][0]["index"]
        assert index == (visible if visible != "0" else "MIG-ffda444c-c706-57c6-98c9-67c441a0b109")
        devices = {"n1": [names[0]] * 2}
        with pytest.raises(InputError, match="CUDA shows a process one MIG slice"):
            verdict.check_gpus(["n1"], [{**facts, "processes": 2}], devices)
