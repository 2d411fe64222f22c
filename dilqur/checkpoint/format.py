"""The checkpoint format on disk: plain safetensors and JSON, no pickle, the same for every strategy and world size.

    checkpoints/step-0000500/rank-00003.safetensors   the flat chunks of rank 3: {weight,exp_avg,exp_avg_sq}/NAME@START
    checkpoints/step-0000500/rank-00003.json          the same chunks (key "pieces") with checksums, shapes, file size
    checkpoints/step-0000500/trainer.json             step, position in the stream, seed, recipe, data, trained names
    checkpoints/step-0000500/index.json               checksums of the JSON files
    checkpoints/step-0000500/COMPLETE                 checksum of index.json

A chunk is a run of elements of one flattened tensor in its training dtype (F32; BF16 in pure-bf16 training), at most
CHUNK_BYTES long: a rank that needs a part of a tensor reads and verifies only the chunks around it. `publish` makes a
checkpoint complete: all files are in a folder named `.tmp-…`, COMPLETE is written last, everything is flushed, and one
rename gives the folder its name. A folder without COMPLETE is never read and never counted.
"""

import bisect
import json
import shutil
from pathlib import Path

import torch
from safetensors import safe_open

from dilqur.checkpoint.steps import step_folder
from dilqur.common.atomic import atomic_file, fsync_folder, write_json
from dilqur.common.errors import InputError
from dilqur.common.hashing import checksum
from dilqur.models.safetensors_io import file_header, tensor_bytes

VERSION = 2
CHUNK_BYTES = 64 << 20
KINDS = ("weight", "exp_avg", "exp_avg_sq")
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


# -- write ------------------------------------------------------------------------------------------------------------


def chunks_of(kind, name, start, length, dtype):
    """The chunks, in order, of the elements [start, start + length) of `kind`/`name`, of torch `dtype`."""
    step = CHUNK_BYTES // dtype.itemsize
    return [
        {
            "key": f"{kind}/{name}@{first}",
            "kind": kind,
            "name": name,
            "start": first,
            "length": min(step, start + length - first),
            "dtype": DTYPE_NAMES[dtype],
        }
        for first in range(start, start + length, step)
    ]


def size_of(chunk):
    """Bytes of a chunk's elements."""
    return chunk["length"] * DTYPES[chunk["dtype"]].itemsize


def write_rank(folder, rank, chunks, shapes, data):
    """Write rank-RANK.safetensors and, once that is flushed, the JSON with its checksums.

    chunks: of `chunks_of`, F32 before BF16 (safetensors wants aligned data). shapes: {name: shape} of the whole parameters.
    data: an iterable of each chunk's bytes in the same order, possibly a generator. Raises OSError.
    """
    name = f"rank-{rank:05d}"
    head, size = file_header([(c["key"], c["dtype"], [c["length"]], size_of(c)) for c in chunks])
    with atomic_file(Path(folder) / f"{name}.safetensors") as file:
        file.write(head)
        for chunk, content in zip(chunks, data, strict=True):
            chunk["xxh3"] = checksum(content)
            file.write(content)
    record = {"file": f"{name}.safetensors", "bytes": len(head) + size, "header_xxh3": checksum(head)}
    write_json(Path(folder) / f"{name}.json", {**record, "shapes": shapes, "pieces": chunks})


def publish(part, final, step, world, trainer):
    """Rename the folder `part`, which holds every rank's two files, to the checkpoint `final`, replacing one of that name.

    trainer: the content of trainer.json besides format version, step and world size.
    """
    part, final = Path(part), Path(final)
    write_json(part / "trainer.json", {"version": VERSION, "step": step, "world_size": world, **trainer})
    names = [*(f"rank-{rank:05d}.json" for rank in range(world)), "trainer.json"]
    files = {name: checksum((part / name).read_bytes()) for name in names}
    write_json(part / "index.json", {"version": VERSION, "step": step, "files": files})
    with atomic_file(part / "COMPLETE", "w") as file:
        file.write(checksum((part / "index.json").read_bytes()) + "\n")
    aside = part.with_name(f".tmp-old-{part.name}")
    if final.exists():  # the same step again, after a resume from an older one
        final.rename(aside)
    part.rename(final)
    fsync_folder(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


def remove_checkpoint(folder):
    """Rename, then delete: killed in the middle of a removal, half a checkpoint must not lie under its name. What cannot be
    deleted now, as a file that somebody has open on NFS, the next start deletes."""
    aside = folder.with_name(f".tmp-gone-{folder.name}")
    folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def tidy_up_after_a_kill(checkpoints):
    """Delete what a killed run left under temporary names; but where the kill fell between the two renames of `publish`, the
    checkpoint that was to be replaced, or the one that was to replace it, gets its name."""
    left = sorted(Path(checkpoints).glob(".tmp-*"), key=lambda folder: folder.name.startswith(".tmp-old-"))
    for folder in left:  # the replacement first
        published = (
            folder.name.startswith(".tmp-old-") or folder.name[len(".tmp-")].isdigit()
        )  # not fetched, not removed
        if published and (folder / "COMPLETE").exists():
            name = step_folder(checkpoints, json.loads((folder / "index.json").read_text())["step"])
            if not name.exists():
                folder.rename(name)
                continue
        shutil.rmtree(folder, ignore_errors=True)


# -- read -------------------------------------------------------------------------------------------------------------


class CheckpointReader:
    """Opens a complete checkpoint: markers, JSON files, sizes and headers are checked at once, data as it is read.

    trainer: the dict of trainer.json. shapes: {parameter name: shape}. dtypes: {(kind, name): torch dtype} of every tensor
    stored. chunks: {(kind, name): [chunk, …]} in order of "start", each with the "path" of its file. Raises InputError naming
    the file that is missing, cut or damaged.
    """

    def __init__(self, folder):
        self.folder, self.shapes, self.dtypes, self.chunks, self._files = Path(folder), {}, {}, {}, {}
        if not (self.folder / "COMPLETE").exists():
            raise InputError(f"{self.folder}: no COMPLETE in it: half-written, or no checkpoint")
        raw = self._bytes("index.json")
        if self._bytes("COMPLETE").decode(errors="replace").strip() != checksum(raw):
            raise InputError(f"{self.folder}/index.json: damaged: its checksum does not match COMPLETE")
        index = json.loads(raw)
        if index["version"] > VERSION:
            raise InputError(f"{self.folder}: format version {index['version']} is newer than this program's {VERSION}")
        for name, stated in index["files"].items():
            content = self._bytes(name)
            if checksum(content) != stated:
                raise InputError(f"{self.folder / name}: damaged: its checksum does not match index.json")
            if name == "trainer.json":
                self.trainer = json.loads(content)
            else:
                self._open(json.loads(content))
        for chunks in self.chunks.values():
            chunks.sort(key=lambda chunk: chunk["start"])

    def _open(self, rank):
        path = self.folder / rank["file"]
        if not path.exists() or path.stat().st_size != rank["bytes"]:
            raise InputError(f"{path}: missing or cut: {rank['bytes']} bytes expected")
        with path.open("rb") as file:
            length = int.from_bytes(first := file.read(8), "little")
            if length > rank["bytes"] or checksum(first + file.read(length)) != rank["header_xxh3"]:
                raise InputError(f"{path}: damaged: the checksum of its header differs")
        self._files[path] = safe_open(path, "pt")
        self.shapes.update(rank["shapes"])
        for chunk in rank["pieces"]:
            kind = {"fp32": "weight"}.get(chunk["kind"], chunk["kind"])  # version 1 called it so, and knew only F32
            dtype = DTYPES[chunk.get("dtype", "F32")]
            self.chunks.setdefault((kind, chunk["name"]), []).append({**chunk, "path": path})
            self.dtypes[kind, chunk["name"]] = dtype

    def _bytes(self, name):
        try:
            return (self.folder / name).read_bytes()
        except OSError as problem:
            raise InputError(f"{self.folder / name}: {problem.strerror}: not a whole checkpoint") from None

    def fill(self, kind, name, start, out):
        """Copy the elements [start, start + len(out)) of `kind`/`name` into the 1-D tensor `out`, checking what is read."""
        chunks, at, stop = self.chunks.get((kind, name), []), start, start + out.numel()
        i = max(0, bisect.bisect_right(chunks, start, key=lambda chunk: chunk["start"]) - 1)
        while at < stop:
            if i >= len(chunks) or not chunks[i]["start"] <= at < chunks[i]["start"] + chunks[i]["length"]:
                raise InputError(f"{self.folder}: no file holds {kind}/{name}[{at}:{stop}]")
            chunk = chunks[i]
            end = min(stop, chunk["start"] + chunk["length"])
            stored = self._files[chunk["path"]].get_tensor(chunk["key"])
            if checksum(tensor_bytes(stored)) != chunk["xxh3"]:
                raise InputError(f"{chunk['path']}: damaged: the checksum of {chunk['key']} differs")
            with torch.no_grad():  # grad mode is per thread
                out[at - start : end - start].copy_(stored[at - chunk["start"] : end - chunk["start"]])
            at, i = end, i + 1

    def tensor(self, kind, name):
        """One whole tensor in its shape and dtype, in one process and without torch.distributed."""
        out = torch.empty(self.shapes[name], dtype=self.dtypes[kind, name])
        self.fill(kind, name, 0, out.view(-1))
        return out
