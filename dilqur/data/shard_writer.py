"""Writes token shards: documents in, `tokens-00000.npy`, `offsets-00000.npy`, … out, each whole or not there.

Tokens and offsets go to the disk as they come, so that memory stays flat whatever the shard size. A document never crosses a shard; one
that is longer than a shard gets one of its own.
"""

from contextlib import ExitStack
from pathlib import Path

import numpy as np
import orjson

from dilqur.common.atomic import atomic_file
from dilqur.common.errors import InputError
from dilqur.common.hashing import file_checksum
from dilqur.data.npy_stream import npy_stream
from dilqur.data.token_shards import FORMAT, MAX_ID, VERSION


class ShardWriter:
    """A context manager: on an exception the shard that is not full is taken away, the full ones stay.

    shards: the manifest's list of finished shards; given, they are gone on with. A shard is finished when the next document
    does not fit into `shard_tokens` any more, and at `close`.
    """

    def __init__(self, folder, shard_tokens, shards=()):
        self.folder, self.shard_tokens, self.shards = Path(folder), shard_tokens, list(shards)
        self._open = None  # the shard being written

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        if self._open:
            self._open.stack.__exit__(*exception if exception[0] else (InterruptedError, InterruptedError(), None))

    @property
    def documents_in_shards(self):
        """int: the documents in finished shards."""
        return sum(shard["documents"] for shard in self.shards)

    @property
    def tokens(self):
        """int: the tokens in finished shards and in the one that is being written."""
        return sum(shard["tokens"] for shard in self.shards) + (self._open.tokens if self._open else 0)

    def add(self, ids, lengths, counts=None, names=None):
        """Append n documents. Returns for each shard that was finished by it how many documents there are in shards by then.

        ids: integer array (total,), the tokens of all of them, boundary tokens included. lengths: integer array (n,).
        counts: {name: array (n,)}, summed up in the manifest of each shard. names: n JSON values, what each is called.
        Raises InputError for an id that int32 cannot hold.
        """
        ids, lengths = np.asarray(ids), np.asarray(lengths, np.int64)
        if ids.size and not 0 <= ids.min() <= ids.max() <= MAX_ID:
            wrong = int(ids.max() if ids.max() > MAX_ID else ids.min())
            raise InputError(f"{self.folder}: token id {wrong} does not fit int32 (0 to {MAX_ID})")
        ids, ends, finished, first = ids.astype(np.int32, copy=False), np.cumsum(lengths), [], 0
        while first < len(lengths):
            start = int(ends[first - 1]) if first else 0
            room = self.shard_tokens - (self._open.tokens if self._open else 0)
            last = int(np.searchsorted(ends, start + room, side="right"))
            if last <= first and self._open:
                self._finish_shard()
                finished.append(self.documents_in_shards)
                continue
            last = max(last, first + 1)  # alone longer than a shard
            self._open = self._open or _OpenShard(self.folder, len(self.shards), names is not None)
            self._open.write(
                ids[start : int(ends[last - 1])],
                lengths[first:last],
                {name: int(values[first:last].sum()) for name, values in (counts or {}).items()},
                names and names[first:last],
            )
            first = last
        return finished

    def close(self):
        """Finish the last shard. Returns the manifest's fields: format, shards, and the sums over them."""
        if self._open:
            self._finish_shard()
        return summary(self.shards)

    def _finish_shard(self):
        shard, self._open = self._open, None
        self.shards.append(shard.finish())


def summary(shards, dtype="int32"):
    """The fields of a manifest that say what is in `shards`, a list as ShardWriter makes it. dtype: of the tokens."""
    sums = [name for name, value in (shards[0] if shards else {}).items() if isinstance(value, int)]
    return {
        "format": FORMAT,
        "version": VERSION,
        "dtype": dtype,
        "shards": shards,
        **{name: sum(shard[name] for shard in shards) for name in ("documents", "tokens", *sums)},
    }


def remove_leftovers(folder, shards):
    """Remove the files of `folder` that are called like shards and are none of `shards`: what earlier, other runs have left."""
    listed = {name for shard in shards for name in shard["files"]}
    for kind in ("tokens-*.npy", "offsets-*.npy", "ids-*.jsonl"):
        for path in Path(folder).glob(kind):
            if path.name not in listed:
                path.unlink()


class _OpenShard:
    """One shard on its way to the disk."""

    def __init__(self, folder, number, has_names):
        self.folder, self.number, self.documents, self.tokens, self._counts = folder, number, 0, 0, {}
        self.stack = ExitStack()
        self._append_tokens = self.stack.enter_context(npy_stream(self._path("tokens"), np.int32))
        self._append_offsets = self.stack.enter_context(npy_stream(self._path("offsets"), np.int64))
        self._append_offsets([0])
        self._names = self.stack.enter_context(atomic_file(self._path("ids"))) if has_names else None

    def write(self, ids, lengths, counts, names):
        self._append_tokens(ids)
        self._append_offsets(self.tokens + np.cumsum(lengths))
        self.documents += len(lengths)
        self.tokens += len(ids)
        for name, value in counts.items():
            self._counts[name] = self._counts.get(name, 0) + value
        for name in names or ():
            self._names.write(orjson.dumps(name) + b"\n")

    def finish(self):
        """Put the files under their names. Returns the shard's record for the manifest."""
        self.stack.close()
        paths = [self._path(kind) for kind in ("tokens", "offsets", *(["ids"] if self._names else []))]
        files = {path.name: {"bytes": path.stat().st_size, "xxh3": file_checksum(path)} for path in paths}
        return {"documents": self.documents, "tokens": self.tokens, **self._counts, "files": files}

    def _path(self, kind):
        return self.folder / f"{kind}-{self.number:05d}.{'jsonl' if kind == 'ids' else 'npy'}"
