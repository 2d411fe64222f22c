"""The token files of other tools: where in them the ids lie, and where each document ends.

flat       ids one after the other (nanoGPT), with llm.c's header of 1,024 bytes or without
megatron   X.bin with X.idx beside it (Megatron-LM, NeMo, datatrove's MegatronDocumentTokenizer)
datatrove  X.ds with X.ds.index (datatrove, nanotron)
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dilqur.common.errors import InputError
from dilqur.common.paths import identity_of

LLM_C = {20240520: (1, "<u2"), 20240801: (7, "<u4")}  # magic: version, dtype (llm.c, dev/data/data_common.py)
LLM_C_HEADER = 1024
MEGATRON_MAGIC = b"MMIDIDX\x00\x00"
# megatron/core/datasets/indexed_dataset.py, class DType; 6 and 7 are floating-point
MEGATRON_DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}


@dataclass
class TokenFile:
    """Foreign tokens: `tokens` numbers of `dtype`, `offset` bytes into `path`. ends: int64 (documents,), where each document
    ends, in tokens; None for a flat file until `split_documents` has found out. index: the files that said so.
    split_at: "bos" or "eos", at which a flat file is split."""

    path: Path
    dtype: np.dtype
    offset: int
    tokens: int
    ends: np.ndarray | None = None
    index: tuple = ()
    split_at: str | None = None

    def __post_init__(self):
        self._identities = {path: identity_of(path) for path in (self.path, *self.index)}

    def chunks(self, stops):
        """Yield (start, ids) for each piece up to the next of `stops`, in tokens, read from the disk one after the other.
        Raises InputError where a file has changed since its header or index was read."""
        start = 0
        with self.path.open("rb") as file:
            file.seek(self.offset)
            for stop in stops:
                ids = np.fromfile(file, self.dtype, stop - start)
                if len(ids) < stop - start:
                    self.refuse_changed()
                yield start, ids
                start = stop
        self.refuse_changed()

    def refuse_changed(self):
        """InputError where a file is not any more what it was."""
        for path, identity in self._identities.items():
            if identity_of(path) != identity:
                raise InputError(f"{path}: changed while it was being read; wait until it is written, and start again")


def flat(path, dtype):
    """A TokenFile of a flat file. dtype: its name, or None where llm.c's header says it."""
    size = path.stat().st_size
    with path.open("rb") as file:
        header = np.frombuffer(file.read(12), "<i4").tolist() if size >= LLM_C_HEADER else [0]
    if header[0] in LLM_C and header[1] == LLM_C[header[0]][0]:
        found = np.dtype(LLM_C[header[0]][1])
        if dtype and found != dtype:
            raise InputError(f"{path}: llm.c's header says {found}, --dtype says {dtype}; leave --dtype out")
        if size != LLM_C_HEADER + header[2] * found.itemsize:
            raise InputError(
                f"{path}: {size} bytes, but llm.c's header says {header[2]} tokens: truncated; copy it again"
            )
        return TokenFile(path, found, LLM_C_HEADER, header[2])
    if not dtype:
        raise InputError(f"{path}: a flat file does not say how wide its ids are: give --dtype uint16 or uint32")
    found = np.dtype(dtype).newbyteorder("<")
    if size % found.itemsize:
        raise InputError(
            f"{path}: {size} bytes are no whole number of {dtype} ids: truncated, or another --dtype or format"
        )
    halves = np.fromfile(path, "<u2", 1 << 16)
    if dtype == "uint16" and len(halves) >= 64 and not size % 4 and halves[1::2].max() < 16:
        raise InputError(  # high halves of ids below a million: as uint16 every other "token" would pass for an id
            f"{path}: every other number is below 16: these are uint32 ids; give --dtype uint32"
        )
    return TokenFile(path, found, 0, size // found.itemsize)


def megatron(path, dtype):
    """A TokenFile of Megatron-LM's MMapIndexedDataset. A document's sequences become one document.

    .idx: magic (9 bytes), version 1 (u64), dtype code (u8), sequences n (u64), document boundaries m (u64); then length
    int32 (n,) and byte position int64 (n,) of each sequence, and int64 (m,): the first sequence of each document, and n.
    """
    index = path.with_suffix(".idx")
    raw = _read_index(index)
    if raw[:9] != MEGATRON_MAGIC:
        raise InputError(f"{index}: no index of Megatron-LM (it begins with {raw[:9]!r}, not {MEGATRON_MAGIC!r})")
    if len(raw) < 34:
        raise InputError(f"{index}: truncated in its header; copy it again")
    version, code = int.from_bytes(raw[9:17], "little"), raw[17]
    n, m = (int(x) for x in np.frombuffer(raw, "<u8", 2, 18))
    if version != 1:
        raise InputError(f"{index}: version {version}; only 1 is known")
    if code not in MEGATRON_DTYPES:
        raise InputError(f"{index}: dtype code {code} is not one of token ids ({', '.join(map(str, MEGATRON_DTYPES))})")
    found = np.dtype(MEGATRON_DTYPES[code])
    if dtype and found != dtype:
        raise InputError(f"{index}: says {found}, --dtype says {dtype}; leave --dtype out")
    if len(raw) not in (34 + 12 * n + 8 * m, 34 + 13 * n + 8 * m):  # the longer one has a mode (int8) for each sequence
        raise InputError(
            f"{index}: {len(raw)} bytes do not hold {n} sequences and {m} boundaries: truncated; copy it again"
        )
    lengths = np.frombuffer(raw, "<i4", n, 34)
    positions = np.frombuffer(raw, "<i8", n, 34 + 4 * n)
    boundaries = np.frombuffer(raw, "<i8", m, 34 + 12 * n)
    starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    if (lengths < 0).any() or not np.array_equal(positions, starts[:-1] * found.itemsize):
        raise InputError(f"{index}: its sequences do not lie one after the other: damaged; write it again")
    if not m or boundaries[0] != 0 or boundaries[-1] != n or (np.diff(boundaries) < 0).any():
        raise InputError(f"{index}: its document boundaries do not go from 0 to {n}: damaged; write it again")
    _check_size(path, index, int(starts[-1]) * found.itemsize)
    return TokenFile(path, found, 0, int(starts[-1]), starts[boundaries[1:]], (index,))


def datatrove(path, dtype):
    """A TokenFile of datatrove's TokenizedFile: uint16 or uint32 ids, and in X.ds.index the end of each document (uint64)."""
    index, metadata = (path.with_name(path.name + suffix) for suffix in (".index", ".metadata"))
    raw, size = _read_index(index), path.stat().st_size
    if len(raw) % 8:
        raise InputError(f"{index}: {len(raw)} bytes are no whole number of document ends: truncated; copy it again")
    ends = np.frombuffer(raw, "<u8").astype(np.int64)
    if (np.diff(ends, prepend=0) < 0).any():
        raise InputError(f"{index}: its document ends do not ascend: damaged, or no index of datatrove")
    tokens = int(ends[-1]) if len(ends) else 0
    widths = {"uint16": 2, "uint32": 4}
    name = dtype or next((name for name, width in widths.items() if tokens * width == size), "uint16")
    _check_size(path, index, tokens * widths[name])
    used = (index,)
    if metadata.exists():
        used = (index, metadata)
        stated = metadata.read_text(encoding="utf-8", errors="replace").split("\n")
        width = stated[0].rpartition("|")[2]
        if stated[1:2] != [str(tokens)] or (width.isdecimal() and int(width) != widths[name]):
            raise InputError(
                f"{metadata}: says {' '.join(stated[1:2])} tokens of {width} bytes, {path.name} has {tokens} of "
                f"{widths[name]}: files of different runs"
            )
    return TokenFile(path, np.dtype(name).newbyteorder("<"), 0, tokens, ends, used)


def _read_index(index):
    try:
        return index.read_bytes()
    except FileNotFoundError:
        raise InputError(
            f"{index}: not there; without it, --format flat splits the documents at a token (--eos_id or --bos_id)"
        ) from None


def _check_size(path, index, needed):
    if (size := path.stat().st_size) != needed:
        what = "truncated" if size < needed else "another file's index"
        raise InputError(f"{path}: {size} bytes, but {index.name} needs {needed}: {what}; copy both again")
