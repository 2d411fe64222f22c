"""The batch files: short, with options sbatch knows, nothing of one cluster in them, and they run what they say."""

import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from dilqur.pipeline.manifest import read_manifest
from dilqur.pipeline.rows import read_pipeline

FILES = sorted((ROOT / "slurm").glob("*.sbatch"))
OPTIONS = {
    "job-name",
    "nodes",
    "ntasks-per-node",
    "gres",
    "cpus-per-task",
    "exclusive",
    "time",
    "signal",
    "requeue",
    "open-mode",
    "output",
    "array",
}


def options(file):
    """{name: value, or None} of the #SBATCH lines."""
    found = re.findall(r"^#SBATCH (.*)$", file.read_text(), re.MULTILINE)
    return {name.removeprefix("--"): value or None for name, _, value in (line.partition("=") for line in found)}


def test_these_are_the_batch_files():
    assert [f.stem for f in FILES] == [
        "array_cpu",
        "check_nodes",
        "cpt_8b_p5",
        "cpt_p4d",
        "cpt_p5",
        "eval_1gpu",
        "mlm_h200",
        "prepare_cpu",
        "sft_1gpu",
    ]


@pytest.mark.parametrize("file", [f for f in FILES if f.stem not in ("array_cpu", "check_nodes")], ids=lambda f: f.stem)
class TestBatchFile:
    def test_is_25_lines_of_bash_at_most(self, file):
        assert len(file.read_text().splitlines()) <= 25
        assert file.read_text().startswith("#!/bin/bash\n"), "sbatch refuses a file without an interpreter"
        subprocess.run(["bash", "-n", file], check=True)

    def test_is_a_header_and_one_command(self, file):
        """sbatch reads no #SBATCH line after the first command."""
        lines = file.read_text().splitlines()
        commands = [line for line in lines if line and not line.startswith("#")]
        assert commands == [lines[-1]]
        command = re.fullmatch(r'exec slurm/lib/run_stages\.sh "\$\{1:-([\w.-]+)\}" (\w+) "\$\{@:2\}"', lines[-1])
        default, rows = command.groups()
        in_recipe = [row.batch for row in read_pipeline(ROOT / "recipes" / default)]
        assert rows in in_recipe, "`sbatch FILE` alone has something to run"

    def test_has_only_options_that_every_cluster_knows(self, file):
        """Account, partition, constraint and memory are the site's: SBATCH_* variables, or options before the file."""
        assert set(options(file)) <= OPTIONS
        assert options(file)["job-name"] == file.stem, "what run_stages.sh says to type"
        assert options(file)["output"] == "%x-%j.out", "into a folder that is not there, a job fails without a word"

    def test_is_stopped_in_time_and_goes_on(self, file):
        assert options(file)["signal"] == "B:USR1@300", "B: the batch shell gets it, which has the trap"
        assert "requeue" in options(file)
        assert options(file)["open-mode"] == "append", "a requeued job would begin its log anew"
        assert options(file)["ntasks-per-node"] == "1", "launch.sh starts the processes of a node"


def test_an_array_runs_the_parts_of_a_data_stage_and_the_stage_puts_them_together(made, tmp_path):
    file = ROOT / "slurm" / "array_cpu.sbatch"
    assert set(options(file)) <= OPTIONS and options(file)["array"] == "0-15"
    assert (
        file.read_text().splitlines()[-1]
        == 'exec slurm/lib/run_part.sh "${1:-llama3.2-1b-az}" "${2:-clean}" "${3:-16}"'
    )
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    for name in ("slurm", "data_tools", "dilqur"):
        (checkout / name).symlink_to(ROOT / name)
    recipe = checkout / "recipes" / "mine"
    recipe.mkdir(parents=True)
    (recipe / "pipeline.txt").write_text("clean data_tools/clean_corpus.py cpu\npack data_tools/pack_mmap.py cpu\n")
    (recipe / "clean.yaml").write_text(f"input: [{ROOT}/recipes/quickstart/corpus/az]\n")
    (recipe / "pack.yaml").write_text(f"tokenizer: {made}/tokenizer\ninput: [clean/train]\n")

    def part(*words, **environment):
        command = ["slurm/lib/run_part.sh", "mine", *words]
        return subprocess.run(command, cwd=checkout, capture_output=True, text=True, env={**os.environ, **environment})

    assert "which part?" in part("clean", "2").stderr
    for stage in ("clean", "pack"):
        for task in ("1", "0"):
            done = part(stage, "2", SLURM_ARRAY_TASK_ID=task)
            assert done.returncode == 0, done.stderr
        command = [sys.executable, "data_tools/" + {"clean": "clean_corpus", "pack": "pack_mmap"}[stage] + ".py"]
        subprocess.run(
            [*command, "--config", f"recipes/mine/{stage}.yaml"],
            cwd=checkout,
            check=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
    assert read_manifest(checkout / "runs" / "mine" / "pack")["documents"] == 170


def test_nodes_are_checked_with_options_that_every_cluster_knows():
    """What it finds is tests/slurm/test_preflight_on_slurm.py's."""
    file = ROOT / "slurm" / "check_nodes.sbatch"
    assert set(options(file)) <= OPTIONS and len(file.read_text().splitlines()) <= 25
    assert file.read_text().splitlines()[-1].endswith(' slurm/lib/launch.sh scripts/check_nodes.py "$@"')


def test_p4d_is_the_published_set_up():
    p4d = options(ROOT / "slurm" / "cpt_p4d.sbatch")
    assert (p4d["nodes"], p4d["gres"]) == ("2", "gpu:8")  # 16 A100
