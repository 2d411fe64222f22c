"""convert_checkpoint.py: other programs' checkpoints come in with every bit of their state and go on; ours go out and back.

The other programs are real: plain accelerate and the Trainer, on two processes, saved with their own calls
(tests/support/train_elsewhere.py). Each launch is done once.
"""

import contextlib
import fcntl
import importlib.util
import io
import json
import math
import os
import re
import shutil
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_LLAMA
from safetensors.torch import load_file, save_file
from train_elsewhere import AFTER, BATCH, BEFORE, BETAS, DECAY, LEARNING_RATE, batch, new_model, new_optimizer
from transformers import AutoModelForCausalLM

from dilqur.checkpoint.format import KINDS, CheckpointReader, chunks_of, publish, write_rank
from dilqur.checkpoint.import_checkpoint import write_checkpoint
from dilqur.checkpoint.import_plain import match_shapes
from dilqur.checkpoint.import_state import TrainingState
from dilqur.common.errors import InputError
from dilqur.data.batches import TokenSamples
from dilqur.models.config import load_config
from dilqur.models.parameters import model_parameters
from dilqur.models.safetensors_io import tensor_bytes

PROGRAM, LENGTH, SEED = "scripts/convert_checkpoint.py", 64, 42
ROUNDING = 1e-6  # relative: a loss is a mean over 512 tokens in fp32, summed in another order (one unit in the last place: 1e-7)
SCRIPT = ROOT / "tests" / "support" / "train_elsewhere.py"
LAUNCHES = {  # name: (accelerate config, how)
    "zero2": ("zero2", "accelerate"),
    "zero3": ("zero3", "accelerate"),
    "fsdp2": ("fsdp2", "trainer"),
    "plain": ("single", "plain"),
}
SOURCES = {  # what is converted: (launch, folder below its own that holds whole.safetensors, folder below that)
    "accelerate, ZeRO-2": ("zero2", "", "saved"),
    "DeepSpeed's engine, ZeRO-2": ("zero2", "", "engine"),
    "accelerate, ZeRO-3": ("zero3", "", "saved"),
    "Trainer, FSDP2 in shards": ("fsdp2", "", f"checkpoint-{BEFORE}"),
    "accelerate, FSDP2 in one piece": ("fsdp2", "", "full"),
    "accelerate, one process": ("plain", "accelerate", "saved"),
    "Trainer, one process": ("plain", "trainer", f"checkpoint-{BEFORE}"),
}


@pytest.fixture(scope="session")
def convert():
    """Runs the program with these flags in this process, where torch is loaded already; returns what it printed."""
    spec = importlib.util.spec_from_file_location("convert_checkpoint", ROOT / PROGRAM)
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def start(*flags, code=0):
        out, err, argv, found = io.StringIO(), io.StringIO(), sys.argv, 0
        sys.argv = [PROGRAM, *map(str, flags)]
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                module.main()
        except SystemExit as left:
            found = left.code
        finally:
            sys.argv = argv
        assert found == code, f"exit code {found}, not {code}\n{out.getvalue()}\n{err.getvalue()}"
        return SimpleNamespace(stdout=out.getvalue(), stderr=err.getvalue())

    return start


class Elsewhere:
    """Runs of train_elsewhere.py on the samples that cpt.py would draw, and our checkpoints made of theirs; each once."""

    def __init__(self, folder, server, convert, model, shards):
        self.folder, self.server, self.convert, self.converted = folder, server, convert, {}
        self.model, self.shards = model, shards
        samples = TokenSamples([{"path": str(shards)}], LENGTH, SEED)
        drawn = samples.batch(np.arange((BEFORE + AFTER) * BATCH))
        self.ids = np.concatenate([drawn["input_ids"], drawn["labels"][:, -1:]], axis=1)
        np.save(folder / "ids.npy", self.ids)

    def trained(self, name):
        """The folder of a launch of LAUNCHES."""
        strategy, how = LAUNCHES[name]
        into, log = self.folder / name, self.folder / f"{name}.log"
        if not into.exists():
            flags = (how, self.model, self.folder / "ids.npy", into)
            with self.server.launch(strategy, flags, log, 1 if strategy == "single" else 2, program=SCRIPT) as process:
                assert process.wait(300) == 0, log.read_text()
        return into

    def source(self, name):
        """(folder with whole.safetensors and after.json, folder of the checkpoint)."""
        launch, below, checkpoint = SOURCES[name]
        return self.trained(launch) / below, self.trained(launch) / below / checkpoint

    def ours(self, name):
        """What the program makes of it: a checkpoint in our format."""
        if name not in self.converted:
            checkpoints = self.folder / "ours" / str(len(self.converted)) / "checkpoints"
            foreign = ("--checkpoint", self.source(name)[1], "--model_name_or_path", self.model)
            self.convert(*foreign, "--trust_pickle", "--output_dir", checkpoints)
            self.converted[name] = checkpoints / f"step-{BEFORE:07d}"
        return self.converted[name]


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory, server, convert, made, tiny_model):
    return Elsewhere(tmp_path_factory.mktemp("elsewhere"), server, convert, tiny_model, made / "shards")


@pytest.fixture(scope="module")
def checkpoint(made, tiny_model):
    """One of ours: the last of the run that made `tiny_model`."""
    return sorted((made / "tiny" / "checkpoints").glob("step-*"))[-1]


def tensors(folder):
    """{kind/NAME: tensor} of a checkpoint of ours."""
    reader = CheckpointReader(folder)
    return {f"{kind}/{name}": reader.tensor(kind, name) for kind, name in reader.dtypes}


def same_bits(one, other):
    return one.keys() == other.keys() and all(
        one[key].dtype == other[key].dtype and torch.equal(one[key].view(torch.uint8), other[key].view(torch.uint8))
        for key in one
    )


def refusal(convert, *flags):
    """What the program says when it refuses: one line, exit code 2."""
    said = convert(*flags, code=2).stderr
    assert said.startswith("error: ") and said.count("\n") == 1, said
    return said


# -- other programs' checkpoints ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOURCES)
def test_weights_and_both_moments_come_in_to_the_bit(elsewhere, name):
    beside, folder = elsewhere.source(name)
    assert same_bits(tensors(elsewhere.ours(name)), load_file(beside / "whole.safetensors"))
    trainer = CheckpointReader(elsewhere.ours(name)).trainer
    assert trainer["step"] == trainer["optimizer_steps"] == BEFORE
    assert trainer["imported"]["from"] == str(folder)
    settings = {"lr": LEARNING_RATE, "betas": list(BETAS), "eps": 1e-8}
    assert trainer["imported"]["hyperparameters"] == [settings | {"weight_decay": decay} for decay in (DECAY, 0.0)]


def losses_from(elsewhere, folder, without=()):
    """The next losses of plain torch on one process, from a checkpoint of ours. without: kinds of state begun at zero."""
    model = new_model(elsewhere.model)
    optimizer, state = new_optimizer(model), tensors(folder)
    for name, parameter in model.named_parameters():
        parameter.data.copy_(state[f"weight/{name}"])
        moments = {kind: state[f"{kind}/{name}"] * (kind not in without) for kind in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.tensor(float(BEFORE)), **moments}
    losses = []
    for step in range(BEFORE, BEFORE + AFTER):
        loss = model(**batch(elsewhere.ids, step)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", SOURCES)
def test_going_on_from_it_gives_the_losses_the_other_program_had(elsewhere, name):
    expected = json.loads((elsewhere.source(name)[0] / "after.json").read_text())
    assert losses_from(elsewhere, elsewhere.ours(name)) == pytest.approx(expected, rel=ROUNDING)


def test_without_the_moments_it_would_not(elsewhere):
    """The test above can fail: these losses are far from the others."""
    name = "accelerate, ZeRO-2"
    expected = json.loads((elsewhere.source(name)[0] / "after.json").read_text())
    found = losses_from(elsewhere, elsewhere.ours(name), without=("exp_avg", "exp_avg_sq"))
    assert found[1:] != pytest.approx(expected[1:], rel=1000 * ROUNDING)


def goes_on_in_cpt(elsewhere, name, strategy, into):
    """{step: loss} of cpt.py under `strategy`, from our checkpoint of `name`, on the data that the other program would see."""
    shutil.copytree(elsewhere.ours(name), into / "checkpoints" / f"step-{BEFORE:07d}")
    flags = ["--model_name_or_path", elsewhere.model, "--datasets", f"{{path: {elsewhere.shards}}}", "--seed", SEED]
    flags += ["--max_length", LENGTH, "--global_batch_size", BATCH, "--max_steps", BEFORE + AFTER]
    flags += ["--learning_rate", LEARNING_RATE, "--lr_scheduler_type", "constant", "--max_grad_norm", "none"]
    flags += ["--adam_beta1", BETAS[0], "--adam_beta2", BETAS[1], "--weight_decay", DECAY, "--output_dir", into]
    with elsewhere.server.launch(strategy, flags, into / "log") as process:
        assert process.wait(300) == 0, (into / "log").read_text()
    records = map(json.loads, (into / "metrics.jsonl").read_text().splitlines())
    return {record["step"]: record["loss"] for record in records}


@pytest.mark.parametrize("strategy", ["fsdp2", "ddp"])
@pytest.mark.parametrize("name", ["accelerate, ZeRO-2", "Trainer, FSDP2 in shards"])
def test_cpt_goes_on_from_it_under_another_strategy(elsewhere, tmp_path, name, strategy):
    expected = json.loads((elsewhere.source(name)[0] / "after.json").read_text())
    found = goes_on_in_cpt(elsewhere, name, strategy, tmp_path / "run")
    assert list(found) == list(range(BEFORE + 1, BEFORE + AFTER + 1))
    assert list(found.values()) == pytest.approx(expected, rel=ROUNDING)


# -- what is refused -----------------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(elsewhere, tmp_path):
    """Copies a checkpoint of SOURCES, lets a function spoil the copy, and returns the flags to convert it."""

    def make(name, spoil=lambda folder: None):
        folder = tmp_path / "copy"
        shutil.copytree(elsewhere.source(name)[1], folder)
        spoil(folder)
        return (
            "--checkpoint",
            folder,
            "--model_name_or_path",
            elsewhere.model,
            "--output_dir",
            tmp_path / "out" / "checkpoints",
        )

    return make


def cut(folder, pattern):
    """Cut the last tenth off a file: where the data are."""
    (file, *_) = sorted(folder.glob(pattern))
    os.truncate(file, file.stat().st_size * 9 // 10)


def remove(folder, pattern):
    for path in folder.glob(pattern):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def test_pickles_are_not_loaded_unasked(convert, damaged):
    flags = damaged("accelerate, ZeRO-2")
    assert "loading one runs any code that is in it: give --trust_pickle" in refusal(convert, *flags)
    assert "--trust_pickle" in refusal(convert, *flags, "--check")


@pytest.mark.parametrize(
    ("name", "spoil", "said"),
    [
        (
            "accelerate, ZeRO-2",
            lambda f: cut(f, "*/zero_pp_rank_1*"),
            "zero_pp_rank_1_mp_rank_00_optim_states.pt: damaged or cut",
        ),
        (
            "accelerate, ZeRO-2",
            lambda f: remove(f, "*/zero_pp_rank_1*"),
            "1 of 2 zero_pp_rank_*_optim_states.pt are there",
        ),
        ("accelerate, ZeRO-2", lambda f: remove(f, "*/mp_rank*"), "no *_model_states.pt in it: not whole"),
        (
            "accelerate, ZeRO-2",
            lambda f: remove(f, "*/zero*"),
            "no zero_pp_rank_*_optim_states.pt in it: not whole, or written without",
        ),
        ("DeepSpeed's engine, ZeRO-2", lambda f: remove(f, "global_step*"), "known here"),
        ("Trainer, FSDP2 in shards", lambda f: cut(f, "optimizer_0/__1*"), "optimizer_0: damaged or cut"),
        ("Trainer, FSDP2 in shards", lambda f: cut(f, "pytorch_model_fsdp_0/.metadata"), ".metadata: damaged or cut"),
        (
            "Trainer, FSDP2 in shards",
            lambda f: remove(f, "pytorch_model_fsdp_0"),
            "pytorch_model_fsdp_0/.metadata: not there",
        ),
        ("accelerate, FSDP2 in one piece", lambda f: cut(f, "optimizer.bin"), "optimizer.bin: damaged or cut"),
        ("accelerate, one process", lambda f: cut(f, "model.safetensors"), "model.safetensors: damaged or cut"),
        ("accelerate, one process", lambda f: remove(f, "model.safetensors"), "no .safetensors beside optimizer.bin"),
    ],
)
def test_what_is_cut_or_missing_is_named_and_nothing_half_written_is_left(
    convert, damaged, tmp_path, name, spoil, said
):
    assert said in refusal(convert, *damaged(name, spoil), "--trust_pickle")
    assert not list(tmp_path.glob("out/checkpoints/*")) and not list(tmp_path.glob("out/checkpoints/.*"))


def test_a_folder_of_two_formats_is_refused_and_says_which(convert, elsewhere, damaged):
    other = elsewhere.source("Trainer, FSDP2 in shards")[1] / "optimizer_0"
    flags = damaged("accelerate, ZeRO-2", lambda folder: shutil.copytree(other, folder / "optimizer_0"))
    assert "holds two formats, DeepSpeed and FSDP, sharded" in refusal(convert, *flags, "--trust_pickle")


def test_what_is_no_checkpoint_is_told_what_was_looked_for(convert, elsewhere, tmp_path):
    flags = ("--model_name_or_path", elsewhere.model, "--output_dir", tmp_path / "out", "--trust_pickle")
    said = refusal(convert, "--checkpoint", tmp_path, *flags)
    for name in ("index.json", "zero_pp_rank_*_optim_states.pt", "pytorch_model_fsdp_0/", "optimizer.bin"):
        assert name in said
    said = refusal(convert, "--checkpoint", elsewhere.trained("plain") / "trainer", *flags)
    assert f"name one of those in it, such as {elsewhere.trained('plain')}/trainer/checkpoint-" in said


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("intermediate_size", 96, "gate_proj.weight is 128 × 64, the model of"),
        ("num_hidden_layers", 1, "which the model of"),
        ("num_hidden_layers", 3, "holds no weight of model.layers.2."),
    ],
)
def test_the_checkpoint_of_another_model_is_refused(convert, elsewhere, tmp_path, key, value, said):
    config = json.loads((elsewhere.model / "config.json").read_text()) | {key: value}
    (tmp_path / "config.json").write_text(json.dumps(config))
    foreign = (
        "--checkpoint",
        elsewhere.source("accelerate, ZeRO-2")[1],
        "--model_name_or_path",
        tmp_path,
        "--trust_pickle",
    )
    assert said in refusal(convert, *foreign, "--output_dir", tmp_path / "out")


def test_an_optimizer_of_another_model_beside_the_weights_is_refused(convert, elsewhere, damaged):
    def swap(folder):
        state = torch.load(folder / "optimizer.bin")
        first = state["state"][0]
        state["state"][0] = {key: value[:-1] if value.ndim else value for key, value in first.items()}
        torch.save(state, folder / "optimizer.bin")

    flags = damaged("accelerate, one process", swap)
    assert "the optimizer of another model" in refusal(convert, *flags, "--trust_pickle")


def test_an_optimizer_that_is_not_adamw_is_refused(convert, elsewhere, damaged):
    def momentum(folder):
        state = torch.load(folder / "optimizer.bin")
        state["state"] = {number: {"momentum_buffer": s["exp_avg"]} for number, s in state["state"].items()}
        torch.save(state, folder / "optimizer.bin")

    flags = damaged("accelerate, one process", momentum)
    assert "its optimizer has no exp_avg (momentum_buffer): not AdamW" in refusal(convert, *flags, "--trust_pickle")


def test_frozen_weights_that_are_not_those_of_the_given_model_are_refused(convert, elsewhere, damaged):
    """An optimizer of the matrices alone, and a norm that is not the model's: its run began with another one."""

    def freeze(folder):
        state = torch.load(folder / "optimizer.bin")
        first, _norms = state["param_groups"]
        state["param_groups"], state["state"] = [first], {number: state["state"][number] for number in first["params"]}
        torch.save(state, folder / "optimizer.bin")

    flags = damaged("accelerate, one process", freeze)
    assert "which its run did not train, is not that of" in refusal(convert, *flags, "--trust_pickle")


# -- to a Hugging Face folder and back ------------------------------------------------------------------------------------


def test_the_folder_holds_the_model_that_the_run_itself_wrote(convert, checkpoint, tiny_model, tmp_path):
    said = convert("--checkpoint", checkpoint, "--output_dir", tmp_path / "hf").stdout
    assert "step 2, 155,968 parameters" in said
    assert same_bits(load_file(tmp_path / "hf" / "model.safetensors"), load_file(tiny_model / "model.safetensors"))
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert json.loads((tmp_path / "hf" / name).read_text()) == json.loads((tiny_model / name).read_text())
    assert not (tmp_path / "hf" / "optimizer").exists()
    assert "nothing to do" in convert("--checkpoint", checkpoint, "--output_dir", tmp_path / "hf").stdout


def test_there_and_back_with_the_optimizer_every_bit_is_the_same(convert, checkpoint, tmp_path):
    convert("--checkpoint", checkpoint, "--output_dir", tmp_path / "hf", "--with_optimizer")
    AutoModelForCausalLM.from_pretrained(tmp_path / "hf")  # the optimizer beside it is in nobody's way
    convert("--model_name_or_path", tmp_path / "hf", "--output_dir", tmp_path / "checkpoints")
    back = tmp_path / "checkpoints" / checkpoint.name
    assert same_bits(tensors(back), tensors(checkpoint))
    one, other = CheckpointReader(back).trainer, CheckpointReader(checkpoint).trainer
    assert one == other | {
        "optimizer_steps": 2,
        "trainable": other["trainable"],
    }  # recipe, data, position: it is that run


def losses_of_two_more_steps(run, made, folder, *flags, code=0):
    """Of the run that made `tiny_model`, which had two, from the checkpoint in `folder`; or what it says when it refuses."""
    same = ["--datasets", f"{{path: {made}/shards}}", "--tokenizer", made / "tokenizer", "--model_config", TINY_LLAMA]
    same += ["--max_length", 64, "--global_batch_size", 4, "--learning_rate", "1e-3"]
    done = run("scripts/cpt.py", *same, "--max_steps", 4, "--output_dir", folder, *flags, code=code)
    return done.stderr if code else [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").open()][-2:]


@pytest.mark.parametrize("with_optimizer", [True, False])
def test_a_run_goes_on_from_what_came_back(convert, run, made, checkpoint, tmp_path, with_optimizer):
    """With the optimizer it is the run that it was, to the bit; without, the same weights, and AdamW begins anew."""
    shutil.copytree(checkpoint, tmp_path / "direct" / "checkpoints" / checkpoint.name)
    expected = losses_of_two_more_steps(run, made, tmp_path / "direct")
    convert("--checkpoint", checkpoint, "--output_dir", tmp_path / "hf", *["--with_optimizer"] * with_optimizer)
    step = [] if with_optimizer else ["--step", 2]
    convert("--model_name_or_path", tmp_path / "hf", "--output_dir", tmp_path / "run" / "checkpoints", *step)
    if with_optimizer:
        assert losses_of_two_more_steps(run, made, tmp_path / "run") == expected
    else:
        assert "--resume_without_optimizer" in losses_of_two_more_steps(run, made, tmp_path / "run", code=2)
        first, second = losses_of_two_more_steps(run, made, tmp_path / "run", "--resume_without_optimizer", "true")
        assert first == expected[0] and second != expected[1]


def test_bfloat16_halves_the_weights_and_is_no_way_back(convert, checkpoint, tiny_model, tmp_path):
    flags = ("--checkpoint", checkpoint, "--output_dir", tmp_path / "hf", "--dtype", "bfloat16")
    assert "dtype: leave it out with with_optimizer" in refusal(convert, *flags, "--with_optimizer")
    convert(*flags)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "bfloat16"
    expected = {name: weight.bfloat16() for name, weight in load_file(tiny_model / "model.safetensors").items()}
    assert same_bits(load_file(tmp_path / "hf" / "model.safetensors"), expected)


def test_weights_alone_become_a_checkpoint_that_says_it_has_no_optimizer(convert, tiny_model, tmp_path):
    said = convert("--model_name_or_path", tiny_model, "--output_dir", tmp_path, "--step", 7).stdout
    assert "no optimizer" in said and "--resume_without_optimizer" in said
    reader = CheckpointReader(tmp_path / "step-0000007")
    assert same_bits(
        {name: reader.tensor("weight", name) for name in reader.shapes}, load_file(tiny_model / "model.safetensors")
    )
    assert {kind for kind, _ in reader.dtypes} == {"weight"}
    assert "is there already" in refusal(
        convert, "--model_name_or_path", tiny_model, "--output_dir", tmp_path, "--step", 7
    )


def test_nothing_is_put_into_the_folder_of_a_run_that_is_going_on(convert, tiny_model, tmp_path):
    with (tmp_path / ".lock").open("a+") as lock:  # as a run holds it
        fcntl.flock(lock, fcntl.LOCK_EX)
        flags = ("--model_name_or_path", tiny_model, "--output_dir", tmp_path / "checkpoints")
        assert "another process is writing this folder" in refusal(convert, *flags)
    convert(*flags)


def test_an_optimizer_beside_weights_that_have_changed_since_is_refused(convert, checkpoint, tmp_path):
    convert("--checkpoint", checkpoint, "--output_dir", tmp_path / "hf", "--with_optimizer")
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    weights["model.norm.weight"][3] += 1
    save_file(weights, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    back = ("--model_name_or_path", tmp_path / "hf", "--output_dir", tmp_path / "back")
    assert "weight of model.norm.weight: its checksum does not match" in refusal(convert, *back)
    assert not list((tmp_path / "back").iterdir())
    shutil.rmtree(tmp_path / "hf" / "optimizer")
    convert(*back)


def made_checkpoint(folder, shapes, trainer, dtype=torch.float32):
    """A checkpoint of ours, of random numbers."""
    generator = torch.Generator().manual_seed(3)
    state = {(kind, n): torch.randn(s, generator=generator).to(dtype) for kind in KINDS for n, s in shapes.items()}
    stored = {key: (tuple(tensor.shape), dtype) for key, tensor in state.items()}
    training = TrainingState("made up", stored, lambda *key: state[key], list(shapes))
    return write_checkpoint(folder, 5, training, list(shapes), trainer)


def test_what_was_frozen_comes_from_the_model_the_run_began_with(convert, tiny_model, tmp_path):
    name = "model.embed_tokens.weight"
    recipe = {"recipe": {"model_name_or_path": str(tiny_model)}}
    folder = made_checkpoint(tmp_path / "checkpoints", {name: (1280, 64)}, recipe, torch.bfloat16)
    convert("--checkpoint", folder, "--output_dir", tmp_path / "hf", "--with_optimizer")
    found, base = load_file(tmp_path / "hf" / "model.safetensors"), load_file(tiny_model / "model.safetensors")
    assert found.keys() == base.keys()
    assert torch.equal(found[name], CheckpointReader(folder).tensor("weight", name))
    assert (
        json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "float32"
    )  # none of the others is rounded
    assert all(torch.equal(found[other], base[other]) for other in base if other != name)
    convert("--model_name_or_path", tmp_path / "hf", "--output_dir", tmp_path / "back")
    assert same_bits(
        tensors(tmp_path / "back" / folder.name), tensors(folder)
    )  # the embeddings alone again, in bfloat16
    moved = ("--checkpoint", folder, "--output_dir", tmp_path / "other")
    other = {**json.loads((tiny_model / "config.json").read_text()), "vocab_size": 1408}
    (tmp_path / "config.json").write_text(json.dumps(other))
    assert "[1408, 64]: give --model_name_or_path" in refusal(convert, *moved, "--model_name_or_path", tmp_path)


# -- memory ------------------------------------------------------------------------------------------------------------------


class Peak:
    """The most memory of its own (not mapped from files) that this process takes inside the block, in bytes above the start."""

    def __enter__(self):
        self._done, self.bytes, self._start = threading.Event(), 0, self._now()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._done.set()
        self._thread.join()

    def _watch(self):
        while not self._done.wait(0.001):
            self.bytes = max(self.bytes, self._now() - self._start)

    def _now(self):
        return 1024 * int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def test_memory_is_that_of_a_few_tensors_whatever_the_size_of_the_model(convert, tiny_model, tmp_path, monkeypatch):
    shape = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 24, "head_dim": 64}
    shape["tie_word_embeddings"] = False
    config = json.loads((tiny_model / "config.json").read_text()) | shape
    for file in tiny_model.glob("*.json"):
        shutil.copy(file, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    shapes = model_parameters(load_config(tmp_path), tmp_path).shapes
    folder = made_checkpoint(tmp_path / "checkpoints", shapes, {"recipe": {"model_name_or_path": str(tmp_path)}})
    state, largest = 12 * sum(map(math.prod, shapes.values())), 4 * max(map(math.prod, shapes.values()))
    assert state > 250e6 and largest < 1.4e6
    monkeypatch.setattr("dilqur.models.safetensors_io.MAX_BYTES", 20 << 20)  # several files of each kind
    with Peak() as peak:
        convert("--checkpoint", folder, "--output_dir", tmp_path / "hf", "--with_optimizer")
        convert("--model_name_or_path", tmp_path / "hf", "--output_dir", tmp_path / "back")
    # Python's own objects and the allocator's slack are the most of it; a copy of one kind of state would be 85 MB
    assert peak.bytes < 30e6
    assert same_bits(tensors(tmp_path / "back" / folder.name), tensors(folder))


# -- verify -------------------------------------------------------------------------------------------------------------------


def test_verify_says_in_one_line_what_a_whole_checkpoint_is(convert, checkpoint):
    said = convert("--checkpoint", checkpoint, "--verify").stdout
    assert said == (
        f"{checkpoint}: whole: step 2, 155,968 parameters in 20 tensors, both moments, float32, 0.002 GB from 1 rank\n"
    )
    assert convert("--checkpoint", checkpoint.parent, "--verify").stdout == said, "the newest in a folder of several"
    found = json.loads(convert("--checkpoint", checkpoint, "--verify", "--json").stdout)
    assert found["step"] == 2 and found["parameters"] == 155_968 and found["ranks"] == 1 and found["optimizer"]


def test_verify_reads_the_first_version_of_the_format(convert):
    assert (
        "whole"
        in convert("--checkpoint", ROOT / "tests/unit/checkpoint/checkpoint-version-1/step-0000002", "--verify").stdout
    )


def test_verify_names_the_file_of_every_kind_that_is_damaged(convert, checkpoint, tmp_path):
    for file in sorted(p.name for p in checkpoint.iterdir()):
        copy = tmp_path / file / checkpoint.name
        shutil.copytree(checkpoint, copy)
        content = bytearray((copy / file).read_bytes())
        for at in (0, len(content) // 2, len(content) - 1):
            content[at] ^= 4
            (copy / file).write_bytes(content)
            said = refusal(convert, "--checkpoint", copy, "--verify")
            assert file in said or file == "COMPLETE", said
            content[at] ^= 4
        (copy / file).write_bytes(content[:-1] if file != "COMPLETE" else content[:-2])
        refusal(convert, "--checkpoint", copy, "--verify")


def test_verify_finds_an_element_that_no_piece_holds_or_two_do(convert, checkpoint, tmp_path, monkeypatch):
    """Files that are whole in themselves, of ranks that shared out the work wrongly."""
    for name, start, length, said in (
        ("gap", 0, 30, "no file holds weight/w[30:32]"),
        ("twice", 30, 32, "as another chunk does"),
    ):
        part, final = tmp_path / f".tmp-{name}", tmp_path / name / "step-0000001"
        part.mkdir()
        final.parent.mkdir()
        for rank, (first, count) in enumerate(
            [(32, 32), (0, length)] if name == "twice" else [(32, 32), (start, length)]
        ):
            count = count + 1 if name == "twice" and rank == 1 else count
            chunks = chunks_of("weight", "w", first, count, torch.float32)
            write_rank(part, rank, chunks, {"w": [64]}, [tensor_bytes(torch.zeros(count))])
        publish(part, final, 1, 2, {})
        assert said in refusal(convert, "--checkpoint", final, "--verify")


# -- numbers instead of names ------------------------------------------------------------------------------------------------


MODEL = {"embed": (9, 4), "q": (4, 4), "norm": (4,), "o": (4, 4), "head": (9, 4)}


@pytest.mark.parametrize(
    ("groups", "names"),
    [
        ([["embed", "q", "norm", "o", "head"]], None),
        ([["embed", "q", "o", "head"], ["norm"]], None),  # decay on matrices only
        ([["q", "norm", "o"], ["embed", "head"]], None),  # the vocabulary's matrices apart
        ([["norm"]], None),  # the others frozen
        ([["embed"]], "more than one way"),  # or the head?
        ([["q"], ["o"]], "more than one way"),
        ([["norm", "q", "o"]], "of another model"),  # not in the model's order
    ],
)
def test_an_optimizers_numbers_mean_the_only_names_that_they_can_mean(groups, names):
    shapes = [[MODEL[name] for name in group] for group in groups]
    if names is None:
        assert match_shapes(shapes, MODEL, "optimizer.bin") == groups
    else:
        with pytest.raises(InputError, match=names):
            match_shapes(shapes, MODEL, "optimizer.bin")
