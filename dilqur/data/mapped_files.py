"""Files read by memory-mapping: opened when first asked for, and never more at once than this process may hold open.

A map keeps a descriptor of its file (Python duplicates it), and a trillion tokens are thousands of files. So the soft limit
on descriptors is raised when it comes near, and beyond that the map used longest ago is closed: it is opened again when
it is needed. Arrays are plain views of the maps: slicing an np.memmap costs ten times as much.
"""

import errno
import math
import mmap
import re
import resource
import weakref
from collections import OrderedDict

import numpy as np
from numpy.lib import format as npy_format  # numpy loads it when it is first used: not in the middle of a first step

from dilqur.common.errors import InputError

MOST_MAPS = 32_768  # half of Linux's default vm.max_map_count


class MappedFiles:
    """name → MappedArray, opened on first use. All instances of a process share one limit."""

    _all = weakref.WeakSet()

    def __init__(self):
        self._arrays = OrderedDict()
        MappedFiles._all.add(self)

    def get(self, name, open_one):
        """The array called `name`; open_one(name) makes it where it is not open."""
        try:
            self._arrays.move_to_end(name)
        except KeyError:
            self._arrays[name] = _open(name, open_one)
        return self._arrays[name]

    def __len__(self):
        return len(self._arrays)

    def __reduce__(self):  # a process that is spawned, not forked, opens its own
        return MappedFiles, ()


class MappedArray:
    """values: the read-only array, a plain view of the map."""

    __slots__ = ("_map", "_offset", "values")

    def __init__(self, file, dtype, offset, shape, random_access):
        count, self._map, self._offset = math.prod(shape), None, offset
        if count == 0:  # an empty file cannot be mapped
            self.values = np.empty(shape, dtype)
            return
        self._map = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        if random_access:
            self._map.madvise(mmap.MADV_RANDOM)
        self.values = np.frombuffer(self._map, dtype, count, offset).reshape(shape)

    def will_need(self, start, stop):
        """Have the system read values[start:stop] in one go, in the background. Without it a random-access map is read a
        page at a time, and each waits for the one before: on a disk, 5 times slower for 8 kB, 15 times for 128 kB."""
        if start < stop:
            size = self.values.itemsize
            first = (self._offset + start * size) & -mmap.PAGESIZE
            self._map.madvise(mmap.MADV_WILLNEED, first, self._offset + stop * size - first)


def map_npy(path, dtype, random_access=False):
    """MappedArray of the .npy file at `path`. random_access: read no more of the disk than is asked for.

    Raises FileNotFoundError, and InputError where it is no .npy file of `dtype`, or shorter than its header says.
    """
    with open(path, "rb") as file:  # noqa: PTH123, half the time of Path.open
        found, shape = _read_header(file, path)
        if found != dtype:
            raise InputError(f"{path}: holds {found}, not {np.dtype(dtype)}; pack again")
        try:
            return MappedArray(file, found, file.tell(), shape, random_access)
        except ValueError:
            raise InputError(f"{path}: shorter than its header says; pack again") from None


# what numpy and we write: matching it takes a twentieth of the time of numpy's parser, which is there for all else
_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00v\x00{'descr': '(<i[48])', 'fortran_order': False, 'shape': \((\d+), ?(\d*)\), } *\n"
)


def _read_header(file, path):
    """(dtype, shape) of a .npy file, which is left at its first number."""
    if match := _HEADER.fullmatch(file.read(128)):
        return np.dtype(match[1].decode()), tuple(int(n) for n in match.groups()[1:] if n)
    file.seek(0)
    try:
        npy_format.read_magic(file)
        shape, _, found = npy_format.read_array_header_1_0(file)
    except ValueError:
        raise InputError(f"{path}: not a .npy file of numbers: damaged; pack again") from None
    return found, shape


def map_raw(path, dtype, offset, count, random_access=False):
    """MappedArray of `count` numbers that begin `offset` bytes into a file. Raises FileNotFoundError, and ValueError where
    the file is shorter."""
    with open(path, "rb") as file:  # noqa: PTH123
        return MappedArray(file, np.dtype(dtype), offset, (count,), random_access)


def _open(name, open_one):
    most = _maps_allowed() - 1
    while True:
        _close_down_to(most)
        try:
            return open_one(name)
        except OSError as problem:  # others of this process hold more files than was foreseen
            if problem.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOMEM) or most == 0:
                raise
            most = sum(map(len, MappedFiles._all)) // 2


def _maps_allowed():
    """A map needs a descriptor; a quarter of the limit is left to whoever else opens files in this process."""
    soft, hard = (
        MOST_MAPS * 2 if n == resource.RLIM_INFINITY else n for n in resource.getrlimit(resource.RLIMIT_NOFILE)
    )
    wanted = sum(map(len, MappedFiles._all)) + 1
    if wanted > soft * 3 // 4 and soft < hard:
        soft = min(hard, max(2 * soft, 4096))
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return max(1, min(MOST_MAPS, soft * 3 // 4))


def _close_down_to(most):
    """Forget the maps used longest ago, of whoever has most, until `most` are left. One still looked at lives on until then."""
    while sum(map(len, MappedFiles._all)) > max(0, most):
        max(MappedFiles._all, key=len)._arrays.popitem(last=False)
