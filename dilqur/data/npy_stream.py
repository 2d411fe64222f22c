"""Writing .npy files, whole or not at all: an array, or one that grows, longer than the memory and of unknown length."""

import contextlib

import numpy as np

from dilqur.common.atomic import atomic_file


@contextlib.contextmanager
def npy_stream(path, dtype):
    """Yields append(array): its elements go to the disk at once. The file appears under `path` when it is whole."""
    dtype, length = np.dtype(dtype), 0
    with atomic_file(path) as file:
        _write_header(file, dtype, 0)  # NumPy leaves room for any number of digits: the header keeps its length

        def append(array):
            nonlocal length
            file.write(np.ascontiguousarray(array, dtype).view(np.uint8).data)  # as save_npy
            length += len(array)

        yield append
        file.seek(0)
        _write_header(file, dtype, length)


def save_npy(path, array):
    """`array` as the .npy file `path`. np.save says nothing of a full disk; this raises OSError."""
    array = np.ascontiguousarray(array)
    with atomic_file(path) as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(array.data)


def _write_header(file, dtype, length):
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (length,)}
    np.lib.format.write_array_header_1_0(file, header)
