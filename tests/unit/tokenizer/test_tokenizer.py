"""Text ↔ ids: nothing is lost, nothing in a text becomes a control token, and a tokenizer is known by its hash."""

import gzip
import json
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dilqur.common.errors import InputError
from dilqur.common.paths import tokenizer_file, tokenizer_paths
from dilqur.tokenizer.llama3 import SPECIAL_TOKENS, encode_chat
from dilqur.tokenizer.text_tokenizer import TextTokenizer

LEARNED = 1024  # ids below are bytes and merges, the 256 from here on are control tokens
ANY_TEXT = st.text()  # every Unicode character but lone surrogates, which no UTF-8 file can hold
WITH_CONTROL_TOKENS = st.lists(ANY_TEXT | st.sampled_from(SPECIAL_TOKENS), max_size=8).map("".join)


@pytest.fixture(scope="module")
def tokenizer(made):
    return TextTokenizer(made / "tokenizer")


@settings(max_examples=300)
@given(text=ANY_TEXT)
def test_any_text_comes_back_as_it_was(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=300)
@given(text=WITH_CONTROL_TOKENS)
def test_a_control_token_that_a_text_spells_stays_text(tokenizer, text):
    ids = tokenizer.encode(text)
    assert max(ids, default=0) < LEARNED
    assert tokenizer.decode(ids) == text


@settings(max_examples=50)
@given(texts=st.lists(WITH_CONTROL_TOKENS, max_size=5))
def test_many_texts_at_once_give_the_same_ids_as_one_by_one(tokenizer, texts):
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


@settings(max_examples=50)
@given(content=WITH_CONTROL_TOKENS)
def test_only_the_template_makes_control_tokens_in_a_conversation(tokenizer, content):
    turns = [{"role": role, "content": content} for role in ("user", "assistant")]
    ids, mask = encode_chat(tokenizer, turns)
    # BOS, then header, header's end and <|eot_id|> for each of two turns
    assert sum(i >= LEARNED for i in ids) == 1 + 2 * 3
    assert tokenizer.decode([i for i, on in zip(ids, mask, strict=True) if on]) == content.strip() + "<|eot_id|>"


def test_the_control_tokens_follow_the_vocabulary_in_the_order_of_llama_3(tokenizer):
    assert (tokenizer.size, tokenizer.bos_id, tokenizer.eos_id) == (1280, 1024, 1025)
    assert [tokenizer.control_id(token) for token in SPECIAL_TOKENS] == list(range(1024, 1280))
    with pytest.raises(InputError, match=r"no control token <\|nothing\|>"):
        tokenizer.control_id("<|nothing|>")


# -- the hash that shards and models carry ----------------------------------------------------------------------------


def changed(made, folder, change):
    """A copy of the tokenizer with `change` made to its JSON, laid out otherwise."""
    spec = json.loads((made / "tokenizer" / "tokenizer.json").read_text())
    change(spec)
    (folder / "tokenizer.json").write_text(json.dumps(spec, indent=None))
    return TextTokenizer(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda spec: None,  # only the layout of the file
        lambda spec: spec.update(
            truncation={"max_length": 8, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
        ),
        lambda spec: spec.update(post_processor=None),
    ],
)
def test_what_does_not_change_the_ids_does_not_change_the_hash(made, tokenizer, tmp_path, change):
    other = changed(made, tmp_path, change)
    assert other.hash == tokenizer.hash
    assert other.encode("Sabahınız xeyir! " * 20) == tokenizer.encode("Sabahınız xeyir! " * 20)


@pytest.mark.parametrize(
    "change",
    [
        lambda spec: spec["model"]["merges"].reverse(),
        lambda spec: spec.update(normalizer={"type": "Lowercase"}),
        lambda spec: spec["added_tokens"][0].update(content="<s>"),
        lambda spec: spec["model"].update(ignore_merges=False),
    ],
)
def test_what_can_change_the_ids_changes_the_hash(made, tokenizer, tmp_path, change):
    assert changed(made, tmp_path, change).hash != tokenizer.hash


# -- where it lies ----------------------------------------------------------------------------------------------------


def test_a_folder_its_file_a_compressed_file_and_a_stage_with_a_model_are_the_same_tokenizer(made, tokenizer, tmp_path):
    file = made / "tokenizer" / "tokenizer.json"
    (tmp_path / "az.json.gz").write_bytes(gzip.compress(file.read_bytes()))
    shutil.copytree(made / "tokenizer", tmp_path / "cpt" / "model")
    for path in (file, tmp_path / "az.json.gz", tmp_path / "cpt", tmp_path / "cpt" / "model"):
        assert TextTokenizer(path).hash == tokenizer.hash


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "no tokenizer.json there"),
        ({"tokenizer.json": "{}"}, "not a tokenizer"),
        ({"tokenizer.json": "not JSON"}, "not a tokenizer"),
        ({"tokenizer.json": None, "tokenizer_config.json": "{"}, r"tokenizer_config\.json: damaged"),
    ],
)
def test_what_is_no_tokenizer_is_refused_with_the_file(made, tmp_path, files, words):
    for name, content in files.items():
        (tmp_path / name).write_text((made / "tokenizer" / name).read_text() if content is None else content)
    with pytest.raises(InputError, match=words) as refused:
        TextTokenizer(tokenizer_file(tmp_path))
    assert str(tmp_path) in str(refused.value)


def test_a_tokenizer_whose_control_tokens_a_user_could_write_is_refused(made, tmp_path):
    # a control token that is also an ordinary entry of the vocabulary, and so comes out of text
    def change(spec):
        token, number = next((t, i) for t, i in spec["model"]["vocab"].items() if i > 256 and t.isascii())
        spec["added_tokens"][0].update(content=token, id=number)

    with pytest.raises(InputError, match=r"becomes the control token \d+; a user could write it"):
        changed(made, tmp_path, change)


def test_a_folder_of_sizes_stands_for_its_tokenizers_in_their_order(made, tmp_path):
    for name in ("100k", "8k", "64k", ".32k.part"):
        shutil.copytree(made / "tokenizer", tmp_path / name)
    (tmp_path / "notes").mkdir()
    assert tokenizer_paths(tmp_path) == [str(tmp_path / name) for name in ("8k", "64k", "100k")]
    assert tokenizer_paths(tmp_path / "8k") == [str(tmp_path / "8k")]
    shutil.copy(made / "tokenizer" / "tokenizer.json", tmp_path)
    assert tokenizer_paths(tmp_path) == [str(tmp_path)], "a folder that is a tokenizer is one"
