"""The likelihood of words by the words that share their stem."""

from dilqur.tokenizer.unseen_words import pseudo_counts, scores

STEMS = ["kitab", "qapı", "dağ", "yol", "bazar", "ocaq"]
ENDINGS = ["", "lar", "da", "dan", "lardan"]
OTHERS = ["evin", "göz", "söz", "dəniz", "külək"]


def paradigm(stems, endings):
    return {stem + ending for stem in stems for ending in endings}


def test_a_form_that_all_similar_stems_have_is_likely_and_others_are_not():
    words = paradigm(STEMS, ENDINGS) | {"taxta", "taxtalar", "taxtada"} | paradigm(OTHERS, ["", "lər", "də"])
    found = scores(words)
    assert found["taxtadan"] > 0.15 < found["taxtalardan"]
    assert "taxtalər" not in found
    assert "taxtadə" not in found
    assert "zzz" not in found


def test_a_word_that_was_seen_is_judged_without_itself():
    words = paradigm(STEMS, ENDINGS)
    assert scores(words)["kitablardan"] > 0.5
    # an ending that only this stem has with the others says nothing for it
    odd = words | {"kitabistan"} | {f"{stem}istan" for stem in ("xxa", "xxb", "xxc", "xxd")}
    assert scores(odd).get("kitabistan", 0) < 0.5


def test_pseudo_counts_are_for_words_with_a_space_before_them():
    words = {f" {word}" for word in paradigm(STEMS, ENDINGS)} | {" taxta", "taxtalar", "12", "\n", "a.b"}
    added = pseudo_counts(words, 3.0)
    assert all(word[0] == " " and word[1:].isalpha() for word in added)
    assert 0 < added[" taxtada"] <= 3.0
    assert added == pseudo_counts(sorted(words), 3.0)  # whatever the order


def test_too_little_to_learn_from_gives_nothing():
    assert scores(set()) == {}
    assert scores({"salam", "dünya"}) == {}
