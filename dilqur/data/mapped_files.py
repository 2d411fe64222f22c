"""Memory-mapped .npy files, each mapped when it is first asked for. A map holds an open file as long as it lives."""

import errno
import mmap
import re
import resource
from dataclasses import dataclass

import numpy as np

from dilqur.common.errors import InputError

# The header that numpy writes for integers: to match it takes a twentieth of the time of numpy's parser.
_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00v\x00{'descr': '(<i[48])', 'fortran_order': False, 'shape': \((\d+), ?(\d*)\), } *\n"
)


class MappedFiles(dict):
    """key → MappedArray: open_one(key), mapped on first use. most: how many there can be, for which the soft limit on open
    files is raised, as far as the hard one allows."""

    def __init__(self, open_one, most):
        super().__init__()
        self._open_one, self._most = open_one, most
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft + most, hard), hard))

    def __missing__(self, key):
        self[key] = mapped = self._open_one(key)
        return mapped

    def __reduce__(self):  # a process that is spawned, not forked, maps its own
        return MappedFiles, (self._open_one, self._most)


@dataclass(slots=True)
class MappedArray:
    """values: a read-only array, a plain view of the map: slicing an np.memmap costs ten times as much."""

    values: np.ndarray
    _map: mmap.mmap

    def will_need(self, start, stop):
        """Have the system read values[start:stop] in one go, in the background. Without it a random-access map is read a
        page at a time, each waiting for the one before: on a disk, 5 times slower for 8 kB, 15 times for 128 kB."""
        if start < stop:
            size, header = self.values.itemsize, len(self._map) - self.values.nbytes
            first = (header + start * size) & -mmap.PAGESIZE
            self._map.madvise(mmap.MADV_WILLNEED, first, header + stop * size - first)


def map_npy(path, dtype, random_access=False):
    """MappedArray of the .npy file at `path`. random_access: read no more of the disk than is asked for.

    Raises FileNotFoundError; InputError where it is no whole .npy file of `dtype`, or where no more files can be mapped.
    """
    try:
        with path.open("rb") as file:
            header = _HEADER.fullmatch(file.read(128))
            shape = header and tuple(int(n) for n in header.groups()[1:] if n)
            found = np.memmap(file, header[1].decode(), "r", 128, shape) if header else np.load(path, mmap_mode="r")
    except OSError as problem:
        if problem.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            raise
        raise InputError(
            f"{path}: {problem.strerror.lower()}: pack larger shards (--shard_tokens), or raise the limit (ulimit -n)"
        ) from None
    except Exception:  # ValueError, EOFError, SyntaxError, TokenError: whatever damaged bytes lead numpy to
        raise InputError(f"{path}: not a whole .npy file: damaged or truncated; pack again") from None
    if found.dtype != dtype:
        raise InputError(f"{path}: holds {found.dtype}, not {np.dtype(dtype)}; pack again")
    if random_access:
        found._mmap.madvise(mmap.MADV_RANDOM)
    return MappedArray(found.view(np.ndarray), found._mmap)
