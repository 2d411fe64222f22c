"""metrics.jsonl: a line per step, whole after a kill, and after a resume that of a run without the interruption."""

import json
import types

import numpy as np
import pytest

from dilqur.training.metrics import Metrics, gpu_health


def record(folder, first, last, **values):
    """What a run from step `first` to `last` leaves behind."""
    metrics = Metrics(folder, 10)
    metrics.start(first)
    for step in range(first + 1, last + 1):
        metrics.log(step, loss=1 / step, **values)
    return metrics


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_line_is_there_as_soon_as_its_step_is_done(tmp_path):
    record(tmp_path, 0, 3)  # not closed: the process may be killed now
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]
    assert all(line["loss"] == 1 / line["step"] for line in lines(tmp_path))  # a float64 keeps its digits


def test_a_resume_drops_the_lines_of_steps_that_are_done_again(tmp_path):
    record(tmp_path, 0, 7, run=1).close()
    record(tmp_path, 4, 10, run=2).close()  # the last checkpoint was of step 4
    assert [(line["step"], line["run"]) for line in lines(tmp_path)] == [
        *((step, 1) for step in (1, 2, 3, 4)),
        *((step, 2) for step in (5, 6, 7, 8, 9, 10)),
    ]


@pytest.mark.parametrize("half", ['{"step": 6, "lo', '{"step": 6, "loss": 0.1', "\0\0\0\0", "\n"])
def test_the_half_line_of_a_killed_run_is_dropped(tmp_path, half):
    record(tmp_path, 0, 5).close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(half)
    record(tmp_path, 5, 6).close()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_a_run_that_starts_anew_has_no_lines_of_the_one_before(tmp_path):
    record(tmp_path, 0, 5).close()
    record(tmp_path, 0, 1).close()
    assert [line["step"] for line in lines(tmp_path)] == [1]


def test_a_resume_killed_at_once_loses_no_line(tmp_path):
    record(tmp_path, 0, 5).close()
    Metrics(tmp_path, 10).start(5)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_the_log_says_the_step_and_all_digits_of_the_loss(tmp_path, capsys):
    loss = float(np.float32(2.0000002))  # the float32 after 2: two logs that differ in the last bit must look different
    metrics = Metrics(tmp_path, 10)
    metrics.start(0)
    metrics.log(1, loss=loss, learning_rate=2.4e-3, tokens_per_second=63771.2)
    line = capsys.readouterr().out.strip()
    assert line.startswith("step 1/10 | ")
    assert np.float32(line.split("loss ")[1].split()[0]) == np.float32(loss)
    assert "learning_rate 2.400e-03 | tokens_per_second 63,771" in line


def test_logging_steps_thins_the_log_not_the_file_and_the_last_step_is_always_said(tmp_path, capsys):
    metrics = Metrics(tmp_path, 10, logging_steps=4)
    metrics.start(0)
    for step in range(1, 11):
        metrics.log(step, loss=1.0, **({"eval_loss": 2.0} if step == 5 else {}))
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == ["4/10", "5/10", "8/10", "10/10"]
    assert len(lines(tmp_path)) == 10


def test_what_nvml_says_of_a_gpu_is_in_the_metrics(monkeypatch):
    """With the pinned pynvml and an NVML that answers: its own functions where a driver would be called."""
    import pynvml
    import torch

    properties = types.SimpleNamespace(uuid="1234-abcd")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    answers = {
        "nvmlInit": None,
        "nvmlDeviceGetHandleByUUID": "the GPU",
        "nvmlDeviceGetUtilizationRates": types.SimpleNamespace(gpu=97),
        "nvmlDeviceGetPowerUsage": 650_500,
        "nvmlDeviceGetTemperature": 61,
        "nvmlDeviceGetCurrentClocksThrottleReasons": pynvml.nvmlClocksThrottleReasonHwSlowdown,
    }
    asked = {}
    for name, answer in answers.items():
        assert callable(getattr(pynvml, name))
        monkeypatch.setattr(
            pynvml, name, lambda *arguments, name=name, answer=answer: asked.update({name: arguments}) or answer
        )
    expected = {"gpu_utilization": 97, "gpu_power_w": 650.5, "gpu_temperature_c": 61, "gpu_throttled": 1}
    assert gpu_health() == expected and asked["nvmlDeviceGetHandleByUUID"] == ("GPU-1234-abcd",)
