r"""A tiny Llama trained by plain accelerate or by transformers' Trainer, and saved with their own calls.

    python tests/programs/train_elsewhere.py plain runs/elsewhere/plain
    accelerate launch --config_file accelerate_configs/zero2.yaml --num_processes 2 \
        tests/programs/train_elsewhere.py accelerate runs/elsewhere/zero2
    accelerate launch --config_file accelerate_configs/fsdp2.yaml --num_processes 2 \
        tests/programs/train_elsewhere.py trainer runs/elsewhere/fsdp2

What a checkpoint has to give back lies beside it: whole.safetensors, {weight,exp_avg,exp_avg_sq}/NAME at the moment of saving,
gathered with the libraries' own functions, and after.json, the losses of the steps that came after. Of this project it knows
only what lets accelerate run FSDP and DeepSpeed on a CPU.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

BEFORE, AFTER, BATCH, LENGTH, VOCABULARY = 3, 3, 8, 24, 131  # 131: no number of processes divides it
LEARNING_RATE, BETAS, DECAY = 1e-2, (0.9, 0.98), 0.1


def new_model():
    """Tied, and the same every time."""
    set_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 88, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(
        vocab_size=VOCABULARY, num_key_value_heads=2, tie_word_embeddings=True, use_cache=False, **shape
    )
    return LlamaForCausalLM(config)


def new_optimizer(model):
    """AdamW; decay on matrices only, as the Trainer has it."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": DECAY},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS)


def all_ids():
    """int64 (samples, LENGTH): every second token follows from the one before it."""
    ids = torch.randint(3, VOCABULARY, ((BEFORE + AFTER) * BATCH, LENGTH), generator=torch.Generator().manual_seed(7))
    ids[:, 1::2] = (ids[:, 0::2] * 7) % (VOCABULARY - 3) + 3
    return ids


def whole(tensor):
    """A tensor or DTensor in one piece on the CPU."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().cpu().clone().contiguous()


def whole_state(model, optimizer):
    """{kind/NAME: tensor} of all parameters. A collective."""
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    state = {}
    if AcceleratorState().distributed_type == DistributedType.DEEPSPEED:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        zero = optimizer.optimizer
        if hasattr(
            zero, "_lazy_init_hp_params_optimizer_state"
        ):  # ZeRO-1, 2: linked before torch's AdamW had made a state
            zero._hp_optimizer_states_linked = False
            zero._lazy_init_hp_params_optimizer_state()
        for name, parameter in model.named_parameters():
            state[f"weight/{name}"] = whole(safe_get_full_fp32_param(parameter))
            for kind in ("exp_avg", "exp_avg_sq"):
                state[f"{kind}/{name}"] = whole(safe_get_full_optimizer_state(parameter, kind))
        return state
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    for name, parameter in model.named_parameters():
        state[f"weight/{name}"] = whole(parameter)
        for kind in ("exp_avg", "exp_avg_sq"):
            state[f"{kind}/{name}"] = whole(optimizer.state[parameter][kind])
    return state


def with_accelerate(folder):
    """A loop of one's own around accelerate, saved by `save_state`; under FSDP in both ways that it has."""
    from accelerate import Accelerator
    from safetensors.torch import save_file

    from dilqur.distributed import _allow_cpu
    from dilqur.quiet import quiet_libraries

    quiet_libraries()
    from accelerate.utils import InitProcessGroupKwargs

    accelerator = Accelerator(**_allow_cpu(InitProcessGroupKwargs()))
    if plugin := accelerator.state.deepspeed_plugin:
        each = BATCH // accelerator.num_processes
        plugin.deepspeed_config.update(
            train_micro_batch_size_per_gpu=each, zero_allow_untested_optimizer=True, gradient_clipping=0.0
        )
    model = new_model()
    model, optimizer = accelerator.prepare(model, new_optimizer(model))
    each, losses = BATCH // accelerator.num_processes, []
    for step in range(BEFORE + AFTER):
        first = step * BATCH + accelerator.process_index * each
        ids = all_ids()[first : first + each]
        loss = model(input_ids=ids, labels=ids).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach(), "mean").item())
        if step + 1 == BEFORE:
            accelerator.save_state(folder / "saved")
            if plugin := getattr(accelerator.state, "fsdp_plugin", None):
                plugin.set_state_dict_type("FULL_STATE_DICT")
                accelerator.save_state(folder / "saved-full")
            state = whole_state(accelerator.unwrap_model(model), optimizer)
            if accelerator.is_main_process:
                save_file(state, folder / "whole.safetensors")
    if accelerator.is_main_process:
        (folder / "after.json").write_text(json.dumps(losses[BEFORE:]))
        new_model().config.save_pretrained(folder / "model")
    accelerator.end_training()


def with_trainer(folder):
    """transformers' Trainer; folder/checkpoint-N is what it saves."""
    from accelerate.utils import InitProcessGroupKwargs

    from dilqur.distributed import _allow_cpu

    alone = _allow_cpu(InitProcessGroupKwargs()).get("cpu", False)
    from safetensors.torch import save_file
    from torch.utils.data import SequentialSampler
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class InOrder(Trainer):
        def _get_train_sampler(self, dataset=None):
            return SequentialSampler(self.train_dataset)

    class Beside(TrainerCallback):
        def on_save(self, arguments, state, control, model=None, optimizer=None, **_):
            if state.global_step == BEFORE:
                tensors = whole_state(trainer.accelerator.unwrap_model(model), optimizer)
                if state.is_world_process_zero:
                    save_file(tensors, folder / "whole.safetensors")

    import os

    each = BATCH // int(os.environ.get("WORLD_SIZE", 1))
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=BEFORE + AFTER,
        per_device_train_batch_size=each,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        weight_decay=DECAY,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        max_grad_norm=0,
        logging_steps=1,
        save_steps=BEFORE,
        report_to=[],
        use_cpu=alone,
        optim="adamw_torch",
    )
    ids = all_ids()
    samples = [{"input_ids": row, "labels": row} for row in ids]
    trainer = InOrder(model=new_model(), args=arguments, train_dataset=samples, callbacks=[Beside()])
    trainer.train()
    if trainer.is_world_process_zero():
        losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
        (folder / "after.json").write_text(json.dumps(losses[BEFORE:]))
        new_model().config.save_pretrained(folder / "model")


def main(how, folder):
    torch.set_num_threads(1)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    {"accelerate": with_accelerate, "trainer": with_trainer}[how](folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
