"""A recipe: YAML and flags in, a checked dataclass out.

Every field of a settings dataclass is a key of the recipe and a flag; flags win. Values are checked against the field's type and range
(pydantic, strict), with file and line in the message, and the nearest name for a key that does not exist. No torch: `--help` takes 0.4 s.
"""

import argparse
import difflib
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import MISSING, field, fields
from pathlib import Path
from types import UnionType
from typing import Annotated, Literal, NotRequired, Required, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError
from typing_extensions import is_typeddict

from dilqur.common.errors import InputError


def setting(help, on_resume=None, recorded=True, benchmark=..., **options):
    """A field of a settings dataclass. options: default or default_factory, as of dataclasses.field.

    on_resume: None: another value is another run; "may_change": a run that goes on may have another; "free": it does not change the
    result, and a finished stage may have another as well. recorded: False: it says only where and whether to run, and is in no manifest.
    benchmark: what a benchmark sets it to, where it would leave a result or take time.
    """
    metadata = {"help": help, "on_resume": on_resume, "recorded": recorded, "benchmark": benchmark}
    return field(metadata=metadata, **options)


def keys_that(settings_class, on_resume):
    """Names of the keys marked so."""
    return {f.name for f in fields(settings_class) if f.metadata.get("on_resume") == on_resume}


def parse(settings_class, doc, argv=None, positional=None, config_is_positional=False):
    """Read `--config recipe.yaml` and flags into `settings_class`, a keyword-only dataclass.

    doc: the program's docstring, shown by `--help`. positional: the field that takes bare words at the start of the line.
    config_is_positional: `--config` is another name of it, for a program that is given another program's recipe.
    The result's `config` is the recipe's path or None. Raises InputError for whatever is wrong with a key or a value.
    """
    argv = [_underscored(word) for word in (sys.argv[1:] if argv is None else argv)]
    if config_is_positional:
        argv = [re.sub(r"^--config(?==|$)", f"--{positional}", word) for word in argv]
    if positional:
        words = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))
        argv = ([f"--{positional}", *argv[:words]] if words else []) + argv[words:]
    hints = get_type_hints(settings_class, include_extras=True)
    given, unknown = _parser(settings_class, hints, doc).parse_known_args(argv)
    if unknown:
        near = _nearest(unknown[0].lstrip("-").partition("=")[0], [*hints, "config"], "--")
        raise InputError(f"unknown argument {unknown[0]}{near}; see --help")
    flags = vars(given)
    config = flags.pop("config", None)
    values = read_yaml(config, hints) if config else {}
    values |= {key: check_value(hints[key], _of_flag(hints[key], value), f"--{key}") for key, value in flags.items()}
    required = [f.name for f in fields(settings_class) if f.default is MISSING and f.default_factory is MISSING]
    if missing := [f"--{key}" for key in required if key not in values]:
        raise InputError(f"{', '.join(missing)} missing: give the flag, or the key in a recipe (--config)")
    settings = settings_class(**values)
    settings.config = config
    return settings


def read_yaml(path, hints):
    """{key: value} of a recipe, every value checked against `hints`. Errors name file and line."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise InputError(f"{path}: cannot read this recipe: {problem}") from None
    try:
        root = yaml.compose(text, Loader=_Loader)
        values = yaml.load(text, Loader=_Loader) or {}
    except yaml.YAMLError as problem:
        mark = getattr(problem, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise InputError(f"{path}{line}: not valid YAML: {getattr(problem, 'problem', problem)}") from None
    if root is None:
        return {}
    if not isinstance(root, yaml.MappingNode):
        raise InputError(f"{path}:1: a recipe is a table of `key: value` lines")
    seen = {}
    for key_node, value_node in root.value:
        key, line = key_node.value, key_node.start_mark.line + 1
        if key in seen:
            raise InputError(f"{path}:{line}: {key} is already set in line {seen[key]}; keep one of them")
        seen[key] = line
        if key not in hints:
            raise InputError(f"{path}:{line}: unknown key {key}{_nearest(key, hints)}; --help lists the keys")
        _refuse_duplicates(path, value_node)
        values[key] = check_value(hints[key], values[key], f"{path}:{line}: {key}")
    return values


def check_value(hint, value, where):
    """`value` as the type `hint` says, strictly (a bool is no number), or an InputError that begins with `where`."""
    try:
        return TypeAdapter(hint).validate_python(value, strict=True)
    except ValidationError as problem:
        first = problem.errors(include_url=False)[0]
        inside = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"])
        inside = "" if "|" in inside or "function" in inside else inside
        got = first["input"] if not isinstance(first["input"], dict) else ", ".join(map(str, first["input"]))
        message = first["msg"].replace("Input should be", "should be").replace("Extra inputs are", "unknown key, is")
        raise InputError(f"{where}{inside} {message[0].lower() + message[1:]}, not {got!r}") from None


def to_dict(settings):
    """The settings as JSON gives them back, for manifests and comparisons; without what says only where and whether to run."""
    values = {f.name: getattr(settings, f.name) for f in fields(settings) if f.metadata.get("recorded", True)}
    return json.loads(json.dumps(values))


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads `1e-4` as a string, because it has no dot; everybody who writes a learning rate means a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


# -- flags ------------------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(
            re.sub(r"^argument (--config): expected one argument", r"\1 needs the path of a recipe", message)
        )


def _parser(settings_class, hints, doc):
    """A flag for every field, without a default: what is not given is not in the result. Those that do not change the result
    (metadata on_resume: free) are a group of their own in --help."""
    usage = "%(prog)s [--config RECIPE.yaml] [--KEY VALUE …]; the keys are below"
    parser = _Parser(
        description=doc, usage=usage, allow_abbrev=False, argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--config", metavar="RECIPE.yaml", help="recipe with any of these keys; flags win over it")
    free = parser.add_argument_group("keys that do not change the result")
    for f in fields(settings_class):
        options = (
            {"metavar": "{" + ",".join(map(str, _choices(hints[f.name]))) + "}"} if _choices(hints[f.name]) else {}
        )
        if _origin(hints[f.name]) is list:
            options |= {"nargs": "+"}
        elif _leaves(hints[f.name]) == {bool}:
            options |= {"nargs": "?", "const": "true"}
        default = "" if f.default is MISSING and f.default_factory is MISSING else f" (default: {_default(f)})"
        text = (f.metadata.get("help", "") + default).replace("%", "%%")
        group = free if f.metadata.get("on_resume") == "free" else parser
        group.add_argument(f"--{f.name}", help=text, **options)
    return parser


def _of_flag(hint, words):
    """What a flag's words are in a recipe: text where the type has text, else YAML, in which none is null."""
    if _leaves(hint) == {str}:
        return words
    if words == "none":
        return None
    return [_yaml_value(word) for word in words] if isinstance(words, list) else _yaml_value(words)


def _yaml_value(text):
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        raise InputError(f"not YAML: {text}") from None


def _default(f):
    return f.default if f.default is not MISSING else f.default_factory()


def _bare(hint):
    """A type without `| None`, Annotated[…] and Required[…] around it."""
    if isinstance(hint, UnionType) or get_origin(hint) is Union:
        rest = [a for a in get_args(hint) if a is not type(None)]
        return _bare(rest[0]) if len(rest) == 1 else hint
    wrapped = get_origin(hint) in (Annotated, Required, NotRequired)
    return _bare(get_args(hint)[0]) if wrapped else hint


def _origin(hint):
    return get_origin(_bare(hint))


def _choices(hint):
    """The values of a Literal, or of a list of them; () of another type."""
    hint = _bare(hint)
    if get_origin(hint) is list:
        return _choices(get_args(hint)[0])
    return get_args(hint) if get_origin(hint) is Literal else ()


def _leaves(hint):
    """{type} of what is written for a value, of a list's items."""
    hint = _bare(hint)
    if get_origin(hint) is Literal:
        return {type(value) for value in get_args(hint)}
    if get_origin(hint) is list:
        return _leaves(get_args(hint)[0])
    if isinstance(hint, UnionType) or get_origin(hint) is Union:
        return set().union(*(_leaves(a) for a in get_args(hint) if a is not type(None)))
    return {dict} if is_typeddict(hint) or get_origin(hint) is dict else {hint}


def _underscored(word):
    """--max-length as --max_length."""
    name, equals, value = word.partition("=")
    return name.replace("-", "_").replace("__", "--", 1) + equals + value if name.startswith("--") else word


# -- mistakes ---------------------------------------------------------------------------------------------------------


def _refuse_duplicates(path, node):
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key_node, value_node in node.value:
            if key_node.value in seen:
                raise InputError(f"{path}:{key_node.start_mark.line + 1}: {key_node.value} is set twice here")
            seen.add(key_node.value)
            _refuse_duplicates(path, value_node)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_duplicates(path, item)


def _nearest(name, names: Mapping | list, prefix=""):
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f", did you mean {prefix}{close[0]}?" if close else ""
