"""What is trained, and how fast: schedules, weight decay, frozen parameters."""

from types import SimpleNamespace
from typing import get_args

import pytest

from dilqur.common.errors import InputError
from dilqur.training.optimizer import Schedule, freeze_all_but, learning_rate_at, make_optimizer

ADAMW = SimpleNamespace(
    learning_rate=1e-4,
    adam_beta1=0.9,
    adam_beta2=0.95,
    adam_epsilon=1e-8,
    weight_decay=0.1,
    dtype="float32",
    seed=1,
    optim=None,
)


@pytest.fixture
def llama():
    """Makes a tiny Llama, with tied embeddings or without."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(tied=True):
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=128,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                tie_word_embeddings=tied,
            )
        )

    return make


# -- schedules --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", get_args(Schedule))
def test_warm_up_climbs_by_equal_parts_and_its_last_step_has_the_peak(schedule):
    rates = [learning_rate_at(step, schedule, 2.4e-3, 4, 100) for step in range(5)]
    # the first step has a quarter, not 0: a step at rate 0 would be one lost; the schedule begins at the peak
    assert rates == pytest.approx([0.6e-3, 1.2e-3, 1.8e-3, 2.4e-3, 2.4e-3])


@pytest.mark.parametrize(
    ("schedule", "third", "half", "end"),
    [
        ("cosine", 0.75, 0.5, 0.0),  # (1 + cos 60°) / 2, (1 + cos 90°) / 2, (1 + cos 180°) / 2
        ("linear", 2 / 3, 0.5, 0.0),
        ("constant", 1.0, 1.0, 1.0),
    ],
)
@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_the_schedule_runs_from_the_peak_to_its_floor(schedule, third, half, end, floor):
    warmup, steps = 10, 70  # 60 steps after the warm-up: a third is 20
    rates = [learning_rate_at(warmup + after, schedule, 1.0, warmup, steps, floor) for after in (0, 20, 30, 60)]
    assert rates == pytest.approx([floor + (1 - floor) * share for share in (1.0, third, half, end)])


@pytest.mark.parametrize("schedule", get_args(Schedule))
def test_no_step_of_a_run_is_without_a_rate_and_it_never_rises_after_the_warm_up(schedule):
    for warmup, steps in ((0, 1), (0, 50), (5, 50), (49, 50)):  # one step only, and a warm-up as long as can be, too
        rates = [learning_rate_at(step, schedule, 1.0, warmup, steps) for step in range(steps)]
        assert min(rates) > 0
        assert max(rates) == 1.0
        after = rates[max(0, warmup - 1) :]
        assert after == sorted(after, reverse=True)


def test_warmup_stable_decay_stays_at_the_peak_and_falls_at_the_end_to_its_floor():
    rates = [learning_rate_at(step, "warmup_stable_decay", 1.0, 10, 100, 0.1, decay_steps=20) for step in range(101)]
    assert rates[10:81] == [1.0] * 71
    assert (rates[90], rates[100]) == pytest.approx((0.55, 0.1))  # half of the way down, and all of it


# -- AdamW ------------------------------------------------------------------------------------------------------------


def test_matrices_decay_norms_do_not_and_frozen_weights_are_not_there(llama):
    model = llama()
    freeze_all_but(model, ["*layers.1*", "*norm*"])
    names = {parameter: name for name, parameter in model.named_parameters()}
    decay, plain = make_optimizer(model, ADAMW, on_gpu=False).param_groups
    assert (decay["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert (decay["betas"], decay["eps"], decay["lr"]) == ((0.9, 0.95), 1e-8, 1e-4)
    assert len(decay["params"]) == 7  # q, k, v, o, gate, up, down of one layer
    assert all(".layers.1." in names[p] and "norm" not in names[p] for p in decay["params"])
    assert len(plain["params"]) == 5  # two norms in each of two layers, and the last one
    assert all("norm" in names[p] for p in plain["params"])


def test_embeddings_alone_make_one_group_and_a_tied_weight_is_in_it_once(llama):
    model = llama()
    freeze_all_but(model, ["*embed_tokens*"])
    (group,) = make_optimizer(model, ADAMW, on_gpu=False).param_groups
    assert [p is model.lm_head.weight for p in group["params"]] == [True]


# -- frozen parameters ------------------------------------------------------------------------------------------------


def trainable(model):
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


@pytest.mark.parametrize("patterns", [None, []])
def test_without_a_pattern_everything_is_trained(llama, patterns):
    model = llama()
    assert freeze_all_but(model, patterns) == trainable(model) == [name for name, _ in model.named_parameters()]


@pytest.mark.parametrize("pattern", ["*embed_tokens*", "lm_head*"])
def test_a_tied_weight_is_found_under_either_of_its_names(llama, pattern):
    model = llama(tied=True)
    assert freeze_all_but(model, [pattern]) == trainable(model) == ["model.embed_tokens.weight"]
    assert model.lm_head.weight.requires_grad


def test_an_untied_head_stays_frozen_unless_it_is_named(llama):
    model = llama(tied=False)
    assert freeze_all_but(model, ["*embed_tokens*"]) == trainable(model) == ["model.embed_tokens.weight"]
    model = llama(tied=False)
    both = freeze_all_but(model, ["*embed_tokens*", "lm_head*"])
    assert both == trainable(model) == ["model.embed_tokens.weight", "lm_head.weight"]


def test_a_pattern_that_matches_nothing_is_refused_with_names_that_are_there(llama):
    model = llama()
    with pytest.raises(InputError, match=r"^unfrozen_parameters: 'wte\*' matches no parameter .*model\.embed_tokens"):
        freeze_all_but(model, ["*embed_tokens*", "wte*"])
    assert trainable(model) == [name for name, _ in model.named_parameters()], "a refused call changes nothing"
