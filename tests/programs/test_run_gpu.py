"""benchmarks/run_gpu.sh: what fails is named at the end and ends nothing else, and what was measured is packed, whatever happens."""

import json
import os
import re
import signal
import subprocess
import tarfile
import time

import pytest
from conftest import ENVIRONMENT, ROOT

COMMAND = ROOT / "benchmarks" / "run_gpu.sh"
ROWS = """recipe: recipes/llama3.2-1b-az/cpt-2-full.yaml
keys: {bf16: false, use_liger_kernel: false}
variants:
"""


def run_gpu(*flags, cwd="/", **environment):
    variables = {**os.environ, **ENVIRONMENT, **environment}
    return subprocess.run([COMMAND, *map(str, flags)], env=variables, capture_output=True, text=True, cwd=cwd)


@pytest.fixture
def grid(tmp_path):
    """Write a grid of these rows into the folder of the test; returns its name."""

    def write(name, *rows):
        (tmp_path / name).write_text(ROWS + "".join(f"  - {row}\n" for row in rows))
        return name

    return write


def packed(folder):
    """{name: text} of what was packed."""
    (archive,) = folder.glob("benchmark-*.tar.gz")
    with tarfile.open(archive) as tar:
        return {m.name.removeprefix("./"): tar.extractfile(m).read().decode() for m in tar.getmembers()}


def test_a_planted_test_and_a_planted_row_fail_and_all_else_is_measured_and_packed(tmp_path, grid):
    (tmp_path / "test_planted.py").write_text("def test_good(): pass\n\ndef test_planted(): assert 1 == 2\n")
    none = grid("none.yaml", "plain: {no_such_key: 1}")
    rows = grid(
        "rows.yaml",
        "no package: {attn_implementation: flash_attention_2}",
        "bad: {unfrozen_parameters: [no_such*]}",
        "plain: {}",
    )
    flags = ("--toy", "--grids", f"{none},{rows}", "--tests", "test_planted.py", "--output_dir", "out")
    done = run_gpu(*flags, cwd=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(r"^about \d+ min: none 0, rows 1$", done.stdout, re.M), "it says before how long it takes"
    end = done.stdout.partition("\nFAILED: ")
    failures = [line.removeprefix("FAILED: ") for line in (end[1] + end[2]).splitlines() if line.startswith("FAILED: ")]
    # pytest names a test by its folder, too, where that is below its own root
    assert [re.sub(r"^test \S*(?=test_planted::)", "test ", line.partition(": error")[0]) for line in failures] == [
        "grid none-1: exit code 2",
        "test test_planted::test_planted: assert 1 == 2",
        "row rows-1: bad",
    ]
    assert "no_such*" in failures[2]
    assert "left out: row rows-1: no package: error: attn_implementation: flash_attention_2" in done.stdout
    files = packed(tmp_path / "out")
    rows = json.loads(files["rows-1/benchmark.json"])["variants"]
    assert rows["plain"]["figures"]["tokens_per_second"]["median"] > 0 and rows["plain"]["problem"] is None
    assert "| plain |" in files["rows-1/benchmark.md"]
    assert "test_good" in files["gpu-tests.xml"] and "ok " in files["check_nodes.txt"]
    assert "no_such*" in files["rows-1/runs/bad-round-1.log"], "the log of what failed"
    assert all(f"FAILED: {line}" in files["summary.txt"] for line in failures)


def test_what_was_measured_is_packed_when_it_is_interrupted(tmp_path, grid):
    (tmp_path / "test_good.py").write_text("def test_good(): pass\n")
    name = grid("grid.yaml", "plain: {}", "second: {loss_kernel: chunked}", "third: {optim: adamw_torch_fused}")
    command = [COMMAND, "--toy", "--grids", name, "--tests", "test_good.py", "--output_dir", "out"]
    log = tmp_path / "log"
    with log.open("w") as out:
        process = subprocess.Popen(command, env=ENVIRONMENT, cwd=tmp_path, stdout=out, stderr=out)
        until = time.monotonic() + 120
        while "plain-round-1: 4 steps" not in log.read_text() and time.monotonic() < until:
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM, log.read_text()
    rows = json.loads(packed(tmp_path / "out")["grid-1/benchmark.json"])["variants"]
    assert rows["plain"]["figures"] and rows["third"]["left_out"] == [["round 1", "interrupted"]]
    said = log.read_text()
    assert "left out: row grid-1: third: interrupted" in said and "FAILED" not in said


def test_it_prints_its_commands_and_refuses_what_it_cannot_do(tmp_path):
    done = run_gpu("--dry-run", "--gpus", "8", "--largest")
    assert done.returncode == 0 and done.stderr == ""
    commands = [line for line in done.stdout.splitlines() if line.startswith("+ ")]
    assert "check_nodes.py --num_processes 8" in commands[0] and "test_kernel_parity.py" in commands[1]
    assert all("--largest_batch" in c and "ddp.yaml" in c for c in commands if "benchmark.py" in c)
    for flags in (("--gpus", "many"), ("--gpu",), ("--minutes", "0"), ("--grids", "none")):
        assert run_gpu("--dry-run", *flags).returncode == 2


def test_of_so_many_minutes_each_grid_has_half_of_what_is_left_and_the_tests_come_last():
    commands = [line for line in run_gpu("--dry-run", "--minutes", 60).stdout.splitlines() if line.startswith("+ ")]
    grids = [dict(re.findall(r"--(\w+) (\S+)", line)) for line in commands if "benchmark.py" in line]
    assert len(grids) == 4 and all(29 < float(g["max_minutes"]) < 60 < float(g["cut_minutes"]) + 1 for g in grids[:3])
    assert grids[3]["max_minutes"] >= grids[3]["cut_minutes"], "the last may take the rest"
    assert "pytest" in commands[-1] and "timeout" in commands[-1]


def test_the_first_rows_of_the_grids_are_those_worth_most():
    import yaml

    def first(name, number):
        grid = yaml.safe_load((ROOT / "benchmarks" / "grids" / f"{name}.yaml").read_text())
        return [next(iter(variant)) for variant in grid["variants"][:number]]

    assert first("llama-1b", 4) == ["published", "trainer", "loss of liger, compiled", "embeddings only"]
    assert first("neobert-1024", 2) == first("neobert-4096", 2) == ["published", "auto"]


def test_without_what_the_tests_need_they_are_left_out(tmp_path):
    (tmp_path / "hypothesis.py").write_text("raise ImportError('none')\n")
    done = run_gpu("--dry-run", "--toy", "--grids", "llama-1b-131072", PYTHONPATH=str(tmp_path))
    assert (
        done.returncode == 0 and "the tests of kernels are left out: pip install -r requirements-dev.txt" in done.stdout
    )
    assert "pytest" not in "".join(line for line in done.stdout.splitlines() if line.startswith("+ "))
