"""preflight.py: in a second and without torch it checks what can be known of every stage. What FAILs: test_planted_mistakes.py."""

import json
import os
import re

import pytest
import yaml
from conftest import CORPUS, TINY_LLAMA

from dilqur.common.errors import InputError
from dilqur.preflight import machine


@pytest.fixture
def recipe(made, tiny_model, tmp_path):
    """recipe(stages=…, **changes) writes a recipe folder: `cpt` goes on with tiny_model, key for key as changed."""

    def write(stages=("cpt scripts/cpt.py prepare_cpu",), **changes):
        folder = tmp_path / "recipes" / "mini"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "pipeline.txt").write_text("\n".join(stages) + "\n")
        keys = {"model_name_or_path": str(tiny_model), "datasets": [{"path": str(made / "shards")}], "max_length": 64}
        keys |= {"global_batch_size": 4, "max_steps": 10, "learning_rate": 1e-3, **changes}
        (folder / "cpt.yaml").write_text(yaml.safe_dump({k: v for k, v in keys.items() if v is not None}))
        return folder

    return write


@pytest.fixture
def checks(run, tmp_path):
    """checks(recipe, *flags) → ({check: (status, text)} of the stage `cpt` and of the machine, exit code)"""

    def preflight(recipe, *flags, **environment):
        arguments = ["--run_dir", tmp_path / "run", "--json", *flags]
        done = run("scripts/preflight.py", recipe, *arguments, code=None, **environment)
        assert done.returncode in (0, 2), done.stderr
        lines = [line for line in json.loads(done.stdout)["checks"] if line["stage"] in ("", "cpt")]
        return {line["check"]: (line["status"], line["text"]) for line in lines}, done.returncode

    return preflight


def failed(found):
    """The one check that failed, and what it says."""
    ((name, text),) = [(name, text) for name, (status, text) in found.items() if status == "FAIL"]
    return name, text


def test_a_good_recipe_passes_without_torch(run, recipe, tmp_path):
    done = run("scripts/preflight.py", recipe(), "--run_dir", tmp_path / "run", PYTHONPROFILEIMPORTTIME="1")
    assert not any(line.endswith("| torch") for line in done.stderr.splitlines()), "torch takes seconds"
    words = [line.split()[:3] for line in done.stdout.splitlines()]
    passed = ["recipe", "inputs", "shards", "model", "fit", "batch", "output", "space", "files", "main_memory"]
    of_cpt = [w for w in words if w[1] == "cpt"]
    assert of_cpt == [*(["ok", "cpt", name] for name in passed), ["later", "cpt", "time"]]
    assert ["ok", "prepare_cpu.sbatch", "file"] in words
    assert not (tmp_path / "run").exists(), "it leaves nothing behind"


def test_one_recipe_is_checked_as_with_the_other_programs(run, recipe, tmp_path):
    file = recipe() / "cpt.yaml"
    here = ["--run_dir", tmp_path / "run"]
    others_use_the_disk_too = r"\S+ GB free|\S+ can be made"
    said, same = (
        re.sub(others_use_the_disk_too, "", run("scripts/preflight.py", *recipe, *here).stdout)
        for recipe in (["--config", file], [file])
    )
    assert said == same and re.search("ok +cpt +batch", said)


@pytest.fixture
def study(run, recipe, tmp_path):
    """study(*rows) → (the lines that preflight prints of these stages as (status, stage, check, text), exit code)"""

    def preflight(*rows, file=""):
        arguments = ["--run_dir", tmp_path / "run", "--json"]
        done = run("scripts/preflight.py", recipe(rows) / file, *arguments, code=None)
        assert done.returncode in (0, 2), done.stderr
        lines = [line for line in json.loads(done.stdout)["checks"] if line["stage"]]
        return [(line["status"], line["stage"], line["check"], line["text"]) for line in lines], done.returncode

    return preflight


def test_a_variant_is_the_recipe_with_its_row_s_flags_on_top(study):
    rows = ("cpt@big scripts/cpt.py prepare_cpu --global_batch_size 8", "cpt scripts/cpt.py prepare_cpu")
    lines, code = study(*rows)
    batches = {stage: text for _, stage, check, text in lines if check == "batch"}
    assert code == 0 and [text.split()[0] for text in batches.values()] == ["8", "4"]
    assert list(batches) == ["cpt@big", "cpt"]
    of_file, _ = study(*rows, file="cpt.yaml")
    assert [line[:3] for line in of_file] == [line[:3] for line in lines], "a recipe stands for its variants, too"


def test_a_stage_that_cannot_name_a_folder(run, recipe):
    done = run("scripts/preflight.py", recipe(["cpt@a/b scripts/cpt.py prepare_cpu"]), code=2)
    assert "the stage cpt@a/b gives a folder its name: take letters, digits and . _ -" in done.stderr
    assert done.stderr.count("\n") == 1


# -- what can be known before a run -----------------------------------------------------------------------------------


def test_the_number_of_processes_is_the_batch_file_s(recipe, checks):
    """cpt_p4d.sbatch asks for 2 nodes of 8 GPUs; without GPUs it is what slurm/lib/launch.sh would start."""
    found, _ = checks(recipe(["cpt scripts/cpt.py cpt_p4d"], global_batch_size=224, per_device_train_batch_size=7))
    assert found["batch"] == ("ok", "224 = 7 a device × 2 accumulated × 16 processes")
    found, _ = checks(recipe(), DILQUR_NUM_PROCESSES="2")
    assert found["batch"] == ("ok", "4 = 2 a device × 1 accumulated × 2 processes")


def test_a_stage_that_waits_for_another_is_checked_as_far_as_can_be(recipe, checks, made):
    folder = recipe(["base scripts/cpt.py prepare_cpu", "cpt scripts/cpt.py prepare_cpu"], model_name_or_path="base")
    keys = {"model_config": yaml.safe_load(TINY_LLAMA), "tokenizer": str(made / "tokenizer"), "max_length": 64}
    keys |= {
        "datasets": [{"path": str(made / "shards")}],
        "global_batch_size": 4,
        "max_steps": 10,
        "learning_rate": 0.1,
    }
    (folder / "base.yaml").write_text(yaml.safe_dump(keys))
    found, code = checks(folder, "--num_processes", 3)
    assert (found["inputs"], code) == (("later", "waits for base"), 2)
    assert found["fit"][0] == "later" and found["fit"][1].startswith("10 steps")
    assert failed({k: v for k, v in found.items() if v[0] != "later"})[0] == "batch"
    counted = json.loads((made / "tiny" / "manifest.json").read_text())["result"]["parameters"]
    assert f"about {counted:,} parameters, {counted:,} of them trained" in found["space"][1], "as torch counted them"


# -- the machine ------------------------------------------------------------------------------------------------------


def nvidia_smi(folder, *gpus):
    """A folder for PATH with an nvidia-smi that says this."""
    folder.mkdir()
    (folder / "nvidia-smi").write_text("#!/bin/sh\ncat <<'EOF'\n" + "\n".join(gpus) + "\nEOF\n")
    (folder / "nvidia-smi").chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def test_weights_and_optimizer_are_divided_among_the_processes(recipe, checks, tmp_path):
    path = nvidia_smi(tmp_path / "bin", "NVIDIA H200, 143771, 580.82.07, 9.0", "NVIDIA T4, 3, 580.82.07, 7.5")
    # 16 bytes for each of 155,968 parameters are 2.5 MB, and the smaller GPU here has 3 MiB
    status, text = checks(recipe(), "--num_processes", 1, PATH=path)[0]["memory"]
    assert status == "FAIL" and text.startswith("2.5 MB a GPU for weights, gradients and moments, about")
    status, text = checks(recipe(), "--num_processes", 4, PATH=path)[0]["memory"]
    assert status == "ok" and text.startswith("0.6 MB a GPU for weights, gradients and moments sharded over 4")
    ddp = {"PATH": path, "DILQUR_ACCELERATE_CONFIG": "accelerate_configs/ddp.yaml"}
    assert checks(recipe(), "--num_processes", 4, **ddp)[0]["memory"][1].startswith("2.5 MB a GPU")


def test_an_adapter_s_memory_is_the_planner_s(recipe, checks, tmp_path):
    """4 bytes for each of 155,968 frozen parameters, 16 for each of 131,072 of the adapter at rank 64."""
    conversations = {"datasets": None, "max_steps": None, "input": [str(CORPUS / "az_qa.jsonl")]}
    folder = recipe(["cpt scripts/sft.py sft_1gpu"], **conversations)
    small, large = (nvidia_smi(tmp_path / size, f"NVIDIA T4, {size}, 580.82.07, 7.5") for size in ("2", "4000"))
    status, text = checks(folder, PATH=large)[0]["memory"]
    assert status == "ok" and text.startswith("2.7 MB a GPU for weights, gradients and moments, about"), text
    status, text = checks(folder, PATH=small)[0]["memory"]
    assert status == "FAIL" and text.endswith("take a larger GPU, or bf16: true")


def test_an_earlier_start_says_how_far_apart_checkpoints_are(recipe, checks, tmp_path):
    (tmp_path / "run" / "cpt").mkdir(parents=True)
    steps = [{"step": n, "step_seconds": 2.0, "checkpoint_stall_seconds": 1.0} for n in range(1, 9)]
    (tmp_path / "run" / "cpt" / "metrics.jsonl").write_text("\n".join(map(json.dumps, steps)) + '\n{"st')
    status, text = checks(recipe())[0]["time"]
    assert status == "ok" and "every 500 steps, that is every 00:16:40 at 2 s a step; the job has 11:55:00" in text


@pytest.mark.parametrize(
    ("driver", "capability", "torch", "advice"),
    [
        (570, 9.0, "2.13.0", "driver 570 is too old for torch 2.13.0, which wants 580"),
        (570, 9.0, "2.13.0+cu128", None),
        (580, 7.5, "2.13.0", "no bfloat16"),
        (580, 9.0, "2.13.0+cpu", "without CUDA"),
        (580, 9.0, "2.13.0", None),
    ],
)
def test_a_driver_too_old_for_torch_or_a_gpu_without_bfloat16(monkeypatch, driver, capability, torch, advice):
    monkeypatch.setattr(machine.metadata, "version", lambda _: torch)
    gpu = {"name": "GPU", "bytes": 80 << 30, "driver": driver, "capability": capability}
    if advice is None:
        assert machine.check_driver([gpu], True).startswith("1 × GPU")
        return
    with pytest.raises(InputError, match=advice):
        machine.check_driver([gpu], True)
