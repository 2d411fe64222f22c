"""split_corpus: of documents with something in common the first is kept, in little memory, and the progress is in bytes."""

import tracemalloc
from dataclasses import dataclass

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from dilqur.cleaning import split_corpus
from dilqur.cleaning.filter_corpus import DOCUMENT
from dilqur.cleaning.split_corpus import first_with_the_same


@given(st.lists(st.integers(0, 5)))
def test_the_first_of_the_same_ids_is_found(ids):
    assert first_with_the_same(np.array(ids, np.uint64)).tolist() == [ids.index(number) for number in ids]


def test_a_look_for_ids_takes_no_more_memory_than_the_one_for_copies():
    ids = np.random.default_rng(0).integers(0, 2**40, 1_000_000).astype(np.uint64)
    tracemalloc.start()
    first_with_the_same(ids)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (peak + ids.nbytes) / len(ids) <= 48


def test_the_progress_of_writing_is_told_in_bytes(tmp_path, monkeypatch):
    told = []

    class Progress:
        def __init__(self, name, total):
            told.append(total)

        def at(self, done):
            told.append(done)

        def close(self):
            pass

    @dataclass
    class Settings:
        output_format = "jsonl.zst"
        write_dropped = False

    monkeypatch.setattr(split_corpus, "Progress", Progress)
    files, sizes = [], []
    for number in range(2):
        work = tmp_path / str(number)
        work.mkdir()
        (work / "documents.jsonl.zst").write_bytes(zstandard.compress(b'{"text":"a","id":1}\n' * (number + 1)))
        np.save(work / "about.npy", np.zeros(number + 1, DOCUMENT))
        sizes.append((work / "documents.jsonl.zst").stat().st_size)
        files.append(type("File", (), {"number": number, "work": work, "output": str(number)}))
    split_corpus.write_files(files, np.zeros(3, np.uint8), tmp_path / "out", Settings(), 1)
    assert told == [sum(sizes), pytest.approx(sizes[0]), pytest.approx(sum(sizes))]
