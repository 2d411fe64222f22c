"""The training stages of a recipe folder, with the shapes of their models, before anything of it has been made or fetched."""

import math
from dataclasses import dataclass
from pathlib import Path

from dilqur.assistant.conversations import problem_with
from dilqur.common.constants import ROOT
from dilqur.common.errors import InputError
from dilqur.common.paths import expand
from dilqur.data.documents import is_validation, read_jsonl
from dilqur.data.token_shards import TokenShards
from dilqur.estimate.cost_model import UnknownArchitecture
from dilqur.estimate.hardware import GPU, gpu_meant
from dilqur.estimate.job import Job
from dilqur.pipeline.stage import StageSettings
from dilqur.preflight.batch_file import BatchFile, read_batch_file
from dilqur.preflight.planned import Context, StagePlan, candidates, model_config_of, rows_of
from dilqur.preflight.stage_checks import check_recipe
from dilqur.training.settings import TrainingSettings


@dataclass
class TrainingStage:
    """job: dilqur.estimate.job.Job. gpu: that of the batch file, None if it says none. default_strategy: the accelerate config that
    slurm/lib/launch.sh takes. epoch: how many `unit`, "tokens" of its shards or an adapter's "conversations", an epoch has, None where they
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
    places = (Path(run_dir or Path("runs") / folder.resolve().name), folder)
    known, found, left = Context(), [], {}
    for row in rows:
        batch_file = read_batch_file(ROOT / "slurm" / f"{row.batch}.sbatch")
        planned = StagePlan(row, row.arguments(folder), batch_file, 1)
        known.plans[row.name] = planned
        check_recipe(planned, known)
        settings = planned.settings
        adapter = planned.program.kind == "sft"
        if row.name not in chosen or not (isinstance(settings, TrainingSettings) or adapter):
            continue
        try:
            config = model_config_of(row.name, known.plans, places, model_config)
            steps, epochs, step = None, settings.num_train_epochs, settings.global_batch_size
            if adapter:
                epoch = epoch_conversations(planned, places)
                if epoch:
                    steps = math.ceil(epochs * math.ceil(epoch / step))  # as the Trainer does it
                job = Job.of_adapter(settings, config, steps)
            else:
                epoch = epoch_tokens(settings, places)
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


def epoch_tokens(settings, places):
    """Tokens of the datasets, each as often as its `epochs` say; None where they are not all there."""
    tokens = 0
    for dataset in settings.datasets:
        paths = candidates(dataset["path"], places)
        there = next((path for path in paths if (path / "manifest.json").exists()), None)
        if there is None:
            return None
        tokens += TokenShards(there).num_tokens * dataset.get("epochs", 1)
    return round(tokens)


def epoch_conversations(planned, places):
    """Conversations that sft.py would learn from, those too long for it among them; None where the files are not all there."""
    settings, number = planned.settings, 0
    for path in settings.input:
        there = next((found for place in candidates(path, places) if (found := files_of(place))), None)
        if there is None:
            return None
        for file in there:
            for _, record in read_jsonl(file, on_error=lambda problem: None):
                if not problem_with(record):
                    first = record["messages"][0]["content"]
                    number += not is_validation(first, settings.validation_fraction)
    return number


def files_of(place):
    """Those of a file, a folder or a pattern; none where nothing is there."""
    try:
        return expand([place])
    except InputError:
        return []
