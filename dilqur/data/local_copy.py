"""Token shards copied to a disk of the node: once, whatever number of processes and jobs asks for them.

    LOCAL_DIR/NAME-HASH/       the folder's name and a hash of its manifest: other data never mix with it
    LOCAL_DIR/.NAME-HASH.lock  whoever holds it copies, the others wait

Each file is compared with its checksum while it is copied and appears by rename; manifest.json is the last. What a killed
job leaves is gone on with by the next. Nothing is removed: that is the node's scheduler, or `rm -r`.
"""

import contextlib
import errno
import fcntl
import os
import shutil
import sys
from pathlib import Path

import xxhash

from dilqur.common.atomic import atomic_file
from dilqur.common.errors import InputError
from dilqur.data.token_shards import TokenShards

CHUNK = 1 << 22


def local_copy(folder, local_dir):
    """Path of a whole copy of `folder`, a finished folder of token shards, in `local_dir`, a folder on a disk of this node.

    Every process of a node may call it; those that come while one copies wait for it.
    Raises InputError where the folder is not finished or damaged, and where `local_dir` is missing, not writable or too full.
    """
    folder, local_dir = Path(folder), Path(local_dir)
    manifest = TokenShards(folder).manifest
    if not local_dir.is_dir():
        raise InputError(f"{local_dir}: no such folder on this node; make it, or give another one")
    name = f"{folder.resolve().name}-{xxhash.xxh3_64_hexdigest((folder / 'manifest.json').read_bytes())}"
    target = local_dir / name
    files = {
        name: {"source": folder / name, **stated}
        for shard in manifest["shards"]
        for name, stated in shard["files"].items()
    }
    if _is_whole(files, target):  # to read it nobody waits for a lock, nor needs the right to write
        return target
    try:
        target.mkdir(exist_ok=True)
        with _locked(local_dir / f".{name}.lock"):
            if not _is_whole(files, target):
                _copy({name: file for name, file in files.items() if _size(target / name) != file["bytes"]}, target)
                with atomic_file(target / "manifest.json") as file:
                    file.write((folder / "manifest.json").read_bytes())
    except OSError as problem:
        raise InputError(_in_words(problem, local_dir)) from None
    return target


@contextlib.contextmanager
def _locked(path):
    """Hold `path` for oneself, waiting as long as it takes. The lock of a process that dies is free again."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{path.parent}: waiting for another process that copies the token shards", file=sys.stderr)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _copy(files, target):
    """Copy `files` into `target`, if there is room for all of them."""
    (target / "manifest.json").unlink(missing_ok=True)  # something was taken away since: not whole any more
    for part in target.glob(".*.part"):
        part.unlink()
    needed, free = sum(file["bytes"] for file in files.values()), shutil.disk_usage(target).free
    if needed > free:
        raise InputError(
            f"{target.parent}: {needed / 1e9:.3g} GB are needed for {target.name} and {free / 1e9:.3g} GB free there: free "
            "some, or read the shards where they are"
        )
    for name, file in files.items():
        _copy_file(file["source"], target / name, file)


def _copy_file(source, target, stated):
    """Copy one file, and compare what was read with what the manifest states of it."""
    try:
        opened = source.open("rb")
    except OSError as problem:
        raise InputError(f"{source}: {problem.strerror}, though manifest.json lists it; pack again") from None
    with opened, atomic_file(target) as out:
        digest, size = xxhash.xxh3_64(), 0
        while chunk := opened.read(CHUNK):
            digest.update(chunk)
            out.write(chunk)
            size += len(chunk)
        if size != stated["bytes"]:
            raise InputError(f"{source}: {size} bytes, manifest.json says {stated['bytes']}; pack again")
        if stated["xxh3"] != digest.hexdigest():
            raise InputError(f"{source}: its checksum is not the one in manifest.json: damaged; pack again")


def _is_whole(files, target):
    return (target / "manifest.json").exists() and all(_size(target / n) == file["bytes"] for n, file in files.items())


def _size(path):
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


def _in_words(problem, local_dir):
    if problem.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"{local_dir}: it became full while token shards were copied: free some, or read the shards where they are"
        )
    if problem.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{problem.filename or local_dir}: {problem.strerror.lower()}: give a folder this user may write to"
    return f"{problem.filename or local_dir}: {problem.strerror.lower()}: give a folder on a disk of this node"
