"""One checkpoint format for every strategy and any number of processes: plain safetensors and JSON, no pickle.

    checkpoints/step-0000500/rank-00003.safetensors   the flat fp32 pieces rank 3 owned: {fp32,exp_avg,exp_avg_sq}/NAME@START
    checkpoints/step-0000500/rank-00003.json          the same pieces with checksums, shapes, the size of the file
    checkpoints/step-0000500/trainer.json             step, position in the stream, seed, recipe, data, trained names
    checkpoints/step-0000500/index.json               checksums of the JSON files
    checkpoints/step-0000500/COMPLETE                 checksum of index.json

Nobody gathers: every rank writes what it owns. A checkpoint becomes complete in `_publish`: all files lie in a folder
named `.tmp-…`, COMPLETE is written last, everything is flushed, and one rename gives it its name. What lacks COMPLETE is never
read and never counted. Only trained weights are inside; frozen ones come from the model the run began with, to the bit.
"""

import bisect
import json
import secrets
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import xxhash
from safetensors import safe_open

from dilqur.atomic import atomic_file, fsync_folder, write_json
from dilqur.distributed import owned_slices, refresh, set_optimizer_step
from dilqur.errors import InputError

VERSION = 1
PIECE = 16 << 20  # elements: a rank that needs a corner of a piece verifies 64 MB at most
PUBLISH_TIMEOUT_S = 1800


class CheckpointWriter:
    """`save` copies what this rank owns into a kept buffer, the only stall, and returns; a thread writes.

    The file is the state of the moment of the call. `wait` returns when the last save stands, and raises what the thread
    raised (OSError for a full disk).
    """

    def __init__(self, folder, accelerator, keep=None):
        """folder: `checkpoints`. keep: how many complete ones stay (None: all); an old one goes only after the new stands."""
        self.folder, self.keep = Path(folder), keep
        self.rank, self.world = accelerator.process_index, accelerator.num_processes
        self._buffer, self._thread, self._error = torch.empty(0), None, None
        run = [secrets.token_hex(4)]
        if self.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            for stale in self.folder.glob(".tmp-*"):  # of a run that was killed
                shutil.rmtree(stale)
        if self.world > 1:  # a word of this run in the name: what a killed run left must not complete a later save
            torch.distributed.broadcast_object_list(run)
        self.run = run[0]

    @torch.no_grad()
    def save(self, model, optimizer, step, trainer):
        """Start saving the state after `step` steps. trainer: dict for trainer.json, the same on every rank."""
        self.wait()  # the buffer is in use until the last one is written
        pieces, views, shapes, size = [], [], {}, 0
        for name, shape, start, state in owned_slices(model, optimizer):
            shapes[name] = list(shape)
            for kind, live in state.items():
                for first in range(0, live.numel(), PIECE):
                    view = live[first : first + PIECE]
                    pieces.append(
                        {
                            "key": f"{kind}/{name}@{start + first}",
                            "kind": kind,
                            "name": name,
                            "start": start + first,
                            "length": view.numel(),
                        }
                    )
                    views.append((size, view))
                    size += view.numel()
        if self._buffer.numel() != size:
            self._buffer = torch.empty(size, pin_memory=torch.cuda.is_available())
        for at, view in views:
            self._buffer[at : at + view.numel()].copy_(view, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._thread = threading.Thread(target=self._write, args=(step, pieces, shapes, trainer), name="checkpoint")
        self._thread.start()

    def wait(self):
        if self._thread:
            self._thread.join()
            error, self._thread, self._error = self._error, None, None
            if error:
                raise error

    def _write(self, step, pieces, shapes, trainer):
        try:
            folder = self.folder / f".tmp-{step}-{self.run}"
            folder.mkdir(exist_ok=True)
            self._write_rank(folder, pieces, shapes)
            if self.rank == 0:
                write_json(
                    folder / "trainer.json", {"version": VERSION, "step": step, "world_size": self.world, **trainer}
                )
                self._publish(folder, step)
        except BaseException as error:
            self._error = error

    def _write_rank(self, folder, pieces, shapes):
        """A safetensors file is a header and the buffer as it is; then the JSON that vouches for it."""
        name, data, at, header = f"rank-{self.rank:05d}", memoryview(self._buffer.numpy()).cast("B"), 0, {}
        for piece in pieces:
            end = at + 4 * piece["length"]
            header[piece["key"]] = {"dtype": "F32", "shape": [piece["length"]], "data_offsets": [at, end]}
            piece["xxh3"], at = _checksum(data[at:end]), end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        head = len(text).to_bytes(8, "little") + text
        with atomic_file(folder / f"{name}.safetensors") as file:
            file.write(head)
            file.write(data)
        write_json(
            folder / f"{name}.json",
            {
                "file": f"{name}.safetensors",
                "bytes": len(head) + len(data),
                "header_xxh3": _checksum(head),
                "shapes": shapes,
                "pieces": pieces,
            },
        )

    def _publish(self, folder, step):
        """When every rank's JSON is there: index, COMPLETE, rename. From that rename on the checkpoint exists."""
        names, end = [f"rank-{r:05d}.json" for r in range(self.world)], time.monotonic() + PUBLISH_TIMEOUT_S
        while missing := [n for n in names if not (folder / n).exists()]:
            if time.monotonic() > end:
                raise TimeoutError(f"{folder}: waited {PUBLISH_TIMEOUT_S} s for {missing}")
            time.sleep(0.02)
        index = {
            "version": VERSION,
            "step": step,
            "files": {n: _checksum((folder / n).read_bytes()) for n in [*names, "trainer.json"]},
        }
        write_json(folder / "index.json", index)
        with atomic_file(folder / "COMPLETE", "w") as file:
            file.write(_checksum((folder / "index.json").read_bytes()) + "\n")
        final = self.folder / f"step-{step:07d}"
        aside = self.folder / f".tmp-old-{self.run}"
        if final.exists():  # the same step again, after a resume from an older one
            final.rename(aside)
        folder.rename(final)
        fsync_folder(self.folder)
        shutil.rmtree(aside, ignore_errors=True)
        kept = complete_checkpoints(self.folder)
        now = kept.index(final) + 1  # later steps are of a run this one went back from: `auto` must not go on from them
        for old in [*kept[now:], *(kept[: max(0, now - self.keep)] if self.keep else [])]:
            old.rename(aside)  # killed in the middle of a removal, half a checkpoint must not lie under its name
            shutil.rmtree(aside)


def complete_checkpoints(folder):
    """The complete checkpoints under `folder`, oldest step first."""
    steps = {p.parent: p.parent.name.removeprefix("step-") for p in Path(folder).glob("step-*/COMPLETE")}
    return sorted((p for p, step in steps.items() if step.isdigit()), key=lambda p: int(steps[p]))


class CheckpointReader:
    """Opens a complete checkpoint: markers, JSON files, sizes and headers are checked at once, data when it is read.

    trainer: the dict of trainer.json. shapes: {parameter name: shape}. Raises InputError naming the file that is missing,
    cut or damaged.
    """

    def __init__(self, folder):
        self.folder, self.shapes, self._pieces, self._files = Path(folder), {}, {}, {}
        if not (self.folder / "COMPLETE").exists():
            raise InputError(f"{self.folder}: no COMPLETE in it: half-written, or no checkpoint")
        raw = self._bytes("index.json")
        if self._bytes("COMPLETE").decode(errors="replace").strip() != _checksum(raw):
            raise InputError(f"{self.folder}/index.json: damaged: it is not the one COMPLETE vouches for")
        index = json.loads(raw)
        if index["version"] > VERSION:
            raise InputError(f"{self.folder}: format version {index['version']} is newer than this program's {VERSION}")
        for name, stated in index["files"].items():
            content = self._bytes(name)
            if _checksum(content) != stated:
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
            if length > rank["bytes"] or _checksum(first + file.read(length)) != rank["header_xxh3"]:
                raise InputError(f"{path}: damaged: the checksum of its header differs")
        self._files[path] = safe_open(path, "pt")
        self.shapes.update(rank["shapes"])
        for piece in rank["pieces"]:
            self._pieces.setdefault((piece["kind"], piece["name"]), []).append({**piece, "path": path})

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
            if _checksum(memoryview(stored.numpy()).cast("B")) != piece["xxh3"]:
                raise InputError(f"{piece['path']}: damaged: the checksum of {piece['key']} differs")
            with torch.no_grad():  # grad mode is per thread
                out[at - start : end - start].copy_(stored[at - piece["start"] : end - piece["start"]])
            at, i = end, i + 1

    def weights(self):
        """{name: fp32 tensor in its shape} of all trained parameters, in one process and without torch.distributed."""
        out = {name: torch.empty(shape) for name, shape in self.shapes.items()}
        for name, tensor in out.items():
            self.fill("fp32", name, 0, tensor.view(-1))
        return out


@torch.no_grad()
def load_checkpoint(reader, model, optimizer):
    """Fill weights, moments and Adam's step of a prepared model. Raises InputError where the parameters do not agree."""
    jobs, names = [], set()
    for name, shape, start, state in owned_slices(model, optimizer, for_read=True):
        names.add(name)
        if tuple(reader.shapes.get(name, ())) != shape:
            raise InputError(
                f"{reader.folder}: {name} is {reader.shapes.get(name, 'not there')}, the model has {list(shape)}"
            )
        jobs += [(kind, name, start, live) for kind, live in state.items()]
    if surplus := set(reader.shapes) - names:
        raise InputError(f"{reader.folder}: holds {sorted(surplus)[0]}, which this run does not train")
    with ThreadPoolExecutor(8) as pool:
        for _ in pool.map(lambda job: reader.fill(*job), jobs):
            pass
    set_optimizer_step(optimizer, reader.trainer["step"])
    refresh(optimizer)


def _checksum(data):
    return xxhash.xxh3_64_hexdigest(data)
