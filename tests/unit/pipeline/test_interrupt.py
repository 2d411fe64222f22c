"""When a run stops before its end: a STOP file, a step, minutes, the end of the Slurm job."""

import os
import time

import pytest

from dilqur.pipeline.interrupt import Interrupt


@pytest.fixture(autouse=True)
def outside_slurm(monkeypatch):
    for name in ("SLURM_JOB_ID", "SLURM_JOB_END_TIME", "RANK", "DILQUR_STAGE_STARTED"):
        monkeypatch.delenv(name, raising=False)


def put(file, seconds_ago):
    file.touch()
    os.utime(file, (time.time() - seconds_ago,) * 2)


def test_a_run_nobody_stops_goes_on(tmp_path):
    assert Interrupt(tmp_path).stop_reason(10**6) is None


def test_a_stop_file_stops_it_and_is_named(tmp_path):
    interrupt = Interrupt(tmp_path)
    assert interrupt.stop_reason(1) is None
    (tmp_path / "STOP").touch()
    assert interrupt.stop_reason(1) == f"{tmp_path}/STOP is there"


def test_stop_at_step_stops_after_that_step_not_before(tmp_path):
    interrupt = Interrupt(tmp_path, stop_at_step=3)
    assert [bool(interrupt.stop_reason(step)) for step in (0, 2, 3, 4)] == [False, False, True, True]


@pytest.mark.parametrize(("minutes", "stops"), [(0.001, True), (1, False)])
def test_max_minutes_are_minutes_of_this_start(tmp_path, minutes, stops):
    interrupt = Interrupt(tmp_path, max_minutes=minutes)
    assert interrupt.stop_reason(0) is None
    time.sleep(0.1)  # 0.001 minutes are 0.06 s
    assert (interrupt.stop_reason(0) == "the time is up") is stops


# -- the end of the Slurm job -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("left", "stops"), [(310, False), (290, True)])  # seconds: a checkpoint has 300 by default
def test_the_jobs_end_leaves_time_for_a_checkpoint(tmp_path, monkeypatch, left, stops):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time() + left)))
    assert (Interrupt(tmp_path).stop_reason(0) == "the time is up") is stops
    assert Interrupt(tmp_path, margin_s=60).stop_reason(0) is None


def test_the_earlier_of_job_end_and_max_minutes_counts(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time() + 290)))
    assert Interrupt(tmp_path, max_minutes=60).stop_reason(0) == "the time is up"


@pytest.mark.parametrize(
    ("answer", "stops"),
    [
        ("%Y-%m-%dT%H:%M:%S", True),  # local time, as Slurm 22 prints it, in a padded column
        ("Unknown", False),  # a partition without a limit
        ("", False),  # the job is unknown to squeue
    ],
)
def test_before_slurm_23_squeue_is_asked_for_the_end(tmp_path, monkeypatch, answer, stops):
    end = time.strftime(answer, time.localtime(time.time() + 290))
    squeue = tmp_path / "squeue"
    squeue.write_text(f'#!/bin/sh\n[ "$*" = "-h -j 7 -O EndTime" ] && echo "{end:<20}"\n')
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert (Interrupt(tmp_path).stop_reason(0) == "the time is up") is stops
    monkeypatch.setenv("RANK", "1")  # 10,000 ranks asking would be an attack on the controller
    assert Interrupt(tmp_path).job_end is None


def test_a_job_without_squeue_has_no_end(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert Interrupt(tmp_path).stop_reason(0) is None


# -- markers of an earlier run ----------------------------------------------------------------------------------------


def test_markers_of_an_earlier_run_do_not_stop_this_one(tmp_path):
    put(tmp_path / "STOP", seconds_ago=60)
    put(tmp_path / "REQUEUE", seconds_ago=60)
    interrupt = Interrupt(tmp_path)
    interrupt.clear_stale()
    assert list(tmp_path.iterdir()) == []
    assert interrupt.stop_reason(0) is None


def test_a_stop_that_came_while_the_run_was_starting_counts(tmp_path, monkeypatch):
    monkeypatch.setenv("DILQUR_STAGE_STARTED", str(time.time() - 120))  # the batch script; imports took the rest
    put(tmp_path / "STOP", seconds_ago=60)
    interrupt = Interrupt(tmp_path)
    interrupt.clear_stale()
    assert interrupt.stop_reason(0)


def test_a_stop_that_came_between_start_and_first_step_counts(tmp_path):
    interrupt = Interrupt(tmp_path)
    (tmp_path / "STOP").touch()
    interrupt.clear_stale()
    assert interrupt.stop_reason(0)


def test_a_stopped_run_says_that_there_is_more_to_do(tmp_path):
    Interrupt(tmp_path).request_requeue()
    assert (tmp_path / "REQUEUE").exists()
