"""Everything that can be known to go wrong with a training run before torch is loaded."""

import os
from pathlib import Path

from dilqur.checkpoint.mirror_store import check_address
from dilqur.common.errors import InputError
from dilqur.data.batches import split_batch
from dilqur.kernels.settings import check_kernels
from dilqur.models.config import check_length
from dilqur.models.safetensors_io import stored_tensors
from dilqur.pipeline.strategy import planned_strategy, refuse_what_it_cannot
from dilqur.tokenizer.text_tokenizer import TextTokenizer
from dilqur.training.stream import held_out_samples, samples_of_stage


def check_training(settings, folder=None, copies=None):
    """All that can be known to go wrong before torch is loaded. Returns (samples, start position, steps).

    folder: the stage's, where packing: best_fit has its plan; it is written where it is missing. Without one, as in --check,
    its samples are counted as concat's. copies: what `copy_to_node` returns. Raises InputError for keys that do not fit
    together, shards that are not whole, a tokenizer that is not the shards', ids the model has no row for, a global batch
    that does not divide, and a continuation in other data.
    """
    if not settings.datasets or not all(change["datasets"] for change in settings.dataset_changes or []):
        raise InputError("datasets: an empty list: name at least one folder of token shards")
    if bool(settings.max_steps) == bool(settings.num_train_epochs):
        raise InputError("give max_steps or num_train_epochs, one of them")
    refuse_what_it_cannot(settings, planned_strategy())
    check_kernels(settings, planned_strategy())
    if settings.mirror_to:
        check_address(settings.mirror_to)
        if folder and os.path.realpath(settings.mirror_to) == os.path.realpath(Path(folder) / "checkpoints"):
            raise InputError("mirror_to: the run's own checkpoints are no copy: give another folder")
    decays = settings.lr_scheduler_type == "warmup_stable_decay"
    if decays != bool(settings.lr_decay_steps):
        raise InputError("lr_decay_steps: give it with lr_scheduler_type: warmup_stable_decay, and only with that")
    samples, start = samples_of_stage(settings, folder, copies)
    steps = settings.max_steps or max(
        1, round(settings.num_train_epochs * samples.samples_per_epoch(start) / settings.global_batch_size)
    )
    if settings.warmup_steps >= steps:
        raise InputError(
            f"warmup_steps {settings.warmup_steps} leaves none of the {steps} steps: lower it, or train longer"
        )
    if decays and settings.warmup_steps + settings.lr_decay_steps > steps:
        raise InputError(
            f"warmup_steps {settings.warmup_steps} and lr_decay_steps {settings.lr_decay_steps} are more than the {steps} steps"
        )
    if settings.load_best_model_at_end and not (settings.eval_datasets and settings.eval_steps):
        raise InputError("load_best_model_at_end: which one is best is not known without eval_datasets and eval_steps")
    if settings.load_best_model_at_end and settings.save_steps % settings.eval_steps:
        raise InputError(
            f"load_best_model_at_end: save_steps {settings.save_steps} is no multiple of eval_steps "
            f"{settings.eval_steps}: what is saved would not be evaluated"
        )
    if late := [change["step"] for change in settings.dataset_changes or [] if change["step"] >= steps]:
        raise InputError(f"dataset_changes: step {late[0]} is never reached, there are {steps} steps: leave it out")
    split_batch(settings.global_batch_size, settings.per_device_train_batch_size, int(os.environ.get("WORLD_SIZE", 1)))
    held_out = [held_out_samples(settings, d) for d in settings.eval_datasets or []]
    for dataset in held_out:
        if dataset.tokenizer_hash != samples.tokenizer_hash:
            raise InputError(
                f"eval_datasets: {dataset.paths[0]} was packed with another tokenizer than {settings.datasets[0]['path']}"
            )
    if os.environ.get("RANK", "0") == "0":  # thousands of files, and every process sees the same ones
        for shards in (s for part in (samples, *held_out) for s in part.shards):
            shards.check_files()
    return samples, start, steps


def check_one_model(settings, what):
    """Raise InputError unless there is a model to continue, or the config and tokenizer of a new one. what: "a model", "an encoder"."""
    if bool(settings.model_name_or_path) == bool(settings.model_config):
        raise InputError(f"give model_name_or_path ({what} to continue), or model_config and tokenizer (a new one)")
    if settings.model_config and not settings.tokenizer:
        raise InputError("tokenizer missing: model_config needs one")
    if settings.model_config and settings.unfrozen_parameters:
        raise InputError("unfrozen_parameters: the rest of a new model would stay random: leave it out")
    if settings.model_name_or_path:
        stored_tensors(settings.model_name_or_path)  # all there, and no pickles


def check_model(settings, samples, config, longer=""):
    """Raise InputError where model and shards do not belong together. config: the model's, a dict. longer: how it gets more positions."""
    path = settings.tokenizer or settings.model_name_or_path
    if TextTokenizer(path).hash != samples.tokenizer_hash:
        raise InputError(
            f"datasets: {settings.datasets[0]['path']} was packed with another tokenizer than the one in "
            f"{path} (packed with {samples.shards[0].manifest['tokenizer']}); pack again with the model's"
        )
    if samples.vocab_size > config["vocab_size"]:
        raise InputError(
            f"datasets: token ids go up to {samples.vocab_size - 1}, the model has rows for {config['vocab_size']}: "
            "transplant the tokenizer first (scripts/transplant_tokenizer.py), or give a new model a larger vocab_size"
        )
    check_length(config, settings.max_length, settings.model_name_or_path or "model_config", longer)
    pad, eos = config.get("pad_token_id"), config.get("eos_token_id")
    if pad is not None and pad in (eos if isinstance(eos, list) else [eos]):
        raise InputError(
            f"{settings.model_name_or_path}: pad_token_id is eos_token_id ({pad}): a model would never learn to stop"
        )
