r"""Continued pre-training of a causal language model on token shards: embeddings first or all weights, as the recipe says.

    python scripts/cpt.py --config recipes/quickstart/cpt-1-embeddings.yaml --check
    accelerate launch --config_file accelerate_configs/fsdp2.yaml --num_processes 2 \
        scripts/cpt.py --config recipes/quickstart/cpt-2-full.yaml
    sbatch slurm/cpt_p5.sbatch

The strategy (DDP, FSDP2, ZeRO) is the accelerate config's; the recipe gives the same run under each. Killed at any point,
the same command goes on from the newest complete checkpoint. At the end OUTPUT_DIR/model is a Hugging Face folder.
"""

import contextlib
import functools
from dataclasses import dataclass

from dilqur.common.startup import quiet_libraries
from dilqur.estimate.cost_model import UnknownArchitecture, training_flops_per_token
from dilqur.kernels.settings import triton_runs
from dilqur.models.config import read_config
from dilqur.pipeline.inputs import TokenizerPath
from dilqur.pipeline.program import program
from dilqur.pipeline.settings_parser import setting
from dilqur.pipeline.strategy import ZERO, planned_strategy
from dilqur.training.checks import check_model, check_one_model, check_training
from dilqur.training.settings import TrainingSettings


@dataclass(kw_only=True)
class CptSettings(TrainingSettings):
    model_config: dict | None = setting("keys of a LlamaConfig, to begin with random weights instead", default=None)
    tokenizer: TokenizerPath | None = setting(
        "with model_config: the tokenizer that goes into model/", default=None, on_resume="may_change"
    )


def check(settings):
    """InputError for whatever can be seen without torch."""
    samples, _, _ = check_training(settings)
    check_one_model(settings, "a model")
    check_model(settings, samples, settings.model_config or read_config(settings.model_name_or_path))


def load_model(settings):
    """(the model in `dtype`, where its weights lie or None): from its folder, where the strategy shards without its weights, which each
    rank then reads its own of; or new with weights drawn from `seed`."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, set_seed

    from dilqur.training.initial_weights import StoredWeights, empty_model

    dtype, folder, strategy = getattr(torch, settings.dtype), settings.model_name_or_path, planned_strategy()
    if not folder:
        set_seed(settings.seed)
        return LlamaForCausalLM(LlamaConfig(**settings.model_config)).to(dtype), None
    if strategy in ("fsdp2", "zero3"):
        model, weights = empty_model(folder, dtype)
        if model is not None:
            return model, weights
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model, StoredWeights.of(model, folder) if strategy in ZERO else None  # for its master weights


def causal_loss(model, batch, tokens, **more):
    """Sum of the next-token losses of `batch` / `tokens`. The labels are shifted already: label i is the token after i.

    With intra_document_masking the batch also says where documents begin; without use_cache=False some kinds of attention
    would not look at that.
    """
    return model(**batch, shift_labels=batch["labels"], num_items_in_batch=tokens, use_cache=False, **more).loss


def make_task(settings):
    """What the loop trains: model, loss, how the result is written, FLOPs."""
    import torch

    from dilqur.checkpoint.hf_folder import write_folder
    from dilqur.models.parameters import parameters_of
    from dilqur.training.run import Task

    model, weights = load_model(settings)
    parameters, config = parameters_of(model), model.config
    base, dtype = settings.model_name_or_path, next(model.parameters()).dtype

    def write_model(reader, folder):
        write_folder(folder, reader, base, settings.tokenizer or base, config, parameters, dtype)

    loss, flops, only = causal_loss, None, settings.unfrozen_parameters
    if settings.use_liger_kernel and triton_runs():
        # skip_logits: else Liger makes them all in an evaluation; accum_dtype: else it sums the head's gradient in bfloat16
        loss = functools.partial(causal_loss, skip_logits=True, accum_dtype=torch.float32)
    with contextlib.suppress(UnknownArchitecture):
        if not only or all("embed" in name or "lm_head" in name for name in only):
            flops = training_flops_per_token(config.to_dict(), settings.max_length, embeddings_only=bool(only))
    return Task(model, loss, write_model, flops, weights=weights)


@program(CptSettings, check, kind="cpt")
def main(settings, stage):
    quiet_libraries()
    from dilqur.training.loop import train

    train(settings, stage, make_task(settings))


if __name__ == "__main__":
    main()
