"""Documents that quote a benchmark: a model trained on its questions would only be asked what it has read.

A document is one if it shares a run of n words with a benchmark's text: 13 in GPT-3 (Brown et al. 2020,
arXiv:2005.14165, appendix C) and in Gopher (Rae et al. 2021, arXiv:2112.11446, appendix A.1.3). Words are those of
`word_hashes`, so neither case nor punctuation hides a quotation.
"""

from pathlib import Path

import numpy as np

from dilqur.cleaning.normalise import normalise
from dilqur.cleaning.word_hashes import ngram_hashes, word_hashes
from dilqur.common.errors import InputError
from dilqur.data.documents import read, read_jsonl

SHORTEST = 5  # words; fewer are too common for their coming together to say anything


class NgramIndex:
    """The n-grams of some benchmark texts, 64 bits each: to be built once, and searched in forked processes.

    items: (name, text) pairs, the texts normalised as the documents are. An item of fewer than n words is looked for as
    a whole; one of fewer than five words is left out and counted in `too_short`. `names` are those of the items that are
    looked for.
    """

    def __init__(self, items, n=13):
        if n < SHORTEST:
            raise InputError(f"decontamination: n-grams of {n} words are in every text; take {SHORTEST} or more")
        self.names, self.too_short = [], 0
        grams, items_of_grams = [np.empty(0, np.uint64)], [np.empty(0, np.int32)]
        self._short = {}  # hash of an item's first five words → [(its number, all its words)]
        for name, text in items:
            words = word_hashes(text)
            number = len(self.names)
            if len(words) >= n:
                grams.append(ngram_hashes(words, n))
                items_of_grams.append(np.full(len(grams[-1]), number, np.int32))
            elif len(words) >= SHORTEST:
                self._short.setdefault(int(ngram_hashes(words[:SHORTEST], SHORTEST)[0]), []).append((number, words))
            else:
                self.too_short += 1
                continue
            self.names.append(name)
        self._n = n
        self._long = _SortedSet(np.concatenate(grams), np.concatenate(items_of_grams))
        self._beginnings = _SortedSet(np.array(list(self._short), np.uint64), np.zeros(len(self._short), np.int32))

    @classmethod
    def from_files(cls, files, n=13, normalizer=normalise):
        """From .jsonl and .txt files, also .gz and .zst. Every line of a .txt is an item, and every string in a JSON
        object, however deep. normalizer: what the documents have gone through; a quotation is verbatim only if the items
        have, too. Raises InputError for what is not there or empty."""
        index = cls(((name, normalizer(text)) for name, text in _items(files)), n)
        if files and not index.names:
            raise InputError(f"{', '.join(map(str, files))}: no text of {SHORTEST} words to look for in there")
        return index

    def match(self, text):
        """The name of an item that `text` quotes, the first one in the text; None if it quotes none."""
        words = word_hashes(text)
        positions, items = self._long.find(ngram_hashes(words, self._n))
        earliest, name = (positions[0], self.names[items[0]]) if len(positions) else (len(words), None)
        if self._short:
            grams = ngram_hashes(words, SHORTEST)
            for position in self._beginnings.find(grams)[0]:
                for number, item in self._short[int(grams[position])]:
                    if position < earliest and np.array_equal(words[position : position + len(item)], item):
                        return self.names[number]
        return name


class _SortedSet:
    """uint64 hashes in order, each with a number, behind a table of one bit in sixteen that answers most questions."""

    def __init__(self, hashes, numbers):
        order = np.argsort(hashes, kind="stable")  # of equal ones the first comes first
        self._hashes, self._numbers = hashes[order], numbers[order]
        bits = max(12, len(hashes).bit_length() + 4)
        self._shift = np.uint64(64 - bits)
        self._seen = np.zeros(1 << bits, bool)
        self._seen[hashes >> self._shift] = True

    def find(self, hashes):
        """(positions, numbers) of those of `hashes` that are in here, in their order."""
        likely = self._seen[hashes >> self._shift].nonzero()[0]
        if not len(likely):
            return likely, likely
        wanted = hashes[likely]
        places = np.minimum(np.searchsorted(self._hashes, wanted), len(self._hashes) - 1)
        found = self._hashes[places] == wanted
        return likely[found], self._numbers[places[found]]


def _items(files):
    """(name, text) of every item in the files: the name is FILE:LINE, and the key where there are several."""
    for file in map(str, files):
        if not Path(file).is_file():
            raise InputError(f"{file}: no such file; benchmarks are .jsonl or .txt files, also .gz and .zst")
        suffixes = {*Path(file).suffixes[-2:]}
        if ".txt" in suffixes:
            yield from ((document.where, document.text) for document in read([file], sample_by="line"))
        elif suffixes & {".jsonl", ".json"}:
            for line, record in read_jsonl(file):
                yield from ((f"{file}:{line} {key}", text) for key, text in _strings(record, ""))
        else:
            raise InputError(f"{file}: benchmarks are .jsonl or .txt files, also .gz and .zst")


def _strings(value, key):
    """(key, string) of all strings in a JSON value, the keys of those inside others joined by dots."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict | list):
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _strings(inner, f"{key}.{name}" if key else str(name))
