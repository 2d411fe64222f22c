"""Safetensors folders are read by their headers and rewritten tensor by tensor, to the bit, as the library would read them."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from dilqur.common.errors import InputError
from dilqur.models.safetensors_io import INDEX, equal_bytes, read_tensor, rewrite, stored_tensors

WEIGHTS = {
    "embed": torch.arange(12.0).reshape(4, 3).bfloat16(),
    "scale": torch.randn(5, generator=torch.Generator().manual_seed(0)),
    "fp8": torch.randn(3, 3).to(torch.float8_e4m3fn),
    "count": torch.tensor(7),
    "none": torch.empty(0, 3),
}
SHARDS = {
    "embed": "a.safetensors",
    "scale": "a.safetensors",
    "fp8": "b.safetensors",
    "count": "b.safetensors",
    "none": "a.safetensors",
}


@pytest.fixture(params=["one file", "shards"])
def folder(request, tmp_path):
    path = tmp_path / "model"
    path.mkdir()
    if request.param == "one file":
        save_file(WEIGHTS, path / "model.safetensors", {"format": "pt"})
    else:
        for file in set(SHARDS.values()):
            save_file({n: w for n, w in WEIGHTS.items() if SHARDS[n] == file}, path / file, {"format": "pt"})
        (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": SHARDS}))
    return path


def same(one, other):
    raw = (t.reshape(-1).view(torch.uint8) for t in (one, other))
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*raw)


def test_every_tensor_is_found_without_reading_it(folder):
    found = stored_tensors(folder)
    assert found.keys() == WEIGHTS.keys()
    assert all(same(read_tensor(found[name], name), weight) for name, weight in WEIGHTS.items())
    assert (found["embed"].dtype, found["embed"].shape, found["embed"].bytes) == ("BF16", (4, 3), 24)


def test_what_is_replaced_is_replaced_and_the_rest_is_the_same_to_the_bit(folder, tmp_path):
    larger = torch.randn(7, 3).bfloat16()
    (tmp_path / "out").mkdir()
    elements = rewrite(stored_tensors(folder), {"embed": ((7, 3), lambda: larger)}, {"scale"}, tmp_path / "out")
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    read = {name: weight for file in files for name, weight in load_file(file).items()}
    wanted = {**WEIGHTS, "embed": larger}
    del wanted["scale"]
    assert read.keys() == wanted.keys() and all(same(read[name], wanted[name]) for name in wanted)
    assert elements == sum(weight.numel() for weight in wanted.values())
    if len(files) > 1:
        index = json.loads((tmp_path / "out" / INDEX).read_text())
        assert index["weight_map"] == {name: SHARDS[name] for name in wanted}
        assert index["metadata"]["total_size"] == sum(weight.nbytes for weight in wanted.values())
    else:
        assert files[0].name == "model.safetensors" and not (tmp_path / "out" / INDEX).exists()


def test_equal_tensors_are_told_from_others(folder):
    found = stored_tensors(folder)
    assert equal_bytes(found["embed"], found["embed"]) and not equal_bytes(found["embed"], found["scale"])


def refused(folder, says):
    with pytest.raises(InputError, match=says):
        stored_tensors(folder)


def test_a_folder_without_weights_and_one_of_pickles_are_refused(tmp_path):
    refused(tmp_path, "no weights in it")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    refused(tmp_path, r"pickles \(pytorch_model.bin\), which are not read; convert the model to safetensors")


def test_a_cut_file_is_refused(folder):
    file = sorted(folder.glob("*.safetensors"))[-1]
    for left in (file.stat().st_size - 1, 30, 4):
        with file.open("r+b") as opened:
            opened.truncate(left)
        refused(folder, f"{file}: damaged or cut")


def test_a_shard_that_is_not_there_is_named(folder):
    if not (folder / INDEX).exists():
        pytest.skip("one file")
    (folder / "b.safetensors").rename(folder / "c.safetensors")
    refused(folder, "b.safetensors: not there, but model.safetensors.index.json names it")
    (folder / INDEX).write_text("{}")
    refused(folder, "index.json: damaged")
    (folder / INDEX).unlink()
    refused(folder, "2 .safetensors and no model.safetensors.index.json")
