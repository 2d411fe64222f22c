"""How long a step takes: operations, what is sent, the optimizer's memory traffic, each against what the hardware can do.

Only one number here is not a data sheet's or counted: the GPU's efficiency, the share of its peak that a published run reached. What is
sent beside computing costs only what it is longer; the rest is added.
"""

from dataclasses import dataclass

from dilqur.estimate.hardware import HOST_BANDWIDTH


@dataclass(frozen=True)
class Collective:
    """bytes: of the whole tensor. passes: 1 for an all-gather or a reduce-scatter, 2 for an all-reduce. among: all GPUs, those of a
    node, or the nodes (each GPU with its like). times: a step. hidden: sent while the GPU computes."""

    what: str
    bytes: float
    passes: int
    among: str
    times: int
    hidden: bool = True


@dataclass(frozen=True)
class StepTime:
    """Seconds. sent: bytes per GPU sends in a step."""

    compute: float
    network_hidden: float
    network_exposed: float
    optimizer: float
    sent: float

    @property
    def step(self):
        return max(self.compute, self.network_hidden) + self.network_exposed + self.optimizer

    @property
    def network(self):
        return self.network_hidden + self.network_exposed

    @property
    def bound_by(self):
        """Which of them is the most of the step."""
        parts = {"compute": self.compute, "network": self.network, "optimizer": self.optimizer}
        return max(parts, key=parts.get)


def step_time(job, strategy, gpu, accumulation):
    """StepTime of a step of `accumulation` micro-batches."""
    compute = job.tokens / strategy.gpus * job.computed_flops_per_token() / (gpu.efficiency * gpu.peak)
    collectives = traffic(job, strategy, accumulation)
    hidden, exposed = (sum(seconds(c, strategy, gpu) for c in collectives if c.hidden is h) for h in (True, False))
    # AdamW reads weight, gradient and both moments, and writes all but the gradient
    touched = 7 * (4 if strategy.kind.startswith("zero") else job.weight) * job.trained / strategy.shards
    optimizer = touched / gpu.bandwidth
    if strategy.offload:  # on the CPU; shards go up for each gather, their gradients down
        optimizer = touched / (HOST_BANDWIDTH / strategy.gpus_per_node)
        gathers = 1 + strategy.reshards
        moved = accumulation * job.weight * (gathers * job.total + job.trained) / strategy.shards
        hidden += moved / gpu.host_link
    sent = sum(c.times * c.passes * _share(c, strategy) * _of_a_gpu(c, strategy) for c in collectives)
    return StepTime(compute, hidden, exposed, optimizer, sent)


def traffic(job, strategy, accumulation):
    """The Collectives of a step, by strategy: Rajbhandari et al. 2020 (ZeRO), Zhao et al. 2023 (FSDP, arXiv 2304.11277)."""
    if strategy.gpus == 1:
        return []
    if strategy.kind == "ddp":
        number = min(job.reduce, job.weight)
        return [Collective("gradients", number * job.trained, 2, "all", 1)]
    if strategy.kind in ("zero1", "zero2"):
        first = strategy.kind == "zero1"  # gradients are reduced once, in stage 2 each micro-batch's, to their owners
        gradients = (2, "all", 1) if first else (1, "all", accumulation)
        return [
            Collective(
                "gradients", job.reduce * job.trained, *gradients, hidden=False
            ),  # overlap_comm is off but in stage 3
            Collective("new weights", job.product * job.trained, 1, "all", 1, hidden=False),
        ]
    among = "node" if strategy.shards < strategy.gpus else "all"
    tail, _ = job.units()
    reduced = accumulation if strategy.kind == "zero3" or job.weight == 4 else 1
    gradients = min(job.reduce, 4) * job.trained
    out = [Collective("weights, forward", job.product * job.total, 1, among, accumulation)]
    if strategy.reshards:
        out.append(Collective("weights, backward", job.product * (job.total - tail), 1, among, accumulation))
    out.append(Collective("gradients", gradients, 1, among, reduced))
    if among == "node" and strategy.nodes > 1:
        out.append(Collective("gradients over nodes", gradients, 2, "nodes", reduced))
    return out


def seconds(collective, strategy, gpu):
    """By rings, as NCCL does it: in a pass each GPU sends (n - 1) / n of the tensor, and so does each node over its network (PERFORMANCE.md
    of nccl-tests)."""
    data = collective.times * collective.passes * _share(collective, strategy) * collective.bytes
    if collective.among == "nodes":
        return data / gpu.network
    inside = data / gpu.link if strategy.gpus_per_node > 1 else 0.0
    return max(inside, data / gpu.network) if collective.among == "all" and strategy.nodes > 1 else inside


def _share(collective, strategy):
    n = {"all": strategy.gpus, "node": strategy.gpus_per_node, "nodes": strategy.nodes}[collective.among]
    return (n - 1) / n


def _of_a_gpu(collective, strategy):
    """Bytes of the tensor that a GPU has to do with: between nodes its shard."""
    return collective.bytes / (strategy.gpus_per_node if collective.among == "nodes" else 1)
