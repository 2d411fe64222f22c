r"""Supervised fine-tuning of a chat assistant: LoRA with TRL's SFTTrainer, loss on what the assistant says and its <|eot_id|>.

    python scripts/sft.py --config recipes/quickstart/sft.yaml --check
    python scripts/sft.py --model_name_or_path runs/quickstart/cpt-2-full \
        --input recipes/quickstart/corpus/az_qa.jsonl --max_length 512 --output_dir runs/try/sft
    sbatch slurm/sft_1gpu.sbatch

`input` is jsonl with {"messages": [{"role": "user", "content": …}, {"role": "assistant", "content": …}]}. Token ids and
labels are made here (dilqur/tokenizer/llama3.py): a message that spells a control token stays text. At the end OUTPUT_DIR/adapter
is the LoRA adapter and OUTPUT_DIR/model the fp32 model with it merged in. A killed run starts again from the beginning.
"""

import json
import os
import sys
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from dilqur.assistant.conversations import conversations
from dilqur.common.atomic import atomic_folder
from dilqur.common.constants import Positive
from dilqur.common.errors import InputError
from dilqur.common.startup import quiet_libraries
from dilqur.data.batches import split_batch
from dilqur.estimate.lora import ONE_GPU
from dilqur.models.config import check_length, read_config
from dilqur.pipeline.inputs import Documents, ModelPath
from dilqur.pipeline.program import program
from dilqur.pipeline.settings_parser import setting
from dilqur.pipeline.stage import StageSettings
from dilqur.pipeline.strategy import planned_strategy
from dilqur.tokenizer.llama3 import CHAT_TEMPLATE, EOS, EOT, PAD
from dilqur.tokenizer.text_tokenizer import TextTokenizer


@dataclass(kw_only=True)
class SftSettings(StageSettings):
    model_name_or_path: ModelPath = setting("model folder, or the stage that made it")
    input: list[Documents] = setting("conversations: .jsonl, plain, .gz or .zst")
    on_error: Literal["stop", "skip"] = setting("at a bad record: stop, or skip and count it", default="stop")
    validation_fraction: Annotated[float, Field(ge=0, lt=1)] = setting("share held out for eval_loss", default=0.0)
    max_length: Positive = setting("longest conversation in tokens; longer ones are left out and counted", default=1024)
    bf16: bool = setting("base weights and products in bfloat16; the adapter stays fp32", default=False)
    global_batch_size: Positive = setting("conversations per step over all GPUs", default=16)
    per_device_train_batch_size: Positive = setting("most conversations per GPU holds at once: a ceiling", default=4)
    num_train_epochs: Annotated[float, Field(gt=0)] = setting("times the conversations are seen", default=3.0)
    learning_rate: Annotated[float, Field(gt=0)] = setting("peak of the schedule", default=1e-4)
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = setting("after the warm-up", default="cosine")
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = setting("share of the steps for warm-up", default=0.03)
    weight_decay: Annotated[float, Field(ge=0)] = setting("AdamW", default=0.0)
    max_grad_norm: Annotated[float, Field(gt=0)] = setting("clip", default=1.0)
    lora_r: Positive = setting("rank", default=64)
    lora_alpha: Positive = setting("scale: alpha / r", default=28)
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = setting("on the adapter's input", default=0.05)
    lora_target_modules: list[str] = setting(
        "layers that get an adapter",
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    )
    gradient_checkpointing: bool = setting("recompute activations: less memory, slower", default=False)
    report_to: list[Literal["tensorboard", "wandb"]] = setting("trackers", default_factory=list)
    seed: Annotated[int, Field(ge=0)] = setting("decides the order, the dropout and the adapter's start", default=42)


# -- training ---------------------------------------------------------------------------------------------------------


def training_arguments(settings, folder, batch, accumulation):
    """The SFTConfig. No checkpoints (Trainer's hold pickles, and the whole takes minutes); nothing is tokenised by TRL."""
    import torch
    from trl import SFTConfig

    return SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        per_device_eval_batch_size=batch,
        num_train_epochs=settings.num_train_epochs,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.lr_scheduler_type,
        warmup_steps=settings.warmup_ratio,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        bf16=settings.bf16,
        use_cpu=not torch.cuda.is_available(),
        seed=settings.seed,
        gradient_checkpointing=settings.gradient_checkpointing,
        logging_steps=1,
        save_strategy="no",
        report_to=settings.report_to,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        eos_token=EOT,
        pad_token=PAD,
        remove_unused_columns=False,
        ddp_backend=None if torch.cuda.is_available() or "WORLD_SIZE" not in os.environ else "gloo",
        disable_tqdm=not sys.stderr.isatty(),
    )


def merge(settings, adapter, folder):
    """The fp32 base with the adapter merged in, written as a Hugging Face folder that ends its turns at <|eot_id|>."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = AutoModelForCausalLM.from_pretrained(settings.model_name_or_path, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()
    tokenizer = AutoTokenizer.from_pretrained(settings.model_name_or_path)
    end = [tokenizer.convert_tokens_to_ids(EOT), tokenizer.convert_tokens_to_ids(EOS)]
    tokenizer.eos_token, tokenizer.pad_token, tokenizer.chat_template = EOT, PAD, CHAT_TEMPLATE
    model.config.eos_token_id, model.config.pad_token_id = end, tokenizer.pad_token_id
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = end, tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def check(settings):
    """The model's TextTokenizer, and (per-device batch, accumulation steps). Raises InputError."""
    tokenizer = TextTokenizer(settings.model_name_or_path)
    for token in (EOT, PAD):
        tokenizer.control_id(token)
    check_length(read_config(settings.model_name_or_path), settings.max_length, settings.model_name_or_path)
    if planned_strategy() not in ("single", "ddp"):
        raise InputError(ONE_GPU)
    world = int(os.environ.get("WORLD_SIZE", 1))
    return tokenizer, split_batch(settings.global_batch_size, settings.per_device_train_batch_size, world)


@program(SftSettings, check, kind="sft")
def main(settings, stage, checked):
    tokenizer, (batch, accumulation) = checked
    quiet_libraries()
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
    from trl import SFTTrainer

    from dilqur.kernels.apply import attend_without_cudnn

    attend_without_cudnn()
    main_process = os.environ.get("RANK", "0") == "0"
    if main_process:
        stage.open()
    rows, counts = conversations(settings, tokenizer)
    set_seed(settings.seed)
    model = AutoModelForCausalLM.from_pretrained(
        settings.model_name_or_path, dtype=torch.bfloat16 if settings.bf16 else torch.float32
    )
    lora = LoraConfig(
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=settings.lora_target_modules,
        task_type="CAUSAL_LM",
    )
    trainer = SFTTrainer(
        model=model,
        args=training_arguments(settings, stage.folder, batch, accumulation),
        peft_config=lora,
        processing_class=AutoTokenizer.from_pretrained(settings.model_name_or_path),
        train_dataset=Dataset.from_list(rows["train"]),
        eval_dataset=Dataset.from_list(rows["validation"]) if rows["validation"] else None,
    )
    trainer.train()
    if rows["validation"]:
        trainer.evaluate()
    if trainer.accelerator.is_main_process:
        history = trainer.state.log_history
        with atomic_folder(stage.folder / "adapter") as folder:
            trainer.model.save_pretrained(folder)
        with atomic_folder(stage.folder / "model") as folder:
            merge(settings, stage.folder / "adapter", folder)
        with (stage.folder / "metrics.jsonl").open("w") as file:
            file.writelines(json.dumps(record) + "\n" for record in history)
        losses = [record["loss"] for record in history if "loss" in record]
        result = {
            "steps": trainer.state.global_step,
            "loss_first": losses[0],
            "loss": losses[-1],
            **counts,
            "conversations": {split: len(found) for split, found in rows.items()},
            "eval_loss": next((r["eval_loss"] for r in reversed(history) if "eval_loss" in r), None),
            "trainable": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        }
        stage.finish(result)
        print(
            f"{stage.name}: {result['steps']} steps, loss {losses[0]:.4f} → {losses[-1]:.4f}, "
            f"{len(rows['train'])} conversations; {stage.folder}/model"
        )
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
