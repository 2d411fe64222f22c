"""The keys of a run on the training loop."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, Required

from pydantic import Field, with_config
from typing_extensions import TypedDict

from dilqur.common.constants import Count, Fraction, Positive
from dilqur.kernels.settings import KernelSettings
from dilqur.pipeline.inputs import ModelPath, ShardsPath
from dilqur.pipeline.settings_parser import setting
from dilqur.pipeline.stage import StageSettings
from dilqur.training.optimizer import Schedule


@with_config(extra="forbid")
class DatasetShare(TypedDict, total=False):
    path: Required[ShardsPath]
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    epochs: Annotated[float, Field(gt=0, allow_inf_nan=False)]


@with_config(extra="forbid")
class DatasetChange(TypedDict):
    step: Positive
    datasets: list[DatasetShare]


@dataclass(kw_only=True)
class TrainingSettings(KernelSettings, StageSettings):
    """The keys of every run on this loop. Of datasets and tokenizer the fingerprints decide on resume, not the way they are called; of
    dataset_changes those of steps that are not done yet."""

    encoder: ClassVar = False
    labelled_fraction: ClassVar = 1.0  # of the tokens that have a label
    model_name_or_path: ModelPath | None = setting("model folder, or the stage that made it", default=None)
    bf16: bool = setting("bfloat16 matmuls; weights and optimizer stay in `dtype`", default=False)
    dtype: Literal["float32", "bfloat16"] = setting(
        "of weights and optimizer; bfloat16: 8 bytes per parameter, stochastic rounding; ddp, fsdp2", default="float32"
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
    max_length: Positive = setting("tokens per sample", default=2048)
    packing: Literal["concat", "best_fit"] = setting(
        "concat cuts the text every max_length tokens; best_fit keeps documents whole", default="concat"
    )
    intra_document_masking: bool = setting("the documents of one sample do not see each other", default=False)
    global_batch_size: Positive = setting("sequences per step over all GPUs; accumulation is derived")
    per_device_train_batch_size: Positive = setting(
        "most sequences per GPU holds at once: a ceiling", default=8, on_resume="free"
    )
    dataloader_num_workers: Count = setting("processes that read ahead, for each GPU", default=0, on_resume="free")

    max_steps: Positive | None = setting("optimizer steps; or num_train_epochs", default=None, on_resume="may_change")
    num_train_epochs: Annotated[float, Field(gt=0)] | None = setting(
        "times the datasets are seen", default=None, on_resume="may_change", benchmark=None
    )
    learning_rate: Annotated[float, Field(gt=0)] = setting("peak of the schedule")
    lr_scheduler_type: Schedule = setting("after the warm-up", default="cosine")
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
    max_eval_samples: Positive | None = setting("samples per evaluation; none: all", default=None, on_resume="free")
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
