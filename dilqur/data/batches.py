"""Samples → tensors: where a batch is drawn.

The samples of step s are the positions [start + s · G, start + (s + 1) · G) of the stream, G the global batch. Micro-batch m
of rank r takes the positions start + s · G + (m · world + r) · b + [0, b): the same samples for any number of ranks.

A sample is the tokens [i · max_length, (i + 1) · max_length) of a dataset (packing: concat), or whole documents and rests
of documents with hardly any padding (packing: best_fit, dilqur/data/best_fit.py).
"""

import functools
import hashlib
import itertools
import json
import os

import numpy as np

from dilqur.common.constants import IGNORE_INDEX
from dilqur.common.errors import InputError
from dilqur.data.best_fit import BestFitPlan, write_plan
from dilqur.data.sample_order import SampleOrder
from dilqur.data.token_shards import TokenShards
from dilqur.data.varlen import document_kwargs

AHEAD = 4  # micro-batches that each reading process prepares in advance


class TokenSamples:
    """Positions of the stream → {"input_ids", "labels"}, int64 arrays of shape (positions, max_length); labels are the next tokens.

    datasets: [{"path": folder of token shards, "weight": share of tokens}, …]; or "epochs" instead of weights: shares in
    proportion to size · epochs; or neither: to the sizes. One folder is one dataset, whatever the way to it.
    changes: [(position, datasets), …], ascending: from there on these.
    The last label is -100 where the stream ends; with best_fit, those at a document's end and of padding are.
    plans: for best_fit, the folder with its plans; those that are missing are written. None: for checks alone, the samples
    are counted as concat's, and no batch can be drawn. document_boundaries: also "position_ids", which begin again with
    every document. copies: {real path: folder} of datasets that are to be read elsewhere (dilqur/data/local_copy.py). masking:
    dilqur.data.mlm_masking.Masking, for an encoder: labels are then the tokens that it hides. Raises InputError where the datasets were
    packed by different tokenizers, or hold less than one sample.
    """

    def __init__(
        self,
        datasets,
        max_length,
        seed,
        changes=(),
        packing="concat",
        plans=None,
        document_boundaries=False,
        copies=None,
        masking=None,
    ):
        self.max_length, self.packing, self.document_boundaries = max_length, packing, document_boundaries
        self.masking = masking
        self.mixtures = [{"position": p, "datasets": list(d)} for p, d in [(0, datasets), *changes]]
        spelled = [str(d["path"]) for mixture in self.mixtures for d in mixture["datasets"]]
        first_spelled = {os.path.realpath(path): path for path in reversed(spelled)}
        # a new dataset comes after those before it: their order stays theirs
        self._numbers = {real: n for n, real in enumerate(dict.fromkeys(map(os.path.realpath, spelled)))}
        self.paths = [first_spelled[real] for real in self._numbers]
        self.shards = [TokenShards((copies or {}).get(real, first_spelled[real])) for real in self._numbers]
        self._num_tokens = np.array([shards.num_tokens for shards in self.shards])
        self._refuse_misfits()
        self.sizes, self.plans = [shards.num_tokens // max_length for shards in self.shards], None
        if packing == "best_fit" and plans is not None:
            self.plans = [BestFitPlan(write_plan(shards, max_length, plans)) for shards in self.shards]
            self.sizes = [plan.num_samples for plan in self.plans]
        first, *others = [self._weights(mixture["datasets"]) for mixture in self.mixtures]
        positions = [mixture["position"] for mixture in self.mixtures[1:]]
        self.order = SampleOrder(self.sizes, seed, first, list(zip(positions, others, strict=True)))

    def _refuse_misfits(self):
        first = self.shards[0]
        for shards in self.shards:
            if shards.manifest["tokenizer_sha256"] != first.manifest["tokenizer_sha256"]:
                raise InputError(f"datasets: {shards.folder} and {first.folder} were packed with different tokenizers")
            if shards.num_tokens < self.max_length:
                raise InputError(
                    f"{shards.folder}: {shards.num_tokens} tokens are less than one sample of max_length {self.max_length}"
                )

    def _weights(self, datasets):
        """One number a dataset of the union, 0 for those that are not in this mixture."""
        numbers = [self._number(d) for d in datasets]
        if len(set(numbers)) < len(numbers):
            twice = self.paths[max(numbers, key=numbers.count)]
            raise InputError(f"datasets: {twice} is listed twice: list it once, with the sum of the weights")
        keys = {key for d in datasets for key in ("weight", "epochs") if d.get(key) is not None}
        if len(keys) > 1 or any(d.get(key) is None for key in keys for d in datasets):
            raise InputError("datasets: give a weight to all of them, or epochs to all, or neither (then by size)")
        weights = [0] * len(self.paths)
        for number, dataset in zip(numbers, datasets, strict=True):
            if "weight" in keys:  # a share of the tokens: where a sample holds fewer of them, more samples
                weights[number] = dataset["weight"] / self._tokens_a_sample(number)
            else:
                weights[number] = self.sizes[number] * dataset.get("epochs", 1)
        return weights

    def _number(self, dataset):
        """The place among `paths` of one of `datasets`."""
        return self._numbers[os.path.realpath(dataset["path"])]

    # -- what it is -------------------------------------------------------------------------------------------------------

    @property
    def tokenizer_hash(self):
        return self.shards[0].manifest["tokenizer_sha256"]

    @property
    def vocab_size(self):
        return self.shards[0].manifest["vocab_size"]

    def samples_per_epoch(self, position=0):
        """Samples of the datasets in use at `position`, each as often as its `epochs` say."""
        mixture = [m for m in self.mixtures if m["position"] <= position][-1]
        return round(sum(self.sizes[self._number(d)] * d.get("epochs", 1) for d in mixture["datasets"]))

    def fingerprint(self):
        """[[position, hash of all that decides which tokens stand there until the next one], …]: shards, mixture, seed,
        sample length, packing. What a run has behind it is a beginning of this list: see `same_prefix`."""
        files = [[shard["files"] for shard in shards.manifest["shards"]] for shards in self.shards]
        out = []
        for phase in self.order.phases:
            # a dataset added later changes nothing here
            known = max(d for d, quota in enumerate(phase.quotas) if quota) + 1
            spec = [files[:known], phase.quotas[:known], self.order.seed, self.max_length]
            spec += [self.packing] if self.packing != "concat" else []
            out.append([phase.start, hashlib.sha256(json.dumps(spec).encode()).hexdigest()])
        return out

    def epochs(self, position):
        """{path: how often the dataset has been seen before `position`}."""
        return dict(zip(self.paths, self.order.epochs(position), strict=True))

    def utf8_bytes(self, start, end):
        """Bytes of text in the samples of the positions [start, end)."""
        drawn = np.subtract(self.order.draws(end), self.order.draws(start)).tolist()
        tokens = [n * self._tokens_a_sample(number) for number, n in enumerate(drawn)]
        return round(sum(n * shards.bytes_per_token for n, shards in zip(tokens, self.shards, strict=True)))

    def packing_shares(self):
        """Of best_fit: (share of the positions that is padding, share of the documents that do not lie in one sample)."""
        totals = [plan.totals for plan in self.plans]
        samples, tokens, documents, cut = (
            sum(t[name] for t in totals) for name in ("samples", "tokens", "documents", "cut")
        )
        return 1 - tokens / (samples * self.max_length), cut / documents

    def _tokens_a_sample(self, number):
        """Of a dataset, in the mean: best_fit leaves some of a sample's positions empty."""
        return self.shards[number].num_tokens / self.sizes[number] if self.plans else self.max_length

    # -- samples ----------------------------------------------------------------------------------------------------------

    def __getitem__(self, position):
        """One sample: arrays of shape (max_length,)."""
        return {name: values[0] for name, values in self.batch([position]).items()}

    def __getitems__(self, positions):  # torch's DataLoader asks for a whole batch under this name
        return self.batch(positions)

    def batch(self, positions):
        """{"input_ids", "labels"[, "position_ids"]}: int64 arrays of shape (len(positions), max_length)."""
        datasets, samples = self.order.batch(positions)
        fill = self._concat if self.packing == "concat" else self._best_fit
        arrays = fill(datasets, samples)
        if self.masking:
            hidden = self.masking(arrays["input_ids"], np.asarray(positions), self.order.seed)
            arrays["input_ids"], arrays["labels"] = hidden
        return arrays

    def _concat(self, datasets, samples):
        length = self.max_length
        tokens = np.empty((len(samples), length + 1), np.int32)
        for dataset in sorted(set(datasets.tolist())):
            rows = np.flatnonzero(datasets == dataset)
            self.shards[dataset].read_rows(samples[rows] * length, tokens, rows.tolist())
        names = ["input_ids", "labels"] + ["position_ids"] * self.document_boundaries
        out = np.empty(
            (len(names), len(samples), length), np.int64
        )  # one piece of memory: it is given back and reused whole
        out[0], out[1] = tokens[:, :-1], tokens[:, 1:]
        at_the_end = (samples + 1) * length == self._num_tokens[datasets]
        if at_the_end.any():
            out[1, at_the_end, -1] = IGNORE_INDEX  # nothing comes after the last token of a dataset
        if self.document_boundaries:
            out[2] = counting = np.arange(length)
            for row, (dataset, sample) in enumerate(zip(datasets.tolist(), samples.tolist(), strict=True)):
                begins = [*self.shards[dataset].document_starts(sample * length, length).tolist(), length]
                for begin, end in itertools.pairwise(begins):
                    out[2, row, begin:end] = counting[: end - begin]
        return dict(zip(names, out, strict=True))

    def _best_fit(self, datasets, samples):
        out = np.empty((2 + self.document_boundaries, len(samples), self.max_length), np.int64)
        out[1] = IGNORE_INDEX
        rows = [  # all of them before the first is copied: the disk reads them together
            [
                (length, self.shards[dataset].read(start, length + goes_on))
                for start, length, goes_on in self.plans[dataset].pieces(sample)
            ]
            for dataset, sample in zip(datasets.tolist(), samples.tolist(), strict=True)
        ]
        for row, (dataset, pieces) in enumerate(zip(datasets.tolist(), rows, strict=True)):
            at = 0
            for length, tokens in pieces:
                out[0, row, at : at + length] = tokens[:length]
                out[1, row, at : at + len(tokens) - 1] = tokens[1:]
                if self.document_boundaries:
                    out[2, row, at : at + length] = np.arange(length)
                at += length
            out[0, row, at:] = self.shards[dataset].manifest.get("eos_id") or 0  # padding, without labels
            if self.document_boundaries:
                out[2, row, at:] = np.arange(self.max_length - at)
        return dict(zip(("input_ids", "labels", "position_ids"), out, strict=False))


def same_prefix(then, now, position):
    """Do two fingerprints say that the same tokens stand at every position before `position`, and at its stream's first?"""
    past_then, past_now = ([[at, mixture] for at, mixture in f if at < max(position, 1)] for f in (then, now))
    return past_then == past_now


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
    """Yield, for each of `steps` steps from position `start`, this rank's list of `accumulation` micro-batches, tensors.

    num_workers: processes that read ahead, AHEAD micro-batches each; they live as long as this generator, which must be
    closed: they do not hear a signal.
    """
    from torch.utils.data import DataLoader

    global_batch = batch * accumulation * world_size
    first_positions = (
        start + step * global_batch + (micro * world_size + rank) * batch
        for step in range(steps)
        for micro in range(accumulation)
    )
    loader = DataLoader(
        samples,
        batch_sampler=(range(first, first + batch) for first in first_positions),
        collate_fn=functools.partial(_as_tensors, masking=samples.masking),
        num_workers=num_workers,
        prefetch_factor=AHEAD if num_workers else None,
        pin_memory=pin_memory,
        worker_init_fn=_leave_signals_to_the_run,
    )
    stream = iter(loader)
    try:
        for _ in range(steps):
            try:
                micro_batches = [next(stream) for _ in range(accumulation)]
            except InputError as problem:  # out of a worker it comes with the worker's traceback before it
                raise InputError(str(problem).rpartition("InputError: ")[2].strip()) from None
            yield micro_batches
    finally:
        if num_workers:  # they hear no signal: left to the end of the program, it would wait for them without end
            stream._shutdown_workers()


def evaluation_batches(samples, batch, rank, world_size, limit=None):
    """Yield this rank's batches of the first `limit` samples of the stream, each sample on one rank; every rank gets the
    same number of batches, filled up with samples whose labels are all -100."""
    count = min(limit or sum(samples.sizes), sum(samples.sizes))
    for first in range(0, count, batch * world_size):
        positions = np.arange(first + rank * batch, first + (rank + 1) * batch)
        arrays = samples.batch(np.where(positions < count, positions, 0))
        arrays["labels"][positions >= count] = IGNORE_INDEX
        yield _as_tensors(arrays, samples.masking)


def _leave_signals_to_the_run(worker):
    """TERM and USR1 are sent to every process of a job: the run saves, and needs its readers until then."""
    import signal

    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _as_tensors(arrays, masking):
    """The batch comes whole from `TokenSamples.batch`: nothing to stack. Beside position_ids, what attention needs of them; where
    tokens are masked, the places of those that have a label, which a GPU could only be waited for to count."""
    import torch

    tensors = {name: torch.from_numpy(values) for name, values in arrays.items()}
    if "position_ids" in tensors:
        tensors |= document_kwargs(tensors["position_ids"])
    if masking:
        tensors["masked_positions"] = torch.from_numpy(_places(arrays["labels"], masking.most(*arrays["labels"].shape)))
    return tensors


def _places(labels, most):
    """int64 array: where `labels` are not IGNORE_INDEX, counting through the batch; filled up to `most` with a place where they are, which
    adds nothing to the loss, so that the head computes as many in every batch."""
    masked = labels.reshape(-1) != IGNORE_INDEX
    places, missing = np.flatnonzero(masked), most - int(masked.sum())
    return np.append(places, np.full(missing, masked.argmin())) if missing > 0 and not masked.all() else places
