"""What a run on the training loop can be told, and all that can be known to go wrong with it before torch is loaded."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Required

from pydantic import Field
from typing_extensions import TypedDict

from dilqur.batches import TokenSamples, split_batch
from dilqur.errors import InputError
from dilqur.optimizer import SCHEDULES
from dilqur.stage import ModelPath, ShardsPath, StageSettings, read_manifest
from dilqur.tokenizer import TextTokenizer

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Ratio = Annotated[float, Field(ge=0, le=1)]


class DatasetShare(TypedDict, total=False):
    __pydantic_config__ = {"extra": "forbid"}
    path: Required[ShardsPath]
    weight: Annotated[float, Field(gt=0)]


@dataclass(kw_only=True)
class TrainingSettings(StageSettings):
    """What every run on this loop can be told. `harmless`: keys that do not change the result; `may_change`: what a resumed
    run may have otherwise than the first one."""

    harmless: ClassVar = (
        "per_device_train_batch_size", "save_steps", "save_total_limit", "eval_steps", "eval_samples", "logging_steps",
        "report_to", "dataloader_num_workers", "resume_from_checkpoint", "stop_at_step", "max_minutes",
    )  # fmt: skip
    may_change: ClassVar = (*harmless, "max_steps", "num_train_epochs")

    model_name_or_path: ModelPath | None = field(
        default=None, metadata={"help": "model folder, or the stage that made it"}
    )
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"] = field(
        default="sdpa", metadata={"help": "as in transformers"}
    )
    use_liger_kernel: bool = field(default=False, metadata={"help": "Liger's fused loss and layers; on a GPU only"})
    bf16: bool = field(default=False, metadata={"help": "bfloat16 products; weights and optimizer stay fp32"})
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "recompute activations: less memory, a third slower"}
    )

    datasets: list[DatasetShare] = field(metadata={"help": "{path: token shards, weight: share of tokens}, …"})
    eval_datasets: list[DatasetShare] | None = field(
        default=None, metadata={"help": "token shards held out, for eval_loss"}
    )
    continue_data: bool = field(
        default=False, metadata={"help": "go on in the data where the stage of the model stopped"}
    )
    max_length: Positive = field(default=2048, metadata={"help": "tokens a sample"})
    global_batch_size: Positive = field(metadata={"help": "sequences a step over all GPUs; accumulation is derived"})
    per_device_train_batch_size: Positive = field(
        default=8, metadata={"help": "most sequences a GPU holds at once: a ceiling"}
    )
    dataloader_num_workers: Count = field(default=0, metadata={"help": "processes that read ahead, for each GPU"})

    max_steps: Positive | None = field(default=None, metadata={"help": "optimizer steps; or num_train_epochs"})
    num_train_epochs: Annotated[float, Field(gt=0)] | None = field(
        default=None, metadata={"help": "times the datasets are seen"}
    )
    learning_rate: Annotated[float, Field(gt=0)] = field(metadata={"help": "peak of the schedule"})
    lr_scheduler_type: Literal[SCHEDULES] = field(default="cosine", metadata={"help": "after the warm-up"})
    min_lr_ratio: Ratio = field(default=0.0, metadata={"help": "the schedule's floor, as a share of learning_rate"})
    warmup_steps: Count = field(default=0, metadata={"help": "steps of linear warm-up"})
    adam_beta1: Ratio = field(default=0.9, metadata={"help": "AdamW"})
    adam_beta2: Ratio = field(default=0.95, metadata={"help": "AdamW"})
    adam_epsilon: Annotated[float, Field(gt=0)] = field(default=1e-8, metadata={"help": "AdamW"})
    weight_decay: Annotated[float, Field(ge=0)] = field(
        default=0.1, metadata={"help": "on matrices; vectors have none"}
    )
    max_grad_norm: Annotated[float, Field(gt=0)] | None = field(default=1.0, metadata={"help": "clip; none: do not"})
    unfrozen_parameters: list[str] | None = field(
        default=None, metadata={"help": "train only names like these, e.g. *embed_tokens*"}
    )

    save_steps: Positive = field(default=500, metadata={"help": "steps between checkpoints"})
    save_total_limit: Positive | None = field(default=2, metadata={"help": "complete checkpoints kept; none: all"})
    eval_steps: Positive | None = field(default=None, metadata={"help": "steps between evaluations; none: at the end"})
    eval_samples: Positive | None = field(default=None, metadata={"help": "samples an evaluation; none: all"})
    logging_steps: Positive = field(
        default=1, metadata={"help": "steps between the lines of a log (metrics.jsonl has all)"}
    )
    report_to: list[Literal["tensorboard", "wandb"]] = field(
        default_factory=list, metadata={"help": "accelerate's trackers"}
    )
    seed: Count = field(default=42, metadata={"help": "decides the order of the samples, and a new model's weights"})

    resume_from_checkpoint: str = field(
        default="auto", metadata={"help": "auto (the newest complete one), none, or a folder"}
    )
    stop_at_step: Positive | None = field(
        default=None, metadata={"help": "save and stop after this step; start again to go on"}
    )
    max_minutes: Annotated[float, Field(gt=0)] | None = field(
        default=None, metadata={"help": "save and stop after so long"}
    )


def check_training(settings):
    """All that can be known to go wrong before torch is loaded. Returns (samples, start position, steps).

    Raises InputError for keys that do not fit together, a tokenizer that is not the shards', ids the model has no row for,
    a global batch that does not divide, and a continuation in other data.
    """
    if bool(settings.max_steps) == bool(settings.num_train_epochs):
        raise InputError("give max_steps or num_train_epochs, one of them")
    samples = TokenSamples(settings.datasets, settings.max_length, settings.seed)
    start = _start_position(settings, samples)
    steps = settings.max_steps or max(
        1, round(settings.num_train_epochs * samples.samples_per_epoch / settings.global_batch_size)
    )
    if settings.warmup_steps >= steps:
        raise InputError(
            f"warmup_steps {settings.warmup_steps} leaves none of the {steps} steps: lower it, or train longer"
        )
    split_batch(settings.global_batch_size, settings.per_device_train_batch_size, int(os.environ.get("WORLD_SIZE", 1)))
    for dataset in settings.eval_datasets or []:
        held_out = TokenSamples([dataset], settings.max_length, settings.seed)
        if held_out.tokenizer_hash != samples.tokenizer_hash:
            raise InputError(
                f"eval_datasets: {dataset['path']} was packed with another tokenizer than {settings.datasets[0]['path']}"
            )
    return samples, start, steps


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


def _start_position(settings, samples):
    if not settings.continue_data:
        return 0
    folder = Path(settings.model_name_or_path or ".").parent
    data = read_manifest(folder)["result"].get("data")
    if not data:
        raise InputError(f"continue_data: {folder} is no training stage: give false, to begin with the first sample")
    if data["fingerprint"] != samples.fingerprint():
        raise InputError(
            f"continue_data: {folder} was trained on other shards, weights, max_length or seed: make them the same, "
            "or give false, to begin a new order"
        )
    return data["end_position"]
