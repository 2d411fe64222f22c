"""plan.py: before anything is fetched or made it says what each training stage will take, and what is fastest."""

import json
import os

import pytest
import yaml
from conftest import ROOT

from dilqur.data.token_shards import TokenShards
from dilqur.estimate.hardware import GPUS

LLAMA = "recipes/llama3.2-1b-az"


@pytest.fixture
def plan(run, tmp_path):
    """plan(recipe, *flags) → the stages of its JSON, {name: stage}; nothing of a run is there."""

    def stages(recipe, *flags, **environment):
        done = run("scripts/plan.py", recipe, "--run_dir", tmp_path / "run", "--json", *flags, **environment)
        return {stage["stage"]: stage for stage in json.loads(done.stdout)["stages"]}

    return stages


def by_strategy(stage):
    return {found["strategy"]: found for found in stage["set_ups"]}


def test_the_published_recipe_is_planned_without_its_model_and_data(run, plan, tmp_path):
    """On its batch file's 8 H100, under every strategy; the shape is Llama 3.2 1B's with the rows its tokenizer will have."""
    stages = plan(LLAMA)
    assert list(stages) == ["cpt-1-embeddings", "cpt-2-full", "sft"]
    full = stages["cpt-2-full"]
    assert (full["parameters"], full["steps"], full["tokens_a_step"]) == (1_178_667_008, 15_000, 224 * 2048)
    assert stages["cpt-1-embeddings"]["trained"] == 100_352 * 2048
    found = by_strategy(full)
    assert set(found) == {file.stem for file in (ROOT / "accelerate_configs").glob("*.yaml")}
    (launched,) = full["launched"]
    assert (launched["gpu"], launched["nodes"], launched["gpus_per_node"]) == ("H100-80GB", 1, 8)
    assert launched["strategy"] == "fsdp2" and launched["per_device_train_batch_size"] == 14
    assert launched["gpu_hours"] == pytest.approx(8 * launched["hours"]) == pytest.approx(launched["kwh"] / 0.7)
    assert launched["checkpoint_bytes"] == 12 * full["parameters"] and launched["cost"] is None
    said = run("scripts/plan.py", LLAMA, "--run_dir", tmp_path / "run").stdout
    assert "cpt-2-full: 1,178,667,008 parameters, all of them trained; 15,000 steps" in said
    assert (
        "> fsdp2" in said and "fastest " in said and "sft: 1,223,755,776 parameters, 45,088,768 of them trained" in said
    )
    assert not (tmp_path / "run").exists(), "it writes nothing"


def test_an_adapter_is_planned_on_whole_weights_alone(plan):
    """All seven projections at rank 64, on its batch file's 24 GB card; nothing is saved before the end."""
    recipe = f"{LLAMA}/sft.yaml"
    stage = plan(recipe)["sft"]
    (found,) = stage["launched"]
    assert (stage["trained"], stage["steps"], stage["conversations_an_epoch"]) == (45_088_768, None, None)
    assert (found["gpu"], found["strategy"], found["per_device_train_batch_size"]) == ("A10G", "single", 4)
    assert found["fits"] and found["checkpoint_bytes"] == 4 * stage["trained"] and found["best_save_seconds"] is None
    terms = found["memory"]["terms"]
    assert terms["weights"] == 2 * (stage["parameters"] - stage["trained"]) + 4 * stage["trained"]
    assert terms["gradients"] + terms["moments"] == 12 * stage["trained"]
    more = plan(recipe, "--gpus_per_node", 4)["sft"]
    assert [f["strategy"] for f in more["set_ups"] if f["fits"]] == ["ddp"]
    assert more["launched"][0]["bytes_sent_by_a_gpu"] == pytest.approx(2 * 3 / 4 * 4 * stage["trained"])


def test_an_adapter_s_epochs_are_those_of_the_conversations_that_are_there(plan):
    """The quickstart's: 149, of which the held out are no epoch's."""
    stage = plan("recipes/quickstart/sft.yaml", "--gpu", "A10G")["sft"]
    number = stage["conversations_an_epoch"]
    assert 120 < number < 149 and stage["steps"] == 4 * -(-number // 8)


def test_other_gpus_counts_and_strategies_by_flags(plan):
    """The published machine, 2 × 8 A100-40GB, beside H200, with a price for each."""
    kinds = ("--gpu", "a100-40gb", "H200", "--nodes", 2, "--price_per_gpu_hour", 1.5, 4)
    stage = plan(f"{LLAMA}/cpt-2-full.yaml", *kinds, "--strategy", "accelerate_configs/ddp.yaml", "fsdp2")["cpt-2-full"]
    assert [(f["gpu"], f["nodes"], f["strategy"]) for f in stage["set_ups"]] == [
        (gpu, 2, strategy) for gpu in ("A100-40GB", "H200") for strategy in ("ddp", "fsdp2")
    ]
    a100, h200 = (found for found in stage["set_ups"] if found["strategy"] == "fsdp2")
    assert a100["step_seconds"] == pytest.approx(43_000 / 15_000, rel=0.01), "as published"
    assert a100["cost"] == pytest.approx(1.5 * a100["gpu_hours"]) and h200["cost"] == pytest.approx(
        4 * h200["gpu_hours"]
    )
    assert a100["fits"] and not stage["set_ups"][0]["fits"] and "GB for 14 a GPU" in stage["set_ups"][0]["why"]


def test_the_strategy_that_launch_sh_would_take_is_the_one_marked(plan):
    environment = {"DILQUR_ACCELERATE_CONFIG": "accelerate_configs/zero2.yaml"}
    stages = plan("recipes/neobert-az")
    assert [stage["launched"][0]["strategy"] for stage in stages.values()] == ["ddp", "ddp"]
    assert plan("recipes/neobert-az", **environment)["mlm-1-1024"]["launched"][0]["strategy"] == "zero2"


def test_own_measurements_replace_the_assumed_ones(plan):
    recipe = f"{LLAMA}/cpt-2-full.yaml"
    before = plan(recipe, "--nodes", 2)["cpt-2-full"]["launched"][0]
    own = ("--efficiency", 0.3095, "--inter_node_gb_s", 10, "--disk_gb_s", 2)
    after = plan(recipe, "--nodes", 2, *own)["cpt-2-full"]["launched"][0]
    assert after["compute_seconds"] == pytest.approx(2 * before["compute_seconds"], rel=1e-3)
    assert after["network_seconds"] > 10 * before["network_seconds"]
    assert after["checkpoint_seconds"] == pytest.approx(before["checkpoint_seconds"] / 2)


def test_what_an_8b_does_not_fit_on_says_what_would(plan):
    full = plan("recipes/llama3.1-8b-az")["cpt-2-full"]
    found, (fast,) = by_strategy(full), full["fastest"]
    assert not found["ddp"]["fits"] and found["ddp"]["largest_batch"] == 0
    assert found["fsdp2"]["fits"] and fast["fits"]
    assert fast["step_seconds"] <= min(f["step_seconds"] for f in full["set_ups"] if f["fits"])
    assert fast["memory"]["total"] <= GPUS["H100-80GB"].memory


def test_the_terms_of_memory_add_up(plan):
    for stage in plan(LLAMA).values():
        for found in stage["set_ups"]:
            memory = found["memory"]
            assert memory["allocated"] == pytest.approx(sum(memory["terms"].values()) + memory["activations"])
            layers = 16 * sum(memory["activations_of_a_layer"].values())
            assert 0.9 * layers < memory["activations"] < 1.2 * layers, (
                "without checkpointing the layers are nearly all"
            )


def test_shards_and_models_that_are_there_are_looked_at(plan, made, tiny_model, tmp_path):
    folder = tmp_path / "recipes" / "mini"
    folder.mkdir(parents=True)
    (folder / "pipeline.txt").write_text("cpt scripts/cpt.py cpt_p5\n")
    keys = {"model_name_or_path": str(tiny_model), "datasets": [{"path": str(made / "shards")}], "max_length": 64}
    keys |= {"global_batch_size": 8, "num_train_epochs": 2, "learning_rate": 1e-3}
    (folder / "cpt.yaml").write_text(yaml.safe_dump(keys))
    stage = plan(folder)["cpt"]
    tokens = TokenShards(made / "shards").num_tokens
    counted = json.loads((made / "tiny" / "manifest.json").read_text())["result"]["parameters"]
    assert (stage["parameters"], stage["tokens_an_epoch"]) == (counted, tokens)
    assert stage["steps"] == pytest.approx(2 * tokens / 64 / 8, abs=1)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["recipes/quickstart"], "slurm/prepare_cpu.sbatch names no GPU that is known here: give --gpu"),
        ([LLAMA, "--gpu", "A100"], "--gpu A100: which one: A100-40GB, A100-80GB?"),
        ([LLAMA, "--strategy", "fsdp"], "--strategy fsdp: no such file; in accelerate_configs/ there are: ddp, fsdp2"),
        ([LLAMA, "--gpu", "h100", "--price_per_gpu_hour", "1", "2"], "--price_per_gpu_hour: 2 for 1 kinds of GPU"),
        (["recipes/none"], "recipes/none: no recipe there"),
    ],
)
def test_a_mistake_is_one_line(run, flags, said):
    done = run("scripts/plan.py", *flags, code=2)
    assert said in done.stderr and done.stderr.count("\n") == 1 and not done.stdout


def test_a_model_that_nobody_knows_needs_its_shape(run, plan, tmp_path):
    folder = tmp_path / "recipes" / "mini"
    folder.mkdir(parents=True)
    (folder / "pipeline.txt").write_text("cpt scripts/cpt.py cpt_p5\n")
    keys = {"model_name_or_path": "models/Other-7B", "datasets": [{"path": "pack"}], "global_batch_size": 8}
    (folder / "cpt.yaml").write_text(yaml.safe_dump({**keys, "max_steps": 5, "learning_rate": 1e-3}))
    done = run("scripts/plan.py", folder, code=2)
    assert "cpt: model_name_or_path: models/Other-7B is not there and its shape is not known" in done.stderr
    shape = "{vocab_size: 512, hidden_size: 64, intermediate_size: 128, num_hidden_layers: 2, num_attention_heads: 4}"
    assert (
        plan(folder, "--model_config", shape)["cpt"]["parameters"]
        == 2 * 512 * 64 + 2 * (4 * 64 * 64 + 3 * 64 * 128 + 128) + 64
    )


def test_a_broken_recipe_is_found_and_check_prints_nothing_else(run, tmp_path):
    assert run("scripts/plan.py", LLAMA, "--check").stdout == "plan: ok\n"
    folder = tmp_path / "recipes" / "mini"
    folder.mkdir(parents=True)
    (folder / "pipeline.txt").write_text("cpt scripts/cpt.py cpt_p5\n")
    (folder / "cpt.yaml").write_text("learning_rat: 1\n")
    done = run("scripts/plan.py", folder, "--check", code=2)
    assert f"{os.path.join(folder, 'cpt.yaml')}:1: unknown key learning_rat" in done.stderr  # noqa: PTH118
