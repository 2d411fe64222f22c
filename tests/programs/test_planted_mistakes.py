"""preflight.py finds what would cost a GPU hour: each of these mistakes, planted into a good recipe and a good site one at a time, is a
FAIL of the right check of the right stage, with a line that says what to do.

`pytest tests/programs/test_planted_mistakes.py -s` shows the lines, and how many were found; those that need a Slurm are in
tests/slurm/test_preflight_on_slurm.py.
"""

import contextlib
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import yaml
from conftest import CORPUS, ROOT, TINY_LLAMA, WITHOUT_ROOTS_RIGHTS, fork_server

MODULE_ROW = "cpt scripts/cpt.py prepare_cpu"
A_70B = {
    **yaml.safe_load(TINY_LLAMA),
    "vocab_size": 128256,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
}
found = []


class Site:
    """A checkout whose recipes/mini has a good stage `cpt`, which goes on with the model `model` on the token shards `shards`."""

    def __init__(self, root, made, model):
        self.root, self.made, self.model, self.stage = root, made, model, "cpt"
        self.flags, self.environment, self.prefix, self.until_it_ran = [], {}, [], contextlib.ExitStack()
        for name in ("recipes", "runs", "slurm", "model", "shards", "bin"):
            shutil.rmtree(root / name, ignore_errors=True)
        shutil.copytree(ROOT / "slurm", root / "slurm", ignore=shutil.ignore_patterns("site.env"))
        shutil.copy(ROOT / "requirements.txt", root)
        (root / "recipes" / "mini").mkdir(parents=True)
        self.rows(MODULE_ROW)
        keys = {"model_name_or_path": str(model), "datasets": [{"path": str(made / "shards")}], "max_length": 64}
        self.recipe = {**keys, "global_batch_size": 4, "max_steps": 10, "learning_rate": 1e-3}
        self.keys()

    def rows(self, *rows):
        (self.root / "recipes" / "mini" / "pipeline.txt").write_text("\n".join(rows) + "\n")

    def keys(self, **changes):
        """Change keys of cpt.yaml; None takes one out."""
        self.recipe = {k: v for k, v in {**self.recipe, **changes}.items() if v is not None}
        self.write("recipes/mini/cpt.yaml", yaml.safe_dump(self.recipe))

    def write(self, name, text):
        (self.root / name).parent.mkdir(parents=True, exist_ok=True)
        (self.root / name).write_text(text)
        return self.root / name

    def own_model(self, **changes):
        """A copy of the model with these keys in its config."""
        folder = shutil.copytree(self.model, self.root / "model")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))
        self.keys(model_name_or_path="model")
        return folder

    def own_shards(self):
        self.keys(datasets=[{"path": "shards"}])
        return shutil.copytree(self.made / "shards", self.root / "shards")

    def batch_file(self, name, change, into):
        """Change lines of a batch file."""
        file = self.root / "slurm" / f"{name}.sbatch"
        file.write_text(re.sub(change, into, file.read_text(), flags=re.M))
        self.rows(f"cpt scripts/cpt.py {name}")

    def nvidia_smi(self, *gpus):
        program = self.write("bin/nvidia-smi", "#!/bin/sh\ncat <<'EOF'\n" + "\n".join(gpus) + "\nEOF\n")
        program.chmod(0o755)
        self.environment["PATH"] = f"{program.parent}:{os.environ['PATH']}"

    def steps_made(self, seconds):
        """As an earlier start leaves them."""
        lines = [json.dumps({"step": step, "step_seconds": seconds}) for step in (1, 2, 3)]
        self.write("runs/mini/cpt/metrics.jsonl", "\n".join(lines) + "\n")

    def preflight(self):
        """[(status, stage or "", check, text)] of a run of preflight.py, and its exit code."""
        unset = {name: None for name in os.environ if name.startswith(("SLURM", "SBATCH", "DILQUR"))}
        environment = {**unset, "PYTHONPATH": str(self.root), **self.environment}
        words = ["recipes/mini", "--json", *self.flags]
        with self.until_it_ran:
            if self.prefix:
                command = [*self.prefix, sys.executable, "scripts/preflight.py", *words]
                set_here = {k: v for k, v in {**os.environ, **environment}.items() if v is not None}
                done = subprocess.run(command, cwd=self.root, env=set_here, capture_output=True, text=True)
            else:
                done = fork_server().run(
                    self.root / "scripts" / "preflight.py", words, cwd=str(self.root), **environment
                )
        assert done.returncode in (0, 2) and done.stdout, done.stderr
        lines = json.loads(done.stdout)["checks"]
        return [(line["status"], line["stage"], line["check"], line["text"]) for line in lines], done.returncode


# -- the recipe -------------------------------------------------------------------------------------------------------


def a_key_that_does_not_exist(site):
    site.keys(learning_rat=1.0)
    return "recipe", "did you mean learning_rate"


def a_word_for_a_number(site):
    site.keys(learning_rate="fast")
    return "recipe", "learning_rate"


def a_key_twice(site):
    with (site.root / "recipes/mini/cpt.yaml").open("a") as file:
        file.write("max_steps: 20\n")
    return "recipe", "max_steps is already set in line"


def a_program_that_does_not_exist(site):
    site.rows("cpt scripts/ctp.py prepare_cpu")
    return "recipe", "ctp.py: no such program; pipeline.txt gives it to cpt"


def a_program_that_makes_no_stage(site):
    site.rows("cpt scripts/preflight.py prepare_cpu")
    return "recipe", "makes no stage: correct the row of"


def a_recipe_that_is_not_there(site):
    site.rows("ctp scripts/cpt.py prepare_cpu")
    site.stage = "ctp"
    return "recipe", "ctp.yaml: no such file, and the stage ctp reads it; recipes there: cpt"


def a_variant_that_is_another_one(site):
    site.rows("cpt@a scripts/cpt.py prepare_cpu --seed 1", "cpt@b scripts/cpt.py prepare_cpu --seed 1")
    site.stage = "cpt@b"
    return "recipe", "the same run as cpt@a, key for key: change a flag of one"


def a_variant_s_flag_that_does_not_exist(site):
    site.rows("cpt@a scripts/cpt.py prepare_cpu --sede 2")
    site.stage = "cpt@a"
    return "recipe", "did you mean --seed"


def a_variant_with_another_s_name(site):
    site.rows("cpt@a scripts/cpt.py prepare_cpu --stage cpt@b")
    site.stage = "cpt@a"
    return "recipe", "stage: cpt@b: pipeline.txt calls it cpt@a"


# -- what it reads ----------------------------------------------------------------------------------------------------


def a_stage_that_comes_later(site):
    site.keys(model_name_or_path="later")
    site.rows(MODULE_ROW, "later scripts/cpt.py prepare_cpu")
    return "inputs", "later is not above cpt in pipeline.txt: move its line up"


def a_model_that_is_not_there(site):
    site.keys(model_name_or_path="nowhere")
    return "inputs", "model_name_or_path: nowhere: no such folder"


def a_model_that_was_not_fetched(site):
    site.keys(model_name_or_path="us/none")
    return "inputs", "hf download us/none"


def shards_that_are_not_there(site):
    site.keys(datasets=[{"path": "data/packed"}])
    return "inputs", "data/packed: no manifest.json"


def a_model_that_may_not_be_read(site):
    folder = site.own_model()
    folder.chmod(0)
    site.until_it_ran.callback(folder.chmod, 0o755)
    site.prefix = WITHOUT_ROOTS_RIGHTS
    return "inputs", "permission denied: look at the permissions"


def a_shard_cut_short(site):
    tokens = site.own_shards() / "tokens-00000.npy"
    os.truncate(tokens, tokens.stat().st_size - 4)
    return "shards", "pack again"


def a_flipped_bit_in_a_shard(site):
    file = site.own_shards() / "tokens-00000.npy"
    tokens = bytearray(file.read_bytes())
    tokens[-8] ^= 1
    file.write_bytes(tokens)
    assert site.preflight()[1] == 0, "the same size: only --verify reads it"
    site.flags += ["--verify", "true"]
    return "shards", "its checksum is not the one in manifest.json"


def weights_cut_short(site):
    weights = site.own_model() / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 4)
    return "model", "its header says"


def weights_that_are_missing(site):
    (site.own_model() / "model.safetensors").unlink()
    return "model", "no weights in it (no .safetensors); fetch the model again"


def a_conversation_without_an_answer(site):
    site.write("qa.jsonl", '{"messages": [{"role": "user", "content": "Salam"}]}\n')
    site.write(
        "recipes/mini/sft.yaml",
        yaml.safe_dump({"model_name_or_path": str(site.model), "input": ["qa.jsonl"], "max_length": 64}),
    )
    site.rows("sft scripts/sft.py prepare_cpu")
    site.stage = "sft"
    return "conversations", "qa.jsonl:1: the last message is not the assistant's"


# -- what belongs together --------------------------------------------------------------------------------------------


def shards_of_another_tokenizer(site):
    site.keys(datasets=[{"path": str(site.made / "packed-by-another")}])
    return "fit", "another tokenizer than the one in"


def a_model_with_too_few_rows(site):
    site.own_model(vocab_size=1000)
    return "fit", "transplant the tokenizer first"


def padding_that_is_the_end_of_text(site):
    site.own_model(pad_token_id=1025)
    return "fit", "pad_token_id is eos_token_id (1025)"


def samples_longer_than_the_model(site):
    site.own_model(max_position_embeddings=32)
    return "fit", "max_length 64 is more than the 32 positions of"


def a_run_without_an_end(site):
    site.keys(max_steps=None)
    return "fit", "max_steps or num_train_epochs"


def a_warm_up_longer_than_the_run(site):
    site.keys(warmup_steps=10)
    return "fit", "warmup_steps 10 leaves none of the 10 steps"


def a_mirror_that_cannot_be(site):
    site.keys(mirror_to="s4://bucket")
    return "fit", "mirror_to"


def a_strategy_that_does_not_exist(site):
    site.rows("cpt scripts/cpt.py cpt_p5")
    site.keys(global_batch_size=8)
    site.environment["DILQUR_ACCELERATE_CONFIG"] = "accelerate_configs/zero9.yaml"
    return "strategy", "zero9.yaml: no such file; in accelerate_configs/ there are: ddp, fsdp2"


def bfloat16_under_zero(site):
    site.rows("cpt scripts/cpt.py cpt_p5")
    site.keys(global_batch_size=8, dtype="bfloat16")
    site.environment["DILQUR_ACCELERATE_CONFIG"] = "accelerate_configs/zero2.yaml"
    return "strategy", "DeepSpeed keeps fp32 master weights; take ddp.yaml or fsdp2.yaml"


def a_recipe_for_another_number_of_gpus(site):
    site.rows("cpt scripts/cpt.py cpt_p4d")
    return "batch", "take 1, 2, 4 processes, or a global_batch_size of 16"


def a_batch_that_three_gpus_cannot_share(site):
    site.flags += ["--num_processes", "3"]
    return "batch", "take 1, 2, 4 processes, or a global_batch_size of 6"


def a_pattern_that_matches_nothing(site):
    site.keys(unfrozen_parameters=["*embedtokens*"])
    return "space", "'*embedtokens*' matches no parameter"


# -- room -------------------------------------------------------------------------------------------------------------


def a_folder_that_another_process_writes(site):
    lock = site.until_it_ran.enter_context(site.write("runs/mini/cpt/.lock", "process 7 on node01").open())
    fcntl.flock(lock, fcntl.LOCK_EX)
    return "output", "process 7 on node01 is writing it now"


def a_folder_that_may_not_be_written(site):
    site.write("runs/mini/x", "").parent.chmod(0o555)
    site.prefix = WITHOUT_ROOTS_RIGHTS
    return "output", "cannot be written to: choose another --run_dir"


def a_file_where_the_folder_should_be(site):
    site.write("runs", "")
    site.until_it_ran.callback((site.root / "runs").unlink)
    return "output", "is no folder"


def in_a_file_system_of(site, options):
    """runs/ is another file system, as long as preflight runs."""
    if os.geteuid():
        pytest.skip("mounting needs root")
    (site.root / "runs").mkdir()
    mount = f'mount -t tmpfs -o {options} tmpfs runs && exec "$@"'
    site.prefix = ["unshare", "--mount", "sh", "-c", mount, "-"]


def a_disk_that_is_too_small(site):
    in_a_file_system_of(site, "size=1m")
    return "space", "free some, or lower save_total_limit"


def a_disk_without_inodes(site):
    in_a_file_system_of(site, "nr_inodes=10")
    return "files", "more files can be made there"


def a_micro_batch_too_large_for_the_gpu(site):
    site.rows(
        "cpt scripts/cpt.py cpt_p4d"
    )  # 40 GB: a token of this model keeps some 18 kB, and there are 64 in a sample
    site.keys(global_batch_size=16 * 50_000, per_device_train_batch_size=50_000)
    return "memory", "take per_device_train_batch_size: "


def a_model_too_large_for_its_gpus(site):
    site.rows("cpt scripts/cpt.py cpt_p5")
    site.keys(model_name_or_path=None, model_config=A_70B, tokenizer=str(site.made / "tokenizer"), global_batch_size=8)
    return "memory", "slurm/cpt_p5.sbatch is for GPUs of 80.0 GB: take more GPUs under fsdp2"


def a_gpu_too_small_for_the_weights(site):
    site.nvidia_smi("NVIDIA H200, 143771, 580.82.07, 9.0", "NVIDIA T4, 1, 580.82.07, 7.5")
    return "memory", "the smallest here has 1.0 MB: take more GPUs"


def checkpoints_further_apart_than_the_job_is_long(site):
    site.steps_made(100.0)
    site.keys(max_steps=5000)
    return "time", "a crash would lose all that it did: save_steps: 107, or save_minutes: 30"


def steps_longer_than_the_warning(site):
    site.steps_made(400.0)
    return "time", "#SBATCH --signal=B:USR1@800 in slurm/prepare_cpu.sbatch"


# -- the batch file and the site --------------------------------------------------------------------------------------


def a_batch_file_that_is_not_there(site):
    site.rows("cpt scripts/cpt.py cpt_p6")
    site.stage = "cpt_p6.sbatch"
    return "file", "slurm/cpt_p6.sbatch: no such batch file, and pipeline.txt names it; there are: array_cpu"


def a_batch_file_that_is_not_warned(site):
    site.batch_file("prepare_cpu", "^#SBATCH --signal.*\n", "")
    site.stage = "prepare_cpu.sbatch"
    return "file", "no --signal=B:USR1@300"


def a_job_too_short_to_do_anything(site):
    site.environment["SBATCH_TIMELIMIT"] = "10"
    site.stage = "prepare_cpu.sbatch"
    return "file", "--time is 00:10:00, and 00:05:00 before its end the job stops"


def a_time_that_is_none(site):
    site.batch_file("prepare_cpu", "--time=.*", "--time=12h")
    site.stage = "prepare_cpu.sbatch"
    return "file", "--time=12h is no time: write HH:MM:SS"


def a_site_file_that_is_no_bash(site):
    site.write("slurm/site.env", "export SBATCH_ACCOUNT=(\n")
    site.stage = ""
    return "site", "bash cannot read it: slurm/site.env: line "


def a_site_file_that_does_not_end(site):
    site.write("slurm/site.env", "sleep 60\n")
    site.stage = ""
    return "site", "has not ended after 5 s"


def a_misspelled_variable_of_the_site(site):
    site.write("slurm/site.env.example", "#DILQUR_IMAGE=\n")
    site.write("slurm/site.env", "export SBATCH_ACCOUNT=az\nDILQUR_IMAEG=x.sif\n")
    site.stage = ""
    return "site", "slurm/site.env:2: DILQUR_IMAEG: nothing reads that; did you mean DILQUR_IMAGE?"


def an_environment_that_is_not_there(site):
    site.write("slurm/site.env", "DILQUR_VENV=/opt/none\n")
    site.stage = ""
    return "site", "DILQUR_VENV: /opt/none: no bin/python in it"


def an_image_that_is_not_there(site):
    site.write("slurm/site.env", "DILQUR_IMAGE=images/dilqur.sif\n")
    site.stage = ""
    return "image", "images/dilqur.sif: no such file: build it"


def an_image_that_is_none(site):
    site.environment["DILQUR_IMAGE"] = str(site.write("x.sif", "version https://git-lfs.github.com/spec/v1\n"))
    site.stage = ""
    return "image", "not an Apptainer image (SIF)"


def an_image_that_may_not_be_read(site):
    site.write("x.sif", "").chmod(0)
    site.until_it_ran.callback((site.root / "x.sif").unlink)
    site.environment["DILQUR_IMAGE"] = "x.sif"
    site.prefix = WITHOUT_ROOTS_RIGHTS
    site.stage = ""
    return "image", "cannot be read: look at its permissions"


def a_package_of_another_version(site):
    pinned = (ROOT / "requirements.txt").read_text()
    site.write("requirements.txt", re.sub("^numpy==.*", "numpy==1.0.0", pinned, flags=re.M))
    site.stage = ""
    return "packages", "not 1.0.0: pip install -r requirements.txt"


def a_driver_too_old_for_torch(site):
    site.nvidia_smi("NVIDIA H200, 143771, 450.82.07, 9.0")
    site.stage = ""
    return "driver", "install"  # a build for this driver, or, where torch has no CUDA at all, one that has


MISTAKES = [
    a_key_that_does_not_exist, a_word_for_a_number, a_key_twice, a_program_that_does_not_exist, a_program_that_makes_no_stage,
    a_recipe_that_is_not_there, a_variant_that_is_another_one, a_variant_s_flag_that_does_not_exist, a_variant_with_another_s_name,
    a_stage_that_comes_later, a_model_that_is_not_there, a_model_that_was_not_fetched, shards_that_are_not_there,
    a_model_that_may_not_be_read, a_shard_cut_short, a_flipped_bit_in_a_shard, weights_cut_short, weights_that_are_missing,
    a_conversation_without_an_answer, shards_of_another_tokenizer, a_model_with_too_few_rows, padding_that_is_the_end_of_text,
    samples_longer_than_the_model, a_run_without_an_end, a_warm_up_longer_than_the_run, a_mirror_that_cannot_be,
    a_strategy_that_does_not_exist, bfloat16_under_zero, a_recipe_for_another_number_of_gpus, a_batch_that_three_gpus_cannot_share,
    a_pattern_that_matches_nothing, a_folder_that_another_process_writes, a_folder_that_may_not_be_written,
    a_file_where_the_folder_should_be, a_disk_that_is_too_small, a_disk_without_inodes, a_micro_batch_too_large_for_the_gpu,
    a_model_too_large_for_its_gpus, a_gpu_too_small_for_the_weights, checkpoints_further_apart_than_the_job_is_long,
    steps_longer_than_the_warning, a_batch_file_that_is_not_there, a_batch_file_that_is_not_warned, a_job_too_short_to_do_anything,
    a_time_that_is_none, a_site_file_that_is_no_bash, a_site_file_that_does_not_end, a_misspelled_variable_of_the_site,
    an_environment_that_is_not_there, an_image_that_is_not_there, an_image_that_is_none, an_image_that_may_not_be_read,
    a_package_of_another_version, a_driver_too_old_for_torch,
]  # fmt: skip


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """What preflight reads of a checkout; a copy, as it looks for everything beside itself."""
    root = tmp_path_factory.mktemp("checkout")
    for name in ("dilqur", "scripts", "accelerate_configs"):
        shutil.copytree(ROOT / name, root / name)
    return root


@pytest.fixture(scope="module")
def packed_by_another(run, made, english):
    run(
        "data_tools/pack_mmap.py",
        "--input",
        CORPUS / "az",
        "--tokenizer",
        english,
        "--output_dir",
        made / "packed-by-another",
    )


@pytest.fixture
def site(checkout, made, tiny_model, packed_by_another):
    return Site(checkout, made, tiny_model)


def test_a_good_recipe_on_a_good_site_has_no_mistake(site):
    lines, code = site.preflight()
    assert code == 0 and not [line for line in lines if line[0] == "FAIL"]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_it_is_found(site, mistake):
    check, advice = mistake(site)
    lines, code = site.preflight()
    fails = [line[1:] for line in lines if line[0] == "FAIL"]
    assert code == 2 and (site.stage, check) in [fail[:2] for fail in fails], fails or lines
    (text,) = [text for *which, text in fails if which == [site.stage, check]]
    print(f"\nFAIL  {site.stage}  {check}  {text}", end="")
    assert advice in text and "\n" not in text
    found.append(mistake)


def test_so_many_were_planted_and_found():
    planted = len(MISTAKES)
    print(f"\n{len(found)} of {planted} planted mistakes found")
    assert planted >= 25
