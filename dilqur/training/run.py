"""A run: what is trained, how far it is, and everything that a step works with."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator

from dilqur.checkpoint.mirror import CheckpointMirror
from dilqur.checkpoint.writer import CheckpointWriter
from dilqur.data.batches import TokenSamples
from dilqur.pipeline.interrupt import Interrupt
from dilqur.pipeline.stage import Stage
from dilqur.training.distributed import broadcast
from dilqur.training.evaluation import SANITY_BATCHES, Evaluation
from dilqur.training.metrics import Metrics, gpu_health
from dilqur.training.profiling import StepPhases
from dilqur.training.saving import Saving
from dilqur.training.settings import TrainingSettings
from dilqur.training.watchdog import Watchdog


@dataclass
class Task:
    """What is trained, as a program gives it to the loop.

    compute_loss(model, batch, tokens): the summed loss of `batch` divided by `tokens`, a 0-d tensor.
    write_model(reader, folder): writes the model with the trained weights of a CheckpointReader into an empty folder,
    on rank 0. flops_per_token: of a step, for the MFU. loss_and_correct(model, batch): of an evaluation, the summed
    loss and how many labels were predicted correctly, two 0-d tensors; None: the loss alone. weights: where those of a
    model on the meta device lie (dilqur/training/initial_weights.py)."""

    model: torch.nn.Module
    compute_loss: Callable
    write_model: Callable
    flops_per_token: float | None = None
    loss_and_correct: Callable | None = None
    weights: object = None


@dataclass
class Progress:
    """The counters that a checkpoint keeps and a resumed run gets back. start: the position in the stream of samples
    where this run began."""

    start: int
    global_batch_size: int
    max_length: int
    step: int = 0
    skipped: int = 0
    optimizer_steps: int = 0
    skipped_in_a_row: int = 0

    @property
    def position(self):
        return self.start + self.step * self.global_batch_size

    @property
    def tokens_per_step(self):
        return self.global_batch_size * self.max_length

    def advance(self, finite):
        """A step was made or, where its gradient was not finite, skipped."""
        self.step += 1
        self.optimizer_steps += finite
        self.skipped += not finite
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1

    def values(self):
        """What metrics.jsonl says of it."""
        return {"skipped_steps": self.skipped} if self.skipped else {}

    def to_checkpoint(self):
        """What trainer.json says of it, beside the step."""
        return {
            "position": self.position,
            "tokens": self.step * self.tokens_per_step,
            "skipped_steps": self.skipped,
            "optimizer_steps": self.optimizer_steps,
        }


@dataclass
class Run:
    """Made by dilqur.training.set_up. batches: this rank's micro-batches, a list for each step. identity: what a checkpoint says of the run
    besides its progress. resumed_from: where it was told to begin. dataset_changes: {step: datasets}. stopped: why it stopped before its
    end. evaluation_missing: the last one that was due is not done. stall: seconds that training waited for saves since the last line of
    metrics."""

    settings: TrainingSettings
    stage: Stage
    task: Task
    accelerator: Accelerator
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    samples: TokenSamples
    batches: Iterator
    max_steps: int
    progress: Progress
    identity: dict
    resumed_from: str | None
    metrics: Metrics
    evaluation: Evaluation
    interrupt: Interrupt
    watchdog: Watchdog
    writer: CheckpointWriter
    saving: Saving
    mirror: CheckpointMirror | None
    phases: StepPhases
    profile: object
    peak_flops: float | None
    dataset_changes: dict = field(default_factory=dict)
    evaluation_missing: bool = False
    stopped: str | None = None
    stall: float = 0.0
    mirror_problem: str | None = None

    def __enter__(self):
        return self

    def __exit__(self, *raised):
        self.batches.close()
        return self.writer.__exit__(*raised)

    @property
    def main(self):
        return self.accelerator.is_main_process

    @property
    def on_gpu(self):
        return self.accelerator.device.type == "cuda"

    # -- data, evaluation, checkpoints ------------------------------------------------------------------------------------

    def next_micro_batches(self):
        """This rank's of the next step: dicts of CPU tensors."""
        if self.progress.step in self.dataset_changes:
            self.say(f"datasets from here on: {self.dataset_changes[self.progress.step]}")
        self.watch("reading its batch")
        return next(self.batches)

    def evaluate_before_the_first_step(self):
        """A few batches, so that an evaluation that cannot work fails now; and the one in which the run before was stopped."""
        step = self.progress.step
        if step < self.max_steps and self.settings.eval_datasets:
            self.evaluation.run(self.model, self.asked_to_stop_now, SANITY_BATCHES)
        if self.evaluation_missing:
            results = self.evaluate()
            if results and self.main:
                self.metrics.add(step, **results)
            self.saving.forget(step if results else None)  # that checkpoint does not know its evaluation

    def evaluate(self):
        """{name: number} of `eval_datasets`; {} if it was interrupted."""
        results = self.evaluation.run(self.model, self.asked_to_stop_now)
        self.evaluation_missing = results is None
        self.metrics.pauses["evaluation"] = (self.evaluation.seconds, self.settings.eval_steps or self.max_steps)
        return results or {}

    def save(self):
        """Start a checkpoint of this step; returns the seconds that training waited. A collective."""
        step = self.progress.step
        self.watchdog.at(f"saving step {step}", patient=True)
        known = {
            "resumed_from": self.resumed_from,
            "eval_loss": broadcast(self.accelerator, self.metrics.last(step, "eval_loss")),
        }
        model, trainer = (
            self.accelerator.unwrap_model(self.model),
            self.identity | self.progress.to_checkpoint() | known,
        )
        waited = self.saving.save(model, self.optimizer, step, trainer)
        self.metrics.pauses["checkpoint"] = (waited, self.settings.save_steps)
        self.stall += waited
        return waited

    # -- stopping, hanging ------------------------------------------------------------------------------------------------

    def asked_to_stop(self):
        """Is there a reason, as far as this rank knows, to stop before the next step?"""
        return self._knows(self.interrupt.stop_reason(self.progress.step) if self.main else None)

    def asked_to_stop_now(self):
        """The same in the middle of an evaluation."""
        self.watchdog.at(f"the evaluation of step {self.progress.step}")
        return self._knows(self.interrupt.urgent_reason() if self.main else None)

    def _knows(self, reason):
        return (reason if self.main else self.interrupt.signalled) is not None

    def watch(self, doing):
        """Note for the watchdog what the coming step is about to do."""
        self.watchdog.at(f"step {self.progress.step + 1}, {doing}")

    # -- metrics ----------------------------------------------------------------------------------------------------------

    def say(self, text):
        if self.main:
            self.metrics.say(text)

    def log(self, values):
        if self.main:
            self.metrics.log(self.progress.step, **values)
            if self.mirror and self.mirror.problem != self.mirror_problem:
                self.mirror_problem = self.mirror.problem
                self.say(f"warning: mirror_to {self.settings.mirror_to}: {self.mirror_problem or 'works again'}")

    def peak_memory_gb(self):
        """Of this rank's GPU since the start, GiB; 0.0 on a CPU."""
        return torch.cuda.max_memory_allocated() / 2**30 if self.on_gpu else 0.0

    def gpu_values(self, tokens_per_second, memory):
        """What metrics.jsonl says of GPUs: MFU, memory and, every ten steps, rank 0's health. memory: the largest of all ranks, GiB."""
        if not self.on_gpu:
            return {}
        values = {"peak_memory_gb": memory}
        if self.peak_flops and self.task.flops_per_token:
            world = self.accelerator.num_processes
            values["mfu"] = tokens_per_second * self.task.flops_per_token / (world * self.peak_flops)
        return values | (gpu_health() if self.main and self.progress.step % 10 == 0 else {})

    def stall_values(self):
        """What metrics.jsonl says of the saves since its last line."""
        waited, self.stall = self.stall, 0.0
        return {"checkpoint_stall_seconds": waited} if waited else {}
