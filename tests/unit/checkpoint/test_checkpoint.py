"""The checkpoint format: read to the bit as it was written; damaged files are refused by name; no half one is there."""

import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dilqur.checkpoint.format import CheckpointReader, chunks_of, publish, write_rank
from dilqur.checkpoint.steps import complete_checkpoints
from dilqur.checkpoint.verify import verify_checkpoint
from dilqur.checkpoint.writer import CheckpointWriter, SaveFailed, load_checkpoint
from dilqur.common.errors import InputError
from dilqur.models.safetensors_io import tensor_bytes
from dilqur.training.distributed import make_accelerator

FILES = {"rank-00000.safetensors", "rank-00000.json", "trainer.json", "index.json", "COMPLETE"}
KINDS = {
    "weights": "rank-00000.safetensors",
    "chunks": "rank-00000.json",
    "trainer": "trainer.json",
    "index": "index.json",
}


@pytest.fixture(scope="module")
def accelerator():
    return make_accelerator(bf16=False, batch=1, accumulation=1, max_grad_norm=1.0)


@pytest.fixture
def training(accelerator):
    """Makes (model, optimizer, a function that does a step); there are matrices, a vector and a scalar."""

    def make(seed=0, width=24):
        torch.manual_seed(seed)
        model = torch.nn.Sequential(torch.nn.Embedding(50, width), torch.nn.Linear(width, 50))
        model.register_parameter("temperature", torch.nn.Parameter(torch.randn(())))
        model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))

        def step(number):
            ids = torch.randint(50, (8, 16), generator=torch.Generator().manual_seed(number))
            torch.nn.functional.cross_entropy(model(ids).flatten(0, 1) * model.temperature, ids.flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()

        return model, optimizer, step

    return make


def bits(model, optimizer):
    """{name: integers} of weights, moments and Adam's step: -0.0 is not 0.0, and a NaN equals itself."""
    state = {}
    for name, parameter in model.named_parameters():
        mine = {"weight": parameter.detach(), **optimizer.optimizer.state[parameter]}
        state |= {f"{name}.{kind}": value.clone().view(torch.int32).tolist() for kind, value in mine.items()}
    return state


def save(folder, accelerator, model, optimizer, step, keep=None):
    writer = CheckpointWriter(folder, accelerator, keep)
    writer.save(model, optimizer, step, {"position": 8 * step})
    writer.wait()
    return folder / f"step-{step:07d}"


@pytest.fixture
def saved(tmp_path, accelerator, training):
    """(folder of a checkpoint of step 3, model, optimizer, a function that does a step)."""
    model, optimizer, step = training()
    for number in range(3):
        step(number)
    return save(tmp_path / "checkpoints", accelerator, model, optimizer, 3), model, optimizer, step


# -- write and read ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [None, 400])  # 400 bytes: smaller than the matrices, which then lie in many chunks
def test_what_is_written_is_read_to_the_bit_and_training_goes_on_as_if_nothing_had_been(
    tmp_path, monkeypatch, accelerator, training, chunk
):
    if chunk:
        monkeypatch.setattr("dilqur.checkpoint.format.CHUNK_BYTES", chunk)
    model, optimizer, step = training(seed=0)
    for number in range(3):
        step(number)
    with torch.no_grad():  # bits that arithmetic would lose
        model[0].weight[0, :4] = torch.tensor([-0.0, 1e-42, float("inf"), float("nan")])
    folder = save(tmp_path, accelerator, model, optimizer, 3)
    other, other_optimizer, other_step = training(seed=1)
    reader = CheckpointReader(folder)
    assert reader.trainer["step"] == 3
    assert reader.trainer["position"] == 24
    load_checkpoint(reader, other, other_optimizer)
    assert bits(other, other_optimizer) == bits(model, optimizer)
    step(3)
    other_step(3)
    assert bits(other, other_optimizer) == bits(model, optimizer)


def test_weights_can_be_read_alone_in_their_shapes(saved):
    folder, model, _, _ = saved
    reader = CheckpointReader(folder)
    assert reader.shapes.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(reader.tensor("weight", name), parameter) for name, parameter in model.named_parameters())


def test_a_checkpoint_is_the_state_of_the_moment_of_the_call(tmp_path, accelerator, training):
    model, optimizer, step = training()
    step(0)
    writer, then = CheckpointWriter(tmp_path, accelerator), bits(model, optimizer)
    writer.save(model, optimizer, 1, {})
    for number in range(1, 5):
        step(number)  # goes on while the thread writes
    writer.save(model, optimizer, 5, {})  # and saves again before asking whether the first one stands
    writer.wait()
    for folder, expected in zip(complete_checkpoints(tmp_path), (then, bits(model, optimizer)), strict=True):
        other, other_optimizer, _ = training(seed=1)
        load_checkpoint(CheckpointReader(folder), other, other_optimizer)
        assert bits(other, other_optimizer) == expected


def test_it_is_plain_safetensors_and_json_and_nothing_else(saved):
    from safetensors.torch import load_file

    folder, model, optimizer, _ = saved
    assert {file.name for file in folder.iterdir()} == FILES
    assert [p.name for p in folder.parent.iterdir()] == ["step-0000003"]
    stored = load_file(folder / "rank-00000.safetensors")
    for name, parameter in model.named_parameters():
        assert torch.equal(stored[f"weight/{name}@0"], parameter.flatten())
        assert torch.equal(stored[f"exp_avg_sq/{name}@0"], optimizer.optimizer.state[parameter]["exp_avg_sq"].flatten())


def test_a_checkpoint_of_format_version_1_still_goes_on():
    """Committed as version 1 wrote it: it called weights fp32 and named no dtypes."""
    reader = CheckpointReader(Path(__file__).parent / "checkpoint-version-1" / "step-0000002")
    assert reader.trainer["version"] == 1
    sums = {
        name: tuple(reader.tensor(kind, name).sum().item() for kind in ("weight", "exp_avg_sq"))
        for name in reader.shapes
    }
    expected = {  # printed by the program that saved it
        "0.weight": (0.25759029388427734, 8.788953709881753e-05),
        "1.weight": (-0.39297088980674744, 0.0009093417320400476),
        "1.bias": (1.097996711730957, 2.4072116502793506e-05),
    }
    assert sums.keys() == expected.keys()
    for name, values in expected.items():
        assert sums[name] == pytest.approx(values, rel=1e-6)  # a sum in another order


def test_bfloat16_state_is_stored_in_two_bytes_and_read_to_the_bit(tmp_path, accelerator, training):
    model, optimizer, step = training()
    model.to(torch.bfloat16)
    step(0)
    folder = save(tmp_path, accelerator, model, optimizer, 1)
    elements = sum(p.numel() for p in model.parameters())
    data = (folder / "rank-00000.safetensors").stat().st_size - 2000  # its header
    assert data < 3 * 2 * elements
    for name, parameter in model.named_parameters():
        assert torch.equal(CheckpointReader(folder).tensor("weight", name), parameter)


def test_frozen_weights_are_not_inside_and_stay_as_they_are(tmp_path, accelerator, training):
    model, optimizer, step = training()
    model[1].requires_grad_(False)
    step(0)
    folder = save(tmp_path, accelerator, model, optimizer, 1)
    assert sorted(CheckpointReader(folder).shapes) == ["0.weight", "temperature"]
    other, other_optimizer, _ = training(seed=1)
    other[1].requires_grad_(False)
    frozen = other[1].weight.clone()
    load_checkpoint(CheckpointReader(folder), other, other_optimizer)
    assert torch.equal(other[0].weight, model[0].weight)
    assert torch.equal(other[1].weight, frozen)


def test_a_checkpoint_of_another_model_is_refused_with_the_name_of_the_parameter(saved, training):
    reader = CheckpointReader(saved[0])
    with pytest.raises(InputError, match=r"0\.weight is \[50, 24\], the model has \[50, 25\]"):
        load_checkpoint(reader, *training(width=25)[:2])
    model, optimizer, _ = training()
    model[0].requires_grad_(False)
    with pytest.raises(InputError, match=r"holds 0\.weight, which this run does not train"):
        load_checkpoint(reader, model, optimizer)


# -- damage -----------------------------------------------------------------------------------------------------------


def read_all(folder, training):
    model, optimizer, _ = training(seed=1)
    load_checkpoint(CheckpointReader(folder), model, optimizer)


@pytest.mark.parametrize("name", KINDS.values(), ids=KINDS)
def test_a_cut_emptied_or_deleted_file_is_refused_by_name(saved, training, name):
    file = saved[0] / name
    whole = file.read_bytes()
    for length in (len(whole) - 1, len(whole) // 2, 7, 0):  # 7: inside the length of a safetensors header
        file.write_bytes(whole[:length])
        with pytest.raises(InputError, match=name):
            read_all(saved[0], training)
    file.unlink()
    with pytest.raises(InputError, match=name):
        read_all(saved[0], training)
    file.write_bytes(whole)
    read_all(saved[0], training)


@pytest.mark.parametrize("name", KINDS.values(), ids=KINDS)
def test_a_flipped_bit_anywhere_is_refused_by_name(saved, training, name):
    file = saved[0] / name
    whole = file.read_bytes()
    places = {0, 7, 8, len(whole) - 1, *range(0, len(whole), max(1, len(whole) // 60))}  # header length, header, data
    for place in places:
        broken = bytearray(whole)
        broken[place] ^= 1 << (place % 8)
        file.write_bytes(broken)
        with pytest.raises(InputError, match=name):
            read_all(saved[0], training)
        with pytest.raises(InputError, match=name):
            verify_checkpoint(saved[0])


@pytest.mark.parametrize(("length", "said"), [(30, r"no file holds weight/w\[30:32\]"), (33, "as another chunk does")])
def test_an_element_in_no_chunk_or_in_two_is_found(tmp_path, length, said):
    """Files that are whole in themselves, of ranks that split a tensor wrongly."""
    part = tmp_path / ".tmp"
    part.mkdir()
    for rank, (start, count) in enumerate([(32, 32), (0, length)]):
        chunks = chunks_of("weight", "w", start, count, torch.float32)
        write_rank(part, rank, chunks, {"w": [64]}, [tensor_bytes(torch.zeros(count))])
    publish(part, tmp_path / "step-0000001", 1, 2, {})
    with pytest.raises(InputError, match=said):
        verify_checkpoint(tmp_path / "step-0000001")


def test_moments_that_an_earlier_version_lost_after_an_evaluation_are_refused(tmp_path, accelerator, training):
    model, optimizer, step = training()
    step(0)
    for name in ("exp_avg", "exp_avg_sq"):
        optimizer.optimizer.state[model[1].weight][name].zero_()
    folder = save(tmp_path, accelerator, model, optimizer, 1)
    other, other_optimizer, _ = training(seed=1)
    for refused in (
        lambda: load_checkpoint(CheckpointReader(folder), other, other_optimizer),
        lambda: verify_checkpoint(folder),
    ):
        with pytest.raises(InputError, match=r"step-0000001: damaged: the moments of 1\.weight are zero after 1 steps"):
            refused()
    load_checkpoint(CheckpointReader(folder), other, other_optimizer, with_optimizer=False)
    assert torch.equal(other[1].weight, model[1].weight)
    begun = save(tmp_path / "begun", accelerator, *training()[:2], 0)
    load_checkpoint(CheckpointReader(begun), other, other_optimizer)  # nobody has stepped: zeros are right


def test_weights_that_an_earlier_version_rounded_are_refused(tmp_path, accelerator):
    layer = torch.nn.Linear(4, 4, bias=False).bfloat16()
    optimizer = torch.optim.AdamW(layer.parameters())
    for dtype in ("bfloat16", "float32"):
        writer = CheckpointWriter(tmp_path / dtype, accelerator)
        writer.save(layer, optimizer, 0, {"recipe": {"dtype": dtype}})
        writer.wait()
    load_checkpoint(CheckpointReader(tmp_path / "bfloat16" / "step-0000000"), layer, optimizer)
    with pytest.raises(InputError, match="step-0000000: damaged: weight is rounded to bfloat16: an earlier version"):
        load_checkpoint(CheckpointReader(tmp_path / "float32" / "step-0000000"), layer, optimizer)


def test_a_file_of_another_checkpoint_is_refused_by_name(saved, accelerator, training):
    folder, model, optimizer, step = saved
    step(3)
    later = save(folder.parent, accelerator, model, optimizer, 4)
    for name in KINDS.values():  # whole and well-formed, but of step 3
        mixed = shutil.copytree(later, folder.parent / "mixed", dirs_exist_ok=True)
        shutil.copyfile(folder / name, mixed / name)
        with pytest.raises(InputError, match=name):
            read_all(mixed, training)


def test_without_complete_it_is_never_read_and_never_counted(saved, accelerator, training):
    folder, model, optimizer, _ = saved
    half = shutil.copytree(folder, folder.with_name("step-0000009"))
    (half / "COMPLETE").unlink()
    (folder.parent / "step-0000010").mkdir()
    assert complete_checkpoints(folder.parent) == [folder]
    with pytest.raises(InputError, match="step-0000009: no COMPLETE in it"):
        CheckpointReader(half)
    save(folder.parent, accelerator, model, optimizer, 4, keep=2)
    assert [p.name for p in complete_checkpoints(folder.parent)] == ["step-0000003", "step-0000004"]


def test_a_complete_with_the_checksum_of_another_index_is_refused(saved):
    marker = saved[0] / "COMPLETE"
    for content in (b"", marker.read_bytes()[:8], b"0" * 16):
        marker.write_bytes(content)
        with pytest.raises(InputError, match="its checksum does not match COMPLETE"):
            CheckpointReader(saved[0])


def test_a_folder_without_checkpoints_or_with_other_things_has_none(tmp_path):
    assert complete_checkpoints(tmp_path / "nowhere") == []
    (tmp_path / "step-0000002-copy").mkdir()
    (tmp_path / "step-0000002-copy" / "COMPLETE").touch()  # what somebody put aside by hand
    assert complete_checkpoints(tmp_path) == []


# -- rotation and interruption ----------------------------------------------------------------------------------------


def test_rotation_keeps_the_newest(tmp_path, accelerator, training):
    model, optimizer, step = training()
    writer = CheckpointWriter(tmp_path, accelerator, keep=2)
    for number in (2, 4, 10, 100):
        step(number)
        writer.save(model, optimizer, number, {})
    writer.wait()
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["step-0000010", "step-0000100"]


def test_killed_between_the_two_renames_of_a_step_saved_again_neither_is_lost(saved, accelerator, training):
    folder, model, optimizer, step = saved
    checkpoints = folder.parent
    step(3)
    again = save(checkpoints / "elsewhere", accelerator, model, optimizer, 3)
    content = {name: (again / name).read_bytes() for name in FILES}
    folder.rename(checkpoints / ".tmp-old-.tmp-3-abcd")  # the kill falls here
    again.rename(checkpoints / ".tmp-3-abcd")
    (checkpoints / "elsewhere").rmdir()
    half = checkpoints / ".tmp-4-abcd"
    half.mkdir()
    (half / "rank-00000.safetensors").write_bytes(b"half")
    CheckpointWriter(checkpoints, accelerator)
    assert [p.name for p in checkpoints.iterdir()] == ["step-0000003"]
    assert {name: (folder / name).read_bytes() for name in FILES} == content, "the newer one of the two"


def test_what_is_only_half_removed_does_not_come_back(saved, accelerator):
    folder = saved[0]
    folder.rename(folder.parent / ".tmp-gone-step-0000003")
    (folder.parent / ".tmp-gone-step-0000003" / "rank-00000.json").unlink()
    CheckpointWriter(folder.parent, accelerator)
    assert list(folder.parent.iterdir()) == []


def test_without_a_limit_all_stay(tmp_path, accelerator, training):
    model, optimizer, _ = training()
    for number in (1, 2, 3):
        save(tmp_path, accelerator, model, optimizer, number)
    assert [p.name for p in sorted(tmp_path.iterdir())] == [f"step-000000{n}" for n in (1, 2, 3)]


@pytest.mark.parametrize("keep", [None, 2])
def test_a_run_that_goes_back_replaces_what_comes_after(tmp_path, accelerator, training, keep):
    model, optimizer, step = training()
    for number in (2, 4, 6, 8):
        save(tmp_path, accelerator, model, optimizer, number)
    step(0)
    save(tmp_path, accelerator, model, optimizer, 4, keep)  # begun again at step 2, as resume_from_checkpoint said
    names = [p.name for p in sorted(tmp_path.iterdir())]
    assert names == ["step-0000002", "step-0000004"], "a kill now must not go on from step 8 of the other run"
    assert torch.equal(CheckpointReader(tmp_path / "step-0000004").tensor("weight", "0.weight"), model[0].weight)


def test_where_a_save_fails_wait_says_so_and_the_older_checkpoint_stays(saved, accelerator, training):
    folder, model, optimizer, _ = saved
    writer = CheckpointWriter(folder.parent, accelerator, keep=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # no file may grow beyond 4 KB: the disk is full
    try:
        writer.save(model, optimizer, 4, {})
        with pytest.raises(
            SaveFailed, match=r"step 4 could not be written .*; the last complete one is .*step-0000003"
        ):
            writer.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert complete_checkpoints(folder.parent) == [folder]
    read_all(folder, training)
    writer.save(model, optimizer, 5, {})  # there is room again
    writer.wait()
    assert [p.name for p in complete_checkpoints(folder.parent)] == ["step-0000005"]


KILLED_WRITERS = """
import itertools, os, signal, sys, time
from pathlib import Path
import torch
from dilqur.checkpoint.writer import CheckpointWriter
from dilqur.checkpoint.steps import complete_checkpoints
from dilqur.training.distributed import make_accelerator

torch.set_num_threads(1)  # so that this process can be forked
accelerator, folder = make_accelerator(False, 1, 1, None), Path(sys.argv[1])
model = torch.nn.Linear(1000, 1000, bias=False)  # 12 MB a checkpoint
optimizer = torch.optim.AdamW(model.parameters())
for kill in range(24):
    last = complete_checkpoints(folder)[-1:]
    if (writer := os.fork()) == 0:
        checkpoints = CheckpointWriter(folder, accelerator, keep=3)
        for step in itertools.count(1 + int(last[0].name.removeprefix("step-")) if last else 1):
            torch.nn.init.constant_(model.weight, step)
            checkpoints.save(model, optimizer, step, {})
    begun = time.monotonic()
    while complete_checkpoints(folder)[-1:] == last:
        time.sleep(0.001)
    took = time.monotonic() - begun
    time.sleep(took * kill / 12)  # the kills fall into every part of a save
    os.kill(writer, signal.SIGKILL)
    os.waitpid(writer, 0)
    print(len(list(folder.glob(".tmp-*"))))
"""


def test_a_killed_writer_leaves_no_half_checkpoint(tmp_path, accelerator, training):
    done = subprocess.run([sys.executable, "-c", KILLED_WRITERS, tmp_path], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) != {"0"}, "no kill came in the middle of a save: the test did not test"
    found = sorted(tmp_path.glob("step-*"))
    assert complete_checkpoints(tmp_path) == found
    assert 3 <= len(found) <= 4  # killed between the new one and the removal of the oldest
    for folder in found:
        reader = CheckpointReader(folder)
        weight = reader.tensor("weight", "weight")
        assert weight.unique().tolist() == [reader.trainer["step"]] == [int(folder.name.removeprefix("step-"))]
    model, optimizer, _ = training()
    save(tmp_path, accelerator, model, optimizer, 1_000_000, keep=3)
    assert not list(tmp_path.glob(".tmp-*")), "the next run clears away what the killed one left"
