"""Jobs on a real Slurm: the shipped batch files on one node and several, and chains of them."""

import json
import time

import pytest
import yaml
from conftest import TINY_LLAMA
from virtual_cluster import Lab, skip_where_impossible

ROUNDING = 1e-5  # relative: as between strategies on one machine


@pytest.fixture(scope="module")
def lab(tree, tmp_path_factory):
    """Three nodes with a fake GPU each."""
    skip_where_impossible()
    with Lab(tmp_path_factory.mktemp("lab"), tree, 3) as running:
        yield running


@pytest.fixture(scope="module")
def write(tree, made):
    """write(name, **keys) makes recipes/NAME, one stage `cpt` of cpt_p5. Returns where its result will be."""

    def write(name, **keys):
        folder = tree / "recipes" / name
        folder.mkdir()
        (folder / "pipeline.txt").write_text("cpt  scripts/cpt.py  cpt_p5\n")
        data = {"model_config": yaml.safe_load(TINY_LLAMA), "tokenizer": f"{made}/tokenizer"}
        data |= {"datasets": [{"path": f"{made}/shards"}], "max_length": 64, "learning_rate": 1e-3}
        shape = {"global_batch_size": 12, "per_device_train_batch_size": 6, "save_total_limit": 1}
        (folder / "cpt.yaml").write_text(yaml.safe_dump(data | shape | keys))
        return tree / "runs" / name / "cpt"

    return write


def submit(lab, name, nodes, *options, **environment):
    words = (f"--nodes={nodes}", "--gres=gpu:1", "--time=30", *options, "slurm/cpt_p5.sbatch", name)
    return lab.sbatch(*words, **environment)


def metrics(folder):
    """[step, loss, grad_norm, …] of all steps in order."""
    records = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    return [r[key] for r in records for key in ("step", "loss", "grad_norm")]


def steps_done(folder):
    try:
        return json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    except (OSError, IndexError, ValueError):
        return 0


def wait_for_steps(lab, job, folder, more):
    """Until a job has done so many more steps."""
    end, goal = time.monotonic() + 120, steps_done(folder) + more
    while steps_done(folder) < goal:
        assert time.monotonic() < end, lab.log(job)
        time.sleep(0.1)


# -- several nodes ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one_process(run, write, tree, made, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one") / "run"
    write("one", max_steps=12)
    run("scripts/cpt.py", "--config", tree / "recipes" / "one" / "cpt.yaml", "--output_dir", folder)
    return metrics(folder)


@pytest.mark.parametrize(("strategy", "nodes"), [("ddp", 2), ("fsdp2", 3), ("zero2", 2)])
def test_the_shipped_batch_file_learns_the_same_on_several_nodes(lab, write, one_process, strategy, nodes):
    folder = write(f"{strategy}-{nodes}", max_steps=12)
    job = submit(lab, f"{strategy}-{nodes}", nodes, DILQUR_ACCELERATE_CONFIG=f"accelerate_configs/{strategy}.yaml")
    assert lab.wait(job) == "COMPLETED", lab.log(job)
    result = json.loads((folder / "manifest.json").read_text())["result"]
    assert (result["strategy"], result["processes"]) == (strategy, nodes)
    assert metrics(folder) == pytest.approx(one_process, rel=ROUNDING)


def test_nodes_are_looked_at_before_they_train_where_the_site_wants_it(lab, write):
    """On CPUs; with GPUs that Slurm gives and torch does not see, as here they are, the job ends."""
    folder = write("looked_at", max_steps=2)
    site = {
        "DILQUR_CHECK_NODES": "1",
        "DILQUR_LOCAL_DIR": "/dev/shm",
        **DDP,
    }  # each node's own; their /tmp is the machine's
    job = submit(lab, "looked_at", 2, **site)
    assert lab.wait(job) == "FAILED"
    assert "FAIL" in lab.log(job) and "not fit to train on" in (folder / "FAILED").read_text()
    job = submit(lab, "looked_at", 2, "--gres=none", **site)
    assert lab.wait(job) == "COMPLETED", lab.log(job)
    assert "bus bandwidth over 2 processes (gloo" in lab.log(job) and (folder / "manifest.json").exists()


# -- life in the queue: in short; tests/slurm/test_life.py has all that can happen, with the seconds each costs --------------------

LONG = {"max_steps": 300, "save_steps": 20, "hang_minutes": 5}
DDP = {"DILQUR_ACCELERATE_CONFIG": "accelerate_configs/ddp.yaml"}


def test_a_job_warned_before_its_end_and_one_whose_node_was_lost_end_as_if_nothing_had_been(
    lab, write, server, tree, tmp_path
):
    folder = write("disturbed", **LONG)
    flags = ("--config", tree / "recipes" / "disturbed" / "cpt.yaml", "--output_dir", tmp_path / "undisturbed")
    with server.launch("ddp", flags, tmp_path / "log") as undisturbed:
        assert undisturbed.wait(300) == 0, (tmp_path / "log").read_text()
    job = submit(lab, "disturbed", 2, **DDP)

    wait_for_steps(lab, job, folder, 30)
    lab.run("scancel", "--signal=USR1", "--batch", job)  # what --signal=B:USR1@300 sends near the end of the time
    wait_for_steps(lab, job, folder, 30)
    assert lab.job(job)["Restarts"] == "1"

    node = lab.run("scontrol", "show", "hostnames", lab.job(job)["NodeList"]).stdout.split()[-1]
    lab.ask("crash", node)
    lab.wait(job, "PENDING", 120)
    lab.ask("boot", node)  # it is back before the job is, and as good as any other to Slurm
    assert lab.wait(job) == "COMPLETED", lab.log(job)
    assert node not in lab.run("scontrol", "show", "hostnames", lab.job(job)["NodeList"]).stdout.split()
    assert metrics(folder) == metrics(tmp_path / "undisturbed"), "bit for bit"


def test_cancelled_and_submitted_again_a_run_goes_on_and_two_jobs_at_once_do_not_meet(lab, write):
    folder = write("cancelled", **LONG)
    job = submit(lab, "cancelled", 1, **DDP)
    wait_for_steps(lab, job, folder, 30)
    second = submit(lab, "cancelled", 1, **DDP)
    assert lab.wait(second) == "FAILED"
    assert f"cpt: job {job} is running it; this one, {second}, ends here" in lab.log(second)
    lab.run("scancel", job)
    assert lab.wait(job) == "CANCELLED"
    done = steps_done(folder)
    job = submit(lab, "cancelled", 1, **DDP)
    assert lab.wait(job) == "COMPLETED", lab.log(job)
    records = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert records == list(range(1, 301)) and done > 30


def test_a_failing_stage_cancels_what_waits_for_it_and_after_a_fix_the_same_command_goes_on(lab, write, tree):
    folder = write("chain", max_steps=4)
    recipe = tree / "recipes/chain"
    table = (
        "clean data_tools/clean_corpus.py prepare_cpu\ncpt scripts/cpt.py sft_1gpu\nbpb scripts/eval_bpb.py eval_1gpu\n"
    )
    (recipe / "pipeline.txt").write_text(table)
    (recipe / "clean.yaml").write_text("input: [recipes/quickstart/corpus/az]\n")
    (recipe / "bpb.yaml").write_text("{model_name_or_path: [cpt], input: [clean/train], max_length: 64}\n")
    good = (recipe / "cpt.yaml").read_text()
    (recipe / "cpt.yaml").write_text(good.replace("/tokenizer\n", "/tokeniser\n"))

    def submit_all():
        said = lab.run("slurm/pipeline.sh", "chain")
        assert "there is no slurm/site.env" in said.stderr
        return [line.split()[1].rstrip(":") for line in said.stdout.splitlines() if line.startswith("job ")]

    clean, cpt, bpb = submit_all()
    refused = lab.run("slurm/pipeline.sh", "chain", code=2)
    assert "jobs of this recipe are in the queue already" in refused.stderr
    assert lab.wait(bpb) == "CANCELLED"
    lines = lab.run("slurm/pipeline.sh", "chain", "--status").stdout.splitlines()[1:]
    assert [line.split()[:3] for line in lines if line[0] != " "] == [
        ["clean", "finished", clean],
        ["cpt", "failed", cpt],
        ["bpb", "cancelled", bpb],
    ]
    assert "exit code 2 after" in lines[1] and f"(job {cpt}; see runs/chain/sft_1gpu-{cpt}.out)" in lines[1]
    assert lines[2].strip().startswith("error: tokenizer: ") and "/tokeniser" in lines[2], "why"

    (recipe / "cpt.yaml").write_text(good)
    assert lab.wait(submit_all()[-1]) == "COMPLETED"
    lines = lab.run("slurm/pipeline.sh", "chain", "--status").stdout.splitlines()[1:]
    assert [line.split()[1] for line in lines] == ["finished"] * 3 and (folder / "manifest.json").exists()
