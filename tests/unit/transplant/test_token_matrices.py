"""The matrices with a row for each token are found without loading a model, and files that do not fit config.json are refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from dilqur.common.errors import InputError
from dilqur.models.safetensors_io import stored_tensors
from dilqur.transplant.token_matrices import token_matrices

EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def folder(tmp_path):
    """An untied Llama whose inner size is its vocabulary's, so that shapes alone do not tell."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=40, intermediate_size=40, **shape)).save_pretrained(tmp_path)
    return tmp_path


def found(folder):
    return token_matrices(folder, stored_tensors(folder))[0]


def change(folder, tensors=(), **config):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    held = load_file(folder / "model.safetensors")
    save_file({**held, **dict(tensors)}, folder / "model.safetensors", {"format": "pt"})


def test_the_embeddings_and_the_head_are_found_and_nothing_else(folder):
    names = found(folder)
    assert (names.embeddings, names.head, names.bias, names.duplicate) == (EMBEDDINGS, HEAD, None, None)


def test_a_tied_head_has_no_name_but_where_the_files_hold_it_all_the_same(folder):
    rows = load_file(folder / "model.safetensors")[EMBEDDINGS]
    change(folder, {HEAD: rows.clone()}, tie_word_embeddings=True)
    names = found(folder)
    assert (names.embeddings, names.head, names.duplicate) == (EMBEDDINGS, None, HEAD)
    change(folder, {HEAD: rows + 1})
    with pytest.raises(InputError, match=f"ties the head to the embeddings, but {HEAD} differs from {EMBEDDINGS}"):
        found(folder)


@pytest.mark.parametrize(
    "tensors, config, says",
    [
        ({}, {"vocab_size": 39}, "model.embed_tokens.weight is 40 × 16, its config.json says 39 × 16"),
        ({}, {"model_type": "no such thing"}, "transformers cannot build this model"),
        (
            {EMBEDDINGS: torch.zeros(40, 16, dtype=torch.int8)},
            {},
            "is I8, not a float; take the model before it was quantised",
        ),
    ],
)
def test_files_that_are_not_what_config_json_promises_are_refused(folder, tensors, config, says):
    change(folder, tensors, **config)
    with pytest.raises(InputError, match=says):
        found(folder)


def test_a_head_that_is_not_there_is_refused(folder):
    held = load_file(folder / "model.safetensors")
    del held[HEAD]
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=f"its files hold no {HEAD}, which its config.json promises"):
        found(folder)


def test_other_parameters_that_grow_with_the_vocabulary_are_refused(tmp_path):
    from transformers import Gemma3nForCausalLM, Gemma3nTextConfig

    shape = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "head_dim": 8,
    }
    more = {
        "num_key_value_heads": 1,
        "vocab_size_per_layer_input": 64,
        "hidden_size_per_layer_input": 4,
        "laurel_rank": 4,
    }
    layers = {"num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"], "altup_num_inputs": 2}
    config = Gemma3nTextConfig(vocab_size=64, activation_sparsity_pattern=[0.0, 0.0], **shape, **more, **layers)
    Gemma3nForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"embed_tokens_per_layer\.weight grows with the vocabulary too"):
        found(tmp_path)
