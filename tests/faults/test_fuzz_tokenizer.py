"""Strings made to break a tokenizer: a new one, one with marks in its words, an extension of it.

The fuzzer by itself, for as long as you like: python tests/support/fuzz_tokenizer.py TOKENIZER_FOLDER 1000000
"""

import pytest
from conftest import CORPUS
from fuzz_tokenizer import fuzz

STRINGS = 3000


@pytest.fixture(scope="module")
def tokenizers(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    program = ("data_tools/train_tokenizer.py", "--input", CORPUS / "az")
    run(*program, "--vocab_size", 1024, "--output_dir", folder / "new")
    run(*program, "--vocab_size", 1024, "--pre_tokenizer", "llama3_marks", "--output_dir", folder / "marks")
    extend = ("--base_tokenizer", folder / "new", "--new_tokens", 500)
    run(*program, *extend, "--output_dir", folder / "extended")
    return folder


@pytest.mark.parametrize("name", ["new", "marks", "extended"])
def test_every_string_comes_back_and_none_becomes_a_control_token(tokenizers, name):
    assert fuzz(tokenizers / name, STRINGS, seed=1) == ([], [])
