"""A corpus of real documents into which faults of known kinds are planted, each record labelled with its fault.

    python tests/support/plant.py FOLDER [SEED]     writes corpus.jsonl, benchmark.jsonl and boilerplate.txt

Real ones are the project's own and, where a checkout has them beside it, those of ../shared/data/az. `precision_and_recall`
says how well something finds what was planted; run as a program it prints that for the filters of dilqur by themselves.
"""

import gzip
import json
import random
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCES = [ROOT / "recipes" / "quickstart" / "corpus" / "az", ROOT.parent / "shared" / "data" / "az"]

# What a recipe for Azerbaijani would say: seven digits and capitals without I and O, at least one of each.
FIN_PATTERN = r"\b(?=[A-Z]*\d)(?=\d*[A-Z])[0-9A-HJ-NP-Z]{7}\b"
BOILERPLATE_PATTERNS = [r"(?i)\bkuki\w*.*(istifadə|qəbul)", r"^(Ana səhifə|Əsas) [|»]", "^© .*hüquqlar", "^Paylaş:"]
MOST_REPEATED = (
    0.5  # of the words in 5-grams that came before; articles of a law reach 0.4, and all above 0.2 is 6 % of them
)
REPLACEMENTS = {"ǝ": "ə", "Ǝ": "Ə"}

BOILERPLATE = [  # the first four as the patterns have them, the others to be given in a file
    "Bu sayt kukilərdən istifadə edir. Davam etməklə siz onları qəbul edirsiniz.",
    "Ana səhifə | Xəbərlər | Siyasət | İdman | Hava | Əlaqə",
    "© 2024 Bütün hüquqlar qorunur.",
    "Paylaş: Facebook Twitter WhatsApp Telegram",
    "Daha ətraflı oxu",
    "Şərh yazmaq üçün hesabınıza daxil olun",
    "Xəbər bülletenimizə abunə olun",
    "Mobil versiyaya keç",
]

BENCHMARK = [
    "Bir qutuda on iki qırmızı, səkkiz mavi və beş yaşıl şar var; təsadüfən çıxarılan şarın mavi olma ehtimalı nə qədərdir?",
    "Aşağıdakı çaylardan hansı mənbəyini Böyük Qafqazın cənub yamacından götürür və suyunu birbaşa başqa bir çaya qovuşdurur?",
    "Bitkilər günəş işığının enerjisindən istifadə edərək karbon qazı və sudan üzvi maddə hazırlayır; bu proses necə adlanır?",
    "Əgər bir qatar saatda yetmiş iki kilometr sürətlə hərəkət edirsə, o, iyirmi saniyədə neçə metr yol qət edər?",
    "Mətnə əsasən müəllifin baş qəhrəmana münasibətini ən dəqiq ifadə edən fikir aşağıdakılardan hansında verilmişdir?",
    "Düzbucaqlı üçbucağın katetləri altı və səkkiz santimetrdirsə, onun xaricinə çəkilmiş çevrənin radiusu neçə santimetrdir?",
    "Cümlədə altından xətt çəkilmiş sözün sinonimi olmayan variantı seçin və seçiminizi bir cümlə ilə əsaslandırın, zəhmət olmasa.",
    "Suyun donma temperaturu ilə qaynama temperaturu arasındakı fərq Selsi şkalası üzrə normal təzyiqdə neçə dərəcədir, göstərin.",
    "Hansı planet Günəşə ən yaxındır?",
    "İnsan bədənində neçə sümük var?",
    "Kvadratın sahəsi tərəfindən necə asılıdır?",
    "Səsin havada yayılma sürəti təxminən nə qədərdir?",
]

TURKISH = [
    "Sabahları erken kalkmayı hiç sevmem ama yaz aylarında durum değişir. Güneş doğarken balkona çıkar, kahvemi içer ve "
    "sokağın yavaş yavaş uyanışını izlerim. Fırıncı dükkânını açar, çocuklar ekmek almaya koşar.",
    "Köyümüzde düğünler üç gün sürerdi. İlk gün kına yakılır, ikinci gün davul zurna eşliğinde halay çekilir, son gün ise "
    "gelin evinden uğurlanırdı. Şimdi herkes şehre göç ettiği için bu gelenek neredeyse unutuldu.",
    "Üniversitenin kütüphanesi sınav haftasında sabaha kadar açık kalıyor. Öğrenciler sandalye bulabilmek için erkenden "
    "sıraya giriyor, kimi zaman çantalarını bırakıp yemeğe gidiyorlar. Görevliler bu durumdan pek memnun değil.",
    "Bahçeye diktiğimiz domatesler bu yıl beklediğimizden çok ürün verdi. Komşulara dağıttık, salça yaptık, yine de "
    "bitiremedik. Annem kışın yemek için bir kısmını kurutmaya karar verdi.",
    "Geçen kış kar yüzünden yollar kapanınca köyde on gün mahsur kaldık. Elektrik sık sık kesiliyor, telefonlar "
    "çekmiyordu. Akşamları sobanın başında toplanıp eski hikâyeler dinlemekten başka yapacak bir şey yoktu.",
    "Takımımız bu sezon deplasmanda oynadığı maçların çoğunu kaybetti. Teknik direktör, genç oyunculara daha fazla şans "
    "vereceğini söyledi. Taraftarlar ise yönetimin istifa etmesi gerektiğini düşünüyor.",
    "Dedem gençliğinde balıkçıymış, sabaha karşı denize açılır, öğlene doğru dönermiş. Bize fırtınada kaybolan "
    "arkadaşlarını anlatırken gözleri dolardı. O günlerden kalan tek şey duvarda asılı duran eski bir ağdır.",
    "Yeni açılan müzede bölgede bulunan antik eserler sergileniyor. Ziyaretçiler özellikle cam eşyaların bulunduğu salona "
    "ilgi gösteriyor. Rehberler, kazıların önümüzdeki yıl da devam edeceğini belirtiyor.",
    "Bilgisayarımı güncelledikten sonra bazı programlar çalışmamaya başladı. Destek hattını aradım, beni yarım saat "
    "beklettiler ve sonunda yeniden yüklememi önerdiler. Bütün ayarlarım silindiği için baştan yapmak zorunda kaldım.",
    "Çocukların ekran karşısında geçirdiği süre her geçen yıl artıyor. Uzmanlar, ailelerin evde birlikte yapılacak "
    "etkinlikler düşünmesini öneriyor. Kitap okumak, yürüyüşe çıkmak veya birlikte yemek pişirmek bunlardan birkaçı.",
]

PII = ("email", "phone", "fin", "card", "iban", "ipv4")
LABELS = ("exact_duplicate", "near_duplicate", "digits_changed", "other_language", "boilerplate", "benchmark")
LABELS += ("repetition", *PII)

_SENTENCES = {  # that hold the datum as it stands in an advertisement, a form, a forum or a log; beside what may hide it
    "email": [
        "Suallarınızı {} ünvanına göndərə bilərsiniz.",
        "Yazın: {}.",
        "E-poçt:{}; telefonla qəbul yoxdur",
        "Aysel <{}> 2024-05-01 10:22 yazıb:",
        "Redaksiya ({}) məktubları geri qaytarmır.",
        "mailto:{}",
        "{}, {}",
    ],
    "phone": [
        "Əlaqə nömrəsi: {}, hər gün saat 9-dan 18-dək.",
        "Mağaza 10:00-18:00 {} hər gün açıqdır.",
        "Qəbul 2024 {}",
        "Elan verilib: 01.02.2024 {} Bakı",
        "{} 2024-cü ildən işləyir.",
        "Zəng edin {} 2024",
        "Nizami küçəsi 24 ({}).",
        "Tel.: {} / {}",
        "{} {} hər gün",
        "QİYMƏT 500 AZN {} WHATSAPP",
    ],
    "fin": [
        "Şəxsiyyət vəsiqəsinin FİN kodu {} olan vətəndaş müraciət edib.",
        "FİN: {}.",
        "Vəsiqə AZE 12345678 {} 2024",
        "Vətəndaş (FİN {}) ərizə verib.",
        "AA1234567/{}",
        "{} {}",
    ],
    "card": [
        "Ödənişi {} nömrəli karta köçürün.",
        "Kart: {}.",
        "Yardım 2024 {}",
        "10:00 {} 05/27 CVV 123",
        "{} 2027 KAPİTAL BANK",
        "Karta ({}) köçürün, 20 AZN.",
        "{} {}",
    ],
    "iban": [
        "Hesab nömrəsi: {}.",
        "{} AZN",
        "Hesab {} USD üçündür.",
        "IBAN {} SWIFT: AIIBAZ2X",
        "H/h {} KOD 505004 VÖEN 1400057421",
        "VÖEN 1400057421 {} 2024",
        "Rekvizitlər ({}) dəyişib.",
        "{} {}",
    ],
    "ipv4": [
        "Müraciət {} ünvanından daxil olub.",
        "{} - - [01/May/2024:10:22:31] GET /index.html 200 5120",
        "2024-05-01 10:22:31 {} 443",
        "http://{}:8080/giris",
        "Server ({}) cavab vermir.",
        "IP {}.",
        "{} {}",
    ],
}


def planted_corpus(seed=0, each=40, real=2000):
    """(records, benchmark texts): the same for the same arguments and sources.

    A record is {"id", "text", "planted"}: `planted` is one of LABELS, or None for a real document left as it was. Copies
    have "of", the id of the record they were made from; personal data and boilerplate have "values", what was put in.
    each: how many of every label. real: how many real documents at most, those that faults are planted in included.
    """
    chance = random.Random(seed)
    texts = real_documents(chance, real)
    needed = each * (len(LABELS) - 1)
    if len(texts) < needed:
        raise ValueError(f"{len(texts)} real documents, but {needed} to plant in: ask for fewer")
    hosts = iter(sorted(range(len(texts)), key=lambda i: (not _DIGITS.search(texts[i]), chance.random())))
    records = [{"id": i, "text": text, "planted": None} for i, text in enumerate(texts)]

    def copy(label, change):
        for host in [next(hosts) for _ in range(each)]:
            record = {"id": len(records), "text": change(texts[host], chance), "planted": label, "of": host}
            records.append(record)

    def put_in(label, make):
        for host in [next(hosts) for _ in range(each)]:
            sentence, values = make(chance)
            text = _insert(texts[host], sentence, chance)
            records[host] = {"id": host, "text": text, "planted": label, "values": values}

    copy("digits_changed", _change_digits)  # first: the hosts begin with those that have digits
    copy("exact_duplicate", lambda text, chance: text)
    copy(
        "near_duplicate",
        lambda text, chance: near_copy(text, chance, [texts[i] for i in chance.sample(range(len(texts)), 5)]),
    )
    for kind in PII:
        put_in(kind, lambda chance, kind=kind: _sentence_with(kind, chance))
    put_in("boilerplate", lambda chance: _joined(chance.sample(BOILERPLATE, 2)))
    put_in("benchmark", lambda chance: _joined([chance.choice(BENCHMARK)]))
    for host in [next(hosts) for _ in range(each)]:
        records[host] = {"id": host, "text": _repetitive(texts[host], chance), "planted": "repetition"}
    for _ in range(each):
        text = "\n".join(chance.sample(TURKISH, 3))
        records.append({"id": len(records), "text": text, "planted": "other_language"})
    chance.shuffle(records)
    return records, BENCHMARK


def write(folder, seed=0, each=40, real=2000):
    """corpus.jsonl, benchmark.jsonl and boilerplate.txt (the lines no pattern has) in `folder`; returns the records."""
    records, benchmark = planted_corpus(seed, each, real)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("corpus", records), ("benchmark", [{"question": text} for text in benchmark])):
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    (folder / "boilerplate.txt").write_text("\n".join(BOILERPLATE[4:]), encoding="utf-8")
    return records


def precision_and_recall(records, found):
    """{label: (precision, recall)} of found = {label: ids of the records it was found in}, for the labels in `found`.

    Of a copy and its original either may be the one found. NaN is the precision of what was found nowhere.
    """
    result = {}
    for label, ids in found.items():
        planted = [{record["id"], record.get("of", record["id"])} for record in records if record["planted"] == label]
        right = set().union(*planted) & set(ids)
        recalled = sum(not pair.isdisjoint(ids) for pair in planted)
        result[label] = (len(right) / len(ids) if ids else float("nan"), recalled / max(1, len(planted)))
    return result


def found_by_filters(records, benchmark, boilerplate_file):
    """{label: ids} of what the filters of dilqur find, each by itself; duplicates are not for a filter to find.

    A datum or a line counts as found only where nothing of it is left in the text.
    """
    from dilqur.cleaning.decontamination import NgramIndex
    from dilqur.cleaning.language_id import LanguageIdentifier
    from dilqur.cleaning.normalise import checked_replacements, normalise
    from dilqur.cleaning.pii import PiiFilter
    from dilqur.cleaning.text_quality import BoilerplateLines, repeated_line_share, repeated_ngram_share

    table = checked_replacements(REPLACEMENTS)
    identifier, index = LanguageIdentifier(), NgramIndex(enumerate(benchmark))
    boilerplate = BoilerplateLines(BOILERPLATE_PATTERNS, [boilerplate_file])
    pii = PiiFilter(dict.fromkeys(PII, "mask"), {"fin": FIN_PATTERN}, region="AZ")
    found = {label: set() for label in ("other_language", "boilerplate", "benchmark", "repetition", *PII)}
    for record in records:
        text, planted = normalise(record["text"], dotted_i=True, replace=table), record["planted"]
        without_lines, lines = boilerplate.apply(text)
        masked, _, counts = pii.apply(text)
        checks = {
            "other_language": identifier.identify(text)[0] != "az",
            "benchmark": index.match(text) is not None,
            "repetition": repeated_line_share(text) > 0.3 or repeated_ngram_share(text) > MOST_REPEATED,
            "boilerplate": lines > 0,
            **{kind: kind in counts for kind in PII},
        }
        if planted in ("boilerplate", *PII):
            left = without_lines if planted == "boilerplate" else masked
            checks[planted] = checks[planted] and not any(value in left for value in record["values"])
        for label, is_found in checks.items():
            if is_found:
                found[label].add(record["id"])
    return found


# -- real documents ---------------------------------------------------------------------------------------------------

_DIGITS = re.compile(r"\d.*\d.*\d", re.DOTALL)


def real_documents(chance, count, min_words=40):
    """Up to `count` texts of at least `min_words` words in random order, none of which shares a fifth of its 4-word runs
    with those before it: copies that nature planted would be counted as mistakes."""
    texts = []
    for folder in SOURCES:
        for file in sorted(folder.glob("*.jsonl*")) if folder.is_dir() else ():
            with (gzip.open if file.suffix == ".gz" else open)(file, "rt", encoding="utf-8") as lines:
                texts += [record["text"] for record in map(json.loads, lines) if "text" in record]
    chance.shuffle(texts)
    chosen, seen = [], set()
    for text in texts:
        words = text.lower().split()
        runs = {tuple(words[i : i + 4]) for i in range(len(words) - 3)}
        if len(words) >= min_words and len(runs & seen) < 0.2 * len(runs):
            chosen.append(text)
            seen |= runs
        if len(chosen) == count:
            break
    return chosen


# -- faults -----------------------------------------------------------------------------------------------------------


def near_copy(text, chance, others):
    """`text` with 2 to 5 % of its words (one at least) dropped or put in from another text; the order stays."""
    pieces = re.split(r"(\s+)", text)  # words at the even places, what is between them at the odd ones
    words = [i for i in range(0, len(pieces), 2) if pieces[i]]
    foreign = [word for other in others for word in other.split()]
    for i in chance.sample(words, max(1, round(len(words) * chance.uniform(0.02, 0.05)))):
        pieces[i] = chance.choice(foreign) if chance.random() < 0.5 else ""
    return "".join(pieces)


def _change_digits(text, chance):
    return re.sub(r"\d", lambda match: str((int(match[0]) + chance.randint(1, 9)) % 10), text)


def _insert(text, sentence, chance):
    """`sentence`, as a line of its own, between two lines of the text, or at an end of it."""
    lines = text.split("\n")
    place = chance.randint(0, len(lines))
    return "\n".join([*lines[:place], sentence, *lines[place:]])


def _joined(lines):
    return "\n".join(lines), lines


def _sentence_with(kind, chance):
    sentence = chance.choice(_SENTENCES[kind])
    values = [_DATA[kind](chance) for _ in range(sentence.count("{}"))]
    return sentence.format(*values), values


def _repetitive(text, chance):
    """A sentence over and over: as lines, as one line, or in between the lines of the text."""
    sentence = " ".join(text.split()[: chance.randint(6, 15)])
    times = chance.randint(8, 30)
    style = chance.randrange(3)
    if style == 2:
        return "\n".join(line for part in text.split("\n")[:6] for line in (part[:80], sentence, sentence, sentence))
    return ("\n", " ")[style].join([sentence] * times)


def _email(chance):
    name = chance.choice(["ali", "leyla", "orxan", "nigar", "r.quliyev", "aysel_m", "info", "satis"])
    host = chance.choice(["mail.az", "gmail.com", "yandex.ru", "bk.ru", "sirket.com.az", "xeber-24.az"])
    return f"{name}{chance.choice(['', chance.randint(1, 99)])}@{host}"


def _phone(chance):
    mobile = chance.choice(["50", "51", "55", "70", "77", "99", "10", "60", "12"])
    a, b, c = chance.randint(200, 899), chance.randint(10, 99), chance.randint(10, 99)
    if mobile == "12":
        a = chance.randint(400, 499)
    return chance.choice(
        [
            f"+994 {mobile} {a} {b} {c}",
            f"+994{mobile}{a}{b}{c}",
            f"+994 ({mobile}) {a}-{b}-{c}",
            f"(+994 {mobile}) {a} {b} {c}",
            f"+994-{mobile}-{a}-{b}-{c}",
            f"00994{mobile}{a}{b}{c}",
            f"0{mobile} {a} {b} {c}",
            f"0{mobile} {a}-{b}-{c}",
            f"(0{mobile}) {a} {b} {c}",
            f"(0{mobile}) {a}-{b}-{c}",
            f"0{mobile}-{a}-{b}-{c}",
            f"0{mobile}.{a}.{b}.{c}",
            f"0{mobile}{a}{b}{c}",
            f"0{mobile} {a}{b}{c}",
        ]
    )


def _fin(chance):
    characters = [chance.choice("0123456789"), chance.choice("ABCDEFGHJKLMNPQRSTUVWXYZ")]
    characters += chance.choices("0123456789ABCDEFGHJKLMNPQRSTUVWXYZ", k=5)
    return "".join(chance.sample(characters, 7))


def _card(chance):
    digits = [chance.choice([4, 5])] + [chance.randint(0, 9) for _ in range(14)]
    doubled = sum(sum(divmod(2 * digit, 10)) for digit in digits[0::2]) + sum(digits[1::2])
    number = "".join(map(str, [*digits, -doubled % 10]))  # the last digit makes the sum a multiple of ten
    return chance.choice(["", " ", "-"]).join(number[i : i + 4] for i in range(0, 16, 4))


def _iban(chance):
    account = chance.choice(["NABZ", "IBAZ", "AIIB"]) + "".join(chance.choices("0123456789", k=20))
    check = 98 - int("".join(str(int(c, 36)) for c in f"{account}AZ00")) % 97
    code = f"AZ{check:02}{account}"
    return chance.choice([code, " ".join(code[i : i + 4] for i in range(0, len(code), 4))])


def _ipv4(chance):
    return ".".join(map(str, (chance.choice([5, 37, 62, 85, 91, 185, 213]), *chance.choices(range(256), k=3))))


_DATA = {"email": _email, "phone": _phone, "fin": _fin, "card": _card, "iban": _iban, "ipv4": _ipv4}


if __name__ == "__main__":
    folder, seed = Path(sys.argv[1]), int((sys.argv[2:] or [0])[0])
    records = write(folder, seed)
    print(f"{len(records)} records, {sum(record['planted'] is not None for record in records)} of them planted")
    for label, (precision, recall) in precision_and_recall(
        records, found_by_filters(records, BENCHMARK, folder / "boilerplate.txt")
    ).items():
        print(f"{label:16} precision {precision:.3f}  recall {recall:.3f}")
