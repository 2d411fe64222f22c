"""What is in an input file (jsonl, parquet, txt; plain, .gz, .zst, .bz2), in blocks of whole records.

Cutting a file into blocks is cheap: it only decompresses and looks for line ends. Parsing them is dear, and many processes can
share it (dilqur/data/documents.py). Lines end at LF alone: U+2028 is a legal character inside JSON.
"""

import bz2
import gzip
import io
import re
import zlib
from dataclasses import dataclass
from pathlib import Path

import xxhash
import zstandard

from dilqur.common.errors import InputError
from dilqur.common.paths import COMPRESSIONS, identity_of, kind_of

BLOCK_BYTES = 1 << 20  # of text in a block: many documents, and small beside any memory
MAX_RECORD_BYTES = 256 << 20  # a longer line is a broken file, or one made to fill the memory
MAX_RATIO = 500  # text does not get 500 times smaller, a decompression bomb does
_MAGIC = {".gz": rb"\x1f\x8b", ".zst": rb"\x28\xb5\x2f\xfd", ".bz2": rb"BZh[1-9]1AY&SY", ".parquet": rb"PAR1"}


@dataclass
class Block:
    """A run of whole records of one file: lines as bytes, or rows of parquet as an Arrow record batch."""

    file: str
    index: int  # 0-based index within its file
    line: int  # number of its first line or row, from 1
    data: object
    share: float = 0.0  # how much of the file has been read at its end, 0 to 1
    too_long: tuple = ()  # numbers of the lines that were left out before this block because they are too long


def blocks(file, sample_by="line", skip=False, columns=None, identity=None):
    """Yield the Blocks of one file, in order; where they are cut depends on the file alone.

    skip: leave out lines of over MAX_RECORD_BYTES, instead of raising. columns: the columns of a parquet file that are
    wanted (None: all). identity: a dict that gets what `identity_of` says of the file before it is read, and at its end
    "xxh3", the hash of its bytes as they are on disk. Raises InputError for a file that is cut, damaged, of another kind
    than its name says, not there, or changed while it is read.
    """
    kind, number = kind_of(Path(file)), 0
    before = identity_of(file)
    digest = None if identity is None else xxhash.xxh3_128()
    if identity is not None:
        identity.update(before)
    try:
        _refuse_other_kind(file)
        cut = (
            _parquet_blocks(file, columns) if kind == ".parquet" else _line_blocks(file, kind, sample_by, skip, digest)
        )
        for block in cut:
            number = block.line
            yield block
        if kind == ".parquet" and digest is not None:
            with Path(file).open("rb") as raw:  # parquet is read from its end: hashed on its own
                while chunk := raw.read(1 << 22):
                    digest.update(chunk)
    except (EOFError, zlib.error, zstandard.ZstdError, gzip.BadGzipFile) as problem:
        raise InputError(f"{file}: truncated or damaged after line {number} ({problem}); fetch it again") from None
    except FileNotFoundError:
        raise InputError(f"{file}: is not there any more; has it been moved?") from None
    except OSError as problem:
        if problem.errno is not None:  # the system's: no permission, disk gone
            raise
        raise InputError(f"{file}: truncated or damaged after line {number} ({problem}); fetch it again") from None
    if identity_of(file) != before:
        raise InputError(f"{file}: changed while it was being read; wait until it is written, and start again")
    if identity is not None:
        identity["xxh3"] = digest.hexdigest()


def _refuse_other_kind(file):
    """The first bytes must be what the name says: a .gz that is none would be read as text, or the other way round."""
    with Path(file).open("rb") as raw:
        head = raw.read(10)
    is_kind = next((kind for kind, magic in _MAGIC.items() if re.match(magic, head, re.DOTALL)), None)
    named = next((kind for kind in (*COMPRESSIONS, ".parquet") if file.lower().endswith(kind)), None)
    if named and not head:
        raise InputError(f"{file}: empty, which no {named} file is: truncated; fetch it again")
    if is_kind and is_kind != named:
        raise InputError(f"{file}: is a {is_kind} file, which its name does not say; rename it")
    if not named and head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise InputError(f"{file}: UTF-16; make it UTF-8 first (iconv -f utf-16 -t utf-8)")


def _line_blocks(file, kind, sample_by, skip, digest):
    by = sample_by if kind == ".txt" else "line"
    size, read = max(1, Path(file).stat().st_size), 0
    with _open(file, digest) as stream:
        index, line, too_long = 0, 1, []
        while data := stream.read(BLOCK_BYTES):
            data += (rest := _rest_of_record(stream, data, by))
            read += len(data)
            if stream.compressed:
                _refuse_bomb(file, read, size)
            lines = data.count(b"\n") + (not data.endswith(b"\n"))
            if len(rest) > MAX_RECORD_BYTES and (by != "line" or not skip):
                what = "a line" if by == "line" else f"a {by}"
                raise InputError(f"{file}:{line + lines - 1}: {what} of over {MAX_RECORD_BYTES >> 20} MB; cut it up")
            if len(rest) > MAX_RECORD_BYTES:
                too_long.append(line + lines - 1)
                read += _discard_line(stream, rest)
                data = data[: data.rfind(b"\n", 0, -len(rest)) + 1]
            if data or too_long:
                yield Block(file, index, line, data, stream.disk.tell() / size, tuple(too_long))
                index, too_long = index + 1, []
            line += lines


def _refuse_bomb(file, read, size):
    """InputError where `read` bytes came out of a file of `size` bytes that cannot be text."""
    if read > 64 * BLOCK_BYTES and read > MAX_RATIO * size:
        raise InputError(f"{file}: unpacks to over {MAX_RATIO} times its size: that is no text; look at it")


def _rest_of_record(stream, data, by):
    """What is missing to the end of the last record in `data`; not more than one record's limit of it."""
    limit = MAX_RECORD_BYTES + 1
    if by == "line":
        return b"" if data.endswith(b"\n") else stream.readline(limit)
    if by == "document":
        return stream.read(limit)
    parts, length = [], 0
    last = data[data.rfind(b"\n", 0, -1) + 1 :]
    while (last.strip() or not last.endswith(b"\n")) and length < limit:
        last = (last if not last.endswith(b"\n") else b"") + (piece := stream.readline(limit))
        if not piece:
            break
        parts.append(piece)
        length += len(piece)
    return b"".join(parts)


def _discard_line(stream, piece):
    """Read on to the end of a line of which `piece` is a part, keeping nothing. Returns the bytes read."""
    read = 0
    while not piece.endswith(b"\n") and (piece := stream.readline(BLOCK_BYTES)):
        read += len(piece)
    return read


def _parquet_blocks(file, columns):
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(
            file, pre_buffer=False, buffer_size=1 << 20, page_checksum_verification=True
        ) as source:
            names = source.schema_arrow.names
            wanted = None if columns is None else [c for c in columns if c in names]
            if columns is not None and columns[0] not in names:
                raise InputError(f"{file}: no column {columns[0]!r} (columns: {', '.join(names)}); see --text_field")
            index, row, read, size = 0, 1, 0, Path(file).stat().st_size
            for group in range(source.num_row_groups):
                rows = _rows_at_once(source, group, wanted)
                for batch in source.iter_batches(batch_size=rows, row_groups=[group], columns=wanted):
                    read += batch.nbytes
                    _refuse_bomb(file, read, size)
                    part = max(1, batch.num_rows * BLOCK_BYTES // max(BLOCK_BYTES, batch.nbytes))
                    for first in range(0, batch.num_rows, part):
                        rows_here = batch.slice(first, part)
                        share = (row + rows_here.num_rows) / source.metadata.num_rows
                        yield Block(file, index, row, rows_here, share)
                        index, row = index + 1, row + rows_here.num_rows
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as problem:
        if isinstance(problem, PermissionError):
            raise
        raise InputError(f"{file}: not a whole parquet file ({str(problem).splitlines()[0]})") from None


def _rows_at_once(source, group, columns):
    """How many rows of a row group make a block, judged by what they take as stored, where what comes again is stored only
    once, and by its first rows."""
    meta = source.metadata.row_group(group)
    bytes_a_row = meta.total_byte_size / max(1, meta.num_rows)
    for first in source.iter_batches(batch_size=16, row_groups=[group], columns=columns):
        bytes_a_row = max(bytes_a_row, first.nbytes / first.num_rows)
        break
    return max(1, min(4096, int(BLOCK_BYTES / max(1, bytes_a_row))))


class _Stream(io.BufferedReader):
    """The decompressed bytes of a file. compressed: bool. disk: the file itself, whose position says how much is read."""


def _open(file, digest):
    disk = Path(file).open("rb", buffering=0)  # noqa: SIM115, it is closed with what reads it
    raw = disk if digest is None else _Hashing(disk, digest)
    if file.lower().endswith(".gz"):
        stream = _Stream(gzip.GzipFile(fileobj=io.BufferedReader(raw, 1 << 18)), BLOCK_BYTES)
    elif file.lower().endswith(".bz2"):
        stream = _Stream(_Whole(raw, bz2.BZ2Decompressor, "bz2 stream"), BLOCK_BYTES)
    elif file.lower().endswith(".zst"):
        stream = _Stream(
            _Whole(raw, lambda: zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj(), "zstd frame"),
            BLOCK_BYTES,
        )
    else:
        stream = _Stream(raw, BLOCK_BYTES)
    stream.compressed, stream.disk = file.lower().endswith(COMPRESSIONS), disk
    return stream


class _Hashing(io.RawIOBase):
    """A file whose bytes go through a digest as they are read: no second pass for the manifest."""

    def __init__(self, file, digest):
        self._file, self._digest = file, digest

    def readable(self):
        return True

    def readinto(self, target):
        n = self._file.readinto(target)
        self._digest.update(memoryview(target)[:n])
        return n

    def close(self):
        self._file.close()
        super().close()


class _Whole(io.RawIOBase):
    """The frames of a file, one after the other. zstandard's own reader ends a truncated frame in silence, and BZ2File takes a
    damaged second stream for the end: here every frame must be whole, and be followed by another or by nothing.

    decompressor: makes an object with decompress, eof and unused_data. what: what a frame is called.
    """

    def __init__(self, raw, decompressor, what):
        self._source, self._decompressor, self._what = raw, decompressor, what
        self._frame, self._ready = None, b""

    def readable(self):
        return True

    def readinto(self, target):
        while not self._ready:
            if self._frame and not getattr(self._frame, "needs_input", True) and not self._frame.eof:
                self._ready = memoryview(self._frame.decompress(b"", BLOCK_BYTES))  # bz2 keeps what did not fit
                continue
            chunk = self._frame.unused_data if self._frame and self._frame.eof else b""
            chunk = chunk or self._source.read(1 << 12)  # 4 kB of a zip bomb are 128 MB at most
            if not chunk:
                if self._frame and not self._frame.eof:
                    raise EOFError(f"the {self._what} has no end")
                return 0
            if self._frame is None or self._frame.eof:
                self._frame = self._decompressor()
            limit = (BLOCK_BYTES,) if hasattr(self._frame, "needs_input") else ()
            self._ready = memoryview(self._frame.decompress(chunk, *limit))
        n = min(len(target), len(self._ready))
        target[:n], self._ready = self._ready[:n], self._ready[n:]
        return n

    def close(self):
        self._source.close()
        super().close()
