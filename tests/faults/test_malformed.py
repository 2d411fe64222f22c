"""Malformed input: the fuzzer for a few thousand records, and every case by name, through both programs that read documents.

The fuzzer by itself, for as long as you like: python tests/support/fuzz_inputs.py TOKENIZER_FOLDER 1000000
"""

import bz2
import gzip
import json
import os
import shutil

import pytest
import zstandard
from conftest import WITHOUT_ROOTS_RIGHTS, run_program
from fuzz_inputs import RECORDS

from dilqur.common.errors import InputError
from dilqur.data.blocks import blocks
from dilqur.pipeline.manifest import read_manifest

FUZZ = int(os.environ.get("DILQUR_FUZZ", 2_000))
TEXT = "Bakı Xəzər dənizinin sahilində yerləşən qədim və gözəl bir şəhərdir."
GOOD = (json.dumps({"text": TEXT, "id": 1}, ensure_ascii=False) + "\n").encode()
MANY = b"".join(GOOD.replace(TEXT.encode(), f"{TEXT} {i}".encode()) for i in range(300))


def test_the_fuzzer_finds_nothing(made, run):
    done = run("tests/support/fuzz_inputs.py", made / "tokenizer", FUZZ, 5)
    assert f"{-(-FUZZ // RECORDS) * RECORDS:,} records" in done.stdout
    assert "no traceback, no hang, every record counted" in done.stdout


# name: (file name, bytes, what is said where the program is to stop, documents that are left where it is to skip or None)
CASES = {
    "truncated gzip": ("a.jsonl.gz", gzip.compress(MANY)[:-20], "a.jsonl.gz: truncated or damaged after line", None),
    "truncated zstd": ("a.jsonl.zst", zstandard.compress(MANY)[:-20], "a.jsonl.zst: truncated or damaged after line", None),
    "truncated bz2": ("a.jsonl.bz2", bz2.compress(MANY)[:-20], "a.jsonl.bz2: truncated or damaged after line", None),
    "no bytes at all in a .gz": ("a.jsonl.gz", b"", "a.jsonl.gz: empty, which no .gz file is: truncated", None),
    "gzip under another name": ("a.jsonl", gzip.compress(GOOD), "a.jsonl: is a .gz file, which its name does not say; rename it", None),
    "zstd named gzip": ("a.jsonl.gz", zstandard.compress(GOOD), "a.jsonl.gz: is a .zst file, which its name does not say", None),
    "parquet named jsonl": ("a.jsonl", b"PAR1" + b"x" * 99, "a.jsonl: is a .parquet file, which its name does not say", None),
    "text named gzip": ("a.jsonl.gz", GOOD, "a.jsonl.gz: truncated or damaged after line 0 (Not a gzipped file", None),
    "text named parquet": ("a.parquet", GOOD, "a.parquet: not a whole parquet file", None),
    "UTF-16": ("a.txt", TEXT.encode("utf-16"), "a.txt: UTF-16; make it UTF-8 first (iconv -f utf-16 -t utf-8)", None),
    "broken JSON on line 3": ("a.jsonl", GOOD * 2 + b'{"text": \n' + GOOD, "a.jsonl:3: broken JSON", 3),
    "no text field": ("a.jsonl", GOOD + b'{"body": "x"}\n', "a.jsonl:2: no text field 'text' (keys: body); see --text_field", 1),
    "a text that is a number": ("a.jsonl", b'{"text": 7}\n' + GOOD, "a.jsonl:1: 'text' is '7', not text", 1),
    "a text that is null": ("a.jsonl", b'{"text": null}\n' + GOOD, "a.jsonl:1: 'text' is 'None', not text", 1),
    "invalid UTF-8": ("a.jsonl", GOOD + b'{"text": "\xff"}\n', "a.jsonl:2: invalid UTF-8 at byte 10", 1),
    "invalid UTF-8 in a .txt": ("a.txt", b"Salam\n\xe2\x28\xa1\n", "a.txt:2: invalid UTF-8 at byte 0", 1),
    "a lone surrogate": ("a.jsonl", b'{"text": "a\\ud800b"}\n' + GOOD, "a.jsonl:1: a lone surrogate", 1),
    "NUL, escaped": ("a.jsonl", b'{"text": "a\\u0000b"}\n' + GOOD, "a.jsonl:1: NUL (U+0000) in the text", 1),
    "NUL in a .txt": ("a.txt", b"Salam\nd\0nya\n", "a.txt:2: NUL (U+0000) in the text", 1),
    "an array": ("a.jsonl", b"[1, 2]\n" + GOOD, "a.jsonl:1: not a JSON object", 1),
    "a thousand brackets": ("a.jsonl", b'{"text": "a", "b": ' + b"[" * 100_000 + b"\n" + GOOD, "a.jsonl:1: JSON nested too deeply", 1),
    "only empty lines": ("a.jsonl", b"\n \n\r\n", "a.jsonl: no document in there: nothing to", None),
}  # fmt: skip
FINE = {
    "U+2028 in JSON": ("a.jsonl", b'{"text": "bir\xe2\x80\xa8iki"}\n' + GOOD, 2),
    "Windows line ends": ("a.jsonl", (GOOD * 3).replace(b"\n", b"\r\n"), 3),
    "a byte order mark": ("a.jsonl", b"\xef\xbb\xbf" + GOOD, 1),
    "no line end at the end": ("a.jsonl", (GOOD * 2)[:-1], 2),
    "an empty file among others": ("empty.jsonl", b"", 0),
    "the key twice": ("a.jsonl", b'{"text": "a", "text": "b"}\n', 1),
    "NaN": ("a.jsonl", b'{"text": "a", "score": NaN}\n', 1),
    "the same id twice": ("a.jsonl", GOOD + GOOD.replace(b"Bak", b"Dak"), 2),
}
PROGRAMS = ("pack_mmap", "clean_corpus")


@pytest.fixture
def program(made, tmp_path):
    """Run one of the programs on files in `in`; returns the finished process."""

    def start(name, *flags, code=0, prefix=()):
        needs = {"pack_mmap": ["--tokenizer", made / "tokenizer"], "clean_corpus": ["--min_chars", 1]}[name]
        base = ["--input", tmp_path / "in", "--output_dir", tmp_path / "out", "--num_proc", 2]
        return run_program(f"data_tools/{name}.py", *base, *needs, *flags, code=code, prefix=prefix)

    (tmp_path / "in").mkdir()
    return start


def documents_in(folder):
    result = read_manifest(folder)["result"]
    return result["documents"] if "documents" in result else result["read"] - result["dropped"].get("bad_record", 0)


def no_result(folder):
    """Nothing under a name that somebody might read."""
    shown = [p.relative_to(folder) for p in folder.rglob("*") if p.is_file()]
    return not [p for p in shown if not any(part.startswith(".") for part in p.parts)]


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize(("file", "data", "said", "left"), CASES.values(), ids=CASES)
def test_what_is_broken_is_named_or_skipped_and_counted(program, tmp_path, name, file, data, said, left):
    (tmp_path / "in" / file).write_bytes(data)
    done = program(name, code=2)
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: "), done.stderr
    assert said.split(": nothing to")[0].removeprefix("a.jsonl: no") in done.stderr
    assert no_result(tmp_path / "out")
    if left is not None:
        program(name, "--on_error", "skip")
        assert documents_in(tmp_path / "out") == left
        text = (tmp_path / "out" / "manifest.json").read_text()
        assert '"bad_records": 1' in text or '"bad_record": 1' in text


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize(("file", "data", "documents"), FINE.values(), ids=FINE)
def test_what_only_looks_odd_is_read(program, tmp_path, name, file, data, documents):
    (tmp_path / "in" / file).write_bytes(data)
    (tmp_path / "in" / "other.jsonl").write_bytes(GOOD.replace(b"Bak", b"Pak"))
    program(name)
    assert documents_in(tmp_path / "out") == documents + 1


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_line_of_hundreds_of_megabytes_is_named_or_left_out(program, tmp_path, name):
    with (tmp_path / "in" / "a.jsonl").open("wb") as file:
        file.write(GOOD + b'{"text": "')
        for _ in range(300):
            file.write(b"a" * (1 << 20))
        file.write(b'"}\n' + GOOD.replace(b"Bak", b"Pak"))
    assert "a.jsonl:2: a line of over 256 MB" in program(name, code=2).stderr
    program(name, "--on_error", "skip")
    assert documents_in(tmp_path / "out") == 2


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("suffix", [".gz", ".zst", ".bz2"])
def test_a_decompression_bomb_is_refused_in_seconds(program, tmp_path, name, suffix):
    lines = b" \n" * (1 << 20)  # 2 MB of nothing, and forty times one after the other
    data = {".gz": gzip.compress, ".zst": zstandard.compress, ".bz2": bz2.compress}[suffix](lines)
    (tmp_path / "in" / f"a.jsonl{suffix}").write_bytes(data * 40)
    assert "unpacks to over 500 times its size" in program(name, code=2).stderr
    assert no_result(tmp_path / "out")


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path):
    """The file grows under a reader that has been stopped in the middle."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(MANY * 200)  # several blocks
    found = blocks(str(path))
    next(found)
    with path.open("ab") as file:
        file.write(GOOD)
    with pytest.raises(InputError, match="changed while it was being read; wait until it is written"):
        list(found)


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("what", ["b.jsonl", "sub"])
def test_what_may_not_be_read_is_named(program, tmp_path, name, what):
    (tmp_path / "in" / "sub").mkdir()
    for file in ("a.jsonl", "b.jsonl", "sub/c.jsonl"):
        (tmp_path / "in" / file).write_bytes(GOOD)
    (tmp_path / "in" / what).chmod(0)
    line = program(name, code=2, prefix=WITHOUT_ROOTS_RIGHTS).stderr
    assert f"permission denied at {tmp_path}/in/{what}: look at its permissions" in line and line.count("\n") == 1
    (tmp_path / "in" / what).chmod(0o700)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    if os.system(f"mount -t tmpfs -o size=3m tmpfs {folder} 2>/dev/null"):
        pytest.skip("mounting a small file system needs root")
    yield folder
    os.system(f"umount {folder}")


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_full_disk_is_said_in_one_line_and_the_next_start_goes_on(made, tmp_path, small_disk, name):
    source = tmp_path / "in"
    source.mkdir()
    chunk = "".join(json.dumps({"text": f"{TEXT} {os.urandom(3000).hex()}"}) + "\n" for _ in range(700)).encode()
    (source / "a.jsonl").write_bytes(chunk)
    needs = {"pack_mmap": ["--tokenizer", made / "tokenizer", "--shard_tokens", 100_000], "clean_corpus": []}[name]
    flags = ["--input", source, *needs, "--output_dir"]
    done = run_program(f"data_tools/{name}.py", *flags, small_disk / "out", code=2)
    assert "error: no space left on the device" in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not (small_disk / "out" / "manifest.json").exists()
    assert not list((small_disk / "out").rglob("*.part"))
    shutil.copytree(small_disk / "out", tmp_path / "out")  # a larger disk, so to say
    for folder in ("out", "fresh"):
        run_program(f"data_tools/{name}.py", *flags, tmp_path / folder)
    names = [p.relative_to(tmp_path / "fresh") for p in (tmp_path / "fresh").rglob("*-*.npy")]
    names += [p.relative_to(tmp_path / "fresh") for p in (tmp_path / "fresh").rglob("*.zst")]
    assert names and all((tmp_path / "out" / n).read_bytes() == (tmp_path / "fresh" / n).read_bytes() for n in names)
