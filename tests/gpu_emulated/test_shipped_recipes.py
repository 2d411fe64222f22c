"""The production recipes as they are shipped, under the strategies they are for, with a GPU's kernels: only sizes are shrunk.

Without a GPU, Liger's kernels run in Triton's interpreter, everything else as on any CPU over gloo: accelerate's files, FSDP2's policies,
DeepSpeed, evaluation before every save, the end. The same recipe with its plain kernels has to have the same losses.
"""

import json
import shutil
from collections import namedtuple

import pytest
import yaml
from combinations import all_recipes, training_stages
from conftest import ROOT, run_program
from fork_launch import Server

from dilqur.checkpoint.format import CheckpointReader
from dilqur.checkpoint.local_shards import MOMENTS

pytest.importorskip("triton", reason="Triton is not installed here")
CLOSE = 2e-3  # nats: between bfloat16 matmuls of two kernels
CLOSE_NORM = 5e-3  # of the gradient, relative: bfloat16 has 3 digits
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
# sizes and nothing else, but the rate of a first step for the peak: two steps of two micro-batches on two processes, evaluated and saved
SHRUNK = {
    "max_length": 8, "global_batch_size": 4, "per_device_train_batch_size": 1, "max_steps": 2, "warmup_steps": 1,
    "eval_steps": 1, "save_steps": 1, "max_eval_samples": 2, "dataloader_num_workers": 1,
}  # fmt: skip
TINY_ENCODER = "{vocab_size: 1152, hidden_size: 64, num_hidden_layers: 2, num_attention_heads: 4, intermediate_size: 192, max_length: 32}"

Case = namedtuple("Case", "recipe stage strategy processes", defaults=(2,))
LLAMAS = [
    (recipe, stage) for recipe in ("llama3.2-1b-az", "llama3.1-8b-az") for stage in ("cpt-1-embeddings", "cpt-2-full")
]
PLAIN = {"cpt": ("--use_liger_kernel", "false"), "mlm": ("--torch_compile", "false")}
ENCODERS = [Case("neobert-az", stage, "ddp") for stage in ("mlm-1-1024", "mlm-2-4096")]
ASSISTANTS = ("llama3.2-1b-az", "llama3.1-8b-az")
DEFAULT = [
    *(Case(*stage, "fsdp2") for stage in LLAMAS),
    *(Case("llama3.2-1b-az", "cpt-2-full", strategy) for strategy in ("ddp", "zero2")),
]
CROSS = [
    Case(*stage, strategy, 4 if strategy == "hsdp" else 2)
    for strategy in ("ddp", "zero2", "zero3", "hsdp", "fsdp2_offload")
    for stage in LLAMAS
    if (*stage, strategy, 2) not in DEFAULT
]


@pytest.fixture(scope="module")
def server():
    with Server(TRITON_INTERPRET="1") as running:
        yield running


class Runs:
    """Runs of the stages of the shipped recipes, each done once, in run folders whose earlier stages have left tiny results."""

    def __init__(self, folder, server, made, made_encoder):
        self.folder, self.server, self.made, self.made_encoder = folder, server, made, made_encoder

    def run(self, case, plain):
        """The folder of the finished run of a stage, as it is shipped or with plain kernels. What a second phase goes on from
        is a plain first one."""
        run_dir = self.folder / "-".join([*map(str, case), "plain" if plain else "shipped"])
        folder, kind = run_dir / case.stage, "mlm" if "neobert" in case.recipe else "cpt"
        if folder.exists():
            return folder
        made = self.made_encoder if kind == "mlm" else self.made
        held_out = made / ("shards" if kind == "mlm" else "held_out")
        finished(run_dir / "pack", train=made / "shards", validation=held_out)
        if kind == "mlm":
            finished(run_dir / "tokenizer", **{f.name: f for f in (made / "tokenizer").glob("tokenizer*.json")})
        elif not case.stage.startswith("cpt-2"):
            finished(run_dir / "transplant")
            make_llama(run_dir / "transplant" / "model", made / "tokenizer", tied="1b" in case.recipe)
        first = {"cpt-2-full": "cpt-1-embeddings", "mlm-2-4096": "mlm-1-1024"}.get(case.stage)
        if first:
            (run_dir / first).symlink_to(self.run(case._replace(stage=first), True))
        recipe, log = ROOT / "recipes" / case.recipe / f"{case.stage}.yaml", run_dir / "log"
        keys = yaml.safe_load(recipe.read_text())
        # at the peak Adam makes whole steps of rounding errors
        shrunk = {**SHRUNK, "learning_rate": keys["learning_rate"] / keys["warmup_steps"]}
        sizes = [word for key, value in shrunk.items() for word in (f"--{key}", value)]
        if "model_config" in keys:
            sizes += "--model_config", TINY_ENCODER
        words = ("--config", recipe, "--run_dir", run_dir, *sizes, *(PLAIN[kind] if plain else ()))
        program = ROOT / "scripts" / f"{kind}.py"
        with self.server.launch(case.strategy, words, log, case.processes, program=program) as process:
            assert process.wait(300) == 0, log.read_text()
        return folder


def finished(folder, **links):
    """A stage's folder that looks finished, with links to what it has made."""
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text('{"result": {}}')
    for name, target in links.items():
        (folder / name).symlink_to(target)


def make_llama(folder, tokenizer, tied):
    """A Llama with random weights and all that Llama 3.2 1B (tied) and Llama 3.1 8B have but their size."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    rope = {**LLAMA3_ROPE, "original_max_position_embeddings": 8192}
    ids = {"bos_token_id": 300, "eos_token_id": 301, "pad_token_id": 304}
    config = LlamaConfig(
        vocab_size=556, **shape, **ids, rope_parameters=rope, max_position_embeddings=131072, tie_word_embeddings=tied
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    for file in tokenizer.glob("*.json"):
        if file.name != "manifest.json":
            shutil.copy(file, folder)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """`made` with 300 tokens: one of Liger's kernels runs once for each row of the head."""
    folder, corpus = tmp_path_factory.mktemp("small"), ROOT / "recipes" / "quickstart" / "corpus" / "az"
    tokenizer = folder / "tokenizer"
    run_program("data_tools/train_tokenizer.py", "--input", corpus, "--vocab_size", 300, "--output_dir", tokenizer)
    for name in ("shards", "held_out"):
        packed = ("--tokenizer", tokenizer, "--output_dir", folder / name)
        run_program("data_tools/pack_mmap.py", "--input", corpus, *packed)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory, server, small, made_encoder):
    return Runs(tmp_path_factory.mktemp("recipes"), server, small, made_encoder)


def numbers(folder, name):
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {record["step"]: record[name] for record in records if name in record}


@pytest.mark.parametrize("case", [*DEFAULT, *ENCODERS], ids=lambda case: "-".join(map(str, case)))
def test_a_shipped_recipe_runs_and_learns_as_with_plain_kernels(runs, case):
    kind = "mlm" if case in ENCODERS else "cpt"
    shipped, plain = runs.run(case, False), runs.run(case, True)
    for name, close in (("loss", {"abs": CLOSE}), ("eval_loss", {"abs": CLOSE}), ("grad_norm", {"rel": CLOSE_NORM})):
        found, expected = numbers(shipped, name), numbers(plain, name)
        assert list(found) == list(expected) == [1, 2]
        assert list(found.values()) == pytest.approx(list(expected.values()), **close), name
    log = (shipped.parent / "log").read_text()
    assert (
        "Liger's layers and loss" if kind == "cpt" else "compiled by layer"
    ) in log and "going on without" not in log
    assert (shipped / "model" / "model.safetensors").exists()
    for step in ("step-0000001", "step-0000002"):
        reader = CheckpointReader(shipped / "checkpoints" / step)
        assert {str(dtype) for dtype in reader.dtypes.values()} == {"torch.float32"}, "as it was trained"
        assert all(reader.tensor(kind, name).any() for name in reader.shapes for kind in MOMENTS), "all of it"


@pytest.mark.parametrize("recipe", ASSISTANTS)
def test_a_shipped_assistant_recipe_runs_and_learns_as_without_recomputing(runs, recipe):
    """On one GPU, as slurm/sft_1gpu.sbatch has it; fewer conversations, and shorter ones."""
    losses = {}
    for name, recomputed in (("shipped", ()), ("plain", ("--gradient_checkpointing", "false"))):
        run_dir = runs.folder / f"{recipe}-sft-{name}"
        finished(run_dir / "cpt-2-full")
        make_llama(run_dir / "cpt-2-full" / "model", runs.made / "tokenizer", tied="1b" in recipe)
        lines = (ROOT / "recipes" / "quickstart" / "corpus" / "az_qa.jsonl").read_text().splitlines()[:24]
        (run_dir / "qa.jsonl").write_text("\n".join(lines) + "\n")
        shorter = ("--input", run_dir / "qa.jsonl", "--max_length", 512, "--num_train_epochs", 1)
        words = ("--config", ROOT / "recipes" / recipe / "sft.yaml", "--run_dir", run_dir, *shorter, *recomputed)
        with runs.server.launch("single", words, run_dir / "log", 1, program=ROOT / "scripts" / "sft.py") as process:
            assert process.wait(300) == 0, (run_dir / "log").read_text()
        assert (run_dir / "sft" / "model" / "model.safetensors").exists()
        records = map(json.loads, (run_dir / "sft" / "metrics.jsonl").read_text().splitlines())
        losses[name] = [r[key] for r in records for key in ("loss", "eval_loss") if key in r]
    assert len(losses["plain"]) > 1 and losses["shipped"] == pytest.approx(losses["plain"], abs=CLOSE)


@pytest.mark.long
@pytest.mark.parametrize("case", CROSS, ids=lambda case: "-".join(map(str, case)))
def test_every_strategy_runs_the_llama_recipes(runs, case):
    test_a_shipped_recipe_runs_and_learns_as_with_plain_kernels(runs, case)


def test_every_recipe_trains_by_a_combination_of_keys_that_is_run_here_or_in_the_quickstarts():
    run = {training_stages(ROOT / "recipes" / case.recipe)[case.stage] for case in [*DEFAULT, *ENCODERS]}
    run |= {training_stages(ROOT / "recipes" / name)["sft"] for name in ASSISTANTS}
    for quickstart in ("quickstart", "quickstart-encoder"):  # tests/test_quickstart.py
        run |= set(training_stages(ROOT / "recipes" / quickstart).values())
    stages = {f"{r.name}/{stage}": found for r in all_recipes() for stage, found in training_stages(r).items()}
    assert not {name: found for name, found in stages.items() if found not in run}
