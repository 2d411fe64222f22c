"""Which files a path of a recipe stands for: documents (jsonl, parquet, txt; plain, .gz, .zst, .bz2), and tokenizers."""

import os
import sys
from pathlib import Path

from dilqur.common.errors import InputError

FORMATS = (".jsonl", ".json", ".parquet", ".txt")
COMPRESSIONS = (".gz", ".zst", ".bz2")


def expand(inputs):
    """Files, folders and globs → a sorted list of files without repeats. Raises InputError for what is not there."""
    files = []
    for item in map(str, inputs):
        if Path(item).is_file() and not kind_of(Path(item)):
            raise InputError(
                f"{item}: not a known format; give {', '.join(FORMATS)}, plain or {', '.join(COMPRESSIONS)}"
            )
        found = sorted(str(path) for path in _there(item) if kind_of(path))
        if not found:
            what = f"no {', '.join(FORMATS)} file in there (plain, {', '.join(COMPRESSIONS)})"
            there = Path(item).is_dir() or _there(item)
            raise InputError(f"{item}: {what if there else 'no such file, folder or pattern'}")
        if wrong := [
            file for file in found if not file.isprintable() and file != file.encode("utf-8", "replace").decode()
        ]:
            raise InputError(f"{wrong[0]!a}: its name is not UTF-8, and no manifest could hold it; rename it")
        files += found
    unique = {}
    for file in files:
        unique.setdefault(os.path.realpath(file), file)  # no file twice, whatever the way to it
    return list(unique.values())


def warn_of_left_out(program, inputs):
    """Say which files in the folders and globs among `inputs` are not read, because their names are of no known format."""
    if others := sorted(str(path) for item in map(str, inputs) for path in _there(item) if not kind_of(path)):
        files = f"{len(others):,} files of other kinds are" if len(others) > 1 else "a file of another kind is"
        print(f"{program}: {files} left out: {others[0]}{' …' * (len(others) > 1)}", file=sys.stderr)


def _there(item):
    """The files that an input stands for, whatever their names say they are; hidden ones only where they are named."""
    path = Path(item)
    if path.is_dir():
        return list(_walk(path))
    if path.is_file():
        return [path]
    found = matches(Path(path.anchor or "."), str(path.relative_to(path.anchor)))
    shown = [m for m in found if not m.name.startswith(".") and (_is_hidden(path) or not _is_hidden(m))]
    return [file for match in shown for file in (_walk(match) if match.is_dir() else [match])]


def _is_hidden(path):
    return any(part.startswith(".") and part != ".." for part in path.parts)


def matches(folder, pattern):
    """What a glob pattern matches in a folder, a list; nothing where it is no pattern, such as the empty one or a**."""
    try:
        return list(folder.glob(pattern))
    except ValueError:
        return []


def _walk(folder):
    """The files below a folder, through links as well; hidden ones are left out. A part that cannot be listed raises."""

    def refuse(problem):
        raise problem

    seen = set()
    for root, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if (real := os.path.realpath(root)) in seen:  # a link in a circle
            folders.clear()
            continue
        seen.add(real)
        for path in (Path(root) / name for name in names if not name.startswith(".")):
            if not path.exists() and kind_of(path):
                raise InputError(f"{path}: a link to a file that is not there; mend or remove it")
            if path.is_file():
                yield path


def identity_of(file):
    """{"bytes", "mtime_ns"} of a file. Raises InputError where it is not there any more."""
    try:
        stat = Path(file).stat()
    except FileNotFoundError:
        raise InputError(f"{file}: is not there any more; has it been moved?") from None
    return {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def kind_of(path):
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes = suffixes[:-1]
    return suffixes[-1] if suffixes and suffixes[-1] in FORMATS else None


def tokenizer_file(path, key="--tokenizer"):
    """tokenizer.json of a folder, of a stage's model, or the file itself (.json, .json.gz). InputError if there is none."""
    path = Path(path)
    for candidate in (path, path / "tokenizer.json", path / "model" / "tokenizer.json"):
        if candidate.is_file() and candidate.name.endswith((".json", ".json.gz")):
            return candidate
    raise InputError(f"{key}: {path}: no tokenizer.json there")


def tokenizer_paths(path, key="--tokenizer"):
    """[path] of a tokenizer; of a folder without one, its sub-folders that are tokenizers (a sweep of sizes), the shortest name
    first: 8k, 64k, 100k. Raises InputError if there is none."""
    try:
        tokenizer_file(path, key)
        return [str(path)]
    except InputError as problem:
        folders = [file.parent for file in Path(path).glob("*/tokenizer.json") if not file.parent.name.startswith(".")]
        if not folders:
            raise InputError(f"{problem}, nor in a folder in it") from None
        return [str(folder) for folder in sorted(folders, key=lambda folder: (len(folder.name), folder.name))]
