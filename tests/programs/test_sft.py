"""sft.py: an adapter learns the answers, is merged, and the model ends its turns."""

import json

import pytest
import torch
from conftest import CORPUS
from transformers import AutoModelForCausalLM, AutoTokenizer


@pytest.fixture(scope="module")
def tuned(run, tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sft") / "sft"
    run(
        "scripts/sft.py",
        "--model_name_or_path",
        tiny_model,
        "--input",
        CORPUS / "az_qa.jsonl",
        "--max_length",
        512,
        "--validation_fraction",
        0.1,
        "--num_train_epochs",
        1,
        "--learning_rate",
        "5e-3",
        "--global_batch_size",
        8,
        "--output_dir",
        folder,
    )
    return folder


def test_it_learns_and_says_what_it_used(tuned):
    result = json.loads((tuned / "manifest.json").read_text())["result"]
    assert result["loss"] < result["loss_first"]
    assert (
        result["conversations"]["train"] + result["conversations"]["validation"] + result["too_long"] == result["read"]
    )
    assert result["eval_loss"] is not None


def test_the_model_is_base_plus_adapter(tuned, tiny_model):
    """W = W0 + (alpha / r) · B · A, for a layer that has an adapter; embeddings as they were, to the bit."""
    from safetensors.torch import load_file

    merged, base = (
        AutoModelForCausalLM.from_pretrained(tuned / "model"),
        AutoModelForCausalLM.from_pretrained(tiny_model),
    )
    adapter = load_file(tuned / "adapter" / "adapter_model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    a, b = (adapter[f"base_model.model.{name}.lora_{k}.weight"] for k in "AB")
    expected = base.get_submodule(name).weight + 28 / 64 * b @ a
    assert torch.allclose(merged.get_submodule(name).weight, expected, atol=1e-6)
    assert torch.equal(merged.get_input_embeddings().weight, base.get_input_embeddings().weight)


def test_it_ends_its_turns_and_pads_with_another_token(tuned):
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(tuned / "model"),
        AutoTokenizer.from_pretrained(tuned / "model"),
    )
    assert tokenizer.eos_token == "<|eot_id|>" and tokenizer.eos_token_id in model.generation_config.eos_token_id
    assert tokenizer.pad_token_id not in model.generation_config.eos_token_id
    assert tokenizer.chat_template


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"text": "no conversation"}', "no messages"),
        ('{"messages": [{"role": "user", "content": "salam"}]}', "not the assistant's"),
        ('{"messages": [{"role": "robot", "content": "salam"}]}', "a message is"),
        ("{broken", "broken JSON"),
    ],
)
def test_a_bad_record_names_file_and_line(run, tiny_model, tmp_path, line, said):
    (tmp_path / "qa.jsonl").write_text(line + "\n")
    done = run(
        "scripts/sft.py",
        "--model_name_or_path",
        tiny_model,
        "--input",
        tmp_path / "qa.jsonl",
        "--output_dir",
        tmp_path / "out",
        code=2,
    )
    assert f"{tmp_path}/qa.jsonl:1: " in done.stderr and said in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out" / "model").exists()
