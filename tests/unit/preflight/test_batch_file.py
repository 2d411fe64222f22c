"""A batch file is read as sbatch reads it."""

import pytest
from conftest import ROOT

from dilqur.common.errors import InputError
from dilqur.preflight.batch_file import clock, gpus_in, read_batch_file, seconds_of

DAY = 24 * 3600


@pytest.mark.parametrize(
    ("written", "seconds"),
    [
        ("30", 1800), ("30:05", 1805), ("1:00:00", 3600), ("2-3", 2 * DAY + 3 * 3600), ("2-3:30", 2 * DAY + 3.5 * 3600),
        ("1-00:00:01", DAY + 1), ("UNLIMITED", None), ("infinite", None),
    ],
)  # fmt: skip
def test_times_as_in_the_manual_of_sbatch(written, seconds):
    assert seconds_of(written) == seconds


@pytest.mark.parametrize("written", ["", "12h", "1:2:3:4", "-5", "1--2", "1.5"])
def test_what_is_no_time(written):
    with pytest.raises(InputError, match="is no time: write HH:MM:SS"):
        seconds_of(written)


@pytest.mark.parametrize(
    ("written", "gpus"),
    [
        ("gpu:8", 8), ("gpu:h100:8(S:0-1)", 8), ("gres:gpu:8", 8), ("gpu", 1), ("gpu:h100", 1), ("none", 0), ("(null)", 0),
        ("gpu:a100:4,gpu:h100:2,shard:8", 6), ("gpu_mem:80", 0),
    ],
)  # fmt: skip
def test_gpus_in_a_list_of_generic_resources(written, gpus):
    assert gpus_in(written) == gpus


def test_a_shipped_batch_file_and_the_variables_that_win_over_it():
    file = read_batch_file(ROOT / "slurm" / "cpt_p4d.sbatch", {})
    assert (file.nodes, file.gpus, file.seconds, file.warning, file.card) == (2, 8, 20 * 3600, 300, 40e9)
    variables = {
        "SBATCH_TIMELIMIT": "1-0",
        "SBATCH_GRES": "none",
        "SBATCH_GPUS_PER_NODE": "a100:4",
        "SBATCH_SIGNAL": "TERM@60",
    }
    file = read_batch_file(ROOT / "slurm" / "cpt_p4d.sbatch", variables)
    assert (file.gpus, file.seconds, file.warning) == (4, DAY, None), "only USR1 to the batch shell is heard"
    assert clock(DAY + 61) == "1-00:01:01"


def test_every_batch_file_with_gpus_says_how_large_they_are_meant_to_be():
    for path in (ROOT / "slurm").glob("*.sbatch"):
        file = read_batch_file(path, {})
        if file.gpus and path.stem != "check_nodes":
            assert file.card, f"{path.name}: a line like `# GPU: H100, 80 GB`"
