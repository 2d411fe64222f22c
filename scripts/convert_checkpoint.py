r"""Converts checkpoints: ours to a Hugging Face folder and back, and those of DeepSpeed, FSDP, accelerate and the Trainer to ours.

    python scripts/convert_checkpoint.py --checkpoint runs/quickstart/cpt-2-full/checkpoints --verify
    python scripts/convert_checkpoint.py --checkpoint runs/quickstart/cpt-2-full/checkpoints \
        --output_dir runs/try/hf --with_optimizer
    python scripts/convert_checkpoint.py --model_name_or_path runs/try/hf --output_dir runs/try/back/checkpoints

The flags decide: a checkpoint of this project becomes a Hugging Face folder; a Hugging Face folder (--model_name_or_path
alone) or another program's checkpoint (--checkpoint THEIRS --model_name_or_path BASE --trust_pickle) becomes OUTPUT_DIR/step-N,
from which cpt.py resumes, moments included. Other programs write pickles: loading one runs its code, hence --trust_pickle.
An encoder's checkpoint or folder becomes a folder that transformers loads or, with --encoder_layout neobert, one with the
names of the published NeoBERT. One process, no GPU, one tensor in memory at a time: docs/checkpoints-converting.md.
"""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from dilqur.checkpoint.import_checkpoint import describe_import, import_checkpoint, is_mlm, is_ours, refuse_unread
from dilqur.checkpoint.steps import complete_checkpoints
from dilqur.common.atomic import atomic_files
from dilqur.common.errors import InputError
from dilqur.common.startup import quiet_libraries
from dilqur.models.config import LAYOUTS, is_encoder, read_config
from dilqur.pipeline.inputs import Input, ModelPath
from dilqur.pipeline.manifest import file_identity
from dilqur.pipeline.program import program
from dilqur.pipeline.settings_parser import setting
from dilqur.pipeline.stage import StageSettings


@dataclass(kw_only=True)
class ConvertSettings(StageSettings):
    checkpoint: Annotated[str, Input("file")] | None = setting(
        "folder of a checkpoint, ours or another program's; or of several of ours: the newest", default=None
    )
    model_name_or_path: ModelPath | None = setting(
        "alone: the folder to make a checkpoint of; with checkpoint: the model its run began with", default=None
    )
    dtype: Literal["bfloat16", "float32"] | None = setting("of the folder's weights; none: as trained", default=None)
    with_optimizer: bool = setting("put moments and step into the folder, too, for the way back", default=False)
    step: Annotated[int, Field(ge=0)] | None = setting("of a new checkpoint; none: its optimizer's, or 0", default=None)
    trust_pickle: bool = setting("load another program's pickles, which can run any code", default=False)
    encoder_layout: Literal[LAYOUTS] | None = setting(
        "of an encoder: a folder transformers loads (eurobert), or one with the published names (neobert)", default=None
    )
    verify: bool = setting("read every byte of the checkpoint, write nothing", default=False)
    json: bool = setting("one JSON object on standard output", default=False, recorded=False)


def choose(settings):
    """The conversion that is asked for, one of those below. Raises InputError where that is unclear, or not allowed."""
    if settings.checkpoint and (complete := complete_checkpoints(settings.checkpoint)):
        settings.checkpoint = str(complete[-1])
    checkpoint, model, output = settings.checkpoint, settings.model_name_or_path, settings.output_dir
    ours = bool(checkpoint) and is_ours(checkpoint)
    encoder = is_mlm(checkpoint) if ours else bool(model and not checkpoint) and is_encoder(read_config(model))
    if not checkpoint and not model:
        raise InputError("give checkpoint (one to convert or verify), or model_name_or_path (a folder to make one of)")
    if settings.encoder_layout and not encoder:
        raise InputError("encoder_layout: is for a checkpoint of mlm.py, or the folder of a NeoBERT or EuroBERT")
    if settings.verify:
        if not ours:
            raise InputError(f"verify: {checkpoint} is no checkpoint of this project; others have no checksums")
        return verify
    if not output:
        raise InputError("--output_dir missing: the folder the result goes to; or give --verify")
    if encoder:
        if settings.with_optimizer:
            raise InputError("with_optimizer: an encoder's folder has other names than its checkpoint: leave it out")
        if not ours and not settings.encoder_layout:
            raise InputError(f"{model}: mlm.py starts from it as it is; give --encoder_layout to change its names")
        return to_encoder
    if ours:
        if settings.with_optimizer and settings.dtype:
            raise InputError("dtype: leave it out with with_optimizer: the way back needs the weights as they are")
        return to_hugging_face
    for key in ("dtype", "with_optimizer"):
        if getattr(settings, key):
            raise InputError(f"{key}: is for writing a Hugging Face folder; here a checkpoint is written: remove it")
    if settings.overwrite_output_dir:
        raise InputError("overwrite_output_dir: step-N comes beside other checkpoints; remove an old one by hand")
    if Path(output).name.startswith("step-"):
        raise InputError(f"output_dir: {output}: give the folder the checkpoints lie in; step-N is made in it")
    if checkpoint:
        refuse_unread(checkpoint, model, settings.trust_pickle)
    return to_checkpoint


# -- the four conversions; each returns (result, line) ----------------------------------------------------------------


def verify(settings, stage):
    from dilqur.checkpoint.verify import describe, verify_checkpoint

    result = verify_checkpoint(settings.checkpoint)
    return result, describe(result)


def to_checkpoint(settings, stage):
    """A Hugging Face folder, or another program's checkpoint, as OUTPUT_DIR/step-N."""
    run = Path(settings.output_dir).resolve().parent
    if (run / ".lock").exists():  # the folder of a run, which must not be training meanwhile
        stage.folder = run
        stage.open()
    result = import_checkpoint(settings.output_dir, settings.checkpoint, settings.model_name_or_path, settings.step)
    return result, describe_import(result)


def to_hugging_face(settings, stage):
    """The checkpoint's weights over those of the model its run began with."""
    import torch

    from dilqur.checkpoint.format import CheckpointReader
    from dilqur.checkpoint.hf_folder import base_model, write_folder
    from dilqur.models.parameters import model_parameters

    reader, optimizer = CheckpointReader(settings.checkpoint), settings.with_optimizer
    if optimizer and not all(("exp_avg", name) in reader.dtypes for name in reader.shapes):
        raise InputError(f"{reader.folder}: no optimizer in it: leave out --with_optimizer")
    base, config, tokenizer = base_model(reader, settings.model_name_or_path)
    model = model_parameters(config, base or reader.folder)
    dtype = getattr(torch, settings.dtype) if settings.dtype else None
    result = {
        "step": reader.trainer["step"],
        "tensors": len(set(model.every) - set(model.tied)),
        "parameters": sum(map(math.prod, model.shapes.values())),
        "trained": sum(map(math.prod, reader.shapes.values())),
        "optimizer": optimizer,
        "model_name_or_path": base,
    }
    given = (reader, base, tokenizer, config, model, dtype, optimizer)
    write_stage(stage, reader, result, write_folder, *given)
    said = f"{result['parameters']:,} parameters, {result['trained']:,} of them from the checkpoint"
    return result, f"{stage.folder}: step {result['step']}, {said}{', with its optimizer' * optimizer}"


def to_encoder(settings, stage):
    """A checkpoint or folder of an encoder as a Hugging Face folder, of either layout."""
    import torch

    from dilqur.checkpoint.format import CheckpointReader
    from dilqur.checkpoint.hf_folder import read_encoder_checkpoint
    from dilqur.models.neobert_folder import read_encoder, write_encoder

    reader, step = CheckpointReader(settings.checkpoint) if settings.checkpoint else None, None
    if reader:
        weights, config, tokenizer = read_encoder_checkpoint(reader, settings.model_name_or_path)
        step = reader.trainer["step"]
    else:
        model, tokenizer = read_encoder(settings.model_name_or_path), settings.model_name_or_path
        weights, config = model.state_dict(), model.config
    if settings.dtype:
        weights = {name: weight.to(getattr(torch, settings.dtype)) for name, weight in weights.items()}
    layout = settings.encoder_layout or "eurobert"
    result = {"step": step, "parameters": sum(w.numel() for w in weights.values()), "layout": layout}
    write_stage(stage, reader, result, write_encoder, weights, config, tokenizer, layout)
    said = f"{f'step {step}, ' if reader else ''}{result['parameters']:,} parameters"
    return result, f"{stage.folder}: {said}, as a {layout}"


def write_stage(stage, reader, result, write, *arguments):
    """Fill the stage's folder by write(folder, *arguments), and finish it. Its manifest identifies the checkpoint read, if
    any, by COMPLETE, a checksum of checksums."""
    stage.open()
    with atomic_files(stage.folder) as part:
        write(part, *arguments)
    marker = reader and reader.folder / "COMPLETE"
    stage.finish(result, hashed={str(marker): file_identity(marker)} if marker else None)


@program(ConvertSettings, choose, needs_folder=False)
def main(settings, stage, convert):
    quiet_libraries()
    result, line = convert(settings, stage)
    print(line, file=sys.stderr if settings.json else sys.stdout)
    if settings.json:
        print(json.dumps(result, ensure_ascii=False))


if __name__ == "__main__":
    main()
