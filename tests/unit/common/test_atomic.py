"""Files and folders appear whole under their final name, or not at all."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dilqur.common.atomic import atomic_file, atomic_files, atomic_folder, write_json


class Broken(Exception):
    pass


def names(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


@pytest.mark.parametrize("problem", [Broken, KeyboardInterrupt])
def test_what_fails_half_way_leaves_the_old_file_and_nothing_else(tmp_path, problem):
    write_json(tmp_path / "a.json", {"old": "ə"})
    old = (tmp_path / "a.json").read_bytes()
    with pytest.raises(problem), atomic_file(tmp_path / "a.json") as file:
        file.write(b"half")
        raise problem
    assert names(tmp_path) == ["a.json"] and (tmp_path / "a.json").read_bytes() == old == '{\n "old": "ə"\n}\n'.encode()


def test_what_cannot_be_json_leaves_nothing(tmp_path):
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"good": 1, "bad": object()})
    assert names(tmp_path) == []


def test_a_folder_may_get_another_name_as_soon_as_the_file_is_there(tmp_path, monkeypatch):
    """Rank 0 publishes a checkpoint, which renames its folder, the moment it sees the last rank's file."""
    folder, rename = tmp_path / "part", Path.rename

    def rename_and_publish(path, target):
        rename(path, target)
        rename(folder, tmp_path / "whole")

    monkeypatch.setattr(Path, "rename", rename_and_publish)
    write_json(folder / "rank-00001.json", {})
    assert names(tmp_path) == ["whole", "whole/rank-00001.json"]


def test_a_folder_replaces_the_old_one_whole(tmp_path):
    for content in ("old", "new"):
        with atomic_folder(tmp_path / "model") as part:
            (part / content).touch()
    assert names(tmp_path) == ["model", "model/new"]


def test_a_folder_that_fails_half_way_leaves_the_old_one(tmp_path):
    with atomic_folder(tmp_path / "model") as part:
        (part / "old").touch()
    with pytest.raises(Broken), atomic_folder(tmp_path / "model") as part:
        (part / "new").touch()
        raise Broken
    assert names(tmp_path) == ["model", "model/old"]


def test_files_move_in_beside_what_is_there_together_or_not_at_all(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "mine").touch()
    with pytest.raises(Broken), atomic_files(tmp_path) as part:
        (part / "report").touch()
        raise Broken
    assert names(tmp_path) == ["train", "train/mine"]
    with atomic_files(tmp_path) as part:
        (part / "train").mkdir()
        (part / "train" / "a").touch()
        (part / "report").touch()
    assert names(tmp_path) == ["report", "train", "train/a", "train/mine"]


@pytest.mark.parametrize(
    "writing",
    [
        "atomic_file(where / 'a') as f: f.write(b'half'); f.flush(); wait()",
        "atomic_folder(where / 'a') as f: (f / 'half').touch(); wait()",
        "atomic_files(where) as f: (f / 'a').touch(); wait()",
    ],
)
def test_a_process_killed_while_it_writes_leaves_nothing_under_the_final_name(tmp_path, writing):
    code = (
        "import pathlib, sys; from dilqur.common.atomic import *; where = pathlib.Path(sys.argv[1])\n"
        f"def wait(): print(flush=True); input()\nwith {writing}"
    )
    command = [sys.executable, "-c", code, tmp_path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        writer.stdout.readline()
        writer.send_signal(signal.SIGKILL)
    assert all(name.startswith(".") for name in names(tmp_path))
    subprocess.run(command, input=b"\n", check=True)  # what it left is no obstacle to the next one
    assert (tmp_path / "a").exists() and not any(name.startswith(".") for name in names(tmp_path))
