"""Copies of complete checkpoints at another place: a folder, or an address fsspec knows, such as s3://bucket/runs/az.

    ADDRESS/step-0000500/     the files of checkpoints/step-0000500, byte for byte; COMPLETE is the last to arrive, and the first to go
    ADDRESS/WRITER            the id of the run folder whose copies these are, a random word (checkpoints/.mirror-writer has it, too)

What lacks COMPLETE is never read; checksums are compared when a copy is fetched. A thread copies the newest checkpoint while training goes
on: a mirror that is slow is skipped over, one that is away is tried again, and neither stops a run. A run that finds the id of another one
copies nothing and says so; a machine that goes on from a copy becomes the writer.
"""

import contextlib
import errno
import json
import os
import re
import secrets
import shutil
import threading
from pathlib import Path

from dilqur.checkpoint.mirror_store import Store, check_address, flush_file, local_path
from dilqur.checkpoint.steps import step_folder, step_of
from dilqur.common.atomic import atomic_file, fsync_folder
from dilqur.common.errors import InputError

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds between two tries; doubled after each
LAST_TRIES = 3  # with a mirror that is away, before the end of a run stops waiting for it


class CheckpointMirror:
    """Where complete checkpoints are copied to, by `push`, and fetched from, by `fetch`. Rank 0 alone has one.

    problem: what went wrong last, in one line, or None since it went well.
    """

    def __init__(self, address, keep=None, keep_every=None):
        """address: a path, or what fsspec takes; this run's alone. keep: how many complete copies stay there (None: all); those
        at multiples of `keep_every` steps stay anyway, and so does the best by its evaluation. Raises InputError as `check_address`."""
        check_address(address)
        self.address, self.keep, self.keep_every = str(address).rstrip("/"), keep, keep_every
        self.problem = None
        self._changed = threading.Condition()
        self._thread, self._queue, self._in_flight, self._failures = None, [], None, 0
        self._opened, self._begun = None, False
        self._losses, self._own = {}, set()  # of evaluation, by step; the steps this process has copied

    # -- copy away ----------------------------------------------------------------------------------------------------

    def push(self, folder):
        """Queue `folder`, a complete checkpoint newer than any pushed before, and return at once; nothing here raises."""
        folder = Path(folder)
        with self._changed:
            self._queue = [*(f for f in self._queue if self._stays(step_of(f)) and f != folder), folder]
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

        def over():
            return self._idle() or (timeout is None and self._failures - failures >= LAST_TRIES)

        with self._changed:
            failures = self._failures
            self._changed.notify_all()  # no pause now
            self._changed.wait_for(over, timeout)
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
            problem, copied = None, False
            try:
                self._copy(folder)
                copied = True
                self._tidy()
            except Exception as error:  # whatever a file system or a network raises must not reach training
                self._opened = None
                what = "is copied, but" if copied else "not copied"
                problem = f"{self.address}: step {step_of(folder)} {what}: {_in_words(error)}"
            with self._changed:
                self.problem, self._in_flight = problem, None
                if copied:
                    pause = FIRST_PAUSE
                    self._changed.notify_all()
                    continue
                self._failures += 1
                superseded = self._queue and not self._stays(step_of(folder))
                if not superseded and (folder / "COMPLETE").exists():
                    self._queue = sorted([*self._queue, folder], key=step_of)
                self._changed.notify_all()
                pause = FIRST_PAUSE if self._changed.wait(pause) else min(2 * pause, LONGEST_PAUSE)

    def _copy(self, folder):
        """Copy `folder` there, unless the same is there."""
        store, complete = self._store(), (folder / "COMPLETE").read_bytes()  # a checksum of checksums
        if (local := local_path(self.address)) and local.absolute() == folder.parent.absolute():
            raise OSError(errno.EINVAL, "that is the run's own folder of checkpoints")
        if store.local and not self._begun:  # later, a folder that is not there is a disk that went away
            Path(store.path).mkdir(exist_ok=True)
        self._begun = True
        self._claim(folder.parent)
        there, name = store.copies(), folder.name
        if "COMPLETE" in there.get(name, {}) and store.read(f"{name}/COMPLETE") == complete:
            return self._own.add(step_of(folder))
        if name in there:  # another one of that step, or half of one
            store.remove(name)
        for file in sorted(folder.iterdir()):
            if file.name != "COMPLETE":
                store.put(file, name)
        if (folder / "COMPLETE").read_bytes() != complete:
            raise OSError(errno.ESTALE, "it was replaced while it was copied", str(folder))
        self._claim(folder.parent)
        store.put(folder / "COMPLETE", name)
        return self._own.add(step_of(folder))

    def _claim(self, checkpoints):
        """Raise OSError where the copies there are another run's; make them those of this run folder where they are nobody's."""
        store, mine = self._store(), _writer_id(checkpoints)
        try:
            theirs = store.read("WRITER").decode()
        except FileNotFoundError:
            return store.write("WRITER", mine.encode())
        if theirs != mine:
            raise OSError(
                errno.EBUSY, f"another run writes there (its id is {theirs}): give every run a mirror_to of its own"
            )

    def _tidy(self):
        """Remove what is not to stay: incomplete copies, those of a run that this one went back from, old ones."""
        store, copies = self._store(), self._store().copies()
        complete = set(_complete(copies))
        gone = {step for step in map(step_of, copies) if step not in complete}
        gone |= {step for step in complete - self._own if step > min(self._own)}
        standing = sorted(complete - gone)
        if old := standing[: -max(1, self.keep)] if self.keep else []:
            best = self._best(standing)
            gone |= {step for step in old if step != best and not self._stays(step)}
        for step in sorted(gone):
            store.remove(step_folder("", step).name)

    def _best(self, steps):
        """Of complete copies the one with the lowest evaluation loss, or None where none has been evaluated."""
        self._losses = {step: self._losses[step] if step in self._losses else self._loss(step) for step in steps}
        return min((s for s in steps if self._losses[s] is not None), key=self._losses.get, default=None)

    def _loss(self, step):
        with contextlib.suppress(ValueError):  # damaged: `fetch` says so
            return json.loads(self._store().read(f"{step_folder('', step).name}/trainer.json")).get("eval_loss")

    def _store(self):
        """Opened anew after a failure."""
        if self._opened is None:
            self._opened = Store(self.address)
        return self._opened

    # -- fetch back ---------------------------------------------------------------------------------------------------

    def complete(self):
        """The steps of which a complete copy is there, ascending. Raises InputError where the mirror cannot be asked."""
        return _complete(self._listing())

    def newest(self):
        """The last step of which a complete copy is there, or None. Raises InputError as `complete`."""
        return max(self.complete(), default=None)

    def best(self):
        """The step of the complete copy with the lowest evaluation loss, or None. Raises InputError as `complete`."""
        steps = self.complete()
        try:
            return self._best(steps)
        except Exception as error:
            raise InputError(f"{self.address}: {_in_words(error)}") from None

    def fetch(self, step, checkpoints):
        """Bring the complete copy of `step` into the folder `checkpoints`; the path of the checkpoint there.

        It gets its name when it is whole and every checksum in it holds. Raises InputError naming the file that is damaged, with
        the next older step there, or the one that did not arrive; OSError for what is wrong here, such as a full disk.
        """
        copies, final = self._listing(), step_folder(checkpoints, step)
        complete = _complete(copies)
        if step not in complete:
            there = ", ".join(map(str, complete)) or "none"
            raise InputError(f"{self.address}: no complete copy of step {step} there; complete ones: {there}")
        if final.exists():
            raise InputError(f"{final}: is there; move it away to fetch step {step} from {self.address}")
        part = final.with_name(f".tmp-fetch-{secrets.token_hex(4)}")
        part.mkdir(parents=True)
        try:
            self._download(final.name, copies[final.name], part)
            try:
                _verify(part)
            except InputError as damage:
                source = f"{self.address}/{final.name}"
                older = [s for s in complete if s < step]
                offer = f"the next older one is step {older[-1]}: remove {source} to go on from there" if older else ""
                said = str(damage).replace(str(part), source)
                raise InputError(f"{said}; {offer or 'there is no older one'}") from None
            part.rename(final)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        fsync_folder(final.parent)
        return final

    def take_over(self, checkpoints):
        """From now on the run folder of `checkpoints` is the writer. A mirror that may only be read says so at the first copy."""
        with contextlib.suppress(Exception):
            self._store().write("WRITER", _writer_id(checkpoints).encode())

    def _download(self, name, files, part):
        if sum(files.values()) > shutil.disk_usage(part).free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(part.parent))
        for file in files:
            try:
                self._store().get(f"{name}/{file}", part / file)
            except Exception as error:
                if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
                    raise
                self._opened = None
                raise InputError(f"{self.address}/{name}/{file}: did not arrive: {_in_words(error)}") from None
            flush_file(part / file)

    def _listing(self):
        try:
            return self._store().copies()
        except FileNotFoundError:
            return {}
        except Exception as error:
            self._opened = None
            raise InputError(
                f"{self.address}: {_in_words(error)}: can it be reached from here, and are its credentials set?"
            ) from None


def _verify(checkpoint):
    """Read every byte. Raises InputError naming the file that is damaged."""
    from dilqur.checkpoint.format import CheckpointReader

    reader = CheckpointReader(checkpoint)
    for kind, name in reader.dtypes:
        reader.tensor(kind, name)


def _complete(copies):
    """The steps of complete copies, ascending."""
    return sorted(step_of(name) for name, files in copies.items() if "COMPLETE" in files)


def _writer_id(checkpoints):
    """The id of this run folder; a new one where none can be kept."""
    file = checkpoints / ".mirror-writer"
    with contextlib.suppress(OSError):
        if not file.exists():
            with atomic_file(file, "w") as opened:
                opened.write(secrets.token_hex(4))
        if re.fullmatch("[0-9a-f]{8}", found := file.read_text()):
            return found
    return secrets.token_hex(4)


def _in_words(error):
    """One line of an exception of any library."""
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror + (f": {error.filename}" if error.filename else "")
    else:
        text = str(error) or type(error).__name__
    return " ".join(text.split())[:300]
