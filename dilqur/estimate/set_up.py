"""A stage on some GPUs under a strategy: all that planning says of it, and the fastest of many that fits."""

from dataclasses import dataclass, field
from types import SimpleNamespace

from dilqur.common.errors import InputError
from dilqur.estimate.hardware import GPU
from dilqur.estimate.host_memory import host_memory
from dilqur.estimate.job import Job
from dilqur.estimate.lora import ONE_GPU
from dilqur.estimate.memory import Memory, memory_of, residual_bytes
from dilqur.estimate.save_interval import save_interval
from dilqur.estimate.step_time import StepTime, step_time
from dilqur.estimate.strategy import ORDER, Strategy
from dilqur.pipeline.strategy import refuse_what_it_cannot

MAIN_MEMORY = 1e11  # bytes per second of a copy inside it


@dataclass(frozen=True)
class Site:
    """What only the site knows. disk: bytes per second that a job writes. price: per GPU hour, None if unknown."""

    disk: float = 1e9
    price: float | None = None


@dataclass(frozen=True)
class SetUp:
    """batch, accumulation: sequences of a micro-batch on a GPU, micro-batches of a step. misfit: why it cannot be done, None if it can."""

    job: Job
    gpu: GPU
    strategy: Strategy
    site: Site = field(default_factory=Site)
    batch: int = 0
    accumulation: int = 0
    memory: Memory | None = None
    time: StepTime | None = None
    misfit: str | None = None

    @property
    def largest_batch(self):
        return self.memory.largest_batch(self.gpu.memory)

    @property
    def activations(self):
        """For each token."""
        return self.job.activations(residual_bytes(self.job, self.strategy))

    @property
    def hours(self):
        """Of the whole stage, without evaluation, saves and failures; None where its steps are not known."""
        return self.job.steps and self.job.steps * self.time.step / 3600

    @property
    def gpu_hours(self):
        return self.hours and self.hours * self.strategy.gpus

    @property
    def kwh(self):
        """Of the GPUs at their boards' most; hosts, network and cooling come on top."""
        return self.hours and self.gpu_hours * self.gpu.watts / 1000

    @property
    def cost(self):
        return self.hours and self.site.price and self.gpu_hours * self.site.price

    @property
    def checkpoint_bytes(self):
        """Weights and both moments of what learns, dilqur/checkpoint/format.py; fp32 master weights under ZeRO. Of an adapter the
        weights, saved at the end alone."""
        return (1 if self.job.lora else 3) * self.job.weight * self.job.trained

    @property
    def host_memory(self):
        """{what: bytes} of a node's main memory."""
        return host_memory(self.job, self.strategy)

    @property
    def save_seconds(self):
        """(that training waits for a save, until it is written, between two saves): training waits while a GPU's part of it goes to main
        memory. None of an adapter, which is saved at the end alone."""
        if not self.job.save_steps:
            return None
        part = self.checkpoint_bytes / self.strategy.gpus
        stall = part / (MAIN_MEMORY if self.strategy.offload else self.gpu.host_link)
        write = self.checkpoint_bytes / self.site.disk
        return stall, write, save_interval(self.strategy.nodes, stall, write)

    def to_dict(self):
        """As JSON has it: bytes, seconds, and None for what is not known."""
        where = {
            "gpu": self.gpu.name,
            "nodes": self.strategy.nodes,
            "gpus_per_node": self.strategy.gpus_per_node,
            "strategy": self.strategy.name,
            "recomputed": self.job.recomputed,
        }
        if self.memory is None:
            return {**where, "fits": False, "why": self.misfit}
        activations = self.activations
        stall, write, best = self.save_seconds or (None, None, None)
        per_layer = {part: self.batch * self.job.max_length * size for part, size in activations.layer.items()}
        return {
            **where,
            "fits": self.misfit is None,
            "why": self.misfit,
            "per_device_train_batch_size": self.batch,
            "accumulation": self.accumulation,
            "largest_batch": self.largest_batch,
            "memory": {
                "card": self.gpu.memory,
                "total": self.memory.total(self.batch),
                "allocated": self.memory.allocated(self.batch),
                "terms": dict(self.memory.terms),
                "activations": self.batch * self.memory.each_sample,
                "activations_of_a_layer": per_layer,
                "loss": self.batch * self.job.max_length * activations.loss_peak,
            },
            "main_memory_of_a_node": {"total": sum(self.host_memory.values()), "terms": self.host_memory},
            "step_seconds": self.time.step,
            "compute_seconds": self.time.compute,
            "network_seconds": self.time.network,
            "optimizer_seconds": self.time.optimizer,
            "bound_by": self.time.bound_by,
            "bytes_sent_by_a_gpu": self.time.sent,
            "tokens_per_second": self.job.tokens / self.time.step,
            "hours": self.hours,
            "gpu_hours": self.gpu_hours,
            "kwh": self.kwh,
            "cost": self.cost,
            "checkpoint_bytes": self.checkpoint_bytes,
            "checkpoint_seconds": write,
            "checkpoint_stall_seconds": stall,
            "best_save_seconds": best,
            "best_save_steps": best and max(1, round(best / self.time.step)),
        }


def set_up(job, gpu, strategy, site=None, ceiling=None):
    """A SetUp. ceiling: largest micro-batch, that of the recipe unless given; "largest": that fits."""
    start = SetUp(job, gpu, strategy, site or Site())
    keys = {"dtype": "bfloat16" if job.weight == 2 else "float32"}
    try:
        refuse_what_it_cannot(SimpleNamespace(**keys), strategy.kind)
        if job.lora and strategy.kind not in ("single", "ddp"):
            raise InputError(ONE_GPU)
        if ceiling == "largest":
            most = memory_of(job, strategy).largest_batch(gpu.memory)
            ceiling = max(1, most)
        batch, accumulation = job.split(strategy.gpus, ceiling)
    except InputError as problem:
        return SetUp(job, gpu, strategy, start.site, misfit=str(problem))
    memory = memory_of(job, strategy, accumulation)
    misfit = None
    if batch > (most := memory.largest_batch(gpu.memory)):
        needs = f"{memory.total(batch) / 1e9:,.1f} GB for {batch} a GPU, which has {gpu.memory / 1e9:,.1f}"
        misfit = f"{needs}: at most {most}" if most else f"{needs}: not even 1 fits"
    return SetUp(
        job, gpu, strategy, start.site, batch, accumulation, memory, step_time(job, strategy, gpu, accumulation), misfit
    )


def fastest(launched, strategies):
    """The fastest SetUp that fits among `strategies`, with and without gradient checkpointing, micro-batches as large as fit; None if
    none does. Of those within 1 % of each other the simplest: what would be `launched`, a SetUp, then in the order of `ORDER`."""
    job, simplest = (
        launched.job,
        sorted(strategies, key=lambda s: ORDER.index(s.name) if s.name in ORDER else len(ORDER)),
    )
    tried = [launched] + [
        set_up(job.but(recomputed=recomputed), launched.gpu, strategy, launched.site, "largest")
        for recomputed in sorted({job.recomputed, 0.0, 1.0}, key=lambda share: share != job.recomputed)
        for strategy in simplest
    ]
    fits = [found for found in tried if found.misfit is None]
    if not fits:
        return None
    best = min(found.time.step for found in fits)
    return next(found for found in fits if found.time.step <= 1.01 * best)
