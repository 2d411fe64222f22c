"""Where copies of checkpoints may lie, and the files there: a folder, or what fsspec knows."""

import contextlib
import errno
import importlib.util
import os
import re
from pathlib import Path

from dilqur.checkpoint.steps import step_of
from dilqur.common.errors import InputError


def check_address(address):
    """Can `address` be one of a mirror here? Asks no network. Raises InputError for a protocol that is unknown, or whose package
    is missing, for a folder that cannot be made or written to, and for a password, which logs and manifests would repeat."""
    if (path := local_path(address)) is not None:
        parent = path.absolute().parent
        if path.exists() and not path.is_dir():
            raise InputError(f"mirror_to {address}: a file, not a folder: give another path")
        if not parent.is_dir():
            raise InputError(f"mirror_to {address}: there is no folder {parent}: make it, or mount its disk")
        if not os.access(path if path.exists() else parent, os.W_OK | os.X_OK):
            raise InputError(f"mirror_to {address}: this user may not write there: look at its permissions")
        return
    import fsspec

    protocol, _, place = address.partition("://")
    if re.match(r"[^/@]*:[^/@]*@", place):
        raise InputError(
            f"mirror_to {protocol}://…: a password in it, which logs would show: credentials go into the environment"
        )
    if protocol not in {*fsspec.available_protocols(), *fsspec.registry}:
        raise InputError(
            f"mirror_to {address}: fsspec knows no {protocol}://: give a path, s3://BUCKET/FOLDER or the like"
        )
    if not place.strip("/"):
        raise InputError(f"mirror_to {address}: names no bucket and no folder: give {protocol}://BUCKET/FOLDER")
    if missing := _missing_package(protocol):
        raise InputError(f"mirror_to {address}: {protocol}:// needs a package that is not here: pip install {missing}")


class Store:
    """The copies at an address, by fsspec: files arrive under their names, and COMPLETE makes a copy of them."""

    def __init__(self, address):
        import fsspec

        # an instance of its own, which remembers no listing: another process may have changed what is there
        self.fs, self.path = fsspec.core.url_to_fs(address, skip_instance_cache=True, use_listings_cache=False)
        self.local = local_path(address) is not None

    def copies(self):
        """{name: {file: bytes}} of all copies, complete or not."""
        self.fs.invalidate_cache()
        found = {}
        for entry in self._entries(self.path):
            name = entry["name"].rstrip("/").rpartition("/")[2]
            if entry["type"] == "directory" and step_of(name) is not None:
                files = self._entries(entry["name"])
                found[name] = {file["name"].rpartition("/")[2]: file["size"] for file in files}
        return found

    def _entries(self, path):
        try:
            return self.fs.ls(path, detail=True)
        except FileNotFoundError:
            if self.local and path == self.path:
                raise
            return []

    def put(self, source, name):
        """Copy the file `source` into the copy `name`. Raises OSError where not all of it arrives."""
        target = f"{self.path}/{name}/{source.name}"
        self._in_a_folder(name, lambda: self.fs.put_file(str(source), target))
        if self.local:
            flush_file(Path(target))
        arrived, size = self.fs.size(target), source.stat().st_size
        if arrived != size:
            raise OSError(errno.EIO, f"{arrived} of {size} bytes arrived", source.name)

    def write(self, name, content):
        self._in_a_folder("", lambda: self.fs.pipe_file(f"{self.path}/{name}", content))

    def _in_a_folder(self, name, write):
        """Call `write`, again where file systems with real folders, such as a disk or sftp, do not have that of `name` yet. No bucket is
        made, nor the folder of a disk that went away."""
        try:
            return write()
        except FileNotFoundError:
            for folder in [self.path] * (not self.local) + [f"{self.path}/{name}"] * bool(name):
                with contextlib.suppress(FileExistsError):
                    if "/" in folder:
                        self.fs.mkdir(folder, create_parents=False)
            return write()

    def remove(self, name):
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(f"{self.path}/{name}/COMPLETE")  # first: from here on it is incomplete
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm(f"{self.path}/{name}", recursive=True)

    def read(self, name):
        return self.fs.cat_file(f"{self.path}/{name}")

    def get(self, name, target):
        self.fs.get_file(f"{self.path}/{name}", str(target))


def local_path(address):
    protocol, separator, place = str(address).partition("://")
    if not separator:
        return Path(address)
    return Path(place) if protocol in ("file", "local") else None


def _missing_package(protocol):
    """The package without which fsspec cannot open `protocol`, or None."""
    import fsspec
    from fsspec.registry import known_implementations

    package = known_implementations.get(protocol, {"class": "fsspec."})["class"].partition(".")[0]
    if package != "fsspec":  # looked for, not imported: --check answers in a second
        return None if importlib.util.find_spec(package) else package
    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        return getattr(error.__cause__, "name", None) or str(error)
    return None


def flush_file(path):
    with path.open("rb") as file:
        os.fsync(file.fileno())
