"""Which language a text is in, by a model that lies in a file: nothing is fetched.

Without a model given it is py3langid's own, which comes inside its package: 140 labels, ISO 639 codes.
"""

import difflib
import importlib
from pathlib import Path

from dilqur.common.errors import InputError

# The identifier reads a text at 3 MB/s, far slower than all other filters, and is sure after a few sentences. Parts of
# the text from its start, middle and end, this many characters together, are what it gets to see.
CHARACTERS = 450


class LanguageIdentifier:
    """Says which language a text is in; raises InputError for a model that is none, or labels that it lacks.

    model: None, or a file: py3langid's (.xz, .plzma: arrays, no pickle) or fastText's (.bin, .ftz), such as lid.176 or
    GlotLID, which needs the package `fasttext`. characters: how many of each text are looked at.
    """

    def __init__(self, model=None, characters=CHARACTERS):
        self._characters = characters
        load = _fasttext if model and Path(model).suffix in (".bin", ".ftz") else _py3langid
        self.labels, self._classify = load(model)

    def identify(self, text):
        """(code, probability) of the likeliest language; ("und", 0.0) for a text without letters."""
        part = spread(text, self._characters)
        if not any(map(str.isalpha, part)):
            return "und", 0.0
        return self._classify(part)

    def check(self, code, where="language"):
        """InputError, with the nearest label, where `code` is none of the model's."""
        if code not in self.labels:
            near = difflib.get_close_matches(code, self.labels, 3, 0.5)
            hint = f"; did you mean {', '.join(near)}?" if near else "; e.g. " + ", ".join(sorted(self.labels)[:5])
            raise InputError(f"{where}: {code!r} is not among the identifier's {len(self.labels)} languages{hint}")


def spread(text, characters):
    """The text, or where it is longer than `characters` a third of that from its start, middle and end, in whole words."""
    if len(text) <= characters:
        return text
    third = characters // 3
    middle = (len(text) - third) // 2
    start, between, end = text[:third], text[middle : middle + third], text[-third:]
    return "\n".join((start.rpartition(" ")[0] or start, _inner(between), end.partition(" ")[2] or end))


def _inner(text):
    """`text` without the words that its ends may have cut."""
    return text.partition(" ")[2].rpartition(" ")[0] or text


def _py3langid(model):
    from py3langid.langid import MODEL_FILE
    from py3langid.langid import LanguageIdentifier as Identifier

    try:
        identifier = Identifier.from_model_file(Path(model).absolute() if model else MODEL_FILE, norm_probs=True)
    except Exception as problem:  # what lzma, zipfile and NumPy say of a damaged file has no class in common
        raise InputError(
            f"{model}: no model to identify languages with ({_one_line(problem)}); give one of py3langid, "
            "or a .bin or .ftz of fastText"
        ) from None
    return frozenset(identifier.labels), identifier.classify


def _fasttext(model):
    if not Path(model).is_file():
        raise InputError(f"{model}: no such file; no model is ever fetched")
    try:
        fasttext = importlib.import_module("fasttext")
    except ImportError:
        raise InputError(f"{model}: a model of fastText; pip install fasttext, or leave py3langid's own") from None
    try:
        predict = fasttext.load_model(str(model)).f.predict  # without the wrapper around it, which breaks with NumPy 2
        labels = {label.removeprefix(_PREFIX) for _, label in predict("a\n", -1, 0.0, "replace")}
    except (ValueError, RuntimeError, MemoryError) as problem:
        raise InputError(f"{model}: no model of fastText that knows languages ({_one_line(problem)})") from None

    def classify(text):
        found = predict(text.replace("\n", " ") + "\n", 1, 0.0, "replace")
        return next(((label.removeprefix(_PREFIX), min(1.0, p)) for p, label in found), ("und", 0.0))

    return frozenset(labels), classify


_PREFIX = "__label__"


def _one_line(problem):
    return str(problem).partition("\n")[0] or type(problem).__name__
