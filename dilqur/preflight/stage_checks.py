"""Checks of a stage: its recipe, what it reads, whether they belong together, and whether its folder is there for it alone.

Each takes (planned, known) and returns what it saw, None where it does not concern the program.
"""

import contextlib
import fcntl
import functools
import os
import tempfile
from dataclasses import replace
from pathlib import Path

from dilqur.assistant.conversations import problem_with
from dilqur.common.constants import ROOT
from dilqur.common.environment import environment
from dilqur.common.errors import InputError
from dilqur.common.paths import expand
from dilqur.data.batches import split_batch
from dilqur.data.documents import read_jsonl
from dilqur.data.token_shards import TokenShards
from dilqur.models.safetensors_io import stored_tensors
from dilqur.pipeline.program import load_program
from dilqur.pipeline.settings_parser import to_dict
from dilqur.pipeline.stage import StageSettings
from dilqur.pipeline.status import writer_of
from dilqur.pipeline.strategy import planned_strategy, refuse_what_it_cannot
from dilqur.preflight.findings import Later
from dilqur.preflight.planned import DryRunStage, existing, model_config_of
from dilqur.tokenizer.llama3 import encode_chat
from dilqur.tokenizer.text_tokenizer import TextTokenizer
from dilqur.training.checks import check_training
from dilqur.training.settings import TrainingSettings

TRAINING = ("cpt", "mlm", "sft")  # kinds of programs that train


def check_recipe(planned, known):
    """The recipe parses, its keys are the program's, and no row above is the same run under another name."""
    row, recipe = planned.row, Path(planned.arguments[1])
    try:
        planned.program = load_program(row.program)
    except InputError as problem:
        raise InputError(f"{problem}; pipeline.txt gives it to {row.name}: correct its row") from None
    if not recipe.exists():
        there = ", ".join(sorted(file.stem for file in recipe.parent.glob("*.yaml"))) or "none"
        raise InputError(f"{recipe}: no such file, and the stage {row.name} reads it; recipes there: {there}")
    if not issubclass(planned.program.settings, StageSettings):
        raise InputError(f"{row.program}: makes no stage: correct the row of {row.name} in pipeline.txt")
    planned.settings = planned.program.parse(planned.arguments)
    if planned.settings.stage not in (None, row.name):
        raise InputError(f"stage: {planned.settings.stage}: pipeline.txt calls it {row.name}: leave the key out")
    planned.keys = to_dict(planned.settings)
    for name, other in known.plans.items():
        if name != row.name and planned.keys == other.keys and row.batch == other.row.batch:
            raise InputError(f"the same run as {name}, key for key: change a flag of one, or remove its row")
    return f"keys fit {row.program}"


def check_inputs(planned, known):
    """What it reads is there and may be read, in the local Hugging Face cache, or made by a stage above."""
    planned.stage = DryRunStage(planned.settings, planned.program.file)
    if isinstance(planned.keys.get("model_name_or_path"), str) or planned.keys.get("model_config"):
        places = (planned.stage.run_dir, Path(planned.arguments[1]).parent)
        with contextlib.suppress(InputError):  # its shape is not known
            planned.config = model_config_of(planned.row.name, known.plans, places)
    for path in planned.stage.inputs:
        if path not in planned.stage.later and not os.access(path, os.R_OK | (os.X_OK if Path(path).is_dir() else 0)):
            raise PermissionError(13, "permission denied", path)
    if later := sorted(set(planned.stage.later.values())):
        raise Later(f"waits for {', '.join(later)}")
    return f"{len(planned.stage.inputs)} there"


def check_shards(planned, known):
    """Every shard has the size, and with --verify the checksum, that its manifest says."""
    folders = [TokenShards(path).check_files(known.verify) for path in planned.there("shards")]
    files = sum(len(shard["files"]) for folder in folders for shard in folder.manifest["shards"])
    return f"{files} files whole, {sum(f.num_tokens for f in folders):,} tokens" if folders else None


def check_model(planned, known):
    """The models it reads are whole (as long as their headers say) and have a BOS, an EOS, and for sft the chat format."""
    for path in map(Path, planned.there("model")):
        stored_tensors(path)
        tokenizer = load_tokenizer(path)
        if tokenizer.bos_id is None or tokenizer.eos_id is None:
            raise InputError(f"{tokenizer.path}: no BOS or no EOS token: name them in tokenizer_config.json beside it")
        if planned.program.kind == "sft":
            encode_chat(tokenizer, [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}])
    return f"{len(planned.there('model'))} whole, with BOS and EOS" if planned.there("model") else None


def check_conversations(planned, known):
    """The first conversation of every file is one."""
    if planned.program.kind != "sft":
        return None
    for file in expand(planned.there("documents")):
        line, record = next(read_jsonl(file), (1, {}))
        if problem := problem_with(record):
            raise InputError(f"{file}:{line}: {problem}")
    return "the first of every file is whole"


def check_fit(planned, known):
    """The program's own --check: shards' tokenizer = model's, token ids < its rows, pad ≠ eos, lengths, steps."""
    if not planned.stage.later:
        planned.program.prepare([*planned.arguments, "--check"])
        return "recipe, data and model belong together"
    settings = planned.settings
    if not isinstance(settings, TrainingSettings) or "shards" in [planned.stage.inputs[p] for p in planned.stage.later]:
        return None
    _, _, steps = check_training(replace(settings, continue_data=False))
    raise Later(f"{steps:,} steps; whether data and model belong together")


def check_strategy(planned, known):
    """The accelerate config is there, and does what the recipe wants."""
    strategy = planned.strategy_file()
    if not isinstance(planned.settings, TrainingSettings) or not strategy:
        return None
    if not (ROOT / strategy).exists():
        there = ", ".join(sorted(file.stem for file in (ROOT / "accelerate_configs").glob("*.yaml")))
        raise InputError(
            f"DILQUR_ACCELERATE_CONFIG: {strategy}: no such file; in accelerate_configs/ there are: {there}"
        )
    launched = {"WORLD_SIZE": str(planned.processes), "DILQUR_ACCELERATE_CONFIG": str(ROOT / strategy)}
    with environment(**launched):
        refuse_what_it_cannot(planned.settings, planned_strategy())
    return f"{strategy} on {planned.processes} processes"


def check_batch(planned, known):
    """global_batch_size divides."""
    if planned.program.kind not in TRAINING:
        return None
    total, ceiling = planned.settings.global_batch_size, planned.settings.per_device_train_batch_size
    batch, accumulation = split_batch(total, ceiling, planned.processes)
    return f"{total} = {batch} a device × {accumulation} accumulated × {planned.processes} processes"


def check_output(planned, known):
    """The folder can be written to and locked, and nobody else is writing there."""
    folder = planned.stage.folder
    if (writer := writer_of(folder)) is not None:
        raise InputError(f"{folder}: {writer or 'another process'} is writing it now: wait until it ends, or end it")
    nearest = existing(folder.parent)
    if nearest in known.seen:
        return None
    known.seen.add(nearest)
    if not nearest.is_dir():
        raise InputError(f"{nearest}: is no folder, and {folder} would be in it: choose another --run_dir")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError(f"{nearest}: cannot be written to: choose another --run_dir")
    with tempfile.TemporaryFile(dir=nearest) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as problem:
            return f"{nearest} can be written to but not locked ({problem.strerror}): never start a stage twice"
    return f"{nearest} can be written to and locked"


@functools.cache
def load_tokenizer(path):
    """TextTokenizer; that of a model which several stages read is loaded once: 128,000 tokens take half a second."""
    return TextTokenizer(path)
