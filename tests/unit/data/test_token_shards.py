"""Token shards: read by memory-mapping, with or without our code, however many there are."""

import itertools
import json
import os
import pickle
import re
import subprocess
import sys

import numpy as np
import pytest
from make_shards import make_shards

from dilqur.common.errors import InputError
from dilqur.data.token_shards import TokenShards

# lengths that fill a shard of 10 exactly, overflow one, are longer than one, and are empty
LENGTHS = [4, 6, 3, 0, 8, 25, 1, 2]
STREAM = list(range(49))
STARTS = np.cumsum([0, *LENGTHS[:-1]])


@pytest.fixture
def folder(tmp_path):
    return make_shards(tmp_path / "shards", LENGTHS, shard_tokens=10)


def test_what_was_written_is_read_back(folder):
    shards = TokenShards(folder).check_files(verify=True)
    assert (shards.num_documents, shards.num_tokens, shards.num_shards) == (8, 49, 5)
    documents = [list(range(start, start + n)) for start, n in zip(STARTS, LENGTHS, strict=True)]
    assert [shards.document(i).tolist() for i in range(8)] == documents
    assert np.concatenate([np.diff(shards.offsets(s)) for s in range(5)]).tolist() == LENGTHS
    assert shards.bytes_per_token == 3
    assert shards.read(0, 49).dtype == np.int32


def test_any_span_of_the_stream_can_be_read_across_shards(folder):
    shards = TokenShards(folder)
    for start in range(50):
        for length in range(50 - start):
            assert shards.read(start, length).tolist() == STREAM[start : start + length]
            inside = [int(s) - start for s in STARTS if start <= s < start + length]
            assert set(shards.document_starts(start, length)) == set(inside)  # an empty one starts where the next does
    with pytest.raises(IndexError):
        shards.read(48, 2)


@pytest.mark.parametrize("length", [1, 7, 12, 49, 60])
def test_many_spans_are_read_at_once(folder, length):
    out = np.full((49, length), -1, np.int64)
    TokenShards(folder).read_rows(np.arange(49), out, range(49))
    expected = [(STREAM[start : start + length] + [-1] * length)[:length] for start in range(49)]
    assert out.tolist() == expected  # -1: the stream has ended, and the row is left as it was


def test_numpy_alone_reads_them_and_no_document_crosses_a_shard(folder):
    found = []
    for number in range(len(list(folder.glob("tokens-*.npy")))):
        tokens = np.load(folder / f"tokens-{number:05d}.npy", mmap_mode="r")
        offsets = np.load(folder / f"offsets-{number:05d}.npy", mmap_mode="r")
        assert (tokens.dtype, offsets.dtype, offsets[0], offsets[-1]) == (np.int32, np.int64, 0, len(tokens))
        found += [tokens[a:b].tolist() for a, b in itertools.pairwise(offsets)]
        assert len(tokens) <= 10 or len(offsets) == 2  # over the size only where one document is
    assert list(map(len, found)) == LENGTHS and list(itertools.chain(*found)) == STREAM
    assert number == 4  # 4+6 | 3+0 | 8 | 25 | 1+2


# -- what is not whole ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / "manifest.json").unlink(), r"manifest\.json: not there: .* is not finished"),
        (lambda f: (f / "manifest.json").write_text("{"), r"manifest\.json: damaged"),
        (lambda f: (f / "manifest.json").write_text('{"stage": "clean"}'), "not a folder of token shards"),
        (lambda f: edit(f / "manifest.json", version=99), "format version 99 is newer than this program's"),
    ],
)
def test_a_folder_without_a_manifest_of_ours_is_refused_at_once(folder, damage, words):
    damage(folder)
    with pytest.raises(InputError, match=words):
        TokenShards(folder)


@pytest.mark.parametrize(
    ("damage", "when_checked", "when_used"),
    [
        (lambda file: file.unlink(), r"tokens-00001\.npy: missing, though manifest\.json lists it", "missing"),
        (
            lambda file: os.truncate(file, 136),
            r"00001\.npy: 136 bytes, manifest\.json says 140",
            r"00001\.npy: not a whole \.npy file: damaged or truncated; pack again",
        ),
        (lambda file: file.open("ab").write(b"x"), r"00001\.npy: 141 bytes, manifest\.json says 140", None),
        (lambda file: flip(file, 1), None, r"tokens-00001\.npy: not a whole \.npy file"),  # in the header
        (lambda file: np.save(file, np.arange(3)), "152 bytes, manifest.json says 140", "holds int64, not int32"),
        (lambda file: np.save(file, np.arange(2, dtype=np.int32)), "136 bytes", "manifest.json says 3"),
    ],
)
def test_a_shard_that_is_not_whole_is_refused_with_its_file_when_checked_or_used(
    folder, damage, when_checked, when_used
):
    damage(folder / "tokens-00001.npy")
    shards = TokenShards(folder)  # reads the manifest only
    assert shards.read(0, 10).tolist() == STREAM[:10]
    for words, use in ((when_checked, shards.check_files), (when_used, lambda: shards.read(10, 1))):
        if words:
            with pytest.raises(InputError, match=words):
                use()
        else:
            use()


def test_one_changed_bit_is_found_by_verifying(folder):
    flip(folder / "tokens-00001.npy", -1)
    shards = TokenShards(folder).check_files()  # the sizes are right: only reading every byte shows it
    with pytest.raises(InputError, match=r"tokens-00001\.npy: its checksum is not the one in manifest\.json"):
        shards.check_files(verify=True)


# -- however many there are -------------------------------------------------------------------------------------------


def test_files_are_opened_when_they_are_used(folder):
    shards = TokenShards(folder)
    assert open_files(folder) == set()
    shards.read(4, 2)
    assert open_files(folder) == {"tokens-00000.npy"}
    shards.document(7)
    assert open_files(folder) == {"tokens-00000.npy", "tokens-00004.npy", "offsets-00004.npy"}


def read_300_shards(folder, hard):
    """What a process says that reads 300 shards under a soft limit of 60 open files."""
    make_shards(folder, [3] * 300, shard_tokens=3)
    program = (
        "import resource, sys; from dilqur.data.token_shards import TokenShards\n"
        f"resource.setrlimit(resource.RLIMIT_NOFILE, (60, {hard}))\n"
        "shards = TokenShards(sys.argv[1])\n"
        "for use in (shards.check_files, lambda: shards.read(0, 900).tolist() == list(range(900)) or 1 / 0):\n"
        "    try: use()\n"
        "    except Exception as problem: print(problem)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, folder], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_the_soft_limit_of_open_files_is_raised_for_many_shards(tmp_path):
    assert read_300_shards(tmp_path / "shards", hard=400) == []


def test_more_shards_than_the_process_may_open_are_refused_when_checked_or_used(tmp_path):
    checked, used = read_300_shards(tmp_path / "shards", hard=100)
    assert checked.endswith(
        "shards: 300 shards, and this process may open 100 files: pack larger shards (--shard_tokens), or raise the limit "
        "(ulimit -Hn)"
    )
    assert re.search(r"tokens-000\d\d\.npy: too many open files: pack larger shards \(--shard_tokens\)", used)


def test_a_process_that_is_spawned_opens_its_own(folder):
    shards = TokenShards(folder)
    shards.read(0, 49)
    again = pickle.loads(pickle.dumps(shards))
    assert again.read(0, 49).tolist() == STREAM and len(again._tokens) == 5


def test_two_jobs_read_a_folder_that_is_read_only_and_nothing_is_written_there(folder):
    before = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    folder.chmod(0o555)
    program = (
        "import sys; from dilqur.data.token_shards import TokenShards; shards = TokenShards(sys.argv[1]).check_files(True)\n"
        "assert shards.read(0, 49).tolist() == list(range(49)) and shards.document_starts(0, 49).size == 8"
    )
    try:
        jobs = [subprocess.Popen([sys.executable, "-c", program, folder]) for _ in range(2)]
        assert [job.wait() for job in jobs] == [0, 0]
        assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == before
    finally:
        folder.chmod(0o755)


def open_files(folder):
    """The names of the files of this folder that this process has mapped."""
    with open("/proc/self/maps") as maps:  # noqa: PTH123
        return {line.rsplit("/", 1)[1].strip() for line in maps if str(folder) in line}


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
