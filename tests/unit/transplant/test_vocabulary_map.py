"""Two vocabularies side by side: what is shared is found by bytes and names, the rest in its pieces."""

import json

import pytest

from dilqur.common.errors import InputError
from dilqur.tokenizer.llama3 import BOS, EOT, SPECIAL_TOKENS
from dilqur.tokenizer.text_tokenizer import TextTokenizer
from dilqur.transplant.vocabulary_map import VocabularyMap


@pytest.fixture(scope="module")
def old(english):
    return TextTokenizer(english)


@pytest.fixture(scope="module")
def new(made):
    return TextTokenizer(made / "tokenizer")


@pytest.fixture(scope="module")
def vocabulary(old, new):
    return VocabularyMap(old, new)


def ordinary(tokenizer):
    return tokenizer.backend.get_vocab(with_added_tokens=False)


def changed(tokenizer, tmp_path, **added):
    """The tokenizer with one more added token: `<|az|>`, text or a control token."""
    spec = json.loads(tokenizer.content)
    like = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    spec["added_tokens"].append({"id": tokenizer.size, "content": "<|az|>", **like, **added})
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    return TextTokenizer(tmp_path)


def test_tokens_with_the_same_bytes_are_found_wherever_they_stand(vocabulary, old, new):
    before, after = ordinary(old), ordinary(new)
    shared = {after[token]: before[token] for token in before.keys() & after.keys()}
    assert vocabulary.anchors == shared and len(shared) > 300  # 256 bytes, and some more
    assert len(vocabulary.copied["byte"]) == 256
    assert vocabulary.copied["byte"] | vocabulary.copied["copied"] == shared


def test_control_tokens_are_found_by_name(vocabulary, old, new):
    assert old.control_id(BOS) != new.control_id(BOS)  # 700 and 1,024
    wanted = {new.control_id(token): old.control_id(token) for token in SPECIAL_TOKENS}
    assert vocabulary.copied["special copied"] == wanted and not vocabulary.special_made


def test_the_pieces_have_all_bytes_of_the_token_in_order_and_none_twice(vocabulary, old, new):
    before, after = ({i: token for token, i in ordinary(t).items()} for t in (old, new))
    assert set(vocabulary.pieces) == set(after) - set(vocabulary.anchors) and not vocabulary.no_pieces
    for new_id, pieces in vocabulary.pieces.items():
        assert len(pieces) > 1 and "".join(before[i] for i in pieces) == after[new_id]  # half letters too


def test_the_pieces_are_those_the_old_model_saw_for_that_word(vocabulary, old, new):
    words = {i: text for i in vocabulary.pieces if "�" not in (text := new.decode([i])) and len(text) > 3}
    assert len(words) > 200
    assert all(vocabulary.pieces[i] == old.encode(text) for i, text in words.items())


def test_an_added_token_that_is_text_is_a_token_like_others(old, tmp_path):
    more = changed(old, tmp_path, special=False)
    assert VocabularyMap(old, more).pieces == {old.size: old.encode("<|az|>")}
    assert VocabularyMap(more, more).anchors[old.size] == old.size
    back = VocabularyMap(more, old)
    assert back.anchors == {i: i for i in range(700)} and old.size in back.old_ordinary


def test_a_control_token_the_old_one_lacks_has_nothing_to_come_from(old, tmp_path):
    assert VocabularyMap(old, changed(old, tmp_path, special=True)).special_made == [old.size]


def test_a_control_token_that_is_text_on_the_other_side_is_refused(old, tmp_path):
    for name in ("text", "control"):
        (tmp_path / name).mkdir()
    text, control = (changed(old, tmp_path / n, special=n == "control") for n in ("text", "control"))
    for pair in ((text, control), (control, text)):
        with pytest.raises(
            InputError, match=r"^<\|az\|> is a control token in .*control.* and ordinary text in .*text"
        ):
            VocabularyMap(*pair)


def test_a_byte_the_old_vocabulary_lacks_leaves_a_token_without_pieces(old, new, tmp_path):
    spec = json.loads(old.content)
    del spec["model"]["vocab"]["É"]  # the byte 0xC9, the first one of ə
    spec["model"]["merges"] = [m for m in spec["model"]["merges"] if "É" not in "".join(m)]
    spec["model"]["vocab"] = {t: i for t, i in spec["model"]["vocab"].items() if "É" not in t}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    vocabulary = VocabularyMap(TextTokenizer(tmp_path), new)
    after = {i: token for token, i in ordinary(new).items()}
    assert vocabulary.no_pieces and all("É" in after[i] for i in vocabulary.no_pieces)
    assert not any("É" in after[i] for i in vocabulary.pieces)


def test_the_average_is_over_ordinary_tokens(vocabulary, old):
    assert vocabulary.old_ordinary == list(range(700))
    assert old.control_id(EOT) not in vocabulary.old_ordinary
