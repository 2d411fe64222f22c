"""vocabulary_study: what it makes of a run folder. The numbers are made up; the files are as the stages leave them."""

import json
import math
import sys

import numpy as np
import pytest
from conftest import ROOT

from dilqur.pipeline.manifest import read_manifest

sys.path.insert(0, str(ROOT / "scripts"))
from report import page
from vocabulary_study import groups_of, steps_to

PROGRAM = "scripts/vocabulary_study.py"
CONFIG = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 512,
}
DOCUMENTS = 30


def stage(folder, program, arguments, result, **files):
    folder.mkdir(parents=True)
    manifest = {"program": program, "arguments": arguments, "result": result, "inputs": {}, "stage": folder.name}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    for name, content in files.items():
        path = folder / name.replace("__", "/").replace("_json", ".json")
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)


def training(run, name, source, utf8_bytes, tokens, losses, unfrozen=None):
    """A training stage with an evaluation every ten steps. losses: bits per byte."""
    bits = [loss * math.log(2) * 4 for loss in losses]  # four bytes per token
    arguments = {
        "model_name_or_path": str(run / source / ("model" if "@" in source else "")),
        "max_length": 16,
        "unfrozen_parameters": unfrozen,
        "eval_datasets": [{"path": str(run / "held-out")}],
    }
    result = {"steps": 10 * len(losses), "tokens": tokens, "utf8_bytes_seen": utf8_bytes}
    lines = "".join(json.dumps({"step": 10 * i, "eval_loss": b}) + "\n" for i, b in enumerate(bits, 1))
    stage(run / name, "cpt.py", arguments, result, model__config_json=json.dumps(CONFIG))
    (run / name / "metrics.jsonl").write_text(lines)


def evaluation(run, name, bits):
    """An eval_bpb stage. bits: {model: bits per byte}."""
    draw = np.random.default_rng(1)
    sizes = draw.integers(100, 1000, DOCUMENTS)
    noise = draw.normal(1, 0.02, DOCUMENTS)
    nats = np.stack([sizes * value * noise * math.log(2) for value in bits.values()], 1)
    stage(run / name, "eval_bpb.py", {}, {"models": {name: {} for name in bits}})
    np.savez(run / name / "documents.npz", nats=nats, utf8_bytes=sizes)


@pytest.fixture
def run_folder(tmp_path):
    run = tmp_path / "run"
    stage(run / "held-out", "pack_mmap.py", {}, {})
    (run / "held-out" / "manifest.json").write_text(json.dumps({"utf8_bytes": 4000, "tokens": 1000}))
    for method, first, second in (("mean", [3.0, 2.5], [2.4, 2.2, 2.0]), ("focus", [2.8, 2.3], [2.1, 1.9, 1.8])):
        stage(
            run / f"transplant@custom-{method}",
            "transplant_tokenizer.py",
            {"method": method, "model_name_or_path": "x"},
            {},
        )
        for seed in (1, 2):
            name = f"custom-{method}-s{seed}"
            training(run, f"embeddings@{name}", f"transplant@custom-{method}", 20_000, 5000, first, ["*embed_tokens*"])
            training(run, f"full@{name}", f"embeddings@{name}", 60_000, 15_000, second)
    for seed in (1, 2):
        training(run, f"control@base-s{seed}", "base", 80_000, 60_000, [2.6, 2.5])
        training(run, f"control@base-short-s{seed}", "base", 25_000, 18_000, [3.0])
    models = {"base": 6.0, "full@custom-mean-s1": 2.0, "full@custom-mean-s2": 2.1, "full@custom-focus-s1": 1.8}
    models |= {"full@custom-focus-s2": 1.9, "control@base-s1": 2.5, "control@base-s2": 2.4}
    models |= {"control@base-short-s1": 3.0, "control@base-short-s2": 3.0}
    evaluation(run, "bpb", models)
    evaluation(
        run, "bpb-english", {"base": 1.5, "control@base-s1": 2.0, "control@base-s2": 2.1, "full@custom-focus-s1": 3.0}
    )
    return run


def study(run, run_folder, *more, code=0):
    words = ("--run_dir", run_folder, "--output_dir", run_folder / "study", "--bpb", run_folder / "bpb")
    return run(PROGRAM, *words, "--base_language_bpb", run_folder / "bpb-english", *more, code=code)


def test_it_compares_tokenizers_initialisations_and_what_is_lost(run, run_folder):
    said = study(run, run_folder).stdout
    result = read_manifest(run_folder / "study")["result"]
    table = result["tokenizers"]
    assert list(table) == ["full@custom-mean", "full@custom-focus", "control@base", "control@base-short"]
    assert [f["at_equal"] for f in table.values()] == ["bytes", "bytes", "bytes", "compute"]
    best = table["full@custom-focus"]
    assert best["bits_per_byte"] == pytest.approx(1.85, rel=0.02)
    assert best["difference"] == pytest.approx(best["bits_per_byte"] - table["control@base"]["bits_per_byte"])
    low, high = best["difference_interval"]
    assert low < best["difference"] < high < 0
    assert best["utf8_bytes"] == 80_000 and best["steps"] == 50
    # layers 8·(8 + 8 + 8 + 8) + 3·8·16, head 512·8, attention 6·8·16; frozen layers have no gradients of their matrices
    assert best["flops"] == 5000 * (4 * 640 + 6 * 4096 + 768) + 15_000 * (6 * 640 + 6 * 4096 + 768)
    starts = result["initialisations"]
    # 2.0 bits per byte is between the evaluations at 30 (2.1) and 40 (1.9) steps, of 50
    assert starts["full@custom-focus"]["steps"] == pytest.approx([35, 35])
    assert starts["full@custom-focus"]["saved"] == pytest.approx(0.3)
    assert result["base_language"]["base"]["bits_per_byte"] == pytest.approx(1.5, rel=0.02)
    for words in ("focus needs 30% fewer steps", "full@custom-focus, 1.8", "At equal compute control@base-short has"):
        assert words in said
    assert (run_folder / "study" / "study.md").read_text() + "\n" == said


def test_the_report_shows_what_it_found(run, run_folder):
    study(run, run_folder)
    html = page("A study", run_folder, {run_folder / "study": read_manifest(run_folder / "study")}, None, None, {})
    for words in ("focus needs 30% fewer steps", "full@custom-mean", "<polyline", "bits per byte of its language"):
        assert words in html
    assert html.count("<table") == 4  # its three, and the manifest's


def test_without_the_control_it_says_which_groups_there_are(run, run_folder):
    done = study(run, run_folder, "--control", "control", code=2)
    assert done.stderr.startswith("error: control: control: ") and "full@custom-mean" in done.stderr
    assert not (run_folder / "study" / "manifest.json").exists()


def test_steps_to_a_value_are_found_between_two_evaluations():
    curve = [(10, 3.0), (20, 2.0), (30, 2.5), (40, 1.0)]
    assert steps_to(curve, 2.5) == 15
    assert steps_to(curve, 3.5) == 10
    assert steps_to(curve, 0.5) is None
    assert steps_to([], 1.0) is None


def test_names_that_differ_in_the_repetition_are_one_group():
    assert groups_of(["a-s1", "a-s12", "a", "b-s", "a-s1-x"]) == {
        "a": ["a-s1", "a-s12", "a"],
        "b-s": ["b-s"],
        "a-s1-x": ["a-s1-x"],
    }
