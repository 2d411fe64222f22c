"""The token-shard format, and its reader (dilqur/data/shard_writer.py writes it).

    FOLDER/tokens-00000.npy    int32, the ids of whole documents one after the other
    FOLDER/offsets-00000.npy   int64, n + 1 numbers: document i is tokens[offsets[i]:offsets[i + 1]]
    FOLDER/manifest.json       written last: tokenizer hash, vocabulary size, counts, a checksum for every file

`np.load(file, mmap_mode="r")` reads a shard with no code of ours. A document never crosses a shard.
"""

import gc
import resource
from pathlib import Path

import numpy as np
import orjson

from dilqur.common.errors import InputError
from dilqur.common.hashing import file_checksum
from dilqur.data.mapped_files import MappedFiles, map_npy

FORMAT, VERSION = "dilqur-token-shards", 1
MAX_ID = 2**31 - 1
# After a batch that waited for the disk, the disk is asked to read ahead for so many. Not always: the asking takes a third of
# a read from memory.
READ_AHEAD_BATCHES = 256


class TokenShards:
    """A folder of token shards as one long stream of tokens, memory-mapped. Making one reads the manifest and nothing else.

    manifest: dict. num_tokens, num_documents, num_shards: int. Raises InputError for a folder that is not one, and, when a
    shard is first used, for a file that is missing, too short or of another format. `check_files` looks at all of them.
    """

    def __init__(self, folder, verify=False):
        self.folder = Path(folder)
        self.manifest = _read_manifest(self.folder)
        shards = self.manifest["shards"]
        self.num_shards = len(shards)
        self.shard_starts = np.cumsum([0, *(s["tokens"] for s in shards)], dtype=np.int64)  # first token of each shard
        self._first_documents = np.cumsum([0, *(s["documents"] for s in shards)], dtype=np.int64)
        self.num_tokens, self.num_documents = int(self.shard_starts[-1]), int(self._first_documents[-1])
        self._tokens = MappedFiles(self._map_tokens, self.num_shards)
        self._offsets = MappedFiles(self._map_offsets, self.num_shards)
        self._read_ahead = READ_AHEAD_BATCHES  # batches to go
        if verify:
            self.check_files(verify=True)

    # -- tokens -----------------------------------------------------------------------------------------------------------

    def read(self, start, length):
        """int32 array of shape (length,): the tokens [start, start + length) of the stream, across shards."""
        if not 0 <= start <= start + length <= self.num_tokens:
            raise IndexError(f"tokens {start} to {start + length} of {self.num_tokens}")
        if length == 0:
            return np.empty(0, np.int32)
        shard = self._shard_of(start)
        at, mapped = start - int(self.shard_starts[shard]), self._tokens[shard]
        if at + length <= len(mapped.values):
            mapped.will_need(at, at + length)
            return mapped.values[at : at + length]
        out = np.empty((1, length), np.int32)
        self.read_rows(np.array([start]), out, [0])
        return out[0]

    def read_rows(self, starts, out, rows):
        """Fill row rows[i] of `out`, integers of shape (n, length), with the tokens of the stream from starts[i] on.

        Where the stream ends before the row does, the rest of the row is left as it is.
        """
        length, spans, faults = out.shape[1], [], _major_faults()
        shards = np.searchsorted(self.shard_starts, starts, side="right") - 1
        for row, shard, at in zip(rows, shards.tolist(), (starts - self.shard_starts[shards]).tolist(), strict=True):
            mapped = self._tokens[shard]
            part = mapped.values[at : at + length]
            if self._read_ahead:  # for all rows before the first is copied: the disk reads them together
                mapped.will_need(at, at + len(part))
            spans.append((row, shard, part))
        for row, shard, part in spans:
            out[row, : len(part)] = part
            filled = len(part)
            while filled < length and (shard := shard + 1) < self.num_shards:
                part = self._tokens[shard].values[: length - filled]
                out[row, filled : filled + len(part)] = part
                filled += len(part)
        waited = _major_faults() > faults
        self._read_ahead = READ_AHEAD_BATCHES if waited else max(0, self._read_ahead - 1)

    # -- documents --------------------------------------------------------------------------------------------------------

    def document(self, index):
        """int32 array: the tokens of document `index`, boundary tokens included."""
        shard = int(np.searchsorted(self._first_documents, index, side="right")) - 1
        begin, end = self.offsets(shard)[index - self._first_documents[shard] :][:2]
        return self._tokens[shard].values[begin:end]

    def document_starts(self, start, length):
        """Positions, relative to `start`, at which a document begins inside the tokens [start, start + length)."""
        found, shard = [], self._shard_of(start)
        while shard < self.num_shards and (base := int(self.shard_starts[shard]) - start) < length:
            offsets = self.offsets(shard)[:-1]
            low, high = np.searchsorted(offsets, (-base, length - base))
            found.append(offsets[low:high] + base)
            shard += 1
        return found[0] if len(found) == 1 else np.concatenate(found or [np.empty(0, np.int64)])

    def offsets(self, shard):
        """int64 array of shape (documents + 1,): where the documents of a shard begin, in tokens from the shard's first."""
        return self._offsets[shard].values

    @property
    def bytes_per_token(self):
        """UTF-8 bytes of text for each token of the stream, BOS and EOS counted as tokens without bytes."""
        return self.manifest["utf8_bytes"] / self.num_tokens

    # -- files ------------------------------------------------------------------------------------------------------------

    def check_files(self, verify=False):
        """Raises InputError for the first file that is missing or of another size, and for more shards than this process may
        open; `verify` also reads every byte and compares the checksums. Returns self. What a run calls before it takes a GPU.
        """
        _, limit = resource.getrlimit(resource.RLIMIT_NOFILE)
        if self.num_shards > limit:
            raise InputError(
                f"{self.folder}: {self.num_shards} shards, and this process may open {limit} files: pack larger shards "
                "(--shard_tokens), or raise the limit (ulimit -Hn)"
            )
        for shard in range(self.num_shards):
            self.check_shard(shard, verify)
        return self

    def check_shard(self, shard, verify=False):
        """`check_files` of one shard."""
        for name, stated in self.manifest["shards"][shard]["files"].items():
            path = self.folder / name
            try:
                size = path.stat().st_size
            except FileNotFoundError:
                raise InputError(
                    f"{path}: missing, though manifest.json lists it; put it back, or pack again"
                ) from None
            if size != stated["bytes"]:
                raise InputError(f"{path}: {size} bytes, manifest.json says {stated['bytes']}; pack again")
            if verify and file_checksum(path) != stated["xxh3"]:
                raise InputError(f"{path}: its checksum is not the one in manifest.json: damaged; pack again")

    def _map_tokens(self, shard):
        count = self.manifest["shards"][shard]["tokens"]
        return self._map_npy(f"tokens-{shard:05d}.npy", np.int32, count, random_access=True)

    def _map_offsets(self, shard):
        return self._map_npy(f"offsets-{shard:05d}.npy", np.int64, self.manifest["shards"][shard]["documents"] + 1)

    def _map_npy(self, name, dtype, count, random_access=False):
        path = self.folder / name
        try:
            mapped = map_npy(path, dtype, random_access)
        except FileNotFoundError:
            raise InputError(f"{path}: missing, though manifest.json lists it; pack again") from None
        if mapped.values.shape != (count,):
            raise InputError(f"{path}: holds {mapped.values.shape} numbers, manifest.json says {count}; pack again")
        return mapped

    def _shard_of(self, token):
        return int(np.searchsorted(self.shard_starts, token, side="right")) - 1


def _read_manifest(folder):
    path, collecting = folder / "manifest.json", gc.isenabled()
    gc.disable()  # a trillion tokens are 1 MB of JSON: looking for garbage among its dicts takes five times the parsing
    try:
        manifest = orjson.loads(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{path}: not there: {folder} is not finished") from None
    except orjson.JSONDecodeError as problem:
        raise InputError(f"{path}: damaged ({problem})") from None
    finally:
        if collecting:
            gc.enable()
    if manifest.get("format") != FORMAT:
        raise InputError(f"{folder}/manifest.json: not a folder of token shards (its subfolders may be)")
    if manifest["version"] > VERSION:
        raise InputError(f"{folder}: format version {manifest['version']} is newer than this program's {VERSION}")
    return manifest


def _major_faults():
    """How often this thread has waited for the disk because of a page that was not in memory."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_majflt
