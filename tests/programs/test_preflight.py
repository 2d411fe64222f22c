"""preflight.py: what would cost a GPU hour is a FAIL that says what to do, in a second and without torch."""

import fcntl
import importlib.util
import json
import os
import re
import shutil
import sys

import pytest
import yaml
from conftest import CORPUS, ROOT, TINY_LLAMA


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


@pytest.fixture
def model(tiny_model, tmp_path):
    """model(**changes) → a copy of tiny_model with these keys in its config.json"""

    def write(**changes):
        folder = shutil.copytree(tiny_model, tmp_path / "model")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))
        return folder

    return write


def failed(found):
    """The one check that failed, and what it says."""
    ((name, text),) = [(name, text) for name, (status, text) in found.items() if status == "FAIL"]
    return name, text


def test_a_good_recipe_passes_without_torch(run, recipe, tmp_path):
    done = run("scripts/preflight.py", recipe(), "--run_dir", tmp_path / "run", PYTHONPROFILEIMPORTTIME="1")
    assert not any(line.endswith("| torch") for line in done.stderr.splitlines()), "torch takes seconds"
    words = [line.split()[:3] for line in done.stdout.splitlines()]
    passed = ["recipe", "inputs", "shards", "model", "fit", "batch", "output", "space"]
    assert [["ok", "cpt", name] for name in passed] == [w for w in words if w[1] == "cpt"]
    assert not (tmp_path / "run").exists(), "it leaves nothing behind"


def test_one_recipe_is_checked_as_with_the_other_programs(run, recipe, tmp_path):
    file = recipe() / "cpt.yaml"
    here = ["--run_dir", tmp_path / "run"]
    said, same = (
        re.sub(r"\S+ GB free", "", run("scripts/preflight.py", *recipe, *here).stdout)  # others use the disk, too
        for recipe in (["--config", file], [file])
    )
    assert said == same and "ok       cpt  batch" in said


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


@pytest.mark.parametrize(
    ("row", "advice"),
    [
        ("cpt@b scripts/cpt.py prepare_cpu --seed 1", "the same run as cpt@a, key for key: change a flag of one"),
        ("cpt@b scripts/cpt.py prepare_cpu --sede 2", "did you mean --seed"),
        ("cpt@b scripts/cpt.py prepare_cpu --stage cpt@c", "stage: cpt@c: pipeline.txt calls it cpt@b"),
        ("ctp@b scripts/cpt.py prepare_cpu --seed 2", "ctp.yaml: no such file, and the stage ctp@b reads it; recipes"),
    ],
)
def test_a_mistake_in_the_row_of_a_variant(study, row, advice):
    lines, code = study("cpt@a scripts/cpt.py prepare_cpu --seed 1", row)
    ((stage, check, text),) = [line[1:] for line in lines if line[0] == "FAIL"]
    assert (stage, check, code) == (row.split()[0], "recipe", 2) and advice in text


def test_a_stage_that_cannot_name_a_folder(run, recipe):
    done = run("scripts/preflight.py", recipe(["cpt@a/b scripts/cpt.py prepare_cpu"]), code=2)
    assert "the stage cpt@a/b gives a folder its name: take letters, digits and . _ -" in done.stderr
    assert done.stderr.count("\n") == 1


# -- what FAILs -------------------------------------------------------------------------------------------------------


def test_shards_of_another_tokenizer(run, recipe, checks, tmp_path):
    words = ["--input", CORPUS / "az"]
    run("data_tools/train_tokenizer.py", *words, "--vocab_size", 500, "--output_dir", tmp_path / "other")
    run("data_tools/pack_mmap.py", *words, "--tokenizer", tmp_path / "other", "--output_dir", tmp_path / "packed")
    found, code = checks(recipe(datasets=[{"path": str(tmp_path / "packed")}]))
    name, text = failed(found)
    assert (name, code) == ("fit", 2) and "another tokenizer" in text and "pack again with the model's" in text


@pytest.mark.parametrize(
    ("config", "advice"),
    [
        ({"vocab_size": 1000}, "transplant the tokenizer first"),
        ({"pad_token_id": 1025}, "pad_token_id is eos_token_id (1025)"),
        ({"max_position_embeddings": 32}, "max_length 64 is more than the model's 32 positions"),
    ],
)
def test_a_model_that_does_not_fit_the_data(recipe, checks, model, config, advice):
    found, code = checks(recipe(model_name_or_path=str(model(**config))))
    name, text = failed(found)
    assert (name, code) == ("fit", 2) and advice in text


def test_a_global_batch_that_does_not_divide(recipe, checks):
    name, text = failed(checks(recipe(), "--num_processes", 3)[0])
    assert name == "batch" and "take 1, 2, 4 processes, or a global_batch_size of 6" in text


def test_the_number_of_processes_is_the_batch_file_s(recipe, checks):
    """cpt_p4d.sbatch asks for 2 nodes of 8 GPUs; without GPUs it is what slurm/launch.sh would start."""
    found, _ = checks(recipe(["cpt scripts/cpt.py cpt_p4d"], global_batch_size=224, per_device_train_batch_size=7))
    assert found["batch"] == ("ok", "224 = 7 a device × 2 accumulated × 16 processes")
    found, _ = checks(recipe(), DILQUR_NUM_PROCESSES="2")
    assert found["batch"] == ("ok", "4 = 2 a device × 1 accumulated × 2 processes")


@pytest.mark.parametrize(
    ("changes", "check", "advice"),
    [
        ({"model_name_or_path": "nowhere"}, "inputs", "model_name_or_path: nowhere: no such folder"),
        ({"model_name_or_path": "later"}, "inputs", "later is not above cpt in pipeline.txt: move its line up"),
        ({"model_name_or_path": "us/none"}, "inputs", "hf download us/none"),
        ({"learning_rat": 1.0}, "recipe", "did you mean learning_rate"),
        ({"max_steps": None}, "fit", "max_steps or num_train_epochs"),
        ({"unfrozen_parameters": ["*embedtokens*"]}, "space", "'*embedtokens*' matches no parameter"),
    ],
)
def test_a_mistake_in_the_recipe(recipe, checks, changes, check, advice):
    folder = recipe(["cpt scripts/cpt.py prepare_cpu", "later scripts/cpt.py prepare_cpu"], **changes)
    found, code = checks(folder)
    name, text = failed(found)
    assert (name, code) == (check, 2) and advice in text


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


def test_more_parameters_than_the_disk_has_room_for(recipe, checks, made):
    huge = {**yaml.safe_load(TINY_LLAMA), "hidden_size": 1 << 17, "num_hidden_layers": 1 << 10}  # 10¹³ weights and more
    found, _ = checks(recipe(model_name_or_path=None, model_config=huge, tokenizer=str(made / "tokenizer")))
    name, text = failed(found)
    assert name == "space" and "free some, or lower save_total_limit" in text


def test_files_that_were_cut_short_or_damaged(recipe, checks, made, model, tmp_path):
    shards, weights = shutil.copytree(made / "shards", tmp_path / "shards"), model() / "model.safetensors"
    folder = recipe(datasets=[{"path": str(shards)}], model_name_or_path=str(weights.parent))
    tokens = bytearray((shards / "tokens-00000.npy").read_bytes())
    tokens[-8] ^= 1
    (shards / "tokens-00000.npy").write_bytes(tokens)
    assert checks(folder)[1] == 0, "the same size: only --verify reads it"
    name, text = failed(checks(folder, "--verify", "true")[0])
    assert name == "shards" and "its checksum is not the one in manifest.json" in text and "pack again" in text
    os.truncate(shards / "tokens-00000.npy", len(tokens) - 4)
    assert failed(checks(folder)[0])[0] == "shards"
    (shards / "tokens-00000.npy").write_bytes(tokens)
    os.truncate(weights, weights.stat().st_size - 4)
    name, text = failed(checks(folder)[0])
    assert name == "model" and "its header says" in text


def test_a_folder_that_another_process_writes(recipe, checks, tmp_path):
    (tmp_path / "run" / "cpt").mkdir(parents=True)
    with (tmp_path / "run" / "cpt" / ".lock").open("w") as lock:
        print("process 7 on node01", file=lock, flush=True)
        fcntl.flock(lock, fcntl.LOCK_EX)
        name, text = failed(checks(recipe())[0])
    assert name == "output" and "process 7 on node01 is writing it now" in text


def test_a_fine_tuning_stage_whose_first_conversation_is_none(run, tiny_model, tmp_path):
    (tmp_path / "qa.jsonl").write_text('{"messages": [{"role": "user", "content": "Salam"}]}\n')
    (tmp_path / "pipeline.txt").write_text("sft scripts/sft.py prepare_cpu\n")
    recipe = {"model_name_or_path": str(tiny_model), "input": ["qa.jsonl"], "max_length": 64}
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(recipe))
    done = run("scripts/preflight.py", tmp_path, "--run_dir", tmp_path / "run", code=2)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("FAIL")]
    assert "qa.jsonl:1: the last message is not the assistant's" in line
    assert done.stderr.startswith("error: 1 of ") and done.stderr.count("\n") == 1


# -- the machine ------------------------------------------------------------------------------------------------------


def nvidia_smi(folder, *gpus):
    """A folder for PATH with an nvidia-smi that says this."""
    folder.mkdir()
    (folder / "nvidia-smi").write_text("#!/bin/sh\ncat <<'EOF'\n" + "\n".join(gpus) + "\nEOF\n")
    (folder / "nvidia-smi").chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def test_a_gpu_too_small_for_the_weights_and_the_optimizer(recipe, checks, tmp_path):
    path = nvidia_smi(tmp_path / "bin", "NVIDIA H200, 143771, 580.82.07, 9.0", "NVIDIA T4, 1, 580.82.07, 7.5")
    found, _ = checks(recipe(), "--num_processes", 1, PATH=path)
    # 16 bytes for each of 155,968 parameters are 2.5 MB, and the smaller GPU here has 1 MiB
    status, text = found["memory"]
    assert status == "FAIL" and text.startswith("2.5 MB a GPU") and "take more GPUs" in text
    assert checks(recipe(), "--num_processes", 4, PATH=path)[0]["memory"][0] == "ok"


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
    spec = importlib.util.spec_from_file_location("preflight", ROOT / "scripts" / "preflight.py")
    preflight = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "preflight", preflight)
    spec.loader.exec_module(preflight)
    monkeypatch.setattr(preflight.metadata, "version", lambda _: torch)
    gpu = {"name": "GPU", "bytes": 80 << 30, "driver": driver, "capability": capability}
    if advice is None:
        assert preflight.check_driver([gpu], True).startswith("1 × GPU")
        return
    with pytest.raises(preflight.InputError, match=advice):
        preflight.check_driver([gpu], True)
