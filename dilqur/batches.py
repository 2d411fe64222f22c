"""Samples → tensors: where a batch is drawn.

The samples of step s are the positions [start + s · G, start + (s + 1) · G) of the stream, G the global batch. Micro-batch m
of rank r takes the positions start + s · G + (m · world + r) · b + [0, b): the same samples for any number of ranks.
"""

import hashlib
import json

import numpy as np

from dilqur.errors import InputError
from dilqur.sample_order import SampleOrder
from dilqur.token_shards import TokenShards

IGNORE = -100  # a label without loss, as torch's cross_entropy has it


class TokenSamples:
    """position of the stream → {"input_ids", "labels"}, int64 arrays of shape (max_length,); labels are the next tokens.

    datasets: [{"path": folder of token shards, "weight": share of tokens}, …]. The last label is -100
    where the stream ends. Raises InputError where the datasets were packed by different tokenizers.
    """

    def __init__(self, datasets, max_length, seed):
        self.shards, self.max_length = [TokenShards(d["path"]) for d in datasets], max_length
        first = self.shards[0]
        for other in self.shards[1:]:
            if other.manifest["tokenizer_sha256"] != first.manifest["tokenizer_sha256"]:
                raise InputError(f"datasets: {other.folder} and {first.folder} were packed with different tokenizers")
        weights = [d.get("weight") for d in datasets]
        if any(w is None for w in weights) and any(w is not None for w in weights):
            raise InputError("datasets: give a weight to all of them, or to none (then by size)")
        sizes = [shards.num_tokens // max_length for shards in self.shards]
        for shards, size in zip(self.shards, sizes, strict=True):
            if size < 1:
                raise InputError(
                    f"{shards.folder}: {shards.num_tokens} tokens are less than one sample of max_length {max_length}"
                )
        self.order = SampleOrder(sizes, seed, weights if weights[0] is not None else None)
        self.samples_per_epoch = sum(sizes)
        shares = [q / sum(self.order.quotas) for q in self.order.quotas]
        self.bytes_per_token = sum(share * s.bytes_per_token for share, s in zip(shares, self.shards, strict=True))

    @property
    def tokenizer_hash(self):
        return self.shards[0].manifest["tokenizer_sha256"]

    @property
    def vocab_size(self):
        return self.shards[0].manifest["vocab_size"]

    def fingerprint(self):
        """Hash of all that decides which tokens stand at a position: shards, mixture, seed, sample length."""
        files = [[shard["files"] for shard in shards.manifest["shards"]] for shards in self.shards]
        spec = [files, self.order.quotas, self.order.seed, self.max_length]
        return hashlib.sha256(json.dumps(spec).encode()).hexdigest()

    def __getitem__(self, position):
        dataset, sample = self.order[position]
        shards, start = self.shards[dataset], sample * self.max_length
        length = min(self.max_length + 1, shards.num_tokens - start)
        tokens = shards.read(start, length).astype(np.int64)
        labels = np.full(self.max_length, IGNORE, np.int64)
        labels[: length - 1] = tokens[1:]
        return {"input_ids": tokens[: self.max_length], "labels": labels}


def split_batch(global_batch_size, ceiling, world_size):
    """(per-device batch, accumulation steps) with batch · accumulation · world_size = global_batch_size, batch <= ceiling.

    Raises InputError, naming the numbers of processes that would work, where the global batch does not divide.
    """
    if global_batch_size % world_size:
        works = [n for n in range(1, global_batch_size + 1) if global_batch_size % n == 0]
        near = sorted(works, key=lambda n: abs(n - world_size))[:4]
        up = -(-global_batch_size // world_size) * world_size
        raise InputError(
            f"global_batch_size {global_batch_size} does not divide by {world_size} processes: take "
            f"{', '.join(map(str, sorted(near)))} processes, or a global_batch_size of {up}"
        )
    share = global_batch_size // world_size
    batch = max(b for b in range(1, min(ceiling, share) + 1) if share % b == 0)
    return batch, share // batch


def training_batches(samples, start, steps, batch, accumulation, rank, world_size, num_workers=0, pin_memory=False):
    """Yield, for each of `steps` steps from position `start`, this rank's list of `accumulation` micro-batches."""
    from torch.utils.data import DataLoader

    global_batch = batch * accumulation * world_size
    first_positions = (
        start + step * global_batch + (micro * world_size + rank) * batch
        for step in range(steps)
        for micro in range(accumulation)
    )
    positions = (range(first, first + batch) for first in first_positions)
    loader = DataLoader(samples, batch_sampler=positions, num_workers=num_workers, pin_memory=pin_memory)
    stream = iter(loader)
    for _ in range(steps):
        yield [next(stream) for _ in range(accumulation)]


def evaluation_batches(samples, batch, rank, world_size, limit=None):
    """Yield this rank's batches of the first `limit` samples of the stream, each sample on one rank; every rank gets the
    same number of batches, filled up with samples whose labels are all -100."""
    from torch.utils.data import default_collate

    count = min(limit or samples.samples_per_epoch, samples.samples_per_epoch)
    filler = {**samples[0], "labels": np.full(samples.max_length, IGNORE, np.int64)}
    for first in range(0, count, batch * world_size):
        mine = range(first + rank * batch, first + (rank + 1) * batch)
        yield default_collate([samples[p] if p < count else filler for p in mine])
