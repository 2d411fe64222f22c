"""How well the model predicts text it is not trained on, while it trains: loss per token and bits per byte of `eval_datasets`."""

import math
import time

from dilqur.common.constants import IGNORE_INDEX
from dilqur.data.batches import evaluation_batches
from dilqur.training.stream import held_out_samples

SANITY_BATCHES = 2  # before the first step: an evaluation that cannot work fails now and not in hours


class Evaluation:
    """compute_loss, loss_and_correct: as the loop has them. seconds: how long the last whole one took."""

    def __init__(self, settings, accelerator, compute_loss, batch_size, loss_and_correct=None):
        self.settings, self.accelerator, self.batch_size = settings, accelerator, batch_size
        self.accuracy = loss_and_correct is not None
        self.measure = loss_and_correct or (lambda model, batch: (compute_loss(model, batch, 1), 0))
        self.seconds = 0.0

    def due(self, step, max_steps):
        """Is one due after `step` steps? At the end always."""
        every = self.settings.eval_steps
        return bool(self.settings.eval_datasets) and (step == max_steps or bool(every and step % every == 0))

    def run(self, model, interrupted, batches=None):
        """{"eval_loss": mean nats per token, "eval_bits_per_byte": …, "eval_accuracy" where it is measured, "eval_seconds"} over all ranks;
        None if it was interrupted.

        interrupted: function without arguments, asked on every rank before every batch. batches: no more than so many. Bits per byte: all
        predicted tokens' bits / the bytes of text they stand for, by the mean tokens a byte of the shards; of whole shards that is exact.
        Of masked tokens it is a pseudo-likelihood: bidirectional, not comparable with a causal model's.
        """
        import torch
        from accelerate.utils import send_to_device

        from dilqur.training.distributed import gather_over_ranks

        began, nats, tokens, utf8_bytes, right = time.perf_counter(), 0.0, 0.0, 0.0, 0.0
        model.eval()
        with torch.no_grad():
            for dataset in self.settings.eval_datasets:
                samples, total, count, correct = held_out_samples(self.settings, dataset), 0.0, 0, 0
                stream = evaluation_batches(
                    samples,
                    self.batch_size,
                    self.accelerator.process_index,
                    self.accelerator.num_processes,
                    self.settings.max_eval_samples,
                )
                for number, batch in enumerate(stream):
                    if number == batches:
                        break
                    if gather_over_ranks(self.accelerator, interrupted()).any():
                        model.train()
                        return None
                    count += int((batch["labels"] != IGNORE_INDEX).sum())
                    loss, correct_labels = self.measure(model, send_to_device(batch, self.accelerator.device))
                    total, correct = total + float(loss), correct + int(correct_labels)
                total, count, correct = gather_over_ranks(self.accelerator, total, count, correct).sum(0).tolist()
                nats, tokens, right = nats + total, tokens + count, right + correct
                utf8_bytes += count * samples.shards[0].bytes_per_token
        model.train()
        seconds = time.perf_counter() - began
        self.seconds = self.seconds if batches else seconds
        bits = nats / math.log(2) / utf8_bytes if utf8_bytes else None
        results = {"eval_loss": nats / tokens, "eval_bits_per_byte": bits}
        return results | ({"eval_accuracy": right / tokens} if self.accuracy else {}) | {"eval_seconds": seconds}
