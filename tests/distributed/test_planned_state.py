"""What the planner says a GPU holds of the training state, and what a rank really holds of a tiny model, under every strategy."""

import json

import pytest
from conftest import ROOT

from dilqur.estimate.job import Job
from dilqur.estimate.memory import state_of
from dilqur.estimate.strategy import strategy_of

PROCESSES = 2


STRATEGIES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")


@pytest.mark.parametrize(
    ("strategy", "bf16"), [*((strategy, True) for strategy in STRATEGIES), ("fsdp2", False), ("zero2", False)]
)
def test_weights_gradients_moments_and_the_checkpoint_are_as_planned(
    server, tmp_path, made, tiny_model, strategy, bf16
):
    (tmp_path / "evidence").mkdir()
    data = ("--model_name_or_path", tiny_model, "--datasets", f"{{path: {made}/shards}}", "--learning_rate", "1e-3")
    shape = f"--max_length 64 --global_batch_size 8 --max_steps 1 --per_device_train_batch_size 2 --bf16 {str(bf16).lower()}"
    where = {"processes": PROCESSES, "EVIDENCE": str(tmp_path / "evidence")}
    program, log = ROOT / "tests" / "support" / "state_evidence.py", tmp_path / "log"
    flags = (*data, *shape.split(), "--output_dir", tmp_path / "run")
    with server.launch(strategy, flags, log, program=program, **where) as process:
        assert process.wait(300) == 0, log.read_text()
    ranks = [json.loads((tmp_path / "evidence" / f"rank-{rank}.json").read_text()) for rank in range(PROCESSES)]
    job = Job(json.loads((tiny_model / "config.json").read_text()), product=2 if bf16 else 4)
    planned = state_of(job, strategy_of(strategy, 1, PROCESSES))
    for held in ranks:
        assert held == pytest.approx(planned, rel=0.05)
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("step-*")
    on_disk = sum(file.stat().st_size for file in checkpoint.iterdir())
    assert on_disk == pytest.approx(3 * job.weight * job.trained, rel=0.05)
