"""A second language, in another script, by configuration only: the quickstart in Hindi."""

import pytest
import yaml
from conftest import ROOT, run_program, stage_result, train_less
from test_recipes import load

from dilqur.pipeline.rows import read_pipeline

FIRST, SECOND = ROOT / "recipes" / "quickstart", ROOT / "recipes" / "quickstart-hi"
DOCUMENTS = 99


@pytest.fixture(scope="module")
def output(tree):
    """Of all stages but those whose language nothing here looks at: fine-tuning and generations."""
    table = tree / "recipes" / SECOND.name / "pipeline.txt"
    rows = table.read_text().splitlines(keepends=True)
    table.write_text("".join(row for row in rows if row.split()[0] not in ("sft", "sft-control", "compare")))
    for stage in ("sft", "sft-control", "compare"):
        (table.parent / f"{stage}.yaml").unlink()
    train_less(tree, SECOND.name, "base", base=2, control=2, cpt_1_embeddings=1, cpt_2_full=1)
    recipes = f"recipes/{SECOND.name}"
    return "".join(run_program(r.program, *r.arguments(recipes), cwd=tree).stdout for r in read_pipeline(table.parent))


def result(tree, stage):
    return stage_result(tree, SECOND.name, stage)


def test_the_stages_are_the_same_to_the_byte():
    assert (SECOND / "pipeline.txt").read_bytes() == (FIRST / "pipeline.txt").read_bytes()


def test_it_is_configuration_and_text_alone():
    """No code in the folder, no code that names it, and of the first recipe other values in these keys only."""
    assert {path.suffix for path in SECOND.rglob("*") if path.is_file()} == {".yaml", ".txt", ".jsonl", ".md"}
    for folder in ("dilqur", "data_tools", "scripts", "slurm"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".sh", ".sbatch"):
                assert SECOND.name not in path.read_text(encoding="utf-8"), path
    differing = {}
    for file in sorted(FIRST.glob("*.yaml")):
        one, other = load(FIRST.name, file.stem), load(SECOND.name, file.stem)
        if keys := sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key)):
            differing[file.stem] = keys
    assert differing == {
        "clean": ["input", "language"],
        "cpt-1-embeddings": [
            "global_batch_size",
            "per_device_train_batch_size",
        ],  # as many bytes per step as the control's
        "cpt-2-full": ["global_batch_size", "per_device_train_batch_size"],
        "fertility": ["parallel", "sample_words"],
        "pack-base": ["input"],
        "report": ["title"],
        "sft": ["input"],
        "sft-control": ["input"],
        "tokenizer": ["pre_tokenizer"],
        "tokenizer-base": ["input"],
    }


@pytest.mark.long
def test_cleaning_drops_none_of_its_documents(tree, output):
    cleaned = result(tree, "clean")
    assert cleaned["dropped"] == {} and cleaned["kept_train"] + cleaned["kept_validation"] == DOCUMENTS
    assert cleaned["kept_validation"] >= DOCUMENTS / 20, "enough are held out to measure by"


@pytest.mark.long
def test_its_tokenizer_needs_a_sixth_of_the_tokens(tree, output):
    measured = result(tree, "fertility")
    base, own = (measured["tokenizers"][name] for name in ("tokenizer-base", "tokenizer"))
    assert base["bytes_per_token"] < 1.05, "to the English tokenizer Devanagari is bytes, three a character"
    assert own["fertility"] < base["fertility"] / 6  # 12.12 and 1.61
    assert own["bytes_per_token"] > 6


@pytest.mark.long
def test_the_model_reads_better_than_its_control_on_the_same_bytes(tree, output):
    bpb = {name: figures["bits_per_byte"] for name, figures in result(tree, "bpb")["models"].items()}
    assert bpb["cpt-2-full"] < bpb["cpt-1-embeddings"] < bpb["transplant"] < bpb["base"], "each stage helped"
    assert bpb["cpt-2-full"] < bpb["control"]
    seen = {s: result(tree, s)["utf8_bytes_seen"] for s in ("cpt-1-embeddings", "cpt-2-full", "control")}
    # 2 %: a whole number of steps is not exactly a whole number of epochs
    assert seen["cpt-1-embeddings"] + seen["cpt-2-full"] == pytest.approx(seen["control"], rel=0.02), "equal bytes seen"
    assert f"{bpb['cpt-2-full']:.3f} cpt-2-full" in output and f"{bpb['control']:.3f} control" in output


@pytest.mark.long
def test_every_sample_word_is_whole_in_the_report(tree, output):
    words = yaml.safe_load((SECOND / "fertility.yaml").read_text())["sample_words"]
    page = (tree / "runs" / SECOND.name / "report" / "report.html").read_text(encoding="utf-8")
    assert all(f">{word}<" in page for word in words), "with their vowel signs"
