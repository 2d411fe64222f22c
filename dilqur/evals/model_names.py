"""What the models that a program compares are called in its tables."""

from pathlib import Path

from dilqur.common.errors import InputError


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
