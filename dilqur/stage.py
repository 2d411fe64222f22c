"""A stage: one program, one recipe file, one run folder, one manifest.

    runs/NAME/STAGE/             the result of `--config recipes/NAME/STAGE.yaml`
    runs/NAME/STAGE/manifest.json   written last: inputs and their hashes, arguments, versions, hardware, what came out

A stage RECIPE@VARIANT reads RECIPE.yaml; what makes it another run are flags, those of its row in pipeline.txt.

Paths: one that begins with a stage's name (the first column of the pipeline.txt beside the recipe) lies in the same run
folder; one that is there beside the recipe lies there; every other is as it stands.

A stage whose manifest is there is finished: it is not run twice.
"""

import fcntl
import json
import os
import platform
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import UnionType
from typing import Annotated, NotRequired, Required, Union, get_args, get_origin, get_type_hints

import xxhash
from typing_extensions import is_typeddict

from dilqur.atomic import write_json
from dilqur.errors import AlreadyFinished, InputError
from dilqur.input_files import expand, identity_of, matches
from dilqur.recipe import to_dict
from dilqur.tokenizer import tokenizer_file, tokenizer_paths

PACKAGES = ("torch", "accelerate", "transformers", "tokenizers", "deepspeed", "liger-kernel", "peft", "trl", "numpy")


@dataclass(frozen=True)
class Input:
    """Marks a settings field as something this stage reads. kind: "documents" (files, folders, globs), "tokenizer",
    "tokenizers" (one, or a folder of several), "shards", "model" (a Hugging Face folder, or a stage that wrote one under
    `model/`), "run" (a run folder), "file"."""

    kind: str


Documents = Annotated[str, Input("documents")]
TokenizerPath = Annotated[str, Input("tokenizer")]
TokenizersPath = Annotated[str, Input("tokenizers")]
ShardsPath = Annotated[str, Input("shards")]
ModelPath = Annotated[str, Input("model")]
FilePath = Annotated[str, Input("file")]


@dataclass(kw_only=True)
class StageSettings:
    """The keys every program has."""

    run_dir: str | None = field(default=None, metadata={"help": "run folder; runs/NAME for recipes/NAME/STAGE.yaml"})
    output_dir: str | None = field(
        default=None, metadata={"help": "where the result goes; RUN_DIR/STAGE with a recipe"}
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "remove an earlier result of this program first"}
    )
    stage: str | None = field(
        default=None, metadata={"help": "name of this stage in pipeline.txt, RECIPE@VARIANT; none: the recipe's"}
    )
    check: bool = field(default=False, metadata={"help": "check the recipe and its inputs, run nothing (a second)"})


class Stage:
    """The run folder of one invocation. Making one resolves every path of `settings` in place and checks that what it
    reads is there and that the stages it comes from have finished; it writes nothing before `open`.

    prints_only_without_folder: with neither a recipe nor --output_dir there is no folder (`folder` is None), and `open` and
    `finish` do nothing: for programs that measure something and print it.
    """

    def __init__(self, settings, program, prints_only_without_folder=False):
        self.settings, self.program, self.config = settings, Path(program), settings.config
        recipe = Path(settings.config) if settings.config else None
        self.name = settings.stage or (recipe or self.program).stem
        if settings.stage and not recipe:
            raise InputError(f"--stage {self.name}: a stage is called after its recipe; give that, too (--config)")
        if settings.stage and not (self.name.startswith(f"{recipe.stem}@") and STAGE_NAME.fullmatch(self.name)):
            raise InputError(
                f"--stage {self.name}: a variant of {recipe} is called {recipe.stem}@ and then letters, digits and . _ - @"
            )
        if not settings.run_dir and recipe:
            settings.run_dir = str(Path("runs") / recipe.resolve().parent.name)
        if not settings.output_dir and settings.run_dir:
            settings.output_dir = str(Path(settings.run_dir) / self.name)
        if not settings.output_dir and not prints_only_without_folder:
            raise InputError("--output_dir missing: give it, or a recipe (--config)")
        self.run_dir = Path(settings.run_dir) if settings.run_dir else None
        self.folder = Path(settings.output_dir) if settings.output_dir else None
        self.pipeline = read_pipeline(recipe.parent) if recipe else []
        self.started, self.inputs, self._lock = time.time(), {}, None
        for name, hint in get_type_hints(type(settings), include_extras=True).items():
            setattr(settings, name, self._resolve(hint, getattr(settings, name), name))

    # -- paths ------------------------------------------------------------------------------------------------------

    def _resolve(self, hint, value, key):
        """`value` with every Input inside it, at any depth, made a path that exists."""
        hint = _bare(hint)
        if value is None:
            return value
        if marks := [m for m in getattr(hint, "__metadata__", ()) if isinstance(m, Input)]:
            path = self.path(value, marks[0].kind, key)
            self.inputs.setdefault(path, marks[0].kind)
            return path
        if isinstance(value, list):
            return [self._resolve(get_args(hint)[0], item, key) for item in value]
        if is_typeddict(hint):
            inner = get_type_hints(hint, include_extras=True)
            return {k: self._resolve(inner[k], item, f"{key}.{k}") for k, item in value.items()}
        return value

    def path(self, value, kind, key):
        """Where `value` of `key` lies. Raises InputError if the stage it names has not finished, or it is not there."""
        first, _, rest = value.partition("/")
        stages = [row.name for row in self.pipeline]
        path = Path(value)
        if first in stages and self.run_dir and not path.is_absolute():
            folder = self.run_dir / first
            path = folder / rest if rest else folder
            if not (folder / "manifest.json").exists():
                raise InputError(
                    f"{key}: {value}: the stage {first} has not finished ({folder}/manifest.json is not "
                    f"there); run it first"
                )
        elif self.config and not path.is_absolute() and matches(Path(self.config).parent, value):
            path = Path(self.config).parent / value
        if kind == "model":
            path = path / "model" if (path / "model" / "config.json").exists() else path
            if not path.exists():
                path = _from_hub_cache(value, key)
            elif not (path / "config.json").exists():
                raise InputError(f"{key}: {value}: no config.json in {path}: not a Hugging Face model folder")
        elif kind == "shards" and not (path / "manifest.json").exists():
            raise InputError(f"{key}: {value}: no manifest.json in {path}: not a folder of token shards")
        elif kind == "tokenizer":
            tokenizer_file(path, key)
        elif kind == "tokenizers":
            tokenizer_paths(path, key)
        elif kind == "documents":
            if self.folder and path.is_dir() and self.folder.resolve().is_relative_to(path.resolve()):
                raise InputError(
                    f"{key}: {value}: the result would lie in it, {self.folder}; choose another --output_dir"
                )
            if not self._is_finished():  # raw inputs may be moved away once their result stands
                expand([str(path)])
        elif not path.exists():
            raise InputError(f"{key}: {value}: no such file or folder")
        return str(path)

    # -- life -------------------------------------------------------------------------------------------------------

    def refuse_finished(self):
        """Raise AlreadyFinished if the result is there and made from these inputs and settings, InputError if from others."""
        if self.folder is None:
            return
        if not (self.folder / "manifest.json").exists():
            return
        done = read_manifest(self.folder)
        again = "remove that folder, or give --overwrite_output_dir true, to run it again"
        if done.get("program") != self.program.name:
            raise InputError(
                f"{self.folder}: holds a result of {done.get('program')}, not of {self.program.name}; choose another --output_dir"
            )
        if self.settings.overwrite_output_dir and not self.settings.check:
            return
        now, then = to_dict(self.settings), done["arguments"]
        harmless = getattr(self.settings, "harmless", ())
        changed = [k for k in now if k in then and now[k] != then[k] and k not in harmless]
        if changed:
            raise InputError(
                f"{self.folder}: finished with {changed[0]} = {then[changed[0]]!r}, now {now[changed[0]]!r}; {again}"
            )
        read = {os.path.realpath(file) for record in done["inputs"].values() for file in record["files"]}
        for path, record in done["inputs"].items():
            for file, was in record["files"].items():
                if not unchanged(Path(file), was):
                    raise InputError(f"{self.folder}: finished, but its input {file} has changed since; {again}")
            if new := [f for f in _documents(path, record["kind"]) if os.path.realpath(f) not in read]:
                raise InputError(f"{self.folder}: finished, but its input {new[0]} is new since; {again}")
        raise AlreadyFinished(
            f"{self.name}: finished {done['ended']} in {done['seconds']:.0f} s, nothing to do ({self.folder})"
        )

    def open(self, part=None):
        """Take the folder: the only writer from now on. Only the main process calls it. part: take only this folder in it, so
        that several jobs can each fill one."""
        if self.folder is None:
            return self
        folder = self.folder / (part or "")
        if self.settings.overwrite_output_dir and (self.folder / "manifest.json").exists():
            shutil.rmtree(self.folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError, PermissionError) as problem:
            raise InputError(
                f"{folder}: no folder can be made there ({problem.strerror}); choose another --output_dir"
            ) from None
        self._lock = (folder / ".lock").open("a+")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.seek(0)
            owner = self._lock.read().strip() or "another process"
            raise InputError(
                f"{folder}: {owner} is writing this folder; wait for it, or choose another --output_dir"
            ) from None
        except OSError as problem:  # a file system without locks, as some Lustre mounts: better run than not
            print(f"warning: {folder} cannot be locked ({problem.strerror}); do not start it twice", file=sys.stderr)
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._lock.flush()
        return self

    def finish(self, result, hashed=None, **more):
        """Write manifest.json: from now on the stage is finished. `result`: what was measured; `more`: top-level keys;
        `hashed`: {file: file_identity} of inputs that were hashed while they were read."""
        if self.folder is None:
            return None
        manifest = {
            **more,
            "stage": self.name,
            "program": self.program.name,
            "command": shlex.join(sys.argv),
            "recipe": self.config and {"path": self.config, "xxh3": _xxh3(Path(self.config))},
            "arguments": to_dict(self.settings),
            "inputs": self.input_identities(hashed),
            "seed": getattr(self.settings, "seed", None),
            "git": _git(),
            "packages": package_versions(),
            "hardware": hardware(),
            "started": _iso(self.started),
            "ended": _iso(time.time()),
            "seconds": round(time.time() - self.started, 3),
            "result": result,
        }
        write_json(self.folder / "manifest.json", manifest)
        return manifest

    def input_identities(self, hashed=None):
        """{path: {"kind", "files": {file: file_identity}}} of what this stage reads."""
        hashed = hashed or {}
        return {
            path: {
                "kind": kind,
                "files": {f: hashed.get(f) or file_identity(Path(f)) for f in _read(path, kind, hashed)},
            }
            for path, kind in self.inputs.items()
        }

    def _is_finished(self):
        again = self.settings.overwrite_output_dir and not self.settings.check
        return self.folder is not None and (self.folder / "manifest.json").exists() and not again


def read_manifest(folder):
    """manifest.json of a stage or a folder of token shards. Raises InputError where it is missing or damaged."""
    path = Path(folder) / "manifest.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: not there: {folder} is not finished") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as problem:
        raise InputError(f"{path}: damaged ({problem})") from None


def read_config(folder):
    """config.json of a model folder, as a dict. Raises InputError where it is missing or damaged."""
    path = Path(folder) / "config.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise InputError(f"{path}: cannot be read ({problem}); fetch or convert the model again") from None


def display_names(paths):
    """{name to show: path}: the folder's name, its parent's for a `model/`, the whole path where two are alike."""
    names = [Path(p).resolve().parent.name if Path(p).name == "model" else Path(p).resolve().name for p in paths]
    return {name if names.count(name) == 1 else str(path): path for name, path in zip(names, paths, strict=True)}


def named_models(settings):
    """{name: path} of `model_name_or_path`, called as `names` says or after their folders. Raises InputError without any, and unless
    there is a name for each, all different."""
    paths, names = settings.model_name_or_path, settings.names
    if not paths:
        raise InputError("model_name_or_path: give a model at least")
    if names is None:
        return display_names(paths)
    if not len(set(names)) == len(names) == len(paths) or "" in names:
        raise InputError(f"names: {', '.join(names)} for {len(paths)} models: give each one, all different")
    return dict(zip(names, paths, strict=True))


STAGE_NAME = re.compile(r"\w[\w.-]*(@[\w.@-]+)?", re.ASCII)  # a folder's name, safe in a shell and in HTML


@dataclass(frozen=True)
class PipelineRow:
    name: str
    program: str
    batch: str
    flags: tuple

    @property
    def recipe(self):
        """The stem of the recipe it reads: `full` of the stage `full`, and of its variant `full@seed-1`."""
        return self.name.partition("@")[0]

    def arguments(self, folder):
        """What the program is started with for this row of the pipeline.txt in `folder`."""
        variant = [] if self.name == self.recipe else ["--stage", self.name]
        return ["--config", str(Path(folder) / f"{self.recipe}.yaml"), *variant, *self.flags]


def read_pipeline(folder):
    """The rows of pipeline.txt in `folder`, in order; [] where there is none. One line a stage: name, program, batch file, flags.

    STAGE reads STAGE.yaml, and RECIPE@VARIANT reads RECIPE.yaml; the row's flags win over it.
    """
    path, rows = Path(folder) / "pipeline.txt", []
    if not path.exists():
        return rows
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            words = shlex.split(line, comments=True)
        except ValueError:
            raise InputError(f"{path}:{number}: a quotation mark is not closed") from None
        if not words:
            continue
        if len(words) < 3:
            raise InputError(f"{path}:{number}: a line is: stage, program, batch file, flags")
        if not STAGE_NAME.fullmatch(words[0]):
            raise InputError(
                f"{path}:{number}: the stage {words[0]} gives a folder its name: take letters, digits and . _ -, "
                "and for a variant @ after its recipe's name"
            )
        if words[0] in [row.name for row in rows]:
            raise InputError(f"{path}:{number}: the stage {words[0]} is there twice")
        rows.append(PipelineRow(words[0], words[1], words[2], tuple(words[3:])))
    return rows


def hardware():
    """What this process runs on: host, CPU, cores it may use, memory, GPUs (where torch is loaded and sees some)."""
    model = next(
        (line.split(":", 1)[1].strip() for line in _lines_of("/proc/cpuinfo") if line.startswith("model name")), ""
    )
    memory = next((int(line.split()[1]) for line in _lines_of("/proc/meminfo") if line.startswith("MemTotal")), 0)
    out = {
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(memory / 2**20, 1),
        "gpus": [],
    }
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        out["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        out["cuda"] = torch.version.cuda
    return out


def _bare(hint):
    """A type without `| None` and Required[...] around it."""
    if isinstance(hint, UnionType) or get_origin(hint) is Union:
        return _bare(next(a for a in get_args(hint) if a is not type(None)))
    return _bare(get_args(hint)[0]) if get_origin(hint) in (Required, NotRequired) else hint


def _from_hub_cache(value, key):
    """The local snapshot of a Hub model. Nothing is fetched: compute nodes have no network."""
    if value.count("/") == 1 and not value.startswith((".", "/")):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            return Path(snapshot_download(value, local_files_only=True))
        except (LocalEntryNotFoundError, ValueError, OSError):
            raise InputError(
                f"{key}: {value}: no such folder, and not in the local Hugging Face cache; on a machine "
                f"with network: hf download {value}"
            ) from None
    raise InputError(f"{key}: {value}: no such folder")


def _files(path, kind):
    """The files that stand for an input: a finished folder's manifest (it holds the checksums of the rest), else all files."""
    path = Path(path)
    if kind == "documents":
        return [Path(f) for f in expand([str(path)])]
    if path.is_file():
        return [path]
    for folder in (path, path.parent if path.name == "model" else path):
        if (folder / "manifest.json").exists():
            return [folder / "manifest.json"]
    if kind == "tokenizers":
        return [tokenizer_file(folder) for folder in tokenizer_paths(path)]
    return sorted(p for p in path.iterdir() if p.is_file() and not p.name.startswith("."))


def _read(path, kind, hashed):
    """The files of an input as they were read: what has come into a folder since is none of them."""
    files = list(map(str, _files(path, kind)))
    return [f for f in files if f in hashed] or files


def _documents(path, kind):
    """The files of a documents input as they are now; none of another kind, or where they were moved away."""
    try:
        return expand([path]) if kind == "documents" else []
    except InputError:
        return []


def file_identity(path):
    """{"bytes", "mtime_ns", "xxh3"} of a file."""
    return {**identity_of(path), "xxh3": _xxh3(path)}


def unchanged(path, was):
    """Is it the file that `file_identity` said this of? Same size and time: yes. Another time: hash it."""
    try:
        stat = path.stat()
    except OSError:
        return True  # moved away: see Stage.path
    if stat.st_size != was["bytes"]:
        return False
    return stat.st_mtime_ns == was["mtime_ns"] or _xxh3(path) == was["xxh3"]


def _xxh3(path):
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def _git():
    """Commit of the code that ran, and whether it had uncommitted changes; None outside a checkout."""

    def git(*words):
        run = subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=30)
        return run.stdout.strip() if run.returncode == 0 else None

    try:
        commit = git("rev-parse", "HEAD")
    except (OSError, subprocess.TimeoutExpired):
        return None
    return commit and {"commit": commit, "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}


def package_versions():
    """{package: its version, None where it is not installed} of those that a run's numbers may depend on."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def _iso(seconds):
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _lines_of(path):
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
