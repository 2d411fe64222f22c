"""Token shards: read by memory-mapping, with or without our code, however many there are."""

import itertools
import json
import os
import pickle
import resource
import subprocess
import sys

import numpy as np
import pytest
from make_shards import make_shards

from dilqur.common.errors import InputError
from dilqur.common.hashing import file_checksum
from dilqur.data.mapped_files import MappedFiles
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


# -- ids that lie in another program's file ---------------------------------------------------------------------------


@pytest.fixture
def by_reference(folder, tmp_path):
    """Makes the ids of shard 1 a part of a flat file of some dtype, as nanoGPT, Megatron and nanotron write them."""

    def make(dtype="uint16", where=tmp_path / "foreign.bin"):
        foreign = tmp_path / "foreign.bin"
        foreign.write_bytes(b"header" + np.arange(5, 40).astype(dtype).tobytes())  # token 10 is its sixth
        offset = 6 + 5 * np.dtype(dtype).itemsize
        (folder / "tokens-00001.npy").unlink(missing_ok=True)
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["shards"][1]["files"].pop("tokens-00001.npy", None)
        whole = {"bytes": foreign.stat().st_size, "xxh3": file_checksum(foreign)}
        manifest["shards"][1]["tokens_file"] = {"path": str(where), "dtype": dtype, "offset_bytes": offset, **whole}
        (folder / "manifest.json").write_text(json.dumps(manifest))
        return folder

    return make


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "int32", "int64"])
def test_a_shard_by_reference_reads_like_any_other(by_reference, dtype):
    shards = TokenShards(by_reference(dtype)).check_files(verify=True)
    for start, length in ((0, 49), (10, 3), (11, 1), (8, 20)):
        assert shards.read(start, length).tolist() == STREAM[start : start + length]
        assert shards.read(start, length).dtype == np.int32
    assert shards.document(2).tolist() == [10, 11, 12] and shards.document(2).dtype == np.int32
    out = np.zeros((2, 30), np.int32)
    shards.read_rows(np.array([9, 10]), out, [0, 1])
    assert out.tolist() == [STREAM[9:39], STREAM[10:40]]


def test_the_foreign_file_may_be_named_relative_to_the_folder(by_reference):
    assert TokenShards(by_reference(where="../foreign.bin")).check_files().read(10, 3).tolist() == [10, 11, 12]


def test_a_foreign_file_that_is_gone_or_another_is_refused(by_reference, tmp_path):
    folder = by_reference("int64")
    (tmp_path / "foreign.bin").write_bytes(b"more" + (tmp_path / "foreign.bin").read_bytes())
    with pytest.raises(InputError, match=r"foreign\.bin: 290 bytes, .*manifest\.json says 286; import again"):
        TokenShards(folder).check_files()
    os.truncate(tmp_path / "foreign.bin", 6 + 8 * 8 - 1)  # a byte less than tokens 5 to 12
    for use in (TokenShards.check_files, lambda shards: shards.read(10, 1)):
        with pytest.raises(InputError, match=r"foreign\.bin: 69 bytes, .*manifest\.json says 286; import again"):
            use(TokenShards(folder))
    (tmp_path / "foreign.bin").unlink()
    for use in (TokenShards.check_files, lambda shards: shards.read(10, 1)):
        with pytest.raises(
            InputError, match=r"foreign\.bin: missing, though .*manifest\.json lists it; put it back, or import again"
        ):
            use(TokenShards(folder))


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
            "shorter than its header says",
        ),
        (lambda file: file.open("ab").write(b"x"), r"00001\.npy: 141 bytes, manifest\.json says 140", None),
        (lambda file: flip(file, 1), None, r"tokens-00001\.npy: not a \.npy file"),  # in the header
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


def test_more_shards_than_the_process_may_open_can_be_read(tmp_path):
    """300 shards where 100 descriptors are allowed, and a soft limit of 60: it is raised, then the oldest are closed."""
    make_shards(tmp_path / "shards", [3] * 300, shard_tokens=3)
    program = (
        "import resource, sys, numpy as np; from dilqur.data.token_shards import TokenShards\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (60, 100))\n"
        "both = [TokenShards(sys.argv[1]), TokenShards(sys.argv[1])]\n"
        "for shards in both * 2:\n"
        "    assert shards.read(0, 900).tolist() == list(range(900))\n"
        "    assert [len(shards.document(i)) for i in range(300)] == [3] * 300\n"
        "print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])\n"
    )
    done = subprocess.run([sys.executable, "-c", program, tmp_path / "shards"], capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("100", "")


def test_where_others_hold_the_descriptors_ours_are_given_back(folder, tmp_path, monkeypatch):
    shards, soft = TokenShards(folder), resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    shards.read(0, 40)
    monkeypatch.setattr("dilqur.data.mapped_files._maps_allowed", lambda: soft)  # as if nobody else opened any
    held = []
    try:
        while True:
            held.append((tmp_path / "other").open("w"))
    except OSError:
        pass
    try:
        assert shards.read(0, 49).tolist() == STREAM
    finally:
        for file in held:
            file.close()


def test_a_process_that_is_spawned_opens_its_own(folder):
    shards = TokenShards(folder)
    shards.read(0, 49)
    again = pickle.loads(pickle.dumps(shards))
    assert again.read(0, 49).tolist() == STREAM and len(again._tokens) == 5
    assert isinstance(again._tokens, MappedFiles) and again._tokens in MappedFiles._all


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
