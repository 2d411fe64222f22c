"""How words split into tokens: the pieces of a word to be shown, the words that cost the most tokens, words to look at."""

import codecs
import collections
import heapq
import re

import regex

from dilqur.tokenizer.text_tokenizer import byte_characters, encoding_with

KEPT_WORDS = 1 << 19  # different words counted at a time: some 60 MB
CANDIDATES = 20_000  # the most frequent words, among which the costly ones are looked for
BANDS = ((0, 100), (100, 1_000), (1_000, 10_000))  # of ranks by frequency
LENGTHS = ((3, 6), (7, 9), (10, 30))  # characters
BETWEEN = "·"  # pieces, in text
# U+200C and U+200D, which are written inside words of Persian and the Indic scripts, are letters here.
_LETTERS = regex.compile(r"\p{L}[\p{L}\p{M}\u200c\u200d]*")
_OF_LETTERS = regex.compile(r"[\p{L}\p{M}\u200c\u200d'’ʼ‐-]*\p{L}[\p{L}\p{M}\u200c\u200d'’ʼ‐-]*")


class WordCounts:
    """How often each word occurs. complete: bool, False once the rarer half had to be forgotten to bound the memory: from then on
    a count is a lower bound."""

    def __init__(self):
        self.counts, self.complete = collections.Counter(), True

    def add(self, words):
        self.counts.update(words)
        if len(self.counts) > KEPT_WORDS:
            self.counts = collections.Counter(dict(heapq.nsmallest(KEPT_WORDS // 2, self.counts.items(), key=_rank)))
            self.complete = False

    def most_frequent(self, n):
        """[(word, count)] of at most n words made of letters, hyphens and apostrophes, by count, then by the alphabet."""
        of_letters = (item for item in self.counts.items() if _OF_LETTERS.fullmatch(item[0]))
        return heapq.nsmallest(n, of_letters, key=_rank)


def _rank(item):
    return -item[1], item[0]


def choose_words(frequent):
    """Up to nine words to look at, from [(word, count)] by frequency: of three bands of ranks the most frequent short, middling
    and long one, of letters alone."""
    chosen = []
    for first, last in BANDS:
        band = [word for word, _ in frequent[first:last] if _LETTERS.fullmatch(word)]
        for shortest, longest in LENGTHS:
            chosen += [word for word in band if shortest <= len(word) <= longest][:1]
    return chosen


class WordSplitter:
    """splitter(word) → list[str]: the tokens of `word` as it stands in a text, after a space. A byte that is only part of a
    character is shown as ‹C9›, an unknown token by its name ([UNK]); other tokens as the text they stand for."""

    def __init__(self, tokenizer, unknown=None):
        self.tokenizer, self.backend, self.unknown = tokenizer, tokenizer.backend, unknown
        self._to_byte = {}
        if "ByteLevel" in str(self.backend.pre_tokenizer) + str(self.backend.decoder):
            self._to_byte = {character: byte for byte, character in enumerate(byte_characters())}

    def __call__(self, word):
        text, shown = f" {word}", []
        with encoding_with(self.tokenizer):
            encoding = self.backend.encode(text, add_special_tokens=False)
        for i, token, (start, stop) in zip(encoding.ids, encoding.tokens, encoding.offsets, strict=True):
            byte = re.fullmatch("<0x([0-9A-F]{2})>", token)  # of SentencePiece's byte_fallback
            if i == self.unknown:
                piece = token
            elif byte:
                piece = f"‹{byte[1]}›"
            elif self._to_byte and all(character in self._to_byte for character in token):
                piece = bytes(self._to_byte[character] for character in token).decode("utf-8", "dilqur-show-bytes")
            else:
                piece = text[start:stop]
            if piece := piece if shown else piece.strip():  # the space before the word can be a token by itself
                shown.append(piece)
        return shown


def _show_bytes(problem):
    return "".join(f"‹{byte:02X}›" for byte in problem.object[problem.start : problem.end]), problem.end


codecs.register_error("dilqur-show-bytes", _show_bytes)


def costly_words(frequent, splitter, n=20):
    """The n words that cost the most beyond a token each, [{"word", "count", "tokens", "extra_tokens", "split"}]: frequent ones
    that split into many. extra_tokens: count × (tokens − 1). frequent: [(word, count)]."""
    split = ((word, count, splitter(word)) for word, count in frequent)
    found = [
        {"word": w, "count": c, "tokens": len(s), "extra_tokens": c * (len(s) - 1), "split": BETWEEN.join(s)}
        for w, c, s in split
        if len(s) > 1
    ]
    return heapq.nsmallest(n, found, key=lambda cost: (-cost["extra_tokens"], cost["word"]))
