"""Copies of complete checkpoints at another place: a folder, or an address fsspec knows, such as s3://bucket/runs/az.

    ADDRESS/step-0000500/      the files of checkpoints/step-0000500, byte for byte; COMPLETE is the last to arrive
    ADDRESS/step-0000500-2/    that step once more, of a run that went back: nobody writes into what another has written

A thread copies the newest checkpoint while training goes on. A mirror that is slow is skipped over, one that is away is tried
again: neither stops a run. What lacks COMPLETE is never read; a folder also gets its name by rename, when it is whole.

Who wrote a copy says a random word, kept in checkpoints/.mirror-writer, that is part of a half copy: as `writer-WORD` inside it,
in a folder as `.tmp-step-0000500-WORD`. Only one process trains in a run folder, so a half copy with this run folder's word,
which is not in the making here, was left by a killed run, and goes at once. Another word may be that of a process alive on
another machine: such a half copy goes when nothing in it has changed for a day, by the clock of the place where it lies.
"""

import contextlib
import errno
import importlib.util
import itertools
import json
import os
import re
import secrets
import shutil
import threading
from pathlib import Path

from dilqur.common.atomic import atomic_file, fsync_folder
from dilqur.common.errors import InputError

NAME = re.compile(r"step-(\d+)(?:-(\d+))?")  # step and, from the second on, which copy of it
ABANDONED_SECONDS = 24 * 3600  # longer than any one file takes to arrive
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds between two tries; doubled after each
LAST_TRIES = 3  # with a mirror that is away, before the end of a run stops waiting for it


def check_address(address):
    """Can `address` be one of a mirror here? Asks no network. Raises InputError for a protocol that is unknown, or whose package
    is missing, for a folder that cannot be made or written to, and for a password, which logs and manifests would repeat."""
    if (path := _local_path(address)) is not None:
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


class CheckpointMirror:
    """Where complete checkpoints are copied to, by `push`, and fetched from, by `fetch`. Rank 0 alone has one.

    problem: what went wrong last, in one line, or None since it went well.
    """

    def __init__(self, address, keep=None, keep_every=None):
        """address: a path, or what fsspec takes; this run's alone. keep: how many complete copies stay there (None: all); those
        at multiples of `keep_every` steps stay anyway. Raises InputError as `check_address`."""
        check_address(address)
        self.address, self.keep, self.keep_every = str(address).rstrip("/"), keep, keep_every
        self.problem = None
        self._changed = threading.Condition()
        self._thread, self._queue, self._in_flight, self._failures = None, [], None, 0
        self._opened, self._word, self._first = None, None, None
        self._found = None  # names complete when this process first looked
        self._losses = {}  # of evaluation, by name
        self._own = set()  # names this process gave, or found to be what it would have made

    # -- copy away ----------------------------------------------------------------------------------------------------

    def push(self, folder):
        """Queue `folder`, a complete checkpoint newer than any pushed before, and return at once; nothing here raises."""
        folder = Path(folder)
        with self._changed:
            self._queue = [*(f for f in self._queue if self._stays(_step(f.name)) and f != folder), folder]
            self._first = _step(folder.name) if self._first is None else self._first
            if self._thread is None:  # a daemon: a process that dies does not wait for it
                self._thread = threading.Thread(target=self._run, name="checkpoint mirror", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def copying(self):
        """The folders, as they were pushed, that must stay until they are copied."""
        with self._changed:
            return {*self._queue, *([self._in_flight] if self._in_flight else [])}

    def wait(self, timeout=None):
        """Until all that was pushed is copied; returns whether it is. timeout: seconds; None: until it is, or the mirror has
        failed LAST_TRIES times from now on."""
        with self._changed:
            failures = self._failures
            self._changed.notify_all()  # no pause now
            self._changed.wait_for(
                lambda: self._idle() or (timeout is None and self._failures - failures >= LAST_TRIES), timeout
            )
            return self._idle()

    def _idle(self):
        return not self._queue and self._in_flight is None

    def _stays(self, step):
        return bool(self.keep_every) and step % self.keep_every == 0

    def _run(self):
        pause = FIRST_PAUSE
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue)
                folder = self._in_flight = self._queue.pop()  # the newest; those to keep follow when there is time
            problem = copied = None
            try:
                name = self._copy(folder)
                copied = True
                problem = self._tidy(name)
            except Exception as error:  # whatever a file system or a network raises: training is not to hear of it
                self._opened = None
                problem = f"{self.address}: step {_step(folder.name)} {'is copied, but' if copied else 'not copied'}: "
                problem += _in_words(error)
            with self._changed:
                self.problem, self._in_flight = problem, None
                if copied:
                    pause = FIRST_PAUSE
                    self._changed.notify_all()
                    continue
                self._failures += 1
                superseded = self._queue and not self._stays(_step(folder.name))
                if not superseded and (folder / "COMPLETE").exists():
                    self._queue = sorted([*self._queue, folder], key=lambda f: _step(f.name))
                self._changed.notify_all()
                pause = FIRST_PAUSE if self._changed.wait(pause) else min(2 * pause, LONGEST_PAUSE)

    def _copy(self, folder):
        """Copy `folder` there, if the same is not there yet. The name of the copy."""
        self._word = self._word or _writer_word(folder.parent)
        if _local_path(self.address) and _local_path(self.address).absolute() == folder.parent.absolute():
            raise OSError(errno.EINVAL, "that is the run's own folder of checkpoints")
        if self._found is None:
            self._place().make()
        copies = self._place().copies()
        if self._found is None:
            self._found = {name for name, files in copies.items() if _is_complete(name, files)}
        vouched = (folder / "COMPLETE").read_bytes()  # a checksum of checksums: equal ones are equal checkpoints
        for number in itertools.count(1):
            name = folder.name if number == 1 else f"{folder.name}-{number}"
            if name not in copies:
                break
            if not _is_complete(name, copies[name]):
                if self._is_ours(name, copies[name]):
                    self._place().remove(name, self._word)
                    break
            elif self._place().read(name, "COMPLETE") == vouched:
                self._own.add(name)
                return name
        self._own.add(name)
        with self._place().writing(name, self._word) as put:
            for file in sorted(folder.iterdir()):
                if file.name != "COMPLETE":
                    put(file)
            if (folder / "COMPLETE").read_bytes() != vouched:
                raise OSError(errno.ESTALE, "it was replaced while it was copied", str(folder))
            put(folder / "COMPLETE")
        return name

    def _tidy(self, name):
        """Remove what is not to stay now that `name` stands there. What is wrong there, in a line, or None."""
        copies = self._place().copies()
        complete = {n for n, files in copies.items() if _is_complete(n, files)}
        # of a run this one went back from: a new machine must not go on from them
        stale = {n for n in complete & self._found - self._own if _step(n) >= self._first}
        standing = sorted(complete & (self._found | self._own) - stale, key=_order)
        old = standing[: -max(1, self.keep)] if self.keep else []
        best = self._best(standing) if old else None
        for gone in sorted(stale, key=_order) + [n for n in old if n != best and not self._stays(_step(n))]:
            self._place().remove(gone, self._word)
        for half in copies.keys() - complete:
            if self._is_ours(half, copies[half]) or self._place().is_older(half, name, ABANDONED_SECONDS):
                self._place().remove(half, self._word)
        if strangers := complete - self._found - self._own:
            return (
                f"{self.address}: another process wrote {min(strangers)} there: give every run a mirror_to of its own"
            )
        return None

    def _best(self, names):
        """Of the complete copies `names` the one with the lowest evaluation loss, or None where none has been evaluated."""
        self._losses = {n: self._losses[n] if n in self._losses else self._loss(n) for n in names}
        return min((n for n in names if self._losses[n] is not None), key=self._losses.get, default=None)

    def _loss(self, name):
        with contextlib.suppress(ValueError):  # damaged: whoever fetches it is told
            return json.loads(self._place().read(name, "trainer.json")).get("eval_loss")

    def _is_ours(self, name, files):
        return name.endswith(f"-{self._word}") or f"writer-{self._word}" in files

    def _place(self):
        """Where the copies lie; opened anew after a failure."""
        if (place := self._opened) is None:
            place = self._opened = _open(self.address)
        return place

    # -- fetch back ---------------------------------------------------------------------------------------------------

    def complete(self):
        """The steps of which a complete copy is there, ascending. Raises InputError where the mirror cannot be asked."""
        return sorted({_step(name) for name, files in self._listing().items() if _is_complete(name, files)})

    def newest(self):
        """The last step of which a complete copy is there, or None. Raises InputError as `complete`."""
        return max(self.complete(), default=None)

    def best(self):
        """The step of the complete copy with the lowest evaluation loss, or None. Raises InputError as `complete`."""
        names = sorted((n for n, files in self._listing().items() if _is_complete(n, files)), key=_order)
        try:
            name = self._best(names)
        except Exception as error:
            raise InputError(f"{self.address}: {_in_words(error)}") from None
        return name and _step(name)

    def fetch(self, step, checkpoints_folder):
        """Bring the complete copy of `step` into `checkpoints_folder`; the path of the checkpoint there.

        It gets its name when it is whole and every checksum in it holds. Raises InputError naming the file that is damaged, with
        the next older step there, or the one that did not arrive; OSError for what is wrong here, such as a full disk.
        """
        from dilqur.checkpoint.format import step_folder

        copies, final = self._listing(), step_folder(checkpoints_folder, step)
        complete = sorted((name for name, files in copies.items() if _is_complete(name, files)), key=_order)
        if not (names := [name for name in complete if _step(name) == step]):
            there = ", ".join(str(s) for s in sorted({_step(name) for name in complete})) or "none"
            raise InputError(f"{self.address}: no complete copy of step {step} there; complete ones: {there}")
        if final.exists():
            raise InputError(f"{final}: is there; move it away to fetch step {step} from {self.address}")
        name, part = names[-1], final.with_name(f".tmp-fetch-{secrets.token_hex(4)}")
        part.mkdir(parents=True)
        try:
            self._download(name, copies[name], part)
            try:
                _verify(part)
            except InputError as damage:
                source = f"{self.address}/{name}"
                older = [_step(n) for n in complete if _step(n) < step]
                offer = f"the next older one is step {older[-1]}: remove {source} to go on from there" if older else ""
                raise InputError(
                    f"{str(damage).replace(str(part), source)}; {offer or 'there is no older one'}"
                ) from None
            part.rename(final)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        fsync_folder(final.parent)
        return final

    def _download(self, name, files, part):
        if sum(files.values()) > shutil.disk_usage(part).free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(part.parent))
        for file in (f for f in files if not f.startswith("writer-")):
            try:
                self._place().get(name, file, part / file)
            except Exception as error:
                if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
                    raise
                self._opened = None
                raise InputError(f"{self.address}/{name}/{file}: did not arrive: {_in_words(error)}") from None
            _flush(part / file)

    def _listing(self):
        try:
            return self._place().copies()
        except FileNotFoundError:
            return {}
        except Exception as error:
            self._opened = None
            raise InputError(
                f"{self.address}: {_in_words(error)}: can it be reached from here, and are its credentials set?"
            ) from None


# -- places -----------------------------------------------------------------------------------------------------------


class _Folder:
    """A folder on a disk: a copy is made under another name, flushed, and gets its own by rename."""

    def __init__(self, path):
        self.path = path

    def make(self):
        """Only before the first copy: later, a folder that is not there is a disk that went away, not one to be made."""
        self.path.mkdir(exist_ok=True)

    def copies(self):
        """{name: {file: bytes}} of all copies, whole or not. Raises FileNotFoundError without the folder itself."""
        found = {}
        for copy in self.path.iterdir():
            if NAME.fullmatch(copy.name) or copy.name.startswith(".tmp-step-"):
                with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                    found[copy.name] = {file.name: file.stat().st_size for file in copy.iterdir()}
        return found

    @contextlib.contextmanager
    def writing(self, name, word):
        part = self.path / f".tmp-{name}-{word}"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()

        def put(source):
            shutil.copyfile(source, part / source.name)
            _flush(part / source.name)

        try:
            yield put
            fsync_folder(part)
            part.rename(self.path / name)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
        fsync_folder(self.path)

    def remove(self, name, word):
        aside = self.path / f".tmp-{name}-{word}"
        if name.startswith(".tmp-"):
            aside = self.path / name
        else:
            shutil.rmtree(aside, ignore_errors=True)  # of a removal that was killed
            (self.path / name).rename(aside)
        shutil.rmtree(aside)

    def read(self, name, file):
        return (self.path / name / file).read_bytes()

    def get(self, name, file, target):
        shutil.copyfile(self.path / name / file, target)

    def is_older(self, name, than, seconds):
        return self._changed(name) < self._changed(than) - seconds

    def _changed(self, name):
        copy = self.path / name
        return max(path.stat().st_mtime for path in (copy, *copy.iterdir()))


class _ObjectStore:
    """An fsspec file system. Most know no rename, so that files arrive under their names, and COMPLETE makes a copy of them."""

    def __init__(self, address):
        import fsspec

        # an instance of its own, which remembers no listing: another process may have changed what is there
        options = {"skip_instance_cache": True, "use_listings_cache": False}
        self.fs, self.path = fsspec.core.url_to_fs(address, **options)

    def make(self):
        """Objects need no folders; those who do get theirs in `writing`. A bucket is never made."""

    def copies(self):
        found = {}
        for copy in self._entries(self.path):
            name = _last(copy["name"])
            if copy["type"] == "directory" and NAME.fullmatch(name):
                found[name] = {_last(file["name"]): file["size"] for file in self._entries(copy["name"])}
        return found

    def _entries(self, path):
        self.fs.invalidate_cache()
        try:
            return self.fs.ls(path, detail=True)
        except FileNotFoundError:
            return []

    @contextlib.contextmanager
    def writing(self, name, word):
        folder = f"{self.path}/{name}"
        marker = f"{folder}/writer-{word}"
        try:
            self.fs.pipe_file(marker, word.encode())
        except FileNotFoundError:  # file systems with real folders, such as sftp
            for needed in (self.path, folder):
                with contextlib.suppress(FileExistsError):
                    if "/" in needed:  # else a bucket
                        self.fs.mkdir(needed, create_parents=False)
            self.fs.pipe_file(marker, word.encode())

        def put(source):
            self.fs.put_file(str(source), f"{folder}/{source.name}")
            arrived, size = self.fs.size(f"{folder}/{source.name}"), source.stat().st_size
            if arrived != size:
                raise OSError(errno.EIO, f"{arrived} of {size} bytes arrived", source.name)

        yield put

    def remove(self, name, word):
        folder = f"{self.path}/{name}"
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(f"{folder}/COMPLETE")  # first: from here on it is a half one
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm(folder, recursive=True)

    def read(self, name, file):
        return self.fs.cat_file(f"{self.path}/{name}/{file}")

    def get(self, name, file, target):
        self.fs.get_file(f"{self.path}/{name}/{file}", str(target))

    def is_older(self, name, than, seconds):
        try:
            now = self.fs.modified(f"{self.path}/{than}/COMPLETE")
            changed = [self.fs.modified(file["name"]) for file in self._entries(f"{self.path}/{name}")]
        except NotImplementedError:  # it keeps no times: then nobody knows, and it stays
            return False
        return bool(changed) and (now - max(changed)).total_seconds() > seconds


def _open(address):
    path = _local_path(address)
    return _ObjectStore(address) if path is None else _Folder(path)


def _local_path(address):
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


# -- names and words --------------------------------------------------------------------------------------------------


def _step(name):
    return _order(name)[0]


def _order(name):
    """(step, which copy of it) in the name of a copy."""
    step, number = NAME.fullmatch(name).groups()
    return int(step), int(number or 1)


def _is_complete(name, files):
    return bool(NAME.fullmatch(name)) and "COMPLETE" in files


def _verify(checkpoint):
    """Read every byte. Raises InputError naming the file that is damaged."""
    from dilqur.checkpoint.format import CheckpointReader

    reader = CheckpointReader(checkpoint)
    for kind, name in reader.dtypes:
        reader.tensor(kind, name)


def _writer_word(checkpoints):
    """The word of this run folder; a new one where none can be kept."""
    file = checkpoints / ".mirror-writer"
    with contextlib.suppress(OSError):
        if not file.exists():
            with atomic_file(file, "w") as opened:
                opened.write(secrets.token_hex(4))
        if re.fullmatch("[0-9a-f]{8}", word := file.read_text()):
            return word
    return secrets.token_hex(4)


def _flush(path):
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _last(path):
    return path.rstrip("/").rpartition("/")[2]


def _in_words(error):
    """One line of an exception of any library."""
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror + (f": {error.filename}" if error.filename else "")
    else:
        text = str(error) or type(error).__name__
    return " ".join(text.split())[:300]
