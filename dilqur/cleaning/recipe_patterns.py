"""Regular expressions out of a recipe: one that is not one, or could go on for ever, ends in a line that names it.

They are those of the package `regex`, whose matching can be given a time limit. ^ and $ are the ends of a line.
"""

import regex

from dilqur.common.errors import InputError

SECONDS = 20  # for one pattern on one text; a sound pattern needs milliseconds on the longest


def compiled_pattern(pattern, where):
    """The compiled `pattern`; InputError for what is no pattern or matches everywhere. where: the setting it is in."""
    try:
        compiled = regex.compile(pattern, regex.MULTILINE)
    except (regex.error, TypeError) as problem:
        raise InputError(f"{where}: {pattern!r} is no regular expression: {problem}") from None
    if compiled.search("") or compiled.search("\n"):
        raise InputError(f"{where}: {pattern!r} matches the empty line, so it would match in every text")
    return compiled


def timed_matches(pattern, text, where):
    """The matches of a compiled `pattern` in `text`, a list; InputError where that takes over SECONDS.

    The text is not skipped: whether it is kept would then hang on the speed of the machine.
    """
    try:
        return list(pattern.finditer(text, timeout=SECONDS))
    except TimeoutError:
        raise InputError(
            f"{where}: {pattern.pattern!r} takes over {SECONDS} s on one text of {len(text):,} characters: it tries "
            "too many ways to match; make its repetitions possessive (++, *+) or bounded"
        ) from None
