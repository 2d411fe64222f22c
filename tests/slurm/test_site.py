"""A cluster of another kind, as a new user meets it: what is special about it is in one file, and everything else is as shipped.

It has an account for each kind of job, partitions with names of its own, wants GPUs asked for with --gpus-per-node=h100:N, lets no job
requeue itself, and none run for more than four hours.
"""

import json
import subprocess
import time

import pytest
import yaml
from conftest import ROOT, TINY_LLAMA
from virtual_cluster import Lab, skip_where_impossible

PARTITIONS = """PartitionName=long_h100 Nodes=n[1-2] MaxTime=04:00:00
PartitionName=shared Nodes=n3 Default=YES MaxTime=1-00:00:00"""
# what docs/porting.md tells to type on such a cluster
SETUP = (
    "slurm/setup_site.sh", "--yes", "SBATCH_ACCOUNT=lang@gpu", "DILQUR_CPU_ACCOUNT=lang@cpu", "DILQUR_GPUS=--gpus-per-node=h100:N",
    "DILQUR_REQUEUE=0",
)  # fmt: skip


@pytest.fixture(scope="module")
def lab(tree, tmp_path_factory):
    skip_where_impossible()
    strict = str(ROOT / "tests/slurm/strict_site.lua")
    settings = {"LAB_PARTITIONS": PARTITIONS, "LAB_GPU_TYPE": "h100", "LAB_JOB_SUBMIT": strict}
    with Lab(tmp_path_factory.mktemp("lab"), tree, 3, gpus=8, **settings) as running:
        yield running


def test_a_cluster_that_wants_nothing_special_takes_every_batch_file_as_shipped(tree, tmp_path):
    skip_where_impossible()
    with Lab(tmp_path, tree, 2, gpus=8) as plain:
        files = sorted(file.name for file in (tree / "slurm").glob("*.sbatch"))
        for name in files:
            plain.run("sbatch", "--test-only", f"slurm/{name}")
        done = plain.run("slurm/setup_site.sh", "--yes")
        assert done.stdout.splitlines()[1:] == [f"ok    slurm/{name}" for name in files]
    with Lab(tmp_path, tree, 1, gpus=4) as small:
        done = small.run("slurm/setup_site.sh", "--yes", "--force", code=2)
        assert "FAIL  slurm/cpt_p5.sbatch: Requested node configuration is not available" in done.stdout
    (tree / "slurm/site.env").unlink()


def test_it_refuses_what_a_site_file_does_not_say(lab):
    for words, mistake in [
        ([], "no account: give one with --account"),
        (["--account=mine"], "account mine is not valid here"),
        (["--account=lang@gpu", "--partition=gpu"], "invalid partition specified: gpu"),
        (["--account=lang@gpu", "--partition=long_h100"], "GPUs are asked for with --gpus-per-node=h100:N"),
    ]:
        done = lab.run("sbatch", "--test-only", *words, "slurm/cpt_p5.sbatch", code=1)
        assert mistake in done.stderr


def test_the_questions_are_answered_once_and_slurm_says_what_it_thinks(lab, tree):
    done = lab.run("slurm/setup_site.sh", "--yes", "PARTITION=x", code=2)
    assert "PARTITION: no such key; slurm/site.env.example has: SBATCH_ACCOUNT SBATCH_PARTITION" in done.stderr
    done = lab.run("slurm/setup_site.sh", "--yes", "SBATCH_ACCOUNT=mine", code=2)
    assert "FAIL  slurm/cpt_p5.sbatch: account mine is not valid here\n" in done.stdout
    done = lab.run(*SETUP, code=2)
    assert "slurm/site.env is there already" in done.stderr

    done = lab.run(*SETUP, "--force")
    files = sorted(file.name for file in (tree / "slurm").glob("*.sbatch"))
    assert done.stdout.splitlines()[1:] == [f"ok    slurm/{name}" for name in files], "every batch file is accepted"
    text = (tree / "slurm/site.env").read_text()
    settings = [line for line in text.splitlines() if line and line[0] != "#"]
    assert settings == [
        'export SBATCH_ACCOUNT="lang@gpu"',
        'export SBATCH_PARTITION="long_h100"',
        'DILQUR_GPUS="--gpus-per-node=h100:N"',
        'DILQUR_MAX_TIME="4:00:00"',
        'DILQUR_CPU_ACCOUNT="lang@cpu"',
        'DILQUR_CPU_PARTITION="shared"',
        'DILQUR_CPU_MAX_TIME="1-00:00:00"',
        'DILQUR_REQUEUE="0"',
        "source slurm/lib/site_sbatch.sh",
    ]


def test_the_questionnaire_can_be_answered_by_hand(lab, tree):
    said = lab.run("bash", "-c", "yes '' | slurm/setup_site.sh --force", code=2).stdout
    assert "# How GPUs are asked for" in said and "FAIL  slurm/cpt_p5.sbatch: no account" in said
    answers = "lang@gpu\n\n\n\n--gpus-per-node=h100:N\n\nlang@cpu\n" + 30 * "\n"
    lab.run("bash", "-c", f"slurm/setup_site.sh --force <<<'{answers}'")


@pytest.fixture(scope="module")
def site(lab):
    lab.run(*SETUP, "--force")


def words_of(lab, job):
    return lab.run("scontrol", "show", "job", "-o", job).stdout


def test_sbatch_asks_for_what_the_site_wants_and_what_is_typed_wins(lab, site):
    def submitted(words):
        script = f"source slurm/site.env; sbatch --parsable --hold {words}"
        number = lab.run("bash", "-c", script).stdout.strip()
        job = lab.job(number)
        lab.run("scancel", number)
        return job

    job = submitted("slurm/cpt_p5.sbatch")
    assert (job["Account"], job["Partition"], job["TimeLimit"]) == ("lang@gpu", "long_h100", "04:00:00")
    assert (job["TresPerNode"], job["Requeue"], job["ArrayTaskId"]) == ("gres:gpu:h100:8", "0", "1-10%1")
    job = submitted("slurm/sft_1gpu.sbatch")
    assert job["TresPerNode"] == "gres:gpu:h100:1"
    job = submitted("slurm/prepare_cpu.sbatch")
    assert (job["Account"], job["Partition"], job["TimeLimit"]) == ("lang@cpu", "shared", "12:00:00")
    assert "TresPerNode" not in job
    job = submitted("--gres=gpu:h100:2 --time=10 --array=1-3%1 slurm/cpt_p5.sbatch")
    assert (job["TresPerNode"], job["TimeLimit"], job["ArrayTaskId"]) == ("gres:gpu:h100:2", "00:10:00", "1-3%1")


def status(lab, name):
    """{stage: [state, job, …]} of --status."""
    lines = lab.run("slurm/pipeline.sh", name, "--status").stdout.splitlines()[1:]
    return {line.split()[0]: line.split()[1:] for line in lines if not line.startswith(" ")}


def test_a_chain_of_jobs_runs_to_its_end_where_none_may_requeue_itself(lab, site, made, tree):
    """Clean on CPUs, train on a GPU, asked to stop on the way, evaluate: submitted as docs/porting.md says."""
    folder = tree / "recipes" / "ported"
    folder.mkdir()
    (folder / "pipeline.txt").write_text(
        "clean data_tools/clean_corpus.py prepare_cpu\ncpt scripts/cpt.py sft_1gpu\nbpb scripts/eval_bpb.py eval_1gpu\n"
    )
    cpt = {"model_config": yaml.safe_load(TINY_LLAMA), "tokenizer": f"{made}/tokenizer", "max_length": 64}
    cpt |= {"datasets": [{"path": f"{made}/shards"}], "learning_rate": 1e-3, "global_batch_size": 8}
    cpt |= {"per_device_train_batch_size": 8, "max_steps": 300, "save_steps": 5000}
    (folder / "clean.yaml").write_text("input: [recipes/quickstart/corpus/az]\n")
    (folder / "cpt.yaml").write_text(yaml.safe_dump(cpt))
    bpb = {"model_name_or_path": ["cpt"], "input": ["clean/train"], "max_length": 64}
    (folder / "bpb.yaml").write_text(yaml.safe_dump(bpb))
    before = subprocess.run(["git", "-C", ROOT, "status", "--short"], capture_output=True, text=True).stdout
    said = lab.run("slurm/pipeline.sh", "ported", DILQUR_CHAIN="3").stdout
    clean, train, bpb = [line.split()[1].rstrip(":") for line in said.splitlines()]
    assert status(lab, "ported")["bpb"][:2] == ["queued", bpb]

    metrics, end = tree / "runs/ported/cpt/metrics.jsonl", time.monotonic() + 240
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 5):
        assert time.monotonic() < end, "\n".join(f.read_text() for f in (tree / "runs/ported").glob("*.out"))
        time.sleep(0.2)
    state, job, step, loss, _, _, where, *_ = status(lab, "ported")["cpt"]
    assert (state, job, where) == ("running", train, "n1") and step.endswith("/300") and float(loss) > 0
    # scancel signals a task twice, and fails where the first time was enough
    lab.run("scancel", "--signal=USR1", "--batch", f"{train}_1", code=None)
    lab.wait(bpb)
    assert status(lab, "ported")["clean"][:2] == ["finished", clean] and status(lab, "ported")["bpb"][0] == "finished"
    logs = sorted(file.name for file in (tree / "runs/ported").glob("sft_1gpu-*.out"))
    assert len(logs) == 2, "the second task went on, and the third had nothing to do"
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(1, 301))
    after = subprocess.run(["git", "-C", ROOT, "status", "--short"], capture_output=True, text=True).stdout
    assert after == before
