"""The token-shard format: writer and reader.

    FOLDER/tokens-00000.npy    int32, the ids of whole documents one after the other
    FOLDER/offsets-00000.npy   int64, n + 1 numbers: document i is tokens[offsets[i]:offsets[i + 1]]
    FOLDER/manifest.json       written last: tokenizer hash, vocabulary size, counts, a checksum for every file

`np.load(file, mmap_mode="r")` reads a shard with no code of ours. A document never crosses a shard.
"""

import bisect
from pathlib import Path

import numpy as np
import xxhash

from dilqur.atomic import atomic_file
from dilqur.errors import InputError
from dilqur.stage import read_manifest

FORMAT, VERSION = "dilqur-token-shards", 1
MAX_ID = 2**31 - 1


class ShardWriter:
    """Collects documents and writes a shard whenever `shard_tokens` are reached. `close` returns the manifest's fields."""

    def __init__(self, folder, shard_tokens):
        self.folder, self.shard_tokens = Path(folder), shard_tokens
        self._documents, self._pending, self.shards = [], 0, []

    def add(self, ids):
        """ids: the token ids of one document, its BOS and EOS included. Raises InputError for an id that int32 cannot hold."""
        if ids and max(ids) > MAX_ID:
            raise InputError(f"{self.folder}: token id {max(ids)} does not fit int32 (largest: {MAX_ID})")
        if self._documents and self._pending + len(ids) > self.shard_tokens:
            self._write()
        self._documents.append(np.asarray(ids, np.int32))
        self._pending += len(ids)

    def close(self):
        if self._documents:
            self._write()
        return {
            "format": FORMAT,
            "version": VERSION,
            "dtype": "int32",
            "shards": self.shards,
            "documents": sum(s["documents"] for s in self.shards),
            "tokens": sum(s["tokens"] for s in self.shards),
        }

    def _write(self):
        number = len(self.shards)
        lengths = np.fromiter(map(len, self._documents), np.int64)
        arrays = {
            "tokens": np.concatenate(self._documents),
            "offsets": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        }
        shard = {"documents": len(self._documents), "tokens": int(lengths.sum()), "files": {}}
        for kind, array in arrays.items():
            name = f"{kind}-{number:05d}.npy"
            with atomic_file(self.folder / name) as file:
                np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
                file.write(array.data)  # as np.save, which says nothing of a full disk
            shard["files"][name] = {"bytes": (self.folder / name).stat().st_size, "xxh3": checksum(self.folder / name)}
        self.shards.append(shard)
        self._documents, self._pending = [], 0


class TokenShards:
    """A folder of token shards as one long stream of tokens, memory-mapped.

    manifest: dict. num_tokens, num_documents: int. Raises InputError if a file is missing, of another size, or of another
    format; `verify=True` also reads every byte and compares the checksums.
    """

    def __init__(self, folder, verify=False):
        self.folder = Path(folder)
        self.manifest = read_manifest(folder)
        if self.manifest.get("format") != FORMAT:
            raise InputError(f"{folder}/manifest.json: not a folder of token shards (its subfolders may be)")
        if self.manifest["version"] > VERSION:
            raise InputError(
                f"{folder}: format version {self.manifest['version']} is newer than this program's {VERSION}"
            )
        for shard in self.manifest["shards"]:
            for name, stated in shard["files"].items():
                self._check(name, stated, verify)
        shards = self.manifest["shards"]
        self._tokens = [self._load(f"tokens-{i:05d}.npy") for i in range(len(shards))]
        self._offsets = [self._load(f"offsets-{i:05d}.npy") for i in range(len(shards))]
        self._starts = np.cumsum([0, *(s["tokens"] for s in shards)]).tolist()  # first token of each shard
        self._first_documents = np.cumsum([0, *(s["documents"] for s in shards)]).tolist()
        self.num_tokens, self.num_documents = self._starts[-1], self._first_documents[-1]

    def _check(self, name, stated, verify):
        path = self.folder / name
        if not path.exists():
            raise InputError(f"{path}: missing, though manifest.json lists it; pack again")
        if path.stat().st_size != stated["bytes"]:
            raise InputError(f"{path}: {path.stat().st_size} bytes, manifest.json says {stated['bytes']}; pack again")
        if verify and checksum(path) != stated["xxh3"]:
            raise InputError(f"{path}: its checksum is not the one in manifest.json: damaged; pack again")

    def _load(self, name):
        try:
            return np.load(self.folder / name, mmap_mode="r")
        except ValueError:
            raise InputError(f"{self.folder / name}: not a .npy file of numbers: damaged; pack again") from None

    def read(self, start, length):
        """int32 array of shape (length,): the tokens [start, start + length) of the stream, across shards."""
        if not 0 <= start <= start + length <= self.num_tokens:
            raise IndexError(f"tokens {start} to {start + length} of {self.num_tokens}")
        parts, shard = [], bisect.bisect_right(self._starts, start) - 1
        while length > 0:
            at = start - self._starts[shard]
            part = self._tokens[shard][at : at + length]
            parts.append(part)
            start, length, shard = start + len(part), length - len(part), shard + 1
        return parts[0] if len(parts) == 1 else np.concatenate(parts or [np.empty(0, np.int32)])

    def document(self, index):
        """int32 array: the tokens of document `index`, boundary tokens included."""
        shard = bisect.bisect_right(self._first_documents, index) - 1
        local = index - self._first_documents[shard]
        begin, end = self._offsets[shard][local : local + 2]
        return self._tokens[shard][begin:end]

    def document_lengths(self):
        """int64 array of shape (num_documents,)."""
        return np.concatenate([np.diff(o) for o in self._offsets] or [np.empty(0, np.int64)])

    def document_starts(self, start, length):
        """Positions, relative to `start`, at which a document begins inside the tokens [start, start + length)."""
        found = []
        for shard, base in enumerate(self._starts[:-1]):
            if base < start + length and self._starts[shard + 1] > start:
                offsets = self._offsets[shard][:-1]
                low, high = np.searchsorted(offsets, [start - base, start + length - base])
                found.append(offsets[low:high] + base - start)
        return np.concatenate(found) if found else np.empty(0, np.int64)

    @property
    def bytes_per_token(self):
        """UTF-8 bytes of text for each token of the stream, BOS and EOS counted as tokens without bytes."""
        return self.manifest["utf8_bytes"] / self.num_tokens


def checksum(path):
    """xxh3-64 of a file as hexadecimal: finds accidents, not forgery."""
    digest = xxhash.xxh3_64()
    with Path(path).open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()
