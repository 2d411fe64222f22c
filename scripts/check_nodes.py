"""Checks in seconds, on the nodes of a job, what only they can tell: whether they reach each other, and whether one is not like the rest.

    sbatch --nodes=4 slurm/check_nodes.sbatch
    srun --nodes=4 --gres=gpu:8 --exclusive slurm/lib/launch.sh scripts/check_nodes.py      # the same, at once
    python scripts/check_nodes.py                                                       # this node, without Slurm

On one node, --num_processes 8 looks at eight GPUs.

slurm/lib/launch.sh starts one of it on every node, with the address and port that training would use; it starts a process for each GPU.
A line a check: GPUs and who holds their memory, versions, clocks, the shared folder, the node's own folder, the speed of each GPU, of each
node's link, and of an all-reduce. Exit code 2 if anything FAILs, and where a node is not heard of within --timeout_s. Nothing is left
behind. On CPUs it measures those, over gloo.
"""

import multiprocessing
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from dilqur.common.errors import EveryRankError, InputError
from dilqur.pipeline.program import program
from dilqur.pipeline.settings_parser import setting
from dilqur.preflight import node_verdicts as verdict
from dilqur.preflight.findings import Findings
from dilqur.preflight.node_facts import node_facts
from dilqur.preflight.node_meeting import SHARED_S, Rendezvous
from dilqur.preflight.node_speed import measure
from dilqur.preflight.planned import existing

GRACE_S = 5  # srun ends all nodes with the first that fails: let the first node say what it knows


@dataclass(kw_only=True)
class CheckNodesSettings:
    num_machines: Annotated[int, Field(ge=1)] = setting("nodes, as of accelerate launch", default=1)
    num_processes: Annotated[int, Field(ge=1)] = setting("of all nodes together: the GPUs", default=1)
    machine_rank: Annotated[int, Field(ge=0)] = setting("this node's, from 0", default=0)
    main_process_ip: str = setting("the first node's address", default="127.0.0.1")
    main_process_port: int = setting("and port; 0: a free one, with one node", default=0)
    machines: list[str] = setting("names of the nodes, for the messages", default_factory=list)
    run_dir: str = setting("the folder that all nodes share", default="runs", recorded=False)
    local_dir: str | None = setting("the node's own; DILQUR_LOCAL_DIR, or the temporary one", default=None)
    min_bus_bandwidth: Annotated[float, Field(gt=0)] | None = setting(
        "GB/s that an all-reduce has to reach", default=None
    )
    timeout_s: Annotated[int, Field(ge=1)] = setting("how long a node waits for the others", default=60)
    json: bool = setting("one JSON object on standard output", default=False, recorded=False)
    check: bool = setting("check the arguments, run nothing", default=False, recorded=False)


def start_processes(settings, port):
    """A process for each GPU of this node. Forked before anything here has threads or a GPU, to import torch once a node."""
    here, fork = settings.num_processes // settings.num_machines, multiprocessing.get_context("fork")
    shared = (settings.num_processes, settings.num_machines, settings.main_process_ip, port, settings.timeout_s)
    ranks = range(settings.machine_rank * here, (settings.machine_rank + 1) * here)
    workers = [fork.Process(target=measure, args=(rank, *shared), daemon=True) for rank in ranks]
    for worker in workers:
        worker.start()
    return workers


def check_together(settings, meeting, findings, shared, local):
    """What the nodes tell each other before any of them computes. Returns the names of the GPUs of all processes, None for one
    without; None where they cannot work together: not as many processes on each node, or no network between two of them."""
    hosts, here = meeting.machines, settings.num_processes // settings.num_machines
    facts = meeting.gather("facts", {**node_facts(), "processes": here})
    alike = len({fact["processes"] for fact in facts}) == 1
    names = [None] * settings.num_processes
    if alike:
        ranks = range(settings.num_processes)
        ready = meeting.collect(
            [f"ready/{r}" for r in ranks],
            lambda missing: f"{where(meeting, here, missing[0])}: its process has not started",
        )
        refuse_errors(
            meeting, here, ready, "CUDA fails", "nvidia-smi there says more; leave the node out until it is mended"
        )
        names = [one["device"] for one in ready]
    findings.run(
        "", verdict.check_gpus, hosts, facts, {h: names[i * here : (i + 1) * here] for i, h in enumerate(hosts)}
    )
    findings.run("", verdict.check_gpu_in_use, hosts, facts)
    findings.run("", verdict.check_versions, hosts, facts)
    connected = not settings.machines or findings.run("", verdict.check_network, hosts, meeting.unreachable())
    offsets, looks = meeting.clock_offsets(), meeting.write_and_look("shared", shared, SHARED_S)
    findings.run("", verdict.check_clocks, hosts, offsets, [look["ahead"] for look in looks])
    findings.run("", verdict.check_shared, hosts, shared, looks)
    if len(hosts) > 1:
        looks, free = meeting.write_and_look("local", local, 0), meeting.gather("free", free_bytes(local))
        findings.run("", verdict.check_local, hosts, local, looks, free)
    return names if alike and connected else None


def check_speed(settings, meeting, findings, names):
    """What each process measures."""
    hosts, here = meeting.machines, settings.num_processes // settings.num_machines
    if meeting.rank == 0:
        meeting.store.set("go", "1")
    ranks = range(settings.num_processes)
    told = meeting.collect(
        [f"speed/{rank}" for rank in ranks],
        lambda missing: (
            f"{where(meeting, here, missing[0])}: has not ended an all-reduce (NCCL_DEBUG=INFO says where it waits)"
        ),
    )
    refuse_errors(meeting, here, told, "an all-reduce failed", "NCCL_DEBUG=INFO says more")
    findings.run("", verdict.check_compute, [where(meeting, here, r) for r in ranks], names, [t["flops"] for t in told])
    if settings.num_processes > 1:
        backend = "nccl" if names[0] else "gloo"
        rates = [{hosts[int(k)]: rate for k, rate in told[i * here]["neighbours"].items()} for i in range(len(hosts))]
        findings.run("", verdict.check_links, hosts, rates)
        seconds = [one["all_reduce"] for one in told]
        wanted = settings.min_bus_bandwidth
        findings.run("", verdict.check_all_reduce, len(ranks), told[0]["bytes"], seconds, wanted, backend)


def refuse_errors(meeting, here, told, what, advice):
    for rank, one in enumerate(told):
        if "error" in one:
            raise EveryRankError(f"{where(meeting, here, rank)}: {what}: {one['error']}: {advice}")


def free_bytes(folder):
    return shutil.disk_usage(folder).free if folder.is_dir() else 0


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def where(meeting, here, rank):
    return f"{meeting.machines[rank // here]}, process {rank % here}" if here > 1 else meeting.machines[rank]


def check(settings):
    """InputError where the numbers do not go together."""
    nodes, rank = settings.num_machines, settings.machine_rank
    if settings.num_processes % nodes or rank >= nodes or len(settings.machines) not in (0, nodes):
        raise InputError(
            f"{settings.num_processes} processes on {nodes} nodes, of which this is {rank}: they do not go together"
        )
    if nodes > 1 and not settings.main_process_port:
        raise InputError("--main_process_port missing: the nodes meet there")


@program(CheckNodesSettings, check)
def main(settings):
    nodes, rank = settings.num_machines, settings.machine_rank
    machines = settings.machines or ([socket.gethostname()] if nodes == 1 else [f"node {i}" for i in range(nodes)])
    local = Path(
        settings.local_dir
        or os.environ.get("DILQUR_LOCAL_DIR")
        or os.environ.get("SLURM_TMPDIR")
        or tempfile.gettempdir()
    )

    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # else a node that goes is a page of frames
    import torch

    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) * nodes // settings.num_processes))
    port = settings.main_process_port or free_port()
    workers = start_processes(settings, port)
    if rank > 0:  # srun ends the others with the first node: with its exit code, not with 143
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    findings = Findings()
    try:
        meeting = Rendezvous(rank, machines, settings.main_process_ip, port, settings.timeout_s)
        names = check_together(settings, meeting, findings, existing(Path(settings.run_dir)), local)
        if names is not None:
            check_speed(settings, meeting, findings, names)
        if rank > 0:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # Python gives it back its own meaning while it ends
        meeting.leave()
    except InputError as problem:
        if rank > 0:
            if not isinstance(problem, EveryRankError):
                print(f"error: {problem}", file=sys.stderr, flush=True)
            time.sleep(GRACE_S)
            sys.exit(2)
        findings.add("", "meeting", "FAIL", str(problem))
    finally:
        for worker in workers:
            worker.kill()
    if rank == 0:
        findings.report(settings.json, machines=machines)


if __name__ == "__main__":
    main()
