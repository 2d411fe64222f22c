r"""Converts checkpoints: to a Hugging Face folder and back, and those of DeepSpeed, FSDP, accelerate and the Trainer to ours.

    python scripts/convert_checkpoint.py --checkpoint runs/quickstart/cpt-2-full/checkpoints --verify
    python scripts/convert_checkpoint.py --checkpoint runs/quickstart/cpt-2-full/checkpoints \
        --output_dir runs/try/hf --with_optimizer
    python scripts/convert_checkpoint.py --model_name_or_path runs/try/hf --output_dir runs/try/back/checkpoints

What is given decides: a checkpoint of this project becomes a Hugging Face folder; a Hugging Face folder (--model_name_or_path
alone) or another program's checkpoint (--checkpoint THEIRS --model_name_or_path BASE --trust_pickle) becomes OUTPUT_DIR/step-N,
from which cpt.py goes on, moments included. Other programs' are pickles: loading one runs what is in it, hence --trust_pickle.
An encoder's checkpoint or folder becomes a folder that transformers loads or, with --encoder_layout neobert, one with the names
of the published NeoBERT.
One process, no GPU, one tensor in memory at a time. docs/checkpoints-converting.md says what is read and how to go on.
"""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from dilqur.checkpoint.import_any import is_ours, read_foreign, reader_of
from dilqur.common.atomic import atomic_files
from dilqur.common.errors import InputError
from dilqur.common.startup import quiet_libraries
from dilqur.models.config import LAYOUTS, is_encoder
from dilqur.pipeline.inputs import Input, ModelPath
from dilqur.pipeline.manifest import file_identity
from dilqur.pipeline.program import program
from dilqur.pipeline.settings_parser import setting
from dilqur.pipeline.stage import StageSettings

CheckpointPath = Annotated[str, Input("file")]


@dataclass(kw_only=True)
class ConvertSettings(StageSettings):
    checkpoint: CheckpointPath | None = setting(
        "folder of a checkpoint, ours or another program's; of a folder of ours, the newest in it", default=None
    )
    model_name_or_path: ModelPath | None = setting(
        "alone: the folder to make a checkpoint of; with checkpoint: the model its run began with", default=None
    )
    dtype: Literal["bfloat16", "float32"] | None = setting(
        "of the weights of a Hugging Face folder; none: as they were trained", default=None
    )
    with_optimizer: bool = setting(
        "put moments and step into the Hugging Face folder, too, for the way back", default=False
    )
    step: Annotated[int, Field(ge=0)] | None = setting(
        "the step a new checkpoint counts as; none: as its optimizer says, else 0", default=None
    )
    trust_pickle: bool = setting(
        "load another program's pickles: they can run any code, so know where they are from", default=False
    )
    encoder_layout: Literal[LAYOUTS] | None = setting(
        "of an encoder: a folder transformers loads (eurobert), or one with the published names (neobert)", default=None
    )
    verify: bool = setting("read every byte of the checkpoint, write nothing", default=False)
    json: bool = setting("one JSON object on standard output", default=False, recorded=False)


# -- what can be seen in a second -------------------------------------------------------------------------------------


def direction(settings):
    """The function that does what is asked for. Raises InputError where it is unclear, or not allowed."""
    if settings.checkpoint and (complete := sorted(Path(settings.checkpoint).glob("step-*/COMPLETE"))):
        settings.checkpoint = str(complete[-1].parent)
    ours = settings.checkpoint and is_ours(settings.checkpoint)
    encoder = of_encoder(settings, ours)
    if settings.encoder_layout and not encoder:
        raise InputError(
            "encoder_layout: is for an encoder: a checkpoint of mlm.py, or a folder of a NeoBERT or EuroBERT"
        )
    if not settings.checkpoint and not settings.model_name_or_path:
        raise InputError("give checkpoint (one to convert or verify), or model_name_or_path (a folder to make one of)")
    if settings.verify:
        if not ours:
            raise InputError(
                f"verify: {settings.checkpoint} is no checkpoint of this project; others have no checksums to verify"
            )
        return verify
    if not settings.output_dir:
        raise InputError("--output_dir missing: the folder the result goes to; or give --verify")
    if encoder:
        if settings.with_optimizer:
            raise InputError("with_optimizer: an encoder's folder has other names than its checkpoint: leave it out")
        if not ours and not settings.encoder_layout:
            raise InputError(
                f"{settings.model_name_or_path}: mlm.py goes on from an encoder's folder itself; give --encoder_layout to change "
                "its names"
            )
        return to_encoder
    if ours:
        if settings.with_optimizer and settings.dtype:
            raise InputError(
                "dtype: leave it out with with_optimizer, or the way back would not find the weights as they were"
            )
        return to_hugging_face
    for key in ("dtype", "with_optimizer"):
        if getattr(settings, key):
            raise InputError(
                f"{key}: is for a Hugging Face folder that is written; here one of our checkpoints is: remove it"
            )
    if settings.overwrite_output_dir:
        raise InputError(
            "overwrite_output_dir: a checkpoint comes beside those in output_dir; remove a step-N there by hand"
        )
    if Path(settings.output_dir).name.startswith("step-"):
        raise InputError(
            f"output_dir: {settings.output_dir}: give the folder the checkpoints lie in; step-N is made in it"
        )
    if settings.checkpoint:
        reader_of(settings.checkpoint)
        if not settings.trust_pickle:
            raise InputError(
                f"{settings.checkpoint}: is made of pickles, and loading one runs any code that is in it: give --trust_pickle if "
                "you know who wrote it"
            )
        if not settings.model_name_or_path and not (Path(settings.checkpoint) / "config.json").exists():
            raise InputError(
                f"{settings.checkpoint}: no config.json in it: give --model_name_or_path, the model its run began with"
            )
    return from_elsewhere


def of_encoder(settings, ours):
    """Is it a checkpoint of mlm.py, or the folder of a model that mlm.py trains?"""
    if ours:
        try:
            trainer = json.loads((Path(settings.checkpoint) / "trainer.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False  # what is wrong with it is said when it is read
        return "mlm_probability" in (trainer.get("recipe") or {})
    return bool(settings.model_name_or_path and not settings.checkpoint and is_encoder(settings.model_name_or_path))


# -- the four things it does -----------------------------------------------------------------------------------------


def verify(settings, stage):
    """Returns (result, line)."""
    from dilqur.checkpoint.verify import describe, verify_checkpoint

    result = verify_checkpoint(settings.checkpoint)
    return result, describe(result)


def to_hugging_face(settings, stage):
    """Weights of the checkpoint over those of the model its run began with. Returns (result, line)."""
    import torch

    from dilqur.checkpoint.export_hf_folder import write_folder
    from dilqur.checkpoint.format import CheckpointReader
    from dilqur.models.config import load_config
    from dilqur.models.parameters import model_parameters

    reader = CheckpointReader(settings.checkpoint)
    if settings.with_optimizer and not all(("exp_avg", name) in reader.dtypes for name in reader.shapes):
        raise InputError(f"{reader.folder}: no optimizer in it: leave out --with_optimizer")
    recipe = reader.trainer.get("recipe") or {}
    base = (
        settings.model_name_or_path
        or recipe.get("model_name_or_path")
        or reader.trainer.get("imported", {}).get("model")
    )
    if base and not (Path(base) / "config.json").exists():
        raise InputError(f"{base}: the model the run began with is not there: give --model_name_or_path")
    if not base and not recipe.get("model_config"):
        raise InputError(f"{reader.folder}: does not say which model it began with: give --model_name_or_path")
    if base:
        config, tokenizer = load_config(base), base
    else:  # a run that began with random weights
        from transformers import LlamaConfig

        config, tokenizer = LlamaConfig(**recipe["model_config"]), recipe["tokenizer"]
    model = model_parameters(config, base or reader.folder)
    dtype = getattr(torch, settings.dtype) if settings.dtype else None
    stage.open()
    with atomic_files(stage.folder) as part:
        count = write_folder(part, reader, base, tokenizer, config, model, dtype, settings.with_optimizer)
    result = {
        "step": reader.trainer["step"],
        "tensors": count,
        "parameters": sum(map(math.prod, model.shapes.values())),
        "trained": sum(map(math.prod, reader.shapes.values())),
        "optimizer": settings.with_optimizer,
        "model_name_or_path": base,
    }
    marker = reader.folder / "COMPLETE"  # which vouches for the rest
    stage.finish(result, hashed={str(marker): file_identity(marker)})
    return result, (
        f"{stage.folder}: step {result['step']}, {result['parameters']:,} parameters, {result['trained']:,} of them from "
        f"the checkpoint{', with its optimizer' * settings.with_optimizer}"
    )


def to_encoder(settings, stage):
    """A checkpoint or folder of an encoder as a Hugging Face folder. Returns (result, line)."""
    import torch

    from dilqur.checkpoint.format import CheckpointReader
    from dilqur.models.modeling_neobert import NeoBERTLMHead
    from dilqur.models.neobert_folder import (
        neobert_config,
        new_config,
        read_encoder,
        refuse_other_shapes,
        write_encoder,
    )

    if settings.checkpoint:
        reader = CheckpointReader(settings.checkpoint)
        recipe, step = reader.trainer["recipe"], reader.trainer["step"]
        base = settings.model_name_or_path or recipe["model_name_or_path"]
        if base:
            tokenizer, config = base, neobert_config(base)
            config.max_length = recipe["max_position_embeddings"] or config.max_length
        else:
            tokenizer = recipe["tokenizer"]
            config = new_config(recipe["model_config"], tokenizer)
        with torch.device("meta"):
            refuse_other_shapes(reader.folder, reader.shapes, NeoBERTLMHead(config))
        weights = {name: reader.tensor("weight", name) for name in reader.shapes}
        marker = reader.folder / "COMPLETE"
    else:
        base = tokenizer = settings.model_name_or_path
        model, step, marker = read_encoder(base), None, None
        weights, config = model.state_dict(), model.config
    if settings.dtype:
        weights = {name: weight.to(getattr(torch, settings.dtype)) for name, weight in weights.items()}
    layout = settings.encoder_layout or "eurobert"
    stage.open()
    with atomic_files(stage.folder) as part:
        write_encoder(part, weights, config, tokenizer, layout)
    result = {"step": step, "parameters": sum(w.numel() for w in weights.values()), "layout": layout}
    stage.finish(result, hashed={str(marker): file_identity(marker)} if marker else None)
    of = f"step {step}, " if step is not None else ""
    return result, f"{stage.folder}: {of}{result['parameters']:,} parameters, as a {layout}"


def from_elsewhere(settings, stage):
    """A Hugging Face folder, or another program's checkpoint, as OUTPUT_DIR/step-N. Returns (result, line)."""
    from dilqur.checkpoint.import_hf_folder import read_folder
    from dilqur.checkpoint.import_state import refuse_other_base, trained_names, write_checkpoint
    from dilqur.models.config import load_config
    from dilqur.models.parameters import model_parameters

    source = Path(settings.checkpoint or settings.model_name_or_path)
    base = settings.model_name_or_path or settings.checkpoint
    model = model_parameters(load_config(base), base)
    state = (read_foreign if settings.checkpoint else read_folder)(source, model)
    names = trained_names(state, model, source, base)
    if settings.checkpoint:
        refuse_other_base(state, names, model, base, source)
    if settings.step is not None and state.trainer:
        raise InputError(f"step: {source} was a checkpoint of step {state.step}; leave it out")
    step = settings.step if settings.step is not None else state.step or 0
    imported = {"from": str(source), "format": state.format, "model": str(base), "hyperparameters": state.groups}
    trainer = state.trainer or {"imported": imported}
    if state.trained is not None:
        trainer = {**trainer, "optimizer_steps": state.optimizer_steps, "trainable": names}
    run = Path(settings.output_dir).resolve().parent
    if (run / ".lock").exists():  # of a run: it must not be going on meanwhile
        stage.folder = run
        stage.open()
    written = write_checkpoint(settings.output_dir, step, state, names, trainer)
    result = {
        "checkpoint": str(written),
        "step": step,
        "optimizer_steps": state.optimizer_steps,
        "parameters": sum(math.prod(model.shapes[name]) for name in names),
        "tensors": len(names),
        "format": state.format,
        "optimizer": state.trained is not None,
        "hyperparameters": state.groups,
    }
    moments = f"moments of {state.optimizer_steps} steps" if state.trained is not None else "no optimizer"
    line = f"{written}: step {step}, {result['parameters']:,} parameters, {moments}, from {state.format}"
    for group in state.groups:
        line += f"\n  its AdamW had {', '.join(f'{key} {value}' for key, value in group.items())}"
    if state.trained is None:
        line += "\n  go on with --resume_without_optimizer: AdamW begins anew"
    return result, line


@program(ConvertSettings, direction, needs_folder=False)
def main(settings, stage, convert):
    quiet_libraries()
    result, line = convert(settings, stage)
    print(line, file=sys.stderr if settings.json else sys.stdout)
    if settings.json:
        print(json.dumps(result, ensure_ascii=False))


if __name__ == "__main__":
    main()
