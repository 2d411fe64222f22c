"""Token shards: written whole, read by memory-mapping, with or without our code."""

import itertools
import json

import numpy as np
import pytest

from dilqur.atomic import write_json
from dilqur.errors import InputError
from dilqur.token_shards import ShardWriter, TokenShards

# lengths that fill a shard of 10 exactly, overflow one, are longer than one, and are empty
DOCUMENTS = [list(range(i * 100, i * 100 + n)) for i, n in enumerate([4, 6, 3, 0, 8, 25, 1, 2])]
STREAM = [token for document in DOCUMENTS for token in document]


@pytest.fixture
def folder(tmp_path):
    writer = ShardWriter(tmp_path, shard_tokens=10)
    for document in DOCUMENTS:
        writer.add(document)
    write_json(tmp_path / "manifest.json", {**writer.close(), "utf8_bytes": 147})
    return tmp_path


def test_what_was_written_is_read_back(folder):
    shards = TokenShards(folder, verify=True)
    assert (shards.num_documents, shards.num_tokens) == (8, 49) == (len(DOCUMENTS), len(STREAM))
    assert [shards.document(i).tolist() for i in range(8)] == DOCUMENTS
    assert shards.document_lengths().tolist() == [4, 6, 3, 0, 8, 25, 1, 2]
    assert shards.bytes_per_token == 3  # 147 / 49
    assert shards.read(0, 49).dtype == np.int32


def test_any_span_of_the_stream_can_be_read_across_shards(folder):
    shards = TokenShards(folder)
    starts = np.cumsum([0, *map(len, DOCUMENTS[:-1])])
    for start in range(50):
        for length in range(50 - start):
            assert shards.read(start, length).tolist() == STREAM[start : start + length]
            inside = starts[(starts >= start) & (starts < start + length)] - start
            assert set(shards.document_starts(start, length)) == set(inside)  # an empty one starts where the next does
    with pytest.raises(IndexError):
        shards.read(48, 2)


def test_numpy_alone_reads_them_and_no_document_crosses_a_shard(folder):
    found = []
    for number in range(len(list(folder.glob("tokens-*.npy")))):
        tokens = np.load(folder / f"tokens-{number:05d}.npy", mmap_mode="r")
        offsets = np.load(folder / f"offsets-{number:05d}.npy", mmap_mode="r")
        assert (tokens.dtype, offsets.dtype, offsets[0], offsets[-1]) == (np.int32, np.int64, 0, len(tokens))
        found += [tokens[a:b].tolist() for a, b in itertools.pairwise(offsets)]
        assert len(tokens) <= 10 or len(offsets) == 2  # over the size only where one document is
    assert found == DOCUMENTS
    assert number == 4  # 4+6 | 3+0 | 8 | 25 | 1+2


def test_the_files_are_those_numpy_would_write(tmp_path):
    writer = ShardWriter(tmp_path, 10)
    writer.add([1, 2, 3])
    writer.close()
    np.save(tmp_path / "expected.npy", np.array([1, 2, 3], np.int32))
    assert (tmp_path / "tokens-00000.npy").read_bytes() == (tmp_path / "expected.npy").read_bytes()


def test_an_id_that_int32_cannot_hold_is_refused(tmp_path):
    writer = ShardWriter(tmp_path, 10)
    writer.add([2**31 - 1])
    with pytest.raises(InputError, match="token id 2147483648 does not fit int32"):
        writer.add([2**31])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / "tokens-00001.npy").unlink(), r"tokens-00001\.npy: missing, though manifest\.json lists it"),
        (lambda f: (f / "tokens-00001.npy").open("ab").write(b"x"), r"00001\.npy: 141 bytes, manifest\.json says 140"),
        (lambda f: flip(f / "tokens-00001.npy", 1), r"tokens-00001\.npy: not a \.npy file"),  # in the header
        (lambda f: (f / "manifest.json").unlink(), r"manifest\.json: not there: .* is not finished"),
        (lambda f: (f / "manifest.json").write_text("{"), r"manifest\.json: damaged"),
        (lambda f: (f / "manifest.json").write_text('{"stage": "clean"}'), "not a folder of token shards"),
        (lambda f: edit(f / "manifest.json", version=2), "format version 2 is newer than this program's 1"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused_with_the_file(folder, damage, words):
    damage(folder)
    with pytest.raises(InputError, match=words):
        TokenShards(folder)


def test_one_changed_bit_is_found_by_verifying(folder):
    flip(folder / "tokens-00001.npy", -1)
    TokenShards(folder)  # the sizes are right: only reading every byte shows it
    with pytest.raises(InputError, match=r"tokens-00001\.npy: its checksum is not the one in manifest\.json"):
        TokenShards(folder, verify=True)


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
