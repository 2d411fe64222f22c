"""A stage: one program, one recipe file, one run folder, one manifest.

    runs/NAME/STAGE/             the result of `--config recipes/NAME/STAGE.yaml`
    runs/NAME/STAGE/manifest.json   written last: inputs and their hashes, arguments, versions, hardware, what came out

A stage RECIPE@VARIANT reads RECIPE.yaml; what makes it another run are flags, those of its row in pipeline.txt.

Paths: one that begins with a stage's name (the first column of the pipeline.txt beside the recipe) lies in the same run
folder; one that is there beside the recipe lies there; every other is as it stands.

A stage whose manifest is there is finished: it is not run twice.
"""

import fcntl
import os
import shlex
import shutil
import socket
import sys
import time
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import get_args, get_type_hints

from typing_extensions import is_typeddict

from dilqur.common.atomic import write_json
from dilqur.common.errors import AlreadyFinished, InputError
from dilqur.common.hashing import file_checksum
from dilqur.common.paths import expand, matches, tokenizer_file, tokenizer_paths
from dilqur.pipeline.inputs import Input, _bare, _documents, _read, in_hub_cache
from dilqur.pipeline.manifest import file_identity, git_commit, hardware, package_versions, read_manifest, unchanged
from dilqur.pipeline.rows import STAGE_NAME, read_pipeline
from dilqur.pipeline.settings_parser import keys_that, setting, to_dict


@dataclass(kw_only=True)
class StageSettings:
    """The keys every program has."""

    run_dir: str | None = setting("run folder; runs/NAME for recipes/NAME/STAGE.yaml", default=None, recorded=False)
    output_dir: str | None = setting("where the result goes; RUN_DIR/STAGE with a recipe", default=None, recorded=False)
    overwrite_output_dir: bool = setting(
        "remove an earlier result of this program first", default=False, recorded=False
    )
    stage: str | None = setting(
        "name of this stage in pipeline.txt, RECIPE@VARIANT; none: the recipe's", default=None, recorded=False
    )
    check: bool = setting("check the recipe and its inputs, run nothing (a second)", default=False, recorded=False)


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
        hints = get_type_hints(type(settings), include_extras=True)
        for name in [key.name for key in fields(settings)]:
            setattr(settings, name, self._resolve(hints[name], getattr(settings, name), name))

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
                path = in_hub_cache(value)
                if path is None:
                    hub = value.count("/") == 1 and not value.startswith((".", "/"))
                    cached = (
                        ", and not in the local Hugging Face cache; on a machine with network: hf download " + value
                    )
                    raise InputError(f"{key}: {value}: no such folder{cached if hub else ''}")
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
        free = keys_that(type(self.settings), "free")
        changed = [k for k in now if k in then and now[k] != then[k] and k not in free]
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
            "recipe": self.config and {"path": self.config, "xxh3": file_checksum(self.config, 128)},
            "arguments": to_dict(self.settings),
            "inputs": self.input_identities(hashed),
            "seed": getattr(self.settings, "seed", None),
            "git": git_commit(),
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


def _iso(seconds):
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
