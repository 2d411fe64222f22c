"""Main memory of a node, while its processes load the model and while they save: no GPU shows it, and a job that has too little of it ends
with "Killed"."""

# A process with torch, transformers and DeepSpeed takes 0.5 GB on a CPU (benchmarks/loading_memory.py). What CUDA's context, NCCL and data
# workers take of the host is our allowance, not measured
PROCESS = 3e9
SHARDED = ("fsdp2", "zero3")  # whose ranks read their own rows of a model folder: dilqur/training/initial_weights.py


def host_memory(job, strategy):
    """{what: bytes} that a node holds at most. job: dilqur.estimate.job.Job. strategy: dilqur.estimate.strategy.Strategy.

    state: under offload, weights, gradients and moments. Beside it the larger of two that follow each other: loading, which is the whole
    model in each process (in fp32 where an adapter is merged), but of one that cpt.py continues under a strategy that shards it the two
    layers that benchmarks/loading_memory.py allows; checkpoint, the copy of what each process owns, weight and both moments, which torch
    rounds up to a power of two where it is pinned.
    """
    here, (_, layer) = strategy.gpus_per_node, job.units()
    terms = {"processes": here * PROCESS}
    if strategy.offload:
        terms["state"] = here * job.weight * (job.total + 3 * job.trained) / strategy.shards
    whole = 4 * job.total if job.lora else job.weight * job.total
    loading = here * (2 * job.weight * layer if job.read_by_rows and strategy.kind in SHARDED else whole)
    owned = 3 * job.weight * job.trained / strategy.gpus
    checkpoint = 0 if job.lora else here * (owned if strategy.offload else _power_of_two(owned))
    return terms | ({"loading": loading} if loading > checkpoint else {"checkpoint": checkpoint})


def _power_of_two(size):
    """The smallest that holds so many bytes."""
    return 1 << max(0, int(size) - 1).bit_length()
