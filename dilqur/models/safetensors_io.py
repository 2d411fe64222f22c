"""A model folder's safetensors files, read, written and rewritten tensor by tensor: a model of any size takes the memory of one.

The format (safetensors' README): 8 bytes with the length of a JSON header, the header {name: {dtype, shape, data_offsets}}, padded to a
multiple of 8, the tensors one after the other. `safetensors.torch.save_file` and `save_torch_state_dict` hold a whole file in memory;
here tensors are written as they are made, and `rewrite` copies bytes from file to file, so that every tensor keeps its dtype to the bit,
also one that torch does not know. Files are named as transformers names them: model.safetensors, or model-00001-of-00003.safetensors …
and model.safetensors.index.json. Reading headers needs no torch.
"""

import json
import math
import os
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import xxhash

from dilqur.common.errors import InputError

INDEX = "model.safetensors.index.json"
PART = 16 << 20  # bytes copied at a time
FIRST_BYTES = 4096  # of a tensor, that stand for it
MAX_HEADER = 100 << 20  # as the library has it
MAX_BYTES = 5 << 30  # of one file, as transformers has it
TORCH_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "I64": "int64", "F64": "float64"}


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


def torch_dtype(name):
    """The torch dtype of one that the format names ("BF16"); None for one that is not read here."""
    import torch

    return getattr(torch, TORCH_NAMES[name]) if name in TORCH_NAMES else None


def dtype_name(dtype):
    """What the format calls a torch dtype: "BF16"."""
    return next(name for name, known in TORCH_NAMES.items() if f"torch.{known}" == str(dtype))


def tensor_bytes(tensor):
    """The memory of a contiguous CPU tensor as bytes, whatever its dtype (NumPy knows no bfloat16)."""
    import torch

    return memoryview(tensor.view(torch.uint8).numpy()) if tensor.numel() else b""


# -- write ------------------------------------------------------------------------------------------------------------


def file_header(entries, metadata=None):
    """(bytes that a file begins with, bytes of the tensors after them). entries: [(name, dtype's name, shape, bytes)] in the order of the
    tensors."""
    header, at = {"__metadata__": metadata} if metadata else {}, 0
    for name, dtype, shape, size in entries:
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw, at


def write_index(folder, where, size, elements):
    """model.safetensors.index.json of {name: file}, as transformers writes it."""
    metadata = {"total_size": size, "total_parameters": elements}
    text = json.dumps({"metadata": metadata, "weight_map": dict(sorted(where.items()))}, indent=1)
    (Path(folder) / INDEX).write_text(text + "\n", encoding="utf-8")


def write_shards(folder, tensors, max_bytes=None):
    """Write `tensors`, {name: (torch dtype, shape, function that makes it)}, into `folder`, in files of at most `max_bytes` (MAX_BYTES).

    The functions are called one at a time, in their order within a file; what they return is of that dtype and shape, on the
    CPU. The caller makes the folder atomic. Returns {name: xxh3-64 of its bytes}.
    """
    folder, files, checksums = Path(folder), _split(tensors, max_bytes or MAX_BYTES), {}
    names = [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
    names = ["model.safetensors"] if len(files) == 1 else names
    where, size = {}, 0
    for file, inside in zip(names, files, strict=True):
        entries = [(key, dtype_name(dtype), shape, _size(dtype, shape)) for key, (dtype, shape, _) in inside.items()]
        head, data = file_header(entries, {"format": "pt"})
        size += data
        where |= dict.fromkeys(inside, file)
        with (folder / file).open("wb") as out:
            out.write(head)
            for key, (dtype, shape, make) in inside.items():
                tensor = make()
                if tensor.dtype != dtype or tuple(tensor.shape) != tuple(shape):
                    raise RuntimeError(f"{key}: {tensor.dtype} {list(tensor.shape)}, not {dtype} {list(shape)}")
                content = tensor_bytes(tensor.contiguous().view(-1))
                checksums[key] = xxhash.xxh3_64_hexdigest(content)
                out.write(content)
    if len(files) > 1:
        write_index(folder, where, size, sum(math.prod(shape) for _, shape, _ in tensors.values()))
    return checksums


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
        # in the order of the file, larger dtypes first, as the library lays them out: every tensor is aligned
        names, entries = sorted(inside, key=lambda name: inside[name].begin), []
        for name in names:
            stored, shape, size = inside[name], inside[name].shape, inside[name].bytes
            if name in replaced:
                shape = replaced[name][0]
                size = size // math.prod(stored.shape) * math.prod(shape)
            entries.append((name, stored.dtype, shape, size))
        head, data = file_header(entries, {"format": "pt"})
        total += data
        elements += sum(math.prod(shape) for _, _, shape, _ in entries)
        where |= dict.fromkeys(names, file)
        with (out / ("model.safetensors" if single else file)).open("wb") as target:
            target.write(head)
            for name in names:
                if name in replaced:
                    _write_tensor(replaced[name][1](), target)
                else:
                    _copy(inside[name], target)
    if not single:
        write_index(out, where, total, elements)
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
    if (stated := max((stored.stop for stored in found.values()), default=start)) != size:
        said = f"{size:,} bytes, its header says {stated:,}"
        raise InputError(f"{path}: damaged or cut ({said}); fetch or convert the model again")
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
    content = tensor_bytes(tensor.reshape(-1))
    for at in range(0, len(content), PART):
        target.write(content[at : at + PART])


def _split(tensors, max_bytes):
    """Runs of `tensors` of at most max_bytes each (a larger one alone), wide dtypes first in each: all data lie aligned."""
    files, room = [{}], max_bytes
    for name, (dtype, shape, make) in tensors.items():
        size = _size(dtype, shape)
        if size > room and files[-1]:
            files.append({})
            room = max_bytes
        files[-1][name] = (dtype, shape, make)
        room -= size
    return [dict(sorted(file.items(), key=lambda item: -item[1][0].itemsize)) for file in files]


def _size(dtype, shape):
    return dtype.itemsize * math.prod(shape)
