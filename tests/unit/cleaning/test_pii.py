"""pii: personal data is found in the spellings people use, and numbers that are none stay."""

import multiprocessing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dilqur.cleaning.pii import PiiFilter
from dilqur.common.errors import InputError

FIN = r"\b(?=[A-Z]*\d)(?=\d*[A-Z])[0-9A-HJ-NP-Z]{7}\b"  # seven digits and capitals, of each at least one, no I and no O
EVERYTHING = dict.fromkeys(("email", "ipv4", "iban", "card", "phone"), "mask")


@pytest.fixture(scope="module")
def az():
    return PiiFilter({**EVERYTHING, "fin": "mask"}, {"fin": FIN}, region="AZ")


@pytest.mark.parametrize(
    ("text", "masked", "kind"),
    [
        ("Yazın: ali.veliyev+is@mail-1.com.az.", "Yazın: email@example.com.", "email"),
        ("<leyla_92@yandex.ru>", "<email@example.com>", "email"),
        ("şəbnəm@şəki.az", "email@example.com", "email"),
        ("server 185.32.44.101:8080, http://91.135.240.7/24", "server 192.0.2.1:8080, http://192.0.2.1/24", "ipv4"),
        ("IBAN AZ21 NABZ 0000 0000 1370 1000 1944", "IBAN XX00 XXXX 0000 0000 0000 0000 0000", "iban"),
        ("AZ21NABZ00000000137010001944;", "XX00XXXX00000000000000000000;", "iban"),
        ("kart 4169 7388 1234 5670", "kart 0000 0000 0000 0000", "card"),
        ("5234-5678-9012-3450", "5234-5678-9012-3450", None),  # Luhn says no
        ("4169738812345670", "0000000000000000", "card"),
        ("FİN kod: 5XK7B2A.", "FİN kod: 0XX0X0X.", "fin"),
        ("WINDOWS 1234567", "WINDOWS 1234567", None),  # no digit, no letter
    ],
)
def test_what_is_found_is_masked_in_its_own_shape(az, text, masked, kind):
    result, reason, counts = az.apply(text)
    assert (result, reason, list(counts)) == (masked, None, [kind] if kind else [])


def test_a_host_is_as_long_as_its_last_top_level_domain_however_long_it_is(az):
    assert (
        az.apply("a@b.com.12x, a@b.az-2, a@b.az.")[0]
        == "email@example.com.12x, email@example.com-2, email@example.com."
    )
    endless = "a@" + "a." * 500_000  # a pattern that goes back label by label takes the square of that, minutes
    assert az.apply(endless) == (endless, None, {})


@pytest.mark.parametrize(
    ("text", "masked", "kind"),
    [
        ("राम.कुमार@उदाहरण.भारत को लिखिए।", "email@example.com को लिखिए।", "email"),
        ("ਗੁਰਪ੍ਰੀਤ@ਮਿਸਾਲ.ਭਾਰਤ", "email@example.com", "email"),
        ("फ़ोन +९१ ९८७६५ ४३२१० पर", "फ़ोन +00 00000 00000 पर", "phone"),
        ("०९८७६५ ४३२१० या ०९८७६५४३२१०", "000000 00000 या 00000000000", "phone"),
        ("सन् १८५३ से १९४७, कुल १२,३४,५६७ लोग", "सन् १८५३ से १९४७, कुल १२,३४,५६७ लोग", None),
        ("नाम: कविता, उम्र ३०", "नाम: XXXXX, उम्र ३०", "name"),
    ],
)
def test_scripts_that_write_vowels_as_marks_and_have_their_own_digits_are_looked_through_too(text, masked, kind):
    pii = PiiFilter({**EVERYTHING, "name": "mask"}, {"name": r"(?<=नाम: )\w+"}, region="IN")
    result, reason, counts = pii.apply(text)
    assert (result, reason, list(counts)) == (masked, None, [kind] if kind else [])
    assert pii.apply(result) == (result, None, {})


@pytest.mark.parametrize(
    "number",
    [
        "050 123 45 67",
        "(050) 123-45-67",
        "050-123-45-67",
        "050.123.45.67",
        "0501234567",
        "050 1234567",
        "+994 50 123 45 67",
        "+994501234567",
        "+994 (50) 123-45-67",
        "+994-50-123-45-67",
        "(+994 50) 123 45 67",
        "00994501234567",
        "994501234567",
        "012 498-12-34",
        "(012) 498 12 34",
        "+90 532 123 45 67",
        "+7 (912) 345-67-89",
    ],
)
def test_phone_numbers_are_found_in_every_spelling(az, number):
    masked = "".join("0" if c.isdigit() else c for c in number)
    assert az.apply(f"Zəng edin: {number}, sonra gəlin.") == (f"Zəng edin: {masked}, sonra gəlin.", None, {"phone": 1})
    assert az.apply(f"{number}\n{number}")[2] == {"phone": 2}


@pytest.mark.parametrize(
    "text",
    [
        "150.1.1.2. Bu Məcəllənin 154.1.12.3-cü maddəsi",  # articles of a law
        "01.02.2024 12:30:45, 2024-01-02 12:30, 1918-1920",
        "500 000 000 manat, 1.250.000,50 AZN, 12 345 678 nəfər",
        "versiya 10.0.19041.1288, v1.2.3.4, 192.168.100.200 (lokal şəbəkə), 300.400.500.600",
        "VÖEN 1400057421, ISBN 978-9952-8-0123-4, şəhadətnamə № 1234567",
        "@babel/core, react@18.2.0, a@b, ali @ mail.ru",
        "40.7128° N, 49.8671° E",
        "2000 2001 2002 2003 2004, 10-20-30-40-50-60-70",
    ],
)
def test_numbers_that_are_no_personal_data_stay(text):
    assert PiiFilter(EVERYTHING, region="AZ").apply(text) == (text, None, {})


def test_what_is_to_be_dropped_says_why_and_what_is_counted_stays():
    text = "ali@mail.az, 050 123 45 67, 5XK7B2A"
    kinds = PiiFilter({"email": "count", "phone": "mask"}, region="AZ")
    assert kinds.apply(text) == ("ali@mail.az, 000 000 00 00, 5XK7B2A", None, {"email": 1, "phone": 1})
    assert PiiFilter({"fin": "drop"}, {"fin": FIN}).apply(text) == (text, "pii_fin", {"fin": 1})
    assert PiiFilter({}).apply(text) == (text, None, {})


def test_without_a_region_a_number_needs_its_plus():
    text = "050 123 45 67, +994 50 123 45 67"
    assert PiiFilter({"phone": "mask"}).apply(text)[0] == "050 123 45 67, +000 00 000 00 00"


IBAN = "AZ21 NABZ 0000 0000 1370 1000 1944"
IBAN_MASK = "XX00 XXXX 0000 0000 0000 0000 0000"


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        (f"{IBAN.replace(' ', '')} AZN", f"{IBAN_MASK.replace(' ', '')} AZN"),
        (f"{IBAN} USD", f"{IBAN_MASK} USD"),
        (f"{IBAN} SWIFT: AIIBAZ2X", f"{IBAN_MASK} SWIFT: AIIBAZ2X"),
        (f"{IBAN.replace(' ', '')} KOD 505004", f"{IBAN_MASK.replace(' ', '')} KOD 505004"),
        (f"{IBAN} 2024", f"{IBAN_MASK} 2024"),
        (f"{IBAN} {IBAN}", f"{IBAN_MASK} {IBAN_MASK}"),
        (f"AZ10 2024 {IBAN}", f"AZ10 2024 {IBAN_MASK}"),
        ("NO93 8601 1117 947 NOK", "XX00 0000 0000 000 NOK"),
        ("MT84 MALT 0110 0001 2345 MTLC AST0 01S EUR", "XX00 XXXX 0000 0000 0000 XXXX XXX0 00X EUR"),
        ("2024 4111 1111 1111 1111", "2024 0000 0000 0000 0000"),
        ("4111 1111 1111 1111 2024", "0000 0000 0000 0000 2024"),
        ("1234 4111 1111 1111 1111 5555 5555 5555 4444", "1234 0000 0000 0000 0000 0000 0000 0000 0000"),
        ("10:00-18:00 050 123 45 67", "10:00-18:00 000 000 00 00"),
        ("2024 050 123 45 67", "2024 000 000 00 00"),
        ("01.02.2024 050 123 45 67", "01.02.2024 000 000 00 00"),
        ("050 123 45 67 2024", "000 000 00 00 2024"),
        ("+994 50 123 45 67 2024", "+000 00 000 00 00 2024"),
        ("012 404 12 34 055 234 56 78", "000 000 00 00 000 000 00 00"),
        ("(012) 404-12-34/35, (012) 404 12 34 (055) 234 56 78", "(000) 000-00-00/35, (000) 000 00 00 (000) 000 00 00"),
        ("050 123 45 67/055 234 56 78", "000 000 00 00/000 000 00 00"),
        ("4111 1111 1111 1111 050 123 45 67", "0000 0000 0000 0000 000 000 00 00"),
    ],
)
def test_what_stands_beside_a_number_does_not_hide_it(az, text, masked):
    assert az.apply(text)[0] == masked
    assert az.apply(f"Ödəniş üçün ({text}), sonra zəng edin")[0] == f"Ödəniş üçün ({masked}), sonra zəng edin"


def test_years_articles_and_amounts_in_a_row_hold_no_number():
    text = (
        "2014 2015 2016 2017 2018 2019 2020 2021 2022 2023 2024 2025\n"
        "1 050 123 450 manat, 050-123-45-67-89, 01-02-2024 10-18 saat, 12 404 12 34 56, 2.050.123.45.67\n"
        "AZ21 NABZ 0000 0000 1370 1000 1945, AZ21 NABZ 0000 0000 1370 1000, ZZ21 NABZ 0000 0000 1370 1000 1944"
    )
    assert PiiFilter(EVERYTHING, region="AZ").apply(text) == (text, None, {})


def test_numbers_of_countries_that_share_a_code_or_dial_a_prefix_are_found():
    for region, number in [
        ("KZ", "8 (912) 345-67-89"),
        ("US", "(212) 555-0123"),
        ("IT", "06 6982 1234"),
        ("AR", "011 4321-1234"),
    ]:
        masked = "".join("0" if c.isdigit() else c for c in number)
        assert PiiFilter({"phone": "mask"}, region=region).apply(f"2024 {number} 2024")[0] == f"2024 {masked} 2024"


@pytest.mark.parametrize("action", ["mask", "drop", "count"])
def test_a_mask_of_a_pattern_of_ones_own_is_not_found_again(action):
    kinds = PiiFilter({"fin": action, "passport": "mask"}, {"fin": FIN, "passport": r"\b[A-Z]{2}\d{7}\b"})
    assert kinds.apply("FİN 0XX0X00, XX0000000") == ("FİN 0XX0X00, XX0000000", None, {})
    assert PiiFilter({"odd": "mask"}, {"odd": r"(?<=0)\d"}).apply("0123") == ("0000", None, {"odd": 3})


@given(st.lists(st.sampled_from(["5XK7B2A", "A", "1", " ", "0X", "12", "AZ", "-"])))
def test_a_text_masked_by_ones_own_patterns_has_nothing_to_mask(parts):
    kinds = PiiFilter({"fin": "mask", "odd": "mask"}, {"fin": FIN, "odd": r"(?<=0 ?)[A-Z1-9]{2}"})
    masked = kinds.apply("".join(parts))[0]
    assert kinds.apply(masked) == (masked, None, {})


@given(st.lists(st.sampled_from([*"0123456789 .-+()@ABZX\n", "050", "+994", "12.34.", "a@b.az ", "4169", "AZ21"])))
def test_a_masked_text_has_nothing_to_mask(az, parts):
    masked, _, _ = az.apply("".join(parts))
    assert az.apply(masked)[0] == masked


def test_a_text_made_to_be_slow_is_not():
    for text in ("a" * 200_000 + "@", "a.b@" * 50_000, "1 " * 100_000, "1.2" * 100_000, "AZ21" * 50_000, "1" * 200_000):
        assert PiiFilter(EVERYTHING, region="AZ").apply(text)  # in seconds; the limit is pytest's patience
    for text in (
        "12 " * 60_000,
        "4111 " * 40_000,
        "050 123 45 67 " * 5_000,
        "050 12 " * 5_000,
        "AZ21 NABZ 0000 " * 15_000,
    ):
        assert PiiFilter(EVERYTHING, region="AZ").apply(text)


def test_it_works_in_a_forked_process(az):
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(_apply, ()) == ("000 000 00 00", None, {"phone": 1})


def _apply():
    return PiiFilter({"phone": "mask"}, region="AZ").apply("050 123 45 67")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (({"fin": "mask"},), "pii: 'fin' is no kind of personal data (email, iban, card, ipv4, phone)"),
        (({"email": "hide"},), "pii.email: 'hide' is no action; choose mask, drop, count"),
        (({}, {"fin": FIN}), "pii: nothing is said to be done with 'fin'"),
        (({"fin": "mask"}, {"fin": "["}), "pii_patterns.fin: '[' is no regular expression"),
        (({"email": "mask"}, {"email": "@"}), "pii_patterns: 'email' is one of ours"),
        (({"phone": "mask"}, {}, "az"), "pii: 'az' is no region; give an ISO 3166 code in capitals, e.g. AZ"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, words):
    with pytest.raises(InputError) as problem:
        PiiFilter(*settings)
    assert words in str(problem.value)
