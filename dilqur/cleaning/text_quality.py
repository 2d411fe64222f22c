"""Measures of a text by which poor ones are told apart, each a share from 0 to 1 unless it says otherwise.

They are the ones of Gopher (Rae et al. 2021, arXiv:2112.11446, appendix A.1.1, table A1) and FineWeb (Penedo et al.
2024, arXiv:2406.17557), free of any one language: words are what stands between white space, where theirs come from a
tokenizer for English. What is too much of each is for the recipe to say.
"""

import bisect
import functools
import itertools
import sys
import unicodedata
from pathlib import Path
from typing import NamedTuple

import numpy as np
import regex

from dilqur.cleaning.normalise import normalise
from dilqur.cleaning.recipe_patterns import compiled_pattern, timed_matches
from dilqur.cleaning.word_hashes import ngram_hashes, word_hashes
from dilqur.common.errors import InputError

# -- repetition -------------------------------------------------------------------------------------------------------


def repeated_line_share(text):
    """Share of the characters that are in a line which occurred before (Gopher, table A1: drop above 0.2)."""
    seen, repeated, total = set(), 0, 0
    for line in filter(None, text.split("\n")):
        total += len(line)
        repeated += len(line) if line in seen else 0
        seen.add(line)
    return repeated / max(1, total)


def repeated_ngram_share(text, n=5):
    """Share of the words inside a word n-gram that occurred before, each word counted once (Gopher, table A1: drop
    above 0.15 of the characters for n = 5)."""
    words = word_hashes(text, folded=False)
    grams = ngram_hashes(words, n)
    in_order = np.sort(grams)
    if not (in_order[1:] == in_order[:-1]).any():  # most texts end here
        return 0.0
    order = np.argsort(grams, kind="stable")  # equal ones stay in the order of the text: the first is the first
    again = order[1:][in_order[1:] == in_order[:-1]]
    begun_less_ended = np.zeros(len(words) + 1, np.int64)
    begun_less_ended[again] += 1
    begun_less_ended[again + n] -= 1
    return float(np.count_nonzero(begun_less_ended.cumsum()) / len(words))


# -- characters and words ---------------------------------------------------------------------------------------------


class CharacterShares(NamedTuple):
    """What the characters of a text are. The first three are shares of those that are not white space."""

    letters: float  # with their marks: vowel signs are half of what is written in Indic scripts
    digits: float  # of any script, also Roman numerals and fractions that are one character
    symbols: float  # currency, mathematics, emoji, arrows
    upper_case: float  # share of the letters that have a case
    script: float  # share of the letters, those that belong to all scripts left out, that are in the script asked for
    mean_word_length: float  # characters in a run of letters, digits and marks (Gopher: keep 3 to 10)
    alphabetic_words: float  # share of the words that have a letter (Gopher: keep above 0.8)


# Kinds of character, in an order in which what makes a word comes last, and letters last of all.
_SPACE, _OTHER, _SYMBOL, _DIGIT, _MARK, _UNCASED, _UPPER, _LOWER = range(8)
_OF_SCRIPT, _FOREIGN = 16, 32  # added to the kind of a letter


class CharacterCounter:
    """Counts what the characters of a text are; raises InputError for a script that Unicode does not know.

    script: a Unicode name of a script, such as Latin, Cyrillic or Arab; None: any.
    """

    def __init__(self, script=None):
        self._classes = _kinds() + _belonging(script)

    def __call__(self, text):
        """The CharacterShares of `text`; all 0 where there is nothing but white space."""
        classes = self._classes[np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)]
        kinds = classes & (_OF_SCRIPT - 1)
        visible = kinds != _SPACE
        if not visible.any():
            return CharacterShares(*[0.0] * len(CharacterShares._fields))
        counts = np.bincount(classes, minlength=_FOREIGN + _OF_SCRIPT).reshape(3, _OF_SCRIPT)
        of_script, foreign = counts[1].sum(), counts[2].sum()
        per_kind = counts.sum(axis=0)
        characters = len(classes) - per_kind[_SPACE]
        upper, lower = per_kind[_UPPER], per_kind[_LOWER]

        in_run = kinds >= _DIGIT
        runs = int(in_run[0]) + np.count_nonzero(in_run[1:] > in_run[:-1])
        words = (visible[1:] > visible[:-1]).nonzero()[0] + 1  # where they start
        if visible[0]:
            words = np.concatenate((np.zeros(1, words.dtype), words))
        alphabetic = np.count_nonzero(np.maximum.reduceat(kinds, words) >= _UNCASED)
        shares = CharacterShares(
            letters=(per_kind[_UNCASED:].sum() + per_kind[_MARK]) / characters,
            digits=per_kind[_DIGIT] / characters,
            symbols=per_kind[_SYMBOL] / characters,
            upper_case=upper / max(1, upper + lower),
            script=of_script / max(1, of_script + foreign),
            mean_word_length=per_kind[_DIGIT:].sum() / max(1, runs),
            alphabetic_words=alphabetic / len(words),
        )
        return CharacterShares(*map(float, shares))


@functools.cache
def _kinds():
    """uint8[0x110000]: the kind of each character, by its Unicode category."""
    by_category = {"Ll": _LOWER, "Lu": _UPPER, "Lt": _UPPER, "L": _UNCASED, "M": _MARK, "N": _DIGIT}
    by_category |= {"S": _SYMBOL, "Z": _SPACE, "Me": _OTHER}
    kinds = np.full(sys.maxunicode + 1, _OTHER, np.uint8)
    for code in range(sys.maxunicode + 1):
        category = unicodedata.category(chr(code))
        kinds[code] = by_category.get(category) or by_category.get(category[0], _OTHER)
    kinds[[9, 10, 13]] = _SPACE
    kinds[0xFE00:0xFE10] = _OTHER  # variation selectors: like enclosing marks they stand on emoji, not on letters
    return kinds


@functools.cache
def _belonging(script):
    """uint8[0x110000]: for letters _OF_SCRIPT or _FOREIGN, 0 for those that belong to all scripts (ʼ, ː)."""
    letters = "".join(map(chr, np.flatnonzero(_kinds() >= _UNCASED)))
    belonging = np.zeros(sys.maxunicode + 1, np.uint8)
    shared = r"\p{Script=Common}\p{Script=Inherited}"
    belonging[[ord(c) for c in regex.findall(f"[^{shared}]", letters)]] = _FOREIGN if script else _OF_SCRIPT
    if script:
        try:
            of_script = regex.findall(rf"\p{{Script={script}}}", letters)
        except regex.error:
            of_script = []
        if not of_script:
            raise InputError(f"script: {script!r} is no script of Unicode with letters; e.g. Latin, Cyrillic, Arabic")
        belonging[[ord(c) for c in of_script]] = _OF_SCRIPT
    return belonging


# -- lines ------------------------------------------------------------------------------------------------------------

_BULLETS = ("•", "-", "*", "·", "●", "▪", "‣")
_ELLIPSES = ("...", "…")
_CLOSING = "\"'»”’“)]"  # may stand after the sign that ends a sentence


class LineShares(NamedTuple):
    """What the lines of a text are, as shares of those that are not empty."""

    bullets: float  # begin with a bullet (Gopher: drop above 0.9)
    ellipses: float  # end with an ellipsis (Gopher: drop above 0.3)
    sentences: float  # end with the sign that ends a sentence, in any script (FineWeb: drop below 0.12)
    short: float  # have at most 30 characters (FineWeb: drop above 0.67)


def line_shares(text, short=30):
    """The LineShares of `text`; all 0 for an empty one. short: characters of the longest short line."""
    ends = _sentence_ends()
    lines = [line for line in text.split("\n") if line]
    counts = [
        sum(line.lstrip().startswith(_BULLETS) for line in lines),
        sum(line.endswith(_ELLIPSES) for line in lines),
        sum(line.rstrip(_CLOSING)[-1:] in ends for line in lines),
        sum(len(line) <= short for line in lines),
    ]
    return LineShares(*(count / max(1, len(lines)) for count in counts))


@functools.cache
def _sentence_ends():
    return frozenset(regex.findall(r"[\p{Sentence_Terminal}…]", "".join(map(chr, range(sys.maxunicode + 1)))))


class BoilerplateLines:
    """Takes lines that say nothing of a document out of it: menus, cookie notices, "share this".

    patterns: regular expressions (of the package `regex`), looked for anywhere in the text, ^ and $ being the ends of
    a line; a line goes if a match has a character of it, for which the line feed at its end does not count, or is empty
    and stands in it. files: text files with such lines in full, one a line. normalizer: what the documents have gone
    through; these lines do, too, and so does what is left of a document.
    Raises InputError for a pattern that is not one or matches the empty string, or a file that is not there.
    """

    def __init__(self, patterns=(), files=(), where="boilerplate_patterns", normalizer=normalise):
        self._patterns = [compiled_pattern(pattern, where) for pattern in patterns]
        self._lines = set()
        for file in files:
            try:
                lines = Path(file).read_text(encoding="utf-8").split("\n")
            except (OSError, UnicodeDecodeError) as problem:
                raise InputError(
                    f"{file}: boilerplate lines: {getattr(problem, 'strerror', None) or problem}"
                ) from None
            self._lines.update(filter(None, map(normalizer, lines)))
        self._where, self._normaliser = where, normalizer

    def apply(self, text):
        """(the text without those lines, how many they were). text: as the normalizer leaves it."""
        lines = text.split("\n")
        drop = {number for number, line in enumerate(lines) if line in self._lines} if self._lines else set()
        matches = [match for pattern in self._patterns for match in timed_matches(pattern, text, self._where)]
        starts = list(itertools.accumulate((len(line) + 1 for line in lines), initial=0)) if matches else []
        for match in matches:
            begin, end = match.span()
            if found := match[0]:
                begin += len(found) - len(found.lstrip("\n"))
                end -= len(found) - len(found.rstrip("\n"))
                if begin >= end:  # a match of line feeds alone has nothing of the lines it stands between
                    continue
            drop.update(range(bisect.bisect(starts, begin) - 1, bisect.bisect(starts, max(begin, end - 1))))
        if not drop:
            return text, 0
        left = "\n".join(line for number, line in enumerate(lines) if number not in drop)
        return self._normaliser(left), len(drop)
