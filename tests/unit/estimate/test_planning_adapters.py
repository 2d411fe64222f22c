"""What the planner says of an adapter, against the SFTTrainer and the peft model that scripts/sft.py makes, on a CPU."""

import importlib.util
from types import SimpleNamespace

import pytest
from conftest import ROOT
from test_planning import LLAMA as TINY
from test_planning import kept_bytes

from dilqur.estimate.cost_model import UnknownArchitecture
from dilqur.estimate.hardware import GPUS
from dilqur.estimate.job import Job
from dilqur.estimate.lora import ONE_GPU, adapter_activations
from dilqur.estimate.memory import state_of
from dilqur.estimate.set_up import set_up
from dilqur.estimate.strategy import names, strategy_of
from dilqur.models.published_configs import PUBLISHED

LLAMA = {**TINY, "num_hidden_layers": 16}
ROWS, LENGTH, SHORT = 2, 64, 44
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def settings(**keys):
    run = {
        "lora_r": 8,
        "lora_alpha": 28,
        "lora_dropout": 0.05,
        "lora_target_modules": ALL,
        "gradient_checkpointing": False,
    }
    run |= {"bf16": False, "max_length": LENGTH, "global_batch_size": ROWS, "per_device_train_batch_size": ROWS}
    run |= {"num_train_epochs": 1, "learning_rate": 1e-3, "lr_scheduler_type": "constant", "warmup_ratio": 0.0}
    return SimpleNamespace(**{**run, "weight_decay": 0.0, "max_grad_norm": 1.0, "seed": 0, "report_to": [], **keys})


@pytest.fixture
def trained(tmp_path):
    """trained(settings, tokens of each conversation) → (the trainer after its one step, bytes that its loss kept, bytes of gradients)."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTTrainer

    spec = importlib.util.spec_from_file_location("sft", ROOT / "scripts" / "sft.py")
    sft = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sft)
    tokens = {"<|eot_id|>": 0, "<|finetune_right_pad_id|>": 1, "word": 2}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(tokens, "word")), eos_token=sft.EOT, pad_token=sft.PAD
    )
    measured = {}

    class Gradients(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **_):
            measured["gradients"] = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)

    class Watched(SFTTrainer):
        def compute_loss(self, model, inputs, **keys):
            loss, measured["kept"] = kept_bytes(model, lambda: super(Watched, self).compute_loss(model, inputs, **keys))
            return loss

    def run(s, lengths):
        torch.manual_seed(0)
        trainer = Watched(
            model=LlamaForCausalLM(LlamaConfig(**LLAMA)).to(torch.bfloat16 if s.bf16 else torch.float32),
            args=sft.training_arguments(s, tmp_path, ROWS, 1),
            peft_config=LoraConfig(
                r=s.lora_r, lora_alpha=s.lora_alpha, lora_dropout=s.lora_dropout, target_modules=s.lora_target_modules,
                task_type="CAUSAL_LM",
            ),
            processing_class=tokenizer,
            train_dataset=Dataset.from_list([{"input_ids": [3] * n, "labels": [3] * n} for n in lengths]),
            callbacks=[Gradients()],
        )  # fmt: skip
        trainer.train()
        return trainer, measured["kept"], measured["gradients"]

    return run


@pytest.mark.parametrize("recomputed", [False, True], ids=["plain", "recomputed"])
@pytest.mark.parametrize(
    ("modules", "dropout", "lengths"),
    [
        (ALL, 0.05, (LENGTH, SHORT)),
        (ALL, 0.0, (LENGTH, LENGTH)),
        (["q_proj", "v_proj"], 0.05, (LENGTH, LENGTH)),
        (["o_proj", "gate_proj", "down_proj"], 0.0, (LENGTH, SHORT)),
    ],
    ids=["all, padded", "all, no dropout", "q and v", "o, gate and down, no dropout, padded"],
)
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_activations_are_those_that_torch_keeps(trained, bf16, modules, dropout, lengths, recomputed):
    """bf16 is autocast over a bfloat16 base: sft.py knows no third. A CPU's dropout keeps fp32 numbers. With the 16 layers of Llama 3.2
    1B, as in the first one nothing is kept below the first adapter, which needs no gradient; the planner counts it."""
    run = settings(bf16=bf16, lora_target_modules=modules, lora_dropout=dropout, gradient_checkpointing=recomputed)
    _, measured, _ = trained(run, lengths)
    job = Job.of_adapter(run, LLAMA)
    padded_to = LENGTH if SHORT in lengths else 0
    planned = adapter_activations(LLAMA, job.product, job.lora, padded_to, fused_dropout=False)
    predicted = planned.kept(job.recomputed)
    assert measured / (ROWS * LENGTH) == pytest.approx(predicted, rel=0.05)


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("modules", [ALL, ["q_proj", "down_proj"]], ids=["all", "q and down"])
def test_parameters_and_bytes_of_state_are_those_of_the_trainer(trained, tmp_path, bf16, modules):
    """And the adapter's file is its fp32 weights."""
    run = settings(bf16=bf16, lora_target_modules=modules)
    trainer, _, gradients = trained(run, (LENGTH, LENGTH))
    job, model = Job.of_adapter(run, LLAMA), trainer.accelerator.unwrap_model(trainer.model)
    theirs = {n.removeprefix("base_model.model."): p for n, p in model.named_parameters()}
    learning = {n.replace(".default", ""): p.numel() for n, p in theirs.items() if p.requires_grad}
    assert learning == {name: size for name, size in job.sizes.items() if "lora" in name}
    assert (job.trained, job.total) == (sum(learning.values()), sum(p.numel() for p in theirs.values()))
    moments = sum(state[key].nbytes for state in trainer.optimizer.state.values() for key in ("exp_avg", "exp_avg_sq"))
    held = {"weights": sum(p.nbytes for p in theirs.values()), "gradients": gradients, "moments": moments}
    assert state_of(job, strategy_of("ddp", 1, 1)) == held
    trainer.model.save_pretrained(tmp_path / "adapter")
    found = set_up(job, GPUS["A10G"], strategy_of("ddp", 1, 1))
    on_disk = (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    assert on_disk == pytest.approx(found.checkpoint_bytes, rel=0.05)


@pytest.mark.parametrize("recomputed", [False, True], ids=["plain", "recomputed"])
def test_operations_are_those_that_torch_counts(trained, recomputed):
    """In the matrix products of a step, the loss's second pass through the head and its sums in place among them. It does not know a CPU's
    attention."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    run = settings(gradient_checkpointing=recomputed)
    in_place = {torch.ops.aten.addmm_: lambda total, a, b, **_: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        trained(run, (LENGTH, LENGTH))
    attention = (6 + 2 * recomputed) * LLAMA["num_hidden_layers"] * LLAMA["hidden_size"] * LENGTH
    predicted = Job.of_adapter(run, LLAMA).computed_flops_per_token() - attention
    assert counter.get_total_flops() / (ROWS * LENGTH) == pytest.approx(predicted, rel=0.05)


def test_only_whole_weights_and_a_llama_s_projections_are_planned():
    job = Job.of_adapter(settings(), PUBLISHED["llama-3.2-1b"])
    for name in names():
        found = set_up(job.but(global_batch=16), GPUS["H200"], strategy_of(name, 1, 8))
        assert found.misfit == (None if name == "ddp" else ONE_GPU)
    with pytest.raises(UnknownArchitecture, match="lora_target_modules: an adapter of lm_head is not known"):
        Job.of_adapter(settings(lora_target_modules=["q_proj", "lm_head"]), LLAMA).activations()
    with pytest.raises(UnknownArchitecture, match="adapters of a neobert are not known"):
        Job.of_adapter(settings(), {**LLAMA, "model_type": "neobert"}).activations()
