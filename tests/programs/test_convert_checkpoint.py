"""convert_checkpoint.py: other programs' checkpoints come in with every bit of their state and resume; ours go out and back.

The other programs are real: plain accelerate and the Trainer, on one and two processes, saved with their own calls
(tests/support/train_elsewhere.py). Each launch is done once.
"""

import contextlib
import fcntl
import io
import json
import math
import os
import re
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_LLAMA
from safetensors.torch import load_file, save_file
from train_elsewhere import AFTER, BATCH, BEFORE, BETAS, DECAY, LEARNING_RATE
from transformers import AutoModelForCausalLM

from dilqur.checkpoint.format import KINDS, CheckpointReader
from dilqur.checkpoint.import_checkpoint import write_checkpoint
from dilqur.checkpoint.import_state import TrainingState
from dilqur.data.batches import TokenSamples
from dilqur.models.config import load_config
from dilqur.models.parameters import model_parameters
from dilqur.pipeline.program import load_program

PROGRAM, LENGTH, SEED = "scripts/convert_checkpoint.py", 64, 42
ROUNDING = 1e-6  # relative: a loss is a mean over 512 tokens in fp32, summed in another order (the last place is 1e-7)
SCRIPT = ROOT / "tests" / "support" / "train_elsewhere.py"
LAUNCHES = {"zero2": "accelerate", "zero3": "accelerate", "fsdp2": "trainer", "single": "plain"}  # strategy: how
PLAIN = "accelerate, one process"
SOURCES = {  # what is converted: (launch, folder in its own with whole.safetensors, folder in that)
    "accelerate, ZeRO-2": ("zero2", "", "saved"),
    "DeepSpeed's engine, ZeRO-2": ("zero2", "", "engine"),
    "accelerate, ZeRO-3": ("zero3", "", "saved"),
    "Trainer, FSDP2 in shards": ("fsdp2", "", f"checkpoint-{BEFORE}"),
    "accelerate, FSDP2 whole": ("fsdp2", "", "full"),
    PLAIN: ("single", "accelerate", "saved"),
    "Trainer, one process": ("single", "trainer", f"checkpoint-{BEFORE}"),
}


def convert(*flags, code=0):
    """What the program prints, in this process, where torch is imported already; fails unless it exits with `code`."""
    out, found = io.StringIO(), 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            load_program(PROGRAM)(list(map(str, flags)))
    except SystemExit as left:
        found = left.code
    assert found == code, out.getvalue()
    return out.getvalue()


def refusal(*flags):
    """What the program says when it refuses: one line, exit code 2."""
    said = convert(*flags, code=2)
    assert said.startswith("error: ") and said.count("\n") == 1, said
    return said


def tensors(folder):
    """{kind/NAME: tensor} of a checkpoint of ours."""
    reader = CheckpointReader(folder)
    return {f"{kind}/{name}": reader.tensor(kind, name) for kind, name in reader.dtypes}


def same_bits(one, other):
    return one.keys() == other.keys() and all(
        one[key].dtype == other[key].dtype and torch.equal(one[key].view(torch.uint8), other[key].view(torch.uint8))
        for key in one
    )


class Elsewhere:
    """Runs of train_elsewhere.py on the samples that cpt.py would draw, and our checkpoints made of theirs; each once."""

    def __init__(self, folder, server, model, shards):
        self.folder, self.server, self.model, self.shards = folder, server, model, shards
        samples = TokenSamples([{"path": str(shards)}], LENGTH, SEED)
        drawn = samples.batch(np.arange((BEFORE + AFTER) * BATCH))
        np.save(folder / "ids.npy", np.concatenate([drawn["input_ids"], drawn["labels"][:, -1:]], axis=1))

    def source(self, name):
        """(folder with whole.safetensors and after.json, folder of the checkpoint)."""
        strategy, below, checkpoint = SOURCES[name]
        into, log = self.folder / strategy, self.folder / f"{strategy}.log"
        if not into.exists():
            flags, world = (LAUNCHES[strategy], self.model, self.folder / "ids.npy", into), 1 + (strategy != "single")
            with self.server.launch(strategy, flags, log, world, program=SCRIPT) as process:
                assert process.wait(300) == 0, log.read_text()
        return into / below, into / below / checkpoint

    def ours(self, name):
        """What the program makes of it: a checkpoint in our format."""
        checkpoints = self.folder / "ours" / name / "checkpoints"
        if not checkpoints.exists():
            foreign = ("--checkpoint", self.source(name)[1], "--model_name_or_path", self.model, "--trust_pickle")
            convert(*foreign, "--output_dir", checkpoints)
        return checkpoints / f"step-{BEFORE:07d}"

    def losses_in_cpt(self, name, strategy, into, *more):
        """{step: loss} of cpt.py resuming under `strategy`, on the data that the other program goes on with."""
        shutil.copytree(self.ours(name).parent, into / "checkpoints")
        flags = ["--model_name_or_path", self.model, "--datasets", f"{{path: {self.shards}}}", "--seed", SEED]
        flags += ["--max_length", LENGTH, "--global_batch_size", BATCH, "--max_steps", BEFORE + AFTER]
        flags += ["--learning_rate", LEARNING_RATE, "--lr_scheduler_type", "constant", "--max_grad_norm", "none"]
        flags += ["--adam_beta1", BETAS[0], "--adam_beta2", BETAS[1], "--weight_decay", DECAY, "--output_dir", into]
        with self.server.launch(strategy, [*flags, *more], into / "log") as process:
            assert process.wait(300) == 0, (into / "log").read_text()
        records = map(json.loads, (into / "metrics.jsonl").read_text().splitlines())
        return {record["step"]: record["loss"] for record in records}


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory, server, made, tiny_model):
    return Elsewhere(tmp_path_factory.mktemp("elsewhere"), server, tiny_model, made / "shards")


@pytest.fixture(scope="module")
def checkpoint(made, tiny_model):
    """One of ours: the last of the run that made `tiny_model`."""
    return sorted((made / "tiny" / "checkpoints").glob("step-*"))[-1]


# -- other programs' checkpoints --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOURCES)
def test_weights_and_both_moments_come_in_to_the_bit(elsewhere, name):
    beside, folder = elsewhere.source(name)
    assert same_bits(tensors(elsewhere.ours(name)), load_file(beside / "whole.safetensors"))
    trainer = CheckpointReader(elsewhere.ours(name)).trainer
    assert trainer["step"] == trainer["optimizer_steps"] == BEFORE
    assert trainer["imported"]["from"] == str(folder)
    settings = {"lr": LEARNING_RATE, "betas": list(BETAS), "eps": 1e-8}
    assert trainer["imported"]["hyperparameters"] == [settings | {"weight_decay": decay} for decay in (DECAY, 0.0)]


RESUMED = {
    "accelerate, ZeRO-2": "ddp",
    "accelerate, ZeRO-3": "fsdp2",
    "Trainer, FSDP2 in shards": "ddp",
    PLAIN: "fsdp2",
}


@pytest.mark.parametrize(("name", "strategy"), RESUMED.items())
def test_cpt_resumes_under_another_strategy_with_the_losses_the_other_program_had(elsewhere, tmp_path, name, strategy):
    expected = json.loads((elsewhere.source(name)[0] / "after.json").read_text())
    found = elsewhere.losses_in_cpt(name, strategy, tmp_path / "run")
    assert list(found) == list(range(BEFORE + 1, BEFORE + AFTER + 1))
    assert list(found.values()) == pytest.approx(expected, rel=ROUNDING)
    if name == "accelerate, ZeRO-2":  # this comparison can fail: without the moments the losses are far from these
        found = elsewhere.losses_in_cpt(name, strategy, tmp_path / "other", "--resume_without_optimizer", "true")
        assert list(found.values())[1:] != pytest.approx(expected[1:], rel=1000 * ROUNDING)


def test_pickles_are_not_loaded_unasked(elsewhere, tmp_path):
    flags = ("--checkpoint", elsewhere.source("accelerate, ZeRO-2")[1], "--model_name_or_path", elsewhere.model)
    for check in ((), ("--check",)):
        said = refusal(*flags, "--output_dir", tmp_path / "checkpoints", *check)
        assert "loading one runs any code that is in it: give --trust_pickle" in said


def cut(file):
    os.truncate(file, file.stat().st_size * 9 // 10)  # the last tenth holds data


def rewrite(file, change):
    state = torch.load(file)
    change(state)
    torch.save(state, file)


def shorten_moments(state):
    state["state"][0] = {key: value[:-1] if value.ndim else value for key, value in state["state"][0].items()}


def make_sgd(state):
    state["state"] = {number: {"momentum_buffer": s["exp_avg"]} for number, s in state["state"].items()}


def freeze_norms(state):
    """Frozen, they would have to be those of the base model."""
    state["param_groups"] = state["param_groups"][:1]
    state["state"] = {number: state["state"][number] for number in state["param_groups"][0]["params"]}


REFUSED = {  # what is said: (source, how a copy of it is spoiled)
    "1 of 2 zero_pp_rank_*_optim_states.pt": (
        "accelerate, ZeRO-2",
        lambda f: next(f.glob("*/zero_pp_rank_1*")).unlink(),
    ),
    "no checkpoint known": ("DeepSpeed's engine, ZeRO-2", lambda f: shutil.rmtree(next(f.glob("global_step*")))),
    "optimizer_0: damaged or cut": ("Trainer, FSDP2 in shards", lambda f: cut(next(f.glob("optimizer_0/__1*")))),
    "optimizer.bin: damaged or cut": ("accelerate, FSDP2 whole", lambda f: cut(f / "optimizer.bin")),
    "model.safetensors: damaged or cut": (PLAIN, lambda f: cut(f / "model.safetensors")),
    "two formats, FSDP, sharded and one process": (PLAIN, lambda f: (f / "optimizer_0").mkdir()),
    "optimizer of another model": (PLAIN, lambda f: rewrite(f / "optimizer.bin", shorten_moments)),
    "no exp_avg (momentum_buffer): not AdamW": (PLAIN, lambda f: rewrite(f / "optimizer.bin", make_sgd)),
    "its run did not train, is not that of": (PLAIN, lambda f: rewrite(f / "optimizer.bin", freeze_norms)),
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_is_damaged_mixed_or_foreign_is_named_and_nothing_half_written_is_left(elsewhere, tmp_path, said):
    source, spoil = REFUSED[said]
    folder, out = shutil.copytree(elsewhere.source(source)[1], tmp_path / "copy"), tmp_path / "checkpoints"
    spoil(folder)
    flags = ("--model_name_or_path", elsewhere.model, "--trust_pickle", "--output_dir", out)
    assert said in refusal("--checkpoint", folder, *flags)
    assert not out.exists() or not list(out.iterdir())


def test_the_checkpoint_of_another_model_is_refused(elsewhere, tmp_path):
    flags = ("--model_name_or_path", tmp_path, "--trust_pickle", "--output_dir", tmp_path / "out")
    config = json.loads((elsewhere.model / "config.json").read_text())
    for said, change in {
        "gate_proj.weight is 128 × 64, the model of": {"intermediate_size": 96},
        "which the model of": {"num_hidden_layers": 1},
        "holds no weight of model.layers.2.": {"num_hidden_layers": 3},
    }.items():
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        assert said in refusal("--checkpoint", elsewhere.source("accelerate, ZeRO-2")[1], *flags)


def test_flags_that_do_not_fit_are_refused_before_anything_is_read(elsewhere, checkpoint, tiny_model, tmp_path):
    trained, out = elsewhere.source("Trainer, one process")[0], ("--output_dir", tmp_path / "out")
    for flags, said in {
        (): "give checkpoint (one to convert or verify), or model_name_or_path",
        ("--checkpoint", checkpoint): "--output_dir missing",
        ("--checkpoint", checkpoint, *out, "--encoder_layout", "neobert"): "encoder_layout: is for a checkpoint of mlm",
        ("--checkpoint", checkpoint, *out, "--with_optimizer", "--dtype", "bfloat16"): "dtype: leave it out with",
        ("--model_name_or_path", tiny_model, *out, "--with_optimizer"): "with_optimizer: is for writing a Hugging Face",
        ("--model_name_or_path", tiny_model, "--output_dir", tmp_path / "step-1"): "step-N is made in it",
        ("--checkpoint", trained, "--verify"): "is no checkpoint of this project",
        ("--checkpoint", trained, *out): f"name one of those in it, such as {trained}/checkpoint-",
    }.items():
        assert said in refusal(*flags, "--check")


# -- to a Hugging Face folder and back --------------------------------------------------------------------------------


def test_the_folder_holds_the_model_that_the_run_itself_wrote(checkpoint, tiny_model, tmp_path):
    flags, expected = ("--checkpoint", checkpoint, "--output_dir"), load_file(tiny_model / "model.safetensors")
    assert "step 2, 155,968 parameters" in convert(*flags, tmp_path / "hf")
    assert same_bits(load_file(tmp_path / "hf" / "model.safetensors"), expected)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert json.loads((tmp_path / "hf" / name).read_text()) == json.loads((tiny_model / name).read_text())
    assert not (tmp_path / "hf" / "optimizer").exists()
    assert "nothing to do" in convert(*flags, tmp_path / "hf")
    convert(*flags, tmp_path / "half", "--dtype", "bfloat16")
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    halves = {name: weight.bfloat16() for name, weight in expected.items()}
    assert same_bits(load_file(tmp_path / "half" / "model.safetensors"), halves)


def test_there_and_back_it_is_the_same_run_and_without_the_optimizer_the_same_weights(run, made, checkpoint, tmp_path):
    def losses_of_two_more_steps(folder, *more, code=0):
        same = ["--datasets", f"{{path: {made}/shards}}", "--tokenizer", made / "tokenizer", "--max_length", 64]
        same += ["--model_config", TINY_LLAMA, "--global_batch_size", 4, "--learning_rate", "1e-3", "--max_steps", 4]
        done = run("scripts/cpt.py", *same, "--output_dir", folder, *more, code=code)
        return done.stderr if code else [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").open()][-2:]

    direct, back, weights, hf = (tmp_path / name for name in ("direct", "back", "weights", "hf"))
    shutil.copytree(checkpoint, direct / "checkpoints" / checkpoint.name)
    expected = losses_of_two_more_steps(direct)
    convert("--checkpoint", checkpoint, "--output_dir", hf, "--with_optimizer")
    AutoModelForCausalLM.from_pretrained(hf)  # ignores the optimizer
    convert("--model_name_or_path", hf, "--output_dir", back / "checkpoints")
    assert same_bits(tensors(back / "checkpoints" / checkpoint.name), tensors(checkpoint))
    assert losses_of_two_more_steps(back) == expected

    shutil.rmtree(hf / "optimizer")
    flags = ("--model_name_or_path", hf, "--output_dir", weights / "checkpoints", "--step", 2)
    said = convert(*flags)
    assert "no optimizer" in said and "--resume_without_optimizer" in said
    assert "is there already" in refusal(*flags)
    assert "--resume_without_optimizer" in losses_of_two_more_steps(weights, code=2)
    first, second = losses_of_two_more_steps(weights, "--resume_without_optimizer", "true")
    assert first == expected[0] and second != expected[1]


def test_nothing_is_put_into_the_folder_of_a_run_that_is_training(tiny_model, tmp_path):
    flags = ("--model_name_or_path", tiny_model, "--output_dir", tmp_path / "checkpoints")
    with (tmp_path / ".lock").open("a+") as lock:  # as a run holds it
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another process is writing this folder" in refusal(*flags)
    convert(*flags)


def test_an_optimizer_beside_weights_that_have_changed_since_is_refused(checkpoint, tmp_path):
    convert("--checkpoint", checkpoint, "--output_dir", tmp_path / "hf", "--with_optimizer")
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    weights["model.norm.weight"][3] += 1
    save_file(weights, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    back = ("--model_name_or_path", tmp_path / "hf", "--output_dir", tmp_path / "back")
    assert "weight of model.norm.weight: its checksum does not match" in refusal(*back)
    assert not list((tmp_path / "back").iterdir())


def made_checkpoint(folder, shapes, trainer, dtype=torch.float32):
    """A checkpoint of ours, of random elements."""
    generator = torch.Generator().manual_seed(3)
    state = {(kind, n): torch.randn(s, generator=generator).to(dtype) for kind in KINDS for n, s in shapes.items()}
    stored = {key: (tuple(tensor.shape), dtype) for key, tensor in state.items()}
    training = TrainingState("made up", stored, lambda *key: state[key], list(shapes))
    return write_checkpoint(folder, 5, training, list(shapes), trainer)


def test_frozen_weights_come_from_the_model_the_run_began_with(tiny_model, tmp_path):
    name = "model.embed_tokens.weight"
    recipe = {"recipe": {"model_name_or_path": str(tiny_model)}}
    folder = made_checkpoint(tmp_path / "checkpoints", {name: (1280, 64)}, recipe, torch.bfloat16)
    convert("--checkpoint", folder, "--output_dir", tmp_path / "hf", "--with_optimizer")
    found, base = load_file(tmp_path / "hf" / "model.safetensors"), load_file(tiny_model / "model.safetensors")
    assert same_bits(found, base | {name: CheckpointReader(folder).tensor("weight", name)})
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["dtype"] == "float32"  # none of the others is rounded on loading
    convert("--model_name_or_path", tmp_path / "hf", "--output_dir", tmp_path / "back")
    assert same_bits(tensors(tmp_path / "back" / folder.name), tensors(folder))  # the embeddings alone, in bfloat16
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 1408}))
    other = ("--output_dir", tmp_path / "other", "--model_name_or_path", tmp_path)
    assert "[1408, 64]: give --model_name_or_path" in refusal("--checkpoint", folder, *other)


def peak_memory(work):
    """The most memory of its own (not mapped from files) that this process takes during work(), in bytes above the start."""

    def now():
        return 1024 * int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1])

    start, seen, thread = now(), [], threading.Thread(target=work)
    thread.start()
    while thread.is_alive():
        seen.append(now() - start)
        thread.join(0.001)
    return max(seen)


def test_memory_is_that_of_a_few_tensors_whatever_the_size_of_the_model(tiny_model, tmp_path, monkeypatch):
    shape = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 24, "head_dim": 64}
    config = json.loads((tiny_model / "config.json").read_text()) | shape | {"tie_word_embeddings": False}
    for file in tiny_model.glob("*.json"):
        shutil.copy(file, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    shapes = model_parameters(load_config(tmp_path), tmp_path).shapes
    folder = made_checkpoint(tmp_path / "checkpoints", shapes, {"recipe": {"model_name_or_path": str(tmp_path)}})
    state, largest = 12 * sum(map(math.prod, shapes.values())), 4 * max(map(math.prod, shapes.values()))
    assert state > 250e6 and largest < 1.4e6
    monkeypatch.setattr("dilqur.models.safetensors_io.MAX_BYTES", 20 << 20)  # several files of each kind
    monkeypatch.setattr("dilqur.checkpoint.import_checkpoint.FILE_BYTES", 100 << 20)

    def there_and_back():
        convert("--checkpoint", folder, "--output_dir", tmp_path / "hf", "--with_optimizer")
        convert("--model_name_or_path", tmp_path / "hf", "--output_dir", tmp_path / "back")

    # Python's own objects and the allocator's slack are the most of it; a copy of one kind of state would be 85 MB
    assert peak_memory(there_and_back) < 30e6
    assert len(list((tmp_path / "back" / folder.name).glob("rank-*.json"))) == 3
    assert same_bits(tensors(tmp_path / "back" / folder.name), tensors(folder))


# -- verify -----------------------------------------------------------------------------------------------------------


def test_verify_says_in_one_line_what_a_whole_checkpoint_is(run, checkpoint):
    said = convert("--checkpoint", checkpoint, "--verify")
    about = "step 2, 155,968 parameters in 20 tensors, both moments, float32, 0.002 GB from 1 rank"
    assert said == f"{checkpoint}: whole: {about}\n"
    assert convert("--checkpoint", checkpoint.parent, "--verify") == said, "the newest in a folder of several"
    found = json.loads(run(PROGRAM, "--checkpoint", checkpoint, "--verify", "--json").stdout)
    assert found["step"] == 2 and found["parameters"] == 155_968 and found["ranks"] == 1 and found["optimizer"]
    first_version = ROOT / "tests/unit/checkpoint/checkpoint-version-1/step-0000002"
    assert "whole" in convert("--checkpoint", first_version, "--verify")
