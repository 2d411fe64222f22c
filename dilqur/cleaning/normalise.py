"""One way to write a text: Unicode NFC, visible characters only, one kind of line end and of space.

Two repairs are optional, since they are right in some languages only: `dotted_i` for the Latin alphabets of the Turkic
languages (i and ı are two letters; U+0307 on them is what a careless lower-casing of İ leaves), and `replace`, a table
of characters that stand where another one is meant (ǝ U+01DD or Cyrillic ә for ə).
"""

import re
import unicodedata

import regex

from dilqur.common.errors import InputError

# FF, VT, NEL and the information separators end a line or a page: removed, they would glue two words together.
_LINE_END = re.compile("\r\n|[\r\x0b\x0c\x1c-\x1e\x85\u2028]")

# C0 and C1 controls but tab and LF, zero-width and direction marks, BOM, soft hyphen, and what is not a character at all.
# ZWJ and ZWNJ stay: emoji, Persian and the Indic scripts are written with them.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufdd0-\ufdef\ufeff"
    "\ufff9-\ufffb\ufffe\uffff]"
)
_SPACES = re.compile(r"[^\S\n ][^\S\n]*| [^\S\n]+")  # any but a single plain space, which is already as it should be
_SPACE_AT_LINE_END = re.compile(" \n ?|\n ")
_EMPTY_LINES = re.compile(r"\n{3,}")
_WORD = regex.compile(r"[\p{L}\p{M}]+")

# No language writes more than a few combining marks on a letter. NFC sorts those of a run in time that grows with its square,
# so that a megabyte of them would take an hour; thirty are what Stream-Safe Text allows (UAX #15, section 13).
MOST_MARKS = 30
_MARKS = frozenset(filter(unicodedata.combining, map(chr, range(0x300, 0x1F000))))


def normalise(text, dotted_i=False, replace=None):
    """NFC, no control or zero-width characters, LF line ends, single spaces, at most one empty line in a row.

    dotted_i: i or ı with U+0307 becomes i, I with U+0307 becomes İ; the mark stays on every other letter.
    replace: {character: text}, as `checked_replacements` returns it. Where the two are letters of different scripts,
    only in words that have letters of the second one's, so that Cyrillic words keep their ә and bәli becomes bəli.
    Of over 30 combining marks in a row the first 30 are kept.
    The result is a fixed point: normalising it again changes nothing.
    """
    if not text.replace("\n", " ").isprintable():  # false for every control, format and space character but " "
        text = _LINE_END.sub("\n", text).replace("\u2029", "\n\n")
        text = _INVISIBLE.sub("", text)
        text = _SPACES.sub(" ", text)
    text = _composed(text)
    if dotted_i or replace:
        text = _repair(text, dotted_i, replace or {})
    if "  " in text:
        text = _SPACES.sub(" ", text)
    if " \n" in text or "\n " in text:
        text = _SPACE_AT_LINE_END.sub("\n", text)
    if "\n\n\n" in text:
        text = _EMPTY_LINES.sub("\n\n", text)
    return text.strip()


def checked_replacements(replace, where="replace"):
    """{character: text} in NFC, or InputError where `normalise` could not come to an end with it.

    where: the name of the setting, for the message.
    """
    table = {}
    for character, text in replace.items():
        key = unicodedata.normalize("NFC", str(character))
        if len(key) != 1 or key.isspace() or not isinstance(text, str):
            raise InputError(
                f"{where}: {character!r}: {text!r} should be one visible character and what to write for it"
            )
        if normalise(text) != text or unicodedata.combining(text[:1] or "a"):
            raise InputError(
                f"{where}: {character!r}: {text!r} has a space at an end, an invisible character, or is not NFC"
            )
        table[key] = text
    for key, text in table.items():
        if again := [other for other in table if other in text]:
            raise InputError(
                f"{where}: {key!r} becomes {text!r}, in which {again[0]!r} would be replaced again; use one step"
            )
    return table


def _repair(text, dotted_i, replace):
    """Apply both repairs until neither finds anything: a mark after a replaced letter may make a new one with it."""
    before = None
    while text != before:
        before = text
        if dotted_i and "\u0307" in text:
            text = re.sub("[iı]\u0307+", "i", text)
            text = re.sub("İ\u0307+", "İ", text)
        for character, meant in replace.items():
            if character in text:
                text = _replace(text, character, meant)
        if text is not before:
            text = _composed(text)
    return text


def _composed(text):
    """NFC, in time that grows with the length of the text."""
    text = _bounded(text)
    composed = unicodedata.normalize("NFC", text)
    return text if composed is text else _bounded(composed)  # some marks are two in NFC


def _bounded(text):
    """`text` with no run of over MOST_MARKS combining marks."""
    step = MOST_MARKS + 1  # a longer run has one of its marks in every such sample
    if _MARKS.isdisjoint(text[::step]):
        return text
    parts, done = [], 0
    for place in range(0, len(text), step):
        if place < done or text[place] not in _MARKS:
            continue
        begin, end = place, place + 1
        while begin > done and text[begin - 1] in _MARKS:
            begin -= 1
        while end < len(text) and text[end] in _MARKS:
            end += 1
        if end - begin > MOST_MARKS:
            parts.append(text[done : begin + MOST_MARKS])
            done = end
    return "".join([*parts, text[done:]])


def _replace(text, character, meant):
    ours, theirs = _script(character), _script(meant[:1])
    if not ours or not theirs or ours == theirs:
        return text.replace(character, meant)

    def word(match):
        letters = match[0]
        if character in letters and any(_script(letter) == theirs for letter in letters):
            return letters.replace(character, meant)
        return letters

    return _WORD.sub(word, text)


def _script(character):
    """The script's name as it begins the name of a letter (LATIN, CYRILLIC); None for what is no letter."""
    return unicodedata.name(character, "").partition(" ")[0] if character.isalpha() else None
