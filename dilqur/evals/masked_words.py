"""Which words an encoder can guess: whole words of held-out documents are masked, every token of them, and one counts as guessed where
every token is right. The same words are masked for every encoder, whatever its tokenizer, so that figures compare; the number of [MASK]
gives away how many tokens a word has.
"""

import collections
from dataclasses import dataclass

import numpy as np
import regex
import torch
import xxhash
from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer, pipeline, set_seed

from dilqur.common.errors import InputError
from dilqur.evals.loading import load_model, refused
from dilqur.tokenizer.encoder_tokens import MASK

SEEN = {"never": 0, "1 to 9 times": 1, "10 to 99": 10, "100 to 999": 100, "1,000 or more": 1000}  # from how many on
ENDING, MIN_LETTERS, ENDINGS = 3, 6, 15  # letters of an ending, of a word that has one, how many endings
_WORD = regex.compile(r"\p{L}[\p{L}\p{M}'’]*")


@dataclass(frozen=True)
class Passage:
    """A text whose `words`, (begin, end) in it, are to be masked. document: the one it was cut from, a number."""

    text: str
    words: tuple
    document: int


def passages(texts, words_at_once, rate, seed):
    """Cut texts, before a word, into Passages of so many words; each word is masked with probability `rate`, by its place and `seed`."""
    out = []
    for document, text in enumerate(texts):
        spans = [match.span() for match in _WORD.finditer(text)]
        for at in range(0, len(spans), words_at_once):
            begin = spans[at][0] if at else 0
            end = spans[at + words_at_once][0] if at + words_at_once < len(spans) else len(text)
            drawn = [
                (a - begin, b - begin)
                for number, (a, b) in enumerate(spans[at : at + words_at_once], at)
                if xxhash.xxh3_64_intdigest(f"{document} {number}".encode(), seed=seed) < rate * 2**64
            ]
            if drawn:
                out.append(Passage(text[begin:end].rstrip(), tuple(drawn), document))
    return out


def count_words(texts, wanted):
    """Counter of those words of documents, as `passages` finds them, that are in the set `wanted`."""
    seen = collections.Counter()
    for text in texts:
        seen.update(word for word in _WORD.findall(text) if word in wanted)
    return seen


def classes(found, seen, suffixes=None):
    """({word: how often it was seen, a key of SEEN}, {word: its ending}, the endings): endings are the longest of `suffixes` that a word
    ends with, or the most frequent ones of three letters in words of six or more."""
    often = {word: next(name for name, least in reversed(SEEN.items()) if seen[word] >= least) for word in found}
    long = collections.Counter(word[-ENDING:] for word in sorted(found) if len(word) >= MIN_LETTERS)
    endings = suffixes or [ending for ending, _ in long.most_common(ENDINGS)]
    by_length = sorted(endings, key=len, reverse=True)
    least = 0 if suffixes else MIN_LETTERS
    of = {w: next((e for e in by_length if len(w) >= max(least, len(e) + 1) and w.endswith(e)), None) for w in found}
    return often, of, endings


class Guesser:
    """A masked language model of a folder; with random weights, to see what knowing nothing gives."""

    def __init__(self, path, bf16, random=False, seed=0):
        dtype = torch.bfloat16 if bf16 else torch.float32
        set_seed(seed)
        with refused(path):
            self.tokenizer = AutoTokenizer.from_pretrained(path)
            config = AutoConfig.from_pretrained(path)
        model = load_model(AutoModelForMaskedLM, path, config, dtype, random)
        if self.tokenizer.mask_token_id is None or not self.tokenizer.is_fast:
            raise InputError(f"{path}: its tokenizer has no mask token, or no tokenizer.json: it cannot guess words")
        self.model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()

    @torch.inference_mode()
    def guess(self, passages, max_length, batch_size, progress):
        """(was it guessed, was it cut off by `max_length`), bool arrays, a number for each masked word of all Passages, in order.
        A word that is cut off, or unknown to the tokenizer, is not guessed."""
        items = [self._mask(passage, max_length) for passage in passages]
        right = [None] * len(passages)
        order = sorted(range(len(passages)), key=lambda i: len(items[i][0]))
        for at in range(0, len(order), batch_size):
            batch = order[at : at + batch_size]
            shown = self.tokenizer.pad({"input_ids": [items[i][0] for i in batch]}, return_tensors="pt").to(
                self.model.device
            )
            likeliest = self.model(**shown).logits.argmax(-1).cpu()
            for row, i in zip(likeliest, batch, strict=True):
                right[i] = [self._is_right(row, word) for word in items[i][1]]
            progress(len(batch))
        cut_off = [not word for _, words in items for word in words]
        return np.array([guessed for passage in right for guessed in passage], bool), np.array(cut_off, bool)

    def _is_right(self, likeliest, word):
        unknown = self.tokenizer.unk_token_id
        return bool(word) and all(int(likeliest[place]) == was != unknown for place, was in word)

    def fill(self, sentence, top=5):
        """[(token, probability), …]: what it finds likeliest where `sentence` says [MASK], by transformers' own pipeline."""
        fill_mask = pipeline("fill-mask", model=self.model, tokenizer=self.tokenizer, device=self.model.device)
        guesses = fill_mask(sentence.replace(MASK, self.tokenizer.mask_token), top_k=top)
        return [(guess["token_str"].strip(), round(guess["score"], 4)) for guess in guesses]

    def _mask(self, passage, max_length):
        """(ids with masks, [(place, the id that was there), …] for each word, none where it was cut off)"""
        item = self.tokenizer(passage.text, truncation=True, max_length=max_length, return_offsets_mapping=True)
        ids, words = item["input_ids"], []
        place = collections.defaultdict(list)  # of a character
        for token, (begin, end) in enumerate(item["offset_mapping"]):
            for character in range(begin, end):
                place[character].append(token)
        cut = max(place, default=-1) + 1
        for begin, end in passage.words:
            tokens = sorted({token for character in range(begin, end) for token in place[character]})
            words.append([(token, ids[token]) for token in tokens] if end <= cut else [])
        for token, _ in (pair for word in words for pair in word):
            ids[token] = self.tokenizer.mask_token_id
        return ids, words
