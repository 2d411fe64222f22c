"""What bounded a run: said from its metrics, and not more than they know."""

import pytest

from dilqur.training.bottleneck import in_one_line, what_bounds


def steps(count=6, seconds=1.0, **more):
    return [{"step": n, "step_seconds": seconds, "step_seconds_median": seconds, **more} for n in range(1, count + 1)]


@pytest.mark.parametrize(
    ("what", "key"),
    [("data", "data_wait_seconds"), ("checkpoint", "checkpoint_stall_seconds"), ("evaluation", "eval_seconds")],
)
def test_what_took_most_of_the_time_bounds_the_run(what, key):
    seconds = 3.0 if what == "data" else 1.0  # the wait for data is part of a step's time, the others come on top
    found = what_bounds(steps(seconds=seconds, **{key: 2.0}), processes=1)
    assert found["bound"] == what
    assert found["shares"] == {what: pytest.approx(2 / 3, abs=1e-4), "compute": pytest.approx(1 / 3, abs=1e-4)} | {
        other: 0 for other in ("data", "checkpoint", "evaluation") if other != what
    }
    assert "; against " in in_one_line(found)


def test_a_wait_that_does_not_bound_the_run_is_named_all_the_same():
    line = in_one_line(what_bounds(steps(data_wait_seconds=0.2), processes=1))
    assert line == "bounded by compute: 80% compute, 20% data; against data: more dataloader_num_workers, or local_dir"


def test_the_first_steps_do_not_count():
    slow = steps(2, seconds=60.0, data_wait_seconds=59.0)
    assert what_bounds([*slow, *steps()], processes=1)["shares"]["compute"] == 1


def test_with_several_processes_network_is_not_told_from_compute_without_a_profile():
    assert what_bounds(steps(), processes=8)["bound"] == "compute or network"
    on_cpu = {"steps": 3, "operations": [{"name": "gloo:all_reduce", "device": "cpu", "seconds": 9.0, "calls": 3}]}
    assert what_bounds(steps(), processes=8, operations=on_cpu)["bound"] == "compute or network"


def test_with_a_profile_the_network_has_at_most_what_no_other_kernel_needed():
    def kernels(matrix_products, nccl):
        rows = {"nvjet_tst_128x256": matrix_products, "ncclDevKernel_AllReduce_Sum_f32": nccl}
        return {"steps": 3, "operations": [{"name": n, "device": "cuda", "seconds": 3 * s} for n, s in rows.items()]}

    hidden = what_bounds(steps(), 8, kernels(matrix_products=0.95, nccl=0.8))
    assert hidden["bound"] == "compute" and hidden["shares"]["network"] == pytest.approx(0.05)
    exposed = what_bounds(steps(), 8, kernels(matrix_products=0.3, nccl=0.6))
    assert exposed["bound"] == "network" and exposed["shares"]["network"] == pytest.approx(0.6)
    assert "at most 60% network" in in_one_line(exposed)


def test_a_rank_that_is_slower_than_the_others_is_told():
    records = steps(seconds=1.0)
    assert "slowest rank" not in in_one_line(what_bounds(records, processes=8))
    late = [{**r, "step_seconds": 1.25} for r in records]
    assert "the slowest rank is 20% behind the median" in in_one_line(what_bounds(late, processes=8))


def test_a_run_without_steps_has_no_bound():
    assert what_bounds([], processes=1) is None
    assert what_bounds(steps(1), processes=1)["bound"] == "compute"
