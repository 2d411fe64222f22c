"""What a benchmark makes of recipes and of metrics.jsonl: variants, figures, the largest batch, evidence, how a run ends, and the time."""

import json
import signal
import sys
import time

import psutil
import pytest
from conftest import ROOT

from dilqur.benchmarking import time_limit
from dilqur.benchmarking.benchmark_tables import chosen, missing
from dilqur.benchmarking.duration import rate_of, run_seconds, variant_seconds
from dilqur.benchmarking.figures import largest_batch, loss_parity, over_rounds, round_figures, utilisation
from dilqur.benchmarking.kernel_evidence import evidence
from dilqur.benchmarking.time_limit import NoTime, TimeLimit
from dilqur.benchmarking.variants import read_variants, recipe_values, same_training
from dilqur.benchmarking.watched_run import Outcome, command_line, launch_environment, remembered, run_until
from dilqur.benchmarking.what_failed import failed_tests, rows_without_figures
from dilqur.common.errors import InputError
from dilqur.estimate.job import Job
from dilqur.kernels.choose import PLAIN
from dilqur.training.settings import TrainingSettings

RECIPE = str(ROOT / "recipes" / "quickstart" / "control.yaml")
DDP, FSDP2 = (str(ROOT / "accelerate_configs" / f"{name}.yaml") for name in ("ddp", "fsdp2"))


# -- variants -----------------------------------------------------------------------------------------------------------


def test_each_variant_is_there_under_each_strategy():
    tables = [{"plain": {}, "liger": {"use_liger_kernel": True, "expect": ["rms_norm"]}}]
    variants = read_variants(tables, [DDP, FSDP2], num_processes=2)
    assert [v.name for v in variants] == ["plain, ddp", "liger, ddp", "plain, fsdp2", "liger, fsdp2"]
    assert variants[1].keys == {"use_liger_kernel": True} and variants[1].expect == ("rms_norm",)


@pytest.mark.parametrize(
    ("tables", "strategies", "processes", "said"),
    [
        ([], None, 1, "give one at least"),
        ([{"a": {}}, {"a": {}}], None, 1, "a name of its own"),
        ([{"../a": {}}], None, 1, "a name of its own"),
        ([{"a": [1]}], None, 1, "give a table of keys"),
        ([{"a": {}}], None, 2, "need a strategy"),
        ([{"a": {}}], [DDP], 1, "one process has no strategy"),
        ([{"a": {"strategy": "none.yaml"}}], None, 2, "no such file"),
    ],
)
def test_what_is_wrong_with_variants_is_said_in_a_line(tables, strategies, processes, said):
    with pytest.raises(InputError, match=said):
        read_variants(tables, strategies, processes)


def values(keys, common=None, processes=1, **more):
    (variant,) = read_variants([{"one": keys}], None if processes == 1 else [DDP], processes)
    return recipe_values(TrainingSettings, RECIPE, common or {}, variant, processes, **more)


def test_a_variants_keys_win_over_those_of_all_and_those_over_the_recipe():
    common = {"max_length": 32, "learning_rate": 1e-4}
    found = values({"learning_rate": 2e-4}, common)
    assert (found["learning_rate"], found["max_length"]) == (2e-4, 32)
    assert found["num_train_epochs"] is None and found["eval_datasets"] is None, "a benchmark has its own length"


def test_accumulation_makes_the_global_batch():
    found = values({"per_device_train_batch_size": 3}, processes=4, accumulation=2)
    assert found["global_batch_size"] == 24


@pytest.mark.parametrize(
    ("keys", "said"), [({"use_liger": True}, "use_liger is no key"), ({"bf16": 7}, "variants: one: bf16")]
)
def test_a_key_that_the_program_does_not_know_is_refused(keys, said):
    with pytest.raises(InputError, match=said):
        values(keys)


def test_losses_are_compared_where_the_training_is_the_same():
    plain = values({})
    assert same_training(
        TrainingSettings, plain, values({"torch_compile": True, "bf16": True, "gradient_checkpointing": True})
    )
    assert not same_training(TrainingSettings, plain, values({"unfrozen_parameters": ["*embed*"]}))
    assert not same_training(TrainingSettings, plain, values({"global_batch_size": 32}))


# -- figures ------------------------------------------------------------------------------------------------------------


def lines(steps, seconds=2.0, between=0.5, loss=1.0, **more):
    phases = {"forward_seconds": 0.5, "backward_seconds": 1.0, "optimizer_seconds": 0.2, "data_wait_seconds": 0.1}
    rates = {"tokens_per_second_all": 1000 / seconds, "tokens_per_second": 800 / seconds}
    each = {"step_seconds": seconds, "loss": loss, **rates, **phases, **more}
    return [{"step": n, "time": 100 + n * (seconds + between), **each} for n in range(1, steps + 1)]


def test_a_rate_is_by_the_clock_between_two_steps_with_what_lies_between_them():
    found = round_figures(lines(30, peak_memory_gb=3.0), 10, 30)
    assert found["tokens_per_second"] == pytest.approx(1000 / 2.5)
    assert found["valid_tokens_per_second"] == pytest.approx(800 / 2.5)
    assert found["logging_seconds"] == pytest.approx(0.5)
    assert (found["forward_seconds"], found["backward_seconds"]) == (pytest.approx(0.5), pytest.approx(1.0))
    assert found["peak_memory_gb"] == 3.0


def test_a_program_that_logs_no_phases_has_none():
    records = [{k: v for k, v in r.items() if k != "forward_seconds"} for r in lines(5)]
    rounds = [round_figures(records, 1, 5)]
    assert rounds[0]["forward_seconds"] is None and rounds[0]["logging_seconds"] is None
    assert "forward_seconds" not in over_rounds(rounds)


def test_over_rounds_are_medians_and_ranges():
    found = over_rounds([{"rate": 3.0}, {"rate": 1.0}, {"rate": 2.5}])
    assert found == {"rate": {"median": 2.5, "min": 1.0, "max": 3.0}}


def test_parity_is_the_largest_difference_of_the_losses():
    other = lines(5)
    other[2]["loss"], other[4]["loss"] = 1.25, 0.875
    assert loss_parity(lines(5), other, 5) == {"steps": 5, "largest": 0.25, "at_step": 3, "last": 0.125}
    other[3]["loss"] = None
    assert loss_parity(lines(5), other, 5) is None, "a step that was skipped has no loss"
    assert loss_parity(lines(4), lines(5), 5) is None


def test_utilisation_is_per_gpu_and_of_its_peak():
    found = utilisation(1e6, {"half": 7.5e9, "whole": 8e9}, num_processes=8, peak=989e12)
    assert found["half"]["mfu"] == pytest.approx(1e6 * 7.5e9 / 8 / 989e12)
    assert utilisation(1e3, {"half": 1e9}, 1, None) == {"half": {"tflops": pytest.approx(1.0), "mfu": None}}


@pytest.mark.parametrize("most", range(41))
@pytest.mark.parametrize("start", [1, 8, 40])
def test_the_largest_batch_is_found_from_anywhere_in_few_tries(most, start):
    tried = []

    def fits(batch):
        tried.append(batch)
        return batch <= most

    assert largest_batch(fits, start, ceiling=40) == most
    assert len(tried) <= 12, "each is a start of the program: log2 of the ceiling, twice"
    assert len(set(tried)) == len(tried)


def test_kernels_are_looked_for_among_those_of_the_gpu_if_there_is_one():
    rows = [("aten::linear", "cpu"), ("_LIGER_cross_entropy_kernel", "cuda"), ("nvjet", "cuda")]
    operations = [{"name": n, "device": d, "seconds": 1.0, "calls": 2} for n, d in rows]
    found = evidence(operations, {"use_liger_kernel": True, "attn_implementation": "sdpa"}, ["nvjet", "aten::linear"])
    assert found["on"] == "cuda" and [o["share"] for o in found["top"]] == [0.5, 0.5]
    assert found["expected"] == {
        "liger": ["_LIGER_cross_entropy_kernel"], r"flash|sdpa|fmha|cudnn.*attn": [], "nvjet": ["nvjet"], "aten::linear": [],
    }  # fmt: skip
    on_cpu = evidence(operations[:1], {"use_liger_kernel": True})
    assert on_cpu["on"] == "cpu" and on_cpu["expected"] == {}, "nothing of Liger's runs on a CPU"


# -- runs ---------------------------------------------------------------------------------------------------------------

WRITES = """
import json, os, pathlib, subprocess, sys, time
folder = pathlib.Path(sys.argv[1]); folder.mkdir()
child = subprocess.Popen(["sleep", "600.5"])
with open(folder / "metrics.jsonl", "w") as file:
    for step in range(1, 1000):
        file.write(json.dumps({"step": step}) + "\\n"); file.flush(); time.sleep(0.01)
        if step == int(sys.argv[2]): print(sys.argv[3]); child.kill(); sys.exit(1)
"""


def watched(folder, stop, said, steps=20, timeout_s=60):
    return run_until([sys.executable, "-c", WRITES, str(folder), str(stop), said], None, folder, steps, timeout_s)


def test_the_table_says_what_auto_came_to_in_each_variant_that_asked_for_it():
    auto = {"settings": {"kernels": "auto"}, "kernels": {**PLAIN, "loss_kernel": "liger", "torch_compile": True}}
    rows = {
        "plain": {"settings": {"kernels": "plain"}, "kernels": PLAIN},
        "auto": auto,
        "it failed": {**auto, "kernels": None},
    }
    head, _, *body = chosen(rows).splitlines()
    assert head.startswith("| kernels: auto chose | attn_implementation | loss_kernel |")
    assert body == ["| auto | sdpa | liger | true | layer |"]


def test_a_run_is_ended_with_all_its_processes_when_it_has_logged_enough(tmp_path):
    before = {p.pid for p in psutil.process_iter()}
    outcome = watched(tmp_path / "run", 0, "")
    assert outcome.problem is None and 20 <= outcome.records[-1]["step"] < 999 and outcome.resident_gb > 0
    now = psutil.process_iter(["cmdline", "status"])  # which leaves out what ends while it is asked
    left = [p.info["cmdline"] for p in now if p.pid not in before and p.info["status"] != psutil.STATUS_ZOMBIE]
    assert ["sleep", "600.5"] not in left


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", "out of memory"),
        ("error: max_length: too long\nsome more", "error: max_length: too long"),
        ("something", "something"),
    ],
)
def test_why_a_run_ended_too_early_is_a_result(tmp_path, said, problem):
    outcome = watched(tmp_path / "run", 5, said)
    assert outcome.problem == problem and outcome.records[-1]["step"] == 5


def test_a_run_that_takes_too_long_is_ended(tmp_path):
    assert watched(tmp_path / "run", 0, "", steps=10_000, timeout_s=1).problem == "no step 10000 after 1 s"


def test_a_run_that_was_measured_before_is_not_run_again_unless_it_is_another(tmp_path):
    runs = []

    def run():
        runs.append(1)
        return watched(tmp_path / f"run-{len(runs)}", 5, "x", steps=3)

    first = remembered(tmp_path / "run.json", {"keys": 1}, run)
    assert remembered(tmp_path / "run.json", {"keys": 1}, run) == first and len(runs) == 1
    remembered(tmp_path / "run.json", {"keys": 2}, run)
    assert len(runs) == 2


def test_one_process_needs_no_launcher():
    alone = command_line("scripts/cpt.py", "r.yaml", "out")
    assert alone == [sys.executable, "scripts/cpt.py", "--config", "r.yaml", "--output_dir", "out"]
    several = command_line("scripts/cpt.py", "r.yaml", "out", 8, DDP)
    assert several[several.index("--num_processes") + 1] == "8" and DDP in several


def test_a_run_has_the_environment_of_the_launcher_and_a_sites_own_values_win(monkeypatch):
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    found = launch_environment(1, ["0", "1"], "cache")
    assert found["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True" and found["CUDA_VISIBLE_DEVICES"] == "0"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-a,MIG-b")
    assert launch_environment(1, ["MIG-a", "MIG-b"], "cache")["CUDA_VISIBLE_DEVICES"] == "MIG-a"
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64")
    assert launch_environment(1, [], "cache")["PYTORCH_CUDA_ALLOC_CONF"] == "max_split_size_mb:64"
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:64")
    assert "PYTORCH_CUDA_ALLOC_CONF" not in launch_environment(1, [], "cache"), (
        "over the other name torch takes this one"
    )


# -- the time -----------------------------------------------------------------------------------------------------------


def test_no_run_begins_when_time_is_up_and_the_one_in_progress_is_cut(monkeypatch):
    now = 1000.0
    monkeypatch.setattr(time_limit.time, "monotonic", lambda: now)

    def measure(seconds):  # a run of 40 s
        nonlocal now
        now += min(40, seconds)
        return Outcome(None if seconds >= 40 else "no step 30", [], min(40, seconds), 0.0)

    limit = TimeLimit(begin_s=60, cut_s=70)
    assert limit.run(measure, 1800).problem is None
    with pytest.raises(NoTime, match="cut after 30 s, when time was up"):
        limit.run(measure, 1800)  # it begins at 40 s
    with pytest.raises(NoTime, match="no time"):
        limit.run(measure, 1800)
    assert TimeLimit(begin_s=60).run(measure, 1800).problem is None
    assert TimeLimit(cut_s=60).run(measure, 30).problem == "no step 30", "by its own limit"


def test_a_signal_ends_the_run_in_progress_and_no_other_begins():
    limit = TimeLimit()
    before = signal.signal(signal.SIGALRM, limit.stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(NoTime, match="interrupted"):
            limit.run(time.sleep, 20)
    finally:
        signal.signal(signal.SIGALRM, before)
    with pytest.raises(NoTime, match="interrupted"):
        limit.run(time.sleep, 20)
    limit.stop(signal.SIGTERM)  # while tables are written: they are written
    assert limit.signal == signal.SIGTERM


def test_what_there_was_no_time_for_is_said_by_reason():
    rows = [("round 2", "cut after 3 s, when time was up"), ("round 3", "no time"), ("losses and kernels", "no time")]
    assert missing(rows) == "round 2 (cut after 3 s, when time was up); round 3, losses and kernels (no time)"


def test_how_long_a_run_takes_is_its_start_and_its_steps_at_the_planners_rate():
    config = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
              "num_key_value_heads": 8, "vocab_size": 100352, "tie_word_embeddings": True}  # fmt: skip
    job = Job(config, max_length=2048, global_batch=8)
    step = 8 * 2048 * job.flops_per_token() / rate_of("NVIDIA H100 80GB HBM3")
    assert 0.1 < step < 0.4, "the published rate is 78,319 tokens/s: 0.21 s for 16,384"
    start = run_seconds(None, 30, 1, "NVIDIA H100 80GB HBM3")
    assert run_seconds(job, 30, 1, "NVIDIA H100 80GB HBM3") == pytest.approx(start + 30 * step)
    assert run_seconds(job, 30, 1, "another GPU") > run_seconds(job, 30, 1, "NVIDIA H100 80GB HBM3")
    three = variant_seconds(job, [30] * 3, 1, "NVIDIA H100 80GB HBM3")
    assert three == pytest.approx(3 * (start + 30 * step)) and variant_seconds(job, [], 1, None) == 0
    assert variant_seconds(job.but(compiled=True), [30] * 3, 1, "NVIDIA H100 80GB HBM3") > three


def test_what_failed_and_what_was_left_out_are_lines(tmp_path):
    report = tmp_path / "gpu-tests.xml"
    report.write_text(
        '<testsuites><testsuite><testcase classname="tests.test_a" name="test_good"/><testcase classname="tests.test_a" '
        'name="test_bad[1]"><failure message="AssertionError: 1 == 2&#10;more">text</failure></testcase>'
        '<testcase classname="" name="tests.test_b"><error message="collection failure">text</error></testcase></testsuite></testsuites>'
    )
    first = "failed: test tests.test_a::test_bad[1]: AssertionError: 1 == 2"
    assert failed_tests(report) == [first, "failed: test tests.test_b: collection failure"]
    row = {"problem": None, "left_out": [], "rounds": [{}]}
    rows = {
        "good": row,
        "too large": {**row, "problem": "out of memory", "rounds": []},
        "bad": {**row, "problem": "error: no"},
        "late": {**row, "left_out": [["round 1", "no time"]], "rounds": []},
        "once": {**row, "left_out": [["round 2", "no time"]]},
    }
    (tmp_path / "llama-1b-1").mkdir()
    result = tmp_path / "llama-1b-1" / "benchmark.json"
    result.write_text(json.dumps({"variants": rows}))
    assert rows_without_figures(result) == [
        "failed: row llama-1b-1: bad: error: no",
        "left out: row llama-1b-1: late: no time",
    ]
