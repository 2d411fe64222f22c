"""Byte-level BPE learned from word counts, in the Llama-3 configuration: new vocabularies, nested ones, and extensions of a base.

The merges are learned by the trainer of `tokenizers`, which takes texts and not counts: every word is handed to it as often as it
counts, without a pre-tokenizer. That gives the merges, to the last one, that it would learn from the text itself.
"""

import json
import sys

import regex
import xxhash

from dilqur.common.errors import InputError
from dilqur.tokenizer.encoder_tokens import CLS, CONTROL_TOKENS, MASK, SEP
from dilqur.tokenizer.engines import CannotBeBuilt, split_pattern
from dilqur.tokenizer.llama3 import BOS, PATTERNS, SPECIAL_TOKENS
from dilqur.tokenizer.text_tokenizer import byte_characters

MAX_FED = 25_000_000  # words handed to the trainer: about a minute of its time
RESOLUTION = 8  # a weighted word of count 1 is handed over so many times, so that fractions have room
AT_ONCE = 10_000
FIRST_SYMBOL = 0x10000  # a base token is one character to the trainer of an extension: U+10000 and its id
_BYTES = byte_characters()


def byte_level(word):
    """`word` as byte-level BPE writes it: one character for each of its UTF-8 bytes."""
    return "".join([_BYTES[byte] for byte in word.encode("utf-8")])


def whole_counts(weights, exact, max_fed=MAX_FED):
    """({word: int}, factor): `weights`, {word: float}, as whole numbers, proportional to them by `factor`.

    exact: they are whole already and stay so, unless there are more than `max_fed`. Else a fraction is rounded up with the probability of
    what is cut off; a hash of the word decides.
    """
    total = sum(weights.values())
    factor = 1 if exact and total <= max_fed else min(1 if exact else RESOLUTION, max_fed / total)
    if factor == 1 and exact:
        return {word: int(weight) for word, weight in weights.items()}, 1
    out = {}
    for word, weight in weights.items():
        whole, rest = divmod(weight * factor, 1)
        count = int(whole) + (xxhash.xxh3_64_intdigest(word.encode("utf-8"), seed=3) < rest * 2**64)
        if count:
            out[word] = count
    return out, factor


def learn_merges(counts, vocab_size, min_frequency):
    """(merges [(left, right)] of byte-level tokens, size of the vocabulary they make) from {word: int}.

    Stops at vocab_size, or where no pair is as frequent as min_frequency."""
    vocabulary, merges = train({byte_level(w): n for w, n in counts.items()}, vocab_size, min_frequency, sorted(_BYTES))
    return merges, len(vocabulary)


def cut_merges(merges, vocab_size):
    """The merges that training to `vocab_size` would have learned: up to the one that makes the last token. Two of them can make the
    same token, so there may be more of them than tokens."""
    made, kept = set(), []
    for pair in merges:
        if len(_BYTES) + len(made) >= vocab_size:
            break
        kept.append(pair)
        made.add("".join(pair))
    return kept


def train(counts, vocab_size, min_frequency, alphabet=()):
    """(vocabulary {token: id}, merges [(left, right)]) from {word: int}; a word is a string of symbols, whatever they stand for.

    alphabet: symbols that are there whether seen or not."""
    from tokenizers import Tokenizer, models, trainers

    def batches():
        for word, count in counts.items():
            for some in range(0, count, AT_ONCE):
                yield [word] * min(AT_ONCE, count - some)

    tokenizer = Tokenizer(models.BPE())
    tokenizer.train_from_iterator(
        batches(),
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=min_frequency,
            show_progress=sys.stderr.isatty(),
            initial_alphabet=list(alphabet),
        ),
    )
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def llama3_tokenizer(merges, pre_tokenizer):
    """A `tokenizers.Tokenizer` of the 256 bytes, `merges`, and the 256 special tokens of Llama 3. pre_tokenizer: of llama3.PATTERNS."""
    return byte_level_tokenizer(merges, pre_tokenizer, SPECIAL_TOKENS, f"{BOS} $A", f"{BOS} $A {BOS}:1 $B:1")


def encoder_tokenizer(merges, pre_tokenizer):
    """The same cut and the same merges with the control tokens of an encoder, dilqur/tokenizer/encoder_tokens.py."""
    return byte_level_tokenizer(
        merges, pre_tokenizer, CONTROL_TOKENS, f"{CLS} $A {SEP}", f"{CLS} $A {SEP} $B:1 {SEP}:1"
    )


def byte_level_tokenizer(merges, pre_tokenizer, control_tokens, single, pair):
    """single, pair: what stands around one text and around two, as processors.TemplateProcessing has it."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

    vocabulary = {character: i for i, character in enumerate(sorted(_BYTES))}
    for left, right in merges:
        vocabulary.setdefault(left + right, len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocabulary, list(merges), ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERNS[pre_tokenizer]), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    # a word's token has the space before it: [MASK], which stands for one, takes that space, too
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False, lstrip=token == MASK) for token in control_tokens]
    )
    used = [(token, tokenizer.token_to_id(token)) for token in control_tokens if token in single.split()]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=used)
    return tokenizer


# -- extension --------------------------------------------------------------------------------------------------------


class Extension:
    """New merges over those of a base tokenizer, a TextTokenizer: learned on the base's own segmentation, put after its merges, their
    tokens after all its ids. What contains none of the new pairs is encoded as before.

    Raises InputError where the base is not byte-level BPE."""

    def __init__(self, base):
        self.base, self.spec = base, json.loads(base.content)
        refuse_other_models(base, self.spec)
        self.vocabulary = self.spec["model"]["vocab"]
        self.tokenize = base.backend.model.tokenize  # asked for once: every `.model` makes a new object
        self.token_of = {id: token for token, id in self.vocabulary.items()}
        try:  # five times faster than to ask the pre-tokenizer itself
            self.words = regex.compile(split_pattern(self.spec)).findall
        except CannotBeBuilt:
            self.words = self.words_of_pre_tokenizer

    def words_of_pre_tokenizer(self, text):
        """`text` as the base's pre-tokenizer cuts it, a list of str."""
        return [text[first:last] for _, (first, last) in self.base.backend.pre_tokenizer.pre_tokenize_str(text)]

    def symbols(self, word):
        """`word`, as the pre-tokenizer cuts it, in the base's tokens: a character for each."""
        written = byte_level(word)
        whole = self.vocabulary.get(written) if self.spec["model"].get("ignore_merges") else None
        ids = [whole] if whole is not None else [t.id for t in self.tokenize(written)]
        return "".join([chr(FIRST_SYMBOL + id) for id in ids])

    def learn(self, counts, new_tokens, min_frequency):
        """Merges [(left, right)] of byte-level tokens that make `new_tokens` tokens the base has not, or as many as there are."""
        symbols = {}
        for word, count in counts.items():
            written = self.symbols(word)
            if len(written) > 1:
                symbols[written] = symbols.get(written, 0) + count
        alphabet = len(set().union(*symbols)) if symbols else 0
        room = new_tokens
        while True:
            vocabulary, merges = train(symbols, alphabet + room, min_frequency)
            text = {s: "".join(self.token_of[ord(c) - FIRST_SYMBOL] for c in s) for s in vocabulary}
            merges = [(text[left], text[right]) for left, right in merges]
            made = {left + right for left, right in merges} - self.vocabulary.keys()
            if len(made) >= new_tokens or len(vocabulary) < alphabet + room:
                return self.cut(merges, new_tokens)
            room += 2 * (new_tokens - len(made))  # some pairs make a token that is there already

    def cut(self, merges, new_tokens):
        """The first of `merges` that make `new_tokens` new tokens."""
        made, kept = set(), []
        for left, right in merges:
            if left + right not in self.vocabulary:
                if len(made) == new_tokens and left + right not in made:
                    break
                made.add(left + right)
            kept.append((left, right))
        return kept

    def new_tokens(self, merges):
        """int: how many tokens `merges` make that the base has not."""
        return len({left + right for left, right in merges} - self.vocabulary.keys())

    def tokenizer_json(self, merges):
        """str: the base's tokenizer.json with `merges` after its own. Special tokens keep their ids: they are written into the
        vocabulary as well, as GPT-2's file does, since `tokenizers` counts them from its end otherwise."""
        spec = json.loads(self.base.content)
        model, special = spec["model"], {token["content"]: token["id"] for token in spec["added_tokens"]}
        vocabulary = {**model["vocab"], **special}
        following = max(vocabulary.values()) + 1
        for left, right in merges:
            if left + right not in vocabulary:
                vocabulary[left + right] = following
                following += 1
        pairs = isinstance(model["merges"][0], list) if model["merges"] else True
        model["merges"] += [[left, right] if pairs else f"{left} {right}" for left, right in merges]
        model["vocab"] = vocabulary
        return json.dumps(spec, ensure_ascii=False)


def refuse_other_models(tokenizer, spec):
    """InputError where a TextTokenizer is not byte-level BPE without a normalizer: its tokens are no strings of bytes."""
    model, pre = spec["model"], json.dumps(spec["pre_tokenizer"])
    kind = model["type"] if model["type"] != "BPE" else "BPE of characters (as SentencePiece writes it)"
    if model["type"] != "BPE" or '"ByteLevel"' not in pre or model.get("byte_fallback"):
        raise InputError(
            f"{tokenizer.path}: its model is {kind}, not byte-level BPE; it cannot be extended: train a new tokenizer "
            f"(leave base_tokenizer out), or take a base model with byte-level BPE (Llama 3, Qwen, GPT-2)"
        )
    if spec["normalizer"]:
        raise InputError(
            f"{tokenizer.path}: it normalises text ({spec['normalizer']['type']}) before it splits it; train a new tokenizer instead"
        )
