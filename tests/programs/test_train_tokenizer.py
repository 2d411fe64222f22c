"""train_tokenizer: byte-level BPE tokenizers with the Llama-3 configuration: of one size, of several, and extensions of a base."""

import json

import pytest
from conftest import CORPUS

from dilqur.pipeline.manifest import read_manifest
from dilqur.tokenizer.llama3 import PATTERN, SPECIAL_TOKENS, encode_chat
from dilqur.tokenizer.text_tokenizer import TextTokenizer

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


def test_an_encoders_tokenizer_has_its_control_tokens_and_text_never_becomes_one(run, made, tokenizer, tmp_path):
    from transformers import AutoTokenizer

    flags = ("--input", made / "clean" / "train", "--vocab_size", 1024, "--control_tokens", "encoder")
    run(PROGRAM, *flags, "--output_dir", tmp_path)
    ours, theirs = TextTokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert ours.size == len(theirs) == 1024 + 128
    text = "Salam, [MASK] dünya [SEP]!"
    plain = ours.encode(text)
    assert plain == tokenizer.encode(text), "the same merges"
    assert max(plain) < 1024 and ours.decode(plain) == text
    assert (ours.bos_token, ours.eos_token) == ("[CLS]", "[SEP]")
    names = (theirs.pad_token, theirs.cls_token, theirs.sep_token, theirs.mask_token)
    assert names == ("[PAD]", "[CLS]", "[SEP]", "[MASK]")
    assert theirs.convert_tokens_to_ids([*names]) == [1024, 1025, 1026, 1027]
    one = theirs("Salam!")["input_ids"]
    assert one == [1025, *ours.encode("Salam!"), 1026]
    assert theirs("Salam!", "Dünya")["input_ids"] == [*one, *ours.encode("Dünya"), 1026]
    masked = theirs("Salam [MASK] dünya")["input_ids"]
    around = [*ours.encode("Salam"), 1027, *ours.encode(" dünya")]
    assert masked == [1025, *around, 1026], (
        "for fill-mask it is one, and takes the space before it, as a word's token does"
    )


def test_a_vocabulary_larger_than_the_text_supports_stops_at_what_there_is_and_says_so(run, tmp_path):
    (tmp_path / "a.txt").write_text("salam salam dünya dünya\n")
    done = run(PROGRAM, "--input", tmp_path / "a.txt", "--vocab_size", 500, "--output_dir", tmp_path / "out")
    # 256 bytes and the merges of two words
    assert "warning: 500 tokens were asked for, and this text gives 267" in done.stderr
    assert read_manifest(tmp_path / "out")["result"]["vocab_size"] == 267
    assert TextTokenizer(tmp_path / "out").size == 267 + 256


def test_a_sweep_is_cut_from_one_training(run, made, tmp_path):
    clean = made / "clean" / "train"
    run(PROGRAM, "--input", clean, "--vocab_sizes", 2048, 512, 1024, "--output_dir", tmp_path / "sweep")
    sizes = read_manifest(tmp_path / "sweep")["result"]["sizes"]
    assert list(sizes) == ["512", "1024", "2048"]
    for size, fields in sizes.items():
        run(PROGRAM, "--input", clean, "--vocab_size", size, "--output_dir", tmp_path / size)
        assert fields["tokenizer_sha256"] == TextTokenizer(tmp_path / "sweep" / size).hash
        assert (tmp_path / "sweep" / size / "tokenizer.json").read_bytes() == (
            tmp_path / size / "tokenizer.json"
        ).read_bytes()
        assert fields["size"] % 128 == 0
    done = run(PROGRAM, "--input", clean, "--vocab_sizes", 1000, 512, "--output_dir", tmp_path / "odd", code=2)
    assert done.stderr == "error: vocab_sizes: 1000 is no multiple of 128 (tensor cores); 1024 is\n"


def test_plain_training_is_the_one_of_tokenizers(run, made, tmp_path):
    plain = ("--source_temperature", 1, "--count_exponent", 1, "--unseen_words", 0)
    run(PROGRAM, "--input", made / "clean" / "train", "--vocab_size", 1024, *plain, "--output_dir", tmp_path)
    result = read_manifest(tmp_path)["result"]
    assert (result["weight_to_count"], result["likely_words_added"]) == (1, 0)  # and these merges: test_bpe_training.py


def test_an_extension_loads_and_talks_like_its_base(run, made, tmp_path):
    from transformers import AutoTokenizer

    run(PROGRAM, "--input", CORPUS / "en", "--vocab_size", 700, "--output_dir", tmp_path / "base")
    words = ("--input", made / "clean" / "train", "--base_tokenizer", tmp_path / "base", "--new_tokens", 300, 100)
    run(PROGRAM, *words, "--output_dir", tmp_path / "extended")
    base, extended = TextTokenizer(tmp_path / "base"), TextTokenizer(tmp_path / "extended" / "300")
    assert (base.size, extended.size) == (956, 1256)
    assert extended.encode(" və") != base.encode(" və")
    fields = read_manifest(tmp_path / "extended")["result"]["sizes"]
    assert [f["new_tokens"] for f in fields.values()] == [100, 300]
    loaded, before = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("extended/300", "base"))
    text = "Salam, dünya! The house is old.<|eot_id|>"
    assert loaded.decode(extended.encode(text)) == text
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "chat_template"):
        assert getattr(loaded, name) == getattr(before, name)
    turns = [{"role": "user", "content": "Bakı haradadır?"}]
    rendered = loaded.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert rendered == encode_chat(extended, turns, add_generation_prompt=True)[0]


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ((), "vocab_size missing: give one of vocab_size"),
        (("--vocab_size", 300, "--new_tokens", 5), "vocab_size and new_tokens exclude each other"),
        (("--new_tokens", 5), "base_tokenizer and new_tokens belong together"),
        (("--vocab_sizes", 512, 512), "vocab_sizes: [512, 512]: give each size once"),
    ],
)
def test_settings_that_do_not_fit_are_refused_in_one_line(run, tmp_path, words, problem):
    out = tmp_path / "out"
    done = run(PROGRAM, "--input", CORPUS / "az", *words, "--output_dir", out, "--check", "true", code=2)
    assert problem in done.stderr
    assert done.stderr.count("\n") == 1
    assert not out.exists()


def test_a_source_of_another_script_is_refused_unless_it_is_meant(run, tmp_path):
    (tmp_path / "az.txt").write_text("salam dünya bu gün hava yaxşıdır\n" * 5)
    (tmp_path / "ru.txt").write_text("привет\n")
    words = ("--input", tmp_path / "az.txt", tmp_path / "ru.txt", "--vocab_size", 300, "--output_dir", tmp_path / "out")
    done = run(PROGRAM, *words, code=2)
    assert "ru: 100% of its letters are CYRILLIC, and most of the corpus is LATIN: leave it out" in done.stderr
    assert not (tmp_path / "out" / "tokenizer.json").exists()
    run(PROGRAM, *words, "--mixed_scripts", "true")


def test_sources_with_weights_come_from_a_recipe(run, tmp_path):
    for name, text in (("a", "salam dünya"), ("b", "gözəl gün")):
        (tmp_path / f"{name}.txt").write_text(f"{text}\n" * 3)
    stated = [{"name": name, "input": [str(tmp_path / f"{name}.txt")], "weight": 1 + (name == "b")} for name in "ab"]
    recipe = tmp_path / "tokenizer.yaml"

    def train(sources, code=0):
        recipe.write_text(json.dumps({"sources": sources, "vocab_size": 260}))
        return run(PROGRAM, "--config", recipe, "--output_dir", tmp_path / "out", code=code)

    assert (
        "weight for each of them, or for none"
        in train([stated[0], {"name": "b", "input": stated[1]["input"]}], 2).stderr
    )
    assert "is in a and in b: take it out" in train([stated[0], {**stated[1], "input": stated[0]["input"]}], 2).stderr
    train(stated)
    assert read_manifest(tmp_path / "out")["result"]["sources"]["b"]["weight"] == 2


def test_files_of_one_name_are_one_source(run, tmp_path):
    (tmp_path / "text").mkdir()
    for name in ("wiki-00000.txt", "wiki-00001.txt", "docs_si50.txt"):
        (tmp_path / "text" / name).write_text("salam dünya\n")
    run(PROGRAM, "--input", tmp_path / "text", "--vocab_size", 260, "--output_dir", tmp_path / "out")
    assert {k: v["files"] for k, v in read_manifest(tmp_path / "out")["result"]["sources"].items()} == {
        "docs_si50": 1,
        "wiki": 2,
    }


def test_fewer_than_the_256_bytes_are_refused(run, tmp_path):
    done = run(PROGRAM, "--input", CORPUS / "az", "--vocab_size", 255, "--output_dir", tmp_path / "out", code=2)
    assert done.stderr == "error: --vocab_size should be greater than or equal to 256, not 255\n"
