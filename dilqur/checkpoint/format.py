"""The checkpoint format on disk: plain safetensors and JSON, no pickle, the same for every strategy and number of processes.

    checkpoints/step-0000500/rank-00003.safetensors   the flat pieces rank 3 owned: {weight,exp_avg,exp_avg_sq}/NAME@START
    checkpoints/step-0000500/rank-00003.json          the same pieces with checksums, shapes, the size of the file
    checkpoints/step-0000500/trainer.json             step, position in the stream, seed, recipe, data, trained names
    checkpoints/step-0000500/index.json               checksums of the JSON files
    checkpoints/step-0000500/COMPLETE                 checksum of index.json

A piece is a run of elements of one flattened tensor, in the dtype it is trained in (F32, or BF16 for pure-bf16 training), at
most PIECE_BYTES long, so that a rank that needs a corner of one verifies no more than that. A checkpoint becomes complete in
`publish`: all files lie in a folder named `.tmp-…`, COMPLETE is written last, everything is flushed, and one rename gives it
its name. What lacks COMPLETE is never read and never counted.
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
from dilqur.models.safetensors_io import tensor_bytes

VERSION = 2
PIECE_BYTES = 64 << 20
KINDS = ("weight", "exp_avg", "exp_avg_sq")
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


# -- write ------------------------------------------------------------------------------------------------------------


def pieces_of(kind, name, start, length, dtype):
    """Describe the elements [start, start + length) of `kind`/`name`, of torch `dtype`, as a list of pieces in their order."""
    step = PIECE_BYTES // dtype.itemsize
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


def write_rank(folder, rank, pieces, shapes, data):
    """Write rank-RANK.safetensors and, when that is on the disk, the JSON that vouches for it.

    pieces: as `pieces_of` makes them, F32 before BF16 (safetensors wants data aligned). shapes: {name: shape} of the whole
    parameters. data: an iterable of each piece's bytes, in the same order; it may make them as it goes. Raises OSError.
    """
    name, at, header = f"rank-{rank:05d}", 0, {}
    for piece in pieces:
        end = at + piece["length"] * DTYPES[piece["dtype"]].itemsize
        header[piece["key"]] = {"dtype": piece["dtype"], "shape": [piece["length"]], "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    with atomic_file(Path(folder) / f"{name}.safetensors") as file:
        file.write(head)
        for piece, content in zip(pieces, data, strict=True):
            piece["xxh3"] = checksum(content)
            file.write(content)
    record = {"file": f"{name}.safetensors", "bytes": len(head) + at, "header_xxh3": checksum(head)}
    write_json(Path(folder) / f"{name}.json", {**record, "shapes": shapes, "pieces": pieces})


def publish(part, final, step, world, trainer):
    """Make the folder `part`, in which every rank's two files lie, the checkpoint `final`, replacing what has that name.

    trainer: what trainer.json is to hold beside format version and step. From the rename on the checkpoint exists.
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
    """Opens a complete checkpoint: markers, JSON files, sizes and headers are checked at once, data when it is read.

    trainer: the dict of trainer.json. shapes: {parameter name: shape}. dtypes: {(kind, name): torch dtype}, which also says
    what is there. Raises InputError naming the file that is missing, cut or damaged.
    """

    def __init__(self, folder):
        self.folder, self.shapes, self.dtypes, self._pieces, self._files = Path(folder), {}, {}, {}, {}
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
                raise InputError(f"{self.folder / name}: damaged: its checksum is not the one in index.json")
            if name == "trainer.json":
                self.trainer = json.loads(content)
            else:
                self._open(json.loads(content))
        for pieces in self._pieces.values():
            pieces.sort(key=lambda p: p["start"])

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
        for piece in rank["pieces"]:
            kind = {"fp32": "weight"}.get(piece["kind"], piece["kind"])  # version 1 called it so, and knew only F32
            dtype = DTYPES[piece.get("dtype", "F32")]
            self._pieces.setdefault((kind, piece["name"]), []).append({**piece, "path": path})
            self.dtypes[kind, piece["name"]] = dtype

    def _bytes(self, name):
        try:
            return (self.folder / name).read_bytes()
        except OSError as problem:
            raise InputError(f"{self.folder / name}: {problem.strerror}: not a whole checkpoint") from None

    def fill(self, kind, name, start, out):
        """Copy the elements [start, start + len(out)) of `kind`/`name` into the 1-D tensor `out`, checking what is read."""
        pieces, at, stop = self._pieces.get((kind, name), []), start, start + out.numel()
        i = max(0, bisect.bisect_right(pieces, start, key=lambda p: p["start"]) - 1)
        while at < stop:
            if i >= len(pieces) or not pieces[i]["start"] <= at < pieces[i]["start"] + pieces[i]["length"]:
                raise InputError(f"{self.folder}: no file holds {kind}/{name}[{at}:{stop}]")
            piece = pieces[i]
            end = min(stop, piece["start"] + piece["length"])
            stored = self._files[piece["path"]].get_tensor(piece["key"])
            if checksum(tensor_bytes(stored)) != piece["xxh3"]:
                raise InputError(f"{piece['path']}: damaged: the checksum of {piece['key']} differs")
            with torch.no_grad():  # grad mode is per thread
                out[at - start : end - start].copy_(stored[at - piece["start"] : end - piece["start"]])
            at, i = end, i + 1

    def tensor(self, kind, name):
        """One whole tensor in its shape and dtype, in one process and without torch.distributed."""
        out = torch.empty(self.shapes[name], dtype=self.dtypes[kind, name])
        self.fill(kind, name, 0, out.view(-1))
        return out
