"""compare_generations.py: the same prompts for all, side by side, and a figure for repetition."""

import json
import sys

from conftest import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
from compare_generations import repetition


def test_repetition_is_the_share_of_4_grams_said_before():
    assert repetition("bir iki üç dörd beş altı") == 0
    assert repetition("a b c d a b c d") == 1 - 4 / 5, "five 4-grams, one of them twice"
    assert repetition("çox qısa") == 0


def test_side_by_side(run, tiny_model, made, tmp_path):
    (tmp_path / "prompts.txt").write_text("Bakı\nSalam, necəsən?\n")
    run(
        "scripts/compare_generations.py",
        "--model_name_or_path",
        tiny_model,
        "--chat_models",
        "tiny",
        "--input",
        tmp_path / "prompts.txt",
        "--max_new_tokens",
        4,
        "--output_dir",
        tmp_path / "out",
    )
    rows = [json.loads(line) for line in (tmp_path / "out" / "generations.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["Bakı", "Salam, necəsən?"]
    assert all(0 < row["answers"]["tiny"]["tokens"] <= 4 for row in rows)
    page = (tmp_path / "out" / "generations.md").read_text()
    assert "## Bakı" in page and "**tiny**" in page
    done = run(
        "scripts/compare_generations.py",
        "--model_name_or_path",
        tiny_model,
        "--input",
        tmp_path / "prompts.txt",
        "--chat_models",
        "sft",
        "--output_dir",
        tmp_path / "x",
        "--check",
        code=2,
    )
    assert "sft is not among the models (tiny)" in done.stderr
