"""packing: best_fit: every token in one sample, documents whole where they fit, hardly any padding."""

import gzip
import itertools
import json

import numpy as np
import pytest
from conftest import SHARED
from make_shards import make_shards

from dilqur.data import best_fit
from dilqur.data.best_fit import BestFitPlan, best_fit_decreasing, place, write_plan
from dilqur.data.token_shards import TokenShards


def random_lengths(count, median, seed=0):
    """Lengths as text has them: log-normal, a few of them very long."""
    return np.maximum(1, np.random.default_rng(seed).lognormal(np.log(median), 1.3, count).astype(np.int64))


def one_at_a_time(lengths, room):
    """Best-fit decreasing by the book: each into the sample with the least room that holds it."""
    samples = []  # [room left, [lengths]]
    for length in sorted(lengths, reverse=True):
        fitting = [s for s in samples if s[0] >= length]
        best = min(fitting, key=lambda s: s[0]) if fitting else [room, []]
        if not fitting:
            samples.append(best)
        best[0] -= length
        best[1].append(length)
    return sorted(contents for _, contents in samples)


@pytest.mark.parametrize("seed", range(30))
def test_groups_of_equal_lengths_give_what_one_at_a_time_gives(seed):
    random = np.random.default_rng(seed)
    room = int(random.integers(3, 60))
    lengths = random.integers(1, random.integers(2, room + 1), random.integers(1, 150))
    counts = np.bincount(lengths, minlength=room)
    groups = best_fit_decreasing(counts[1:], room)
    expanded = [[n for n, times in contents for _ in range(times)] for m, contents in groups for _ in range(m)]
    # which of several samples with equal room a document goes to is open: their fill is not
    fills = [sorted(map(sum, samples)) for samples in (expanded, one_at_a_time(lengths.tolist(), room))]
    assert fills[0] == fills[1]
    assert sorted(n for sample in expanded for n in sample) == sorted(lengths.tolist())


@pytest.mark.parametrize(("room", "median"), [(1, 5), (7, 5), (64, 300), (2048, 300), (70_000, 900)])
def test_every_token_lies_in_one_piece_and_only_long_documents_are_cut(room, median):
    lengths = random_lengths(3000, median)
    lengths[::100] = 0  # empty documents
    starts = np.concatenate([[17], 17 + np.cumsum(lengths)])  # a window need not begin at 0
    pieces, samples = place(starts, room)
    begin, size, goes_on = pieces[:, 0], pieces[:, 1] >> 1, pieces[:, 1] & 1
    order = np.argsort(begin)
    assert begin[order[0]] == 17 and (begin + size)[order[-1]] == starts[-1]
    assert np.array_equal(begin[order][1:], (begin + size)[order][:-1])  # nothing twice, nothing missing
    assert (size > 0).all()
    ends = set(starts.tolist())
    assert all((int(b + n) in ends) == (not g) for b, n, g in zip(begin, size, goes_on, strict=True))
    whole = {(int(a), int(b - a)) for a, b in itertools.pairwise(starts) if 0 < b - a <= room}
    assert whole <= set(zip(begin.tolist(), size.tolist(), strict=True))
    fill = np.add.reduceat(size, samples[:-1])
    assert samples[-1] == len(pieces) and (fill <= room).all() and (np.diff(samples) > 0).all()
    for first, last in itertools.pairwise(samples):
        assert (np.diff(begin[first:last]) > 0).all()  # within a sample the order of the text


def test_a_window_of_nothing_gives_nothing():
    for starts in ([0], [0, 0, 0]):
        pieces, samples = place(starts, 8)
        assert (pieces.shape, samples.tolist()) == ((0, 2), [0])


def test_the_padding_is_small_on_lengths_like_those_of_text():
    lengths = random_lengths(100_000, 300)
    _, samples = place(np.concatenate([[0], np.cumsum(lengths)]), 2048)
    assert 1 - lengths.sum() / ((len(samples) - 1) * 2048) < 0.001  # measured: 0.001 %


def test_the_plan_is_written_once_beside_no_shard_and_read_again(tmp_path, monkeypatch):
    lengths = random_lengths(500, 20)
    shards = TokenShards(make_shards(tmp_path / "shards", lengths.tolist(), shard_tokens=2000))
    monkeypatch.setattr(best_fit, "WINDOW", 50)  # shards of some 60 documents: two windows each
    before = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "shards").iterdir()}
    folder = write_plan(shards, 64, tmp_path / "packing")
    assert {file.name: file.stat().st_mtime_ns for file in (tmp_path / "shards").iterdir()} == before
    plan, written = BestFitPlan(folder), (folder / "plan.json").stat().st_mtime_ns
    assert len(list(folder.glob("pieces-*.npy"))) > shards.num_shards
    tokens = [t for s in range(plan.num_samples) for a, n, _ in plan.pieces(s) for t in range(a, a + n)]
    assert sorted(tokens) == list(range(shards.num_tokens))
    assert plan.totals["tokens"] == shards.num_tokens and plan.totals["documents"] == 500
    assert plan.totals["cut"] == (lengths > 64).sum()
    assert write_plan(shards, 64, tmp_path / "packing") == folder
    assert (folder / "plan.json").stat().st_mtime_ns == written
    assert write_plan(shards, 32, tmp_path / "packing") != folder  # another length, another plan
    again = write_plan(TokenShards(tmp_path / "shards"), 64, tmp_path / "elsewhere")
    assert all((again / file.name).read_bytes() == file.read_bytes() for file in folder.iterdir())


def test_a_plan_cut_short_is_written_anew(tmp_path, monkeypatch):
    shards = TokenShards(make_shards(tmp_path / "shards", [5] * 40, shard_tokens=50))
    monkeypatch.setattr(best_fit, "write_json", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_plan(shards, 8, tmp_path / "packing")
    assert list((tmp_path / "packing").iterdir()) == []
    monkeypatch.undo()
    assert BestFitPlan(write_plan(shards, 8, tmp_path / "packing")).num_samples == 40


@pytest.mark.skipif(not (SHARED / "data" / "az").exists(), reason="no real text here")
def test_on_real_text_a_few_documents_are_cut_instead_of_many():
    files = sorted((SHARED / "data" / "az").glob("[dlw]*.jsonl.gz"))
    texts = [json.loads(line)["text"] for file in files for line in gzip.decompress(file.read_bytes()).splitlines()]
    lengths, room = np.array([len(text.encode()) // 3 + 1 for text in texts]), 2048  # some three bytes per token
    ends = np.cumsum(lengths)
    _, samples = place(np.concatenate([[0], ends]), room)
    cut_by_concat = ((ends - lengths) // room != (ends - 1) // room).mean()
    padding = 1 - lengths.sum() / ((len(samples) - 1) * room)
    assert (lengths > room).mean() < cut_by_concat / 2
    assert padding < 0.003  # 0.05 to 0.3 % were measured elsewhere
