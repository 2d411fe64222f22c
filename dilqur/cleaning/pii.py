"""Personal data in a text: e-mail and IPv4 addresses, phone numbers, bank accounts, cards, and patterns of the recipe's.

Each kind is masked, counted, or costs the document its place. A mask keeps the shape of what it hides, because a model
learns to write what it reads: `<EMAIL>` would be a word of its language. Addresses become those set aside for examples
(RFC 2606, RFC 5737); in everything else digits become 0, letters and their marks X, so that +994 50 123-45-67 is
+000 00 000-00-00 and all the ways to write a number stay. What is masked is looked through again, and what a mask has left
(zeros, X and what stands between them) is not looked for: text that went through stays as it is.
"""

import collections
import functools
import ipaddress
import itertools
import re
import unicodedata

import phonenumbers
import regex

from dilqur.cleaning.recipe_patterns import compiled_pattern, timed_matches
from dilqur.common.errors import InputError

ACTIONS = ("mask", "drop", "count")

# The part before the @ is taken whole or not at all: one attempt a word, however long. \w is that of the package `regex`: in
# `re` it has no combining marks, without which few words of an Indic script are whole.
_EMAIL = regex.compile(r"(?<![\w.%+'-])[\w.%+'-]++(?=@([\w-]++(?:\.[\w-]++)++))")
_TOP_LEVEL = regex.compile(r"[^\W\d_]{2,24}(?!\w)")
_IPV4 = re.compile(r"(?<![\w.-])\d{1,3}(?:\.\d{1,3}){3}(?!\.?\w|-\w)")
_IBAN_BEGIN = re.compile(r"[A-Z](?<!\w.)[A-Z](?:0[2-9]|[1-8][0-9]|9[0-8])")
# At every place it can begin, whatever the one before covers: only the check digit says which it is. A card of the 2s is
# Mir's (2200 to 2205) or Mastercard's (2221 to 2720); the others are years.
_CARD = re.compile(
    r"(?<![\w.,+-])(?=("
    r"(?:[3-6]\d{3}|220[0-5]|222[1-9]|22[3-9]\d|2[3-6]\d\d|27[01]\d|2720)(?:[ -]?\d{4}){3}"
    r"|3[47]\d{2}[ -]?\d{6}[ -]?\d{5}"
    r")(?![.,]?\d|-\d))"
)
# Seven digits with what may stand between them: what lacks them has no card, address or phone number, and most texts do.
_NUMBER = re.compile(r"\d(?:[ ().‐‑–/-]{0,4}\d){6}")
# A run of such groups of digits. Which of them are a phone number, the library of phone numbers then says.
_PHONE_RUN = re.compile(r"[+(]{0,2}\d(?:[ ()./‐‑–-]{0,4}\d){6,}+")
_PHONE_GROUP = re.compile(r"[+(]*\d+")
_PHONE_GROUPS, _PHONE_DIGITS = 8, range(7, 18)  # 00 33 1 23 45 67 89 has seven; E.164 has 15 digits, and 00 before them

# Characters of an account number by country: SWIFT IBAN Registry (ISO 13616).
_IBAN_LENGTHS = {
    country: length
    for length, countries in {
        15: "NO", 16: "BE", 18: "DK FI FK FO GL NL SD", 19: "MK SI", 20: "AT BA EE KZ LT LU MN XK", 21: "CH HR LI LV",
        22: "BG BH CR DE GB GE IE ME RS VA", 23: "AE GI IL IQ OM SO TL", 24: "AD CZ ES MD PK RO SA SE SK TN VG",
        25: "LY PT ST", 26: "IS TR", 27: "BI DJ FR GR IT MC MR SM", 28: "AL AZ BY CY DO GT HN HU LB NI PL SV",
        29: "BR EG PS QA UA", 30: "JO KW MU YE", 31: "MT SC", 32: "LC", 33: "RU",
    }.items()
    for country in countries.split()
}  # fmt: skip


class PiiFilter:
    """Finds personal data and acts on it; raises InputError for settings that make no sense.

    actions: {kind: "mask", "drop" or "count"}; a kind is "email", "ipv4", "iban", "card", "phone" or the name of a
    pattern; what is not named is not looked for. patterns: {name: regular expression}, tried in their order, before the
    others. region: ISO 3166 code of the country whose phone numbers are known without their +, e.g. AZ.
    """

    def __init__(self, actions, patterns=None, region=None, where="pii"):
        patterns = patterns or {}
        known = [*patterns, *_FINDERS]
        for kind, action in actions.items():
            if kind not in known:
                raise InputError(
                    f"{where}: {kind!r} is no kind of personal data ({', '.join(known)}); give it a pattern"
                )
            if action not in ACTIONS:
                raise InputError(f"{where}.{kind}: {action!r} is no action; choose {', '.join(ACTIONS)}")
        for name in patterns:
            if name not in actions:
                raise InputError(f"{where}: nothing is said to be done with {name!r}; choose {', '.join(ACTIONS)}")
            if name in _FINDERS:
                raise InputError(f"{where}_patterns: {name!r} is one of ours; give the pattern another name")
        if "phone" in actions and region not in (None, *phonenumbers.SUPPORTED_REGIONS):
            raise InputError(f"{where}: {region!r} is no region; give an ISO 3166 code in capitals, e.g. AZ")
        self._finders = []
        for name, pattern in patterns.items():
            compiled = compiled_pattern(pattern, f"{where}_patterns.{name}")
            self._finders.append((name, _pattern_finder(compiled, f"{where}_patterns.{name}")))
        self._finders += [(kind, find) for kind, find in _FINDERS.items() if kind in actions]
        self._actions, self._region = dict(actions), region
        if "phone" in actions and region:
            _possible_phone(region)  # reads the region's rules now, not once in every worker

    def apply(self, text):
        """(text with masks, None or the reason to drop it such as "pii_fin", {kind: how many}). text: normalised.

        Of a kind that is counted all are, in the text as it is after the masks of the kinds before it.
        """
        counts, has_number, before = collections.Counter(), _NUMBER.search(text), None
        while text != before:  # a mask may have made room for a match that began in what it hides
            first, before = before is None, text
            for kind, find in self._finders:
                action = self._actions[kind]
                if (kind in _NUMBERS and not has_number) or (action == "count" and not first):
                    continue
                spans = find(text, self._region)
                if not spans:
                    continue
                counts[kind] += len(spans)
                if action == "drop":
                    return text, f"pii_{kind}", dict(counts)
                if action == "mask":
                    text = _masked(text, spans, _EXAMPLES.get(kind))
        return text, None, dict(counts)


# -- what is found: (start, end) of each, in order --------------------------------------------------------------------


def _emails(text, region):
    """The host ends with the last of its labels that may be a top-level domain: found here, as going back for it in the pattern
    takes the square of the host's length."""
    spans = []
    for match in _EMAIL.finditer(text) if "@" in text else ():
        if spans and match.start() < spans[-1][1]:
            continue
        end = match.end(1)
        for label in reversed(match[1].split(".")[1:]):
            begin = end - len(label)
            if found := _TOP_LEVEL.match(label):
                spans.append((match.start(), begin + found.end()))
                break
            end = begin - 1
    return [(begin, end) for begin, end in spans if text[begin:end] != _EXAMPLES["email"]]


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
    """ISO 13616: the first four characters moved to the end, letters read as 10 to 35, modulo 97 is 1. How many characters
    there are the country says, not the text: in capitals a currency or a bank may follow."""
    spans = []
    for begin in _IBAN_BEGIN.finditer(text):
        length = _IBAN_LENGTHS.get(begin[0][:2])
        match = length and _iban(length).match(text, begin.start())
        if not match or (spans and match.start() < spans[-1][1]):
            continue
        code = match[0].replace(" ", "")
        if int("".join(str(int(c, 36)) for c in code[4:] + code[:4])) % 97 == 1:
            spans.append(match.span())
    return spans


@functools.cache
def _iban(length):
    """The pattern of `length` characters in groups of four, spaces between the groups or not."""
    groups, rest = divmod(length - 4, 4)
    end = f"(?: ?[A-Z0-9]{{{rest}}})" if rest else ""
    return re.compile(rf"[A-Z0-9]{{4}}(?: ?[A-Z0-9]{{4}}){{{groups}}}{end}(?!\w)")


def _cards(text, region):
    """ISO/IEC 7812: every second digit from the right doubled, the sum of all digits is a multiple of ten (Luhn)."""
    spans = []
    for match in _CARD.finditer(text):
        if spans and match.start() < spans[-1][1]:
            continue
        digits = [int(c) for c in reversed(match[1]) if c.isdigit()]
        if (sum(digits[0::2]) + sum(sum(divmod(2 * digit, 10)) for digit in digits[1::2])) % 10 == 0:
            spans.append(match.span(1))
    return spans


def _phones(text, region):
    """Numbers that exist by the rules of their country, in a run of groups that may hold years and other numbers, too."""
    spans = []
    for run in _PHONE_RUN.finditer(text):
        groups = [match.span() for match in _PHONE_GROUP.finditer(text, *run.span())]
        digits = [phonenumbers.normalize_digits_only(text[start:end]) for start, end in groups]
        at = 0
        while at < len(groups):
            count = _phone_groups(text, groups, digits, at, region)
            if count:
                spans.append((groups[at][0], groups[at + count - 1][1]))
            at += count or 1
    return spans


def _phone_groups(text, groups, digits, at, region):
    """How many groups from that with number `at` on are a phone number; 0 if none are. The more the better: a number may
    be the beginning of a longer one."""
    start, international = groups[at][0], "+" in text[slice(*groups[at])]
    if not (international or region) or (at and not _may_part(text[groups[at - 1][1] : start + 1])):
        return 0
    whole = list(itertools.accumulate(digits[at : at + _PHONE_GROUPS]))
    for count in range(len(whole), 0, -1):
        if len(whole[count - 1]) not in _PHONE_DIGITS:
            continue
        stop, end = at + count, groups[at + count - 1][1]
        if stop < len(groups) and not _may_part(text[end : groups[stop][0] + 1]):
            continue
        alone = stop - len(groups) == at == 0
        if not (international or alone or _is_grouped(digits[at:stop], region)):
            continue
        if _is_phone(text, start, end, international, region):
            return count
    return 0


def _may_part(between):
    """Whether what stands between two groups of digits, the first character of the second one's included, may part two
    numbers: -, – and . do not, they hold a date, an article or a version together."""
    return any(c in " /()+" for c in between)


def _is_phone(text, start, end, international, region):
    """Whether text[start:end] is a number that exists. Without a + its groups have to be those of the country, too:
    01.02.2024 12 would do as digits."""
    leniency = phonenumbers.Leniency.VALID if international else phonenumbers.Leniency.STRICT_GROUPING
    offset = max(0, start - 1)  # the library looks at what stands around a number
    for found in phonenumbers.PhoneNumberMatcher(text[offset : end + 1], region, leniency):
        if offset + found.start <= start + 2 and offset + found.end >= end:  # 2: it may leave out a bracket
            return True
    return False


def _is_grouped(digits, region):
    """Whether groups of digits are a number of the region's, grouped as it is written there, groups together or not. What
    the library does, less other ways to write it, but a table of figures has it done for every figure."""
    if not _possible_phone(region).fullmatch("".join(digits)):
        return False
    try:
        number = phonenumbers.parse("".join(digits), region)
    except phonenumbers.NumberParseException:
        return False
    if not phonenumbers.is_valid_number(number):
        return False
    written = re.findall(r"\d+", phonenumbers.format_number(number, phonenumbers.PhoneNumberFormat.NATIONAL))
    ends, allowed = (set(itertools.accumulate(map(len, reversed(groups)))) for groups in (digits, written))
    significant = len(phonenumbers.national_significant_number(number))
    return {end for end in ends if end < significant} <= allowed


@functools.cache
def _possible_phone(region):
    """A pattern of the digits a number of that region's can have without a +: all that could be one and some more. Most
    runs of digits are none, and this says so a hundred times faster than the library."""
    code, rules_of = phonenumbers.country_code_for_region(region), phonenumbers.PhoneMetadata.metadata_for_region
    rules = [
        rules_of(neighbour) for neighbour in phonenumbers.COUNTRY_CODE_TO_REGION_CODE[code]
    ]  # +7, +1: many share it
    if any(rule.national_prefix_transform_rule for rule in rules):  # what is dialled is not what the number is
        return re.compile(r"\d+")
    numbers = "|".join(rule.general_desc.national_number_pattern for rule in rules)
    trunk = "|".join(rule.national_prefix_for_parsing for rule in rules if rule.national_prefix_for_parsing)
    return re.compile(rf"(?:(?:{rules_of(region).international_prefix})?{code})?(?:{trunk})?(?:{numbers})")


def _pattern_finder(pattern, where):
    def find(text, region):
        return [match.span() for match in timed_matches(pattern, text, where) if match[0] != _blank(match[0])]

    return find


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
    return "".join("0" if c.isdigit() else "X" if c.isalpha() or unicodedata.category(c)[0] == "M" else c for c in text)
