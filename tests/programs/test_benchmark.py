"""benchmark.py: the real programs measured side by side, at toy size on a CPU. How fast anything is, is not asserted."""

import json
import re

import pytest
import torch
from conftest import ROOT

from dilqur.benchmarking.benchmark_tables import markdown

GRIDS = sorted((ROOT / "benchmarks" / "grids").glob("*.yaml"))


@pytest.fixture(scope="module")
def toy(run, tmp_path_factory):
    """(folder, what was printed, benchmark.json) of the toy grid, with one variant more, that cannot run."""
    folder = tmp_path_factory.mktemp("benchmark") / "toy"
    grid = folder.with_name("grid.yaml")
    text = (ROOT / "benchmarks" / "grids" / "toy.yaml").read_text()
    grid.write_text(f"{text}  - without its package: {{fp8: true, bf16: true}}\n")
    done = run("scripts/benchmark.py", "--config", grid, "--output_dir", folder)
    return folder, done.stdout, json.loads((folder / "benchmark.json").read_text())


def test_every_variant_has_its_figures_from_steps_of_the_real_programs(toy):
    _, _, result = toy
    measured = ["plain", "compiled", "loss by chunks", "trainer"]
    assert list(result["variants"])[:4] == measured
    for name in measured:
        row = result["variants"][name]
        assert row["problem"] is None and len(row["rounds"]) == 1
        figures = row["figures"]
        assert 0 < figures["tokens_per_second"]["min"] <= figures["tokens_per_second"]["max"]
        assert figures["resident_gb"]["median"] > 0.1, "torch alone holds more"
        half, whole = row["utilisation"]["half"], row["utilisation"]["whole"]
        assert whole["tflops"] > half["tflops"] > 0 and half["mfu"] is None, "no peak of a CPU is known"
    ours = result["variants"]["plain"]["figures"]
    phases = sum(ours[f"{p}_seconds"]["median"] for p in ("forward", "backward", "optimizer", "data_wait", "logging"))
    assert 0 < phases <= ours["step_seconds"]["median"] * 1.001, "they are parts of a step"
    assert "forward_seconds" not in result["variants"]["trainer"]["figures"], "the Trainer does not say"


def test_compiled_and_by_the_trainer_the_losses_are_those_of_the_first(toy):
    _, _, result = toy
    assert result["variants"]["plain"]["parity"] is None, "the first is what the others are compared with"
    losses = result["variants"]["plain"]["losses"]
    assert len(losses) >= 8 and len(set(losses)) == len(losses)
    for name in ("compiled", "loss by chunks", "trainer"):  # fp32, sums in another order
        parity = result["variants"][name]["parity"]
        assert parity["steps"] == 4 and parity["largest"] < 1e-5


def test_the_kernels_that_were_asked_for_are_in_the_profile(toy):
    _, _, result = toy
    compiled = result["variants"]["compiled"]["evidence"]
    assert all(compiled["expected"].values()) and "Torch-Compiled Region" in compiled["expected"]
    chunks = result["variants"]["loss by chunks"]
    assert chunks["kernels"]["loss_kernel"] == "chunked" and all(chunks["evidence"]["expected"].values())
    plain = result["variants"]["plain"]["evidence"]
    assert "Torch-Compiled Region" not in plain["expected"] and plain["top"][0]["share"] > 0


def test_a_variant_that_cannot_run_is_a_row_that_says_why(toy):
    folder, said, result = toy
    row = result["variants"]["without its package"]
    assert "torchao" in row["problem"] and row["figures"] == {}
    assert row["problem"] in said and row["problem"] in (folder / "benchmark.md").read_text()


def test_the_json_says_on_what_it_was_measured_and_the_table_is_in_a_file(toy):
    folder, said, result = toy
    assert result["machine"]["cpu"] and result["packages"]["torch"] and result["settings"]["toy"] is True
    table = (folder / "benchmark.md").read_text()
    assert table in said and "| compiled |" in table and "tokens/s" in table
    left = {p.name for p in (folder / "runs" / "plain-round-1").iterdir()}
    assert "checkpoints" not in left and "model" not in left


def test_of_a_mig_slice_there_is_no_mfu_and_the_tables_say_so(toy):
    slice_of = {"name": "NVIDIA H100 80GB HBM3 MIG 3g.40gb", "mig": True}
    result = toy[2] | {"machine": toy[2]["machine"] | {"gpus": [slice_of], "driver": "580.82.07"}, "on_gpu": True}
    table = markdown(result)
    assert "A MIG slice: MFU is not known of it" in table and "on NVIDIA H100 80GB HBM3 MIG 3g.40gb" in table
    assert "| TFLOP/s |" in table and "| MFU |" not in table


def test_a_benchmark_that_was_cut_short_goes_on_where_it_was(toy, run):
    folder, _, before = toy
    (folder / "manifest.json").unlink()
    (folder / "benchmark.json").unlink()
    run("scripts/benchmark.py", "--config", folder.with_name("grid.yaml"), "--output_dir", folder)
    after = json.loads((folder / "benchmark.json").read_text())
    assert after["variants"]["plain"]["rounds"] == before["variants"]["plain"]["rounds"], "not measured again"


def test_without_time_rows_are_left_out_and_the_benchmark_is_not_finished(toy, run):
    folder = toy[0].with_name("late")
    grid = ("--config", toy[0].with_name("grid.yaml"), "--output_dir", folder)
    assert re.search(
        r"grid: ok, 5 variants, 10 runs, about \d+\.\d min", run("scripts/benchmark.py", *grid, "--check").stdout
    )
    said = run("scripts/benchmark.py", *grid, "--max_minutes", "0.0001").stdout
    rows = json.loads((folder / "benchmark.json").read_text())["variants"]
    assert all(row["left_out"] == [["round 1", "no time"], ["losses and kernels", "no time"]] for row in rows.values())
    assert "- compiled: round 1, losses and kernels (no time)" in said and not (folder / "manifest.json").exists()


def test_the_trainer_under_fsdp2_computes_in_our_precision(server, made, tiny_model, tmp_path):
    """Losses that are not rounded to bfloat16, as ours are not: the first to all digits, then apart by roundings that add up."""
    flags = [
        "--model_name_or_path",
        tiny_model,
        "--datasets",
        f"{{path: {made}/shards}}",
        "--max_length",
        64,
        "--bf16",
        "true",
    ]
    flags += ["--global_batch_size", 8, "--per_device_train_batch_size", 4, "--learning_rate", "1e-4", "--max_steps", 4]
    losses = {}
    for name, program in (("trainer", "benchmarks/trainer_baseline.py"), ("ours", "scripts/cpt.py")):
        log, more = tmp_path / f"{name}.log", {"program": ROOT / program, "LOG_LOSSES": "1"}
        with server.launch("fsdp2", [*flags, "--output_dir", tmp_path / name], log, **more) as started:
            assert started.wait(300) == 0, log.read_text()[-3000:]
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses[name] = torch.tensor([json.loads(line)["loss"] for line in lines], dtype=torch.float32)
    assert len(losses["trainer"]) == 4 and losses["trainer"][0].item() == pytest.approx(
        losses["ours"][0].item(), rel=1e-6
    )
    assert (losses["trainer"] - losses["ours"]).abs().max() < 2e-3
    assert (losses["trainer"] != losses["trainer"].bfloat16().float()).all(), "not rounded to bfloat16"


def test_a_recipe_with_its_own_inputs_under_a_strategy_and_the_largest_batch(run, made, tiny_model, tmp_path):
    recipe = tmp_path / "cpt.yaml"
    recipe.write_text(
        f"model_name_or_path: {tiny_model}\ndatasets: [{{path: {made}/shards}}]\nmax_length: 64\nglobal_batch_size: 4\n"
        "per_device_train_batch_size: 2\nlearning_rate: 1e-3\nmax_steps: 20\n"
    )
    short = ["--rounds", 1, "--warmup_steps", 1, "--timed_steps", 2, "--parity_steps", 0, "--profile", "false"]
    two = ["--num_processes", 2, "--strategies", "accelerate_configs/ddp.yaml", "--largest_batch", 2]
    run(
        "scripts/benchmark.py",
        "--recipe",
        recipe,
        "--variants",
        "plain: {}",
        *short,
        *two,
        "--output_dir",
        tmp_path / "out",
    )
    row = json.loads((tmp_path / "out" / "benchmark.json").read_text())["variants"]["plain"]
    assert row["problem"] is None and row["largest_batch"] == 2 and row["strategy"] == "accelerate_configs/ddp.yaml"


@pytest.mark.parametrize("grid", GRIDS, ids=lambda p: p.stem)
def test_every_grid_fits_its_recipe(grid, run, tmp_path):
    assert ": ok, " in run("scripts/benchmark.py", "--config", grid, "--output_dir", tmp_path / "out", "--check").stdout


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--variants", "plain: {use_liger: true}"], "use_liger is no key"),
        (
            ["--variants", "plain: {trainer: true}", "--recipe", "recipes/neobert-az/mlm-1-1024.yaml"],
            "leave it out for mlm.py",
        ),
        (["--recipe", "recipes/llama3.2-1b-az/bpb.yaml"], "is of scripts/eval_bpb.py"),
        (["--synthetic", "false", "--toy", "false", "--model_config", "{hidden_size: 8}"], "give synthetic: true"),
    ],
)
def test_a_mistake_gets_one_line(more, said, run, tmp_path):
    grid = ["--config", "benchmarks/grids/toy.yaml", "--output_dir", tmp_path / "out"]
    done = run("scripts/benchmark.py", *grid, *more, "--check", code=2)
    assert said in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()
