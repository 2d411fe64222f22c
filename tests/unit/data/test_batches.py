"""Samples → tensors: the same samples in the same order however many processes there are."""

import json
import math
import multiprocessing
import re
import shutil

import numpy as np
import pytest
from make_shards import make_shards

from dilqur.common.constants import IGNORE_INDEX
from dilqur.common.errors import InputError
from dilqur.data.batches import TokenSamples, evaluation_batches, same_prefix, split_batch, training_batches
from dilqur.data.mlm_masking import Masking
from dilqur.data.varlen import cu_seqlens

LENGTH = 64  # tokens per sample: some 900 samples in the corpus


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
    for position in range(samples.samples_per_epoch()):
        sample = samples[position]
        assert sample["input_ids"].shape == sample["labels"].shape == (LENGTH,)
        assert sample["labels"][:-1].tolist() == sample["input_ids"][1:].tolist()
        seen.add((*sample["input_ids"], sample["labels"][-1]))
    assert len(seen) == samples.samples_per_epoch() == len(expected)
    assert {
        s for s in seen if s[-1] != IGNORE_INDEX
    } <= expected  # only the very last token of the stream has no next one
    assert sum(s[-1] == IGNORE_INDEX for s in seen) <= 1


def test_the_last_token_of_the_stream_has_no_label(made, tokens):
    sample = TokenSamples([{"path": made / "shards"}], len(tokens), seed=42)[0]  # one sample is the whole stream
    assert sample["labels"][:-1].tolist() == tokens[1:].tolist()
    assert sample["labels"][-1] == IGNORE_INDEX


def test_the_order_belongs_to_seed_length_and_mixture_not_to_the_place_of_the_shards(made, tmp_path):
    shutil.copytree(made / "shards", tmp_path / "moved")

    def fingerprint(*paths, length=LENGTH, seed=42, weights=(None, None)):
        datasets = [{"path": p, **({"weight": w} if w else {})} for p, w in zip(paths, weights, strict=False)]
        return json.dumps(TokenSamples(datasets, length, seed).fingerprint())

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
        json.dumps(TokenSamples([{"path": shards}], LENGTH, 42, packing="best_fit").fingerprint()),
    ]
    assert len(set(different)) == len(different)


def test_weights_are_shares_of_the_tokens(made):
    datasets = [{"path": made / "shards", "weight": 0.3}, {"path": made / "held_out", "weight": 0.7}]
    mixed = TokenSamples(datasets, LENGTH, seed=1)
    drawn = [mixed.order[position][0] for position in range(4096)]
    assert abs(drawn.count(0) - 0.3 * 4096) < 1  # shares are met in every block of 4,096, up to rounding


def test_with_best_fit_weights_are_shares_of_the_tokens_and_epochs_are_epochs_whatever_the_padding(tmp_path):
    # in samples of 100: half full of documents of 51 tokens, full of documents of 50
    paths = [make_shards(tmp_path / str(n), [n] * 400) for n in (51, 50)]

    def mixed(**shares):
        datasets = [{"path": path, **shares} for path in paths]
        return TokenSamples(datasets, 100, seed=1, packing="best_fit", plans=tmp_path / "plans")

    assert mixed().sizes == [400, 200]
    a_thousand = 600 * 1024  # 150 whole blocks
    assert list(mixed(epochs=1).epochs(a_thousand).values()) == pytest.approx([1024, 1024], rel=0.001)
    drawn = mixed(weight=0.5).order.draws(100_000)
    assert drawn[0] * 51 == pytest.approx(drawn[1] * 100, rel=0.01)


def test_one_folder_is_one_dataset_whatever_the_way_to_it(made, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(made)
    one, again = ({"path": path, "weight": 1} for path in (made / "shards", tmp_path / "link" / "shards"))
    two = {"path": made / "held_out", "weight": 1}
    plain = TokenSamples([one], LENGTH, 42, changes=[(100, [one, two])])
    linked = TokenSamples([one], LENGTH, 42, changes=[(100, [again, two])])
    assert linked.paths == plain.paths == [str(made / "shards"), str(made / "held_out")]
    assert linked.fingerprint() == plain.fingerprint()
    assert [linked.order[p] for p in range(300)] == [plain.order[p] for p in range(300)]
    monkeypatch.chdir(made)
    assert TokenSamples([{"path": "shards"}], LENGTH, 42).fingerprint() == plain.fingerprint()[:1]
    with pytest.raises(InputError, match="shards is listed twice: list it once, with the sum of the weights"):
        TokenSamples([one, again], LENGTH, 42)


def test_datasets_that_do_not_fit_together_are_refused(made, tmp_path):
    other = shutil.copytree(made / "shards", tmp_path / "other")
    manifest = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps({**manifest, "tokenizer_sha256": "0" * 64}))
    with pytest.raises(InputError, match=r"other and .*shards were packed with different tokenizers"):
        TokenSamples([{"path": made / "shards"}, {"path": other}], LENGTH, 42)
    for first, second in (({"weight": 1.0}, {}), ({"weight": 1.0}, {"epochs": 2}), ({}, {"epochs": 2})):
        datasets = [{"path": made / "shards", **first}, {"path": made / "held_out", **second}]
        with pytest.raises(InputError, match="give a weight to all of them, or epochs to all, or neither"):
            TokenSamples(datasets, LENGTH, 42)
    with pytest.raises(InputError, match="shards is listed twice: list it once, with the sum of the weights"):
        TokenSamples([{"path": made / "shards"}] * 2, LENGTH, 42)
    with pytest.raises(InputError, match=r"held_out: \d+ tokens are less than one sample of max_length 1000000"):
        TokenSamples([{"path": made / "held_out"}], 1_000_000, 42)


def test_many_samples_at_once_are_those_one_by_one(made):
    datasets = [{"path": made / "shards", "weight": 0.3}, {"path": made / "held_out", "weight": 0.7}]
    mixed = TokenSamples(datasets, LENGTH, seed=1, document_boundaries=True)
    batch = mixed.batch(range(100, 400))
    assert {(v.shape, v.dtype) for v in batch.values()} == {((300, LENGTH), np.dtype(np.int64))}
    for row, position in enumerate(range(100, 400)):
        assert all(np.array_equal(batch[name][row], values) for name, values in mixed[position].items())


def test_a_change_of_one_array_does_not_reach_the_other(samples):
    batch = samples.batch(range(4))
    labels = batch["labels"].copy()
    batch["input_ids"][:] = -1  # as masking in place does
    assert np.array_equal(batch["labels"], labels)


# -- documents inside a sample ----------------------------------------------------------------------------------------


def test_positions_begin_again_with_every_document_and_every_sample(tmp_path):
    lengths = [3, 4, 1, 0, 13, 9, 10, 5, 8, 27]
    make_shards(tmp_path, lengths, shard_tokens=20)
    bounded = TokenSamples([{"path": tmp_path}], 10, seed=0, document_boundaries=True)
    batch = bounded.batch(range(8))
    inside = np.concatenate([np.arange(n) for n in lengths])  # place of each token in its document
    for ids, positions in zip(batch["input_ids"], batch["position_ids"], strict=True):
        begins = [i for i in range(10) if i == 0 or inside[ids[i]] == 0]
        assert positions.tolist() == [i - max(b for b in begins if b <= i) for i in range(10)]


def test_cu_seqlens_are_where_documents_begin_laid_end_to_end():
    found = cu_seqlens(np.array([[0, 1, 2, 0, 1], [0, 0, 1, 2, 3]]))
    assert (found.tolist(), found.dtype) == ([0, 3, 5, 6, 10], np.int32)


# -- packing: best_fit ------------------------------------------------------------------------------------------------


def test_best_fit_uses_every_token_once_an_epoch_and_labels_are_the_next_of_the_document(tmp_path):
    random = np.random.default_rng(0)
    lengths = np.maximum(0, random.lognormal(2.5, 1.2, 400).astype(int)).tolist()
    make_shards(tmp_path / "shards", lengths, shard_tokens=1500, eos_id=-7)
    last = set((np.cumsum(lengths) - 1).tolist())
    whole = TokenSamples(
        [{"path": tmp_path / "shards"}], 32, 5, packing="best_fit", plans=tmp_path / "plans", document_boundaries=True
    )
    batch = whole.batch(range(whole.samples_per_epoch()))
    ids, labels, positions = (batch[name] for name in ("input_ids", "labels", "position_ids"))
    assert sorted(ids[ids >= 0].tolist()) == list(range(sum(lengths)))  # no token is lost, none used twice
    for row in zip(ids.tolist(), labels.tolist(), positions.tolist(), strict=True):
        for at, (token, label, position) in enumerate(zip(*row, strict=True)):
            assert label == (IGNORE_INDEX if token == -7 or token in last else token + 1)
            begins = at == 0 or row[0][at - 1] != token - 1 or row[0][at - 1] in last
            begins = begins if token != -7 else row[0][at - 1] != -7  # padding is a sequence of its own
            assert position == (0 if begins else row[2][at - 1] + 1)
    padding, cut = whole.packing_shares()
    assert padding == pytest.approx((ids == -7).mean())
    assert cut == pytest.approx(np.mean([n > 32 for n in lengths]))
    text = whole.utf8_bytes(0, whole.samples_per_epoch())
    assert text == pytest.approx(3 * sum(lengths))


def test_best_fit_is_the_same_stream_for_any_number_of_ranks_and_is_planned_once(made, tmp_path):
    def samples():
        return TokenSamples([{"path": made / "shards"}], LENGTH, 42, packing="best_fit", plans=tmp_path)

    expected = step_by_step(samples(), 1, 16)
    written = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    assert step_by_step(samples(), 4, 2, num_workers=2) == expected
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")} == written


# -- a mixture that changes -------------------------------------------------------------------------------------------


def test_a_dataset_added_later_changes_nothing_before_and_the_past_is_recognised(made):
    one, two = {"path": made / "shards", "weight": 0.5}, {"path": made / "held_out", "weight": 0.5}
    plain = TokenSamples([one], LENGTH, 42)
    changed = TokenSamples([one], LENGTH, 42, changes=[(100, [one, two])])
    dropped = TokenSamples([one], LENGTH, 42, changes=[(100, [one, two]), (200, [two])])
    other = TokenSamples([one], LENGTH, 42, changes=[(100, [one, {**two, "weight": 0.4}])])
    assert [plain.order[p] for p in range(100)] == [changed.order[p] for p in range(100)]
    assert {changed.order[p][0] for p in range(100, 200)} == {0, 1}
    assert {dropped.order[p][0] for p in range(200, 300)} == {1}
    before, after, later, else_ = (s.fingerprint() for s in (plain, changed, dropped, other))
    assert same_prefix(before, after, 100) and same_prefix(before, else_, 100)  # position 100 is not read yet
    assert not same_prefix(before, after, 101) and not same_prefix(after, else_, 101)
    assert same_prefix(after, later, 200) and not same_prefix(after, later, 201)
    assert not same_prefix(
        before, TokenSamples([one], LENGTH, 43).fingerprint(), 0
    )  # the seed counts from the first on


def test_epochs_are_shares_in_proportion_to_size_times_epochs(made):
    datasets = [{"path": made / "shards", "epochs": 1}, {"path": made / "held_out", "epochs": 4}]
    mixed = TokenSamples(datasets, LENGTH, seed=1)
    end = mixed.samples_per_epoch()
    assert end == mixed.sizes[0] + 4 * mixed.sizes[1]
    # the share of a block is that of the whole up to a thousandth; where in it they stand is random
    assert list(mixed.epochs(1024 * end).values()) == pytest.approx([1024, 4096], rel=0.001)


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
    for world in (1, 2, 4, 8):
        for ceiling in (1, 2, 4, 16):
            assert step_by_step(samples, world, ceiling) == expected, f"{world} ranks, {ceiling} a device"


@pytest.mark.parametrize(("world", "workers"), [(1, 1), (1, 2), (1, 3), (1, 4), (2, 4)])
def test_processes_that_read_ahead_change_nothing(samples, world, workers):
    assert step_by_step(samples, world, 4, num_workers=workers) == step_by_step(samples, world, 4)


def test_what_is_wrong_in_a_reading_process_is_one_line(tmp_path):
    shards = make_shards(tmp_path, [50] * 96)
    raw = (shards / "tokens-00000.npy").read_bytes()
    (shards / "tokens-00000.npy").write_bytes(b"x" * 128 + raw[128:])
    for workers in (0, 1):
        with pytest.raises(InputError) as problem:
            next(training_batches(TokenSamples([{"path": shards}], 40, 3), 0, 1, 4, 1, 0, 1, num_workers=workers))
        path = shards / "tokens-00000.npy"
        assert str(problem.value).startswith(f"{path}: not a whole .npy file")
        # while the error, and with it all that it came through, is still held: at the end of a program it would be waited for
        assert not multiprocessing.active_children()


def test_an_encoders_head_computes_as_many_tokens_in_every_batch(samples):
    """Shapes that stay the same; what fills them up is no masked place, so that the loss does not see it."""
    for count in ("independent", "fixed"):
        masking = Masking(5, frozenset(), samples.vocab_size, count=count)
        masked = TokenSamples([{"path": samples.paths[0]}], LENGTH, seed=42, masking=masking)
        batches = [m for (m,) in training_batches(masked, 0, 40, 8, 1, 0, 1)]
        assert {len(b["masked_positions"]) for b in batches} == {masking.most(8, LENGTH)}
        for batch in batches:
            labels, places = batch["labels"].flatten(), batch["masked_positions"]
            has_label = labels[places] != IGNORE_INDEX
            assert places[has_label].tolist() == np.flatnonzero(labels != IGNORE_INDEX).tolist()
            assert (~has_label).any()


def test_three_epochs_hold_every_sample_three_times_on_three_ranks(tmp_path):
    """A ledger: token i of the stream is i, so that a sample's first token says which one it is."""
    numbered = TokenSamples([{"path": make_shards(tmp_path, [50] * 96, shard_tokens=1000)}], 40, seed=3)
    (size,) = numbered.sizes
    assert size == 120  # 4,800 / 40
    seen = [
        row[0] // 40 for step in step_by_step(numbered, 3, 4, steps=3 * size // 24, global_batch=24) for row in step
    ]
    for epoch in range(3):
        assert sorted(seen[epoch * size : (epoch + 1) * size]) == list(range(size))


def test_two_ranks_with_four_readers_each_deliver_exactly_the_union(tmp_path):
    numbered = TokenSamples([{"path": make_shards(tmp_path, [50] * 96, shard_tokens=1000)}], 40, seed=3)
    ranks = [
        [row[0] for step in training_batches(numbered, 0, 15, 4, 1, rank, 2, num_workers=4) for row in rows(step)]
        for rank in range(2)
    ]
    assert sorted(ranks[0] + ranks[1]) == list(range(0, 4800, 40))
    assert not set(ranks[0]) & set(ranks[1])


def test_a_run_that_starts_in_the_middle_gets_the_samples_of_the_rest(samples):
    whole = step_by_step(samples, 2, 4, steps=6)
    assert step_by_step(samples, 4, 2, start=4 * 16, steps=2) == whole[4:]


def masks_by_position(samples, world, stretches):
    """{position: labels, a tuple} that all of `world` ranks get in runs that begin at each of [(first position, steps), …]."""
    found = {}
    for start, steps in stretches:
        for rank in range(world):
            batches = training_batches(samples, start, steps, 8 // world, 1, rank, world)
            for step, (batch,) in enumerate(batches):
                first = start + 8 * step + rank * (8 // world)
                for row, labels in enumerate(batch["labels"].tolist()):
                    assert first + row not in found
                    found[first + row] = tuple(labels)
    return found


def test_the_same_tokens_are_masked_on_any_number_of_ranks_and_after_a_resume_and_others_in_each_of_three_rounds(made):
    special = frozenset(range(1024, 1280))
    masking = Masking(mask_id=1026, special=special, vocab_size=1280)
    samples = TokenSamples([{"path": made / "shards"}], LENGTH, seed=42, masking=masking)
    a_round = samples.samples_per_epoch()
    steps = 3 * a_round // 8
    once = masks_by_position(samples, 1, [(0, steps)])
    for world, killed_after in ((2, 17), (4, a_round // 8 + 5)):
        assert masks_by_position(samples, world, [(0, killed_after), (8 * killed_after, steps - killed_after)]) == once
    labels = np.array([once[position] for position in range(8 * steps)])
    unmasked = TokenSamples([{"path": made / "shards"}], LENGTH, seed=42)
    tokens = unmasked.batch(np.arange(8 * steps))["input_ids"]
    chosen, eligible = labels != IGNORE_INDEX, ~np.isin(tokens, list(special))
    assert not (chosen & ~eligible).any() and (~eligible).any()
    assert (labels[chosen] == tokens[chosen]).all()
    n = eligible.sum()
    assert abs(chosen.sum() / n - 0.2) < 4 * math.sqrt(0.2 * 0.8 / n)
    rounds = {}
    for text, mask in zip(map(tuple, tokens.tolist()), chosen.tolist(), strict=True):
        rounds.setdefault(text, set()).add(tuple(mask))
    assert sum(map(len, rounds.values())) == 8 * steps, "never the same mask again"


@pytest.mark.parametrize("limit", [None, 1, 17])
@pytest.mark.parametrize(("world", "batch"), [(1, 8), (2, 8), (3, 5), (4, 64)])
def test_evaluation_covers_each_sample_once_and_all_ranks_do_as_many_batches(made, world, batch, limit):
    held_out = TokenSamples([{"path": made / "held_out"}], LENGTH, seed=42)
    count = min(limit or held_out.samples_per_epoch(), held_out.samples_per_epoch())
    ranks = [list(evaluation_batches(held_out, batch, rank, world, limit)) for rank in range(world)]
    assert len({len(rank) for rank in ranks}) == 1  # else a collective would wait for ever
    assert all(len(b["labels"]) == batch for rank in ranks for b in rank)
    scored = [tuple(row) for rank in ranks for b in rank for row in b["labels"].tolist() if set(row) != {IGNORE_INDEX}]
    assert sorted(scored) == sorted(tuple(held_out[p]["labels"]) for p in range(count))
