"""Which checkpoint a run goes on from, and whether it may: a checkpoint belongs to its recipe and its data."""

import json
from pathlib import Path

from dilqur.batches import same_past
from dilqur.errors import InputError


def checkpoint_to_resume(settings, complete):
    """The folder to go on from, or None to begin. complete: the complete checkpoints of this stage, oldest first.

    A folder given by name is where the run begins; started again by the same command, after a requeue, it goes on from what it
    has made since.
    """
    given = settings.resume_from_checkpoint
    if given == "none" or (given == "auto" and not complete):
        return None
    if given == "auto":
        return complete[-1]
    if complete and json.loads((complete[-1] / "trainer.json").read_text()).get("resumed_from") == given:
        return complete[-1]
    return Path(given)


def with_optimizer(settings, reader):
    """Does this run take over the moments? Not where it was told not to; but those that it made itself since."""
    made_by_it = reader.trainer.get("recipe", {}).get("resume_without_optimizer", False)
    return made_by_it or not settings.resume_without_optimizer


def fetch_from_mirror(settings, checkpoints):
    """On a new machine, where there are no checkpoints: bring the newest complete one from `mirror_to`. For rank 0, before the
    processes know each other: it may take longer than a collective waits. Raises InputError where the mirror cannot be read."""
    from dilqur.checkpoint_files import complete_checkpoints
    from dilqur.checkpoint_mirror import CheckpointMirror

    if settings.mirror_to and settings.resume_from_checkpoint == "auto" and not complete_checkpoints(checkpoints):
        mirror = CheckpointMirror(settings.mirror_to)
        if (newest := mirror.newest()) is not None:
            print(f"bringing the checkpoint of step {newest} from {settings.mirror_to}", flush=True)
            checkpoints.mkdir(parents=True, exist_ok=True)
            mirror.fetch(newest, checkpoints)


def open_checkpoint(folder, complete):
    """A CheckpointReader. Raises InputError naming the damaged file, and what to do to go on from the one before it."""
    from dilqur.checkpoint_files import CheckpointReader

    try:
        return CheckpointReader(folder)
    except InputError as problem:
        raise InputError(f"{problem}{_way_out(folder, complete)}") from None


def load(reader, model, optimizer, complete, with_optimizer=True):
    """`load_checkpoint`, whose InputError for damaged data also says what to do."""
    from dilqur.checkpoint import load_checkpoint

    try:
        load_checkpoint(reader, model, optimizer, with_optimizer)
    except InputError as problem:
        damaged = "damaged" in str(problem) or "no file holds" in str(problem)
        raise InputError(f"{problem}{_way_out(reader.folder, complete) if damaged else ''}") from None


def _way_out(folder, complete):
    older = [c for c in complete if c.name < Path(folder).name]
    aside = f"; move it away (mv {folder} {folder}.damaged) and the same command "
    return aside + (f"goes on from {older[-1].name}, the complete one before it" if older else "begins at step 0")


def refuse_other_run(settings, reader, identity):
    """Only keys in `may_change` may differ. Raises InputError with the first that does, or where other data was seen.

    A checkpoint of another program, brought in by scripts/convert_checkpoint.py, has no recipe and no data: the run gives both.
    """
    then, now = reader.trainer, identity
    if "imported" in then:
        return
    for key, value in now["recipe"].items():
        if key in then["recipe"] and then["recipe"][key] != value and key not in settings.may_change:
            raise InputError(
                f"{reader.folder}: made with {key} = {then['recipe'][key]!r}, now {value!r}: that is another run; "
                "choose another --output_dir, or put it back"
            )
    done = [[c for c in run["recipe"].get("dataset_changes") or [] if c["step"] < then["step"]] for run in (then, now)]
    if done[0] != done[1]:
        raise InputError(
            f"{reader.folder}: dataset_changes of steps before its {then['step']} are done and cannot change any more: "
            "put them back (later ones may change)"
        )
    data, was = now["data"], then["data"]
    same = same_past(was["fingerprint"], data["fingerprint"], then["position"])
    if was["start_position"] != data["start_position"] or not same:
        raise InputError(
            f"{reader.folder}: made on other data: datasets, weights or shards have changed: choose another --output_dir, or "
            "put them back"
        )
    if then["trainable"] != now["trainable"]:
        raise InputError(f"{reader.folder}: trained other parameters than this run would")
