"""One global batch has one gradient, however it is cut into micro-batches and over processes, and under whatever strategy.

DILQUR_ALL_GRIDS=1 pytest tests/distributed/test_gradients.py -s      every cell, with its difference (a telling part by default)
"""

import functools
import json
import os

import pytest
import torch
from conftest import ROOT, run_program
from matrix import make_data

from dilqur.checkpoint.format import CheckpointReader

ROUNDING = 1e-6  # relative, of the whole gradient: sums of some thousand fp32 numbers in another order
BATCH = 8
ALL = [
    (strategy, world, per_device)
    for strategy in ("single", "ddp", "fsdp2", "zero1", "zero2", "zero3")
    for world in ((1,) if strategy == "single" else (1, 2, 4))
    for per_device in (1, 2, 4, 8)
    if world * per_device <= BATCH
]
TELLING = [
    ("single", 1, 2),
    ("ddp", 2, 1),
    ("ddp", 4, 2),
    ("fsdp2", 2, 4),
    ("zero1", 2, 1),
    ("zero2", 4, 1),
    ("zero3", 2, 2),
]
GRID = ALL if os.environ.get("DILQUR_ALL_GRIDS") else TELLING
ENCODERS = GRID if os.environ.get("DILQUR_ALL_GRIDS") else [("single", 1, 2), ("ddp", 4, 2), ("zero3", 2, 2)]


@pytest.fixture(scope="module")
def first_gradient(server, tmp_path_factory):
    """Of the first step of scripts/PROGRAM.py with these flags: AdamW's first moment is then a tenth of it, and the checkpoint has
    that to the bit."""
    made_already = {}

    def gradient(program, flags, strategy, world, per_device):
        key = (program, strategy, world, per_device)
        if key not in made_already:
            folder = tmp_path_factory.mktemp(program)
            shape = f"--max_length 64 --global_batch_size {BATCH} --max_steps 1 --max_grad_norm none".split()
            shape += (
                "--per_device_train_batch_size",
                per_device,
                "--learning_rate",
                "1e-3",
                "--output_dir",
                folder / "run",
            )
            what = {"program": ROOT / "scripts" / f"{program}.py"}
            with server.launch(strategy, (*flags, *shape), folder / "log", world, **what) as process:
                assert process.wait(300) == 0, (folder / "log").read_text()
            reader = CheckpointReader(folder / "run" / "checkpoints" / "step-0000001")
            parts = [reader.tensor("exp_avg", name).flatten() for name in sorted(reader.shapes)]
            made_already[key] = torch.cat(parts) / (1 - 0.9)
        return made_already[key]

    return gradient


@pytest.fixture(scope="module")
def cpt_gradient(first_gradient, made, tiny_model):
    # best_fit and its padding: no two samples have as many labels, and a mean of means would be another number
    flags = ("--model_name_or_path", tiny_model, "--datasets", f"{{path: {made}/shards}}", "--packing", "best_fit")
    return functools.partial(first_gradient, "cpt", flags)


@pytest.fixture(scope="module")
def mlm_gradient(first_gradient, tmp_path_factory):
    # masks are drawn for each token by itself: no two samples have as many labels
    model, shards = make_data(tmp_path_factory.mktemp("encoder"), "mlm", run_program)
    return functools.partial(
        first_gradient, "mlm", ("--model_name_or_path", model, "--datasets", f"{{path: {shards}}}")
    )


def relative(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("cell", GRID, ids=lambda c: f"{c[0]}-{c[1]}x{c[2]}")
def test_continued_pre_training_has_the_same_gradient_in_every_cell(cpt_gradient, cell):
    difference = relative(cpt_gradient(*cell), cpt_gradient("single", 1, BATCH))
    print(f"cpt {cell}: {difference:.1e}")
    assert difference <= ROUNDING


@pytest.mark.parametrize("cell", ENCODERS, ids=lambda c: f"{c[0]}-{c[1]}x{c[2]}")
def test_pre_training_of_an_encoder_has_the_same_gradient_in_every_cell(mlm_gradient, cell):
    difference = relative(mlm_gradient(*cell), mlm_gradient("single", 1, BATCH))
    print(f"mlm {cell}: {difference:.1e}")
    assert difference <= ROUNDING


@pytest.fixture(scope="module")
def sft_gradient(server, made, tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sft")
    answers = ["Bəli.", "Bakı Azərbaycanın paytaxtıdır və ən böyük şəhəridir.", "Xeyr, belə deyil.", "On iki."]
    with (folder / "chats.jsonl").open("w") as file:
        for number in range(16):
            words = {"user": f"Sual {number}?", "assistant": answers[number % 4] * (1 + number % 3)}
            messages = [{"role": role, "content": text} for role, text in words.items()]
            file.write(json.dumps({"messages": messages}) + "\n")

    def gradient(strategy, world, per_device):
        name = f"{strategy}-{world}-{per_device}"
        flags = f"--global_batch_size {BATCH} --per_device_train_batch_size {per_device} --num_train_epochs 1".split()
        flags += ["--lora_dropout", 0, "--learning_rate", "1e-4", "--max_length", 128, "--bf16", "false"]
        where = ("--model_name_or_path", tiny_model, "--input", folder / "chats.jsonl", "--output_dir", folder / name)
        what = {"program": ROOT / "tests" / "support" / "sft_gradients.py", "GRADIENTS": str(folder / f"{name}.pt")}
        with server.launch(strategy, (*where, *flags), folder / f"{name}.log", world, **what) as process:
            assert process.wait(300) == 0, (folder / f"{name}.log").read_text()
        found = torch.load(folder / f"{name}.pt", weights_only=True)
        return torch.cat([found[name].flatten() for name in sorted(found)])

    return gradient


def test_fine_tuning_has_the_same_gradient_in_every_cell(sft_gradient):
    expected = sft_gradient("single", 1, BATCH)
    for cell in [("single", 1, 2), ("single", 1, 1), ("ddp", 2, 4), ("ddp", 2, 1), ("ddp", 4, 2)]:
        difference = relative(sft_gradient(*cell), expected)
        print(f"sft {cell}: {difference:.1e}")
        assert difference <= ROUNDING, cell
