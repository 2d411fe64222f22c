"""Malformed input by the thousand for clean_corpus and pack_mmap: no traceback, no hang, and every record accounted for.

    python tests/support/fuzz_inputs.py TOKENIZER_FOLDER [INPUTS] [SEED]

Files of 200 records, most of them broken in some way, of every kind and compression, and some of the files broken too. Each is
given to both programs, once to be refused at the first bad record (exit code 2, one line, nothing left but hidden files) and
once to be read past them: then documents and bad records must add up to the records that were written.
"""

import bz2
import contextlib
import gzip
import io
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet
import zstandard

ROOT = Path(__file__).parents[2]
RECORDS = 200  # in a file
SECONDS = 60  # a run that takes longer hangs
LONG = 1 << 20  # the limit of a line is set down to this: a gigabyte a file would make a slow test of the same code

WORDS = [
    "Bakı",
    "şəhər",
    "dənizin",
    "sahilində",
    "qədim",
    "İstanbul",
    "ığdır",
    "kitablar",
    "U+2028 \u2028",
    "\x85",
    "\u0307",
    "👨\u200d👩",
    "<|eot_id|>",
]
STRANGE = [
    "\\u0000",
    "\\ud800",
    "\\udc00\\ud800",
    "\\uffff",
    "\\x",
    "\\",
    '"',
    "\t",
    "\x01",
    "\x1c",
    "\u2029",
    "\ufeff",
    "}{",
    "{}",
    "[[",
    ",",
    ":",
]
VALUES = [
    "null",
    "7",
    "-0",
    "1e999",
    "NaN",
    "[]",
    "{}",
    "true",
    '["a"]',
    '{"a": "b"}',
    "1" * 400,
    "[" * 40 + "]" * 40,
    "[" * 3000,
    '"' + "a" * 9,
    '""',
]
BYTES = [
    b"\xff",
    b"\x00",
    b"\xc3",
    b"\xed\xa0\x80",
    b"\xf4\x90\x80\x80",
    b"\xc0\xaf",
    b"\r",
    b"\x0b\x0c",
    b"\xe2\x80\xa8",
    b"\xef\xbb\xbf",
]


def text(chance):
    return " ".join(chance.choices(WORDS, k=chance.randint(0, 30)))


def record(chance):
    """One line of .jsonl as bytes, without a line feed in it; four of five are broken, or odd."""
    value = json.dumps(text(chance), ensure_ascii=chance.random() < 0.3)
    line = f'{{"text": {value}, "id": {chance.randint(0, 99)}}}'
    kind = chance.randrange(10)
    if kind == 1:
        at = chance.randint(0, len(line))
        line = line[:at] + chance.choice(STRANGE) + line[at + chance.randint(0, 2) :]
    elif kind == 2:
        line = f'{{"{chance.choice(["text", "txt", "id"])}": {chance.choice(VALUES)}}}'
    elif kind == 3:
        line = line[: chance.randint(0, len(line))]
    elif kind == 4:
        line = chance.choice(VALUES)
    elif kind == 5:
        line = line[:-1] + f', "text": {chance.choice(VALUES)}}}'  # the key twice
    elif kind == 6:
        line = chance.choice(["", " ", "\t", "\r", "\xa0", "\x00", line + line, line + "\r", " " * 50 + line])
    raw = line.encode("utf-8", "surrogatepass").replace(b"\n", b" ")
    if kind == 7:
        at = chance.randint(0, len(raw))
        raw = raw[:at] + chance.choice(BYTES) + raw[at:]
    elif kind == 8:
        raw = bytearray(raw)
        for _ in range(chance.randint(1, 4)):
            raw[chance.randrange(len(raw))] = chance.choice([b for b in range(256) if b != 10])
        raw = bytes(raw)
    elif kind == 9 and chance.random() < 0.02:
        raw = raw[:-1] + b" " * (2 * LONG + chance.randint(0, 9)) + b"}"
    return raw


COMPRESS = {
    "": lambda data: data,
    ".gz": lambda data: gzip.compress(data, 1),
    ".zst": lambda data: zstandard.compress(data, 1),
    ".bz2": lambda data: bz2.compress(data, 1),
}


def make_file(folder, chance):
    """(path, records in it or None where the file itself is broken)."""
    kind = chance.choice([".jsonl", ".jsonl", ".jsonl", ".txt", ".parquet"])
    if kind == ".parquet":
        values = [chance.choice([text(chance), None, "a\0b", ""]) for _ in range(RECORDS)]
        column = chance.choice(
            [pyarrow.array(values), pyarrow.array([v and v.encode() for v in values]), pyarrow.array(range(RECORDS))]
        )
        path = folder / "a.parquet"
        name = chance.choice(["text", "text", "txt"])
        pyarrow.parquet.write_table(pyarrow.table({name: column}), path, row_group_size=chance.randint(1, 300))
        data, count = (
            path.read_bytes(),
            RECORDS if name == "text" else None,
        )  # a file without the column is refused whole
    else:
        lines = [record(chance) for _ in range(RECORDS)]
        end = chance.choice([b"\n", b"\n", b"\r\n"])
        compression = chance.choice(list(COMPRESS))
        data = end.join(lines) + end * chance.randint(0, 1)
        if not compression and data[:2] in (b"\xff\xfe", b"\xfe\xff", b"\x1f\x8b", b"BZ", b"PA", b"\x28\xb5"):
            data = b" " + data  # not what this is about
        data = data.removeprefix(b"\xef\xbb\xbf")
        count = sum(1 for line in data.split(b"\n") if line and not line.isspace())
        data = COMPRESS[compression](data)
        path = folder / f"a{kind}{compression}"
    if chance.random() < 0.15 and path.suffix in (".gz", ".zst", ".bz2", ".parquet"):
        damage = chance.randrange(4)
        if damage == 0:
            data = data[: chance.randint(0, len(data) - 1)]
        elif damage == 1:
            data = data + bytes(chance.choices(range(1, 256), k=chance.randint(1, 20)))
        elif damage == 2:
            at = chance.randrange(len(data))
            data = data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :]
        else:
            data = bytes(chance.choices(range(256), k=chance.randint(1, 99)))
        count = None
    path.write_bytes(data)
    return path, count


def run(main, arguments):
    """(exit code, standard error) of a program's main, in this process. What it raises but SystemExit goes on up."""
    sys.argv, out, err = ["program", *map(str, arguments)], io.StringIO(), io.StringIO()
    signal.alarm(SECONDS)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
        return 0, err.getvalue()
    except SystemExit as done:
        return done.code, err.getvalue()
    finally:
        signal.alarm(0)


def visible(folder):
    return [
        p
        for p in folder.rglob("*")
        if p.is_file() and not any(part.startswith(".") for part in p.relative_to(folder).parts)
    ]


def check(program, main, flags, path, count, folder):
    """One file through one program, both ways; AssertionError with what was wrong."""
    for on_error in ("stop", "skip"):
        out = folder / "out"
        code, said = run(main, ["--input", path, "--output_dir", out, "--on_error", on_error, "--num_proc", 1, *flags])
        lines = [line for line in said.splitlines() if not line.startswith("skipped: ")]
        assert code in (0, 2), f"exit code {code}: {said}"
        assert "Traceback" not in said
        if code == 2:
            assert len(lines) == 1 and lines[0].startswith("error: "), said
            names = [p.name for p in out.rglob("*")] if out.exists() else []
            assert "manifest.json" not in names and not [n for n in names if n.endswith(".part")], names
            assert ".resume.json" in names or not visible(out), visible(out)  # whole shards, to be gone on with
            nothing_left = ": nothing to" in said or "is left (" in said
            assert on_error == "stop" or count is None or nothing_left, said
        else:
            manifest = json.loads((out / "manifest.json").read_text())
            counted = manifest["result"]
            if program == "pack_mmap":
                records, documents, bad = manifest["records"], manifest["documents"], manifest["bad_records"]
            else:
                bad = counted["dropped"].get("bad_record", 0)
                records = counted["read"]
                documents = records - bad
                kept = counted["kept_train"] + counted["kept_validation"]
                assert records == kept + sum(counted["dropped"].values())
            assert records == documents + bad
            assert count is None or records == count, f"{records} records, {count} were written"
            assert on_error == "skip" or not bad
        shutil.rmtree(out, ignore_errors=True)


def fuzz(tokenizer, inputs, seed=0):
    """Returns how many records were tried."""
    sys.path.insert(0, str(ROOT))
    import dilqur.data.blocks
    from data_tools import clean_corpus, pack_mmap

    dilqur.data.blocks.MAX_RECORD_BYTES = LONG
    programs = {
        "pack_mmap": (pack_mmap.main, ["--tokenizer", tokenizer, "--shard_tokens", 1000]),
        "clean_corpus": (
            clean_corpus.main,
            ["--min_chars", 1, "--near_duplicate_threshold", 0.8, "--dotted_i", "true"],
        ),
    }
    tried, files, started = 0, 0, time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        while tried < inputs:
            source, chance = Path(folder) / "in", random.Random(f"{seed} {files}")
            source.mkdir()
            path, count = make_file(source, chance)
            for program, (main, flags) in programs.items():
                try:
                    check(program, main, flags, path, count, Path(folder))
                except BaseException:
                    kept = shutil.copy(path, tempfile.gettempdir())
                    print(f"seed {seed}, file {files}: {program} on {kept}", file=sys.stderr)
                    raise
            shutil.rmtree(source)
            files, tried = files + 1, tried + RECORDS
            if files % 100 == 0:
                print(f"{tried:,} records in {files:,} files, {time.monotonic() - started:.0f} s", flush=True)
    print(f"{tried:,} records in {files:,} files, seed {seed}: no traceback, no hang, every record counted")
    return tried


if __name__ == "__main__":
    fuzz(sys.argv[1], int((sys.argv[2:] or [1_000_000])[0]), int((sys.argv[3:] or [0])[0]))
