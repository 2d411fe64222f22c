"""train_tokenizer: a byte-level BPE tokenizer with the Llama-3 configuration, of exactly the size asked for."""

import json

import pytest
from conftest import CORPUS

from dilqur.llama3 import PATTERN, SPECIAL_TOKENS, encode_chat
from dilqur.stage import read_manifest
from dilqur.tokenizer import TextTokenizer

PROGRAM = "data_tools/train_tokenizer.py"


@pytest.fixture(scope="module")
def tokenizer(made):
    return TextTokenizer(made / "tokenizer")


@pytest.fixture(scope="module")
def hugging_face(made):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(made / "tokenizer")


def test_it_has_the_vocabulary_asked_for_and_the_special_tokens_of_llama_3_after_it(made, tokenizer):
    vocabulary = tokenizer.backend.get_vocab(with_added_tokens=False)
    assert sorted(vocabulary.values()) == list(range(1024))
    assert tokenizer.size == 1024 + 256
    assert [tokenizer.backend.id_to_token(1024 + i) for i in range(256)] == SPECIAL_TOKENS
    result = read_manifest(made / "tokenizer")["result"]
    assert (result["vocab_size"], result["size"], result["tokenizer_sha256"]) == (1024, 1280, tokenizer.hash)


def test_its_configuration_is_llama_3s(made):
    spec = json.loads((made / "tokenizer" / "tokenizer.json").read_text())
    assert spec["pre_tokenizer"]["pretokenizers"][0]["pattern"] == {"Regex": PATTERN}
    assert (spec["model"]["type"], spec["model"]["ignore_merges"], spec["normalizer"]) == ("BPE", True, None)


def test_it_was_learned_from_the_language(tokenizer):
    # each is frequent in the corpus, and is bytes or pairs of bytes to a tokenizer that never saw the language
    for word in (" və", " bir", " üçün"):
        assert len(tokenizer.encode(word)) == 1


def test_the_same_text_gives_the_same_tokenizer(run, made, tokenizer, tmp_path):
    run(PROGRAM, "--input", made / "clean" / "train", "--vocab_size", 1024, "--output_dir", tmp_path)
    assert TextTokenizer(tmp_path).hash == tokenizer.hash
    assert (tmp_path / "tokenizer.json").read_bytes() == (made / "tokenizer" / "tokenizer.json").read_bytes()


def test_transformers_loads_it_and_gives_the_same_ids_after_its_bos(hugging_face, tokenizer):
    text = "Salam, dünya! 12345 don't\n\nYeni sətir."
    assert hugging_face(text)["input_ids"] == [tokenizer.bos_id, *tokenizer.encode(text)]
    assert hugging_face.decode(tokenizer.encode(text)) == text
    assert (hugging_face.bos_token, hugging_face.eos_token) == ("<|begin_of_text|>", "<|end_of_text|>")
    assert hugging_face.pad_token_id not in (None, hugging_face.eos_token_id)  # else a model never learns to stop


def test_its_chat_template_gives_the_ids_that_fine_tuning_uses(hugging_face, tokenizer):
    turns = [{"role": "user", "content": "Bakı haradadır? "}, {"role": "assistant", "content": "Xəzərin sahilində."}]
    for messages, generate in ((turns, False), (turns[:1], True)):
        rendered = hugging_face.apply_chat_template(messages, add_generation_prompt=generate, return_dict=False)
        assert rendered == encode_chat(tokenizer, messages, add_generation_prompt=generate)[0]


def test_a_vocabulary_the_text_cannot_fill_is_refused_with_the_number_it_can(run, tmp_path):
    (tmp_path / "a.txt").write_text("salam salam dünya dünya\n")
    done = run(PROGRAM, "--input", tmp_path / "a.txt", "--vocab_size", 500, "--output_dir", tmp_path / "out", code=2)
    # 256 bytes and the merges of two words
    assert "vocab_size 500 cannot be reached: this text gives 26" in done.stderr
    assert not (tmp_path / "out" / "tokenizer.json").exists()


def test_fewer_than_the_256_bytes_are_refused(run, tmp_path):
    done = run(PROGRAM, "--input", CORPUS / "az", "--vocab_size", 255, "--output_dir", tmp_path / "out", code=2)
    assert done.stderr == "error: --vocab_size should be greater than or equal to 256, not 255\n"
