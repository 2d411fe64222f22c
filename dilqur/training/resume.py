"""Which checkpoint a run goes on from, and whether it may: a checkpoint belongs to its recipe and its data."""

import json
from pathlib import Path

from dilqur.common.errors import EveryRankError, InputError
from dilqur.data.batches import same_prefix
from dilqur.models.safetensors_io import fingerprint
from dilqur.pipeline.settings_parser import keys_that, to_dict


def checkpoint_to_resume(settings, complete):
    """The folder to go on from, or None to begin. complete: the complete checkpoints of this stage, oldest first.

    A folder given by name, or none, is where the run begins; started again by the same command, after a requeue, it goes on from
    what it has made since.
    """
    given = settings.resume_from_checkpoint
    newest = complete[-1] if complete else None
    if given == "auto":
        return newest
    if newest and json.loads((newest / "trainer.json").read_text()).get("resumed_from") == given:
        return newest
    return None if given == "none" else Path(given)


def fetch_from_mirror(settings, checkpoints):
    """On a new machine, or one that has only older checkpoints: bring the newest complete one from `mirror_to`, and the best where
    that becomes the model. For rank 0, before the processes know each other: it may take longer than a collective waits.
    Raises InputError where the mirror cannot be read and there is nothing here to go on from."""
    from dilqur.checkpoint.mirror import CheckpointMirror
    from dilqur.checkpoint.steps import complete_checkpoints, step_folder, step_of

    if not settings.mirror_to:
        return
    here = max(map(step_of, complete_checkpoints(checkpoints)), default=None)
    mirror = CheckpointMirror(settings.mirror_to)
    try:
        newest = mirror.newest()
    except InputError as problem:
        if here is None:
            raise
        print(f"warning: {problem}; going on from step {here}, which is here", flush=True)
        return
    if newest is not None and (here is None or newest > here):
        print(f"bringing the checkpoint of step {newest} from {settings.mirror_to}", flush=True)
        checkpoints.mkdir(parents=True, exist_ok=True)
        mirror.fetch(newest, checkpoints)
        mirror.take_over(checkpoints)
        best = mirror.best() if settings.load_best_model_at_end else None
        if best is not None and best != newest and not step_folder(checkpoints, best).exists():
            mirror.fetch(best, checkpoints)


def kernels_of(checkpoint):
    """{key: value} of the kernels that the run of this checkpoint chose; None where that is not known. What is wrong with a damaged one,
    `resume` says."""
    try:
        return json.loads((checkpoint / "trainer.json").read_text()).get("kernels") if checkpoint else None
    except (OSError, ValueError):
        return None


def run_identity(settings, samples, start, trainable, strategy, sizes, kernels):
    """What a checkpoint says of the run that made it, and by which `resume` knows whether it may be gone on from."""
    base = settings.model_name_or_path
    return {
        "recipe": to_dict(settings),
        "seed": settings.seed,
        "base": fingerprint(base) if base else None,
        "data": {"fingerprint": samples.fingerprint(), "start_position": start, "mixtures": samples.mixtures},
        "trainable": trainable,
        "strategy": strategy,
        "sizes": sizes,
        "kernels": kernels,
    }


def resume(settings, checkpoint, complete, identity, model, optimizer):
    """Load `checkpoint` into a prepared model and optimizer; returns its trainer.json, with `optimizer_steps` as they are now.

    Raises InputError where it may not be gone on from, and where it is damaged, with what to do. Nothing of it stays open: a
    network file system does not let a folder go of which a file is.
    """
    from dilqur.checkpoint.format import CheckpointReader
    from dilqur.checkpoint.writer import load_checkpoint

    try:
        reader = CheckpointReader(checkpoint)
        trainer = reader.trainer
        _refuse_other_run(settings, reader, identity)
        # told to go on without the moments, it does so once: those that it has made itself since are its own
        moments = not settings.resume_without_optimizer or trainer.get("recipe", {}).get("resume_without_optimizer")
        load_checkpoint(reader, model, optimizer, with_optimizer=bool(moments))
    except InputError as problem:
        damaged = any(words in str(problem) for words in ("damaged", "cut", "not a whole checkpoint", "no file holds"))
        if damaged and not isinstance(problem, EveryRankError):
            raise InputError(f"{problem}{_way_out(checkpoint, complete)}") from None
        raise
    return {**trainer, "optimizer_steps": trainer.get("optimizer_steps", trainer["step"]) if moments else 0}


def _way_out(folder, complete):
    older = [c for c in complete if c.name < Path(folder).name]
    aside = f"; move it away (mv {folder} {folder}.damaged) and the same command "
    return aside + (f"goes on from {older[-1].name}, the complete one before it" if older else "begins at step 0")


def _refuse_other_run(settings, reader, identity):
    """Only keys that may change on resume may differ. Raises InputError with the first that does, or where other data was seen.

    A checkpoint of another program, brought in by scripts/convert_checkpoint.py, has no recipe and no data: the run gives both.
    """
    then, now = reader.trainer, identity
    fixed = keys_that(type(settings), None)
    if "imported" in then:
        return
    for key, value in now["recipe"].items():
        if key == "model_name_or_path" and "base" in then:
            continue  # what it is counts, not where it lies
        if key in then["recipe"] and then["recipe"][key] != value and key in fixed:
            raise EveryRankError(
                f"{reader.folder}: made with {key} = {then['recipe'][key]!r}, now {value!r}: that is another run; "
                "choose another --output_dir, or put it back"
            )
    if then.get("base", now["base"]) != now["base"]:
        raise EveryRankError(
            f"{reader.folder}: began with another model than {settings.model_name_or_path}, with "
            f"{then['recipe']['model_name_or_path']}: choose another --output_dir, or put it back"
        )
    done = [[c for c in run["recipe"].get("dataset_changes") or [] if c["step"] < then["step"]] for run in (then, now)]
    if done[0] != done[1]:
        raise EveryRankError(
            f"{reader.folder}: dataset_changes of steps before its {then['step']} are done and cannot change any more: "
            "put them back (later ones may change)"
        )
    data, was = now["data"], then["data"]
    same = same_prefix(was["fingerprint"], data["fingerprint"], then["position"])
    if was["start_position"] != data["start_position"] or not same:
        raise EveryRankError(
            f"{reader.folder}: made on other data: datasets, weights or shards have changed: choose another --output_dir, or "
            "put them back"
        )
    if then["trainable"] != now["trainable"]:
        raise EveryRankError(f"{reader.folder}: trained other parameters than this run would")
