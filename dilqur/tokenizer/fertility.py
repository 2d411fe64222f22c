"""Tokens per word and its companions: what one or more tokenizers make of a set of documents.

Three figures are published as "fertility", and 0.1 to 0.3 lie between them: RULES states each. All are a sum over the documents
divided by another sum (RATIOS), so that long documents count for what they are.
"""

import itertools
import json
from dataclasses import dataclass

import numpy as np
import regex

from dilqur.common.bootstrap import divide, interval, resampled_sums
from dilqur.tokenizer.text_tokenizer import TextTokenizer, encoding_with
from dilqur.tokenizer.whole_words import words_kept_whole

WINDOW = 131_072  # tokens: the context of Llama 3.1 and later
RARE = 5  # an id that occurs less often than this is learned from next to nothing
CACHED_WORDS = 1 << 17  # a tokenizer; of most texts nearly all words as they come
TEXT_SUMS = ("words", "stripped_words", "utf8_bytes")
TOKEN_SUMS = ("tokens", "stripped_tokens", "word_by_word_tokens", "whole_words")
RATIOS = {  # figure: what is summed above the line, and below it
    "fertility": ("tokens", "words"),
    "fertility_stripped": ("stripped_tokens", "stripped_words"),
    "fertility_word_by_word": ("word_by_word_tokens", "words"),
    "bytes_per_token": ("utf8_bytes", "tokens"),
    "words_kept_whole": ("whole_words", "words"),
}
RULES = {
    "fertility": "tokens without special tokens / whitespace-separated words, punctuation left on the words",
    "fertility_stripped": "the same with the punctuation (Unicode category P) at both ends of every word taken off, and the words "
    "joined by single spaces; what was punctuation alone is no word",
    "fertility_word_by_word": "mean over the whitespace-separated words of their tokens when each is encoded by itself without a "
    "space before it, as a loop over text.split() does: white space costs nothing, a word known only with its space costs more",
    "bytes_per_token": "UTF-8 bytes of the text, white space included / tokens without special tokens",
    "words_kept_whole": "share of the whitespace-separated words that are one token where they stand in the text, "
    "with or without the space before",
    f"words_per_{WINDOW}_tokens": f"{WINDOW:,} / fertility: the words that fit a context of so many tokens",
    "vocab_size": "number of ids, special tokens included",
    "vocab_share_used": "share of those ids that occur in this text",
    "vocab_share_rare": f"share of those ids that occur fewer than {RARE} times in this text, or never",
}
_PUNCTUATION_AT_AN_END = regex.compile(r"(?<!\S)\p{P}+|\p{P}+(?!\S)")


def strip_punctuation(text):
    """`text` with the punctuation at both ends of every word taken off; e-poçt keeps its hyphen."""
    return _PUNCTUATION_AT_AN_END.sub("", text)


class Batch:
    """Some texts and their words, split once for all tokenizers. sums: int64 (n, 3), the columns of TEXT_SUMS."""

    def __init__(self, texts):
        self.texts = texts
        self.words = [text.split() for text in texts]
        self.stripped = [strip_punctuation(text).split() for text in texts]
        sizes = [len(text.encode("utf-8")) for text in texts]
        self.sums = np.array([list(map(len, self.words)), list(map(len, self.stripped)), sizes], np.int64).T


class Counter:
    """Counts with one tokenizer. occurs: int64 (size,), how often each id came; unknown_tokens: how many tokens were the
    unknown one. Raises InputError for a file that is no tokenizer, or that cannot encode."""

    def __init__(self, path):
        self.tokenizer = TextTokenizer(path)
        self.backend = self.tokenizer.backend
        model = json.loads(self.backend.to_str())["model"]
        self.unknown = model.get("unk_id", self.backend.token_to_id(model.get("unk_token") or ""))
        self.start_anew()
        self._tokens_alone = {}

    def start_anew(self):
        """Forget the counts of ids, for the next set of documents."""
        self.occurs, self.unknown_tokens = np.zeros(self.tokenizer.size, np.int64), 0

    def count(self, batch):
        """int64 (n, 4): the columns of TOKEN_SUMS for the texts of `batch`."""
        with encoding_with(self.tokenizer):
            encodings = self.backend.encode_batch(batch.texts, add_special_tokens=False)
        stripped = self.lengths([" ".join(words) for words in batch.stripped])
        self._encode_alone(batch.words)
        total = sum(map(len, encodings))
        ids = np.fromiter(itertools.chain.from_iterable(e.ids for e in encodings), np.int64, total)
        self.occurs += np.bincount(ids, minlength=len(self.occurs))
        self.unknown_tokens += int((ids == self.unknown).sum()) if self.unknown is not None else 0
        alone = [sum(map(self._tokens_alone.__getitem__, words)) for words in batch.words]
        whole = [words_kept_whole(e, text, self.unknown) for e, text in zip(encodings, batch.texts, strict=True)]
        return np.array([list(map(len, encodings)), stripped, alone, whole], np.int64).T

    def lengths(self, texts):
        """list[int]: how many tokens each text becomes."""
        with encoding_with(self.tokenizer):
            return [len(e) for e in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _encode_alone(self, words):
        if len(self._tokens_alone) > CACHED_WORDS:
            self._tokens_alone.clear()
        new = list(set(itertools.chain.from_iterable(words)) - self._tokens_alone.keys())
        self._tokens_alone.update(zip(new, self.lengths(new), strict=True))


@dataclass
class SetCounts:
    """What was counted of a set of n documents. sums: {name of a tokenizer, or "" for the text: int64 (n, columns)};
    occurs, unknown_tokens: {name: as Counter has them}."""

    sums: dict
    occurs: dict
    unknown_tokens: dict

    @classmethod
    def of(cls, batches, counters):
        """Count `batches` with `counters`, {name: Counter}. Held in memory: a few numbers a document, and one an id."""
        parts = {"": [np.empty((0, len(TEXT_SUMS)), np.int64)]}
        parts |= {name: [np.empty((0, len(TOKEN_SUMS)), np.int64)] for name in counters}
        for counter in counters.values():
            counter.start_anew()
        for batch in batches:
            parts[""].append(batch.sums)
            for name, counter in counters.items():
                parts[name].append(counter.count(batch))
        return cls(
            {name: np.concatenate(part) for name, part in parts.items()},
            {name: counter.occurs for name, counter in counters.items()},
            {name: counter.unknown_tokens for name, counter in counters.items()},
        )

    def __add__(self, other):
        """Both sets as one."""
        return SetCounts(
            {name: np.concatenate([mine, other.sums[name]]) for name, mine in self.sums.items()},
            {name: mine + other.occurs[name] for name, mine in self.occurs.items()},
            {name: mine + other.unknown_tokens[name] for name, mine in self.unknown_tokens.items()},
        )

    @property
    def text(self):
        """{"documents", "words", "utf8_bytes"}"""
        total = dict(zip(TEXT_SUMS, self.sums[""].sum(0).tolist(), strict=True))
        return {"documents": len(self.sums[""]), "words": total["words"], "utf8_bytes": total["utf8_bytes"]}

    def figures(self, seed):
        """{name of a tokenizer: figures}. `intervals` has a [low, high] for each of RATIOS, None for too few documents; after the
        first tokenizer `differences` has {"difference", "interval"} to it. None where there is nothing to divide by."""
        all_sums = np.concatenate(list(self.sums.values()), axis=1)
        total, resampled = all_sums.sum(0), resampled_sums(all_sums, seed)
        columns = [("", column) for column in TEXT_SUMS]
        columns += [(name, column) for name in self.occurs for column in TOKEN_SUMS]

        def ratio(sums, name, figure):
            above, below = (columns.index(("" if c in TEXT_SUMS else name, c)) for c in RATIOS[figure])
            return divide(sums[..., above], sums[..., below])

        results, first = {}, next(iter(self.occurs))
        for name, occurs in self.occurs.items():
            fertility = ratio(total, name, "fertility")
            results[name] = {
                **{figure: rounded(ratio(total, name, figure)) for figure in RATIOS},
                f"words_per_{WINDOW}_tokens": round(WINDOW / float(fertility)) if fertility else None,
                "vocab_size": len(occurs),
                "vocab_share_used": rounded((occurs > 0).mean()),
                "vocab_share_rare": rounded((occurs < RARE).mean()),
                "tokens": int(total[columns.index((name, "tokens"))]),
                "unknown_tokens": self.unknown_tokens[name],
                "intervals": {f: rounded(interval(ratio(resampled, name, f))) for f in RATIOS},
            }
            if name != first:
                results[name]["differences"] = {
                    figure: {
                        "difference": rounded(ratio(total, name, figure) - ratio(total, first, figure)),
                        "interval": rounded(interval(ratio(resampled, name, figure) - ratio(resampled, first, figure))),
                    }
                    for figure in RATIOS
                }
        return results


def rounded(value):
    """A number, or an interval of two, with four decimals; None for what is not finite."""
    if value is None:
        return None
    if isinstance(value, tuple):
        return [round(v, 4) for v in value]
    return round(float(value), 4) if np.isfinite(value) else None
