"""Killed at any moment and started again, a data program leaves the bytes of a run that was never disturbed.

DILQUR_KILLS=50 pytest tests/faults/test_killed.py     (2 kills for each case by default, to keep `make test` short)
"""

import gzip
import hashlib
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import CORPUS, ROOT

from dilqur.pipeline.manifest import read_manifest

KILLS = int(os.environ.get("DILQUR_KILLS", 2))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """5 MB in files of every kind of reading: plain, compressed, several of them, one empty, some records bad."""
    folder = tmp_path_factory.mktemp("corpus")
    lines = [line for file in sorted((CORPUS / "az").glob("*.jsonl")) for line in file.read_bytes().splitlines(True)]
    shuffled = random.Random(1)
    for number in range(6):
        data = b"".join(shuffled.sample(lines, len(lines)) * 5)
        data = data.replace(b'"text":', b'"test":', 3)  # three records without a text
        (folder / f"{number}.jsonl").write_bytes(data)
        if number % 2:
            (folder / f"{number}.jsonl.gz").write_bytes(gzip.compress(data, 1))
    (folder / "3b.jsonl").touch()
    return folder


def hashes(folder, pattern):
    """{name: SHA-256} of the files that match."""
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob(pattern)}


def children(pid):
    done = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
    return [int(word) for word in done.stdout.split()]


def alive(pid):
    """Does it run? Who waits to be buried by its parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def kill_and_start_again(command, folder, seconds, seed):
    """Start `command`, which fills `folder` in about `seconds`, again and again; kill it at KILLS random moments, then let it end."""
    moments, killed = random.Random(seed), 0
    while killed < KILLS:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            output, _ = process.communicate(timeout=moments.uniform(0.2, seconds))
            assert process.returncode == 0, output
            shutil.rmtree(folder)  # it was faster: once more from the beginning
        except subprocess.TimeoutExpired:
            workers = children(process.pid)
            process.kill()
            process.communicate()
            killed += 1
            time.sleep(0.1)
            assert not list(filter(alive, workers)), "a worker outlived its parent"
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_packing_goes_on_to_the_same_bytes(made, corpus, tmp_path, workers):
    def command(folder, workers):
        flags = {"input": corpus, "tokenizer": made / "tokenizer", "output_dir": folder, "num_proc": workers}
        flags.update(shard_tokens=20_000, engine="tokenizers", on_error="skip")
        return [sys.executable, "data_tools/pack_mmap.py", *(str(w) for k, v in flags.items() for w in (f"--{k}", v))]

    started = time.monotonic()
    subprocess.run(command(tmp_path / "whole", 2), cwd=ROOT, check=True, capture_output=True)
    seconds = time.monotonic() - started
    kill_and_start_again(command(tmp_path / "killed", workers), tmp_path / "killed", seconds, seed=workers)
    expected = hashes(tmp_path / "whole", "*-*.*")
    assert len(expected) > 100
    assert hashes(tmp_path / "killed", "*-*.*") == expected
    assert not [p.name for p in (tmp_path / "killed").iterdir() if p.name.endswith(".part") or p.name == ".resume.json"]
    counted = [read_manifest(tmp_path / name) for name in ("whole", "killed")]
    for key in ("shards", "documents", "tokens", "words", "utf8_bytes", "records", "bad_records", "sources"):
        assert counted[0][key] == counted[1][key]
    assert counted[0]["records"] == counted[0]["documents"] + counted[0]["bad_records"]
    assert counted[0]["bad_records"] == 3 * 9  # in six files, and three of them compressed as well


@pytest.mark.parametrize("workers", [1, 4])
def test_cleaning_goes_on_to_the_same_bytes(corpus, tmp_path, workers):
    def command(folder, workers):
        flags = {"input": corpus, "output_dir": folder, "num_proc": workers, "on_error": "skip", "language": "az"}
        flags.update(validation_fraction=0.1, near_duplicate_threshold=0.65)
        return [
            sys.executable,
            "data_tools/clean_corpus.py",
            *(str(w) for k, v in flags.items() for w in (f"--{k}", v)),
        ]

    started = time.monotonic()
    subprocess.run(command(tmp_path / "whole", 2), cwd=ROOT, check=True, capture_output=True)
    seconds = time.monotonic() - started
    kill_and_start_again(command(tmp_path / "killed", workers), tmp_path / "killed", seconds, seed=workers)
    expected = hashes(tmp_path / "whole", "*.zst")
    assert expected and hashes(tmp_path / "killed", "*.zst") == expected
    assert sorted(p.name for p in (tmp_path / "killed").iterdir() if p.name != ".lock") == [
        "lengths.png",
        "manifest.json",
        "report.json",
        "report.md",
        "train",
        "validation",
    ]
    counted = [read_manifest(tmp_path / name)["result"] for name in ("whole", "killed")]
    assert {**counted[0], "seconds": 0} == {**counted[1], "seconds": 0}
