"""A model folder's safetensors files, read and rewritten tensor by tensor: a model of any size takes a few megabytes.

The format (safetensors' README): 8 bytes with the length of a JSON header, the header {name: {dtype, shape, data_offsets}}, the
tensors one after the other. `safetensors.torch.save_file` holds a whole file in memory; here bytes go from file to file, so
every tensor keeps its dtype to the bit, also one that torch does not know.
"""

import json
import math
import os
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import xxhash

from dilqur.errors import InputError

INDEX = "model.safetensors.index.json"
PART = 16 << 20  # bytes copied at a time
FIRST_BYTES = 4096  # of a tensor, that stand for it
MAX_HEADER = 100 << 20  # as the library has it


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies: begin and stop in bytes from the start of `file`. dtype as the format names it (BF16, F32, …)."""

    file: Path
    dtype: str
    shape: tuple
    begin: int
    stop: int

    @property
    def bytes(self):
        return self.stop - self.begin


def stored_tensors(folder):
    """{name: Stored} of a model folder, one file or an index and its shards; reads headers only, no torch.

    Raises InputError where there is none, or one is missing, cut or damaged.
    """
    folder = Path(folder)
    if (folder / INDEX).exists():
        try:
            where = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
            files = sorted(set(where.values()))
        except (ValueError, KeyError, AttributeError, TypeError):
            raise InputError(f"{folder / INDEX}: damaged; fetch or convert the model again") from None
        if missing := [file for file in files if not (folder / file).exists()]:
            raise InputError(f"{folder / missing[0]}: not there, but {INDEX} names it; fetch the model again")
        found = {name: stored for file in files for name, stored in _header(folder / file).items()}
        if lost := sorted(set(where) - set(found)):
            raise InputError(
                f"{folder / where[lost[0]]}: holds no {lost[0]}, but {INDEX} says so; fetch the model again"
            )
        return {name: found[name] for name in where}
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        if pickles := sorted([*folder.glob("*.bin"), *folder.glob("*.pth")]):
            raise InputError(
                f"{folder}: its weights are pickles ({pickles[0].name}), which are not read; convert the model to safetensors "
                "first (from_pretrained, then save_pretrained)"
            )
        raise InputError(f"{folder}: no weights in it (no .safetensors); fetch the model again")
    if len(files) > 1 and (folder / "model.safetensors") not in files:
        raise InputError(f"{folder}: {len(files)} .safetensors and no {INDEX}; fetch the model again")
    return _header(folder / "model.safetensors" if len(files) > 1 else files[0])


def fingerprint(folder):
    """Hash of a model's weights, whatever folder they lie in and into however many files they are cut: every tensor's name, dtype,
    shape and its first FIRST_BYTES. A model that was trained on differs in them."""
    digest = xxhash.xxh3_128()
    for name, stored in sorted(stored_tensors(folder).items()):
        with stored.file.open("rb") as file:
            file.seek(stored.begin)
            first = file.read(min(FIRST_BYTES, stored.bytes))
        digest.update(f"{name} {stored.dtype} {stored.shape} ".encode() + first)
    return digest.hexdigest()


def read_tensor(stored, name):
    """The tensor as torch has it, in its own dtype; its pages are mapped from the file and read when they are touched."""
    from safetensors import safe_open

    with safe_open(stored.file, "pt") as opened:
        return opened.get_tensor(name)


def rewrite(tensors, replaced, removed, out):
    """Write all of `tensors` ({name: Stored}) into the folder `out`, in files of the same names.

    replaced: {name: (shape, function)}; the function is called when the tensor is written, one at a time, and returns it,
    contiguous, on the CPU and of the dtype it had. removed: names left out (tied ones). Writes the index where there are several
    files. The caller makes it atomic. Returns the number of elements written.
    """
    out, files = Path(out), defaultdict(dict)
    for name, stored in tensors.items():
        if name not in removed:
            files[stored.file.name][name] = stored
    single, where, elements, total = len(files) == 1, {}, 0, 0
    for file, inside in files.items():
        header, at = {"__metadata__": {"format": "pt"}}, 0
        # in the order of the file, larger dtypes first, as the library lays them out: every tensor is aligned
        for name, stored in sorted(inside.items(), key=lambda item: item[1].begin):
            shape = list(replaced[name][0] if name in replaced else stored.shape)
            size = stored.bytes // math.prod(stored.shape) * math.prod(shape) if name in replaced else stored.bytes
            header[name] = {"dtype": stored.dtype, "shape": shape, "data_offsets": [at, at + size]}
            at, elements = at + size, elements + math.prod(shape)
            where[name] = file
        total += at
        raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        raw += b" " * (-len(raw) % 8)
        with (out / ("model.safetensors" if single else file)).open("wb") as target:
            target.write(len(raw).to_bytes(8, "little") + raw)
            for name in list(header)[1:]:
                if name in replaced:
                    _write_tensor(replaced[name][1](), target)
                else:
                    _copy(inside[name], target)
    if not single:
        index = {
            "metadata": {"total_size": total, "total_parameters": elements},
            "weight_map": dict(sorted(where.items())),
        }
        (out / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return elements


def equal_bytes(one, other):
    """Do two Stored hold the same bytes? Read in parts."""
    if one.bytes != other.bytes:
        return False
    with one.file.open("rb") as first, other.file.open("rb") as second:
        first.seek(one.begin), second.seek(other.begin)
        left = one.bytes
        while left:
            part = min(left, PART)
            if first.read(part) != second.read(part):
                return False
            left -= part
    return True


def _header(path):
    damaged = f"{path}: damaged or cut; fetch or convert the model again"
    with path.open("rb") as file:
        length, size = int.from_bytes(file.read(8), "little"), os.fstat(file.fileno()).st_size
        if not 2 <= length <= min(MAX_HEADER, size - 8):
            raise InputError(damaged)
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            start = 8 + length
            found = {
                name: Stored(path, it["dtype"], tuple(it["shape"]), *(start + at for at in it["data_offsets"]))
                for name, it in header.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError):
            raise InputError(damaged) from None
    if max((stored.stop for stored in found.values()), default=start) != size:
        raise InputError(damaged)
    return found


def _copy(stored, target):
    with stored.file.open("rb") as source:
        source.seek(stored.begin)
        left = stored.bytes
        while left:
            part = source.read(min(left, PART))
            target.write(part)
            left -= len(part)


def _write_tensor(tensor, target):
    import torch

    flat = tensor.reshape(-1).view(torch.uint8).numpy()
    for at in range(0, len(flat), PART):
        target.write(flat[at : at + PART].data)
