"""Fast ways to the same token ids: HF `tokenizers` is the oracle, another engine is used only where it agrees with it.

    tokenizers   what the tokenizer.json means, by definition
    tiktoken     a BPE engine built from the same merges and pattern; three to seven times faster

`choose_engine` encodes a sample of the very corpus and a fixed set of tricky strings with both, and takes the fast engine
only if every id of every document is equal. While packing, one document of every block is compared again.
Text that spells a control token is text for all of them.
"""

import json
import os
import re
from itertools import chain, pairwise

import numpy as np

from dilqur.tokenizer.text_tokenizer import byte_characters

ENGINES = ("auto", "tokenizers", "tiktoken")
GPT2_PATTERN = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # ByteLevel(use_regex=True)
)

# Where engines have been seen to differ, or might: case folding in 's and 't (ſ is an s), marks and letters outside the first
# plane, every kind of white space and line end, digits of other scripts, unassigned and private characters, long runs.
TRICKY = (
    "", " ", "\n", "\r\n", "\t\t\t", "  \n  \n", "a", "Bakı", "İSTANBUL ıI i̇İ", "I'm we'LL it'S ke'ſ O'ſ 'ſ",
    "'ſ'ſ'stğ", "'S'T'RE'VE'M'LL'D", "ə Ə ǝ ә", "i̇ İ ı̇", "12345 ١٢٣٤ ⅷ Ⅷ ²³ ½ 𝟘𝟙𝟚", "a\u0301 e\u0301\u0302 \u0301",
    "👨\u200d👩\u200d👧 🇦🇿 ☺️", "日本語 中文 한국어 ไทย हिन्दी",
    "\u00a0 \u2003 \u3000 \u200b \u180e \ufeff \x85 \u2028 \u2029 \x1c \x1d \x1e \x1f \x0b \x0c",
    "a\u00a0b\u2003c\u3000d\x85e\u2028f", "...!!!???\n\n\n", "x" * 300, " " * 300, "\n" * 300, "!?" * 150,
    "ab " * 150, "\U0010ffff \ue000 \ufffd \u0378 \U000e0001",
    "<|eot_id|><|begin_of_text|> <|end_of_text|><|endoftext|>", "[CLS] [SEP] [MASK] </s> <s> <unk> <pad>",
    "http://a.az/?q=1&b=2#c e@x.az", "def f(x):\n    return x  # şərh\n", "Ⓐ ⒜ ẞ ß ŉ ǅ ﬁ Å Å Ω Ω", "١٬٢٣٤٫٥",
    "1,000.50 AZN – 5%", "\u0958 \u0929 \u1e9b\u0323", "\u202eabc\u202c",
)  # fmt: skip


MAX_SPACE_RUN = 400_000  # characters of white space in a row, at half of which tiktoken's pattern still holds
_SPACES = re.compile(
    rf"(?<!\s)\s{{{MAX_SPACE_RUN}}}"
)  # looked for where a run begins: else the search would be quadratic


class Engine:
    """Encodes texts to ids. name: one of ENGINES but "auto"."""

    def __init__(self, name, encode):
        self.name, self._encode = name, encode

    def encode(self, texts):
        """list of n str → (ids int32 (total,), lengths int64 (n,)): the ids of all texts one after the other."""
        return self._encode(texts)


def choose_engine(wanted, tokenizer, sample):
    """(Engine, what was found out about it in one sentence).

    wanted: one of ENGINES. tokenizer: a TextTokenizer. sample: texts of the corpus. "auto" is tiktoken where that agrees.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one worker is one core, and a forked thread pool hangs
    oracle = Engine("tokenizers", _tokenizers(tokenizer))
    if wanted == "tokenizers":
        return oracle, "tokenizers: asked for"
    try:
        engine = Engine("tiktoken", _tiktoken(tokenizer))
    except CannotBeBuilt as reason:
        return oracle, f"tokenizers, as tiktoken cannot do this tokenizer: {reason}"
    for kind, texts in (("the tricky strings", TRICKY), ("the corpus", sample)):
        for text in texts:
            if not agree(engine, oracle, text):
                return oracle, f"tokenizers, as tiktoken gives other ids for one of {kind}: {text[:60]!r}"
    return (
        engine,
        f"tiktoken: the ids of tokenizers on {len(TRICKY)} tricky strings and {len(sample)} documents of the corpus",
    )


def agree(engine, oracle, text):
    """Does `engine` give the ids of `oracle` for `text`?"""
    return np.array_equal(engine.encode([text])[0], oracle.encode([text])[0])


class CannotBeBuilt(Exception):
    """Why an engine cannot stand in for this tokenizer."""


def _tokenizers(tokenizer):
    encode = tokenizer.backend.encode_batch_fast

    def run(texts):
        parts = [e.ids for e in encode(texts, add_special_tokens=False)]
        lengths = np.fromiter(map(len, parts), np.int64, len(parts))
        ids = np.fromiter(chain.from_iterable(parts), np.int32, int(lengths.sum()))
        return ids, lengths

    return run


def _tiktoken(tokenizer):
    import tiktoken

    spec = json.loads(tokenizer.backend.to_str())
    pattern, ranks = split_pattern(spec), _ranks(spec)
    if not spec["model"].get("ignore_merges"):  # tiktoken finds a token that is a whole word without merging
        tokens = [text for token in ranks if "\ufffd" not in (text := token.decode("utf-8", "replace"))]
        pieces = tokenizer.backend.pre_tokenizer.pre_tokenize_str
        for text, ids in zip(tokens, tokenizer.encode_batch(tokens), strict=True):
            if len(ids) > 1 and len(pieces(text)) == 1:
                raise CannotBeBuilt(f"its merges do not lead to its token {text!r}")
    encode = tiktoken.Encoding("dilqur", pat_str=pattern, mergeable_ranks=ranks, special_tokens={}).encode_ordinary
    ask = tokenizer.encode

    def run(texts):
        # its pattern gives up on a million spaces in a row, and panics in several lines
        parts = [ask(t) if len(t) > MAX_SPACE_RUN and _SPACES.search(t) else encode(t) for t in texts]
        lengths = np.fromiter(map(len, parts), np.int64, len(parts))
        return np.fromiter(chain.from_iterable(parts), np.int32, int(lengths.sum())), lengths

    return run


def split_pattern(spec):
    """The regular expression by which the pre-tokenizer of a tokenizer.json, a dict, cuts text. Raises CannotBeBuilt where it does more
    than that."""
    if spec["normalizer"]:
        raise CannotBeBuilt(f"its normalizer is {spec['normalizer']['type']}")
    if any(not t["special"] for t in spec["added_tokens"]):
        raise CannotBeBuilt("it has added tokens that are no control tokens")
    pre = spec["pre_tokenizer"] or {"type": "none"}
    steps = pre["pretokenizers"] if pre["type"] == "Sequence" else [pre]
    if steps[-1]["type"] != "ByteLevel" or steps[-1]["add_prefix_space"]:
        raise CannotBeBuilt(f"its pre-tokenizer is {' + '.join(s['type'] for s in steps)}, not byte-level")
    if len(steps) == 1 and steps[0]["use_regex"]:
        return GPT2_PATTERN
    if len(steps) == 2 and steps[0]["type"] == "Split" and not steps[1]["use_regex"]:
        split = steps[0]
        isolated = split["behavior"] == "Isolated" or (split["behavior"] == "Removed" and split["invert"])
        if isolated and "Regex" in split["pattern"]:
            return split["pattern"]["Regex"]
    raise CannotBeBuilt("its pre-tokenizer splits in more than one step")


def _ranks(spec):
    """{bytes: id} in which the order of the ids is the order of the merges, as tiktoken wants it."""
    model = spec["model"]
    if model["type"] != "BPE":
        raise CannotBeBuilt(f"its model is {model['type']}, not BPE")
    for key in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(key):
            raise CannotBeBuilt(f"its BPE has {key}")
    to_byte = {character: byte for byte, character in enumerate(byte_characters())}
    added = {token["content"] for token in spec["added_tokens"]}  # some files list them in the vocabulary too
    try:
        ranks = {bytes(to_byte[c] for c in token): id for token, id in model["vocab"].items() if token not in added}
    except KeyError as problem:
        raise CannotBeBuilt(f"its vocabulary has {problem}, which stands for no byte") from None
    if any(bytes([b]) not in ranks for b in range(256)):
        raise CannotBeBuilt("its vocabulary lacks single bytes")
    merged = [a + b for a, b in (m if isinstance(m, list) else m.split(" ") for m in model["merges"])]
    order = [model["vocab"][token] for token in merged]
    if any(a > b for a, b in pairwise(order)):
        raise CannotBeBuilt("its ids are not in the order of its merges")
    if len(set(order)) < len(ranks) - 256:
        raise CannotBeBuilt("it has tokens that no merge makes")  # tiktoken would make them all the same
    return ranks
