"""A mirror has complete checkpoints or says why not; it never stops a run, and a new machine goes on from it to the bit."""

import contextlib
import logging
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from dilqur.checkpoint import mirror as checkpoint_mirror
from dilqur.checkpoint.format import CheckpointReader
from dilqur.checkpoint.mirror import CheckpointMirror
from dilqur.checkpoint.mirror_store import check_address
from dilqur.checkpoint.steps import complete_checkpoints
from dilqur.checkpoint.writer import CheckpointWriter
from dilqur.common.errors import InputError
from dilqur.training.distributed import make_accelerator

FILES = ["COMPLETE", "index.json", "rank-00000.json", "rank-00000.safetensors", "trainer.json"]
SOON = 60  # seconds a test waits for what takes less than one, unless the machine is busy


@pytest.fixture(scope="module")
def server():
    """A real S3 server on a port of this machine. What a user sets is set: the usual environment variables, nothing of ours."""
    pytest.importorskip("s3fs", reason="needs s3fs: pip install -r requirements-dev.txt")
    pytest.importorskip("flask_cors", reason="needs moto's server: pip install -r requirements-dev.txt")
    moto = pytest.importorskip("moto.moto_server.threaded_moto_server", reason="needs moto: requirements-dev.txt")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for every request
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = moto.ThreadedMotoServer("127.0.0.1", port, verbose=False)
    started.start()
    with pytest.MonkeyPatch.context() as environment:
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "user",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_MAX_ATTEMPTS": "1",  # botocore's own tries make a test of a server that is away last 8 s each
            "AWS_CONFIG_FILE": "/dev/null",
            "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
        }.items():
            environment.setenv(name, value)
        yield started
    started.stop()


class Place:
    """Where a mirror is, seen by another program than the one that is tested."""

    def __init__(self, address):
        import fsspec

        self.address = address
        self.fs, self.path = fsspec.core.url_to_fs(address, skip_instance_cache=True, use_listings_cache=False)

    def names(self, folder=""):
        with contextlib.suppress(FileNotFoundError):
            listing = self.fs.ls(f"{self.path}/{folder}".rstrip("/"), detail=True)
            return sorted({Path(entry["name"]).name for entry in listing} - {"WRITER"})
        return []

    def read(self, name):
        return self.fs.cat_file(f"{self.path}/{name}")

    def write(self, name, content):
        if self.fs.protocol[0] == "file":
            self.fs.makedirs(f"{self.path}/{Path(name).parent}", exist_ok=True)
        self.fs.pipe_file(f"{self.path}/{name}", content)

    def remove(self, name):
        self.fs.rm(f"{self.path}/{name}", recursive=True)


@pytest.fixture(params=["folder", "s3"])
def place(request, tmp_path):
    if request.param == "folder":
        return Place(str(tmp_path / "mirror"))
    return s3_place(request)


@pytest.fixture
def s3(request):
    return s3_place(request)


def s3_place(request):
    request.getfixturevalue("server")
    place = Place(f"s3://bucket-{time.monotonic_ns()}/runs/az")
    place.fs.mkdir(place.path.partition("/")[0])
    return place


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(checkpoint_mirror, "FIRST_PAUSE", 0.05)
    monkeypatch.setattr(checkpoint_mirror, "LONGEST_PAUSE", 0.2)


@pytest.fixture(scope="module")
def accelerator():
    return make_accelerator(bf16=False, batch=1, accumulation=1, max_grad_norm=1.0)


@pytest.fixture
def run(tmp_path, accelerator):
    yield Run(tmp_path / "run" / "checkpoints", accelerator)
    shutil.rmtree(tmp_path / "run", ignore_errors=True)  # what is not there any more no mirror tries to copy


class Run:
    """Trains nothing; its checkpoint of step n has the weights n, or another number."""

    def __init__(self, folder, accelerator):
        self.folder, self.accelerator = folder, accelerator
        self.model = torch.nn.Linear(30, 30)
        self.optimizer = accelerator.prepare(torch.optim.AdamW(self.model.parameters()))
        self.model(torch.ones(30)).sum().backward()
        self.optimizer.step()

    def starts(self, mirror, **rotation):
        self.mirror, self.writer = mirror, CheckpointWriter(self.folder, self.accelerator, mirror=mirror, **rotation)

    def saves(self, step, weight=None, eval_loss=None):
        torch.nn.init.constant_(self.model.weight, step if weight is None else weight)
        self.writer.save(self.model, self.optimizer, step, {"position": 8 * step, "eval_loss": eval_loss})
        self.writer.wait()
        return self.folder / f"step-{step:07d}"

    def and_copies(self, *steps):
        for step in steps:
            self.saves(step)
            assert self.mirror.wait(SOON), self.mirror.problem


@pytest.fixture
def gate(monkeypatch):
    """A mirror so slow that nothing arrives before `gate.set()`. gate.begun: the folders it began to copy."""
    gate, copy = threading.Event(), CheckpointMirror._copy
    gate.begun = []

    def slow(mirror, folder):
        gate.begun.append(folder)
        gate.wait(SOON)
        return copy(mirror, folder)

    monkeypatch.setattr(CheckpointMirror, "_copy", slow)
    yield gate
    gate.set()


def eventually(is_so):
    end = time.monotonic() + SOON
    while not is_so():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)
    return True


def weight_of(folder):
    """The one number all weights of a checkpoint are, after reading every byte of it."""
    reader = CheckpointReader(folder)
    for kind, name in reader.dtypes:
        reader.tensor(kind, name)
    (value,) = reader.tensor("weight", "weight").unique().tolist()
    return value


# -- away and back ----------------------------------------------------------------------------------------------------


def test_a_new_machine_goes_on_from_what_is_there_to_the_bit(place, run, tmp_path):
    mirror = CheckpointMirror(place.address)
    assert (mirror.complete(), mirror.newest()) == ([], None)
    run.starts(mirror)
    run.and_copies(5, 10)
    assert place.names("step-0000010") == FILES
    new = CheckpointMirror(place.address)
    assert (new.complete(), new.newest()) == ([5, 10], 10)
    fetched = new.fetch(10, tmp_path / "new machine" / "checkpoints")
    assert complete_checkpoints(tmp_path / "new machine" / "checkpoints") == [fetched]
    assert [p.name for p in fetched.parent.iterdir()] == ["step-0000010"]
    for file in FILES:
        assert (fetched / file).read_bytes() == (run.folder / "step-0000010" / file).read_bytes()
    assert weight_of(fetched) == 10


def test_a_checkpoint_that_is_there_already_is_not_copied_again(place, run):
    run.starts(CheckpointMirror(place.address))
    run.and_copies(5)
    before = place.fs.modified(f"{place.path}/step-0000005/COMPLETE")
    again = CheckpointMirror(place.address)  # a run that was started again offers what it goes on from
    again.push(run.folder / "step-0000005")
    assert again.wait(SOON)
    assert place.fs.modified(f"{place.path}/step-0000005/COMPLETE") == before
    assert again.complete() == [5]


def test_an_address_with_file_in_front_is_the_same_folder(run, tmp_path):
    run.starts(CheckpointMirror(f"file://{tmp_path}/mirror"))
    run.and_copies(5)
    assert CheckpointMirror(tmp_path / "mirror").complete() == [5]
    assert weight_of(tmp_path / "mirror" / "step-0000005") == 5, "a folder's copies can be read where they are"


def test_what_is_no_complete_copy_is_never_there(place, run, tmp_path):
    run.starts(CheckpointMirror(place.address))
    run.and_copies(5)
    for name in ("step-0000008/trainer.json", "step-0000009-old/COMPLETE", "notes/COMPLETE", "COMPLETE"):
        place.write(name, b"")
    new = CheckpointMirror(place.address)
    assert new.complete() == [5]
    with pytest.raises(InputError, match=r"no complete copy of step 8 there; complete ones: 5$"):
        new.fetch(8, tmp_path / "new")


@pytest.mark.parametrize("place", ["folder"], indirect=True)
def test_a_fetch_does_not_replace_what_is_here(place, run):
    run.starts(CheckpointMirror(place.address))
    run.and_copies(5)
    with pytest.raises(InputError, match=r"step-0000005: is there; move it away"):
        run.mirror.fetch(5, run.folder)
    assert weight_of(run.folder / "step-0000005") == 5


# -- a slow mirror ----------------------------------------------------------------------------------------------------


def test_of_those_that_wait_for_a_slow_mirror_only_the_newest_and_those_to_keep_are_copied(run, tmp_path, gate):
    mirror = CheckpointMirror(tmp_path / "mirror", keep=10, keep_every=10)
    run.starts(mirror)
    run.saves(1)
    eventually(lambda: gate.begun)
    for step in (9, 10, 11, 12):
        begun = time.monotonic()
        run.saves(step)
        assert time.monotonic() - begun < 10, "a save waits for the mirror"
    waiting = [run.folder / f"step-{step:07d}" for step in (1, 10, 12)]
    assert sorted(mirror.copying()) == waiting
    assert not mirror.wait(timeout=0.1)
    gate.set()
    assert mirror.wait(SOON)
    assert gate.begun == [waiting[0], waiting[2], waiting[1]], "the newest is what a new machine needs first"
    assert mirror.complete() == [1, 10, 12]
    assert mirror.copying() == set()


def test_rotation_on_the_disk_leaves_what_is_being_copied(run, tmp_path, gate):
    run.starts(CheckpointMirror(tmp_path / "mirror"), keep=1)
    run.saves(1)
    eventually(lambda: gate.begun)
    for step in (2, 3):
        run.saves(step)
    assert {run.folder / "step-0000001", run.folder / "step-0000003"} <= set(complete_checkpoints(run.folder))
    gate.set()
    assert run.mirror.wait(SOON), run.mirror.problem
    run.and_copies(4)
    assert [p.name for p in complete_checkpoints(run.folder)] == ["step-0000004"]
    assert 1 in run.mirror.complete()


def test_a_process_that_ends_does_not_wait_for_a_mirror_that_hangs(tmp_path):
    script = """
import sys, time
from pathlib import Path
from dilqur.checkpoint.mirror import CheckpointMirror

folder = Path(sys.argv[1]) / "step-0000001"
folder.mkdir()
(folder / "COMPLETE").write_text("whole")
CheckpointMirror._copy = lambda mirror, folder: print("hangs", flush=True) or time.sleep(1000)
mirror = CheckpointMirror(folder.parent / "mirror")
mirror.push(folder)
print(mirror.wait(timeout=0.5), "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, timeout=SOON)
    assert (done.returncode, done.stdout, done.stderr) == (0, "hangs\nFalse False\n", "")


# -- a mirror that is away --------------------------------------------------------------------------------------------


def test_a_folder_that_vanishes_stops_nothing_and_works_again_when_it_is_back(run, tmp_path):
    run.starts(CheckpointMirror(tmp_path / "mirror"))
    run.and_copies(1)
    (tmp_path / "mirror").rename(tmp_path / "unmounted")
    for step in (2, 3):
        run.saves(step)
    eventually(lambda: run.mirror.problem)
    assert run.mirror.problem.startswith(f"{tmp_path}/mirror: step ")
    assert f"not copied: No such file or directory: {tmp_path}/mirror" in run.mirror.problem
    assert not run.mirror.wait(), "the end of a run does not wait for ever"
    assert not (tmp_path / "mirror").exists(), "what belongs on a disk that is away must not fill another one"
    assert len(complete_checkpoints(run.folder)) == 3
    (tmp_path / "unmounted").rename(tmp_path / "mirror")
    assert run.mirror.wait(SOON), run.mirror.problem
    assert run.mirror.problem is None
    assert run.mirror.complete() == [1, 3]


def test_a_server_that_is_stopped_in_the_middle_of_a_copy_stops_nothing_and_works_again(
    s3, server, run, tmp_path, monkeypatch
):
    import s3fs

    put_file, stopping = s3fs.S3FileSystem.put_file, threading.Event()

    def put_and_stop(fs, source, target, **options):
        put_file(fs, source, target, **options)
        if stopping.is_set():
            server.stop()
            stopping.clear()

    monkeypatch.setattr(s3fs.S3FileSystem, "put_file", put_and_stop)
    run.starts(CheckpointMirror(s3.address))
    run.and_copies(1)
    stopping.set()
    run.saves(2)
    eventually(lambda: run.mirror.problem)
    assert "step 2 not copied: Could not connect to the endpoint URL" in run.mirror.problem
    run.saves(3)
    with pytest.raises(InputError, match=f"^{s3.address}: Could not connect .*: can it be reached from here"):
        CheckpointMirror(s3.address).newest()  # not None, which would begin the run again from nothing
    assert not run.mirror.wait()
    server.start()
    assert run.mirror.wait(SOON), run.mirror.problem
    assert run.mirror.problem is None
    assert CheckpointMirror(s3.address).complete() == [1, 3]
    assert s3.names() == ["step-0000001", "step-0000003"], "the half copy of step 2 is gone"
    assert weight_of(CheckpointMirror(s3.address).fetch(3, tmp_path / "new")) == 3


@pytest.mark.parametrize("address", ["s3://no-such-bucket/runs/az", "s3://no-such-bucket"])
def test_a_bucket_that_is_not_there_is_said_and_not_made(s3, run, address):
    run.starts(CheckpointMirror(address))
    run.saves(1)
    assert not run.mirror.wait()
    assert run.mirror.problem == f"{address}: step 1 not copied: The specified bucket does not exist"
    assert not s3.fs.exists("no-such-bucket")


def test_the_folder_of_the_run_itself_is_no_mirror(run):
    run.folder.mkdir(parents=True)
    run.starts(CheckpointMirror(run.folder.parent / "checkpoints", keep=1))
    for step in (1, 2):
        run.saves(step)
    assert not run.mirror.wait()
    assert run.mirror.problem.endswith("not copied: that is the run's own folder of checkpoints")
    assert len(complete_checkpoints(run.folder)) == 2


def test_a_folder_that_may_not_be_written_stops_nothing(tmp_path):
    script = """
import sys
from pathlib import Path
import torch
from dilqur.checkpoint import mirror as checkpoint_mirror
from dilqur.checkpoint.writer import CheckpointWriter
from dilqur.checkpoint.steps import complete_checkpoints
from dilqur.training.distributed import make_accelerator

checkpoint_mirror.FIRST_PAUSE = 0.05
folder, model = Path(sys.argv[1]), torch.nn.Linear(3, 3)
mirror = checkpoint_mirror.CheckpointMirror(folder / "mirror")
writer = CheckpointWriter(folder / "checkpoints", make_accelerator(False, 1, 1, None), mirror=mirror)
(folder / "mirror").chmod(0o555)  # after the run began, which would have refused it
for step in (1, 2):
    writer.save(model, torch.optim.AdamW(model.parameters()), step, {})
    writer.wait()
print(mirror.wait(), len(complete_checkpoints(folder / "checkpoints")), mirror.problem)
try:
    checkpoint_mirror.check_address(folder / "mirror")
except Exception as error:
    print(error)
"""
    (tmp_path / "mirror").mkdir()
    as_others = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    command = [*as_others, sys.executable, "-c", script, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=2 * SOON)
    (tmp_path / "mirror").chmod(0o755)
    assert done.returncode == 0, done.stderr
    copied, said = done.stdout.splitlines()
    assert copied.startswith(
        f"False 2 {tmp_path}/mirror: step 2 not copied: Permission denied: {tmp_path}/mirror/WRITER"
    )
    assert said == f"mirror_to {tmp_path}/mirror: this user may not write there: look at its permissions"


def test_a_checkpoint_that_was_taken_away_before_it_was_copied_is_not_tried_for_ever(run, tmp_path, gate):
    run.starts(CheckpointMirror(tmp_path / "mirror"))
    shutil.rmtree(run.saves(1))
    gate.set()
    eventually(lambda: not run.mirror.copying())
    assert "step 1 not copied: No such file or directory" in run.mirror.problem
    run.and_copies(2)
    assert (run.mirror.complete(), run.mirror.problem) == ([2], None)


# -- killed -----------------------------------------------------------------------------------------------------------

KILLED_RUNS = """
import itertools, os, signal, sys, time
from pathlib import Path
import fsspec
import torch
from dilqur.checkpoint.writer import CheckpointWriter
from dilqur.checkpoint.steps import complete_checkpoints
from dilqur.checkpoint.mirror import CheckpointMirror
from dilqur.training.distributed import make_accelerator

torch.set_num_threads(1)  # so that this process can be forked
if sys.argv[2].startswith("s3"):
    fsspec.get_filesystem_class("s3")  # imported once for all runs
folder, address, kills = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
accelerator = make_accelerator(False, 1, 1, None)
model = torch.nn.Linear(500, 500, bias=False)  # 3 MB a checkpoint
optimizer = torch.optim.AdamW(model.parameters())

def train():
    mirror = CheckpointMirror(address, keep=2)
    checkpoints = CheckpointWriter(folder, accelerator, keep=2, mirror=mirror)
    last, took = complete_checkpoints(folder)[-1:], 0
    for step in itertools.count(1 + int(last[0].name.removeprefix("step-")) if last else 1):
        torch.nn.init.constant_(model.weight, step)
        checkpoints.save(model, optimizer, step, {})
        checkpoints.wait()
        begun = time.monotonic()
        os.write(copying, f"{took}\\n".encode())
        mirror.wait(timeout=60)
        took = time.monotonic() - begun

for kill in range(kills):
    seen, copying = os.pipe()
    if (run := os.fork()) == 0:
        train()
    with os.fdopen(seen) as lines:
        lines.readline(), lines.readline()  # the first copy opens connections: it says nothing of the others
        time.sleep(float(lines.readline()) * 1.2 * kill / kills)  # the kills fall into every part of the third
        os.kill(run, signal.SIGKILL)
    os.waitpid(run, 0)
    os.close(copying)
    print("killed", flush=True)
    assert sys.stdin.readline() == "go on\\n"
"""


def test_killed_at_any_moment_the_mirror_has_its_complete_checkpoints(place, run, tmp_path):
    kills = 10 if place.fs.protocol[0] == "file" else 5
    command = [sys.executable, "-c", KILLED_RUNS, run.folder, place.address, str(kills)]
    killed = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    newest, halves, new = 0, 0, CheckpointMirror(place.address)
    for number in range(kills):
        assert killed.stdout.readline() == "killed\n"
        complete = new.complete()
        assert complete[-1] >= newest, "a complete checkpoint was lost"
        assert 1 <= len(complete) <= 3, "two, and one whose removal was killed"
        newest = complete[-1]
        halves += any("COMPLETE" not in place.names(name) for name in place.names())
        for step in complete[-2:]:
            assert weight_of(new.fetch(step, tmp_path / f"new-{number}")) == step
        shutil.rmtree(tmp_path / f"new-{number}")
        killed.stdin.write("go on\n")
        killed.stdin.flush()
    assert killed.wait(SOON) == 0
    assert halves, "no kill came in the middle of a copy: the test did not test"
    run.starts(CheckpointMirror(place.address, keep=2))
    run.and_copies(1_000_000)
    assert place.names() == [f"step-{newest:07d}", "step-1000000"], "the next run clears away what killed ones left"


# -- rotation ---------------------------------------------------------------------------------------------------------


def test_the_newest_stay_there_and_those_at_multiples(place, run):
    run.starts(CheckpointMirror(place.address, keep=2, keep_every=10))
    run.and_copies(8, 9, 10, 11)
    assert run.mirror.complete() == [10, 11]
    run.starts(CheckpointMirror(place.address, keep=2, keep_every=10))  # killed and gone on with
    run.and_copies(12, 13)
    assert run.mirror.complete() == [10, 12, 13]
    assert place.names() == ["step-0000010", "step-0000012", "step-0000013"]


def test_the_best_by_its_evaluation_stays_there(place, run):
    run.starts(CheckpointMirror(place.address, keep=1))
    for step, loss in enumerate((None, 3.0, 2.0, 2.5, 2.2), 1):
        run.saves(step, eval_loss=loss)
        assert run.mirror.wait(SOON), run.mirror.problem
    assert run.mirror.complete() == [3, 5] and run.mirror.best() == 3
    run.starts(CheckpointMirror(place.address, keep=1))  # on another machine, say
    run.saves(6, eval_loss=1.9)
    assert run.mirror.wait(SOON), run.mirror.problem
    assert run.mirror.complete() == [6] and run.mirror.best() == 6


def test_an_old_copy_loses_complete_first(s3, run, monkeypatch):
    run.starts(CheckpointMirror(s3.address, keep=1))
    run.and_copies(1)

    def fail(*arguments, **options):
        raise OSError("the connection went away in the middle of a removal")

    monkeypatch.setattr(run.mirror._opened.fs, "rm", fail)
    run.saves(2)
    eventually(lambda: not run.mirror.copying())
    assert "step 2 is copied, but: the connection went away" in run.mirror.problem
    assert run.mirror.complete() == [2]
    assert s3.names("step-0000001") == FILES[1:]


def test_a_run_that_went_back_replaces_what_comes_after_and_nothing_is_missing_in_between(
    place, run, tmp_path, monkeypatch
):
    run.starts(CheckpointMirror(place.address))
    run.and_copies(2, 4, 6, 8)
    run.starts(CheckpointMirror(place.address))  # begun again at step 2
    seen, tidy = [], CheckpointMirror._tidy

    def look(mirror):
        seen.append(mirror.complete())
        return tidy(mirror)

    monkeypatch.setattr(CheckpointMirror, "_tidy", look)
    run.saves(4, weight=44)
    assert run.mirror.wait(SOON), run.mirror.problem
    assert seen == [[2, 4, 6, 8]], "before the new one stands nothing goes"
    assert run.mirror.complete() == [2, 4], "a new machine must not go on from step 8 of the other run"
    assert len(place.names()) == 2
    run.saves(6, weight=66)
    assert run.mirror.wait(SOON), run.mirror.problem
    assert run.mirror.complete() == [2, 4, 6]
    assert weight_of(CheckpointMirror(place.address).fetch(4, tmp_path / "new")) == 44


@pytest.mark.parametrize("place", ["folder"], indirect=True)
def test_a_second_run_with_one_mirror_copies_nothing_and_says_so(place, run, tmp_path, accelerator):
    other = Run(tmp_path / "other" / "checkpoints", accelerator)
    for each in (run, other):
        each.starts(CheckpointMirror(place.address, keep=1))
    run.and_copies(1)
    other.saves(5)
    assert not other.mirror.wait()
    assert "step 5 not copied: another run writes there (its id is " in other.mirror.problem
    run.and_copies(2, 3)
    assert (run.mirror.complete(), run.mirror.problem) == ([3], None)
    new = CheckpointMirror(place.address)
    new.take_over(new.fetch(3, tmp_path / "new").parent)
    run.saves(4)
    assert not run.mirror.wait() and "another run writes there" in run.mirror.problem


# -- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "file"),
    [*(("folder", file) for file in FILES), ("s3", "rank-00000.safetensors"), ("s3", "COMPLETE")],
    indirect=["place"],
)
def test_a_damaged_copy_is_refused_by_name_and_the_next_older_one_is_offered(place, run, tmp_path, file):
    run.starts(CheckpointMirror(place.address))
    run.and_copies(1, 2)
    name, new = f"step-0000002/{file}", CheckpointMirror(place.address)
    whole = place.read(name)
    flipped = bytearray(whole)
    flipped[-5] ^= 4  # of the weights: where no header and no size tells
    for content in (whole[: len(whole) // 2], b"", bytes(flipped)):
        place.write(name, content)
        with pytest.raises(InputError) as refused:
            new.fetch(2, tmp_path / "new")
        where = "index.json" if file == "COMPLETE" else file  # which of the two is wrong nobody can tell
        assert f"{place.address}/step-0000002/{where}: " in str(refused.value)
        offer = f"the next older one is step 1: remove {place.address}/step-0000002 to go on from there"
        assert str(refused.value).endswith(offer)
        assert not [p for p in (tmp_path / "new").iterdir() if "step" in p.name], "nothing half-fetched is left"
    place.remove(name)
    with pytest.raises(InputError, match=r"no complete copy of step 2" if file == "COMPLETE" else file):
        new.fetch(2, tmp_path / "new")
    place.remove("step-0000002")
    assert new.newest() == 1
    assert weight_of(new.fetch(1, tmp_path / "new")) == 1


@pytest.mark.parametrize("place", ["folder"], indirect=True)
def test_a_damaged_copy_without_an_older_one_says_so(place, run, tmp_path):
    run.starts(CheckpointMirror(place.address))
    run.and_copies(1)
    place.write("step-0000001/trainer.json", b"{}")
    with pytest.raises(InputError, match=r"step-0000001/trainer\.json: damaged: .*; there is no older one$"):
        run.mirror.fetch(1, tmp_path / "new")


# -- addresses --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("s4://bucket/az", "fsspec knows no s4://: give a path, s3://BUCKET/FOLDER or the like"),
        ("simplecache::s3://bucket/az", "fsspec knows no simplecache::s3://"),
        ("s3://", "names no bucket and no folder: give s3://BUCKET/FOLDER"),
        ("ftp://me:secret@host/az", "a password in it, which logs would show: credentials go into the environment"),
        ("/no/such/folder/az", "there is no folder /no/such/folder: make it, or mount its disk"),
        (__file__, "a file, not a folder: give another path"),
    ],
)
def test_a_wrong_address_is_refused_before_anything_runs(address, said):
    with pytest.raises(InputError) as refused:
        check_address(address)
    assert said in str(refused.value)
    assert "secret" not in str(refused.value)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"s3://bucket/az: s3:// needs a package that is not here: pip install s3fs$"):
        check_address("s3://bucket/az")


def test_good_addresses_are_taken_and_nothing_is_written(tmp_path):
    for address in (tmp_path / "mirror", f"file://{tmp_path}/mirror", "memory://runs/az"):
        check_address(address)
    assert list(tmp_path.iterdir()) == []
