"""cpt.py and its data: a mixture that changes on the way, a change added on a resume, samples of whole documents."""

import json
import shutil

import pytest

LENGTH, BATCH, STEPS = 64, 8, 8


@pytest.fixture(scope="module")
def cpt(run, made, tiny_model):
    """Runs cpt.py for 8 steps of 8 sequences of 64 tokens, on `made`'s shards; flags given later win."""

    def start(folder, *flags, code=0, model=tiny_model):
        data = ("--model_name_or_path", model, "--datasets", f"{{path: {made}/shards, weight: 1}}")
        shape = f"--max_length {LENGTH} --global_batch_size {BATCH} --learning_rate 3e-3 --max_steps {STEPS}".split()
        return run("scripts/cpt.py", *data, *shape, "--output_dir", folder, *flags, code=code)

    return start


def change(made, step, weight=0.5):
    shares = f"{{path: {made}/shards, weight: {1 - weight}}}, {{path: {made}/held_out, weight: {weight}}}"
    return f"{{step: {step}, datasets: [{shares}]}}"


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def changed(cpt, made, tmp_path_factory):
    """A run whose mixture changes after step 5, uninterrupted."""
    folder = tmp_path_factory.mktemp("changed") / "run"
    done = cpt(folder, "--dataset_changes", change(made, 5))
    assert "datasets from here on" in done.stdout
    return folder


def test_a_change_added_on_a_resume_is_the_run_that_had_it_from_the_start(cpt, made, changed, tmp_path):
    folder = tmp_path / "run"
    cpt(folder, "--stop_at_step", 3)
    cpt(folder, "--dataset_changes", change(made, 5), "--stop_at_step", 6)
    assert losses(folder) == losses(changed)[:6]
    done = cpt(folder, "--dataset_changes", change(made, 5, weight=0.4), code=2)  # step 5 is done
    assert "dataset_changes of steps before its 6 are done and cannot change any more" in done.stderr
    assert "dataset_changes of steps before its 6" in cpt(folder, code=2).stderr
    cpt(folder, "--dataset_changes", change(made, 5), change(made, 7, weight=0.1))
    assert losses(folder)[:7] == losses(changed)[:7]
    assert losses(folder)[7] != losses(changed)[7]


def test_the_manifest_and_the_checkpoint_say_what_was_seen(changed, made):
    manifest = json.loads((changed / "manifest.json").read_text())
    assert manifest["arguments"]["dataset_changes"][0]["step"] == 5
    data = manifest["result"]["data"]
    assert [m["position"] for m in data["mixtures"]] == [0, 5 * BATCH]
    assert [position for position, _ in data["fingerprint"]] == [0, 5 * BATCH]
    seen = data["epochs"]
    assert list(seen) == [f"{made}/shards", f"{made}/held_out"] and all(seen.values())
    (checkpoint,) = (changed / "checkpoints").glob("step-*")
    trainer = json.loads((checkpoint / "trainer.json").read_text())
    assert trainer["data"]["mixtures"] == data["mixtures"]


def test_a_next_phase_goes_on_in_a_stream_that_changed(cpt, made, changed, tmp_path):
    mixture = change(made, 5).split("datasets: ")[1][1:-2]
    datasets = [part + "}" for part in mixture.replace("}, {", "}|{").replace("}", "").split("|")]
    more = ("--continue_data", "true", "--datasets", *datasets)
    cpt(tmp_path / "run", *more, "--dataset_changes", change(made, 1, weight=0.9), "--max_steps", 2, model=changed)
    data = json.loads((tmp_path / "run" / "manifest.json").read_text())["result"]["data"]
    assert [m["position"] for m in data["mixtures"]] == [0, 5 * BATCH, (STEPS + 1) * BATCH]
    assert (data["start_position"], data["end_position"]) == (STEPS * BATCH, (STEPS + 2) * BATCH)
    refused = cpt(
        tmp_path / "no", "--continue_data", "true", "--max_length", 32, "--check", "true", model=changed, code=2
    )
    assert "continue_data" in refused.stderr and "make them the same" in refused.stderr


def test_a_next_phase_may_go_on_in_another_mixture(cpt, made, changed, tmp_path):
    """`changed` ended with both datasets; from its end on there is one, in which nothing comes a second time too early."""
    (tmp_path / "nvme").mkdir()
    done = cpt(tmp_path / "run", "--continue_data", "true", "--local_dir", tmp_path / "nvme", model=changed)
    assert f"from step 0: {made}/shards" in done.stdout
    data = json.loads((tmp_path / "run" / "manifest.json").read_text())["result"]["data"]
    assert [m["position"] for m in data["mixtures"]] == [0, 5 * BATCH, STEPS * BATCH]
    before = json.loads((changed / "manifest.json").read_text())["result"]["data"]
    assert data["epochs"][f"{made}/held_out"] == before["epochs"][f"{made}/held_out"]
    copies = [p.name.rpartition("-")[0] for p in (tmp_path / "nvme").iterdir() if not p.name.startswith(".")]
    assert copies == ["shards"]  # what is behind the run is not copied to the node


def test_a_run_goes_on_when_its_shards_are_called_otherwise(cpt, made, tmp_path):
    (tmp_path / "link").symlink_to(made)
    cpt(tmp_path / "run", "--stop_at_step", 3)
    cpt(tmp_path / "run", "--datasets", f"{{path: {tmp_path}/link/shards, weight: 1}}", "--stop_at_step", 5)
    other = f"{{path: {made}/held_out, weight: 1}}"
    assert (
        "made on other data: datasets, weights or shards have changed"
        in cpt(tmp_path / "run", "--datasets", other, code=2).stderr
    )


def test_best_fit_trains_stops_and_goes_on_with_the_plan_it_made(cpt, tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    done = cpt(whole, "--packing", "best_fit", "--max_length", 512)
    assert "% padding" in done.stdout and "of the documents longer than a sample" in done.stdout
    cpt(stopped, "--packing", "best_fit", "--max_length", 512, "--stop_at_step", 3)
    (plan,) = (stopped / "packing").iterdir()
    written = (plan / "plan.json").stat().st_mtime_ns
    cpt(stopped, "--packing", "best_fit", "--max_length", 512)
    assert losses(stopped) == losses(whole)
    assert (plan / "plan.json").stat().st_mtime_ns == written
    assert "packing = 'best_fit', now 'concat'" in cpt(whole, "--max_length", 512, code=2).stderr


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["{step: 5, datasets: [{path: SHARDS, weight: 1}]}"] * 2, "step 5 comes after step 5: put them in order"),
        (["{step: 0, datasets: [{path: SHARDS, weight: 1}]}"], "[0].step should be greater than or equal to 1"),
        (["{step: 5, datasets: [{path: SHARDS, weight: 1}, {path: HELD}]}"], "give a weight to all of them, or epochs"),
        (["{step: 5, datasets: [{path: nowhere, weight: 1}]}"], "nowhere"),
        (["{step: 5}"], "dataset"),
        (["{step: 8, datasets: [{path: SHARDS, weight: 1}]}"], "step 8 is never reached, there are 8 steps"),
        (["{step: 5, datasets: [{path: SHARDS, weight: .inf}]}"], "finite"),
    ],
)
def test_mistakes_are_one_line(cpt, made, tmp_path, flags, says):
    flags = [flag.replace("SHARDS", f"{made}/shards").replace("HELD", f"{made}/held_out") for flag in flags]
    (line,) = cpt(tmp_path / "run", "--dataset_changes", *flags, "--check", "true", code=2).stderr.splitlines()
    assert line.startswith("error: ") and says in line


def test_a_missing_shard_is_found_before_torch_is_loaded(cpt, made, tmp_path):
    shards = shutil.copytree(made / "shards", tmp_path / "shards")
    (shards / "tokens-00000.npy").unlink()
    done = cpt(tmp_path / "run", "--datasets", f"{{path: {shards}}}", "--check", "true", code=2)
    assert "tokens-00000.npy: missing, though manifest.json lists it" in done.stderr


def test_shards_copied_to_the_nodes_own_disk_give_the_same_run(cpt, made, changed, tmp_path):
    (tmp_path / "nvme").mkdir()
    cpt(tmp_path / "run", "--dataset_changes", change(made, 5), "--local_dir", tmp_path / "nvme")
    assert losses(tmp_path / "run") == losses(changed)
    copies = sorted(p.name.rpartition("-")[0] for p in (tmp_path / "nvme").iterdir() if not p.name.startswith("."))
    assert copies == ["held_out", "shards"]
    assert "no such folder" in cpt(tmp_path / "other", "--local_dir", tmp_path / "nowhere", code=2).stderr
