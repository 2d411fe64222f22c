"""Random Unicode strings by the million through a tokenizer: each comes back as it was, and none becomes a control token.

    python tests/support/fuzz_tokenizer.py TOKENIZER [STRINGS] [SEED]

A string is up to twelve pieces: letters with a reputation (ı İ ə, U+0307, composed and decomposed), emoji and their joiners, digits
and spaces of many scripts, the names of control tokens whole and cut, and any characters of Unicode at all, unassigned and private
ones too. Lone surrogates, which no UTF-8 can hold, must be refused.
"""

import random
import sys
import time

from dilqur.tokenizer.llama3 import SPECIAL_TOKENS
from dilqur.tokenizer.text_tokenizer import TextTokenizer

BATCH = 10_000
PIECES = [
    *"ıIiİəƏğşöüçé", "i\u0307", "İ\u0307", "e\u0301", "\u0301\u0327", "ſ", "'ſ", "ǰ", "ß", "ﬁ", "Å", "Ω",
    "👩\u200d🚀", "👨\u200d👩\u200d👧", "🇦🇿", "🇦", "☺\ufe0f", "\u200d", "\u200c", "\ufe0f", "\ufeff", "\u202e",
    " ", "  ", "\t", "\n", "\r\n", "\r", "\x85", "\u00a0", "\u2028", "\u2029", "\u3000", "\x00", "\x1c", "\x7f",
    "0", "12345", "٣٤", "𝟘𝟙", "½", "Ⅷ", "'s", "'LL", "don't", "kitablardan", "हिन्दी", "日本語", "한국어", "ไทย",
    "...", "!?", "<|", "|>", "<|eot_id", "eot_id|>", "<", "|", "▁", "Ġ", "Ċ", "</s>", "[MASK]",
]  # fmt: skip


def random_string(draw):
    parts = []
    for _ in range(draw.randrange(13)):
        kind = draw.random()
        if kind < 0.6:
            parts.append(draw.choice(PIECES))
        elif kind < 0.7:
            token = draw.choice(SPECIAL_TOKENS)
            parts.append(token if draw.random() < 0.5 else token[: draw.randrange(len(token))])
        else:
            limit = draw.choice((0x80, 0x800, 0x10000, 0x110000))
            point = draw.randrange(limit)
            parts.append(chr(point) * draw.choice((1, 1, 1, 7)) if not 0xD800 <= point < 0xE000 else "")
    return "".join(parts)


def fuzz(path, strings, seed=0):
    """(strings that came back otherwise, control ids that content became), both lists of str. Raises AssertionError for a lone
    surrogate that is encoded."""
    tokenizer, draw = TextTokenizer(path), random.Random(seed)
    control = {i for i, token in tokenizer.backend.get_added_tokens_decoder().items() if token.special}
    changed, injected, started = [], [], time.monotonic()
    for first in range(0, strings, BATCH):
        texts = [random_string(draw) for _ in range(min(BATCH, strings - first))]
        for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
            if control.intersection(ids):
                injected.append(text)
            if tokenizer.decode(ids) != text:
                changed.append(text)
        if first and first % 100_000 == 0:
            print(f"{first:,} strings, {time.monotonic() - started:.0f} s", flush=True)
    for surrogate in ("\ud800", "a\udfffb", "\udc00\ud800"):
        try:
            ids = tokenizer.encode(surrogate)
        except (UnicodeEncodeError, TypeError):
            continue
        raise AssertionError(f"the lone surrogate {surrogate!r} was encoded as {ids}")
    return changed, injected


if __name__ == "__main__":
    count, seed = int((sys.argv[2:] or [1_000_000])[0]), int((sys.argv[3:] or [0])[0])
    changed, injected = fuzz(sys.argv[1], count, seed)
    for text in [*changed, *injected][:20]:
        print(ascii(text))
    print(f"{count:,} strings, seed {seed}: {len(changed)} came back otherwise, {len(injected)} became a control token")
    sys.exit(bool(changed or injected))
