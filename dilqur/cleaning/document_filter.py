"""What happens to one document: repaired, then kept or dropped for a reason. The steps are always in this order, cheap ones first.

    blocked address or text as it was read → normalisation → boilerplate lines out → blocked text as it is now → length →
    characters and script → lines and repetition → language → benchmark quotations → personal data → blocked text with masks

Lengths and repetition have limits by default; every other step happens if its setting is given. Thresholds named after a paper
are that paper's (see dilqur/cleaning/text_quality.py).
"""

import functools
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from dilqur.cleaning.blocklist import Blocklist
from dilqur.cleaning.decontamination import NgramIndex
from dilqur.cleaning.language_id import LanguageIdentifier
from dilqur.cleaning.normalise import checked_replacements, normalise
from dilqur.cleaning.pii import PiiFilter
from dilqur.cleaning.text_quality import (
    BoilerplateLines,
    CharacterCounter,
    line_shares,
    repeated_line_share,
    repeated_ngram_share,
)  # fmt: skip
from dilqur.common.constants import Fraction, Positive
from dilqur.common.errors import InputError
from dilqur.common.paths import expand
from dilqur.pipeline.inputs import Documents, FilePath
from dilqur.pipeline.settings_parser import setting

EXCERPT = 200  # characters of a document that a report shows


@dataclass(kw_only=True)
class FilterSettings:
    dotted_i: bool = setting("i and ı with U+0307 become i, I with it becomes İ (az, tr)", default=False)
    replace: dict | None = setting("characters that stand for others, e.g. {ǝ: ə}", default=None)
    boilerplate_patterns: list[str] | None = setting(
        "regular expressions; lines they touch are taken out", default=None
    )
    boilerplate_files: list[Documents] | None = setting(
        ".txt files of lines to take out; files, folders or globs", default=None
    )
    min_chars: Positive = setting("shortest document kept", default=50)
    max_chars: Positive = setting(
        "longest document kept; twice as long it goes before its boilerplate lines", default=1_000_000
    )
    min_letter_share: Fraction = setting("least share of letters among visible characters", default=0.0)
    max_digit_share: Fraction = setting("most digits", default=1.0)
    max_symbol_share: Fraction = setting("most symbols (currency, arrows, emoji)", default=1.0)
    max_upper_case_share: Fraction = setting("most capitals among the letters", default=1.0)
    min_alphabetic_word_share: Fraction = setting("least words with a letter (Gopher: 0.8)", default=0.0)
    min_mean_word_length: Annotated[float, Field(ge=0)] = setting("Gopher: 3", default=0.0)
    max_mean_word_length: Annotated[float, Field(gt=0)] = setting("Gopher: 10", default=1000.0)
    script: str | None = setting("Unicode name of the script, e.g. Latin", default=None)
    min_script_share: Fraction = setting("least letters in it, where `script` is given", default=0.5)
    max_bullet_line_share: Fraction = setting("most lines that begin with a bullet (Gopher: 0.9)", default=1.0)
    max_ellipsis_line_share: Fraction = setting("most lines that end with … (Gopher: 0.3)", default=1.0)
    min_sentence_line_share: Fraction = setting("least lines that end a sentence (FineWeb: 0.12)", default=0.0)
    max_short_line_share: Fraction = setting("most lines of at most 30 characters (FineWeb: 0.67)", default=1.0)
    max_repeated_line_share: Fraction = setting("most of a text's characters in repeated lines", default=0.3)
    max_repeated_ngram_share: Fraction = setting(
        "most of a text's words in repeated 5-grams (laws repeat their phrases)", default=0.4
    )
    language: str | None = setting("language to keep, as the identifier names it (az); none: all", default=None)
    min_language_probability: Fraction = setting("how sure of it the identifier must be", default=0.0)
    language_model: FilePath | None = setting("py3langid or fastText model; none: py3langid's own", default=None)
    blocked_urls: list[FilePath] | None = setting("files of hosts and addresses to leave out", default=None)
    blocked_hashes: list[FilePath] | None = setting("files of SHA-256 of texts to leave out", default=None)
    benchmarks: list[Documents] | None = setting("files whose texts no document may quote", default=None)
    benchmark_words: Annotated[int, Field(ge=5)] = setting("words in a row that are a quotation", default=13)
    pii: dict[str, Literal["mask", "drop", "count"]] | None = setting(
        "personal data: {email: mask, phone: mask, card: drop, …}", default=None
    )
    pii_patterns: dict[str, str] | None = setting("further kinds of it: {name: regular expression}", default=None)
    pii_region: str | None = setting("country of phone numbers without a +, e.g. AZ", default=None)


class DocumentFilter:
    """The steps that `settings` (FilterSettings) ask for. Raises InputError for a setting that cannot be."""

    def __init__(self, settings):
        self.settings = s = settings
        if s.min_chars > s.max_chars:
            raise InputError(f"min_chars {s.min_chars} is more than max_chars {s.max_chars}: nothing could be kept")
        replace = checked_replacements(s.replace or {})
        self._normalise = functools.partial(normalise, dotted_i=s.dotted_i, replace=replace)
        self._boilerplate = None
        if s.boilerplate_patterns or s.boilerplate_files:
            files = expand(s.boilerplate_files or ())
            self._boilerplate = BoilerplateLines(s.boilerplate_patterns or (), files, normalizer=self._normalise)
        counted = (s.min_letter_share, 1 - s.max_digit_share, 1 - s.max_symbol_share, 1 - s.max_upper_case_share)
        words = (s.min_alphabetic_word_share, s.min_mean_word_length, s.max_mean_word_length < 1000, s.script)
        self._characters = CharacterCounter(s.script) if any((*counted, *words)) else None
        shapes = (1 - s.max_bullet_line_share, 1 - s.max_ellipsis_line_share, s.min_sentence_line_share)
        self._lines = any((*shapes, 1 - s.max_short_line_share))
        self._identifier = None
        if s.language_model and not s.language:
            raise InputError("language_model: for which language? Give language, too")
        if s.language:
            self._identifier = LanguageIdentifier(s.language_model)
            self._identifier.check(s.language)
        self._blocklist = Blocklist(s.blocked_urls or (), s.blocked_hashes or ())
        self._benchmarks = None
        if s.benchmarks:
            self._benchmarks = NgramIndex.from_files(expand(s.benchmarks), s.benchmark_words, self._normalise)
        self.benchmark_items_too_short = self._benchmarks.too_short if self._benchmarks else 0
        self._pii = PiiFilter(s.pii, s.pii_patterns, s.pii_region) if s.pii else None
        if s.pii_patterns and not s.pii:
            raise InputError(
                "pii_patterns: nothing is said to be done with them; give pii: {name: mask, drop or count}"
            )
        hidden = {kind: "mask" for kind, action in (s.pii or {}).items() if action != "count"}
        patterns = {name: pattern for name, pattern in (s.pii_patterns or {}).items() if name in hidden}
        self._pii_of_excerpts = PiiFilter(hidden, patterns, s.pii_region) if hidden else None

    def prepare(self):
        """Build the tables that the steps keep: what is forked from this process has them then. No step may leave out the
        next one here, as a threshold could."""
        probe = "ə 1. " * 20
        repeated_ngram_share(probe)
        line_shares(probe)
        if self._identifier:
            self._identifier.identify(probe)
        if self._benchmarks:
            self._benchmarks.match(probe)
        for pii in filter(None, (self._pii, self._pii_of_excerpts)):
            pii.apply(probe)

    def apply(self, raw, url=None):
        """(text, reason or None, {what was done to it: how often}). reason None: keep `text`."""
        s, done = self.settings, {}
        if reason := self._blocklist.reason(url, raw, raw):
            return raw, reason, done
        text = self._normalise(raw)
        if (
            len(text) > 2 * s.max_chars
        ):  # more than half of it would have to be boilerplate, and patterns would look for long
            return text, "too_long", done
        if self._boilerplate:
            text, lines = self._boilerplate.apply(text)
            if lines:
                done["boilerplate_lines"] = lines
        if reason := self._blocklist.reason(None, text, text):
            return text, reason, done
        if len(text) < s.min_chars:
            return text, "too_short", done
        if len(text) > s.max_chars:
            return text, "too_long", done
        if reason := self._characters and self._wrong_characters(self._characters(text)):
            return text, reason, done
        if reason := self._lines and self._wrong_lines(line_shares(text)):
            return text, reason, done
        if repeated_line_share(text) > s.max_repeated_line_share:
            return text, "repeated_lines", done
        if repeated_ngram_share(text) > s.max_repeated_ngram_share:
            return text, "repeated_ngrams", done
        if self._identifier:
            code, probability = self._identifier.identify(text)
            if code != s.language or probability < s.min_language_probability:
                return text, "other_language", done
        if self._benchmarks and self._benchmarks.match(text):
            return text, "benchmark", done
        if self._pii:
            text, reason, found = self._pii.apply(text)
            done.update({f"pii_{kind}": count for kind, count in found.items()})
            if reason:
                return text, reason, done
            if reason := self._blocklist.reason(None, text, text):  # as it would stand in train/
                return text, reason, done
        return text, None, done

    def excerpt(self, text, reason):
        """The beginning of a document that was dropped for `reason`, as others may see it: nothing of what was to be kept
        from them, and the kinds of personal data that are masked or dropped masked, though the document never got so far."""
        if reason.startswith(("pii_", "blocked_")):
            return ""
        if self._pii_of_excerpts:
            text, _, _ = self._pii_of_excerpts.apply(text[: 10 * EXCERPT])  # whole data, also where the excerpt ends
        return text[:EXCERPT]

    def _wrong_characters(self, shares):
        s = self.settings
        wrong = {
            "few_letters": shares.letters < s.min_letter_share,
            "many_digits": shares.digits > s.max_digit_share,
            "many_symbols": shares.symbols > s.max_symbol_share,
            "upper_case": shares.upper_case > s.max_upper_case_share,
            "few_alphabetic_words": shares.alphabetic_words < s.min_alphabetic_word_share,
            "word_length": not s.min_mean_word_length <= shares.mean_word_length <= s.max_mean_word_length,
            "other_script": s.script is not None and shares.script < s.min_script_share,
        }
        return next((reason for reason, holds in wrong.items() if holds), None)

    def _wrong_lines(self, shares):
        s = self.settings
        wrong = {
            "bullet_lines": shares.bullets > s.max_bullet_line_share,
            "ellipsis_lines": shares.ellipses > s.max_ellipsis_line_share,
            "few_sentences": shares.sentences < s.min_sentence_line_share,
            "short_lines": shares.short > s.max_short_line_share,
        }
        return next((reason for reason, holds in wrong.items() if holds), None)
