"""Tensors written to safetensors files one after the other as they are made: memory for one, whatever their number.

Files are named as transformers names them, and small enough to copy: model.safetensors, or model-00001-of-00003.safetensors …
and model.safetensors.index.json. `safetensors.torch.save_file` and `save_torch_state_dict` want a whole file in memory.
"""

import json
import math
from pathlib import Path

import torch
import xxhash

from dilqur.checkpoint_files import tensor_bytes
from dilqur.safetensors_folder import INDEX

MAX_BYTES = 5 << 30  # of one file, as transformers has it
NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64", torch.float64: "F64"}
TORCH_DTYPES = {name: dtype for dtype, name in NAMES.items()}


def write_shards(folder, tensors, max_bytes=MAX_BYTES):
    """Write `tensors`, {name: (torch dtype, shape, function that makes it)}, into `folder`.

    The functions are called one at a time, in their order within a file; what they return is of that dtype and shape, on the
    CPU. The caller makes the folder atomic. Returns {name: xxh3-64 of its bytes}.
    """
    folder, files, checksums = Path(folder), _split(tensors, max_bytes), {}
    names = [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
    names = ["model.safetensors"] if len(files) == 1 else names
    for file, inside in zip(names, files, strict=True):
        header, at = {"__metadata__": {"format": "pt"}}, 0
        for key, (dtype, shape, _) in inside.items():
            end = at + _size(dtype, shape)
            header[key] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [at, end]}
            at = end
        raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        raw += b" " * (-len(raw) % 8)
        with (folder / file).open("wb") as out:
            out.write(len(raw).to_bytes(8, "little") + raw)
            for key, (dtype, shape, make) in inside.items():
                tensor = make()
                if tensor.dtype != dtype or tuple(tensor.shape) != tuple(shape):
                    raise RuntimeError(f"{key}: {tensor.dtype} {list(tensor.shape)}, not {dtype} {list(shape)}")
                content = tensor_bytes(tensor.contiguous().view(-1))
                checksums[key] = xxhash.xxh3_64_hexdigest(content)
                out.write(content)
    if len(files) > 1:
        where = {key: file for file, inside in zip(names, files, strict=True) for key in inside}
        elements = sum(math.prod(shape) for _, shape, _ in tensors.values())
        size = sum(_size(dtype, shape) for dtype, shape, _ in tensors.values())
        index = {
            "metadata": {"total_size": size, "total_parameters": elements},
            "weight_map": dict(sorted(where.items())),
        }
        (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return checksums


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
