"""Exact and near duplicates: copies are found, what is only alike is left alone, and the memory is what was promised."""

import difflib
import gzip
import itertools
import json
import random
import re
import tracemalloc

import numpy as np
import pytest
import xxhash
from conftest import CORPUS, SHARED

from dilqur.cleaning import near_duplicates
from dilqur.cleaning.near_duplicates import PERMUTATIONS, SIGNATURE, THRESHOLD, cluster, rows_and_bands, signatures
from dilqur.common.errors import InputError
from dilqur.common.paths import expand
from dilqur.data.documents import fold, is_validation, read

REAL = SHARED / "data" / "az"
real_text = pytest.mark.skipif(not REAL.exists(), reason="the real text of shared/data/az is not here")


@pytest.fixture(scope="module")
def texts():
    return [document.text for document in read(expand([str(CORPUS / "az")]))]


@pytest.fixture(scope="module")
def law():
    """Real documents of 40 words or more; most are articles of law, many of them alike."""
    found = []
    for name in ("law_eqanun", "docs_react", "docs_dotnet", "wiki_qa_text"):
        with gzip.open(REAL / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
            found += [json.loads(line)["text"] for line in file]
    return [text for text in found if len(text.split()) >= 40]


@pytest.fixture
def find(tmp_path):
    """texts, or signatures, → (exact_first, cluster_first) as lists, by way of `pieces` files."""

    def run(items, pieces=1, **settings):
        signed = items if isinstance(items, np.ndarray) else signatures(items)
        files = []
        for i, part in enumerate(np.array_split(signed, pieces)):
            files.append(tmp_path / f"{i}.npy")
            np.save(files[-1], part)
        return tuple(a.tolist() for a in cluster(files, tmp_path / "work", **settings))

    return run


def damaged(text, share, rng, words):
    """A copy in which `share` of the words (at least one) and every digit are others."""
    parts = re.split(r"(\s+)", text)
    places = range(0, len(parts), 2)
    for place in rng.sample(places, max(1, round(len(places) * share))):
        parts[place] = rng.choice(words)
    return re.sub(r"\d", lambda _: rng.choice("0123456789"), "".join(parts))


def estimate(a, b):
    """Jaccard index of two texts by their signatures."""
    a, b = signatures([a, b])["minhash"]
    return (a == b).mean()


# -- signatures -------------------------------------------------------------------------------------------------------


def test_the_exact_hash_is_xxh3_of_the_text(texts):
    stored = signatures(texts[:20])["exact"]
    assert [(int(a) << 64) + int(b) for a, b in stored] == [xxhash.xxh3_128_intdigest(t.encode()) for t in texts[:20]]


def test_letters_decide_what_is_held_out_as_in_documents(texts):
    every_character = "".join(map(chr, (c for c in range(0x110000) if not 0xD800 <= c < 0xE000)))
    strange = [every_character, "", "...", "İSTİQLAL ıI", "a_b\x1cc\u2028d", "straße ﬁ Σς", "𝒳٣²Ⅷ"]
    samples = texts + strange
    for text, letters in zip(samples, signatures(samples)["letters"].tolist(), strict=True):
        fraction = letters / 2**64
        assert is_validation(text, fraction * (1 + 1e-12)) and not is_validation(text, fraction * (1 - 1e-12))
        assert letters == xxhash.xxh3_64_intdigest(fold(re.sub(r"[\W_]+", "", text)).encode(), seed=1)


def test_a_signature_does_not_depend_on_what_is_signed_beside_it(texts, monkeypatch):
    samples = [*texts, "", "bir", "bir iki", "!", "x" * 300_000]
    together = signatures(samples)
    assert together.tobytes() == b"".join(signatures([text]).tobytes() for text in samples)
    monkeypatch.setattr(near_duplicates, "_CHARS_AT_ONCE", 1 << 10)
    assert together.tobytes() == signatures(samples).tobytes()


def test_signatures_are_the_same_on_every_machine_and_version():
    # pinned: signatures on disk outlive the program that wrote them; a change here needs a new VERSION
    assert near_duplicates.VERSION == 2
    signed = signatures(["Bir ildə 12 ay, bir ayda 30 gün var.", "", "Salam", "एक साल में बारह महीने होते हैं।"])
    assert xxhash.xxh3_64_hexdigest(signed.tobytes()) == "b2ac8e8d055bb5a9"


def test_case_punctuation_spacing_and_digits_do_not_matter():
    text = "Maddə 12. Bakı şəhəri İstiqlaliyyət küçəsi, 48 nömrəli evin IŞIĞI yanır və sönür."
    other = "MADDƏ 97\nBAKI ŞƏHƏRİ istiqlaliyyət küçəsi: «10» nömrəli EVİN ışığı yanır — və sönür!"
    assert estimate(text, other) == 1


def test_a_lower_cased_capital_with_its_dot_is_the_same_letter():
    text = "İstanbul İzmir İçərişəhər İsmayıllı İmişli"
    assert "\u0307" in text.lower() and estimate(text, text.lower()) == 1


def test_vowel_signs_belong_to_their_words():
    text = "कमल का काम काला था, किताब की कीमत कम थी और दीपक को दूध पीना था"
    other = text.translate(dict(zip(map(ord, "ािीू"), "ेाुै", strict=True)))  # the same consonants, other words
    assert estimate(text, other) < 0.2
    assert estimate(text, text.replace(",", " ।")) == 1
    # the split does not know of marks, and stays as it was for documents that are held out already
    letters = signatures([text, other])["letters"]
    assert letters[0] == letters[1] and [is_validation(t, 0.5) for t in (text, other)] == [letters[0] < 2**63] * 2


def test_near_duplicates_can_be_left_out(texts, find):
    whole, exact_only = signatures(texts[:5]), signatures(texts[:5], near=False)
    assert not exact_only["minhash"].any()
    assert all(np.array_equal(whole[field], exact_only[field]) for field in ("exact", "letters"))
    items = [texts[0], texts[0] + "!", texts[1], texts[0]]
    assert find(items)[1] == [0, 0, 2, 0]
    assert find(signatures(items, near=False), threshold=None) == ([0, 1, 2, 0], [0, 1, 2, 0])


def test_scripts_without_spaces_have_shingles_too():
    text = "人人生而自由在尊严和权利上一律平等他们赋有理性和良心并应以兄弟关系的精神相对待"
    assert estimate(text, text.replace("兄弟", "姐妹")) > 0.7
    assert estimate(text, text[::-1]) < 0.1
    thai = "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิต่างมีเหตุผลและมโนธรรม"
    assert estimate(thai, thai.replace("อิสระ", "เสรี")) > 0.7, "a letter with its vowel sign and tone is a word"


def test_the_estimate_is_the_jaccard_index():
    """Error of the mean and spread over 300 pairs, against √(J (1 - J) / PERMUTATIONS), what independent ones would give."""
    rng, errors = random.Random(1), []
    for shared in (30, 90, 180, 270) * 75:  # of 300 words
        words = ["".join(rng.choices("abcdefgh", k=9)) for _ in range(600)]
        left, right = words[:300], words[:shared] + words[300 : 600 - shared]
        a, b = ({tuple(text[i : i + 3]) for i in range(298)} for text in (left, right))
        truth = len(a & b) / len(a | b)
        errors.append((estimate(" ".join(left), " ".join(right)) - truth) / (truth * (1 - truth) / PERMUTATIONS) ** 0.5)
    assert abs(np.mean(errors)) < 0.2  # 300 values of spread 1: three times 1 / √300
    assert np.std(errors) < 1.2


# -- clusters ---------------------------------------------------------------------------------------------------------


def test_exact_copies_point_at_the_first(find, texts):
    exact, near = find([texts[0], texts[1], texts[0], texts[2], texts[1], texts[0]])
    assert exact == near == [0, 1, 0, 3, 1, 0]


def test_near_copies_point_at_the_first_of_their_cluster(find, texts):
    rng, words = random.Random(2), " ".join(texts[5:]).split()
    copy = damaged(texts[1], 0.03, rng, words)
    exact, near = find([texts[0], copy, texts[2], texts[1], copy])
    assert exact == [0, 1, 2, 3, 1]
    assert near == [0, 1, 2, 1, 1]


def test_a_chain_of_copies_is_one_cluster(find, texts):
    """The last has little to do with the first, but each is a copy of the one before."""
    rng, words = random.Random(3), " ".join(texts[50:]).split()
    chain = [next(text for text in texts if len(text.split()) > 150)]
    for _ in range(7):
        chain.append(damaged(chain[-1], 0.04, rng, words))
    assert estimate(chain[0], chain[-1]) < THRESHOLD
    assert find(chain)[1] == [0] * 8


def by_hand(signed, threshold):
    """cluster_first by comparing every pair whose signatures agree in one band, one pair at a time."""
    rows, bands = rows_and_bands(threshold)
    parents = list(range(len(signed)))
    minhash = signed["minhash"]
    for i, j in itertools.combinations(range(len(signed)), 2):
        agree = minhash[i] == minhash[j]
        if agree[: rows * bands].reshape(bands, rows).all(1).any() and agree.mean() >= threshold:
            low, high = sorted((parents[i], parents[j]))
            parents = [low if p == high else p for p in parents]
    return parents


@pytest.mark.parametrize("threshold", [0.5, 0.65, 0.8])
def test_clusters_are_those_of_comparing_every_pair(find, texts, threshold):
    rng, words = random.Random(4), " ".join(texts).split()
    copies = [damaged(rng.choice(texts), rng.uniform(0, 0.2), rng, words) for _ in range(150)]
    items = texts + copies
    rng.shuffle(items)
    signed = signatures(items)
    expected = by_hand(signed, threshold)
    assert len(set(expected)) < len(items) - 20
    assert find(signed, threshold=threshold)[1] == expected


def test_files_pieces_and_memory_do_not_change_the_result(find, texts, monkeypatch):
    rng, words = random.Random(5), " ".join(texts).split()
    items = texts + [damaged(rng.choice(texts), 0.04, rng, words) for _ in range(100)] + rng.choices(texts, k=50)
    expected = find(items)
    assert find(items, pieces=7) == expected
    monkeypatch.setattr(near_duplicates, "_PAIRS_AT_ONCE", 3)
    monkeypatch.setattr(near_duplicates, "_DOCUMENTS_AT_ONCE", 5)
    monkeypatch.setattr(near_duplicates, "_OVERHEAD_GB", 0)
    assert find(items, pieces=3, memory_gb=50 * len(items) / 1e9) == expected  # five bands at a time


def test_empty_files_and_no_documents_are_fine(find):
    assert find(["bir", "bir"], pieces=5) == ([0, 0], [0, 0])
    assert find([], pieces=2) == ([], [])


def test_a_boilerplate_band_does_not_hide_a_copy(find):
    """Many documents agree in a band with the first of its run, and are no copies of it: the one before is compared too."""
    rng = np.random.default_rng(6)
    signed = np.zeros(30, SIGNATURE)
    signed["exact"] = rng.integers(0, 2**63, (30, 2))
    signed["minhash"] = rng.integers(0, 2**16, (30, PERMUTATIONS))
    signed["minhash"][:, :6] = 7  # every band has rows from 2 to 6: the first one is the same in all
    signed["minhash"][20, :100] = signed["minhash"][19, :100]
    assert find(signed)[1] == [*range(20), 19, *range(21, 30)]


@pytest.fixture(scope="module")
def pages():
    """Signatures of 800 pages of one template: 150 words of it in each, then 60 of the page's own, a copy here and there."""
    rng = random.Random(9)
    words = ["".join(rng.choices("abcdefgh", k=7)) for _ in range(50_000)]
    template = " ".join(words[:150])
    items = [f"{template} {' '.join(rng.choices(words, k=60))}" for _ in range(760)]
    items += [damaged(page, 0.08, rng, words) for page in rng.sample(items, 20)] + rng.choices(items, k=20)
    rng.shuffle(items)
    return signatures(items)


def pairs_that_agree(signed, threshold=THRESHOLD):
    """[(i, j)] of all that agree in a band and in `threshold` of the permutations, i < j."""
    (rows, bands), minhash, found = rows_and_bands(threshold), signed["minhash"], []
    for j in range(len(signed)):
        agree = minhash[:j] == minhash[j]
        in_band = agree[:, : rows * bands].reshape(j, bands, rows).all(2).any(1)
        found += [(int(i), j) for i in np.flatnonzero(in_band & (agree.mean(1) >= threshold))]
    return found


def test_alike_pages_of_one_template_are_found(find, pages):
    """They agree by the hundred in the bands that the template fills, and the alike among them are not neighbours there."""
    pairs = pairs_that_agree(pages)
    near = find(pages)[1]
    recall = np.mean([near[i] == near[j] for i, j in pairs])
    assert len(pairs) > 100 and len({near[i] for i in range(len(pages))}) > 500
    assert recall >= 0.95, f"{recall:.3f} of {len(pairs)} pairs"


@pytest.mark.parametrize("neighbours", [1, 20])
def test_what_is_compared_is_what_is_said(find, pages, monkeypatch, neighbours):
    """In each band with the first that agrees and the last NEIGHBOURS before; however the work is cut into pieces."""
    rows, bands = rows_and_bands(THRESHOLD)
    exact, minhash = find(pages)[0], pages["minhash"]
    parents = list(exact)
    for band in range(bands):
        runs = {}
        for number in sorted(set(exact)):
            runs.setdefault(minhash[number, band * rows : (band + 1) * rows].tobytes(), []).append(number)
        for run in runs.values():
            for place, j in enumerate(run):
                for i in {run[0], *run[max(0, place - neighbours) : place]} - {j}:
                    if parents[i] != parents[j] and (minhash[i] == minhash[j]).mean() >= THRESHOLD:
                        low, high = sorted((parents[i], parents[j]))
                        parents = [low if p == high else p for p in parents]
    monkeypatch.setattr(near_duplicates, "NEIGHBOURS", neighbours)
    assert find(pages)[1] == parents
    monkeypatch.setattr(near_duplicates, "_PAIRS_AT_ONCE", 7)
    monkeypatch.setattr(near_duplicates, "_DOCUMENTS_AT_ONCE", 11)
    assert find(pages, pieces=3)[1] == parents


def test_copies_of_one_page_do_not_come_between_others(find, monkeypatch):
    monkeypatch.setattr(near_duplicates, "NEIGHBOURS", 2)
    rng = np.random.default_rng(10)
    signed = np.zeros(12, SIGNATURE)
    signed["exact"] = rng.integers(0, 2**63, (12, 2))
    signed["minhash"] = rng.integers(0, 2**16, (12, PERMUTATIONS))
    signed["minhash"][:, :5] = 7
    signed["minhash"][11, :100] = signed["minhash"][1, :100]
    signed[3:11] = signed[2]
    assert find(signed)[1] == [0, 1, *[2] * 9, 1]


@real_text
def test_planted_copies_of_real_text_are_found_and_what_is_only_alike_is_left(law, find):
    """Recall: copies with 2 to 5 % of the words and all digits changed. Precision: of all that was merged, planted or not, the
    share that is a copy: planted from the same text, or 80 % of the words the same in the same order."""
    rng = random.Random(7)
    words = " ".join(rng.sample(law, 500)).split()
    origins = rng.sample(range(len(law)), 1500)
    copies = [damaged(law[i], rng.uniform(0.02, 0.05), rng, words) for i in origins]
    _, near = find(law + copies)
    known = [*range(len(law)), *origins]
    recall = np.mean([near[len(law) + k] == near[origin] for k, origin in enumerate(origins)])

    def words_of(i):
        return re.sub(r"\d", "0", (law + copies)[i].casefold()).split()

    merged = [(i, first) for i, first in enumerate(near) if first != i]
    wrong = [
        (i, first)
        for i, first in merged
        if known[i] != known[first]
        and difflib.SequenceMatcher(None, words_of(i), words_of(first), autojunk=False).ratio() < 0.8
    ]
    precision = 1 - len(wrong) / len(merged)
    merged_originals = sum(i < len(law) for i, _ in merged)
    print(f"recall {recall:.4f}, precision {precision:.4f}, {merged_originals} of {len(law)} real documents merged")
    assert recall >= 0.95 and precision >= 0.95
    assert merged_originals / len(law) < 0.01


def test_memory_is_48_bytes_a_document_whatever_the_signatures_take(tmp_path, monkeypatch):
    documents = 300_000  # 84 MB of signatures
    rng = np.random.default_rng(8)
    signed = np.zeros(documents, SIGNATURE)
    signed["exact"] = rng.integers(0, 2**63, (documents, 2))
    signed["minhash"] = rng.integers(0, 2**16, (documents, PERMUTATIONS))
    signed[documents // 2 :] = signed[: documents - documents // 2]
    np.save(tmp_path / "a.npy", signed)
    del signed
    monkeypatch.setattr(near_duplicates, "_PAIRS_AT_ONCE", 1 << 10)
    monkeypatch.setattr(near_duplicates, "_DOCUMENTS_AT_ONCE", 1 << 10)
    monkeypatch.setattr(near_duplicates, "_OVERHEAD_GB", 0.003)
    tracemalloc.start()
    try:
        exact, near = cluster([tmp_path / "a.npy"], tmp_path / "work", memory_gb=0.003 + 49e-9 * documents)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert np.array_equal(exact, np.arange(documents) % (documents // 2)) and np.array_equal(near, exact)
    assert peak < 49 * documents + 3e6  # the pieces of a thousand documents


def test_too_little_memory_is_refused_with_what_is_needed(find, monkeypatch):
    monkeypatch.setattr(near_duplicates, "_OVERHEAD_GB", 0.4)
    with pytest.raises(InputError, match=r"2 documents need 0.4 GB to be compared, not 0.1"):
        find(["a", "b"], memory_gb=0.1)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"no numpy file", "no signatures can be read from it"),
        (None, "no signatures can be read from it"),
        (np.zeros(3), "holds float64, not signatures of version 2"),
    ],
)
def test_files_that_hold_no_signatures_are_refused(tmp_path, content, words):
    file = tmp_path / "a.npy"
    if isinstance(content, np.ndarray):
        np.save(file, content)
    elif content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError, match=words):
        cluster([file], tmp_path)


def test_rows_and_bands_find_95_percent_at_the_threshold():
    for threshold in (0.3, 0.5, 0.65, 0.8, 0.95, 1):
        rows, bands = rows_and_bands(threshold)
        assert rows * bands <= PERMUTATIONS and 1 - (1 - threshold**rows) ** bands >= 0.95
    with pytest.raises(InputError, match=r"threshold 0.1: from 0.3"):
        rows_and_bands(0.1)
