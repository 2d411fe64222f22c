"""Every program: says what it does, answers in a blink, and its own command lines name files that exist."""

import ast
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from dilqur.pipeline.rows import read_pipeline

PROGRAMS = sorted(str(p.relative_to(ROOT)) for p in [*ROOT.glob("data_tools/*.py"), *ROOT.glob("scripts/*.py")])
FOLDERS = ("data_tools/", "scripts/", "recipes/", "accelerate_configs/", "slurm/")
QUICKSTART = ROOT / "recipes" / "quickstart"


def without_torch(program, *arguments):
    """Run it; returns (exit code, output). Fails if torch was imported: that costs seconds before the first word."""
    command = [sys.executable, "-X", "importtime", program, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    timed, said = [], []
    for line in done.stderr.splitlines():
        (timed if line.startswith("import time:") else said).append(line)
    assert "torch" not in {line.rpartition("|")[2].strip() for line in timed}, f"{program} imports torch"
    return done.returncode, done.stdout + "\n".join(said)


def docstring(program):
    return ast.get_docstring(ast.parse((ROOT / program).read_text(encoding="utf-8")))


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_shows_the_docstring_and_the_flags_all_programs_have(program):
    code, said = without_torch(program, "--help")
    assert code == 0 and docstring(program) in said
    assert "--config RECIPE.yaml" in said and "--check" in said


@pytest.mark.parametrize("program", PROGRAMS)
def test_its_docstring_says_what_it_does_and_its_commands_name_files_that_exist(program):
    paragraphs = docstring(program).split("\n\n")
    assert re.fullmatch(r"[A-Z].{30,}[.:]", paragraphs[0].replace("\n", " "))
    commands = re.findall(r"^    (\S.*)", paragraphs[1], re.MULTILINE)
    assert any(program in command for command in commands)
    named = [word for command in commands for word in re.findall(r"[\w./-]+", command)]
    assert [word for word in named if word.startswith(FOLDERS) and not (ROOT / word).exists()] == []


@pytest.mark.skipif(not QUICKSTART.joinpath("pipeline.txt").exists(), reason="no quickstart recipe here")
def test_every_stage_of_the_quickstart_is_checked_without_torch(run, tmp_path):
    """The stages that make data are run, so that those after them find it; the others wait for a model."""
    made = set()
    for row in read_pipeline(QUICKSTART):
        arguments = [*row.arguments(QUICKSTART), "--run_dir", tmp_path]
        code, said = without_torch(row.program, *arguments, "--check")
        if missing := re.search(r"the stage (\S+) has not finished", said):
            assert code == 2 and missing[1] not in made
            continue
        assert (code, said.strip()) == (0, f"{row.name}: ok")
        if row.program.startswith("data_tools/"):
            run(row.program, *arguments)
            made.add(row.name)
    assert {"clean", "tokenizer", "pack"} <= made
