"""transplant_tokenizer.py: the same model with another vocabulary, ready for transformers, and nothing else of it changed."""

import json
import shutil

import pytest
import torch
from conftest import CORPUS

from dilqur.embedding_init import pieces_of
from dilqur.tokenizer import TextTokenizer

BOS, EOS, PAD, EOT = 1024, 1025, 1028, 1033  # of the tokenizer of `made`: right after its vocabulary of 1,024


@pytest.fixture(scope="module")
def english(run, tmp_path_factory):
    """An English tokenizer: 700 tokens, then the 256 control tokens."""
    folder = tmp_path_factory.mktemp("english") / "tokenizer"
    run("data_tools/train_tokenizer.py", "--input", CORPUS / "en", "--vocab_size", 700, "--output_dir", folder)
    return folder


@pytest.fixture(scope="module", params=["tied", "untied"])
def transplanted(request, run, made, english, tmp_path_factory):
    """(base, result): an English model with its head tied to its embeddings or not, and the same with `made`'s tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    folder = tmp_path_factory.mktemp(request.param)
    set_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=1000,  # 956 tokens and 44 rows of padding
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            bos_token_id=700,
            eos_token_id=701,
            pad_token_id=704,
            tie_word_embeddings=request.param == "tied",
        )
    )
    model.save_pretrained(folder / "base")
    shutil.copytree(english, folder / "base", dirs_exist_ok=True, ignore=shutil.ignore_patterns("manifest.json"))
    method = ("--method", "piece_mean")
    paths = ("--model_name_or_path", folder / "base", "--tokenizer", made / "tokenizer", "--output_dir", folder / "out")
    run("scripts/transplant_tokenizer.py", *method, *paths)
    return folder / "base", folder / "out"


def load(folder):
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return model


def matrices(model):
    return {"embeddings": model.get_input_embeddings().weight, "head": model.get_output_embeddings().weight}


def test_it_loads_and_speaks_with_the_new_tokenizer(transplanted, made):
    from transformers import AutoTokenizer

    _, out = transplanted
    model, tokenizer = load(out), AutoTokenizer.from_pretrained(out)
    assert TextTokenizer(out).hash == TextTokenizer(made / "tokenizer").hash
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (BOS, EOS, PAD)
    ids = model.generate(**tokenizer("Salam, dünya!", return_tensors="pt"), max_new_tokens=4, do_sample=False)
    assert ids.max() < model.config.vocab_size
    said = tokenizer.apply_chat_template([{"role": "user", "content": "Salam"}], tokenize=False)
    assert said.endswith("Salam<|eot_id|>")


def test_special_ids_and_generation_follow_the_new_tokenizer(transplanted):
    model = load(transplanted[1])
    assert (model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id) == (BOS, EOS, PAD)
    generation = model.generation_config
    assert (generation.bos_token_id, generation.pad_token_id) == (BOS, PAD)
    assert generation.eos_token_id == [EOS, EOT]  # a chat turn ends it as well as a text


def test_tied_stays_tied_and_untied_stays_untied(transplanted):
    base, out = map(load, transplanted)
    assert out.config.tie_word_embeddings == base.config.tie_word_embeddings
    assert (out.lm_head.weight is out.model.embed_tokens.weight) == out.config.tie_word_embeddings
    assert torch.equal(out.lm_head.weight, out.model.embed_tokens.weight) == out.config.tie_word_embeddings


def test_the_backbone_is_the_same_to_the_bit(transplanted):
    base, out = (dict(load(folder).named_parameters()) for folder in transplanted)
    assert base.keys() == out.keys()
    backbone = [name for name in base if "embed_tokens" not in name and "lm_head" not in name]
    assert len(backbone) == 2 * 9 + 1  # seven matrices and two norms a layer, the last norm
    assert all(torch.equal(base[name], out[name]) for name in backbone)


def test_the_rows_are_a_multiple_of_128_for_tensor_cores(transplanted):
    model = load(transplanted[1])
    assert model.config.vocab_size == 1280  # the tokenizer's 1,024 + 256 are one already
    assert all(len(matrix) == 1280 for matrix in matrices(model).values())


def test_rows_are_copied_or_made_from_pieces_each_matrix_from_its_own(transplanted, made):
    base, out = transplanted
    old, new = TextTokenizer(base), TextTokenizer(made / "tokenizer")
    before, after = (t.backend.get_vocab(with_added_tokens=False) for t in (old, new))
    shared = before.keys() & after.keys()
    for name, rows in matrices(load(out)).items():
        source = matrices(load(base))[name]
        assert all(torch.equal(rows[after[token]], source[before[token]]) for token in shared), name
        assert torch.equal(rows[EOT], source[old.control_id("<|eot_id|>")]), name
        for token in after.keys() - shared:
            torch.testing.assert_close(rows[after[token]], source[pieces_of(token, before, old.backend)].mean(0))
    result = json.loads((out / "manifest.json").read_text())["result"]
    assert result["copied"] == len(shared) + 256
    assert result["copied"] + result["made_from_pieces"] + result["padding_rows"] == result["rows"] == 1280


def test_padding_rows_are_the_mean_so_that_no_logit_stands_out(run, transplanted, made, tmp_path):
    paths = (
        "--model_name_or_path",
        transplanted[0],
        "--tokenizer",
        made / "tokenizer",
        "--output_dir",
        tmp_path / "out",
    )
    run("scripts/transplant_tokenizer.py", *paths, "--pad_to_multiple_of", 1000)
    rows = matrices(load(tmp_path / "out"))["embeddings"]
    assert len(rows) == 2000
    torch.testing.assert_close(rows[1280:], rows[:1280].mean(0).expand(720, -1))


def test_cpt_takes_it_with_shards_of_the_new_tokenizer(run, transplanted, made, tmp_path):
    paths = ("--model_name_or_path", transplanted[1], "--output_dir", tmp_path / "run")
    shape = ("--max_length", 64, "--global_batch_size", 2, "--max_steps", 1, "--learning_rate", "1e-3")
    done = run("scripts/cpt.py", *paths, "--datasets", f"{{path: {made}/shards}}", *shape, "--check", "true")
    assert done.stdout.strip() == "cpt: ok"


# -- refused ----------------------------------------------------------------------------------------------------------


def refused(done, *says):
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert all(words in line for words in says), line


def transplant(run, model, tokenizer, output_dir, **more):
    paths = ("--model_name_or_path", model, "--tokenizer", tokenizer, "--output_dir", output_dir)
    return run("scripts/transplant_tokenizer.py", *paths, **more)


def test_the_tokenizer_it_has_already_is_refused(run, tiny_model, made, tmp_path):
    done = transplant(run, tiny_model, made / "tokenizer", tmp_path / "out", code=2)
    refused(done, f"tokenizer: {made}/tokenizer is the tokenizer {tiny_model} has already")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_is_no_byte_level_bpe_is_refused(run, tiny_model, tmp_path):
    from tokenizers import Tokenizer, models

    file = tmp_path / "words.json"
    Tokenizer(models.WordLevel({"salam": 0, "[UNK]": 1}, unk_token="[UNK]")).save(str(file))
    refused(transplant(run, tiny_model, file, tmp_path / "out", code=2), f"{file}: not a byte-level BPE tokenizer")
    assert not (tmp_path / "out").exists()


def test_a_result_that_is_there_is_not_made_twice(run, transplanted, made):
    base, out = transplanted
    done = transplant(run, base, made / "tokenizer", out)
    assert "nothing to do" in done.stdout
