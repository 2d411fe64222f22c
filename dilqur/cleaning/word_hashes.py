"""A text's words as 64-bit numbers, computed for all of them at once: what n-grams of words are counted and found with, and
near copies too.

A word's hash is a polynomial in its characters, each first turned into a random-looking number, modulo 2**64:
h(w) = sum of value(w[i]) * B**i. With prefix products of B that is one pass of NumPy over the text; a Python loop over
the words costs three times as much. The numbers are the same in every process, on every machine.
"""

import functools
import sys
import unicodedata

import numpy as np

_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2**64
_INVERSE = pow(_BASE, -1, 1 << 64)
_30, _27, _31 = np.uint64(30), np.uint64(27), np.uint64(31)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_ZERO = np.zeros(1, np.int64)
_FOLD = {"ı": "i"}  # case folding takes I to i but leaves ı: folded too, BAKI, Bakı and bakı are one word


def word_hashes(text, folded=True):
    """The hashes of the words of `text`, in order: uint64, one per word.

    folded: words are runs of letters, digits and combining marks, without regard to case (nor to the dot of an i, since
    I is the capital of ı in some languages and of i in others). Otherwise they are what stands between white space.
    """
    if "\u0307" in text:
        text = text.replace("\u0307", "")
    code_points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    if not len(code_points):
        return np.empty(0, np.uint64)
    values = _character_values(folded)[code_points]
    inside = values != 0
    edges = (inside[1:] != inside[:-1]).nonzero()[0]
    edges += 1
    starts = edges[int(inside[0]) :: 2]  # into a word, out of it, into the next
    if inside[0]:
        starts = np.concatenate((_ZERO, starts))
    return scrambled(polynomials(values, starts))


def polynomials(values, starts):
    """uint64 (len(starts),): from each of `starts` to the next one, the sum of values[start + i] * B**i. `values` is used up.

    values: uint64, one for each character, 0 for those that part words: a sum that runs on to the next word adds nothing.
    """
    if not len(starts):
        return np.empty(0, np.uint64)
    powers, inverses = _powers(1 << max(20, len(values).bit_length()))
    values *= powers[: len(values)]
    return np.add.reduceat(values, starts) * inverses[starts]


def ngram_hashes(words, n):
    """The hashes of all runs of n words: uint64, one per start, max(0, len(words) - n + 1) of them.

    words: uint64, from `word_hashes`. A run's hash is the sum of w[i] * B**i again, so that runs of k and m words make
    one of k + m: the 13-grams take five steps over the text instead of twelve.
    """
    grams, covered, part, length = words[:0], 0, words, 1
    while length <= n:
        if n & length:
            grams = _followed(grams, covered, part) if covered else part
            covered += length
        if 2 * length <= n:
            part = _followed(part, length, part)
        length *= 2
    return grams


def _followed(first, length, second):
    """Hashes of the runs `first` (of `length` words), each followed by the run of `second` that begins where it ends."""
    joined = second[length:] * np.uint64(pow(_BASE, length, 1 << 64))
    joined += first[: len(joined)]
    return joined


def scrambled(numbers):
    """A bijection of uint64 in which every bit depends on every other (splitmix64's last step, Steele et al. 2014)."""
    numbers = (numbers ^ (numbers >> _30)) * _FIRST
    numbers ^= numbers >> _27
    numbers *= _SECOND
    numbers ^= numbers >> _31
    return numbers


@functools.cache
def _character_values(folded):
    """uint64[0x110000]: the value of each character, 0 for those that part words."""
    values = scrambled(np.arange(1, sys.maxunicode + 2, dtype=np.uint64) * np.uint64(_BASE)) | np.uint64(1)
    if not folded:
        spaces = [code for code in range(sys.maxunicode + 1) if chr(code).isspace()]
        values[spaces] = 0
        return values
    source = np.arange(sys.maxunicode + 1)
    for code in range(sys.maxunicode + 1):
        character = chr(code)
        if not character.isalnum() and unicodedata.category(character)[0] != "M":
            values[code] = 0
        elif (lower := character.casefold()[:1]) != character:  # İ folds to i and U+0307, ß to ss: the first will do
            source[code] = ord(_FOLD.get(lower, lower))
        elif character in _FOLD:
            source[code] = ord(_FOLD[character])
    return values[source]


@functools.lru_cache(maxsize=4)
def _powers(count):
    """(B**0, B**1, …) and (B**0, B**-1, …), uint64[count] each."""
    tables = []
    for base in (_BASE, _INVERSE):
        table = np.full(count, base, dtype=np.uint64)
        table[0] = 1
        tables.append(np.multiply.accumulate(table))
    return tables
