"""The front door: the whole chain in a fresh copy of the tree, again, and every command line the programs open with."""

import ast
import json
import math
import re
import subprocess
import time

import pytest
from conftest import ENVIRONMENT, ROOT, run_pipeline, run_program, stage_result, train_less

PROGRAMS = sorted([*(ROOT / "data_tools").glob("*.py"), *(ROOT / "scripts").glob("*.py")])


@pytest.fixture(scope="module")
def quickstart(tree):
    """What `make quickstart` prints, of a part of the training: of the 41.5 steps that an epoch of cpt has, 20 and 21."""
    train_less(
        tree, "quickstart", "base", base=2, control=1, cpt_1_embeddings=0.48, cpt_2_full=0.5, sft=1, sft_control=0.3
    )
    return run_pipeline(tree, "quickstart").stdout


@pytest.fixture(scope="module")
def encoder(tree):
    """What `make quickstart-encoder` prints, of a part of the training."""
    train_less(tree, "quickstart-encoder", "mlm-1", mlm_1=90, mlm_2=15, kinds=1)
    return run_pipeline(tree, "quickstart-encoder").stdout


def result(tree, stage):
    return stage_result(tree, "quickstart", stage)


def test_it_ends_with_what_was_measured(tree, quickstart):
    fertility = result(tree, "fertility")["tokenizers"]
    assert fertility["tokenizer"]["fertility"] < fertility["tokenizer-base"]["fertility"], (
        "the new tokenizer needs fewer tokens per word"
    )
    bpb = {name: figures["bits_per_byte"] for name, figures in result(tree, "bpb")["models"].items()}
    assert bpb["cpt-2-full"] < bpb["cpt-1-embeddings"] < bpb["transplant"] < bpb["base"], "each stage helped"
    seen = {s: result(tree, s)["utf8_bytes_seen"] for s in ("cpt-1-embeddings", "cpt-2-full", "control")}
    # 1 %: a whole number of steps is not exactly a whole number of epochs
    assert seen["cpt-1-embeddings"] + seen["cpt-2-full"] == pytest.approx(seen["control"], rel=0.01), "equal bytes seen"
    assert result(tree, "sft")["loss"] < result(tree, "sft")["loss_first"]
    tail = quickstart[-3000:]
    assert f"{bpb['cpt-2-full']:.3f}" in tail and f"{bpb['control']:.3f}" in tail and "report.html" in tail
    page = (tree / "runs" / "quickstart" / "report" / "report.html").read_text()
    assert f"{bpb['cpt-2-full']:.3f}" in page


def test_the_second_time_every_stage_says_it_is_finished(tree, quickstart):
    started = time.monotonic()
    done = run_pipeline(tree, "quickstart")
    stages = [
        line.split()[0]
        for line in (tree / "recipes/quickstart/pipeline.txt").read_text().splitlines()
        if line and line[0] != "#"
    ]
    assert done.stdout.count("nothing to do") == len(stages)
    assert time.monotonic() - started < 60, "the second run only looks: 6 s on 2 free cores"


def test_the_encoders_chain_ends_with_a_model_that_transformers_loads_and_that_learned(tree, encoder):
    from transformers import AutoModelForMaskedLM

    lines = (tree / "runs/quickstart-encoder/mlm-1/metrics.jsonl").read_text().splitlines()
    first, last = json.loads(lines[0]), json.loads(lines[-1])
    assert first["loss"] == pytest.approx(math.log(2048), rel=0.05), "it knows nothing"  # begun larger than published
    assert last["eval_loss"] < first["loss"] - 1
    longer = stage_result(tree, "quickstart-encoder", "mlm-2")
    assert longer["eval_loss"] < last["eval_loss"] + 0.2, "the second phase goes on from there"
    model = AutoModelForMaskedLM.from_pretrained(tree / "runs/quickstart-encoder/mlm-2/model")
    assert model.config.max_position_embeddings == 256


def commands_of(program):
    doc = ast.get_docstring(ast.parse(program.read_text()), clean=False)
    doc = doc.replace("\\\n", "")  # a backslash: the command goes on in the next line
    return [
        line.strip()
        for line in doc.splitlines()
        if line.startswith("    ") and line.split()[0] in ("python", "accelerate", "sbatch")
    ]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: p.stem)
def test_the_command_lines_a_program_opens_with_run_as_pasted(program, tree, quickstart, encoder):
    commands = commands_of(program)
    assert commands
    for command in commands:
        # no Slurm here: the batch file is there and parses
        command = re.sub("^sbatch (--[^ ]+ )*", "bash -n ", command)
        if file := re.match(r"python (\w+/\w+\.py)\b", command):
            # the words that bash makes of it, without the imports
            asked = ["bash", "-c", f"printf '%s\\0' {command}"]
            words = subprocess.run(asked, cwd=tree, capture_output=True, text=True, check=True).stdout.split("\0")
            run_program(file[1], *words[2:-1], cwd=tree)
            continue
        done = subprocess.run(["bash", "-c", command], cwd=tree, env=ENVIRONMENT, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
