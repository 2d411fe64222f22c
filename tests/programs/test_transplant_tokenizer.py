"""transplant_tokenizer.py: the same model with another vocabulary, ready for transformers, and nothing else of it changed."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import CORPUS
from safetensors.torch import load_file, save_file

from dilqur.tokenizer.text_tokenizer import TextTokenizer
from dilqur.transplant.vocabulary_map import VocabularyMap

BOS, EOS, PAD, EOT = 1024, 1025, 1028, 1033  # of the tokenizer of `made`: right after its vocabulary of 1,024
AZ = CORPUS / "az"


def save_model(folder, tokenizer, dtype=torch.float32, max_shard_size="5GB", **config):
    """A tiny Llama with random weights for an English tokenizer of 700 + 256 tokens, its matrix padded to 1,000 rows."""
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    set_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"bos_token_id": 700, "eos_token_id": 701, "pad_token_id": 704}
    model = LlamaForCausalLM(LlamaConfig(**{"vocab_size": 1000, **shape, **ids, **config})).to(dtype)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    shutil.copytree(tokenizer, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("manifest.json"))
    return folder


@pytest.fixture(scope="module")
def bases(english, tmp_path_factory):
    """{"tied", "untied"}: bfloat16 models, as published ones are."""
    folder = tmp_path_factory.mktemp("bases")
    return {
        name: save_model(folder / name, english, torch.bfloat16, tie_word_embeddings=name == "tied")
        for name in ("tied", "untied")
    }


def transplant(run, model, tokenizer, output_dir, *flags, **more):
    paths = ("--model_name_or_path", model, "--tokenizer", tokenizer, "--output_dir", output_dir)
    return run("scripts/transplant_tokenizer.py", *paths, *flags, **more)


@pytest.fixture(scope="module", params=["tied", "untied"])
def transplanted(request, run, made, bases, tmp_path_factory):
    """(base, result): an English model with its head tied to its embeddings or not, and the same with `made`'s tokenizer."""
    out = tmp_path_factory.mktemp(request.param) / "out"
    transplant(run, bases[request.param], made / "tokenizer", out, "--method", "piece_mean")
    return bases[request.param], out


def load(folder):
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return model


def weights(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def matrices(model):
    return {"embeddings": model.get_input_embeddings().weight, "head": model.get_output_embeddings().weight}


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
    assert ("lm_head.weight" in weights(transplanted[1])) != out.config.tie_word_embeddings  # not written twice


def test_the_backbone_is_the_same_to_the_bit_and_in_the_base_s_dtype(transplanted):
    base, out = map(weights, transplanted)
    assert base.keys() == out.keys()
    backbone = [name for name in base if "embed_tokens" not in name and "lm_head" not in name]
    assert len(backbone) == 2 * 9 + 1  # seven matrices and two norms a layer, the last norm
    assert all(torch.equal(base[name], out[name]) for name in backbone)
    assert {tensor.dtype for tensor in out.values()} == {torch.bfloat16} == {load(transplanted[1]).dtype}


def test_the_rows_are_a_multiple_of_128_for_tensor_cores(transplanted):
    model = load(transplanted[1])
    assert model.config.vocab_size == 1280  # the tokenizer's 1,024 + 256 are one already
    assert all(len(matrix) == 1280 for matrix in matrices(model).values())


def test_rows_are_copied_or_made_from_pieces_each_matrix_from_its_own(transplanted, made):
    base, out = transplanted
    vocabulary = VocabularyMap(TextTokenizer(base), TextTokenizer(made / "tokenizer"))
    for name, rows in matrices(load(out)).items():
        source = matrices(load(base))[name]
        assert all(
            torch.equal(rows[new], source[old]) for ids in vocabulary.copied.values() for new, old in ids.items()
        )
        for new, pieces in vocabulary.pieces.items():
            torch.testing.assert_close(rows[new], source[pieces].float().mean(0).bfloat16(), rtol=1e-2, atol=1e-4)
    result = json.loads((out / "manifest.json").read_text())["result"]
    assert result["copied"] == len(vocabulary.anchors) + 256
    assert result["copied"] + result["made"] + result["padding_rows"] == result["rows"] == 1280


def test_what_became_of_each_class_of_tokens_is_in_the_manifest_and_said(run, bases, made, tmp_path):
    done = transplant(
        run, bases["untied"], made / "tokenizer", tmp_path / "o", "--pad_to_multiple_of", 1000, "--match_norms", "row"
    )
    tables = json.loads((tmp_path / "o" / "manifest.json").read_text())["result"]["classes"]
    assert tables.keys() == {"embeddings", "head"}
    for name, table in tables.items():
        assert table.keys() == {"copied", "byte", "special copied", "from pieces", "padding"}
        assert (table["byte"]["count"], table["special copied"]["count"], table["padding"]["count"]) == (256, 256, 720)
        source = matrices(load(bases["untied"]))[name].float()[:700].norm(dim=1).mean().item()
        assert table["from pieces"]["norm_written"] == pytest.approx(source, rel=1e-3)
        assert table["from pieces"]["norm_made"] < 0.9 * source  # of random rows a mean is shorter
    assert "| from pieces | " in done.stdout and "| padding | 720 |" in done.stdout


def test_the_parameters_are_those_of_the_model(transplanted):
    result = json.loads((transplanted[1] / "manifest.json").read_text())["result"]
    assert result["parameters"] == sum(p.numel() for p in load(transplanted[1]).parameters())


ALONE = """
import sys
sys.modules["dilqur"] = None  # whoever wants it gets an ImportError
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = AutoModelForCausalLM.from_pretrained(sys.argv[1]), AutoTokenizer.from_pretrained(sys.argv[1])
chat = [{"role": "user", "content": "Salam, dünya!"}]
said = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
assert said.startswith("<|begin_of_text|><|start_header_id|>user") and said.endswith("assistant<|end_header_id|>\\n\\n"), said
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
out = model.generate(**inputs, max_new_tokens=4, do_sample=False)
assert inputs["input_ids"][0, 0] == tokenizer.bos_token_id == model.config.bos_token_id
assert out.shape[1] > inputs["input_ids"].shape[1] and out.max() < model.config.vocab_size
tokenizer.decode(out[0])
"""


def test_it_loads_and_chats_in_plain_transformers(transplanted, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", ALONE, transplanted[1]]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_it_is_known_by_the_new_tokenizer(transplanted, made):
    assert TextTokenizer(transplanted[1]).hash == TextTokenizer(made / "tokenizer").hash


def test_cpt_takes_it_with_shards_of_the_new_tokenizer(run, transplanted, made, tmp_path):
    paths = ("--model_name_or_path", transplanted[1], "--output_dir", tmp_path / "run")
    shape = ("--max_length", 64, "--global_batch_size", 2, "--max_steps", 1, "--learning_rate", "1e-3")
    done = run("scripts/cpt.py", *paths, "--datasets", f"{{path: {made}/shards}}", *shape, "--check", "true")
    assert done.stdout.strip() == "cpt: ok"


# -- methods, and bases of every make ---------------------------------------------------------------------------------


def reordered(tokenizer, folder):
    """The tokenizer with its 700 ordinary tokens the other way round: old id i is new id 699 − i."""
    spec = json.loads(TextTokenizer(tokenizer).content)
    spec["model"]["vocab"] = {token: 699 - i for token, i in spec["model"]["vocab"].items()}
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    return folder


@pytest.fixture(scope="module")
def donor(run, made, bases, tmp_path_factory):
    """A model that has the new tokenizer: another result, for want of one."""
    out = tmp_path_factory.mktemp("donor") / "out"
    transplant(run, bases["untied"], made / "tokenizer", out, "--method", "random", "--seed", 5)
    return out


@pytest.mark.parametrize("method", ["calibrated_piece_mean", "focus", "orthogonal_matching_pursuit"])
def test_what_a_method_learns_comes_from_the_text_or_the_donor(run, method, bases, donor, made, tmp_path):
    pursuit = ("--donor_model_name_or_path", donor, "--sparsity", 2)
    flags = pursuit if method == "orthogonal_matching_pursuit" else ("--input", AZ)
    transplant(run, bases["untied"], made / "tokenizer", tmp_path / "out", "--method", method, *flags)
    result, written = json.loads((tmp_path / "out" / "manifest.json").read_text())["result"], weights(tmp_path / "out")
    for name, matrix in (("embeddings", "model.embed_tokens.weight"), ("head", "lm_head.weight")):
        assert torch.isfinite(written[matrix]).all()
        classes, total = result["classes"][name], len(vocabulary_of(bases, made).pieces)
        if method == "calibrated_piece_mean":
            assert classes["from pieces"]["count"] == total and -0.1 < result["variance_explained"][name] < 1
            continue
        assert classes["from similarity"]["count"] + classes.get("fallback", {"count": 0})["count"] == total
        if method == "orthogonal_matching_pursuit":  # in the donor every token has a row
            assert "fallback" not in classes
            check_pursuit(
                weights(bases["untied"])[matrix], weights(donor)[matrix], written[matrix], vocabulary_of(bases, made)
            )


def vocabulary_of(bases, made):
    return VocabularyMap(TextTokenizer(bases["untied"]), TextTokenizer(made / "tokenizer"))


def check_pursuit(base, donor, written, vocabulary):
    """The donor's row is nearest to the sum that was taken among sums of the first atom and any other."""
    anchors = list(vocabulary.anchors)
    atoms, rows = donor[anchors].double(), base[[vocabulary.anchors[i] for i in anchors]].double()
    for new_id in list(vocabulary.pieces)[:20]:
        target = donor[new_id].double()
        first = (torch.nn.functional.normalize(atoms) @ target).abs().argmax().item()
        rest = target - atoms[first] * (atoms[first] @ target / atoms[first].square().sum())
        second = (torch.nn.functional.normalize(atoms) @ rest).abs()
        second[first] = -1
        two = [first, second.argmax().item()]
        coefficients = torch.linalg.lstsq(atoms[two].T, target.unsqueeze(1)).solution
        torch.testing.assert_close(
            written[new_id].double(), (coefficients * rows[two]).sum(0), rtol=2e-2, atol=1e-3, check_dtype=False
        )


def test_the_same_vocabulary_in_another_order_predicts_the_same(run, bases, english, tmp_path):
    new = reordered(english, tmp_path / "tokenizer")
    transplant(run, bases["untied"], new, tmp_path / "out", "--method", "calibrated_piece_mean")
    base, out = load(bases["untied"]).float(), load(tmp_path / "out").float()
    for text in ("The cat sat on the mat.", "Salam, dünya! 1234", "x" * 50):
        before, after = (TextTokenizer(folder).encode(text) for folder in (bases["untied"], new))
        assert after == [699 - i for i in before]
        with torch.no_grad():
            logits = [model(torch.tensor([ids])).logits[0] for model, ids in ((base, before), (out, after))]
        torch.testing.assert_close(logits[1][:, :700].flip(1), logits[0][:, :700], rtol=1e-5, atol=1e-6)


def test_an_extension_keeps_the_old_rows_at_their_ids_and_appends_the_new(run, bases, english, tmp_path):
    from transformers import AutoTokenizer

    larger = AutoTokenizer.from_pretrained(english)
    larger.add_tokens([" kitablarımızdan", "ə"])
    larger.add_special_tokens({"additional_special_tokens": ["<|az|>"]}, replace_extra_special_tokens=False)
    larger.save_pretrained(tmp_path / "larger")
    transplant(run, bases["untied"], tmp_path / "larger", tmp_path / "out")
    before, after = weights(bases["untied"]), weights(tmp_path / "out")
    old = TextTokenizer(english)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(after[name][:956], before[name][:956])
        pieces = old.encode(" kitablarımızdan")
        torch.testing.assert_close(after[name][956], before[name][pieces].float().mean(0).bfloat16())
        assert len(after[name]) == 1024
    classes = next(iter(json.loads((tmp_path / "out" / "manifest.json").read_text())["result"]["classes"].values()))
    assert {name: row["count"] for name, row in classes.items()} == {
        "copied": 444, "byte": 256, "special copied": 256, "from pieces": 2, "special made": 1, "padding": 65,
    }  # fmt: skip


def test_a_base_in_shards_becomes_the_same_model_in_shards(run, transplanted, made, tmp_path):
    from transformers import AutoModelForCausalLM

    base = shutil.copytree(transplanted[0], tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))
    AutoModelForCausalLM.from_pretrained(transplanted[0], dtype="auto").save_pretrained(base, max_shard_size="30KB")
    assert len(list(base.glob("*.safetensors"))) > 2
    transplant(run, base, made / "tokenizer", tmp_path / "shards")
    shards, one = weights(tmp_path / "shards"), weights(transplanted[1])
    assert shards.keys() == one.keys() and all(torch.equal(shards[name], one[name]) for name in one)
    load(tmp_path / "shards")
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in one.values())
    assert not (transplanted[1] / "model.safetensors.index.json").exists()


def test_a_tied_head_that_the_files_hold_too_is_left_out(run, made, bases, tmp_path):
    base = shutil.copytree(bases["tied"], tmp_path / "base")
    held = weights(base)
    held["lm_head.weight"] = held["model.embed_tokens.weight"].clone()
    save_file(held, base / "model.safetensors", {"format": "pt"})
    transplant(run, base, made / "tokenizer", tmp_path / "out")
    assert "lm_head.weight" not in weights(tmp_path / "out")


def test_a_gpt2_whose_files_leave_out_a_prefix_and_a_head_with_a_bias(run, made, english, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel, PhiConfig, PhiForCausalLM

    shape = {"vocab_size": 960, "bos_token_id": 700, "eos_token_id": 701}
    gpt2 = GPT2LMHeadModel(GPT2Config(**shape, n_embd=16, n_layer=1, n_head=2, n_positions=64))
    gpt2.transformer.save_pretrained(tmp_path / "gpt2")
    config = json.loads((tmp_path / "gpt2" / "config.json").read_text())
    (tmp_path / "gpt2" / "config.json").write_text(json.dumps(config | {"architectures": ["GPT2LMHeadModel"]}))
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    phi = PhiForCausalLM(PhiConfig(**shape, **small))
    torch.nn.init.normal_(phi.lm_head.bias)
    phi.save_pretrained(tmp_path / "phi")
    for name in ("gpt2", "phi"):
        shutil.copytree(english, tmp_path / name, dirs_exist_ok=True, ignore=shutil.ignore_patterns("manifest.json"))
        transplant(run, tmp_path / name, made / "tokenizer", tmp_path / f"{name}-out")
    assert load(tmp_path / "gpt2-out").transformer.wte.weight.shape == (1280, 16)
    bias, copied = (
        load(tmp_path / "phi-out").lm_head.bias,
        VocabularyMap(*map(TextTokenizer, (english, made / "tokenizer"))).anchors,
    )
    assert torch.equal(bias[list(copied)], phi.lm_head.bias[list(copied.values())])


# -- refused ----------------------------------------------------------------------------------------------------------


def refused(done, *says):
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert all(words in line for words in says), line


def test_the_tokenizer_it_has_already_is_refused(run, tiny_model, made, tmp_path):
    done = transplant(run, tiny_model, made / "tokenizer", tmp_path / "out", code=2)
    refused(done, f"tokenizer: {made}/tokenizer is the tokenizer {tiny_model} has already")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["WordPiece", "Unigram", "BPE"])
def test_a_tokenizer_that_is_no_byte_level_bpe_is_refused_on_either_side(run, kind, bases, made, tmp_path):
    from tokenizers import Tokenizer, models

    model = {
        "WordPiece": lambda: models.WordPiece({"[UNK]": 0, "salam": 1, "##lar": 2}, unk_token="[UNK]"),
        "Unigram": lambda: models.Unigram([("<unk>", 0.0), ("▁salam", -1.0)], unk_id=0),
        "BPE": lambda: models.BPE({"▁": 0, "s": 1, "<0x00>": 2}, [], byte_fallback=True),
    }[kind]()
    base = shutil.copytree(bases["tied"], tmp_path / "base")
    Tokenizer(model).save(str(base / "tokenizer.json"))
    named = "WordPiece" if kind == "WordPiece" else "SentencePiece"
    pair = (bases["tied"], base) if kind == "BPE" else (base, made / "tokenizer")
    done = transplant(run, *pair, tmp_path / "out", "--check", code=2)
    says = f"{base}/tokenizer.json: not a byte-level BPE tokenizer but {named}"
    refused(done, says, "take a base model and a new tokenizer with byte-level BPE")
    assert not (tmp_path / "out").exists()


def test_a_base_whose_matrix_is_smaller_than_its_tokenizer_is_refused(run, bases, made, english, tmp_path):
    base = save_model(tmp_path / "base", english, vocab_size=900)
    done = transplant(run, base, made / "tokenizer", tmp_path / "out", "--check", code=2)
    refused(done, f"{base}: rows for 900 tokens, its tokenizer has ids up to 955")


def test_a_base_without_weights_and_one_of_pickles_are_refused(run, bases, made, tmp_path):
    base = shutil.copytree(bases["tied"], tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))
    refused(transplant(run, base, made / "tokenizer", tmp_path / "out", "--check", code=2), f"{base}: no weights in it")
    (base / "pytorch_model.bin").write_bytes(b"")
    done = transplant(run, base, made / "tokenizer", tmp_path / "out", "--check", code=2)
    refused(done, f"{base}: its weights are pickles", "convert the model to safetensors first")


def test_keys_that_a_method_needs_or_has_no_use_for_are_refused(run, bases, donor, made, tmp_path):
    omp = ("--method", "orthogonal_matching_pursuit")
    for flags, says in (
        (("--method", "focus"), "input missing: method focus compares tokens by the text they stand in"),
        (omp, "give donor_model_name_or_path (a model that has the new tokenizer) or input (text), and one of them"),
        ((*omp, "--donor_model_name_or_path", donor, "--input", AZ), "and one of them"),
        (("--method", "mean", "--input", AZ), "input: method mean reads no text; remove the key"),
        (("--sparsity", 3), "sparsity: is for method orthogonal_matching_pursuit, not piece_mean"),
        (("--donor_model_name_or_path", donor), "donor_model_name_or_path: is for method orthogonal_matching_pursuit"),
        ((*omp, "--donor_model_name_or_path", bases["tied"]), f"{bases['tied']} has another tokenizer than"),
        (("--method", "peace_mean"), "--method"),
    ):
        refused(transplant(run, bases["tied"], made / "tokenizer", tmp_path / "out", *flags, "--check", code=2), says)
    assert not (tmp_path / "out").exists()


def test_a_text_without_neighbours_is_refused_when_it_is_read(run, bases, made, tmp_path):
    (tmp_path / "text.txt").write_text("a\n")
    flags = ("--method", "focus", "--input", tmp_path / "text.txt")
    done = transplant(run, bases["tied"], made / "tokenizer", tmp_path / "out", *flags, code=2)
    refused(done, "input: no two tokens next to each other in")


def test_a_control_token_that_is_text_on_the_other_side_is_refused(run, bases, made, tmp_path):
    new = shutil.copytree(made / "tokenizer", tmp_path / "new")
    spec = json.loads((new / "tokenizer.json").read_text())
    for token in spec["added_tokens"]:
        token["special"] = token["special"] and token["content"] != "<|python_tag|>"
    (new / "tokenizer.json").write_text(json.dumps(spec))
    done = transplant(run, bases["tied"], new, tmp_path / "out", "--check", code=2)
    refused(done, f"<|python_tag|> is a control token in {bases['tied']}/tokenizer.json and ordinary text in {new}")


def test_a_result_that_is_there_is_not_made_twice(run, transplanted, made):
    base, out = transplanted
    done = transplant(run, base, made / "tokenizer", out, "--method", "piece_mean")
    assert "nothing to do" in done.stdout
