"""eval_bpb.py: the same text for every model, one JSON object, and mistakes in one line."""

import json
import math
import shutil

import numpy as np
import pytest


def test_one_model_prints_its_figures(run, made, tiny_model):
    done = run(
        "scripts/eval_bpb.py",
        "--model_name_or_path",
        tiny_model,
        "--input",
        made / "clean" / "validation",
        "--max_length",
        64,
        "--json",
    )
    figures = json.loads(done.stdout)
    held_out = sum(len(json.loads(line)["text"].encode()) for line in _lines(made / "clean" / "validation"))
    assert figures["utf8_bytes"] == held_out, "the bytes of the cleaned text, not of decoded tokens"
    # two steps of training: near the uniform guess over 1,280 ids, log2(1280) = 10.3 bits per token
    assert 9 < figures["bits_per_token"] < 11


def test_several_models_by_name_and_in_a_folder(run, made, tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "copy")
    models = ("--model_name_or_path", tiny_model, tmp_path / "copy", "--max_length", 64)
    held_out = ("--input", made / "clean" / "validation")
    done = run("scripts/eval_bpb.py", *models, *held_out, "--json", "--output_dir", tmp_path / "bpb")
    found = json.loads(done.stdout)["models"]
    assert list(found) == ["tiny", "copy"] and found["tiny"]["bits_per_byte"] == found["copy"]["bits_per_byte"]
    assert json.loads((tmp_path / "bpb" / "manifest.json").read_text())["result"]["models"] == found


def test_what_each_document_gave_is_kept_and_makes_the_intervals(run, made, tiny_model, tmp_path):
    data = ["--datasets", f"{{path: {made}/shards}}", "--max_length", 64, "--global_batch_size", 4]
    steps = ["--max_steps", 2, "--learning_rate", "1e-3", "--output_dir", tmp_path / "longer"]
    run("scripts/cpt.py", "--model_name_or_path", tiny_model, *data, *steps)
    models = ["--model_name_or_path", tiny_model, tmp_path / "longer", "--names", "two steps", "four"]
    texts = ["--input", made / "clean" / "validation", "--max_length", 64]
    done = run("scripts/eval_bpb.py", *models, *texts, "--json", "--output_dir", tmp_path / "bpb")
    result = json.loads(done.stdout)
    assert json.loads((tmp_path / "bpb" / "manifest.json").read_text())["result"] == result
    with np.load(tmp_path / "bpb" / "documents.npz") as kept:
        nats, utf8_bytes, names = kept["nats"], kept["utf8_bytes"], kept["names"]
    assert list(names) == list(result["models"]) == ["two steps", "four"]
    held_out = [len(json.loads(line)["text"].encode()) for line in _lines(made / "clean" / "validation")]
    assert list(utf8_bytes) == held_out and len(held_out) >= 10 and (nats > 0).all()
    bits = nats.sum(0) / utf8_bytes.sum() / math.log(2)
    for i, figures in enumerate(result["models"].values()):
        low, high = figures["interval"]
        assert figures["bits_per_byte"] == pytest.approx(bits[i], rel=1e-12) and low < bits[i] < high
    ((name, against),) = result["differences"].items()
    low, high = against["interval"]
    assert (
        name == "four"
        and against["difference"] == pytest.approx(bits[1] - bits[0])
        and low <= bits[1] - bits[0] <= high
    )
    (tmp_path / "bpb" / "manifest.json").unlink()
    run("scripts/eval_bpb.py", *models, *texts, "--seed", 7, "--output_dir", tmp_path / "bpb")
    again = json.loads((tmp_path / "bpb" / "manifest.json").read_text())["result"]["models"]
    assert again["four"]["interval"] != result["models"]["four"]["interval"], "other draws"
    assert again["four"]["bits_per_byte"] == result["models"]["four"]["bits_per_byte"]


def test_mistakes_are_one_line(run, made, tiny_model):
    for arguments, said in (
        (("--stride", 65), "stride 65 is more than max_length 64"),
        (("--max_length", 10**9), "positions"),
        (("--names", "a", "b"), "names: a, b for 1 models: give each one, all different"),
        (("--seed", -1), "--seed should be greater than or equal to 0, not -1"),
        (("--names", ""), "for 1 models: give each one"),
        (("--model_name_or_path", tiny_model, made / "tiny", "--names", "a", "a"), "names: a, a for 2 models"),
        (("--model_name_or_path",), "--model_name_or_path"),
    ):
        done = run(
            "scripts/eval_bpb.py",
            "--model_name_or_path",
            tiny_model,
            "--input",
            made / "clean" / "validation",
            "--max_length",
            64,
            *arguments,
            "--check",
            code=2,
        )
        assert said in done.stderr and done.stderr.count("\n") == 1


def _lines(folder):
    import io

    import zstandard

    for file in sorted(folder.iterdir()):
        with file.open("rb") as raw:
            yield from io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(raw), encoding="utf-8")
