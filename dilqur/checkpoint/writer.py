"""Saving and loading the state of a run while it trains; the format is dilqur/checkpoint/format.py's.

Sharded save: each rank writes its own shard (dilqur/checkpoint/local_shards.py) from a reused pinned staging buffer. Training
waits only for the copy into that buffer; a thread writes the files, and rank 0's publishes the checkpoint once all ranks'
files are there. No thread takes part in a collective, which could interleave with one of training: the main thread asks in
`wait` whether all ranks wrote. Only trained weights are saved; frozen ones come from the base model, to the bit.
"""

import json
import secrets
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist

from dilqur.checkpoint.format import chunks_of, publish, remove_checkpoint, size_of, tidy_up_after_a_kill, write_rank
from dilqur.checkpoint.local_shards import local_slices, refresh, set_optimizer_step
from dilqur.checkpoint.steps import complete_checkpoints, step_folder, step_of
from dilqur.checkpoint.verify import refuse_lost_moments, refuse_rounded_weights
from dilqur.common.errors import EveryRankError, InputError
from dilqur.models.safetensors_io import tensor_bytes

JOIN_TIMEOUT_S = 25


class SaveFailed(EveryRankError):
    """A checkpoint could not be written; the ones before it stand."""


class CheckpointWriter:
    """`save` copies this rank's shard, the only stall, and returns. The checkpoint is the state at the time of the call."""

    def __init__(self, folder, accelerator, keep=None, keep_every=None, mirror=None):
        """folder: `checkpoints`. keep: how many complete ones stay (None: all); those at multiples of `keep_every` steps stay
        anyway, and so does the best by its evaluation; an old one goes only after the new one stands. mirror: a
        dilqur.checkpoint.mirror.CheckpointMirror that every complete one is handed to."""
        self.folder, self.keep, self.keep_every, self.mirror = Path(folder), keep, keep_every, mirror
        self.rank, self.world = accelerator.process_index, accelerator.num_processes
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._thread, self._error, self._step = None, None, None
        self.seconds = 0.0  # the longest save so far, from the call until it stood
        self._own_part, self._abandoned = threading.Event(), threading.Event()
        run = [secrets.token_hex(4)]
        if self.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            tidy_up_after_a_kill(self.folder)
        if self.world > 1:  # a word of this run in the name: what a killed run left must not complete a later save
            dist.broadcast_object_list(run)
        self.run = run[0]

    @torch.no_grad()
    def save(self, model, optimizer, step, trainer):
        """Start saving the state after `step` steps. trainer: dict for trainer.json, the same on every rank. A collective;
        raises SaveFailed if the save before this one did."""
        self.wait()  # the buffer is in use until the last one is written
        shard, shapes = [], {}
        for name, shape, start, state in local_slices(model, optimizer):
            shapes[name] = list(shape)
            shard += [(kind, name, start, view) for kind, view in state.items() if view.numel()]
        shard.sort(key=lambda item: -item[3].element_size())  # float32 first: what follows stays aligned
        size = sum(view.nbytes for *_, view in shard)
        if self._buffer.numel() != size:
            self._buffer = torch.empty(size, dtype=torch.uint8, pin_memory=any(v.is_cuda for *_, v in shard))
        chunks, at = [], 0
        for kind, name, start, view in shard:
            self._buffer[at : at + view.nbytes].view(view.dtype).copy_(view, non_blocking=True)
            chunks += chunks_of(kind, name, start, view.numel(), view.dtype)
            at += view.nbytes
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._step = step
        self._own_part.clear()
        self._abandoned.clear()
        arguments = (step, chunks, shapes, trainer)
        self._thread = threading.Thread(target=self._write, args=arguments, name="checkpoint", daemon=True)
        self._thread.start()

    def __enter__(self):
        return self

    def __exit__(self, kind, *exception):
        """Where training fails, what this rank is writing may still become a checkpoint; but the other ranks must not wait for it."""
        if kind and self._thread:
            self._thread.join(JOIN_TIMEOUT_S)

    @property
    def failed(self):
        """Has this rank's thread met an error? The loop asks at every step, and all ranks then call `wait`."""
        return self._error is not None

    def wait(self):
        """Until the last save stands. A collective: raises SaveFailed on every rank if any rank could not write."""
        if not self._thread:
            return
        self._own_part.wait()
        if any(errors := self._everyones_errors()):
            self._abandoned.set()
        self._thread.join()
        errors = self._everyones_errors() if not any(errors) else errors  # publishing is rank 0's, and may fail too
        mine, self._thread, self._error = self._error, None, None
        if any(errors) and self.rank == 0:
            shutil.rmtree(self._part(self._step), ignore_errors=True)  # what fills the disk must not stay there
        if mine and not isinstance(mine, OSError):
            raise mine
        if any(errors):
            said = "; ".join(f"rank {rank}: {error}" for rank, error in enumerate(errors) if error)
            standing = complete_checkpoints(self.folder)
            last = f"the last complete one is {standing[-1]}" if standing else "there is none before it"
            raise SaveFailed(f"the checkpoint of step {self._step} could not be written ({said}); {last}")

    def _part(self, step):
        return self.folder / f".tmp-{step}-{self.run}"

    def _everyones_errors(self):
        mine = [str(self._error) if self._error else None]
        if self.world == 1:
            return mine
        errors = [None] * self.world
        dist.all_gather_object(errors, mine[0])
        return errors

    def _write(self, step, chunks, shapes, trainer):
        part, began = self._part(step), time.monotonic()
        try:
            part.mkdir(exist_ok=True)
            write_rank(part, self.rank, chunks, shapes, self._bytes_of(chunks))
            self._own_part.set()
            if self.rank == 0 and self._everyone_wrote(part):
                publish(part, step_folder(self.folder, step), step, self.world, trainer)
                if self.mirror:  # before an older one goes that it need not copy any more
                    self.mirror.push(step_folder(self.folder, step))
                self._rotate(step)
            self.seconds = max(self.seconds, time.monotonic() - began)
        except BaseException as error:
            self._error = error
        finally:
            self._own_part.set()

    def _bytes_of(self, chunks):
        at = 0
        for chunk in chunks:
            yield tensor_bytes(self._buffer[at : at + size_of(chunk)])
            at += size_of(chunk)

    def _everyone_wrote(self, part):
        """Are all ranks' files there? False when `wait` has heard that one of them never will be."""
        missing = {part / f"rank-{rank:05d}.json" for rank in range(self.world)}
        while missing := {file for file in missing if not file.exists()}:
            if self._abandoned.is_set():
                return False
            time.sleep(0.02)
        return True

    def _rotate(self, step):
        """Remove what is not to be kept now that `step` stands; the newest complete one never goes."""
        kept = complete_checkpoints(self.folder)
        # later ones are of a run that this one went back from: `auto` must not go on from them
        later = [c for c in kept if step_of(c) > step]
        earlier = [c for c in kept if step_of(c) < step]
        stay = {best_checkpoint(self.folder)} | (self.mirror.copying() if self.mirror else set())
        old = earlier[: max(0, len(earlier) + 1 - self.keep)] if self.keep else []
        for checkpoint in old:
            if self.keep_every and step_of(checkpoint) % self.keep_every == 0:
                stay.add(checkpoint)
        for checkpoint in [*later, *(c for c in old if c not in stay)]:
            try:
                remove_checkpoint(checkpoint)
            except OSError as problem:  # the new one stands all the same
                print(f"warning: {checkpoint} could not be removed: {problem}", flush=True)


def best_checkpoint(folder):
    """The complete checkpoint under `folder` with the lowest evaluation loss, or None where none has been evaluated."""
    losses = {}
    for checkpoint in complete_checkpoints(folder):
        evaluation = json.loads((checkpoint / "trainer.json").read_text()).get("eval_loss")
        if evaluation is not None:
            losses[checkpoint] = evaluation
    return min(losses, key=losses.get, default=None)


@torch.no_grad()
def load_checkpoint(reader, model, optimizer, with_optimizer=True):
    """Fill the weights of a prepared model; with_optimizer: both moments and Adam's step too, else they begin at zero.

    Raises InputError where the parameters do not agree, or the checkpoint has no moments, or some that cannot be. A collective.
    """
    if with_optimizer:
        refuse_rounded_weights(reader)
    jobs, names = [], set()
    for name, shape, start, state in local_slices(model, optimizer, for_read=True):
        names.add(name)
        if tuple(reader.shapes.get(name, ())) != shape:
            raise InputError(
                f"{reader.folder}: {name} is {reader.shapes.get(name, 'not there')}, the model has {list(shape)}"
            )
        if with_optimizer and ("exp_avg", name) not in reader.dtypes:
            raise InputError(f"{reader.folder}: no optimizer in it; --resume_without_optimizer begins a new one")
        kinds = state if with_optimizer else ["weight"] * ("weight" in state)
        jobs += [(kind, name, start, state[kind]) for kind in kinds]
    if surplus := set(reader.shapes) - names:
        raise InputError(f"{reader.folder}: holds {sorted(surplus)[0]}, which this run does not train")
    with ThreadPoolExecutor(8) as pool:
        for _ in pool.map(lambda job: reader.fill(*job), jobs):
            pass
    if with_optimizer:
        steps = reader.trainer.get("optimizer_steps", reader.trainer["step"])
        _refuse_lost_moments(reader, {name for kind, name, _, view in jobs if kind != "weight" and view.any()})
        set_optimizer_step(optimizer, steps)
    refresh(optimizer)


def _refuse_lost_moments(reader, moved):
    """On every rank; moved: the parameters whose moments this rank has read something of."""
    everyones = [moved]
    if dist.is_initialized():
        everyones = [None] * dist.get_world_size()
        dist.all_gather_object(everyones, moved)
    refuse_lost_moments(reader, set().union(*everyones))
