"""The weights a run begins with, read by part from a model folder: those that transformers loads, whatever their files look like."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dilqur.common.errors import InputError
from dilqur.models.safetensors_io import stored_tensors
from dilqur.training.initial_weights import StoredWeights, empty_model

SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def saved(folder, kind="llama", dtype=torch.float32, max_shard_size="1GB", **config):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES, num_key_value_heads=2, head_dim=8, **config)
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "olmo2"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_model_without_weights_is_filled_with_those_that_transformers_loads(tmp_path, kind, tied):
    folder = saved(tmp_path, kind, tie_word_embeddings=tied, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 1, "in several files"
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model, weights = empty_model(folder, torch.float32)
    assert all(p.is_meta and p.dtype == torch.float32 for p in model.parameters())
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in expected.named_parameters()]
    for name, parameter in expected.named_parameters():
        found = torch.empty(parameter.numel())
        weights.fill(name, 0, found)
        assert torch.equal(found, parameter.detach().view(-1)), name
    buffers = dict(model.named_buffers())
    assert all(torch.equal(buffers[name], buffer) for name, buffer in expected.named_buffers()), "which nobody stores"


@pytest.mark.parametrize("part", [64, 1 << 20])  # smaller than a row, and than nothing
def test_any_run_of_elements_is_read_and_cast(tmp_path, monkeypatch, part):
    monkeypatch.setattr("dilqur.training.initial_weights.PART", part)
    folder = saved(tmp_path, dtype=torch.bfloat16, tie_word_embeddings=False)
    _, weights = empty_model(folder, torch.float32)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).lm_head.weight.detach().view(-1)
    for start, count in ((0, 1), (31, 70), (3000, 72), (5, 0)):
        found = torch.full((count,), torch.nan)
        weights.fill("lm_head.weight", start, found)
        assert torch.equal(found, whole[start : start + count].float())


def test_a_head_that_is_stored_under_its_own_name_alone_is_the_embeddings(tmp_path):
    folder = saved(tmp_path, tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_pretrained(folder)
    stored = stored_tensors(folder)
    stored["lm_head.weight"] = stored.pop("model.embed_tokens.weight")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dilqur.training.initial_weights.stored_tensors", lambda folder: stored)
        weights = StoredWeights.of(model, folder)
    assert weights.stored["model.embed_tokens.weight"] is stored["lm_head.weight"]


def test_a_head_that_is_tied_by_config_and_stored_as_another_is_left_to_transformers(tmp_path):
    """Which makes two tensors of them."""
    folder = saved(tmp_path, tie_word_embeddings=False)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    assert empty_model(folder, torch.float32) == (None, None)


def test_files_that_are_not_the_models_are_left_to_transformers(tmp_path):
    """A Mixtral's experts, one by one in its files, are one tensor in transformers."""
    folder = saved(tmp_path, "mixtral", num_local_experts=2)
    assert any("experts.0" in name for name in stored_tensors(folder)), "as published"
    assert empty_model(folder, torch.float32) == (None, None)


def test_a_file_that_is_cut_while_it_is_read_is_an_error(tmp_path):
    folder = saved(tmp_path)
    _, weights = empty_model(folder, torch.float32)
    (file,) = folder.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-400])
    with pytest.raises(InputError, match=r"model\.safetensors: replaced or cut while it was read"):
        for name, stored in weights.stored.items():
            weights.fill(name, 0, torch.empty(torch.Size(stored.shape).numel()))
