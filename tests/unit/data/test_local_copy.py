"""Token shards copied to a node's own disk: once, whole or not at all, by any number of processes, through any kill."""

import fcntl
import json
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT

from dilqur.common.atomic import write_json
from dilqur.common.errors import InputError
from dilqur.data import local_copy as module
from dilqur.data.local_copy import local_copy
from dilqur.data.shard_writer import ShardWriter
from dilqur.data.token_shards import TokenShards

SHARDS, TOKENS = 6, 200_000  # 800 kB each: enough files and bytes to be killed in the middle of

COPY = """
import sys, time, types, xxhash
from dilqur.data import local_copy as module

class Slow:  # a slow disk: some 10 ms for each of 48 chunks
    def __init__(self):
        self.digest = xxhash.xxh3_64()
        self.hexdigest = self.digest.hexdigest
    def update(self, chunk):
        time.sleep(0.01)
        self.digest.update(chunk)

module.CHUNK = 100_000
module.xxhash = types.SimpleNamespace(xxh3_64=Slow, xxh3_64_hexdigest=xxhash.xxh3_64_hexdigest)
print("ready", flush=True)
print(module.local_copy(sys.argv[1], sys.argv[2]), flush=True)
"""


@pytest.fixture
def shards(tmp_path):
    """A finished folder of token shards."""
    folder = tmp_path / "source" / "web"
    ids = np.random.default_rng(0).integers(0, 50_000, SHARDS * TOKENS)
    with ShardWriter(folder, TOKENS) as writer:
        writer.add(ids, np.full(SHARDS * 10, TOKENS // 10))
        write_json(folder / "manifest.json", {**writer.close(), "utf8_bytes": 1})
    return folder


@pytest.fixture
def disk(tmp_path):
    (tmp_path / "disk").mkdir()
    return tmp_path / "disk"


def start(folder, local_dir, processes=2):
    """Processes that copy; all have said that they are about to begin."""
    command = [sys.executable, "-c", COPY, str(folder), str(local_dir)]
    started = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(processes)]
    assert [process.stdout.readline() for process in started] == ["ready\n"] * processes
    return started


def path_from(process):
    """The path that it prints when it has finished."""
    said = process.stdout.read().splitlines()
    assert process.wait(timeout=60) == 0
    return said[-1]


def everything(folder):
    shards = TokenShards(folder, verify=True)
    return shards.read(0, shards.num_tokens).tolist()


def test_the_copy_is_the_same_shards(shards, disk):
    copy = local_copy(shards, disk)
    assert copy.parent == disk and copy.name.startswith("web-")
    assert everything(copy) == everything(shards)
    assert (copy / "manifest.json").read_bytes() == (shards / "manifest.json").read_bytes()
    assert not list(copy.glob(".*"))


def test_the_second_call_copies_nothing(shards, disk):
    first = local_copy(shards, disk)
    before = {p.name: p.stat().st_ino for p in first.iterdir()}
    assert local_copy(str(shards), str(disk)) == first
    assert {p.name: p.stat().st_ino for p in first.iterdir()} == before


def test_who_finds_a_whole_copy_waits_for_nobody(shards, disk):
    copy = local_copy(shards, disk)
    with (disk / f".{copy.name}.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (process,) = start(shards, disk, 1)
        assert path_from(process) == str(copy)


def test_other_data_of_the_same_name_lie_elsewhere(shards, disk):
    first = local_copy(shards, disk)
    manifest = json.loads((shards / "manifest.json").read_text())
    write_json(shards / "manifest.json", {**manifest, "utf8_bytes": 2})
    assert local_copy(shards, disk) != first


def test_a_source_that_cannot_be_written_to_is_copied(shards, disk):
    for path in (*shards.iterdir(), shards):
        path.chmod(0o555 if path.is_dir() else 0o444)
    assert everything(local_copy(shards, disk)) == everything(shards)
    shards.chmod(0o755)


def test_many_processes_at_once_share_one_copy(shards, disk):
    (copy,) = {path_from(process) for process in start(shards, disk, 4)}
    assert everything(copy) == everything(shards)
    assert [p.name for p in disk.iterdir() if not p.name.startswith(".")] == [copy.rpartition("/")[2]]


def test_kills_at_random_moments_leave_nothing_that_looks_whole_and_are_gone_on_from(shards, disk):
    rng, inodes, kept, killed = random.Random(1), {}, 0, 0
    for _ in range(8):
        pair = start(shards, disk)
        time.sleep(rng.uniform(0, 0.4))
        for process in pair:
            killed += process.poll() is None
            process.send_signal(signal.SIGKILL)
            process.wait()
        (copy,) = [p for p in disk.iterdir() if p.is_dir()] or [None]
        if copy is None:
            continue
        now = {p.name: p.stat().st_ino for p in copy.iterdir() if not p.name.startswith(".")}
        kept += sum(now.get(name) == inode for name, inode in inodes.items())
        assert all(now.get(name) == inode for name, inode in inodes.items())  # what is there is not copied again
        for name in now:
            assert (copy / name).read_bytes() == (shards / name).read_bytes()
        inodes = now
        if "manifest.json" in now:
            assert everything(copy) == everything(shards)
            shutil.rmtree(copy)
            inodes = {}
    assert killed > 5 and kept > 0
    assert everything(local_copy(shards, disk)) == everything(shards)
    assert not list(next(p for p in disk.iterdir() if p.is_dir()).glob(".*"))  # nor a part of a file


def test_a_process_that_is_killed_gives_way_to_the_one_that_waits(shards, disk):
    first, second = start(shards, disk)
    first.kill()
    first.wait()
    assert everything(path_from(second)) == everything(shards)


def test_a_copy_that_lost_a_file_is_made_whole(shards, disk):
    copy = local_copy(shards, disk)
    (copy / "tokens-00002.npy").unlink()
    (copy / "offsets-00003.npy").write_bytes(b"")
    assert everything(local_copy(shards, disk)) == everything(shards)


def test_too_little_room_is_said_before_anything_is_copied(shards, disk, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 2 * 10**6))
    with pytest.raises(
        InputError, match=r"disk: 0\.0048 GB are needed for web-\w+ and 0\.002 GB free there: free some"
    ):
        local_copy(shards, disk)
    assert not list(disk.glob("web-*/*"))


def test_files_that_are_there_need_no_room(shards, disk, monkeypatch):
    copy = local_copy(shards, disk)
    (copy / "manifest.json").unlink()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 0))
    assert everything(local_copy(shards, disk)) == everything(shards)


@pytest.mark.parametrize("damage", ["other bytes", "truncated", "missing"])
def test_a_damaged_source_is_found_while_it_is_copied(shards, disk, damage):
    file = shards / "tokens-00003.npy"
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(content[:-4] + b"oops" if damage == "other bytes" else content[:-4])
    words = {"other bytes": "its checksum is not", "truncated": "800124 bytes", "missing": "No such file"}[damage]
    with pytest.raises(InputError, match=f"tokens-00003.npy: {words}"):
        local_copy(shards, disk)
    (copy,) = disk.glob("web-*")
    assert not (copy / "manifest.json").exists() and not (copy / file.name).exists()


def test_where_it_cannot_be_written_is_said(shards, tmp_path):
    with pytest.raises(InputError, match=r"nowhere: no such folder on this node; make it, or give another one"):
        local_copy(shards, tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"^/sys.*: give a folder"):
        local_copy(shards, "/sys")  # not even for root


def test_what_is_no_finished_folder_of_shards_is_refused(tmp_path, disk):
    with pytest.raises(InputError, match="not there"):
        local_copy(tmp_path, disk)
    write_json(tmp_path / "manifest.json", {"stage": "clean"})
    with pytest.raises(InputError, match="not a folder of token shards"):
        local_copy(tmp_path, disk)


def test_a_disk_that_becomes_full_is_said_in_one_line(shards, disk, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_copy_file", full)
    with pytest.raises(InputError, match="disk: it became full while token shards were copied"):
        local_copy(shards, disk)
