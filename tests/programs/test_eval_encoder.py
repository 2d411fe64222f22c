"""eval_encoder.py: any Hugging Face encoder, on texts with labels, words with tags, and masked words."""

import json
import os

import numpy as np
import pytest
from conftest import CORPUS, SHARED, TINY_NEOBERT
from transformers import AutoTokenizer


@pytest.fixture(scope="module")
def encoder(run, made_encoder, tmp_path_factory):
    """The folder of a NeoBERT that has hardly learned anything, as transformers loads it."""
    out = tmp_path_factory.mktemp("encoder") / "mlm"
    shape = (
        "--model_config",
        TINY_NEOBERT,
        "--tokenizer",
        made_encoder / "tokenizer",
        "--max_length",
        64,
        "--max_steps",
        4,
    )
    steps = ("--global_batch_size", 8, "--learning_rate", "1e-3", "--output_dir", out)
    run("scripts/mlm.py", *shape, *steps, "--datasets", f"{{path: {made_encoder}/shards}}")
    return out / "model"


@pytest.fixture(scope="module")
def bert(encoder, tmp_path_factory):
    """Somebody else's kind of encoder: a tiny BERT of random weights, with the same tokenizer."""
    from transformers import BertConfig, BertForMaskedLM

    folder = tmp_path_factory.mktemp("bert") / "bert"
    AutoTokenizer.from_pretrained(encoder).save_pretrained(folder)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    BertForMaskedLM(BertConfig(vocab_size=1152, max_position_embeddings=64, **shape)).save_pretrained(folder)
    return folder


@pytest.fixture
def texts(tmp_path):
    """A task that a model learns at once: which of two words is in the text."""
    random = np.random.default_rng(0)
    for name, many in (("train", 120), ("test", 40)):
        rows = [("deniz", "dağ")[i % 2] for i in range(many)]
        lines = [f"{row}\tBu {random.integers(1000)} {row} haqqında mətndir.\n" for row in rows]
        (tmp_path / f"{name}.tsv").write_text("kind\ttext\n" + "".join(lines))
    return tmp_path


def result(folder):
    return json.loads((folder / "manifest.json").read_text())["result"]


ONCE = (
    "--learning_rates",
    "5e-3",
    "--seeds",
    1,
    2,
    "--num_train_epochs",
    3,
    "--per_device_train_batch_size",
    16,
    "--max_length",
    32,
)


def test_texts_with_labels_side_by_side_gone_on_with_and_not_mixed_up(run, encoder, bert, texts):
    task = ("--task", "sequence_classification", "--train", texts / "train.tsv", "--test", texts / "test.tsv")
    more = ("--label_field", "kind", "--output_dir", texts / "out")
    done = run("scripts/eval_encoder.py", "--model_name_or_path", encoder, *task, *ONCE, *more)
    found = result(texts / "out")
    assert found["models"]["mlm"]["score"] > 0.9, "it can be learned, and so it is"
    assert found["examples"] == {"train": 108, "validation": 12, "test": 40} and found["labels"] == ["dağ", "deniz"]
    assert f"| mlm | {found['models']['mlm']['score']:.3f} | " in done.stdout
    assert (texts / "out" / "scores.png").stat().st_size > 5000
    kept = {p.name: p.stat().st_mtime_ns for p in (texts / "out" / "runs").glob("*.npz")}
    assert sorted(kept) == ["mlm-0.005-1.npz", "mlm-0.005-2.npz"]

    (texts / "out" / "manifest.json").unlink()  # as if it had been killed, after another encoder was asked for
    both = ("--model_name_or_path", encoder, bert, "--random_control", "true")
    run("scripts/eval_encoder.py", *both, *task, *ONCE, *more)
    models = result(texts / "out")["models"]
    assert list(models) == ["mlm", "bert", "random weights"]
    assert {p: (texts / "out" / "runs" / p).stat().st_mtime_ns for p in kept} == kept, "not done again"
    low, high = models["bert"]["difference_interval"]
    assert low <= models["bert"]["difference"] <= high

    (texts / "out" / "manifest.json").unlink()
    other = run("scripts/eval_encoder.py", *both, *task, *ONCE, *more, "--weight_decay", "0.1", code=2)
    assert f"{texts}/out: begun with another weight_decay; remove {texts}/out/runs" in other.stderr


def test_asked_to_stop_it_ends_between_two_fine_tunings_and_goes_on(run, encoder, texts):
    task = ("--task", "sequence_classification", "--train", texts / "train.tsv", "--test", texts / "test.tsv")
    more = ("--label_field", "kind", "--output_dir", texts / "out")
    (texts / "out").mkdir()
    (texts / "out" / "STOP").touch()
    began = {"DILQUR_STAGE_STARTED": "0"}  # before the STOP, which is therefore meant for it
    done = run("scripts/eval_encoder.py", "--model_name_or_path", encoder, *task, *ONCE, *more, **began)
    assert "stopped" in done.stdout and "0 of 2 done; start it again to go on" in done.stdout
    assert (texts / "out" / "REQUEUE").exists() and not (texts / "out" / "manifest.json").exists()
    (texts / "out" / "STOP").unlink()
    run("scripts/eval_encoder.py", "--model_name_or_path", encoder, *task, *ONCE, *more)
    assert result(texts / "out")["models"]["mlm"]["score"] > 0.9 and not (texts / "out" / "REQUEUE").exists()


def test_words_with_tags_in_folds_and_what_is_cut_off_is_wrong(run, encoder, tmp_path):
    """A tag that a word's own letters say; sentences of 12 words of which 16 tokens hold a part."""
    random, lines = np.random.default_rng(0), []
    for _ in range(60):
        for word in random.choice(["Bakı", "Gəncə", "gəlir", "gedir", "böyük"], 12):
            lines.append(f"{word}\t{'B-LOC' if word[0].isupper() else 'O'}\n")
        lines.append("\n")
    (tmp_path / "train.conll").write_text("".join(lines))
    task = ("--task", "token_classification", "--train", tmp_path / "train.conll", "--metric", "entity_f1")
    how = ("--learning_rates", "5e-3", "--seeds", 1, 2, 3, "--num_train_epochs", 8, "--per_device_train_batch_size", 8)
    scores = {}
    for length in (64, 16):
        out = ("--max_length", length, "--output_dir", tmp_path / str(length))
        run("scripts/eval_encoder.py", "--model_name_or_path", encoder, *task, *how, *out)
        found = result(tmp_path / str(length))
        assert found["folds"] and found["examples"] == {"train": 20, "validation": 20, "test": 20}
        scores[length] = found["models"]["mlm"]["score"]
    assert scores[64] > 0.95
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    assert len(tokenizer(" ".join(["Bakı"] * 12))["input_ids"]) > 16, "the test does not test"
    assert scores[16] < 0.9, "an entity that was cut off was not found"


def test_masked_words_of_the_same_places_for_all(run, encoder, bert, tmp_path):
    train, test = ("--train", CORPUS / "az"), ("--test", CORPUS / "az" / "tales.jsonl", "--max_length", 64)
    both = ("--model_name_or_path", encoder, bert, "--task", "masked_words", "--suffixes", "lar", "lər", "dan")
    done = run("scripts/eval_encoder.py", *both, *train, *test, "--output_dir", tmp_path / "out")
    found = result(tmp_path / "out")
    assert found["documents"] == 8 and 150 < found["words"] < 300  # 15 % of 1,493
    assert found["in_group"]["by_frequency"]["never"] == 0, "they are in train"
    assert sum(found["in_group"]["by_frequency"].values()) == found["words"]
    assert set(found["in_group"]["by_suffix"]) == {"lar", "lər", "dan"}
    assert all(0 <= figures["score"] < 0.3 for figures in found["models"].values())
    assert "| ending | words | mlm | bert |" in done.stdout


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--task", "masked_words"), "masked_words: give --test"),
        (("--task", "sequence_classification", "--max_length", 128), "max_length 128 is more than the 64 positions of"),
        (("--task", "sequence_classification", "--metric", "entity_f1"), "entity_f1: of token_classification alone"),
        (
            ("--task", "sequence_classification", "--seeds", 1, 2),
            "without it the seeds are folds, and there must be three",
        ),
        (("--task", "token_classification"), "a table has a text a line, and no words with tags"),
        (
            ("--task", "sequence_classification", "--validation", "README.md"),
            "without test each fold validates on the next",
        ),
        (("--task", "sequence_classification", "--seeds", 1, 1, 2), "seeds: give one at least, and none twice"),
        (("--task", "sequence_classification", "--label_field", "topic"), "no 'topic' (there are: kind, text)"),
        (
            ("--task", "sequence_classification", "--label_field", "text", "--max_train_samples", 2),
            "2 documents are too few",
        ),
    ],
)
def test_a_mistake_is_one_line_before_torch_is_loaded(run, encoder, texts, flags, says):
    fixed = (
        "--model_name_or_path",
        encoder,
        "--train",
        texts / "train.tsv",
        "--label_field",
        "kind",
        "--max_length",
        32,
    )
    done = run("scripts/eval_encoder.py", *fixed, *flags, "--output_dir", texts / "never", "--check", "true", code=2)
    (line,) = done.stderr.splitlines()
    assert says in line and line.startswith("error: ")
    assert not (texts / "never").exists()


@pytest.mark.skipif(not (SHARED / "data" / "az").exists(), reason="no real text beside this checkout")
@pytest.mark.skipif(not os.environ.get("DILQUR_WHOLE"), reason="seven minutes of two cores: DILQUR_WHOLE=1 has it run")
def test_pre_training_on_real_text_beats_random_weights(run, tmp_path):
    """Two minutes of masked language modelling, then: which source is a passage from? And which words are missing?"""
    sources = [
        SHARED / "data" / "az" / f"{s}.jsonl.gz" for s in ("docs_react", "law_eqanun", "wiki_sentences", "wiki_qa_text")
    ]
    run(
        "data_tools/clean_corpus.py",
        "--input",
        *sources,
        "--language",
        "az",
        "--validation_fraction",
        "0.02",
        "--output_dir",
        tmp_path / "clean",
    )
    train, test = tmp_path / "clean" / "train", tmp_path / "clean" / "validation"
    control = ("--control_tokens", "encoder", "--vocab_size", 3968, "--output_dir", tmp_path / "tokenizer")
    run("data_tools/train_tokenizer.py", "--input", train, *control)
    run(
        "data_tools/pack_mmap.py",
        "--input",
        train,
        "--tokenizer",
        tmp_path / "tokenizer",
        "--output_dir",
        tmp_path / "shards",
    )
    shape = "{vocab_size: 4096, hidden_size: 128, num_hidden_layers: 4, num_attention_heads: 4, intermediate_size: 384, max_length: 64, "
    shape += "embedding_init_range: 0.5, decoder_init_range: 0.1}"
    new = ("--model_config", shape, "--tokenizer", tmp_path / "tokenizer", "--datasets", f"{{path: {tmp_path}/shards}}")
    steps = ("--max_length", 64, "--global_batch_size", 32, "--per_device_train_batch_size", 32, "--max_steps", 600)
    run(
        "scripts/mlm.py",
        *new,
        *steps,
        "--learning_rate",
        "3e-3",
        "--warmup_steps",
        50,
        "--output_dir",
        tmp_path / "mlm",
    )
    of = ("--model_name_or_path", tmp_path / "mlm", "--random_control", "true", "--max_length", 64)
    task = ("--task", "sequence_classification", "--train", train, "--test", test, "--label_field", "@file")
    how = ("--learning_rates", "1e-3", "--seeds", 1, 2, 3, 4, 5, "--num_train_epochs", 8, "--max_train_samples", 400)
    run("scripts/eval_encoder.py", *of, *task, *how, "--output_dir", tmp_path / "source")
    words = ("--task", "masked_words", "--train", train, "--test", test, "--output_dir", tmp_path / "words")
    run("scripts/eval_encoder.py", *of, *words)
    for stage in ("source", "words"):
        random = result(tmp_path / stage)["models"]["random weights"]
        print(stage, result(tmp_path / stage)["models"]["mlm"]["score"], random["score"], random["difference_interval"])
        assert random["difference_interval"][1] < 0, f"{stage}: pre-trained is better, and the interval says so"
