"""Checksums by xxh3: they find accidents at memory speed, not forgery."""

from pathlib import Path

import xxhash


def checksum(data):
    """xxh3-64 of bytes, as hexadecimal digits."""
    return xxhash.xxh3_64_hexdigest(data)


def file_checksum(path, bits=64):
    """xxh3 of a file's bytes, of 64 or 128 bits, as hexadecimal digits."""
    digest = xxhash.xxh3_64() if bits == 64 else xxhash.xxh3_128()
    with Path(path).open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()
