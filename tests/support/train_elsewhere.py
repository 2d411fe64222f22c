r"""Trains a model with plain accelerate or with transformers' Trainer, and saves it with their own calls.

    python tests/support/train_elsewhere.py plain MODEL IDS.npy runs/elsewhere/plain
    accelerate launch --config_file accelerate_configs/zero2.yaml --num_processes 2 \
        tests/support/train_elsewhere.py accelerate MODEL IDS.npy runs/elsewhere/zero2
    accelerate launch --config_file accelerate_configs/fsdp2.yaml --num_processes 2 \
        tests/support/train_elsewhere.py trainer MODEL IDS.npy runs/elsewhere/fsdp2

IDS.npy: int64 (samples, tokens + 1), BATCH a step. What a checkpoint has to give back lies beside it: whole.safetensors,
{weight,exp_avg,exp_avg_sq}/NAME at the moment of saving, gathered with the libraries' own functions; after.json, the losses of
the steps that came after. Of this project it knows only what lets accelerate run FSDP and DeepSpeed on a CPU.
"""

import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import DistributedType, InitProcessGroupKwargs
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from dilqur.training.distributed import allow_cpu

BEFORE, AFTER, BATCH = 3, 3, 8  # steps until it is saved, steps that follow, samples per step
LEARNING_RATE, BETAS, DECAY = 1e-2, (0.9, 0.98), 0.1


def new_model(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def new_optimizer(model):
    """AdamW; decay on matrices only, as the Trainer has it."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    vectors = [len(getattr(p, "ds_shape", p.shape)) == 1 for p in parameters]  # ZeRO-3 has emptied p itself
    groups = [
        {
            "params": [p for p, is_vector in zip(parameters, vectors, strict=True) if not is_vector],
            "weight_decay": DECAY,
        },
        {"params": [p for p, is_vector in zip(parameters, vectors, strict=True) if is_vector], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS)


def batch(ids, step, rank=0, world=1):
    """What `model` takes: this rank's part of the samples of `step`. ids: int64 (samples, tokens + 1)."""
    each = BATCH // world
    rows = torch.from_numpy(ids[step * BATCH + rank * each :][:each])
    inputs, labels = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
    return {"input_ids": inputs, "labels": labels, "shift_labels": labels}


def whole_state(model, optimizer):
    """{kind/NAME: tensor} of all parameters. A collective."""
    state = {}
    for name, parameter in model.named_parameters():
        state[f"weight/{name}"] = parameter
        if PartialState().distributed_type == DistributedType.DEEPSPEED:
            from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

            state[f"weight/{name}"] = safe_get_full_fp32_param(parameter)
            state |= {
                f"{kind}/{name}": safe_get_full_optimizer_state(parameter, kind) for kind in ("exp_avg", "exp_avg_sq")
            }
        else:
            state |= {f"{kind}/{name}": optimizer.state[parameter][kind] for kind in ("exp_avg", "exp_avg_sq")}
    return {key: (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone() for key, t in state.items()}


def write_beside(folder, accelerator, model, optimizer):
    while not isinstance(optimizer, torch.optim.Optimizer) or hasattr(optimizer, "optimizer"):
        if hasattr(optimizer, "_hp_optimizer_states_linked"):  # ZeRO-1, 2: linked before torch's AdamW had made a state
            optimizer._hp_optimizer_states_linked = False
            optimizer._lazy_init_hp_params_optimizer_state()
        optimizer = optimizer.optimizer
    state = whole_state(accelerator.unwrap_model(model), optimizer)
    if accelerator.is_main_process:
        save_file(state, folder / "whole.safetensors")


def with_accelerate(model_folder, ids, folder):
    """A loop of one's own, saved by `save_state` (saved/) and, under DeepSpeed, by the engine (engine/)."""
    process_group = InitProcessGroupKwargs()
    accelerator = Accelerator(kwargs_handlers=[process_group], **allow_cpu(process_group))
    rank, world = accelerator.process_index, accelerator.num_processes
    if plugin := accelerator.state.deepspeed_plugin:
        plugin.deepspeed_config.update(
            train_micro_batch_size_per_gpu=BATCH // world, zero_allow_untested_optimizer=True, gradient_clipping=0.0
        )
    model = new_model(model_folder)
    model, optimizer = accelerator.prepare(model, new_optimizer(model))
    losses = []
    for step in range(BEFORE + AFTER):
        loss = model(**batch(ids, step, rank, world)).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach(), "mean").item())
        if step + 1 == BEFORE:
            accelerator.save_state(folder / "saved")
            if plugin:
                model.save_checkpoint(folder / "engine")  # as the Trainer does
            write_beside(folder, accelerator, model, optimizer)
    if accelerator.is_main_process:
        (folder / "after.json").write_text(json.dumps(losses[BEFORE:]))
    accelerator.end_training()


def with_trainer(model_folder, ids, folder):
    """The Trainer's own checkpoint-N/; under FSDP also its state in one piece (full/), by accelerate's `save_state`."""
    alone = allow_cpu(InitProcessGroupKwargs()).get("cpu", False)
    from torch.utils.data import SequentialSampler
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class InOrder(Trainer):
        def _get_train_sampler(self, dataset=None):
            return SequentialSampler(self.train_dataset)

    class Beside(TrainerCallback):
        def on_save(self, arguments, state, control, model=None, optimizer=None, **_):
            if state.global_step != BEFORE:
                return
            if plugin := getattr(trainer.accelerator.state, "fsdp_plugin", None):
                plugin.set_state_dict_type("FULL_STATE_DICT")
                trainer.accelerator.save_state(folder / "full")
                plugin.set_state_dict_type("SHARDED_STATE_DICT")
                plugin.state_dict_config.rank0_only = False  # left behind by the other
            write_beside(folder, trainer.accelerator, model, optimizer)

    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=BEFORE + AFTER,
        per_device_train_batch_size=BATCH // int(os.environ.get("WORLD_SIZE", 1)),
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        weight_decay=DECAY,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        max_grad_norm=0,
        optim="adamw_torch",
        logging_steps=1,
        save_steps=BEFORE,
        report_to=[],
        use_cpu=alone,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    whole = {key: torch.cat([batch(ids, step)[key] for step in range(BEFORE + AFTER)]) for key in batch(ids, 0)}
    samples = [{key: rows[i] for key, rows in whole.items()} for i in range((BEFORE + AFTER) * BATCH)]
    trainer = InOrder(model=new_model(model_folder), args=arguments, train_dataset=samples, callbacks=[Beside()])
    trainer.train()
    if trainer.is_world_process_zero():
        losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
        (folder / "after.json").write_text(json.dumps(losses[BEFORE:]))


def main(how, model, ids, folder):
    torch.set_num_threads(1)
    ids, folder = np.load(ids), Path(folder)
    for each in ("accelerate", "trainer") if how == "plain" else (how,):
        into = folder / each if how == "plain" else folder
        into.mkdir(parents=True, exist_ok=True)
        {"accelerate": with_accelerate, "trainer": with_trainer}[each](model, ids, into)


if __name__ == "__main__":
    main(*sys.argv[1:])
