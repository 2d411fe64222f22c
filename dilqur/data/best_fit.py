"""`packing: best_fit`: whole documents in samples of max_length, hardly any of them cut, hardly any padding.

A document longer than a sample becomes whole samples and a rest; rests and shorter documents are placed, longest first, into
the sample with the least room that still holds them (best-fit decreasing; the same idea as in Ding et al. 2024, "Fewer
Truncations Improve Language Modeling"). Lengths alone decide, and documents of equal length are interchangeable: so samples
with as much room left are one group, and what is placed is a number of documents of a length into a number of samples.

The plan lies in a folder, memory-mapped: for every window of documents (a shard file, or a part of a large one)
    pieces-00000.npy    int64, (pieces, 2): a piece's first token in the stream, and 2 · its length, + 1 where its document goes on
    samples-00000.npy   int64, (samples + 1,): sample i is the pieces [samples[i], samples[i + 1]); those of whole length first
    plan.json           the samples of every window, and the totals
"""

import hashlib
import json
from pathlib import Path

import numpy as np

from dilqur.common.atomic import atomic_folder, write_json
from dilqur.data.mapped_files import MappedFiles, map_npy
from dilqur.data.npy_stream import save_npy

VERSION = 1
WINDOW = 1 << 22  # most documents that are placed together: some 400 MB of memory while it is done


class BestFitPlan:
    """The plan of a dataset as it lies in `folder`. num_samples: int. totals: documents, pieces, tokens, cut (documents
    that do not lie in one sample), samples."""

    def __init__(self, folder):
        self.folder = Path(folder)
        plan = json.loads((self.folder / "plan.json").read_text(encoding="utf-8"))
        self.totals, self.num_samples = plan["totals"], plan["totals"]["samples"]
        self._first_samples = np.cumsum([0, *plan["windows"]])
        self._pieces, self._samples = (
            MappedFiles(m, len(plan["windows"])) for m in (self._map_pieces, self._map_samples)
        )

    def pieces(self, sample):
        """[(first token in the stream, tokens, whether the document goes on after it), …] of a sample."""
        window = int(np.searchsorted(self._first_samples, sample, side="right")) - 1
        begin, end = self._samples[window].values[sample - self._first_samples[window] :][:2]
        return [(start, coded >> 1, coded & 1) for start, coded in self._pieces[window].values[begin:end].tolist()]

    def _map_pieces(self, window):
        return map_npy(self.folder / f"pieces-{window:05d}.npy", np.int64)

    def _map_samples(self, window):
        return map_npy(self.folder / f"samples-{window:05d}.npy", np.int64)


def write_plan(shards, max_length, within):
    """Write the plan of `shards` into a folder of its own in `within`, whole or not at all, unless it is there. Returns it."""
    folder = _plan_folder(shards, max_length, Path(within))
    if (folder / "plan.json").exists():
        return folder
    windows, totals = [], dict.fromkeys(("documents", "pieces", "tokens", "cut", "samples"), 0)
    with atomic_folder(folder) as part:
        for shard, base in enumerate(shards.shard_starts[:-1].tolist()):
            offsets = shards.offsets(shard)
            for first in range(0, len(offsets) - 1, WINDOW):
                starts = base + offsets[first : first + WINDOW + 1]
                pieces, samples = place(starts, max_length)
                save_npy(part / f"pieces-{len(windows):05d}.npy", pieces)
                save_npy(part / f"samples-{len(windows):05d}.npy", samples)
                windows.append(len(samples) - 1)
                lengths = np.diff(starts)
                totals["documents"] += len(lengths)
                totals["tokens"] += int(lengths.sum())
                totals["cut"] += int((lengths > max_length).sum())
                totals["pieces"] += len(pieces)
                totals["samples"] += len(samples) - 1
        write_json(part / "plan.json", {"version": VERSION, "windows": windows, "totals": totals})
    return folder


def _plan_folder(shards, max_length, within):
    """Its name is a hash of all that decides the plan."""
    files = [shard["files"] for shard in shards.manifest["shards"]]
    key = hashlib.sha256(json.dumps([VERSION, WINDOW, max_length, files]).encode()).hexdigest()
    return within / f"best-fit-{max_length}-{key[:16]}"


def place(starts, max_length):
    """The samples of one window. starts: int64, (documents + 1,), where each begins, and where the last one ends.

    Returns (pieces, samples), int64 arrays as in the plan's files. A pure function of its arguments.
    """
    starts = np.asarray(starts, np.int64)
    lengths = np.diff(starts)
    whole, rest = np.divmod(lengths, max_length)

    # what of a document fills samples to the last token: one piece each
    owner = np.repeat(np.arange(len(lengths)), whole)
    nth = np.arange(len(owner)) - np.repeat(np.cumsum(whole) - whole, whole)
    full_starts = starts[owner] + nth * max_length
    goes_on = full_starts + max_length < starts[owner + 1]
    full = np.stack([full_starts, 2 * max_length + goes_on], axis=1)

    # the rests and the short documents, those of a length together, in the order of the text
    order = np.argsort(rest.astype(np.min_scalar_type(max_length)), kind="stable")  # 16 bits: numpy sorts by digits
    counts = np.bincount(rest, minlength=max_length)
    order = order[counts[0] :]  # nothing is left of these
    groups = best_fit_decreasing(counts[1:], max_length)
    documents, sizes = _assign(groups, order, np.cumsum(counts) - counts - counts[0])
    sample_of = np.repeat(np.arange(len(sizes)), sizes)
    by_text = np.argsort(
        sample_of * len(lengths) + documents
    )  # within a sample the order of the text, not of the lengths
    documents = documents[by_text]
    placed = np.stack([starts[documents + 1] - rest[documents], 2 * rest[documents]], axis=1)

    samples = np.concatenate([[0], np.cumsum(np.concatenate([np.ones(len(full), np.int64), sizes]))])
    return np.concatenate([full, placed]), samples


def best_fit_decreasing(counts, room):
    """Which lengths lie together. counts: counts[n - 1] documents of length n. Returns [(samples, ((length, times), …)), …]:
    so many samples that hold each length so many times, longest first."""
    groups = {}  # room left → [(samples, contents), …]; contents: (contents before, length, times), a chain without copies
    open_rooms = 0  # bit r is set where a group has room r: the least room that fits is its lowest bit from `length` on
    for length in (np.flatnonzero(counts)[::-1] + 1).tolist():
        left = int(counts[length - 1])
        while left:
            fitting = open_rooms >> length
            here = (fitting & -fitting).bit_length() - 1 + length if fitting else room
            if fitting:
                samples, contents = groups[here].pop()
                if not groups[here]:
                    open_rooms &= ~(1 << here)
            else:
                samples, contents = -(-left // (room // length)), None  # new ones, as many as it takes
            # one after the other is filled as far as it goes, as if they were placed one at a time
            times = here // length
            filled = min(samples, left // times)
            parts = [(filled, times)] if filled else []
            left -= filled * times
            if filled < samples and left:  # the last one gets what there is
                parts.append((1, left))
                left = 0
            untouched = samples - sum(n for n, _ in parts)
            if untouched:
                groups.setdefault(here, []).append((untouched, contents))
                open_rooms |= 1 << here
            for n, t in parts:
                groups.setdefault(here - t * length, []).append((n, (contents, length, t)))
                open_rooms |= 1 << (here - t * length)
    out = []
    for here in sorted(groups):
        for samples, contents in groups[here]:
            chain = []
            while contents:
                contents, length, times = contents
                chain.append((length, times))
            out.append((samples, tuple(reversed(chain))))
    return out


def _assign(groups, order, first_of):
    """Assign documents to samples. order: documents by length; first_of[n]: where those of length n begin in it.

    Returns (documents, sizes): the documents of sample after sample, and how many each one holds.
    """
    next_of, documents, sizes = first_of.tolist(), [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for samples, contents in groups:
        columns = []
        for length, times in contents:
            begin = next_of[length]
            next_of[length] = begin + samples * times
            columns.append(order[begin : begin + samples * times].reshape(samples, times))
        table = columns[0] if len(columns) == 1 else np.concatenate(columns, axis=1)
        documents.append(table.ravel())
        sizes.append(np.full(samples, table.shape[1]))
    return np.concatenate(documents), np.concatenate(sizes)
