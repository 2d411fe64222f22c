"""What the numbers of all nodes together say: pure functions, each a check in the sense of dilqur/preflight/findings.py.

hosts: the nodes' names, in the order of their ranks; the other lists are in the same order.
"""

import statistics
from collections import Counter

from dilqur.common.errors import InputError
from dilqur.preflight.findings import Skipped

# dilqur/pipeline/interrupt.py compares the time of a STOP file, as the file server or another node gives it, with its own clock to a second
CLOCK_S = 1.0
# GPUs of one model differ by 8 % on average in a matrix product (Sinha et al., "Not All GPUs Are Created Equal", SC 22); a synchronous
# step waits for the slowest. A CPU node may be shared with others.
SLOWER = {"gpu": 0.15, "cpu": 0.5}
SLOWER_LINK = 0.5  # a link at half its lanes or one rail of two is down to half; others' traffic takes less than that
MPS = "nvidia-cuda-mps-server"  # its clients are holders by their own names
HELD = 1 << 30  # a driver, a display or a monitor take a few hundred MB of a GPU
AVOID = "leave it out (DILQUR_EXCLUDE in slurm/site.env, sbatch --exclude) and tell the cluster's staff"


def check_gpus(hosts, facts, devices):
    """Every node has as many GPUs as the others and as Slurm gave it, all of one kind, and torch sees them.

    facts: as node_facts, with "processes"; devices: {node: the names of the GPUs of its processes, None for one without}."""
    processes = [fact["processes"] for fact in facts]
    if len(set(processes)) > 1:
        raise InputError(f"the nodes have different numbers of GPUs: {per_host(hosts, processes)}: {AVOID}")
    for host, fact in zip(hosts, facts, strict=True):
        if None in devices[host] and (fact["given"] or fact["gpus"]):
            who = f"Slurm gave it {fact['given']}" if fact["given"] else f"nvidia-smi shows {len(fact['gpus'])}"
            raise InputError(
                f"{host}: no GPU for torch, and {who}: does nvidia-smi answer there, is the driver new enough, and a container started "
                "with --nv?"
            )
    shown = [len(fact["gpus"]) for fact in facts]
    if len(set(shown)) > 1:
        raise InputError(f"nvidia-smi shows different numbers of GPUs: {per_host(hosts, shown)}: {AVOID}")
    if processes[0] > 1 and any(fact["gpus"] and fact["gpus"][0]["mig"] for fact in facts):
        raise InputError(
            "CUDA shows a process one MIG slice, and NCCL joins none: take one process, or a GPU that is not divided"
        )
    kinds = Counter(name for names in devices.values() for name in names)
    if len(kinds) > 1:
        which = ", ".join(f"{number} × {name or 'none'}" for name, number in kinds.items())
        raise InputError(f"the GPUs are not all alike ({which}): ask for one kind (DILQUR_GPUS or SBATCH_CONSTRAINT)")
    ((name, number),) = kinds.items()
    if name is None:
        raise Skipped(f"no GPU on {', '.join(hosts)}: the CPUs are measured, over gloo")
    return f"{number} × {name}, {number // len(hosts)} on each of {len(hosts)} nodes"


def check_gpu_in_use(hosts, facts):
    """Nobody holds memory of the GPUs that are used: of each node, the first `processes` of those it may use. An MPS server may."""
    if not any(fact["gpus"] for fact in facts):
        return None
    notes = []
    for host, fact in zip(hosts, facts, strict=True):
        gpus = {gpu["uuid"]: gpu for gpu in fact["gpus"][: fact["processes"]]}
        servers = {h["gpu"]: h for h in fact["holders"] if h["name"] == MPS}
        holders = [h for h in fact["holders"] if h["name"] != MPS]
        if mine := [h for h in holders if h["gpu"] in gpus]:
            held = ", ".join(f"{h['name']} (pid {h['pid']}, {h['used'] / 1e9:,.1f} GB)" for h in mine)
            raise InputError(
                f"{host}: GPU memory is held by {held}: left over from an earlier job? end it (kill PID there), "
                f"{_free(fact, holders)}or {AVOID}"
            )
        for uuid, gpu in gpus.items():
            if gpu["used"] > HELD and uuid not in servers:
                raise InputError(
                    f"{host}: {gpu['used'] / 1e9:,.1f} GB of GPU {gpu['index']} are in use, and by no process that can be seen from "
                    f"here: {_free(fact, holders)}{AVOID}"
                )
            if uuid in servers:
                notes.append(
                    f"{host}: an MPS server (pid {servers[uuid]['pid']}) shares GPU {gpu['index']}, of which {gpu['used'] / 1e9:,.1f} GB "
                    "are in use: other programs that it serves slow this one"
                )
            if gpu["mig"]:
                notes.append(
                    f"{host}: {gpu['name']} is a slice: MFU, power and temperature, and who holds memory, are not known of it"
                )
    return "; ".join(["no process holds memory of a GPU", *notes])


def _free(fact, holders):
    """Which other GPUs of the node could be taken, if there are enough."""
    held = {h["gpu"] for h in holders}
    free = [gpu["index"] for gpu in fact["gpus"] if gpu["uuid"] not in held and gpu["used"] <= HELD]
    enough = len(free) >= fact["processes"]
    return f"take free ones (CUDA_VISIBLE_DEVICES={','.join(free[: fact['processes']])}), " if enough else ""


def check_versions(hosts, facts):
    """Driver and versions are the same on all nodes."""
    every = [{"driver": fact["driver"], **fact["versions"]} for fact in facts]
    for what in every[0]:
        found = Counter(one[what] for one in every)
        if len(found) > 1:
            usual = found.most_common(1)[0][0]
            others = ", ".join(
                f"{h} has {one[what]}" for h, one in zip(hosts, every, strict=True) if one[what] != usual
            )
            raise InputError(f"{what} is {usual}, but {others}: use the same environment on all nodes, or {AVOID}")
    first = every[0]
    driver = f"driver {first['driver']}, " if first["driver"] else ""
    return f"{driver}Python {first['Python']}, torch {first['torch']} on all nodes"


def check_network(hosts, unreachable):
    """Every node reaches every other. unreachable: of each node, the names of those it does not reach."""
    pairs = [(host, other) for host, others in zip(hosts, unreachable, strict=True) for other in others]
    if pairs:
        shown = ", ".join(f"{host} → {other}" for host, other in pairs[:5]) + (
            f" and {len(pairs) - 5} more" if pairs[5:] else ""
        )
        raise InputError(
            f"no connection {shown}: does the name lead to a network that both are in, is there a firewall? NCCL_SOCKET_IFNAME and "
            f"GLOO_SOCKET_IFNAME in slurm/site.env choose one; or {AVOID}"
        )
    return f"each of {len(hosts)} nodes reaches the others"


def check_clocks(hosts, offsets, file_ahead):
    """Clocks agree, with each other and with the shared folder's. offsets, file_ahead: seconds."""
    for what, numbers in (("its clock", offsets), ("the clock of the shared folder", file_ahead)):
        host, worst = max(zip(hosts, numbers, strict=True), key=lambda pair: abs(pair[1]))
        if abs(worst) > CLOCK_S:
            other = "the other nodes'" if what == "its clock" else "its own"
            raise InputError(
                f"{host}: {what} is {abs(worst):,.1f} s {'ahead of' if worst > 0 else 'behind'} {other}: a request to stop could be "
                "taken for an old one, and jobs end early or late: chronyc tracking there; tell the cluster's staff"
            )
    return f"within {max(map(abs, offsets)):.3f} s of each other, within {max(map(abs, file_ahead)):.3f} s of the shared folder's"


def check_shared(hosts, folder, looks):
    """What one node writes into the shared folder, the others see. looks: of each node, as Rendezvous.write_and_look."""
    for host, look in zip(hosts, looks, strict=True):
        if look["problem"]:
            raise InputError(
                f"{host}: cannot write to {folder} ({look['problem']}): every node writes its part of a checkpoint there"
            )
    unseen = [
        (host, other) for host, look in zip(hosts, looks, strict=True) for other, s in look["seen"].items() if s is None
    ]
    if unseen:
        host, other = unseen[0]
        alone = [h for h in hosts if len(hosts) > 2 and all(h in pair for pair in unseen)]
        raise InputError(
            f"{folder} is not shared: {host} does not see what {other} wrote there; is the file system mounted on "
            f"{alone[0] if alone else 'all nodes'}? Give a --run_dir that every node sees"
        )
    longest = max((s for look in looks for s in look["seen"].values()), default=0.0)
    return f"{folder}: all nodes see each other's files" + (f", after {longest:.1f} s" if longest > 1 else "")


def check_local(hosts, folder, looks, free):
    """What one node writes into its own folder, no other sees. free: bytes there on each node."""
    for host, look in zip(hosts, looks, strict=True):
        if look["problem"]:
            raise InputError(
                f"{host}: cannot write to {folder} ({look['problem']}): DILQUR_LOCAL_DIR in slurm/site.env names one there"
            )
    for host, look in zip(hosts, looks, strict=True):
        if seen := [other for other, seconds in look["seen"].items() if seconds is not None]:
            raise InputError(
                f"{folder} is not node-local: {host} sees what {seen[0]} wrote there, and caches of compiled kernels would be torn: "
                "DILQUR_LOCAL_DIR, and TMPDIR, in slurm/site.env: a folder on the node's own disk"
            )
    least, host = min(zip(free, hosts, strict=True))
    return f"{folder}: each node's own, {least / 1e9:,.1f} GB free at least ({host})"


def check_compute(names, devices, flops):
    """No process is slower than the others. names: "n1, GPU 3" of each; devices: of each, None for a CPU; flops: operations per second."""
    middle = statistics.median(flops)
    limit = SLOWER["gpu" if devices[0] else "cpu"]
    slow = [(name, speed) for name, speed in zip(names, flops, strict=True) if speed < (1 - limit) * middle]
    if slow:
        shown = ", ".join(
            f"{name} ({speed / 1e12:,.3g} TFLOP/s, {1 - speed / middle:.0%} less)" for name, speed in slow
        )
        raise InputError(
            f"slower than the median of {middle / 1e12:,.3g} TFLOP/s: {shown}: every step would wait for it: {AVOID}"
        )
    return f"{middle / 1e12:,.3g} TFLOP/s a process (median), the slowest {min(flops) / middle:.0%} of that"


def check_links(hosts, neighbours):
    """No node is slow to reach. neighbours: of each node, {neighbour: bytes per second}; its best counts, since a pair is as slow as its
    slower node."""
    if len(hosts) < 3:
        return None  # of two, nobody can say which
    best = [max(rates.values()) for rates in neighbours]
    middle = statistics.median(best)
    slow = [(host, rate) for host, rate in zip(hosts, best, strict=True) if rate < (1 - SLOWER_LINK) * middle]
    if slow:
        shown = ", ".join(f"{host} ({rate / 1e9:,.2f} GB/s)" for host, rate in slow)
        raise InputError(f"slower to reach than the median of {middle / 1e9:,.2f} GB/s: {shown}: {AVOID}")
    return f"{middle / 1e9:,.2f} GB/s to and fro with a neighbour (median), the slowest node {min(best) / middle:.0%} of that"


def check_all_reduce(processes, size, seconds, least, backend):
    """The bus bandwidth of an all-reduce of `size` bytes, by the slowest process. least: GB/s wanted, None for no matter what."""
    rate = bus_bandwidth(processes, size, max(seconds))
    text = f"{rate / 1e9:,.2f} GB/s bus bandwidth over {processes} processes ({backend}, {size >> 20} MiB in {1000 * max(seconds):,.1f} ms)"
    if least and rate < 1e9 * least:
        raise InputError(
            f"{text}, {least:g} are wanted: NCCL_DEBUG=INFO says which network is taken; NCCL_SOCKET_IFNAME, NCCL_IB_HCA and FI_PROVIDER "
            "in slurm/site.env choose it"
        )
    return text


def bus_bandwidth(processes, size, seconds):
    """Bytes a second through each process's link in an all-reduce of `size` bytes: size / seconds × 2 (n - 1) / n, the least that n
    processes must send (nccl-tests, doc/PERFORMANCE.md). Comparable between numbers of processes, and with the hardware's own rate."""
    return size / seconds * 2 * (processes - 1) / processes


def per_host(hosts, numbers):
    return ", ".join(f"{host} {number}" for host, number in zip(hosts, numbers, strict=True))
