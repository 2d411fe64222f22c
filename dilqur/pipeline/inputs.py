"""What a stage reads: the kinds of inputs that a settings field is marked with, and the files that stand for one."""

from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, NotRequired, Required, Union, get_args, get_origin

from dilqur.common.errors import InputError
from dilqur.common.paths import expand, tokenizer_file, tokenizer_paths


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


def _bare(hint):
    """A type without `| None` and Required[...] around it."""
    if isinstance(hint, UnionType) or get_origin(hint) is Union:
        return _bare(next(a for a in get_args(hint) if a is not type(None)))
    return _bare(get_args(hint)[0]) if get_origin(hint) in (Required, NotRequired) else hint


def in_hub_cache(name):
    """The local snapshot of a Hub model, or None. Nothing is fetched: compute nodes have no network."""
    if name.count("/") != 1 or name.startswith((".", "/")):
        return None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, ValueError, OSError):
        return None


def files_of(path, kind):
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
    files = list(map(str, files_of(path, kind)))
    return [f for f in files if f in hashed] or files


def _documents(path, kind):
    """The files of a documents input as they are now; none of another kind, or where they were moved away."""
    try:
        return expand([path]) if kind == "documents" else []
    except InputError:
        return []
