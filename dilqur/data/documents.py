"""Documents out of blocks of input files, with file and line in every error; and which of them are held out for validation."""

import json
import re
import sys
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import orjson
import xxhash

from dilqur.common.errors import InputError
from dilqur.common.paths import expand, kind_of
from dilqur.data.blocks import MAX_RECORD_BYTES, blocks
from dilqur.pipeline.settings_parser import setting

_SKIP = "--on_error skip goes on without it and counts it"


@dataclass(kw_only=True)
class ReadingSettings:
    """How a program that reads documents is told what one is."""

    text_field: str = setting("key or column that holds the text", default="text")
    sample_by: Literal["line", "paragraph", "document"] = setting("one document of a .txt", default="line")
    on_error: Literal["stop", "skip"] = setting(
        "at a bad record (broken JSON or UTF-8, no text): stop, or skip and count it", default="stop"
    )


class Skipped:
    """Counts the records that are skipped, and says the first SAID of them. count: int."""

    SAID = 20

    def __init__(self):
        self.count = 0

    def __call__(self, message):
        self.count += 1
        if self.count <= self.SAID:
            print(f"skipped: {message.replace(f'; {_SKIP}', '')}", file=sys.stderr)
        if self.count == self.SAID:
            print("skipped: what follows is only counted", file=sys.stderr)


@dataclass
class Document:
    """One document and where it came from: `line` counts from 1 (in parquet: the row)."""

    text: str
    file: str
    line: int
    record: dict  # everything the source said of it, the text included

    @property
    def where(self):
        return f"{self.file}:{self.line}"


def read(files, text_field="text", sample_by="line", on_error=None):
    """Yield every Document of `files`, in order.

    text_field: the key (jsonl) or column (parquet) that holds the text. sample_by: what one document of a .txt file is,
    "line", "paragraph" (up to an empty line) or "document" (the file), as in Hugging Face datasets.
    on_error: None raises InputError at the first bad record; a function is called with the message instead and the record is
    skipped. A file that cannot be read to its end always raises: nobody knows what it held.
    """
    for file in files:
        for block in blocks(file, sample_by, skip=on_error is not None):
            yield from documents(block, text_field, sample_by, on_error)


def read_input(settings):
    """(iterator of the Documents of `settings.input`, Skipped), read as the program's ReadingSettings say."""
    skipped = Skipped()
    on_error = skipped if settings.on_error == "skip" else None
    return read(expand(settings.input), settings.text_field, settings.sample_by, on_error), skipped


def read_jsonl(file, on_error=None):
    """Yield (line number, object) of a .jsonl file, whatever its compression. Errors as in `read`."""
    for block in blocks(file, skip=on_error is not None):
        yield from _objects(block, on_error)


def is_validation(text, fraction):
    """Is this document held out? A function of its letters and digits alone, so equal for every tokenizer and machine,
    and for copies that differ in case, spacing or punctuation."""
    letters = fold(re.sub(r"[\W_]+", "", text))
    return bool(fraction) and xxhash.xxh3_64_intdigest(letters.encode("utf-8"), seed=1) < fraction * 2**64


def fold(text):
    """Casefolded, and every i alike: which of i, ı, I and İ are one letter depends on the language of who changed the case."""
    return text.casefold().replace("\u0307", "").replace("ı", "i")


# -- parsing ----------------------------------------------------------------------------------------------------------


def documents(block, text_field="text", sample_by="line", on_error=None):
    """Yield the Documents of one Block. Every record of it becomes one, or a call of `on_error` (None: InputError)."""
    text_field = "text" if kind_of(Path(block.file)) == ".txt" else text_field
    for line, record in records(block, sample_by, on_error):
        text = record.get(text_field)
        where = f"{block.file}:{line}"
        if not isinstance(text, str):
            _report(f"{where}: {_no_text(record, text_field)}; see --text_field; {_SKIP}", on_error)
        elif "\0" in text:
            _report(f"{where}: NUL (U+0000) in the text: damaged, or not text; {_SKIP}", on_error)
        else:
            yield Document(text, block.file, line, record)


def records(block, sample_by="line", on_error=None):
    """(line, record) of a Block, whatever is in its fields; of a text file {"text"}."""
    kind = kind_of(Path(block.file))
    if kind == ".txt":
        return ((line, {"text": text}) for line, text in _texts(block, sample_by, on_error))
    return _rows(block, on_error) if kind == ".parquet" else _objects(block, on_error)


def _no_text(record, text_field):
    if text_field in record:
        return f"{text_field!r} is {str(record[text_field])[:40]!r}, not text"
    keys = ", ".join(key if key.isprintable() and len(key) < 40 else repr(key[:40]) for key in islice(record, 20))
    return f"no text field {text_field!r} (keys: {keys or 'none'})"


def _lines(block, on_error):
    """(number, bytes) of the lines of a block that hold something; the over-long ones before it are reported."""
    for line in block.too_long:
        _report(f"{block.file}:{line}: a line of over {MAX_RECORD_BYTES >> 20} MB; {_SKIP}", on_error)
    data = block.data.removeprefix(b"\xef\xbb\xbf") if block.line == 1 else block.data  # a byte order mark
    for number, raw in enumerate(data.split(b"\n"), block.line):
        if raw and not raw.isspace():
            yield number, raw


def _objects(block, on_error):
    """(line, object) of the lines of a block of .jsonl."""
    for number, raw in _lines(block, on_error):
        try:
            record = orjson.loads(raw)
        except orjson.JSONDecodeError:
            try:  # Python's parser takes a little more (NaN), and says better what is wrong
                record = _loads(raw)
            except ValueError as mistake:
                _report(f"{block.file}:{number}: {mistake}; {_SKIP}", on_error)
                continue
            except RecursionError:
                _report(f"{block.file}:{number}: JSON nested too deeply; {_SKIP}", on_error)
                continue
        if not isinstance(record, dict):
            _report(f"{block.file}:{number}: not a JSON object; {_SKIP}", on_error)
            continue
        yield number, record


def _loads(raw):
    """json.loads of UTF-8 bytes. Raises ValueError with what is wrong with them."""
    text = _decode(raw)
    try:
        record = json.loads(text)
        json.dumps(record, ensure_ascii=False).encode("utf-8")
    except json.JSONDecodeError as problem:
        raise ValueError(f"broken JSON ({problem.msg}, column {problem.colno})") from None
    except UnicodeEncodeError:
        raise ValueError("a lone surrogate (\\ud800 to \\udfff) is no character") from None
    return record


def _rows(block, on_error):
    """(row, record) of a block of parquet."""
    try:
        yield from enumerate(block.data.to_pylist(), block.line)
        return
    except UnicodeDecodeError:  # it does not say in which row
        pass
    for index in range(block.data.num_rows):
        try:
            yield block.line + index, block.data.slice(index, 1).to_pylist()[0]
        except UnicodeDecodeError as problem:
            _report(f"{block.file}:{block.line + index}: invalid UTF-8 at byte {problem.start}; {_SKIP}", on_error)


def _texts(block, sample_by, on_error):
    """(line, text) of a block of .txt."""
    if sample_by == "line":
        for number, raw in _lines(block, on_error):
            try:
                yield number, _decode(raw).removesuffix("\r")
            except ValueError as mistake:
                _report(f"{block.file}:{number}: {mistake}; {_SKIP}", on_error)
        return
    kept, start = [], None
    numbered = list(enumerate(block.data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), block.line))
    last = [number for number, raw in numbered if raw.strip()][-1:]
    for number, raw in numbered:
        if raw.strip() or (kept and sample_by == "document"):
            start = start or number
            kept.append(raw.removesuffix(b"\r"))
        if start and (number == last[0] or (sample_by == "paragraph" and not raw.strip())):
            try:
                yield start, _decode(b"\n".join(kept))
            except ValueError as mistake:
                _report(f"{block.file}:{start}: {mistake}; {_SKIP}", on_error)
            kept, start = [], None
            if number == last[0]:
                return


def _decode(raw):
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as problem:
        raise ValueError(f"invalid UTF-8 at byte {problem.start}") from None


def _report(message, on_error):
    if on_error is None:
        raise InputError(message)
    on_error(message)
