"""The .npy files of a folder as memory-mapped arrays, each opened when it is first asked for.

A map holds a descriptor of its file, and a trillion tokens are thousands of files: the soft limit on open files is raised to the hard one.
"""

import errno
import mmap
import resource

import numpy as np

from dilqur.common.errors import InputError


class MappedArrays:
    """name → MappedArray of FOLDER/NAME, which must be of `dtype`. Raises InputError for a file that is missing or damaged, and where this
    process may open no more."""

    def __init__(self, folder, dtype, random_access=False):
        self._about, self._open = (folder, dtype, random_access), {}

    def __getitem__(self, name):
        if (found := self._open.get(name)) is None:
            found = self._open[name] = MappedArray(*self._about, name)
        return found

    def __reduce__(self):  # a process that is spawned, not forked, opens its own
        return MappedArrays, self._about


class MappedArray:
    """values: the read-only array; a plain view, as slicing an np.memmap costs ten times as much."""

    def __init__(self, folder, dtype, random_access, name):
        path = folder / name
        try:
            mapped = _load(path)
        except FileNotFoundError:
            raise InputError(f"{path}: missing, though manifest.json lists it; pack again") from None
        except (ValueError, EOFError) as problem:
            raise InputError(f"{path}: no whole .npy file of numbers ({problem}): damaged; pack again") from None
        except OSError as problem:
            if problem.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
                raise
            most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
            raise InputError(
                f"{path}: no more than {most} files may be open: ulimit -n, or pack larger shards"
            ) from None
        if mapped.dtype != dtype:
            raise InputError(f"{path}: holds {mapped.dtype}, not {np.dtype(dtype)}; pack again")
        self._map, self._offset, self.values = mapped._mmap, mapped.offset, mapped.view(np.ndarray)
        if random_access:
            self._map.madvise(mmap.MADV_RANDOM)

    def will_need(self, start, stop):
        """Have the system read values[start:stop] in one go, in the background. Without it a random-access map is read one page at a time,
        each waiting for the one before: on a disk, 5 times slower for 8 kB, 15 times for 128 kB."""
        if start < stop:
            size = self.values.itemsize
            first = (self._offset + start * size) & -mmap.PAGESIZE
            self._map.madvise(mmap.MADV_WILLNEED, first, self._offset + stop * size - first)


def _load(path):
    try:
        return np.load(path, mmap_mode="r")
    except OSError as problem:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if problem.errno != errno.EMFILE or soft == hard:
            raise
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        return np.load(path, mmap_mode="r")
