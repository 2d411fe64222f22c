"""How many whitespace-separated words are one token: from a tokenizer's offsets, or at the speed of packing from ids alone."""

import re
from bisect import bisect_left, bisect_right

import numpy as np

from dilqur.tokenizer.text_tokenizer import byte_characters


def words_kept_whole(encoding, text, unknown):
    """How many words of `text` are one token, which is not `unknown` (the id of that token). Any tokenizer will do.

    encoding: what a tokenizer of the library `tokenizers` makes of `text`.
    """
    starts, ends = zip(*encoding.offsets, strict=True) if encoding.offsets else ((), ())
    kept = 0
    for word in re.finditer(r"\S+", text):
        first, stop = bisect_right(ends, word.start()), bisect_left(starts, word.end())  # the tokens that touch it
        if stop - first == 1 and encoding.ids[first] != unknown:
            kept += text[starts[first] : ends[first]].strip() == word.group()
    return kept


class WholeWords:
    """Counts them from the ids of `tokenizer` (a TextTokenizer).

    known: bool, False where the tokens are not bytes of the text (WordPiece, SentencePiece): then nothing can be counted.
    """

    def __init__(self, tokenizer):
        decoder = tokenizer.backend.decoder
        self.known = type(decoder).__name__ == "ByteLevel"
        to_byte = {character: byte for byte, character in enumerate(byte_characters())}
        self._begins, self._ends, self._word = (np.zeros(tokenizer.size, bool) for _ in range(3))
        for token, i in tokenizer.backend.get_vocab(with_added_tokens=False).items() if self.known else ():
            if any(c not in to_byte for c in token):  # a control token that is in the vocabulary too
                continue
            text = bytes(to_byte[c] for c in token).decode("utf-8", "replace")
            self._begins[i], self._ends[i] = text[:1].isspace(), text[-1:].isspace()
            self._word[i] = len(text.split()) == 1

    def count(self, ids, lengths):
        """ids (total,), lengths (n,) of n documents without boundary tokens → int64 (n,): words that are one token."""
        stops = np.cumsum(lengths)
        starts = stops - lengths
        after = self._ends[ids]  # a word's end: white space at this token's end, or at the next one's beginning
        after[:-1] |= self._begins[ids[1:]]
        after[stops[lengths > 0] - 1] = True
        before = self._begins[ids]
        before[1:] |= self._ends[ids[:-1]]
        before[starts[lengths > 0]] = True
        so_far = np.concatenate([[0], np.cumsum(self._word[ids] & before & after)])
        return so_far[stops] - so_far[starts]
