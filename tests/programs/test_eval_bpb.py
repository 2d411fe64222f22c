"""eval_bpb.py: the same text for every model, one JSON object, and mistakes in one line."""

import json
import shutil


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
    # two steps of training: near the uniform guess over 1,280 ids, log2(1280) = 10.3 bits a token
    assert 9 < figures["bits_per_token"] < 11


def test_several_models_by_name_and_in_a_folder(run, made, tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "copy")
    models = ("--model_name_or_path", tiny_model, tmp_path / "copy", "--max_length", 64)
    held_out = ("--input", made / "clean" / "validation")
    done = run("scripts/eval_bpb.py", *models, *held_out, "--json", "--output_dir", tmp_path / "bpb")
    found = json.loads(done.stdout)["models"]
    assert list(found) == ["tiny", "copy"] and found["tiny"]["bits_per_byte"] == found["copy"]["bits_per_byte"]
    assert json.loads((tmp_path / "bpb" / "manifest.json").read_text())["result"]["models"] == found


def test_mistakes_are_one_line(run, made, tiny_model):
    for arguments, said in (
        (("--stride", 65), "stride 65 is more than max_length 64"),
        (("--max_length", 10**9), "positions"),
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
