"""Personal data in a text: e-mail and IPv4 addresses, phone numbers, bank accounts, cards, and patterns of the recipe's.

Each kind is masked, counted, or costs the document its place. A mask keeps the shape of what it hides, because a model
learns to write what it reads: `<EMAIL>` would be a word of its language. Addresses become those set aside for examples
(RFC 2606, RFC 5737); in everything else digits become 0 and letters X, so that +994 50 123-45-67 is +000 00 000-00-00
and all the ways to write a number stay. No mask is found again: text that went through stays as it is.
"""

import ipaddress
import re

import phonenumbers

from dilqur.cleaning.recipe_patterns import compiled_pattern, timed_matches
from dilqur.errors import InputError

ACTIONS = ("mask", "drop", "count")

# The part before the @ is taken whole or not at all: one attempt a word, however long.
_EMAIL = re.compile(r"(?<![\w.%+'-])[\w.%+'-]++@(?:[\w-]+\.)+[^\W\d_]{2,24}(?!\w)")
_IPV4 = re.compile(r"(?<![\w.-])\d{1,3}(?:\.\d{1,3}){3}(?!\.?\w|-\w)")
_IBAN = re.compile(r"[A-Z](?<!\w.)[A-Z](?:0[2-9]|[1-8][0-9]|9[0-8])(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?!\w)")
_CARD = re.compile(r"(?<![\w.,+-])(?:[2-6]\d{3}(?:[ -]?\d{4}){3}|3[47]\d{2}[ -]?\d{6}[ -]?\d{5})(?![.,]?\d|-\d)")
# Seven digits with what may stand between them: what lacks them has no card, address or phone number, and most texts do.
_NUMBER = re.compile(r"[0-9٠-٩۰-۹](?:[ ().‐‑–/-]{0,4}[0-9٠-٩۰-۹]){6}")
# What such a one is, the library of phone numbers then says.
_PHONE = re.compile(r"[+(]{0,2}\d(?:[ ()./‐‑–-]{0,4}\d){6,}+")


class PiiFilter:
    """Finds personal data and acts on it; raises InputError for settings that make no sense.

    actions: {kind: "mask", "drop" or "count"}; a kind is "email", "ipv4", "iban", "card", "phone" or the name of a
    pattern; what is not named is not looked for. patterns: {name: regular expression}, tried in their order, before the
    others. region: ISO 3166 code of the country whose phone numbers are known without their +, e.g. AZ.
    masks: {kind: text} where another mask is wanted.
    """

    def __init__(self, actions, patterns=None, region=None, masks=None, where="pii"):
        patterns, masks = patterns or {}, masks or {}
        known = [*patterns, *_FINDERS]
        for kind, action in actions.items():
            if kind not in known:
                raise InputError(
                    f"{where}: {kind!r} is no kind of personal data ({', '.join(known)}); give it a pattern"
                )
            if action not in ACTIONS:
                raise InputError(f"{where}.{kind}: {action!r} is no action; choose {', '.join(ACTIONS)}")
        for name in (*patterns, *masks):
            if name not in actions:
                raise InputError(f"{where}: nothing is said to be done with {name!r}; choose {', '.join(ACTIONS)}")
            if name in patterns and name in _FINDERS:
                raise InputError(f"{where}_patterns: {name!r} is one of ours; give the pattern another name")
        if "phone" in actions and region not in (None, *phonenumbers.SUPPORTED_REGIONS):
            raise InputError(f"{where}: {region!r} is no region; give an ISO 3166 code in capitals, e.g. AZ")
        self._finders = []
        for name, pattern in patterns.items():
            compiled = compiled_pattern(pattern, f"{where}_patterns.{name}")
            self._finders.append((name, _pattern_finder(compiled, f"{where}_patterns.{name}")))
        self._finders += [(kind, find) for kind, find in _FINDERS.items() if kind in actions]
        self._actions, self._masks, self._region = dict(actions), dict(masks), region
        if "phone" in actions and region:
            phonenumbers.example_number(region)  # reads the region's rules now, not once in every worker

    def apply(self, text):
        """(text with masks, None or the reason to drop it such as "pii_fin", {kind: how many}). text: normalised."""
        counts, has_number = {}, _NUMBER.search(text)
        for kind, find in self._finders:
            if kind in _NUMBERS and not has_number:
                continue
            spans = find(text, self._region)
            if not spans:
                continue
            counts[kind] = len(spans)
            if self._actions[kind] == "drop":
                return text, f"pii_{kind}", counts
            if self._actions[kind] == "mask":
                text = _masked(text, spans, self._masks.get(kind) or _EXAMPLES.get(kind))
        return text, None, counts


# -- what is found: (start, end) of each, in order --------------------------------------------------------------------


def _emails(text, region):
    return [match.span() for match in _EMAIL.finditer(text) if match[0] != _EXAMPLES["email"]] if "@" in text else []


def _ipv4_addresses(text, region):
    """Public addresses. Numbers of articles and versions (154.1.1.2) are written alike, hence at least six digits after
    the first dot: of random addresses that leaves out 1.9 %."""
    spans = []
    for match in _IPV4.finditer(text):
        digits = len(match[0].partition(".")[2]) - 2
        try:
            if digits >= 6 and ipaddress.IPv4Address(match[0]).is_global:
                spans.append(match.span())
        except ValueError:
            continue
    return spans


def _ibans(text, region):
    """ISO 13616: the first four characters moved to the end, letters read as 10 to 35, modulo 97 is 1."""
    spans = []
    for match in _IBAN.finditer(text):
        code = match[0].replace(" ", "")
        if 15 <= len(code) <= 34 and int("".join(str(int(c, 36)) for c in code[4:] + code[:4])) % 97 == 1:
            spans.append(match.span())
    return spans


def _cards(text, region):
    """ISO/IEC 7812: every second digit from the right doubled, the sum of all digits is a multiple of ten (Luhn)."""
    spans = []
    for match in _CARD.finditer(text):
        digits = [int(c) for c in reversed(match[0]) if c.isdigit()]
        if (sum(digits[0::2]) + sum(sum(divmod(2 * digit, 10)) for digit in digits[1::2])) % 10 == 0:
            spans.append(match.span())
    return spans


def _phones(text, region):
    """Numbers that exist by the rules of their country. Without a + their groups have to be those of the country, too:
    01.02.2024 12 would do as digits."""
    spans = []
    for candidate in _PHONE.finditer(text):
        offset = max(0, candidate.start() - 3)  # the library looks at what stands around a number
        window = text[offset : candidate.end() + 3]
        for found in phonenumbers.PhoneNumberMatcher(window, region, phonenumbers.Leniency.VALID):
            raw = found.raw_string
            if "+" in raw or any(phonenumbers.PhoneNumberMatcher(raw, region, phonenumbers.Leniency.STRICT_GROUPING)):
                spans.append((offset + found.start, offset + found.end))
    return spans


def _pattern_finder(pattern, where):
    return lambda text, region: [match.span() for match in timed_matches(pattern, text, where)]


_NUMBERS = ("card", "ipv4", "phone")
_FINDERS = {"email": _emails, "iban": _ibans, "card": _cards, "ipv4": _ipv4_addresses, "phone": _phones}

# -- what stands there instead ----------------------------------------------------------------------------------------

_EXAMPLES = {"email": "email@example.com", "ipv4": "192.0.2.1"}


def _masked(text, spans, mask):
    parts, done = [], 0
    for start, end in spans:
        parts += text[done:start], mask or _blank(text[start:end])
        done = end
    return "".join([*parts, text[done:]])


def _blank(text):
    return "".join("0" if c.isdigit() else "X" if c.isalpha() else c for c in text)
