"""Documents in: jsonl, parquet and txt, plain, .gz or .zst, with file and line in every error.

Lines end at LF alone (U+2028 is a legal character inside JSON). Also here: which documents are held out for validation.
"""

import gzip
import io
import json
import lzma
import re
import zlib
from dataclasses import dataclass
from pathlib import Path

import xxhash
import zstandard

from dilqur.errors import InputError

FORMATS = (".jsonl", ".json", ".parquet", ".txt")
COMPRESSIONS = (".gz", ".zst")
MAX_LINE_BYTES = 256 << 20  # a longer line is a broken file, or one made to fill the memory


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


def expand(inputs):
    """Files, folders and globs → a sorted list of files without repeats. Raises InputError for what is not there."""
    files = []
    for item in inputs:
        path = Path(item)
        if path.is_dir():
            found = [p for p in path.rglob("*") if p.is_file() and _kind(p) and not _hidden(p.relative_to(path))]
            if not found:
                raise InputError(f"{item}: no {', '.join(FORMATS)} file in this folder (plain, .gz or .zst)")
        elif path.is_file():
            if not _kind(path):
                raise InputError(f"{item}: not a known format; give {', '.join(FORMATS)}, plain, .gz or .zst")
            found = [path]
        else:
            found = [p for p in Path(path.anchor or ".").glob(str(path.relative_to(path.anchor))) if p.is_file()]
            if not found:
                raise InputError(f"{item}: no such file, folder or pattern")
        files += sorted(map(str, found))
    return list(dict.fromkeys(files))


def read(files, text_field="text", sample_by="line", on_error=None):
    """Yield every Document of `files`, in order.

    text_field: the key (jsonl) or column (parquet) that holds the text. sample_by: what one document of a .txt file is,
    "line", "paragraph" (up to an empty line) or "document" (the file), as in Hugging Face datasets.
    on_error: None raises InputError at the first bad record; a function is called with the message instead and the
    record is skipped. A file that cannot be decompressed to its end always raises.
    """
    for file in files:
        kind = _kind(Path(file))
        if kind == ".parquet":
            yield from _read_parquet(file, text_field, on_error)
        elif kind == ".txt":
            yield from _read_txt(file, sample_by, on_error)
        else:
            for line, record in read_jsonl(file, on_error):
                if not isinstance(record.get(text_field), str):
                    keys = ", ".join(record) or "none"
                    _report(f"{file}:{line}: no text field {text_field!r} (keys: {keys}); see --text_field", on_error)
                    continue
                yield Document(record[text_field], file, line, record)


def read_jsonl(file, on_error=None):
    """Yield (line number, object) of a .jsonl file, whatever its compression. Errors as in `read`."""
    for number, raw in enumerate(_lines(file), 1):
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as problem:
            _report(f"{file}:{number}: invalid UTF-8 at byte {problem.start}; {_SKIP}", on_error)
            continue
        if not text.strip():
            continue
        try:
            record = json.loads(text)
            text.encode("utf-8") if "\\ud" not in text.lower() else json.dumps(record, ensure_ascii=False).encode()
        except json.JSONDecodeError as problem:
            _report(f"{file}:{number}: broken JSON ({problem.msg}, column {problem.colno}); {_SKIP}", on_error)
            continue
        except UnicodeEncodeError:
            _report(f"{file}:{number}: a lone surrogate (\\ud800 to \\udfff) is no character; {_SKIP}", on_error)
            continue
        except (RecursionError, ValueError):  # what Python's parser refuses though it is JSON
            _report(f"{file}:{number}: JSON nested too deeply, or a number of over 4,300 digits; {_SKIP}", on_error)
            continue
        if not isinstance(record, dict):
            _report(f"{file}:{number}: not a JSON object; {_SKIP}", on_error)
            continue
        yield number, record


def is_validation(text, fraction):
    """Is this document held out? A function of its letters and digits alone, so equal for every tokenizer and machine,
    and for copies that differ in case, spacing or punctuation."""
    if not fraction:
        return False
    letters = re.sub(r"[\W_]+", "", text).casefold()
    return xxhash.xxh3_64_intdigest(letters.encode("utf-8"), seed=1) < fraction * 2**64


_SKIP = "--skip_bad_records true goes on without it and counts it"


def _kind(path):
    suffixes = path.suffixes[-2:]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes = suffixes[:-1]
    return suffixes[-1] if suffixes and suffixes[-1] in FORMATS else None


def _hidden(path):
    return any(part.startswith(".") for part in path.parts)


def _lines(file):
    """The lines of a file as bytes, without their LF; InputError where the compressed data is cut or damaged."""
    number = 0
    try:
        with _open(file) as stream:
            while line := stream.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(line) > MAX_LINE_BYTES:
                    raise InputError(
                        f"{file}:{number}: a line of over {MAX_LINE_BYTES >> 20} MB; one document a line, please"
                    )
                yield line.removesuffix(b"\n")
    except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError, lzma.LZMAError) as problem:
        raise InputError(f"{file}: truncated or damaged after line {number} ({problem}); fetch it again") from None


def _open(file):
    if file.endswith(".gz"):
        return gzip.open(file, "rb")
    if file.endswith(".zst"):
        return io.BufferedReader(_WholeZstd(file), 1 << 20)
    return Path(file).open("rb")


class _WholeZstd(io.RawIOBase):
    """zstandard's own reader ends a truncated frame in silence: this one checks that the last frame is whole."""

    def __init__(self, file):
        self._source, self._frame, self._ready = Path(file).open("rb"), None, b""  # noqa: SIM115, close() is below

    def readable(self):
        return True

    def readinto(self, target):
        while not self._ready:
            chunk = self._frame.unused_data if self._frame and self._frame.eof else b""
            chunk = chunk or self._source.read(1 << 12)  # 4 kB of a zip bomb are 128 MB at most
            if not chunk:
                if self._frame and not self._frame.eof:
                    raise EOFError("the zstd frame has no end")
                return 0
            if self._frame is None or self._frame.eof:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
            self._ready = memoryview(self._frame.decompress(chunk))
        n = min(len(target), len(self._ready))
        target[:n], self._ready = self._ready[:n], self._ready[n:]
        return n

    def close(self):
        self._source.close()
        super().close()


def _read_parquet(file, text_field, on_error):
    import pyarrow
    import pyarrow.parquet

    try:
        source = pyarrow.parquet.ParquetFile(file)
        if text_field not in source.schema_arrow.names:
            names = ", ".join(source.schema_arrow.names)
            raise InputError(f"{file}: no column {text_field!r} (columns: {names}); see --text_field")
        row = 0
        for batch in source.iter_batches(batch_size=1024):
            for record in batch.to_pylist():
                row += 1
                if not isinstance(record[text_field], str):
                    _report(f"{file}:{row}: {text_field!r} is {record[text_field]!r}, not text; {_SKIP}", on_error)
                    continue
                yield Document(record[text_field], file, row, record)
    except (pyarrow.ArrowInvalid, pyarrow.ArrowException, UnicodeDecodeError, OSError) as problem:
        raise InputError(f"{file}: not a whole parquet file ({str(problem).splitlines()[0]})") from None


def _read_txt(file, sample_by, on_error):
    block, start = [], 1
    for number, raw in enumerate(_lines(file), 1):
        try:
            line = raw.decode("utf-8")
        except UnicodeDecodeError as problem:
            _report(f"{file}:{number}: invalid UTF-8 at byte {problem.start}; {_SKIP}", on_error)
            continue
        if sample_by == "line":
            if line.strip():
                yield Document(line, file, number, {"text": line})
        elif line.strip() or (sample_by == "document" and block):
            start = number if not block else start
            block.append(line)
        elif block:
            yield Document("\n".join(block), file, start, {"text": "\n".join(block)})
            block = []
    if block:
        text = "\n".join(block).strip("\n")
        yield Document(text, file, start, {"text": text})


def _report(message, on_error):
    if on_error is None:
        raise InputError(message)
    on_error(message)
