"""The recipes: whole, faithful to what was published, and movable."""

from dataclasses import MISSING, fields

import pytest
import yaml
from conftest import ROOT

from dilqur.data.batches import split_batch
from dilqur.pipeline.program import load_program
from dilqur.pipeline.rows import read_pipeline

RECIPES = sorted(p for p in (ROOT / "recipes").iterdir() if (p / "pipeline.txt").exists())


def load(name, stage):
    return yaml.safe_load((ROOT / "recipes" / name / f"{stage}.yaml").read_text())


def defaults(row):
    """{key: default} of the row's program."""
    keys = fields(load_program(row.program).settings)
    made = {f.name: f.default_factory() for f in keys if f.default_factory is not MISSING}
    return {f.name: f.default for f in keys if f.default is not MISSING} | made


def resolved(name, stage):
    """{key: value} of a stage, defaults included."""
    row = next(row for row in read_pipeline(ROOT / "recipes" / name) if row.name == stage)
    return defaults(row) | load(name, stage)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.name)
def test_every_row_of_the_pipeline_has_its_recipe_program_and_batch_file(recipe):
    rows = read_pipeline(recipe)
    assert {row.recipe for row in rows} == {p.stem for p in recipe.glob("*.yaml")}
    for row in rows:
        assert (ROOT / row.program).exists() and (ROOT / "slurm" / f"{row.batch}.sbatch").exists(), row


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.name)
def test_nothing_inside_names_the_folder(recipe):
    """Copying the folder makes a new run: no recipe refers to its own folder, nor to its run folder."""
    for file in recipe.glob("*.*"):
        if file.is_file():
            assert f"recipes/{recipe.name}" not in file.read_text() and "runs/" not in file.read_text(), file


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.name)
def test_a_recipe_says_what_differs_from_the_defaults(recipe):
    """But for what was published with it, whatever the defaults become."""
    for row in read_pipeline(recipe):
        written = load(recipe.name, row.recipe)
        same = {name for name, value in defaults(row).items() if name in written and written[name] == value}
        assert not {name for name in same if not name.startswith("lora_")}, (row.recipe, same)


def test_the_published_run_is_in_the_recipe():
    """Azercell and AWS: 100k tokens padded to 100,352; 5,000 and 15,000 steps of 224 x 2,048; LoRA r 64, alpha 28."""
    size, multiple = (
        resolved("llama3.2-1b-az", "tokenizer")["vocab_size"],
        resolved("llama3.2-1b-az", "transplant")["pad_to_multiple_of"],
    )
    assert -(-(size + 256) // multiple) * multiple == 100_352
    first, second, sft = (resolved("llama3.2-1b-az", s) for s in ("cpt-1-embeddings", "cpt-2-full", "sft"))
    assert (first["learning_rate"], first["max_steps"], second["learning_rate"], second["max_steps"]) == (
        3.2e-3,
        5000,
        2.4e-3,
        15000,
    )
    assert all(
        (r["global_batch_size"], r["max_length"], r["bf16"], r["use_liger_kernel"]) == (224, 2048, True, True)
        for r in (first, second)
    )
    assert split_batch(224, first["per_device_train_batch_size"], 16) == (14, 1), (
        "14 a GPU on 16 GPUs, nothing accumulated"
    )
    assert (sft["lora_r"], sft["lora_alpha"], sft["lora_dropout"], sft["max_length"], sft["learning_rate"]) == (
        64,
        28,
        0.05,
        1024,
        1e-4,
    )
    assert len(sft["lora_target_modules"]) == 7


def test_the_published_encoder_is_in_the_recipe():
    """AzNEOBERT: 28 x 768, 64,000 tokens, 20 % masked, all [MASK]; 127,000 steps of 2,304 x 1,024, then 7,000 of 512 x 4,096."""
    from dilqur.tokenizer.encoder_tokens import CONTROL_TOKENS

    tokenizer, first, second = (resolved("neobert-az", s) for s in ("tokenizer", "mlm-1-1024", "mlm-2-4096"))
    assert tokenizer["vocab_size"] + len(CONTROL_TOKENS) == first["model_config"]["vocab_size"] == 64_000
    shape = {"hidden_size": 768, "num_hidden_layers": 28, "num_attention_heads": 12, "intermediate_size": 3072}
    assert first["model_config"] == {**shape, "vocab_size": 64_000, "max_length": 1024}
    keys = ("max_length", "global_batch_size", "max_steps")
    assert [tuple(r[k] for k in keys) for r in (first, second)] == [(1024, 2304, 127_000), (4096, 512, 7000)]
    assert (first["learning_rate"], first["min_lr_ratio"], first["warmup_steps"]) == (1e-4, 0, 2000)
    for recipe in (first, second):
        assert (recipe["mlm_probability"], recipe["mask_rule"], recipe["bf16"]) == (0.2, "mask", True)
        adam = tuple(recipe[k] for k in ("adam_beta1", "adam_beta2", "weight_decay", "max_grad_norm"))
        assert adam == (0.9, 0.95, 0.01, 1.0)
    assert split_batch(2304, first["per_device_train_batch_size"], 8) == (48, 6), "48 × 6 accumulated × 8 GPUs"


def test_the_8b_differs_from_the_1b_in_these_keys_alone():
    differing = {}
    for file in sorted((ROOT / "recipes" / "llama3.2-1b-az").glob("*.yaml")):
        one, eight = resolved("llama3.2-1b-az", file.stem), resolved("llama3.1-8b-az", file.stem)
        if keys := sorted(k for k in one.keys() | eight.keys() if one.get(k) != eight.get(k)):
            differing[file.stem] = keys
    training = ["gradient_checkpointing", "learning_rate", "per_device_train_batch_size"]
    assert differing == {
        "bpb": ["model_name_or_path"],
        "compare": ["model_name_or_path"],
        "report": ["title"],
        "fertility": ["tokenizer"],
        "transplant": ["model_name_or_path"],
        "sft": ["gradient_checkpointing", "per_device_train_batch_size"],  # a card of 24 GB
        "cpt-1-embeddings": [*training, "unfrozen_parameters"],  # the 8B's head is not tied to its embeddings
        "cpt-2-full": training,
    }
