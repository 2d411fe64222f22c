"""Evaluation while training: over all ranks, in bits of the text's bytes, and interruptible."""

import math
from types import SimpleNamespace

import pytest
import torch
from make_shards import make_shards

from dilqur.training.distributed import make_accelerator
from dilqur.training.evaluation import Evaluation


@pytest.fixture(scope="module")
def accelerator():
    return make_accelerator(bf16=False, batch=4, accumulation=1, max_grad_norm=1.0)


@pytest.fixture
def settings(tmp_path):
    shards = make_shards(tmp_path / "shards", [30, 50, 80])
    return SimpleNamespace(
        eval_datasets=[{"path": str(shards)}], eval_steps=10, max_eval_samples=None, max_length=16, seed=1,
        intra_document_masking=False, masking=lambda: None,
    )  # fmt: skip


def two_nats_a_token(model, batch, tokens):
    return 2.0 * (batch["labels"] != -100).sum() / tokens


def never():
    return False


def test_it_is_due_every_eval_steps_and_at_the_end(settings, accelerator):
    evaluation = Evaluation(settings, accelerator, two_nats_a_token, 4)
    assert [step for step in range(1, 36) if evaluation.due(step, 35)] == [10, 20, 30, 35]
    settings.eval_steps = None
    assert [step for step in range(1, 36) if evaluation.due(step, 35)] == [35]
    settings.eval_datasets = None
    assert not evaluation.due(35, 35)


def test_loss_and_bits_are_of_all_tokens_and_the_text_they_stand_for(settings, accelerator):
    from dilqur.data.token_shards import TokenShards

    model = torch.nn.Linear(1, 1)
    results = Evaluation(settings, accelerator, two_nats_a_token, 4).run(model, never)
    assert results["eval_loss"] == pytest.approx(2.0)
    bytes_a_token = TokenShards(settings.eval_datasets[0]["path"]).bytes_per_token
    assert results["eval_bits_per_byte"] == pytest.approx(2.0 / math.log(2) / bytes_a_token)
    assert model.training


def test_asked_to_stop_it_stops_before_the_next_batch_and_the_model_trains_again(settings, accelerator):
    seen = []

    def loss(model, batch, tokens):
        seen.append(model.training)
        return two_nats_a_token(model, batch, tokens)

    model = torch.nn.Linear(1, 1)
    assert Evaluation(settings, accelerator, loss, 4).run(model, lambda: len(seen) == 2) is None
    assert seen == [False, False]
    assert model.training


def test_before_the_first_step_two_batches_are_enough_and_do_not_count_as_its_time(settings, accelerator):
    seen = []
    evaluation = Evaluation(settings, accelerator, lambda *a: seen.append(1) or two_nats_a_token(*a), 2)
    evaluation.run(torch.nn.Linear(1, 1), never, batches=2)
    assert len(seen) == 2
    assert evaluation.seconds == 0.0
