"""Exact and near duplicates among tens of millions of documents, on one node, the signatures on disk.

    np.save(file, signatures(texts))                        in any number of processes, one file or many
    exact_first, cluster_first = cluster(files, folder)     once, over all of them

A document is the set of its *shingles*, runs of `WORDS` words with letters casefolded and every digit made 0; what it
shares with another is the Jaccard index of the two sets. MinHash (Broder 1997, "On the resemblance and containment of
documents") estimates it from `PERMUTATIONS` numbers, and banding (Leskovec, Rajaraman, Ullman, "Mining of Massive
Datasets", 3.4) finds the pairs worth comparing: nothing is merged because one band agrees. Of the documents that agree in
a band each is compared with the first and with the NEIGHBOURS before it: with all, where no more than that agree. Pages of
one template agree by the million in bands that hold nothing but the template; those alike beyond it meet in other bands.

A word is a run of letters, digits and combining marks, without which Indic scripts would have no vowels; in scripts without
spaces (Han, kana, Thai, Lao, Khmer, Burmese) every letter is one, with its marks.

A signature takes 280 bytes on disk: 14 GB for 50 million documents. `cluster` keeps 48 bytes per document in memory (2.4 GB)
and uses what `memory_gb` gives it beyond that to read the files fewer times. Figures: docs/data.md.
"""

import functools
import mmap
import unicodedata
from pathlib import Path

import numpy as np
import xxhash

from dilqur.cleaning.word_hashes import polynomials
from dilqur.common.errors import InputError
from dilqur.data.documents import fold
from dilqur.data.npy_stream import save_npy

WORDS = 3
PERMUTATIONS = 128
THRESHOLD = 0.65
VERSION = 2  # of the signatures: those of different versions cannot be compared

SIGNATURE = np.dtype([("exact", "<u8", 2), ("letters", "<u8"), ("minhash", "<u2", PERMUTATIONS)])

NEIGHBOURS = 256  # of a document in a band, at most, that it is compared with; a tenth of a microsecond each

_CHARS_AT_ONCE = 1 << 17  # what is computed from so many characters stays in a core's cache
_DOCUMENTS_AT_ONCE = 1 << 16
_PAIRS_AT_ONCE = 1 << 9  # more take memory that the system has to clear first: eight times as long
_OVERHEAD_GB = 0.4  # interpreter, numpy, and the pieces worked on at a time


# -- signatures -------------------------------------------------------------------------------------------------------


def signatures(texts, near=True):
    """Structured array of shape (len(texts),) and dtype SIGNATURE; the same on every machine.

    exact: xxh3-128 of the text. letters: xxh3-64 of its letters and digits, case folded, the hash that
    `dilqur.data.documents.is_validation` compares with its fraction. minhash: the low 16 bits of the smallest shingle hash
    under each permutation, so two documents that share no shingle agree in one of 65,536. A text of fewer than WORDS
    words is one shingle. near=False leaves minhash 0, for exact copies only.
    Takes some 60 bytes of memory a character of the longest text.
    """
    out, begin = np.zeros(len(texts), SIGNATURE), 0
    while begin < len(texts):
        end, chars = begin, 0
        while end < len(texts) and (end == begin or chars + len(texts[end]) < _CHARS_AT_ONCE):
            chars += len(texts[end]) + 1
            end += 1
        _sign(texts[begin:end], out[begin:end], near)
        begin = end
    return out


def _sign(texts, out, near):
    """Fill `out`, the signatures of a few texts: their characters are one array, and hashed by numpy all at once."""
    digests = b"".join(xxhash.xxh3_128_digest(text.encode("utf-8")) for text in texts)
    out["exact"] = np.frombuffer(digests, ">u8").reshape(-1, 2)

    kind, value = _characters()
    texts = [text.replace("\u0307", "") for text in texts]  # of a lower-cased İ, which is an i: see `fold`
    codes = np.frombuffer("\n".join(texts).encode("utf-32-le"), np.uint32)
    kinds = kind[codes]
    ends = np.cumsum([len(text) + 1 for text in texts])  # of each text, the line feed after it included
    starts = np.concatenate([[0], ends[:-1]])
    _hash_letters(codes, kinds, starts, ends, out)
    if not near:
        return

    # A word begins at what is in one after what is not, at a letter that is a word by itself, and at one after such a letter.
    before = np.concatenate([np.full(1, _NONE), kinds[:-1]])
    after_whole_word = (before == _WHOLE_WORD) & (kinds != _MARK)
    words = np.flatnonzero((kinds != _NONE) & ((before == _NONE) | (kinds == _WHOLE_WORD) | after_whole_word))
    hashes = polynomials(value[codes], words)
    first = np.searchsorted(words, starts)
    counts = np.searchsorted(words, ends) - first

    long = counts >= WORDS
    if long.any():
        shingles = _combine([hashes[i : len(hashes) - WORDS + 1 + i] for i in range(WORDS)])
        out["minhash"][long] = _minhash(shingles, first[long], first[long] + counts[long] - WORDS + 1)
    for i in np.flatnonzero(~long):
        whole = hashes[first[i] : first[i] + counts[i], None] if counts[i] else out["exact"][i, :1, None]
        out["minhash"][i] = (_combine(whole) * _MULTIPLIERS).astype(np.uint16)


# Kinds of character: of no word, a letter or digit, one that is a word by itself, a combining mark.
_NONE, _LETTER, _WHOLE_WORD, _MARK = np.arange(4, dtype=np.uint8)


@functools.cache
def _characters():
    """(kind, value), arrays over all code points. value: a hash of the casefolded letter or the mark, equal for all digits
    and for i, I, ı and İ (whichever rules made the capitals)."""
    kind, value = np.full(0x110000, _NONE), np.zeros(0x110000, np.uint64)
    for code in range(0x110000):
        character = chr(code)
        if character.isalnum():
            kind[code] = _LETTER
        elif unicodedata.category(character)[0] == "M":
            kind[code] = _MARK
        else:
            continue
        hashed = "0" if character.isdecimal() else fold(character)
        value[code] = xxhash.xxh3_64_intdigest(hashed.encode("utf-8"))
    for low, high in (
        (0x0E00, 0x0EFF),  # Thai, Lao
        (0x1000, 0x109F),  # Burmese
        (0x1780, 0x17FF),  # Khmer
        (0x3005, 0x30FF),  # kana
        (0x3400, 0x9FFF),  # Han
        (0xF900, 0xFAFF),
        (0x20000, 0x3FFFF),
    ):
        letters = kind[low : high + 1]
        letters[letters == _LETTER] = _WHOLE_WORD
    return kind, value


def _hash_letters(codes, kinds, starts, ends, out):
    """The `letters` field: see `dilqur.data.documents.is_validation`."""
    isletter = (kinds == _LETTER) | (kinds == _WHOLE_WORD)
    letters = codes[isletter].tobytes().decode("utf-32-le")
    counts = np.concatenate([[0], np.cumsum(isletter)])
    edges = zip(counts[starts].tolist(), counts[np.minimum(ends, len(codes))].tolist(), strict=True)
    out["letters"] = [xxhash.xxh3_64_intdigest(fold(letters[a:b]).encode("utf-8"), seed=1) for a, b in edges]


def _odd(name, n, dtype):
    """n odd numbers of that dtype that look random, and are the same everywhere and always."""
    bits = b"".join(xxhash.xxh3_64_digest(f"{name} {i}".encode()) for i in range(n))
    return np.frombuffer(bits, ">u8").astype(dtype) | dtype(1)


_MULTIPLIERS = _odd("permutation", PERMUTATIONS, np.uint32)
_COEFFICIENTS = _odd("coefficient", 16, np.uint64)


def _combine(hashes):
    """uint32 hash of each row of hashes[0], hashes[1], …: uint64 arrays of one shape."""
    total = sum(h * c for h, c in zip(hashes, _COEFFICIENTS, strict=False))
    total ^= total >> np.uint64(29)
    total *= _COEFFICIENTS[-1]
    return (total >> np.uint64(32)).astype(np.uint32)


def _minhash(shingles, begins, ends):
    """(documents, PERMUTATIONS) uint16. Document i has shingles[begins[i]:ends[i]], uint32, at least one.

    A permutation is the multiplication by an odd number modulo 2³²; which of the shingles, hashes already, becomes the
    smallest is then as good as random (tests/unit/cleaning/test_near_duplicates.py compares the estimates with the truth).
    """
    edges = np.stack([begins, ends], 1).ravel()  # reduceat: every other piece is what lies between two documents
    padded, product = np.append(shingles, np.uint32(0)), np.empty(len(shingles) + 1, np.uint32)
    out = np.empty((len(begins), PERMUTATIONS), np.uint16)
    for i, multiplier in enumerate(_MULTIPLIERS):
        np.multiply(padded, multiplier, out=product)
        out[:, i] = np.minimum.reduceat(product, edges)[::2]
    return out


# -- clusters ---------------------------------------------------------------------------------------------------------


def cluster(files, work_folder, threshold=THRESHOLD, memory_gb=4.0):
    """Find the duplicates among all documents of `files`, .npy files of `signatures`; returns (exact_first, cluster_first).

    Both are int64 arrays of shape (documents,), memory-mapped from `work_folder`/exact_first.npy and cluster_first.npy. A
    document's number is its place over all files, in order. exact_first[i]: the smallest number with the same text.
    cluster_first[i]: the smallest of its cluster; i for a document that has no earlier copy. Two documents are in one
    cluster if a chain of pairs joins them that were compared and whose estimated Jaccard index is `threshold` or more.
    Compared is, in each band, every document with the first that agrees with it and with the last NEIGHBOURS before it that
    do, of each text the first copy alone. With threshold None only exact copies are looked for, and cluster_first is
    exact_first.

    The result depends on nothing but the signatures, their order and the threshold. Raises InputError for a file that holds
    no signatures, and where the memory is too small.
    """
    source = _Signatures(files)
    work_folder = Path(work_folder)
    rows, bands = rows_and_bands(threshold) if threshold else (0, 0)
    room = (memory_gb - _OVERHEAD_GB) * 1e9 / max(1, source.documents)  # bytes per document
    if room < 48:
        needed = _OVERHEAD_GB + 48e-9 * source.documents
        raise InputError(f"{source.documents:,} documents need {needed:.1f} GB to be compared, not {memory_gb:g}")
    exact = _exact_first(source)
    save_npy(work_folder / "exact_first.npy", exact)
    if not threshold:
        exact = np.load(work_folder / "exact_first.npy", mmap_mode="r")
        return exact, exact
    parents = exact  # copies are united from the start; one array less
    exact = np.load(work_folder / "exact_first.npy", mmap_mode="r")
    distinct = sum(int(_is_first(exact, start, len(part)).sum()) for start, part in source.parts())
    keys = np.empty((min(bands, int(room / 8) - 1), distinct), np.uint64)
    for first in range(0, bands, len(keys)):
        some = keys[: bands - first]
        _fill_band_keys(some, source, exact, rows, first)
        for band in some:
            band.sort()
            _unite_similar(parents, band, source, threshold)
    for begin in range(0, len(parents), _DOCUMENTS_AT_ONCE):
        part = slice(begin, begin + _DOCUMENTS_AT_ONCE)
        parents[part] = _roots(parents, parents[part])
    save_npy(work_folder / "cluster_first.npy", parents)
    return exact, np.load(work_folder / "cluster_first.npy", mmap_mode="r")


def rows_and_bands(threshold):
    """(rows a band, bands): as many rows as still find 95 % of the pairs that lie exactly at the threshold.

    A pair of Jaccard index t agrees in a whole band of r rows with probability tʳ, in one of b bands with 1 - (1 - tʳ)ᵇ.
    """
    if not 0.3 <= threshold <= 1:
        raise InputError(f"near-duplicate threshold {threshold}: from 0.3 (fewer shared shingles are no copy) to 1")
    for rows in range(12, 2, -1):
        bands = PERMUTATIONS // rows
        if 1 - (1 - threshold**rows) ** bands >= 0.95:
            return rows, bands
    return 2, PERMUTATIONS // 2


class _Signatures:
    """The signatures of many files under one numbering. Files are opened for a moment only: there may be thousands."""

    def __init__(self, files):
        self.files = [str(file) for file in files]
        self.starts = np.cumsum([0, *(len(self._open(file)) for file in self.files)])
        self.documents = int(self.starts[-1])

    def parts(self):
        """Yield (number of the first, signatures) for pieces of all files, in order."""
        for start, file in zip(self.starts[:-1].tolist(), self.files, strict=True):
            array = self._open(file)
            for begin in range(0, len(array), _DOCUMENTS_AT_ONCE):
                yield start + begin, array[begin : begin + _DOCUMENTS_AT_ONCE]

    def minhash(self, numbers):
        """(len(numbers), PERMUTATIONS) uint16; numbers ascend."""
        out = np.empty((len(numbers), PERMUTATIONS), np.uint16)
        edges = np.searchsorted(numbers, self.starts)
        for i in np.flatnonzero(np.diff(edges)):
            part = slice(edges[i], edges[i + 1])
            array = self._open(self.files[i])
            array._mmap.madvise(mmap.MADV_RANDOM)  # else each row of 280 bytes would read 128 kB around it
            out[part] = array["minhash"][numbers[part] - self.starts[i]]
        return out

    def _open(self, file):
        try:
            array = np.load(file, mmap_mode="r")
        except (OSError, ValueError) as problem:
            raise InputError(f"{file}: no signatures can be read from it ({problem}); make them again") from None
        if array.dtype != SIGNATURE or array.ndim != 1:
            raise InputError(f"{file}: holds {array.dtype}, not signatures of version {VERSION}; make them again")
        return array


def _exact_first(source):
    """int64 (documents,): the smallest number with the same 128-bit hash."""
    high, low = np.empty((2, source.documents), np.uint64)
    for start, part in source.parts():
        high[start : start + len(part)], low[start : start + len(part)] = part["exact"].T
    order = np.lexsort((low, high))  # stable: equal ones stay in the order of their numbers
    first, carried = np.empty(source.documents, np.int64), None
    for begin in range(0, len(order), _DOCUMENTS_AT_ONCE):
        here = order[begin : begin + _DOCUMENTS_AT_ONCE]
        before = order[begin - 1 : begin - 1 + len(here)] if begin else np.concatenate([here[:1], here[:-1]])
        same = (high[here] == high[before]) & (low[here] == low[before])
        same[0] &= begin > 0
        first[here], carried = _first_of_run(here, same, carried)
    return first


def _first_of_run(numbers, same, carried):
    """For each of `numbers` the first of its run, and that of the last run, to be carried on. same[i]: number i is in the
    run of i - 1; `carried`: the first of the run that was going on before."""
    at = np.maximum.accumulate(np.where(same, -1, np.arange(len(numbers))))
    first = np.where(at < 0, carried, numbers[at]) if same[0] else numbers[at]
    return first, first[-1]


def _is_first(exact, start, n):
    """bool (n,): which of the n documents from `start` on are the first of their text."""
    return exact[start : start + n] == np.arange(start, start + n)


def _fill_band_keys(keys, source, exact, rows, first):
    """keys: (bands, distinct texts) uint64. For the bands from `first` on, a document's band hashed in the high bits and its
    number in the low ones; of an exact copy none, as it would only take the place of a neighbour.

    Sorted as plain numbers, documents that agree stand together and in order. With 50 million of them 38 bits are left for
    the hash: some thousand pairs too many to compare in a band, no pair too few.
    """
    low, filled = _low_bits(source.documents), 0
    for start, part in source.parts():
        chosen = np.flatnonzero(_is_first(exact, start, len(part)))
        numbers, part = (chosen + start).astype(np.uint64), part[chosen]
        minhash = part["minhash"][:, first * rows : (first + len(keys)) * rows].T.astype(np.uint64)
        for row, band in zip(keys, minhash.reshape(len(keys), rows, -1), strict=True):
            mixed = sum(h * c for h, c in zip(band, _COEFFICIENTS, strict=False))
            mixed ^= mixed >> np.uint64(32)
            mixed *= _COEFFICIENTS[-1]
            row[filled : filled + len(part)] = mixed & ~low | numbers
        filled += len(part)


def _low_bits(documents):
    return np.uint64((1 << documents.bit_length()) - 1)


def _unite_similar(parents, keys, source, threshold):
    """Unite what is similar among the documents that agree in a band; `keys`: (distinct texts,) its sorted keys."""
    low, known, waiting, waited = _low_bits(source.documents), keys[:0], [], 0
    for begin in range(0, len(keys), _DOCUMENTS_AT_ONCE):
        wide = keys[max(0, begin - 1) : begin + _DOCUMENTS_AT_ONCE + 1]
        same = (wide[1:] ^ wide[:-1]) <= low
        agree = np.append(same, False) | np.append(False, same)
        here = slice(int(begin > 0), int(begin > 0) + _DOCUMENTS_AT_ONCE)
        waiting.append(wide[here][agree[here]])
        waited += len(waiting[-1])
        if waited >= _DOCUMENTS_AT_ONCE or begin + _DOCUMENTS_AT_ONCE >= len(keys):  # many: fewer looks into the files
            known = _compare(parents, np.concatenate([known, *waiting]), len(known), source, threshold)
            waiting, waited = [], 0


def _compare(parents, keys, known, source, threshold):
    """Compare each of `keys` but the first `known`, which were compared before, with the first of its run and with those
    before it. Returns the keys that may have neighbours to come."""
    low = _low_bits(source.documents)
    numbers, index = (keys & low).astype(np.int64), np.arange(len(keys))
    first = np.maximum.accumulate(np.where(np.append(False, (keys[1:] ^ keys[:-1]) <= low)[: len(keys)], 0, index))
    roots = _roots(parents, numbers)
    mixed = np.zeros(len(keys), bool)
    mixed[first[roots != roots[first]]] = True
    used = np.flatnonzero(mixed[first])  # a run that is one cluster has nothing to compare
    by_number, row = used[np.argsort(numbers[used])], np.empty(len(keys), np.int64)
    row[by_number], minhash = np.arange(len(used)), source.minhash(numbers[by_number])

    later = used[used >= known]
    for distance in range(NEIGHBOURS + 1):  # 0: the first of the run, however far
        later = later[later - first[later] > distance]
        earlier = later - distance if distance else first[later]
        apart = _roots(parents, numbers[earlier]) != _roots(parents, numbers[later])
        a, b = earlier[apart], later[apart]
        similar = _similar(minhash, row[a], row[b], threshold)
        _join(parents, numbers[a[similar]], numbers[b[similar]])
        if not len(later):
            break
    start = int(first[-1]) if len(keys) else 0
    return np.concatenate([keys[start : start + 1], keys[max(start + 1, len(keys) - NEIGHBOURS) :]])


def _similar(minhash, a, b, threshold):
    """bool (n,): whether rows a[i] and b[i] of minhash agree in `threshold` of the permutations."""
    out = np.empty(len(a), bool)
    for begin in range(0, len(a), _PAIRS_AT_ONCE):
        part = slice(begin, begin + _PAIRS_AT_ONCE)
        agree = minhash.take(a[part], axis=0) == minhash.take(b[part], axis=0)
        out[part] = agree.sum(axis=1, dtype=np.uint8) >= threshold * PERMUTATIONS
    return out


def _roots(parents, numbers):
    """The smallest number of each one's cluster so far: up the tree, in which every parent is smaller than its child."""
    roots = parents[numbers]
    while len(roots) and not np.array_equal(up := parents[roots], roots):
        roots = up
    parents[numbers] = roots
    return roots


def _join(parents, a, b):
    """Make the clusters of a[i] and b[i] one. A root gets the smallest of those it was asked to join; pairs that it could
    not follow by that are asked again, among fewer roots."""
    while len(a):
        a, b = _roots(parents, a), _roots(parents, b)
        apart = a != b
        a, b = a[apart], b[apart]
        np.minimum.at(parents, np.maximum(a, b), np.minimum(a, b))
