"""What training costs, against what was published of it."""

import pytest

from dilqur.estimate.cost_model import activations, parameter_sizes

LLAMA_1B = {
    "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.mark.parametrize(("liger", "gigabytes"), [(True, 27), (False, 64)])
def test_the_published_peak_of_llama_3_2_1b_on_an_h100(liger, gigabytes):
    """10 sequences of 2,048 tokens per GPU under FSDP, over 8 GPUs: 27 GB with Liger, 64 without."""
    state = 16 * sum(parameter_sizes(LLAMA_1B).values()) / 8
    peak = state + 10 * 2048 * activations(LLAMA_1B, 2, liger=liger).peak()
    assert peak == pytest.approx(gigabytes * 1e9, rel=0.1)


def test_recomputing_keeps_the_input_of_each_layer_and_all_of_one():
    llama = activations(LLAMA_1B, 2, liger=True)
    layer = sum(llama.layer.values())
    assert llama.kept(True) == llama.kept() - 16 * (layer - 2 * 2048)
    assert llama.peak(True) == llama.peak() - 16 * (layer - 2 * 2048) + layer
