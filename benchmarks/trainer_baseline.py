"""The baseline of scripts/benchmark.py that shares no loop with us: Hugging Face's Trainer, with the model, data and batch of a recipe.

    python benchmarks/trainer_baseline.py --config RUN.yaml --output_dir DIR      (scripts/benchmark.py writes RUN.yaml and starts this)

What is ours in it: the samples, in their order, as a torch Dataset, and the learning rates, both so that its losses can be laid beside
ours; and two settings of precision, those of dilqur/training/distributed.py and scripts/cpt.py: FSDP2 reduces gradients in fp32 and does
not round the loss (by accelerate's default both are in bfloat16), and Liger adds up the head's gradient in fp32. Everything else is the
Trainer's and accelerate's: the data loader, autocast, Liger (`use_liger_kernel`), FSDP, accumulation, clip, fused AdamW, scheduler. It
writes metrics.jsonl with the time at which each step ended; on a GPU it waits for it only at the steps in SYNCHRONIZE_AT, "10 30", so that
it is timed as it runs by itself. LOG_LOSSES=1: the loss of every step, for which it waits each time."""

import json
import os
import sys
import time

from dilqur.common.constants import ROOT
from dilqur.common.errors import InputError
from dilqur.common.startup import quiet_libraries
from dilqur.pipeline.program import program
from dilqur.pipeline.strategy import planned_strategy

sys.path.insert(0, str(ROOT / "scripts"))
import cpt

OURS_ALONE = ("intra_document_masking", "unfrozen_parameters", "deterministic")


def check(settings):
    """InputError as cpt.py, and for what the Trainer does not do."""
    cpt.check(settings)
    if ours := [key for key in OURS_ALONE if getattr(settings, key, None)]:
        raise InputError(f"{ours[0]}: the Trainer knows nothing of it: leave it out of this variant")
    if settings.packing != "concat":
        raise InputError(
            f"packing: {settings.packing}: the Trainer's row reads concat alone: leave it out of this variant"
        )
    if settings.reduce_dtype != "float32" and planned_strategy() == "ddp":
        raise InputError(
            f"reduce_dtype: {settings.reduce_dtype}: under DDP the Trainer reduces in fp32: leave it out of this variant"
        )
    if not settings.model_name_or_path:
        raise InputError("model_name_or_path missing: the Trainer continues a model")


@program(cpt.CptSettings, check)
def main(settings, stage):
    quiet_libraries()
    import torch
    from accelerate.utils import InitProcessGroupKwargs
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments, training_args

    from dilqur.data.batches import split_batch
    from dilqur.kernels.settings import triton_runs
    from dilqur.training.checks import check_training
    from dilqur.training.distributed import allow_cpu, fsdp2_precision
    from dilqur.training.optimizer import learning_rate_at
    from dilqur.training.profiling import profiler

    stage.folder.mkdir(parents=True, exist_ok=True)
    samples, start, steps = check_training(settings)
    world = int(os.environ.get("WORLD_SIZE", 1))
    batch, accumulation = split_batch(settings.global_batch_size, settings.per_device_train_batch_size, world)
    on_gpu, main_process = torch.cuda.is_available(), os.environ.get("RANK", "0") == "0"
    synchronize_at = {int(step) for step in os.environ.get("SYNCHRONIZE_AT", "").split()}
    log_losses = os.environ.get("LOG_LOSSES") == "1"
    use_cpu = False
    if not on_gpu:
        use_cpu = bool(allow_cpu(InitProcessGroupKwargs()))  # false under FSDP, which it would turn off
        training_args.is_torch_bf16_gpu_available = lambda: True  # else bf16 wants a GPU, or use_cpu
    liger = settings.use_liger_kernel and triton_runs()
    if settings.use_liger_kernel and not liger:
        print("use_liger_kernel: no GPU here, going on without (its kernels are Triton's)", flush=True)

    class Samples(torch.utils.data.Dataset):
        def __len__(self):
            return steps * settings.global_batch_size

        def __getitem__(self, index):
            row = samples.batch([start + index])
            labels = torch.from_numpy(row["labels"][0])  # shifted already
            return {"input_ids": torch.from_numpy(row["input_ids"][0]), "labels": labels, "shift_labels": labels}

    class InOrder(Trainer):
        def _get_train_sampler(self, dataset=None):
            return SequentialSampler(dataset or self.train_dataset)

        def create_scheduler(self, num_training_steps, optimizer=None):
            def rate(step):
                how = (settings.lr_scheduler_type, 1.0, settings.warmup_steps, steps)
                return learning_rate_at(min(step, steps - 1), *how, settings.min_lr_ratio, settings.lr_decay_steps or 0)

            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, rate)
            return self.lr_scheduler

        def compute_loss(self, model, inputs, *arguments, **more):
            precision = {"accum_dtype": torch.float32} if liger else {}
            return super().compute_loss(model, {**inputs, **precision}, *arguments, **more)

    class Metrics(TrainerCallback):
        """A line a step, as of ours; the loss in it is known only after the step was logged."""

        def __init__(self):
            self.file = (stage.folder / "metrics.jsonl").open("w") if main_process else None
            self.profile, self.began = profiler(settings, stage.folder, main_process), time.perf_counter()

        def on_step_begin(self, *_, **more):
            self.began = time.perf_counter()

        def on_step_end(self, arguments, state, control, **more):
            if on_gpu and state.global_step in synchronize_at:
                torch.cuda.synchronize()
            seconds, now = time.perf_counter() - self.began, time.time()
            tokens = settings.global_batch_size * settings.max_length
            rates = {"tokens_per_second": tokens / seconds, "tokens_per_second_all": tokens / seconds}
            memory = {"peak_memory_gb": torch.cuda.max_memory_allocated() / 2**30} if on_gpu else {}
            self.line = {
                "step": state.global_step,
                "loss": None,
                "step_seconds": seconds,
                **rates,
                **memory,
                "time": now,
            }
            if not log_losses:
                self.write()
            self.profile.step()

        def on_log(self, arguments, state, control, logs=None, **more):
            if log_losses and "loss" in (logs or {}):
                self.line["loss"] = logs["loss"]
                self.write()

        def write(self):
            if self.file:
                self.file.write(json.dumps(self.line) + "\n")
                self.file.flush()

    arguments = TrainingArguments(
        output_dir=str(stage.folder),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        max_steps=steps,
        learning_rate=settings.learning_rate,
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        adam_epsilon=settings.adam_epsilon,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm or 0.0,
        optim="adamw_torch_fused" if on_gpu else "adamw_torch",
        bf16=settings.bf16,
        use_cpu=use_cpu,
        gradient_checkpointing=settings.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        torch_compile=bool(settings.torch_compile),
        use_liger_kernel=liger,
        dataloader_num_workers=settings.dataloader_num_workers,
        remove_unused_columns=False,
        logging_steps=1 if log_losses else 10,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=settings.seed,
    )
    model = AutoModelForCausalLM.from_pretrained(
        settings.model_name_or_path, dtype=torch.float32, attn_implementation=settings.attn_implementation or "sdpa"
    )
    model.config.use_cache = False
    trainer = InOrder(model=model, args=arguments, train_dataset=Samples(), callbacks=[Metrics()])
    if (plugin := getattr(trainer.accelerator.state, "fsdp_plugin", None)) is not None:
        plugin.mixed_precision_policy = fsdp2_precision(settings.bf16, settings.reduce_dtype)
    trainer.train()
    return None


if __name__ == "__main__":
    main()
