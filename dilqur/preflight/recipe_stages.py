"""The training stages of a recipe folder, with the shapes of their models, before anything of it has been made or fetched."""

import math
from dataclasses import dataclass
from pathlib import Path

from dilqur.common.constants import ROOT
from dilqur.common.errors import InputError
from dilqur.common.paths import expand
from dilqur.data.documents import is_validation, read_jsonl
from dilqur.data.token_shards import TokenShards
from dilqur.estimate.cost_model import UnknownArchitecture
from dilqur.estimate.hardware import GPU, gpu_meant
from dilqur.estimate.job import Job
from dilqur.models.config import read_config
from dilqur.pipeline.stage import StageSettings
from dilqur.preflight.batch_file import BatchFile, read_batch_file
from dilqur.preflight.planned import Known, Planned, rows_of
from dilqur.preflight.stage_checks import check_recipe
from dilqur.tokenizer.llama3 import SPECIAL_TOKENS
from dilqur.tokenizer.text_tokenizer import TextTokenizer
from dilqur.training.settings import TrainingSettings

LLAMA_3 = {"model_type": "llama", "vocab_size": 128_256, "num_key_value_heads": 8}
# config.json of the base models on the Hub (meta-llama/Llama-3.2-1B, Llama-3.2-3B, Llama-3.1-8B), as far as sizes go
PUBLISHED = {
    "llama-3.2-1b": {
        **LLAMA_3, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "llama-3.2-3b": {
        **LLAMA_3, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24, "head_dim": 128,
        "tie_word_embeddings": True,
    },
    "llama-3.1-8b": {
        **LLAMA_3, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32, "head_dim": 128,
        "tie_word_embeddings": False,
    },
}  # fmt: skip


@dataclass
class TrainingStage:
    """job: dilqur.estimate.job.Job. gpu: that of the batch file, None if it says none. default_strategy: the accelerate config that
    slurm/launch.sh takes. epoch: how many `unit`, "tokens" of its shards or an adapter's "conversations", an epoch has, None where they
    are not there."""

    name: str
    settings: StageSettings
    job: Job
    batch_file: BatchFile
    gpu: GPU | None
    default_strategy: str
    epoch: int | None

    @property
    def unit(self):
        return "conversations" if self.job.lora else "tokens"


def training_stages(recipe, run_dir=None, model_config=None):
    """([TrainingStage], {stage: why it is not planned}) of a recipe folder, or of the stages that read one recipe file.

    model_config: the shape of models that are not there and not known, a dict. Raises InputError where a recipe is wrong.
    """
    folder, rows, chosen = rows_of(Path(recipe))
    run_dir = Path(run_dir or Path("runs") / folder.resolve().name)
    known, found, left = Known(), [], {}
    for row in rows:
        batch_file = read_batch_file(ROOT / "slurm" / f"{row.batch}.sbatch")
        planned = Planned(row, row.arguments(folder), batch_file, 1)
        known.plans[row.name] = planned
        check_recipe(planned, known)
        settings = planned.settings
        adapter = hasattr(settings, "lora_r")
        if row.name not in chosen or not (isinstance(settings, TrainingSettings) or adapter):
            continue
        try:
            config = shape_of(row.name, known.plans, folder, run_dir, model_config)
            steps, epochs, step = None, settings.num_train_epochs, settings.global_batch_size
            if adapter:
                epoch = epoch_conversations(planned, folder, run_dir)
                if epoch:
                    steps = math.ceil(epochs * math.ceil(epoch / step))  # as the Trainer does it
                job = Job.of_adapter(settings, config, steps)
            else:
                epoch = epoch_tokens(settings, folder, run_dir)
                if epochs and epoch:
                    steps = max(1, round(epochs * epoch / settings.max_length / step))
                job = Job.of(settings, config, steps)
            job.activations()
        except (InputError, UnknownArchitecture) as problem:
            left[row.name] = str(problem)
            continue
        except KeyError as missing:
            left[row.name] = f"the model's config has no {missing}"
            continue
        meant, default = gpu_meant(batch_file.meant_for), planned.default_strategy
        found.append(TrainingStage(row.name, settings, job, batch_file, meant, default, epoch))
    return found, left


def shape_of(name, plans, folder, run_dir, model_config=None):
    """The config, a dict, of the model that the stage `name` reads or makes: of its folder, of the stage above that will make it, of a
    published model of that name, or `model_config`. Raises InputError where none says it."""
    planned = plans[name]
    settings, made = planned.settings, run_dir / name
    for file in (made / "config.json", made / "model" / "config.json"):
        if file.exists():
            return read_config(file.parent)
    if new := getattr(settings, "model_config", None):
        return {**getattr(planned.module, "MODEL_KEYS", {}), **new}
    path = settings.model_name_or_path
    if path in plans:
        config = shape_of(path, plans, folder, run_dir, model_config)
    elif there := next((p for p in (folder / path, Path(path)) if (p / "config.json").exists()), None):
        config = read_config(there)
    elif model_config:
        config = dict(model_config)
    elif known := next((name for name in PUBLISHED if Path(path).name.lower() in (name, f"{name}-instruct")), None):
        config = PUBLISHED[known]
    else:
        raise InputError(
            f"model_name_or_path: {path} is not there and its shape is not known: fetch it, or give --model_config"
        )
    if not hasattr(settings, "pad_to_multiple_of"):
        return config
    size, multiple = (
        ids_of(settings.tokenizer, plans, folder, run_dir) or config["vocab_size"],
        settings.pad_to_multiple_of,
    )
    return {**config, "vocab_size": -(-size // multiple) * multiple}  # a transplant: the new tokenizer's, padded


def ids_of(tokenizer, plans, folder, run_dir):
    """How many ids a tokenizer has or, where a stage will make it, will have; None where that makes several, or it is not there."""
    stage = tokenizer.split("/")[0]
    for path in (run_dir / tokenizer if stage in plans else folder / tokenizer, Path(tokenizer)):
        if (path / "tokenizer.json").exists() or path.is_file():
            return TextTokenizer(path).size
    if stage not in plans:
        return None
    settings = plans[stage].settings
    base, new = getattr(settings, "base_tokenizer", None), getattr(settings, "new_tokens", None) or []
    if base:
        size = ids_of(base, plans, folder, run_dir)
        return size + new[0] if size and len(new) == 1 else None
    size = getattr(settings, "vocab_size", None)
    return size + len(SPECIAL_TOKENS) if isinstance(size, int) else None


def epoch_tokens(settings, folder, run_dir):
    """Tokens of the datasets, each as often as its `epochs` say; None where they are not all there."""
    tokens = 0
    for dataset in settings.datasets:
        paths = places(dataset["path"], folder, run_dir)
        there = next((path for path in paths if (path / "manifest.json").exists()), None)
        if there is None:
            return None
        tokens += TokenShards(there).num_tokens * dataset.get("epochs", 1)
    return round(tokens)


def epoch_conversations(planned, folder, run_dir):
    """Conversations that sft.py would learn from, those too long for it among them; None where the files are not all there."""
    settings, number = planned.settings, 0
    for path in settings.input:
        there = next((found for place in places(path, folder, run_dir) if (found := files_of(place))), None)
        if there is None:
            return None
        for file in there:
            for _, record in read_jsonl(file, on_error=lambda problem: None):
                if not planned.module.problem_with(record):
                    first = record["messages"][0]["content"]
                    number += not is_validation(first, settings.validation_fraction)
    return number


def files_of(place):
    """Those of a file, a folder or a pattern; none where nothing is there."""
    try:
        return expand([place])
    except InputError:
        return []


def places(path, folder, run_dir):
    """Where what a recipe in `folder` calls so may lie."""
    return [run_dir / path, folder / path, Path(path)]
