"""The samples of a run: the stream of its training data, which goes on in that of the stage before, and its held-out sets."""

import os
from pathlib import Path

from dilqur.common.errors import InputError
from dilqur.data.batches import TokenSamples, same_prefix
from dilqur.data.local_copy import local_copy
from dilqur.pipeline.manifest import read_manifest


def held_out_samples(settings, dataset):
    """TokenSamples of one of `eval_datasets`."""
    return TokenSamples(
        [dataset],
        settings.max_length,
        settings.seed,
        document_boundaries=settings.intra_document_masking,
        masking=settings.masking(),
    )


def copy_to_node(settings):
    """Copy the training shards to `local_dir`, where that is set; of a node's processes the first does, the others wait.
    Returns {real path: the copy}."""
    mixtures = [settings.datasets, *(change["datasets"] for change in settings.dataset_changes or [])]
    paths = {os.path.realpath(d["path"]): str(d["path"]) for mixture in mixtures for d in mixture}
    return {real: local_copy(path, settings.local_dir) for real, path in sorted(paths.items()) if settings.local_dir}


def samples_of_stage(settings, folder, copies):
    """(TokenSamples of the whole stream, the position where this stage begins in it)."""
    start, mixtures, before = 0, [(0, settings.datasets)], None
    if settings.continue_data:
        if not settings.model_name_or_path:
            raise InputError("continue_data: a new model has nothing behind it to go on from: leave it out")
        stage_before = Path(settings.model_name_or_path).parent
        before = read_manifest(stage_before)["result"].get("data")
        if not before:
            raise InputError(
                f"continue_data: {stage_before} is no training stage: give false, to begin with the first sample"
            )
        start = before["end_position"]
        mixtures = [(m["position"], m["datasets"]) for m in before["mixtures"] if m["position"] < start]
        if _shares(mixtures[-1][1]) != _shares(settings.datasets):  # else its last mixture goes on
            mixtures.append((start, settings.datasets))
    last = 0
    for change in settings.dataset_changes or []:
        if change["step"] <= last:
            raise InputError(
                f"dataset_changes: step {change['step']} comes after step {last}: put them in order of steps"
            )
        last = change["step"]
        mixtures.append((start + last * settings.global_batch_size, change["datasets"]))
    (_, first), *changes = mixtures
    plans = Path(folder) / "packing" if folder else None
    samples = TokenSamples(
        first,
        settings.max_length,
        settings.seed,
        changes,
        settings.packing,
        plans,
        document_boundaries=settings.intra_document_masking,
        copies=copies,
        masking=settings.masking(),
    )
    comparable = folder or settings.packing == "concat"  # without its plan best_fit's shares are not known exactly
    if before and comparable and not same_prefix(before["fingerprint"], samples.fingerprint(), start):
        raise InputError(
            f"continue_data: {stage_before} was trained on other shards, max_length, packing or seed: make them the same, "
            "or give false, to begin a new order"
        )
    return samples, start


def _shares(datasets):
    """What a mixture is, however its folders are called and in whatever order."""
    return {os.path.realpath(d["path"]): (d.get("weight"), d.get("epochs")) for d in datasets}
