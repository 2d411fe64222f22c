"""Checks in a second or two, on a login node, what a GPU hour could be lost to: without torch, and leaving nothing behind.

    python scripts/preflight.py recipes/quickstart
    python scripts/preflight.py --config recipes/quickstart/cpt-2-full.yaml --num_processes 2 --json

A folder: every stage of its pipeline.txt, in order; a recipe: its stage and the variants of it. A line a check: ok, FAIL,
skipped (and why), or later, where a stage above has to finish first; what can be known before that is checked now. Exit code 2
if anything FAILs. The number of processes is the batch file's nodes × GPUs unless given. Sizes are estimates from the model's config.
"""

import contextlib
import fcntl
import functools
import importlib.util
import io
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path
from typing import Annotated

from pydantic import Field

from dilqur.batches import split_batch
from dilqur.cost_model import UnknownArchitecture, parameter_sizes
from dilqur.documents import read_jsonl
from dilqur.errors import AlreadyFinished, InputError, program
from dilqur.input_files import expand
from dilqur.llama3 import SPECIAL_TOKENS, encode_chat
from dilqur.recipe import parse, to_dict
from dilqur.stage import PipelineRow, Stage, StageSettings, read_config, read_pipeline
from dilqur.token_shards import TokenShards
from dilqur.tokenizer import TextTokenizer
from dilqur.training_settings import TrainingSettings, check_training

BYTES = {"float32": 4, "bfloat16": 2}
ROOT = Path(__file__).resolve().parent.parent
DRIVERS = {"cu126": 560, "cu128": 570}  # NVIDIA's oldest for CUDA 12.6 and 12.8; torch 2.13 from PyPI is CUDA 13: 580


@dataclass(kw_only=True)
class PreflightSettings:
    recipe: str = field(metadata={"help": "folder with a pipeline.txt, or a recipe in one (also as --config)"})
    run_dir: str | None = field(default=None, metadata={"help": "run folder; runs/NAME for recipes/NAME"})
    num_processes: Annotated[int, Field(ge=1)] | None = field(
        default=None, metadata={"help": "GPUs in all; those of the batch file"}
    )
    verify: bool = field(default=False, metadata={"help": "read every shard and compare the checksums"})
    json: bool = field(default=False, metadata={"help": "one JSON object on standard output"})
    check: bool = field(default=False, metadata={"help": "check the arguments, print nothing else"})


class Skipped(Exception):
    """A check that does not apply here, and why."""


class Later(Exception):
    """A check that has to wait, and for what."""


class Probe(Stage):
    """A stage whose inputs may not be there yet. `later`: {path: the stage above that will make it}."""

    def __init__(self, settings, program):
        self.later = {}
        super().__init__(settings, program)

    def path(self, value, kind, key):
        names = [row.name for row in self.pipeline]
        above, first = names[: names.index(self.name)], value.partition("/")[0]
        waits_for = [n for n in above if not (self.run_dir / n / "manifest.json").exists()]
        if kind == "run" and waits_for:
            self.later[value] = waits_for[-1]
            return value
        if first in names and first not in above:
            raise InputError(f"{key}: {value}: {first} is not above {self.name} in pipeline.txt: move its line up")
        if first in waits_for:
            self.later[str(self.run_dir / value)] = first
            return str(self.run_dir / value)
        return super().path(value, kind, key)


@dataclass
class Planned:
    """A row of pipeline.txt with all that its checks look at. keys: recipe and flags together, paths as they stand there;
    config: of the model it reads or makes, None if unknown."""

    row: PipelineRow
    arguments: list
    processes: int
    module: object = None
    settings: object = None
    keys: dict | None = None
    stage: Probe = None
    config: dict | None = None

    def there(self, kind):
        """The inputs of this kind that are there already."""
        return [p for p, k in self.stage.inputs.items() if k == kind and p not in self.stage.later]


# -- checks of a stage: each returns what it saw, None where it does not concern the program --------------------------


def check_recipe(planned, preflight):
    """The recipe parses, its keys are the program's, and no row above is the same run under another name."""
    row, recipe, path = planned.row, Path(planned.arguments[1]), ROOT / planned.row.program
    if not path.exists():
        raise InputError(f"{path}: no such program; pipeline.txt gives it to {row.name}")
    if not recipe.exists():
        there = ", ".join(sorted(file.stem for file in recipe.parent.glob("*.yaml"))) or "none"
        raise InputError(f"{recipe}: no such file, and the stage {row.name} reads it; recipes there: {there}")
    spec = importlib.util.spec_from_file_location("_".join(path.parts[-2:]).removesuffix(".py"), path)
    planned.module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(planned.module)
    classes = [v for v in vars(planned.module).values() if isinstance(v, type) and issubclass(v, StageSettings)]
    own = [c for c in classes if c.__module__ == spec.name]
    if not own:
        raise InputError(f"{path}: has no StageSettings: not a program that makes a stage")
    planned.settings = parse(own[0], "", planned.arguments)
    if planned.settings.stage not in (None, row.name):
        raise InputError(f"stage: {planned.settings.stage}: pipeline.txt calls it {row.name}: leave the key out")
    planned.keys = to_dict(planned.settings)
    for name, other in preflight.plans.items():
        if name != row.name and planned.keys == other.keys and row.batch == other.row.batch:
            raise InputError(f"the same run as {name}, key for key: change a flag of one, or remove its row")
    return f"keys fit {row.program}"


def check_inputs(planned, preflight):
    """What it reads is there, in the local Hugging Face cache, or made by a stage above."""
    planned.stage = Probe(planned.settings, planned.module.__file__)
    planned.config = find_config(planned, preflight.plans)
    if later := sorted(set(planned.stage.later.values())):
        raise Later(f"waits for {', '.join(later)}")
    return f"{len(planned.stage.inputs)} there"


def check_shards(planned, preflight):
    """Every shard has the size, and with --verify the checksum, that its manifest says."""
    folders = [TokenShards(path).check_files(preflight.settings.verify) for path in planned.there("shards")]
    files = sum(len(shard["files"]) for folder in folders for shard in folder.manifest["shards"])
    return f"{files} files whole, {sum(f.num_tokens for f in folders):,} tokens" if folders else None


def check_model(planned, preflight):
    """The models it reads are whole (as long as their headers say) and have a BOS, an EOS, and for sft the chat format."""
    for path in map(Path, planned.there("model")):
        index = path / "model.safetensors.index.json"
        listed = set(read_json(index)["weight_map"].values()) if index.exists() else {"model.safetensors"}
        for file in sorted(path / name for name in listed):
            if not file.exists():
                raise InputError(f"{file}: not there: fetch or convert the model again")
            if (size := file.stat().st_size) != (stated := stated_size(file)):
                raise InputError(f"{file}: {size:,} bytes, its header says {stated:,}: fetch or convert it again")
        tokenizer = load_tokenizer(path)
        if tokenizer.bos_id is None or tokenizer.eos_id is None:
            raise InputError(f"{tokenizer.path}: no BOS or no EOS token: name them in tokenizer_config.json beside it")
        if hasattr(planned.module, "conversations"):
            encode_chat(tokenizer, [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}])
    return f"{len(planned.there('model'))} whole, with BOS and EOS" if planned.there("model") else None


def check_conversations(planned, preflight):
    """The first conversation of every file is one."""
    if not hasattr(planned.module, "conversations"):
        return None
    for file in expand(planned.there("documents")):
        line, record = next(read_jsonl(file), (1, {}))
        if problem := planned.module.problem_with(record):
            raise InputError(f"{file}:{line}: {problem}")
    return "the first of every file is whole"


def check_fit(planned, preflight):
    """The program's own --check: shards' tokenizer = model's, token ids < its rows, pad ≠ eos, lengths, steps."""
    if not planned.stage.later:
        arguments, sys.argv = sys.argv, [planned.module.__file__, *planned.arguments, "--check"]
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                planned.module.main.__wrapped__()  # without @program: it raises
        finally:
            sys.argv = arguments
        return "recipe, data and model belong together"
    settings = planned.settings
    if not isinstance(settings, TrainingSettings) or "shards" in [planned.stage.inputs[p] for p in planned.stage.later]:
        return None
    _, _, steps = check_training(replace(settings, continue_data=False))
    raise Later(f"{steps:,} steps; whether data and model belong together")


def check_batch(planned, preflight):
    """global_batch_size divides."""
    if not hasattr(planned.settings, "global_batch_size"):
        return None
    total, ceiling = planned.settings.global_batch_size, planned.settings.per_device_train_batch_size
    batch, accumulation = split_batch(total, ceiling, planned.processes)
    return f"{total} = {batch} a device × {accumulation} accumulated × {planned.processes} processes"


def check_output(planned, preflight):
    """The folder can be written to and locked, and nobody else is writing there."""
    folder = planned.stage.folder
    with contextlib.suppress(OSError), (folder / ".lock").open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{folder}: {lock.read().strip() or 'another process'} is writing it now") from None
    nearest = existing(folder.parent)
    if nearest in preflight.seen:
        return None
    preflight.seen.add(nearest)
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError(f"{nearest}: cannot be written to: choose another --run_dir")
    with tempfile.TemporaryFile(dir=nearest) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as problem:
            return f"{nearest} can be written to but not locked ({problem.strerror}): never start a stage twice"
    return f"{nearest} can be written to and locked"


def check_space(planned, preflight):
    """Room for the checkpoints and the model, and for those of the stages above."""
    if not planned.config:
        return None
    settings, folder, (trained, total) = planned.settings, planned.stage.folder, parameters(planned)
    number = BYTES[getattr(settings, "dtype", "float32")]
    need, what = number * total, f"a model of about {total:,} parameters"
    if isinstance(settings, TrainingSettings):
        steps = settings.max_steps or 0
        kept = settings.save_total_limit or max(1, steps // settings.save_steps)
        kept += steps // settings.save_keep_every if settings.save_keep_every else 0
        need += 3 * number * trained * (kept + 1)  # weight and two moments; the new one stands before the oldest goes
        what = f"about {total:,} parameters, {trained:,} of them trained, {kept} checkpoints"
    there = 0
    for file in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # a running stage tidies up
            there += file.stat().st_size
    device, free = existing(folder).stat().st_dev, shutil.disk_usage(existing(folder)).free
    claimed = preflight.claimed[device] = preflight.claimed.get(device, 0) + max(0, need - there)
    text = f"{gb(need)} for {what}; {gb(free)} free"
    if claimed > free:
        more = f"and {gb(claimed)} wanted with the stages above"
        raise InputError(f"{text}, {more}: free some, or lower save_total_limit")
    return text


def check_memory(planned, preflight):
    """A GPU holds its share of weights, gradients and AdamW's moments; activations come on top."""
    if not isinstance(planned.settings, TrainingSettings) or not preflight.gpus or not planned.config:
        return None
    trained, total = parameters(planned)
    number = BYTES[planned.settings.dtype]  # of weight, gradient and two moments
    share = (4 * number * trained + number * (total - trained)) / planned.processes
    need, has = share, min(gpu["bytes"] for gpu in preflight.gpus)
    text = f"{gb(need)} a GPU if sharded over {planned.processes}, without activations; the smallest here has {gb(has)}"
    if need > has:
        raise InputError(f"{text}: take more GPUs, or freeze more")
    return text


# -- checks of this machine -------------------------------------------------------------------------------------------


def check_packages():
    """Installed versions are those of requirements.txt."""
    wrong, pins = [], 0
    for name, version, marker in re.findall(r"^([\w-]+)==([\w.]+)(.*)", (ROOT / "requirements.txt").read_text(), re.M):
        if "platform_machine" in marker and platform.machine() not in marker:
            continue
        pins += 1
        try:
            installed = metadata.version(name)
        except metadata.PackageNotFoundError:
            installed = "not installed"
        if installed.partition("+")[0] != version:
            wrong.append(f"{name} {installed}, not {version}")
    if wrong:
        raise InputError(f"{'; '.join(wrong)}: pip install -r requirements.txt")
    return f"{pins} as in requirements.txt"


def check_gpus(found):
    """Append to `found` what nvidia-smi says of each GPU: name, bytes, driver (its major version), compute capability."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version,compute_cap", "--format=csv,noheader,nounits"]
    try:
        run = subprocess.run(query, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        raise Skipped("no nvidia-smi here; run this again on a GPU node") from None
    lines = [line.split(", ") for line in run.stdout.splitlines() if line.count(", ") == 3]
    if run.returncode or not lines:
        raise Skipped(f"nvidia-smi finds none: {' '.join((run.stdout + run.stderr).split()) or 'silence'}")
    for name, mib, driver, capability in lines:
        try:
            numbers = {"bytes": int(mib) << 20, "driver": int(driver.split(".")[0]), "capability": float(capability)}
        except ValueError:  # "[N/A]", of a GPU that shares the CPU's memory, say
            raise Skipped(f"nvidia-smi says of {name}: {mib} MiB, driver {driver}, capability {capability}") from None
        found.append({"name": name, **numbers})


def check_driver(gpus, bf16):
    """The driver is new enough for this build of torch, and the GPUs for bfloat16."""
    if not gpus:
        return None
    first, torch = gpus[0], metadata.version("torch")
    build = torch.partition("+")[2]
    if build == "cpu":
        raise InputError(f"torch {torch} is a build without CUDA: install the one requirements.txt names")
    if first["driver"] < DRIVERS.get(build, 580):
        raise InputError(
            f"driver {first['driver']} is too old for torch {torch}, which wants {DRIVERS.get(build, 580)}: update it, or "
            "install a build for an older CUDA (requirements.txt says how)"
        )
    if bf16 and (weak := [gpu for gpu in gpus if gpu["capability"] < 8.0]):
        raise InputError(f"{weak[0]['name']} has no bfloat16 (compute capability {weak[0]['capability']}): bf16: false")
    return f"{len(gpus)} × {first['name']}, {gb(first['bytes'])}, driver {first['driver']}"


# -- sizes and numbers ------------------------------------------------------------------------------------------------


def gb(size):
    return f"{size / 1e9:,.1f} GB" if size > 1e8 else f"{size / 1e6:,.1f} MB"


def existing(path):
    """The path, or the nearest folder above it that is there."""
    return next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())


def stated_size(file):
    """Bytes that the header of a .safetensors file says it has: its length, the header, the tensors; 0 for a broken header."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        try:
            header = json.loads(opened.read(min(length, file.stat().st_size)))
        except ValueError:
            return 0
    return 8 + length + max((t["data_offsets"][1] for name, t in header.items() if name != "__metadata__"), default=0)


@functools.cache
def load_tokenizer(path):
    """TextTokenizer; that of a model which several stages read is loaded once: 128,000 tokens take half a second."""
    return TextTokenizer(path)


def read_json(path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as problem:
        raise InputError(f"{path}: damaged ({problem}): fetch it again") from None


def parameters(planned):
    """(trained, all) parameters. Raises InputError for a pattern of unfrozen_parameters that matches none of them."""
    try:
        sizes = parameter_sizes(planned.config)
    except UnknownArchitecture as problem:
        raise Skipped(str(problem)) from None
    except KeyError as missing:
        raise Skipped(f"the model's config has no {missing}") from None
    patterns = getattr(planned.settings, "unfrozen_parameters", None)
    if not patterns:
        return sum(sizes.values()), sum(sizes.values())
    for pattern in patterns:
        if not any(fnmatch(name, pattern) for name in (*sizes, "lm_head.weight")):
            raise InputError(f"unfrozen_parameters: {pattern!r} matches no parameter of the model")
    return sum(n for name, n in sizes.items() if any(fnmatch(name, p) for p in patterns)), sum(sizes.values())


def find_config(planned, plans):
    """The config of the model that `planned` reads or makes, as far as it can be known now: a dict, or None."""
    settings, later, folder = planned.settings, planned.stage.later, planned.stage.folder
    if (folder / "manifest.json").exists() and (
        made := [*folder.glob("config.json"), *folder.glob("model/config.json")]
    ):
        return read_json(made[0])
    path = getattr(settings, "model_name_or_path", None)
    if not isinstance(path, str):
        config, defaults = getattr(settings, "model_config", None), getattr(planned.module, "MODEL_KEYS", {})
        return config and {**defaults, **config}
    config = plans[later[path]].config if path in later else read_config(path)
    if not config or not hasattr(settings, "pad_to_multiple_of"):
        return config
    size = ids_of(settings.tokenizer, later, plans) or config["vocab_size"]  # a transplant: the new tokenizer's, padded
    return {**config, "vocab_size": -(-size // settings.pad_to_multiple_of) * settings.pad_to_multiple_of}


def ids_of(tokenizer, later, plans):
    """How many ids the tokenizer at this path has or, where a stage is to make it, will have; None where it makes several."""
    if tokenizer not in later:
        return TextTokenizer(tokenizer).size
    plan = plans[later[tokenizer]]
    size, base, new = (getattr(plan.settings, key, None) for key in ("vocab_size", "base_tokenizer", "new_tokens"))
    if base and len(new) == 1:
        size = ids_of(base, plan.stage.later, plans)
        return size and size + new[0]
    return size and size + len(SPECIAL_TOKENS)


def number_of_processes(batch_file):
    """Nodes × GPUs a node as the batch file asks for them; without GPUs what slurm/launch.sh would start."""
    path = ROOT / "slurm" / f"{batch_file}.sbatch"
    text = path.read_text() if path.exists() else ""
    nodes, gpus = (re.search(rf"^#SBATCH {key}(\d+)\s*$", text, re.M) for key in ("--nodes=", r"--gres=gpu:(?:\w+:)?"))
    return int(nodes[1]) * int(gpus[1]) if nodes and gpus else int(os.environ.get("DILQUR_NUM_PROCESSES", 1))


# -- all of them ------------------------------------------------------------------------------------------------------


CHECKS = (
    check_shards,
    check_model,
    check_fit,
    check_conversations,
    check_batch,
    check_output,
    check_space,
    check_memory,
)


class Preflight:
    """What is known so far. lines: {"stage", "check", "status", "text"} each; plans: {stage: Planned}; gpus: as check_gpus;
    seen: folders that were tried; claimed: {file system: bytes that the stages so far will take}."""

    def __init__(self, settings):
        self.settings, self.lines, self.plans, self.gpus, self.seen, self.claimed = settings, [], {}, [], set(), {}

    def run(self, stage, check, *arguments):
        """Note what `check` says; returns whether to go on."""
        status, text = "ok", None
        try:
            text = check(*arguments)
        except AlreadyFinished as done:
            text = str(done).removeprefix(f"{stage}: ")
        except InputError as mistake:
            status, text = "FAIL", str(mistake)
        except Skipped as reason:
            status, text = "skipped", str(reason)
        except Later as reason:
            status, text = "later", str(reason)
        if text is not None:
            name = check.__name__.removeprefix("check_")
            self.lines.append({"stage": stage, "check": name, "status": status, "text": text})
        return status != "FAIL"

    def stage(self, planned, wanted):
        """All checks of a stage. Of a finished one only what its own program says; of one not `wanted` nothing."""
        name, first = planned.row.name, len(self.lines)
        if self.run(name, check_recipe, planned, self) and self.run(name, check_inputs, planned, self) and wanted:
            if (planned.stage.folder / "manifest.json").exists():
                self.run(name, check_fit, planned, self)
                self.lines[first:] = self.lines[-1:]
                return
            failed = set()
            for check in CHECKS:
                if not (check is check_fit and failed) and not self.run(name, check, planned, self):
                    failed.add(check)
        if not wanted:
            del self.lines[first:]


@program
def main():
    argv = [
        re.sub("^--config(?==|$)", "--recipe", word) for word in sys.argv[1:]
    ]  # --config is another program's recipe
    settings = parse(PreflightSettings, __doc__, argv, positional="recipe")
    recipe = Path(settings.recipe)
    folder, only = (recipe, None) if recipe.is_dir() else (recipe.parent, recipe.stem)
    rows = read_pipeline(folder)
    if not recipe.exists() or not rows:
        raise InputError(f"{recipe}: no recipe there, or no pipeline.txt that says which program each stage runs")
    chosen = [row.name for row in rows if only in (None, row.recipe)]
    if not chosen:
        raise InputError(f"{folder}/pipeline.txt: no line for {only}, which would say what program reads {recipe}")
    if settings.check:
        return print("preflight: ok")

    preflight = Preflight(settings)
    preflight.run("", check_packages)
    preflight.run("", check_gpus, preflight.gpus)
    for row in rows:
        where = ["--run_dir", settings.run_dir] if settings.run_dir else []
        arguments = [*row.arguments(folder), *where]
        planned = Planned(row, arguments, settings.num_processes or number_of_processes(row.batch))
        preflight.plans[row.name] = planned
        preflight.stage(planned, wanted=row.name in chosen)
        if row.name == chosen[-1]:
            break
    bf16 = any(getattr(planned.settings, "bf16", False) for planned in preflight.plans.values())
    preflight.run("", check_driver, preflight.gpus, bf16)

    lines = preflight.lines
    if settings.json:
        print(json.dumps({"recipe": settings.recipe, "checks": lines}, ensure_ascii=False))
    else:
        wide = max(len(line["stage"]) for line in lines)
        for line in lines:
            print(f"{line['status']:<7}  {line['stage']:<{wide}}  {line['check']:<13}  {line['text']}")
    count = Counter(line["status"] for line in lines)
    if count["FAIL"]:
        raise InputError(f"{count['FAIL']} of {len(lines)} checks FAIL: their lines say what to do")
    if not settings.json:
        print(", ".join(f"{number} {status}" for status, number in count.items()))
    return None


if __name__ == "__main__":
    main()
