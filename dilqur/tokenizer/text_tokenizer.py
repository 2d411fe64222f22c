"""Text ↔ token ids, where control tokens in text are text; and a tokenizer's hash, which shards and models carry."""

import contextlib
import functools
import gzip
import hashlib
import json

from dilqur.common.errors import InputError
from dilqur.common.paths import tokenizer_file
from dilqur.tokenizer.llama3 import BOS, EOS


class TextTokenizer:
    """A `tokenizers` tokenizer that never makes a control token out of text and adds none by itself.

    content: bytes of its tokenizer.json. size: number of ids, added tokens included (the largest id + 1). bos_id, eos_id:
    what starts and ends a document, or None.
    """

    def __init__(self, path):
        from tokenizers import Tokenizer

        self.path = tokenizer_file(path)
        try:
            raw = self.path.read_bytes()
            self.content = gzip.decompress(raw) if self.path.suffix == ".gz" else raw
            self.backend = Tokenizer.from_str(self.content.decode("utf-8"))
        except Exception as problem:  # `tokenizers` raises plain Exception
            raise InputError(f"{self.path}: not a tokenizer ({problem})") from None
        if not self.backend.get_vocab_size(with_added_tokens=True):
            raise InputError(f"{self.path}: not a tokenizer (its vocabulary is empty)")
        self.backend.encode_special_tokens = True  # "<|eot_id|>" in a text is eight characters and more, not one id
        self.backend.no_padding()
        self.backend.no_truncation()
        self.size = max(self.backend.get_vocab(with_added_tokens=True).values()) + 1
        self.bos_token, self.eos_token = self._bos_and_eos()
        self.bos_id, self.eos_id = (t and self.backend.token_to_id(t) for t in (self.bos_token, self.eos_token))
        self._check_control_tokens()

    @functools.cached_property
    def hash(self):
        """SHA-256 of what decides the ids: vocabulary, merges, normalizer, pre-tokenizer, added tokens. The layout of the
        file, padding and post-processing are left out: saving it again does not change the hash."""
        spec = json.loads(self.backend.to_str())
        model = spec["model"]
        merges = ["\0".join(m) if isinstance(m, list) else m.replace(" ", "\0") for m in model.get("merges") or []]
        added = sorted((t["id"], t["content"], t["special"]) for t in spec["added_tokens"])
        vocab = model.get("vocab", {})
        vocab = sorted(vocab.items()) if isinstance(vocab, dict) else vocab
        parts = [
            model["type"],
            model.get("ignore_merges", False),
            vocab,
            merges,
            spec["normalizer"],
            spec["pre_tokenizer"],
            added,
        ]
        return hashlib.sha256(json.dumps(parts, ensure_ascii=False, sort_keys=True).encode()).hexdigest()

    def encode(self, text):
        """list[int]: the ids of `text`, nothing added."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts):
        """list[list[int]], as `encode`, on all cores (RAYON_NUM_THREADS)."""
        return [e.ids for e in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids, skip_special_tokens=False):
        return self.backend.decode(list(map(int, ids)), skip_special_tokens=skip_special_tokens)

    def control_id(self, token):
        """Id of a control token. Raises InputError if the tokenizer does not have it."""
        found = self.backend.token_to_id(token)
        if found is None:
            raise InputError(f"{self.path}: no control token {token}")
        return found

    def _bos_and_eos(self):
        """What tokenizer_config.json beside it calls BOS and EOS; without one, the names of Llama 3 if it has them."""
        config = self.path.with_name("tokenizer_config.json")
        names = {"bos_token": BOS, "eos_token": EOS}
        if config.exists():
            try:
                stated = json.loads(config.read_text(encoding="utf-8"))
            except ValueError as problem:
                raise InputError(f"{config}: damaged ({problem})") from None
            names = {k: stated.get(k) for k in names}
            names = {k: v["content"] if isinstance(v, dict) else v for k, v in names.items()}
        return (name if name and self.backend.token_to_id(name) is not None else None for name in names.values())

    def _check_control_tokens(self):
        special = {i: t.content for i, t in self.backend.get_added_tokens_decoder().items() if t.special}
        for i, content in special.items():
            if i in self.encode(content):
                raise InputError(
                    f"{self.path}: the text {content!r} becomes the control token {i}; a user could write it"
                )


def padded_size(size, multiple):
    """Rows of an embedding matrix for `size` ids: up to a multiple of `multiple`."""
    return -(-size // multiple) * multiple


@contextlib.contextmanager
def encoding_with(tokenizer):
    """Inside it, a text that `tokenizer`, a TextTokenizer, has no tokens for (nor an unknown token) is an InputError."""
    try:
        yield
    except Exception as problem:  # `tokenizers` raises plain Exception
        raise InputError(f"{tokenizer.path}: this tokenizer cannot encode the text ({problem})") from None


def byte_characters():
    """str of 256: the character that byte-level BPE writes for each byte (GPT-2's table, `bytes_to_unicode` of its encoder.py)."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return "".join(chr(b if b in printable else next(others)) for b in range(256))
