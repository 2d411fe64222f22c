"""Samples → tensors: the same samples in the same order however many processes there are."""

import json
import math
import re
import shutil

import numpy as np
import pytest

from dilqur.batches import IGNORE, TokenSamples, evaluation_batches, split_batch, training_batches
from dilqur.errors import InputError

LENGTH = 64  # tokens a sample: some 900 samples in the corpus


@pytest.fixture(scope="module")
def samples(made):
    return TokenSamples([{"path": made / "shards"}], LENGTH, seed=42)


@pytest.fixture(scope="module")
def tokens(made):
    """The whole stream, read without our reader."""
    return np.concatenate([np.load(file) for file in sorted((made / "shards").glob("tokens-*.npy"))]).astype(np.int64)


def rows(parts):
    """The input ids of a list of batches, as one list of tuples."""
    return [tuple(row) for part in parts for row in part["input_ids"].tolist()]


# -- samples ----------------------------------------------------------------------------------------------------------


def test_labels_are_the_next_tokens_and_an_epoch_is_every_sample_once(samples, tokens):
    expected = {tuple(tokens[i * LENGTH : (i + 1) * LENGTH + 1]) for i in range(len(tokens) // LENGTH)}
    seen = set()
    for position in range(samples.samples_per_epoch):
        sample = samples[position]
        assert sample["input_ids"].shape == sample["labels"].shape == (LENGTH,)
        assert sample["labels"][:-1].tolist() == sample["input_ids"][1:].tolist()
        seen.add((*sample["input_ids"], sample["labels"][-1]))
    assert len(seen) == samples.samples_per_epoch == len(expected)
    assert {s for s in seen if s[-1] != IGNORE} <= expected  # only the very last token of the stream has no next one
    assert sum(s[-1] == IGNORE for s in seen) <= 1


def test_the_last_token_of_the_stream_has_no_label(made, tokens):
    sample = TokenSamples([{"path": made / "shards"}], len(tokens), seed=42)[0]  # one sample is the whole stream
    assert sample["labels"][:-1].tolist() == tokens[1:].tolist()
    assert sample["labels"][-1] == IGNORE


def test_the_order_belongs_to_seed_length_and_mixture_not_to_the_place_of_the_shards(made, tmp_path):
    shutil.copytree(made / "shards", tmp_path / "moved")

    def fingerprint(*paths, length=LENGTH, seed=42, weights=(None, None)):
        datasets = [{"path": p, **({"weight": w} if w else {})} for p, w in zip(paths, weights, strict=False)]
        return TokenSamples(datasets, length, seed).fingerprint()

    shards, held_out = made / "shards", made / "held_out"
    assert fingerprint(shards) == fingerprint(tmp_path / "moved")
    different = [
        fingerprint(shards),
        fingerprint(held_out),
        fingerprint(shards, seed=43),
        fingerprint(shards, length=32),
        fingerprint(shards, held_out),
        fingerprint(held_out, shards),
        fingerprint(shards, held_out, weights=(0.5, 0.5)),
        fingerprint(shards, held_out, weights=(0.7, 0.3)),
    ]
    assert len(set(different)) == len(different)


def test_weights_are_shares_of_the_tokens(made):
    datasets = [{"path": made / "shards", "weight": 0.3}, {"path": made / "held_out", "weight": 0.7}]
    mixed = TokenSamples(datasets, LENGTH, seed=1)
    drawn = [mixed.order[position][0] for position in range(4096)]  # shares are exact in every block of 4,096
    assert drawn.count(0) == round(0.3 * 4096)


def test_datasets_that_do_not_fit_together_are_refused(made, tmp_path):
    other = shutil.copytree(made / "shards", tmp_path / "other")
    manifest = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps({**manifest, "tokenizer_sha256": "0" * 64}))
    with pytest.raises(InputError, match=r"other and .*shards were packed with different tokenizers"):
        TokenSamples([{"path": made / "shards"}, {"path": other}], LENGTH, 42)
    with pytest.raises(InputError, match="give a weight to all of them, or to none"):
        TokenSamples([{"path": made / "shards", "weight": 1.0}, {"path": made / "held_out"}], LENGTH, 42)
    with pytest.raises(InputError, match=r"held_out: \d+ tokens are less than one sample of max_length 1000000"):
        TokenSamples([{"path": made / "held_out"}], 1_000_000, 42)


# -- splitting the global batch ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("global_batch", "ceiling", "world", "expected"),
    [
        (224, 14, 16, (14, 1)),  # 16 GPUs of 40 GB hold 14 sequences each
        (224, 14, 8, (14, 2)),  # half of them: two micro-batches
        (224, 10, 16, (7, 2)),  # 10 fit, but 7 is the largest divisor of 14 that does
        (224, 1000, 1, (224, 1)),  # a ceiling, not a wish
        (2304, 48, 8, (48, 6)),
        (13, 8, 1, (1, 13)),  # a prime
    ],
)
def test_accumulation_is_derived_from_the_global_batch(global_batch, ceiling, world, expected):
    assert split_batch(global_batch, ceiling, world) == expected
    assert math.prod(expected) * world == global_batch


@pytest.mark.parametrize(("global_batch", "world"), [(8, 3), (224, 24), (224, 225), (7, 2), (1, 8)])
def test_a_batch_that_does_not_divide_is_refused_with_numbers_that_work(global_batch, world):
    with pytest.raises(InputError) as refused:
        split_batch(global_batch, 4, world)
    message = str(refused.value)
    assert message.startswith(f"global_batch_size {global_batch} does not divide by {world} processes: take ")
    processes, batch = re.search(r"take ([\d, ]+) processes, or a global_batch_size of (\d+)", message).groups()
    for suggested in processes.split(", "):
        split_batch(global_batch, 4, int(suggested))
    split_batch(int(batch), 4, world)
    assert global_batch < int(batch) < global_batch + world  # the next one up


# -- batches ----------------------------------------------------------------------------------------------------------


def step_by_step(samples, world, ceiling, start=0, steps=3, global_batch=16, **loader):
    """The samples of each step, in the order of the stream, put together from what every rank gets."""
    batch, accumulation = split_batch(global_batch, ceiling, world)
    ranks = [
        list(training_batches(samples, start, steps, batch, accumulation, r, world, **loader)) for r in range(world)
    ]
    assert all(len(micro_batches) == accumulation for rank in ranks for micro_batches in rank)
    return [rows(ranks[r][step][m] for m in range(accumulation) for r in range(world)) for step in range(steps)]


def test_a_step_has_the_same_samples_for_any_number_of_ranks_and_any_ceiling(samples):
    expected = [[tuple(samples[step * 16 + i]["input_ids"]) for i in range(16)] for step in range(3)]
    for world in (1, 2, 4):
        for ceiling in (1, 2, 4, 16):
            assert step_by_step(samples, world, ceiling) == expected, f"{world} ranks, {ceiling} a device"


def test_processes_that_read_ahead_change_nothing(samples):
    assert step_by_step(samples, 1, 4, num_workers=2) == step_by_step(samples, 1, 4)


def test_a_run_that_starts_in_the_middle_gets_the_samples_of_the_rest(samples):
    whole = step_by_step(samples, 2, 4, steps=6)
    assert step_by_step(samples, 4, 2, start=4 * 16, steps=2) == whole[4:]


@pytest.mark.parametrize("limit", [None, 1, 17])
@pytest.mark.parametrize(("world", "batch"), [(1, 8), (2, 8), (3, 5), (4, 64)])
def test_evaluation_covers_each_sample_once_and_all_ranks_do_as_many_batches(made, world, batch, limit):
    held_out = TokenSamples([{"path": made / "held_out"}], LENGTH, seed=42)
    count = min(limit or held_out.samples_per_epoch, held_out.samples_per_epoch)
    ranks = [list(evaluation_batches(held_out, batch, rank, world, limit)) for rank in range(world)]
    assert len({len(rank) for rank in ranks}) == 1  # else a collective would wait for ever
    assert all(len(b["labels"]) == batch for rank in ranks for b in rank)
    scored = [tuple(row) for rank in ranks for b in rank for row in b["labels"].tolist() if set(row) != {IGNORE}]
    assert sorted(scored) == sorted(tuple(held_out[p]["labels"]) for p in range(count))
