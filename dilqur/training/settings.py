"""What a run on the training loop can be told, and all that can be known to go wrong with it before torch is loaded."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Required

from pydantic import Field
from typing_extensions import TypedDict

from dilqur.checkpoint.mirror import check_address
from dilqur.common.constants import Count, Fraction, Positive
from dilqur.common.errors import InputError
from dilqur.data.batches import TokenSamples, same_past, split_batch
from dilqur.data.local_copy import local_copy
from dilqur.estimate.strategy import planned_strategy, refuse_what_it_cannot
from dilqur.kernels.choose import KernelSettings, check_kernels
from dilqur.pipeline.inputs import ModelPath, ShardsPath
from dilqur.pipeline.manifest import read_manifest
from dilqur.pipeline.settings_parser import setting
from dilqur.pipeline.stage import StageSettings
from dilqur.tokenizer.text_tokenizer import TextTokenizer
from dilqur.training.optimizer import SCHEDULES


class DatasetShare(TypedDict, total=False):
    __pydantic_config__ = {"extra": "forbid"}
    path: Required[ShardsPath]
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    epochs: Annotated[float, Field(gt=0, allow_inf_nan=False)]


class DatasetChange(TypedDict):
    __pydantic_config__ = {"extra": "forbid"}
    step: Positive
    datasets: list[DatasetShare]


@dataclass(kw_only=True)
class TrainingSettings(KernelSettings, StageSettings):
    """The keys of every run on this loop. Of datasets and tokenizer the fingerprints decide on resume, not the way they are called; of
    dataset_changes those of steps that are not done yet."""

    encoder: ClassVar = False
    labelled_fraction: ClassVar = 1.0  # of the tokens that have a label
    model_name_or_path: ModelPath | None = setting("model folder, or the stage that made it", default=None)
    bf16: bool = setting("bfloat16 products; weights and optimizer stay in `dtype`", default=False)
    dtype: Literal["float32", "bfloat16"] = setting(
        "of weights and optimizer; bfloat16: 8 bytes a parameter, stochastic rounding; ddp, fsdp2", default="float32"
    )
    reduce_dtype: Literal["float32", "bfloat16"] = setting(
        "of the gradients on the network", default="float32", on_resume="may_change"
    )
    deterministic: bool = setting("the same bits on the same GPUs; slower", default=False, on_resume="may_change")

    datasets: list[DatasetShare] = setting(
        "{path: token shards, weight: share of tokens}, …; or epochs instead of weight; or neither: by size",
        on_resume="may_change",
    )
    dataset_changes: list[DatasetChange] | None = setting(
        "{step: after so many steps, datasets: the mixture from there on}, …",
        default=None,
        on_resume="may_change",
        benchmark=None,
    )
    eval_datasets: list[DatasetShare] | None = setting(
        "token shards held out, for eval_loss", default=None, on_resume="may_change", benchmark=None
    )
    continue_data: bool = setting("go on in the data where the stage of the model stopped", default=False)
    local_dir: str | None = setting(
        "folder on the node's own disk; the shards are copied to it first, once a node", default=None, on_resume="free"
    )
    max_length: Positive = setting("tokens a sample", default=2048)
    packing: Literal["concat", "best_fit"] = setting(
        "concat cuts the text every max_length tokens; best_fit keeps documents whole", default="concat"
    )
    intra_document_masking: bool = setting("the documents of one sample do not see each other", default=False)
    global_batch_size: Positive = setting("sequences a step over all GPUs; accumulation is derived")
    per_device_train_batch_size: Positive = setting(
        "most sequences a GPU holds at once: a ceiling", default=8, on_resume="free"
    )
    dataloader_num_workers: Count = setting("processes that read ahead, for each GPU", default=0, on_resume="free")

    max_steps: Positive | None = setting("optimizer steps; or num_train_epochs", default=None, on_resume="may_change")
    num_train_epochs: Annotated[float, Field(gt=0)] | None = setting(
        "times the datasets are seen", default=None, on_resume="may_change", benchmark=None
    )
    learning_rate: Annotated[float, Field(gt=0)] = setting("peak of the schedule")
    lr_scheduler_type: Literal[SCHEDULES] = setting("after the warm-up", default="cosine")
    min_lr_ratio: Fraction = setting("the schedule's floor, as a share of learning_rate", default=0.0)
    lr_decay_steps: Positive | None = setting("of warmup_stable_decay: the last so many steps fall", default=None)
    warmup_steps: Count = setting("steps of linear warm-up", default=0)
    adam_beta1: Fraction = setting("AdamW", default=0.9)
    adam_beta2: Fraction = setting("AdamW", default=0.95)
    adam_epsilon: Annotated[float, Field(gt=0)] = setting("AdamW", default=1e-8)
    weight_decay: Annotated[float, Field(ge=0)] = setting("on matrices; vectors have none", default=0.1)
    max_grad_norm: Annotated[float, Field(gt=0)] | None = setting("clip; none: do not", default=1.0)
    unfrozen_parameters: list[str] | None = setting("train only names like these, e.g. *embed_tokens*", default=None)

    save_steps: Positive = setting("steps between checkpoints", default=500, on_resume="free", benchmark=10**9)
    save_minutes: Annotated[float, Field(gt=0)] | None = setting(
        "and after so long without one", default=None, on_resume="free", benchmark=None
    )
    save_total_limit: Positive | None = setting("complete checkpoints kept; none: all", default=2, on_resume="free")
    save_keep_every: Positive | None = setting(
        "those of multiples of so many steps are kept for good", default=None, on_resume="free", benchmark=None
    )
    on_save_failure: Literal["stop", "continue"] = setting(
        "when a disk is full: stop, or go on without and try again", default="stop", on_resume="free"
    )
    mirror_to: str | None = setting(
        "copy complete checkpoints there, a folder or an fsspec address like s3://…",
        default=None,
        on_resume="free",
        benchmark=None,
    )
    eval_steps: Positive | None = setting(
        "steps between evaluations; none: at the end", default=None, on_resume="free", benchmark=None
    )
    max_eval_samples: Positive | None = setting("samples an evaluation; none: all", default=None, on_resume="free")
    load_best_model_at_end: bool = setting(
        "model/ from the checkpoint with the lowest eval_loss", default=False, on_resume="may_change", benchmark=False
    )
    max_skipped_steps: Positive = setting(
        "stop after so many steps in a row whose loss or gradients were not finite", default=10, on_resume="may_change"
    )
    logging_steps: Positive = setting(
        "steps between the lines of a log (metrics.jsonl has all)", default=1, on_resume="free", benchmark=1
    )
    report_to: list[Literal["tensorboard", "wandb"]] = setting(
        "accelerate's trackers", default_factory=list, on_resume="free", benchmark=[]
    )
    seed: Count = setting("decides the order of the samples, and a new model's weights", default=42)

    resume_from_checkpoint: str = setting(
        "auto (the newest complete one), none, or a folder", default="auto", on_resume="free", benchmark="none"
    )
    resume_without_optimizer: bool = setting(
        "take only the weights of the checkpoint; the moments begin at zero", default=False, on_resume="may_change"
    )
    stop_at_step: Positive | None = setting(
        "save and stop after this step; start again to go on", default=None, on_resume="free", benchmark=None
    )
    max_minutes: Annotated[float, Field(gt=0)] | None = setting(
        "save and stop after so long", default=None, on_resume="free", benchmark=None
    )
    hang_minutes: Annotated[float, Field(gt=0)] | None = setting(
        "end a run in which nothing happens for so long, saying where it stands; none: never",
        default=60,
        on_resume="free",
    )
    profile: bool = setting(
        "trace a few early steps with torch's profiler", default=False, on_resume="free", benchmark=False
    )

    def masking(self):
        """The dilqur.data.mlm_masking.Masking of the samples, or None: the labels are the next tokens."""
        return None


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
    samples, start = _samples(settings, folder, copies)
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


def check_new_model(settings):
    """Can a model begin with random weights under these settings? Raises InputError."""
    if not settings.tokenizer:
        raise InputError("tokenizer missing: model_config needs one")
    if settings.unfrozen_parameters:
        raise InputError("unfrozen_parameters: the rest of a new model would stay random: leave it out")


def check_model(settings, samples, config, tokenizer_path):
    """Do model and shards belong together? config: the model's, as a dict. Raises InputError."""
    tokenizer = TextTokenizer(tokenizer_path)
    if tokenizer.hash != samples.tokenizer_hash:
        raise InputError(
            f"datasets: {settings.datasets[0]['path']} was packed with another tokenizer than the one in "
            f"{tokenizer_path} (packed with {samples.shards[0].manifest['tokenizer']}); pack again with the model's"
        )
    if samples.vocab_size > config["vocab_size"]:
        raise InputError(
            f"datasets: token ids go up to {samples.vocab_size - 1}, the model has rows for {config['vocab_size']}: "
            "transplant the tokenizer first (scripts/transplant_tokenizer.py)"
        )
    if settings.max_length > config.get("max_position_embeddings", settings.max_length):
        raise InputError(
            f"max_length {settings.max_length} is more than the model's {config['max_position_embeddings']} positions"
        )
    pad, eos = config.get("pad_token_id"), config.get("eos_token_id")
    if pad is not None and pad in (eos if isinstance(eos, list) else [eos]):
        raise InputError(
            f"{settings.model_name_or_path}: pad_token_id is eos_token_id ({pad}): a model would never learn to stop"
        )


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


def _samples(settings, folder, copies):
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
    if before and comparable and not same_past(before["fingerprint"], samples.fingerprint(), start):
        raise InputError(
            f"continue_data: {stage_before} was trained on other shards, max_length, packing or seed: make them the same, "
            "or give false, to begin a new order"
        )
    return samples, start


def _shares(datasets):
    """What a mixture is, however its folders are called and in whatever order."""
    return {os.path.realpath(d["path"]): (d.get("weight"), d.get("epochs")) for d in datasets}
