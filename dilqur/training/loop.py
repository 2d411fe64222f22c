"""The training loop, under scripts/cpt.py and scripts/mlm.py.

Set-up is dilqur/training/set_up.py's, what a step works with dilqur/training/run.py's, and what strategies do differently
dilqur/training/distributed.py's. A run is a function of its recipe: the same losses on the same number of processes, to the bit, whether or
not it was killed on the way.
"""

import math
import time
from dataclasses import dataclass

import torch
from accelerate.utils import send_to_device

from dilqur.checkpoint.steps import complete_checkpoints
from dilqur.common.constants import IGNORE_INDEX
from dilqur.common.errors import EveryRankError
from dilqur.training.distributed import backward, broadcast, clip_and_step, gather_over_ranks
from dilqur.training.finish import finish
from dilqur.training.optimizer import set_learning_rate
from dilqur.training.profiling import PHASES
from dilqur.training.set_up import set_up


def train(settings, stage, task):
    """Train `task.model` as `settings` say, in `stage`'s folder; leave model/ and a manifest there, or a checkpoint and REQUEUE.

    settings: TrainingSettings. stage: Stage. task: dilqur.training.run.Task. Raises InputError for settings, data or a
    checkpoint that do not go together, and where a checkpoint cannot be read or written."""
    run = set_up(settings, stage, task)
    with run:  # its data loader's workers and checkpoint writer end with it, however it ends
        run.evaluate_before_the_first_step()
        while run.progress.step < run.max_steps:
            began = time.perf_counter()
            micro_batches = run.next_micro_batches()
            data_wait = time.perf_counter() - began
            tokens, save_now = agree(run, micro_batches)
            if run.stopped:
                break
            if save_now:
                began += run.save()  # training waited for it: no part of the step
            report = train_step(run, micro_batches, tokens)
            values = step_values(run, report, tokens, began, data_wait)
            if run.evaluation.due(run.progress.step, run.max_steps):
                values |= run.evaluate()
            run.log(values)
            if not report.finite:
                warn_of_a_skipped_step(run, values)
            elif run.progress.step % settings.save_steps == 0:
                run.save()
            run.profile.step()
    finish(run)


def agree(run, micro_batches):
    """What all ranks have to know before a step: (tokens with a label in the global batch, is it time to save). Sets `run.stopped`."""
    run.watch("waiting for the other ranks")
    valid = sum(int((batch["labels"] != IGNORE_INDEX).sum()) for batch in micro_batches)
    asked = (valid, run.asked_to_stop(), run.writer.failed, run.main and run.saving.is_overdue(run.progress.step))
    tokens, stop, failed, save_now = gather_over_ranks(run.accelerator, *asked).sum(0).tolist()
    if failed:
        run.saving.on_write_error()
    if stop:
        reason = run.interrupt.stop_reason(run.progress.step)
        run.stopped = broadcast(run.accelerator, reason) or "a signal came to another rank"
    return tokens, save_now and not run.progress.skipped_in_a_row


@dataclass
class StepReport:
    """loss: this rank's part of the mean over the global batch, a 0-d tensor. norm: of all gradients, before clipping. rate: the learning
    rate."""

    loss: torch.Tensor
    norm: float
    rate: float

    @property
    def finite(self):
        return math.isfinite(self.norm)


def train_step(run, micro_batches, tokens):
    """One optimizer step: the gradient is that of the mean loss over all `tokens` of the global batch, over ranks and micro-batches. Where
    it is not finite, no rank steps. Returns a StepReport."""
    run.watch("forward and backward")
    rate, loss = set_learning_rate(run.optimizer, run.progress.step, run.settings, run.max_steps), 0.0
    for batch in micro_batches:
        batch = send_to_device(batch, run.accelerator.device, non_blocking=True)
        run.phases.begin()
        with run.accelerator.accumulate(run.model):
            part = run.task.compute_loss(run.model, batch, tokens)
            run.phases.end("forward")
            backward(run.accelerator, part)
            loss += part.detach()
        run.phases.end("backward")
    norm = clip_and_step(run.accelerator, run.model, run.optimizer, run.settings.max_grad_norm)
    run.phases.end("optimizer")
    report = StepReport(loss, norm, rate)
    run.progress.advance(report.finite)
    return report


def step_values(run, report, tokens, began, data_wait):
    """{name: number} of this step's line in metrics.jsonl, over all ranks; dilqur/training/metrics.py says what each is."""
    run.watch("summing its metrics over the ranks")
    loss = float(report.loss)  # on a GPU this waits for the whole step, the optimizer too
    took = (time.perf_counter() - began, data_wait, *run.phases.seconds())
    ranks = gather_over_ranks(run.accelerator, loss, *took, run.peak_memory_gb())
    _, seconds, data_wait, *phases, memory = ranks.max(0).values.tolist()
    run.interrupt.observe_duration("a step", seconds)
    values = {
        "loss": ranks[:, 0].sum().item(),
        "grad_norm": report.norm,
        "learning_rate": report.rate,
        "tokens_per_second": tokens / seconds,
        "tokens_per_second_all": run.progress.tokens_per_step / seconds,
        "step_seconds": seconds,
        "step_seconds_median": ranks[:, 1].median().item(),
        "data_wait_seconds": data_wait,
        **{f"{phase}_seconds": value for phase, value in zip(PHASES, phases, strict=True)},
    }
    return values | run.gpu_values(values["tokens_per_second_all"], memory) | run.stall_values() | run.progress.values()


def warn_of_a_skipped_step(run, values):
    """Raises EveryRankError where the last `max_skipped_steps` steps were all skipped."""
    progress = run.progress
    first, last = progress.position - progress.skipped_in_a_row * progress.global_batch_size, progress.position - 1
    run.say(
        f"warning: step {progress.step} skipped on all ranks: loss {values['loss']}, gradient norm {values['grad_norm']}; its samples are "
        f"the {progress.global_batch_size} from position {last + 1 - progress.global_batch_size} on"
    )
    if progress.skipped_in_a_row >= run.settings.max_skipped_steps:
        run.writer.wait()
        complete = complete_checkpoints(run.writer.folder)
        raise EveryRankError(
            f"{run.stage.folder}: {progress.skipped_in_a_row} steps in a row had no finite loss or gradient: the samples of positions "
            f"{first} to {last}; no checkpoint contains them, the last one is {complete[-1].name if complete else 'none'}. Look at "
            "the data there, or lower learning_rate"
        )
