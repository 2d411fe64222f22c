"""How fast a process of a job is: its own products, an all-reduce with all others, and a message to and fro with its neighbours.

One process for each GPU over NCCL, or for each node over gloo. It tells the meeting's store, and its parent ends it where it hangs.
"""

import json
import statistics
import time
from datetime import timedelta

from dilqur.preflight.node_meeting import first_line


def measure(rank, processes, machines, address, port, timeout):
    """The whole life of process `rank`: `ready/RANK` with {"device": name of its GPU, or None}, then, once `go` is there, `speed/RANK`
    with {"flops", "all_reduce": seconds, "bytes", "neighbours": {node: bytes per second}}; {"error"} where either fails."""
    import torch
    from torch.distributed import TCPStore

    here = processes // machines
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", rank % here) if on_gpu else torch.device("cpu")
    try:
        store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=timeout))
    except Exception:  # the node itself does not reach the first one either, and says so
        return
    try:
        name = torch.cuda.get_device_name(device) if on_gpu else None
        store.set(f"ready/{rank}", json.dumps({"device": name}))
    except Exception as problem:  # whatever CUDA may raise: node 0 says it
        store.set(f"ready/{rank}", json.dumps({"error": first_line(problem)}))
        return
    try:
        store.wait(["go"])
    except Exception:  # the meeting is over, and has said why
        return
    try:
        said = speeds(torch, rank, processes, here, device, store, timeout)
    except Exception as problem:  # whatever NCCL or CUDA may raise: node 0 says it
        said = {"error": first_line(problem)}
    store.set(f"speed/{rank}", json.dumps(said))


def speeds(torch, rank, processes, here, device, store, timeout):
    import torch.distributed as dist

    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    flops = products_per_second(torch, device)
    if processes == 1:
        return {"flops": flops, "all_reduce": None, "bytes": 0, "neighbours": {}}
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=dist.PrefixStore("group", store),
        rank=rank,
        world_size=processes,
        timeout=timedelta(seconds=timeout),
        device_id=device if on_gpu else None,
    )
    numbers = torch.ones(
        (1 << 28 if on_gpu else 1 << 22) // 4, device=device
    )  # 256 MiB: large enough for a link's full rate
    seconds = median_seconds(torch, device, lambda: dist.all_reduce(numbers), rounds=10 if on_gpu else 5)
    neighbours = {}
    if rank % here == 0:
        for other in meetings(rank // here, processes // here):
            took = exchange(torch, dist, device, numbers, other * here, rounds=5)
            neighbours[other] = numbers.nbytes / took
    dist.barrier()
    dist.destroy_process_group()
    return {"flops": flops, "all_reduce": seconds, "bytes": numbers.nbytes, "neighbours": neighbours}


def products_per_second(torch, device):
    """Floating-point operations per second in a product of two square matrices; of a CPU its best, since others may work there too."""
    on_gpu = device.type == "cuda"
    size = 8192 if on_gpu else 512
    matrix = torch.randn(size, size, device=device, dtype=torch.bfloat16 if on_gpu else torch.float32)
    pick = statistics.median if on_gpu else min
    return 2 * size**3 / pick(timed(torch, device, lambda: matrix @ matrix, rounds=100 if on_gpu else 50))


def timed(torch, device, action, rounds):
    """Seconds of each round, after a few that are not counted."""
    seconds = []
    for number in range(rounds + 3):
        began = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if number >= 3:
            seconds.append(time.perf_counter() - began)
    return seconds


def median_seconds(torch, device, action, rounds):
    return statistics.median(timed(torch, device, action, rounds))


def meetings(node, nodes):
    """The neighbours that `node` of a ring of `nodes` exchanges with, in an order in which everybody has one partner at a time."""
    pairs = [(a, (a + 1) % nodes) for a in range(nodes if nodes > 2 else nodes - 1)]
    last = pairs[-1:] if nodes % 2 and nodes > 2 else []  # of an odd ring the closing pair is by itself
    rest = pairs[: len(pairs) - len(last)]
    return [a + b - node for a, b in (*rest[0::2], *rest[1::2], *last) if node in (a, b)]


def exchange(torch, dist, device, numbers, other, rounds):
    """Seconds in which `numbers` went to process `other` and as many came back: the best of a few rounds."""
    into = torch.empty_like(numbers)

    def both_ways():
        for work in dist.batch_isend_irecv(
            [dist.P2POp(dist.isend, numbers, other), dist.P2POp(dist.irecv, into, other)]
        ):
            work.wait()

    return min(timed(torch, device, both_ways, rounds))
