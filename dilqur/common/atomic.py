"""Files and folders that appear under their final name when they are whole, or not at all."""

import contextlib
import errno
import json
import os
import shutil
from pathlib import Path


@contextlib.contextmanager
def atomic_file(path, mode="wb", **kwargs):
    """Open `path` for writing under a temporary name; on success flush it to the disk and rename, else remove it.

    A reader never sees a part of it, and a crash of the machine right after leaves the old file or the new one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open(mode, **kwargs) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        with opened_folder(path.parent) as folder:
            part.rename(path)
            # by its descriptor: who waited for this file may have renamed the folder by now, as a checkpoint's publisher does
            os.fsync(folder)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def atomic_folder(path):
    """A temporary folder to fill; on success its files are flushed to the disk and it becomes `path`, replacing what was."""
    path = Path(path)
    part = path.with_name(f".{path.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        for file in part.rglob("*"):
            if file.is_file():
                with file.open("rb") as opened:
                    os.fsync(opened.fileno())
        shutil.rmtree(path, ignore_errors=True)
        part.rename(path)
    except BaseException as problem:
        shutil.rmtree(part, ignore_errors=True)
        if f"os error {errno.ENOSPC}" in str(problem):  # tokenizers and safetensors raise exceptions of their own
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from None
        raise
    fsync_folder(path.parent)


@contextlib.contextmanager
def atomic_files(folder):
    """A temporary folder to fill; on success what lies in it, at any depth, moves into `folder`, beside what is there."""
    whole = Path(folder) / "saving"
    with atomic_folder(whole) as part:
        yield part
    for file in sorted(p for p in whole.rglob("*") if p.is_file()):
        target = Path(folder) / file.relative_to(whole)
        target.parent.mkdir(parents=True, exist_ok=True)
        file.replace(target)
    shutil.rmtree(whole)


def write_json(path, value):
    """`value` as indented JSON, atomically."""
    with atomic_file(path, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1, ensure_ascii=False)
        file.write("\n")


def fsync_folder(path):
    """Flush a folder's entries: without it a rename can be lost in a power cut."""
    with opened_folder(path) as folder:
        os.fsync(folder)


@contextlib.contextmanager
def opened_folder(path):
    """The descriptor of a folder, which stays that folder's whatever it is called later."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
