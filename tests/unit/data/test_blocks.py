"""Input files: which they are, and that none that is cut, damaged or made to fill the memory is read as a good one."""

import bz2
import gzip
import json
import os
import random
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import xxhash
import zstandard

from dilqur.common.errors import InputError
from dilqur.common.paths import expand, warn_of_left_out
from dilqur.data.blocks import blocks
from dilqur.data.documents import read


def zstd(data):
    return zstandard.ZstdCompressor().compress(data)


def documents(path):
    return list(read([str(path)]))


@pytest.mark.parametrize("compress", [gzip.compress, zstd, bz2.compress])
def test_a_second_stream_that_is_damaged_is_not_the_end_of_the_file(tmp_path, compress):
    first, second = (compress(b'{"text": "salam"}\n' * 300) for _ in range(2))
    suffix = {gzip.compress: "gz", zstd: "zst", bz2.compress: "bz2"}[compress]
    path = tmp_path / f"a.jsonl.{suffix}"
    path.write_bytes(first + second)
    assert len(documents(path)) == 600
    path.write_bytes(first + b"x" + second[1:])
    with pytest.raises(InputError, match="truncated or damaged after line"):
        documents(path)


@pytest.mark.parametrize("compress", [gzip.compress, zstd])
def test_a_cut_or_damaged_file_is_never_read_as_a_shorter_one(tmp_path, compress):
    # 1,000 random words per document: incompressible enough that every cut falls into data
    letters = random.Random(1)
    lines = "".join(json.dumps({"text": "".join(letters.choices("abcdefghij ", k=5000))}) + "\n" for _ in range(100))
    whole = compress(lines.encode())
    file = tmp_path / ("a.jsonl.gz" if compress is gzip.compress else "a.jsonl.zst")
    for broken in (whole[:-1], whole[: len(whole) // 2], whole[:3], whole + b"garbage"):
        file.write_bytes(broken)
        with pytest.raises(InputError, match=r"a\.jsonl\.\w+: truncated or damaged after line \d+"):
            list(read([str(file)], on_error=lambda message: None))  # also where bad records are skipped


def test_a_small_file_that_unpacks_to_gigabytes_is_refused_before_it_fills_the_memory(tmp_path):
    packer = zstandard.ZstdCompressor(level=1).compressobj()
    with (tmp_path / "bomb.jsonl.zst").open("wb") as file:
        for _ in range(257):  # 257 MB of zeros: more than the 256 MB a line may have
            file.write(packer.compress(bytes(1 << 20)))
        file.write(packer.flush())
    with pytest.raises(InputError, match=r"bomb\.jsonl\.zst: unpacks to over 500 times its size"):
        documents(tmp_path / "bomb.jsonl.zst")


# -- which files ------------------------------------------------------------------------------------------------------


def test_folders_and_globs_give_their_files_sorted_once_and_without_hidden_ones(tmp_path):
    for name in ("b.jsonl", "a.txt", "sub/c.jsonl.zst", "notes.md", ".hidden.txt", ".cache/d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = [str(tmp_path / name) for name in ("a.txt", "b.jsonl", "sub/c.jsonl.zst")]
    assert expand([str(tmp_path)]) == found
    assert expand([str(tmp_path / "*.jsonl"), str(tmp_path)]) == [found[1], found[0], found[2]]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("missing", "no such file, folder or pattern"),
        ("*.jsonl", "no such file, folder or pattern"),
        ("**.jsonl", "no such file, folder or pattern"),
        ("*.md", "no .jsonl, .json, .parquet, .txt file in there"),
        ("notes.md", "not a known format; give .jsonl, .json, .parquet, .txt"),
        ("sub", "no .jsonl, .json, .parquet, .txt file in there"),
    ],
)
def test_what_is_not_there_is_named(tmp_path, name, words):
    (tmp_path / "notes.md").touch()
    (tmp_path / "sub").mkdir()
    with pytest.raises(InputError) as refused:
        expand([str(tmp_path / name)])
    assert str(refused.value).startswith(str(tmp_path / name)) and words in str(refused.value)


def test_a_glob_takes_what_the_shell_would_make_of_it(tmp_path):
    for name in ("in/a.jsonl", "in/sub/b.jsonl", "in/c.csv", "in/.d.jsonl", "in/.work/e.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = [str(tmp_path / "in" / name) for name in ("a.jsonl", "sub/b.jsonl")]
    assert expand([str(tmp_path / "in" / "*")]) == expand([str(tmp_path / "in" / "**" / "*.jsonl")]) == found
    assert expand([str(tmp_path / "in" / ".work" / "*.jsonl")]) == [str(tmp_path / "in" / ".work" / "e.jsonl")]


def test_a_link_to_nowhere_and_a_name_that_is_no_utf8_are_refused(tmp_path):
    (tmp_path / "a.jsonl").touch()
    (tmp_path / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"gone\.jsonl: a link to a file that is not there; mend or remove it"):
        expand([str(tmp_path)])
    (tmp_path / "gone.jsonl").unlink()
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jsonl")).touch()
    with pytest.raises(InputError, match=r"caf\\udce9\.jsonl': its name is not UTF-8"):
        expand([str(tmp_path)])


def test_links_are_followed_once_and_what_is_left_out_is_told(tmp_path, capsys):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "B.JSONL").touch()
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").touch()
    (tmp_path / "in" / "notes.xz").touch()
    (tmp_path / "in" / "again").symlink_to(tmp_path / "other")
    (tmp_path / "in" / "circle").symlink_to(tmp_path / "in")
    found = expand([str(tmp_path / "in"), str(tmp_path / "in" / ".." / "in" / "a.jsonl")])
    assert found == [str(tmp_path / "in" / "a.jsonl"), str(tmp_path / "in" / "again" / "B.JSONL")]
    warn_of_left_out("pack", [str(tmp_path / "in")])
    assert capsys.readouterr().err == f"pack: a file of another kind is left out: {tmp_path}/in/notes.xz\n"


# -- blocks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample_by", ["line", "paragraph"])
def test_blocks_are_whole_records_and_together_the_file(tmp_path, sample_by, monkeypatch):
    monkeypatch.setattr("dilqur.data.blocks.BLOCK_BYTES", 1000)
    chance = random.Random(3)
    records = ["\n".join("söz " * chance.randint(1, 60) for _ in range(chance.randint(1, 4))) for _ in range(200)]
    data = ("\n\n" if sample_by == "paragraph" else "\n").join(records).encode()
    (tmp_path / "a.txt").write_bytes(data)
    found = list(blocks(str(tmp_path / "a.txt"), sample_by))
    assert b"".join(block.data for block in found) == data and len(found) > 20
    assert [block.index for block in found] == list(range(len(found)))
    line = 1
    for block in found:
        assert block.line == line
        line += block.data.count(b"\n")
        assert block.data.endswith(b"\n\n" if sample_by == "paragraph" else b"\n") or block is found[-1]
    assert found[-1].share == 1.0


def test_the_identity_is_that_of_the_file_as_it_lies_on_the_disk(tmp_path):
    for name, data in (("a.jsonl", b'{"text": "a"}\n'), ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n'))):
        path, identity = tmp_path / name, {}
        path.write_bytes(data)
        reading = blocks(str(path), identity=identity)
        next(reading)
        assert identity == {"bytes": len(data), "mtime_ns": path.stat().st_mtime_ns}  # before it is read to its end
        assert not list(reading)
        assert identity["xxh3"] == xxhash.xxh3_128_hexdigest(data)


def test_a_file_that_is_moved_away_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    for step in range(2):
        path.write_bytes(b'{"text": "a"}\n' * 200_000)
        reading = blocks(str(path))
        for _ in range(step):
            next(reading)
        path.unlink()
        with pytest.raises(InputError, match=r"a\.jsonl: is not there any more; has it been moved\?"):
            list(reading)


def test_a_zst_of_a_long_window_is_read(tmp_path):
    parameters = zstandard.ZstdCompressionParameters(window_log=30)
    path = tmp_path / "a.jsonl.zst"
    with path.open("wb") as file, zstandard.ZstdCompressor(compression_params=parameters).stream_writer(file) as packed:
        packed.write(b'{"text": "salam"}\n' * 10)
    assert len(documents(path)) == 10


def test_rows_of_parquet_come_in_blocks_of_about_a_megabyte_whatever_is_stored_once(tmp_path):
    texts = ["a" * 100_000] * 300 + ["qısa"] * 5000
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet", row_group_size=2000)
    found = list(blocks(str(tmp_path / "a.parquet")))
    assert [row["text"] for block in found for row in block.data.to_pylist()] == texts
    assert max(block.data.nbytes for block in found) < 2 << 20
    assert [block.index for block in found] == list(range(len(found)))
    assert [block.line for block in found] == [1 + sum(b.data.num_rows for b in found[:i]) for i in range(len(found))]
    assert found[-1].data.num_rows == 1300  # the last group, of short rows, is one block


def test_a_parquet_file_that_unpacks_to_gigabytes_is_refused(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a" * 100_000] * 4000}), tmp_path / "a.parquet")
    assert (tmp_path / "a.parquet").stat().st_size < 100_000
    with pytest.raises(InputError, match=r"a\.parquet: unpacks to over 500 times its size"):
        documents(tmp_path / "a.parquet")
