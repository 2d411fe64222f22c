"""A recipe: YAML and flags in, a checked dataclass out.

TRL's `TrlParser` makes a flag of every field and lets flags win over the YAML. It takes `bf16: 7`, duplicate keys and an
`env:` block in silence, so what it is given is checked first: against the field's type and range (pydantic, strict), with
file and line in the message, and the nearest name for a key that does not exist. No torch: `--help` answers in a blink.
"""

import argparse
import difflib
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError
from trl import TrlParser
from typing_extensions import is_typeddict

from dilqur.common.errors import InputError


def parse(settings_class, doc, argv=None, positional=None, config_is_positional=False):
    """Read `--config recipe.yaml` and flags into `settings_class`, a keyword-only dataclass.

    doc: the program's docstring, shown by `--help`. positional: the field that takes bare words at the start of the line.
    config_is_positional: `--config` is another name of it, for a program that is given another program's recipe.
    The result's `config` is the recipe's path or None. Raises InputError for whatever is wrong with a key or a value.
    """
    argv = _split_equals(sys.argv[1:] if argv is None else argv)
    if config_is_positional:
        argv = [f"--{positional}" if word == "--config" else word for word in argv]
    if positional:
        words = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))
        argv = ([f"--{positional}", *argv[:words]] if words else []) + argv[words:]
    usage = "%(prog)s [--config RECIPE.yaml] [--KEY VALUE …]; the keys are below"
    parser = _Parser(settings_class, description=doc, formatter_class=_Help, allow_abbrev=False, usage=usage)
    parser.add_argument("--config", metavar="RECIPE.yaml", help="recipe with any of these keys; flags win over it")
    hints = get_type_hints(settings_class, include_extras=True)
    for action in parser._actions:
        if action.dest in hints and _holds_table(hints[action.dest]):
            action.type = _yaml_value  # a list of tables or a table: YAML on the command line too
    config, values = _config_path(argv), {}
    if config:
        values = read_yaml(config, hints)
        parser.set_defaults_with_config(**values)
    settings, _, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    if unknown:
        flag = unknown[0].lstrip("-").replace("-", "_")
        raise InputError(f"unknown argument {unknown[0]}{_nearest(flag, [*hints, 'config'], '--')}; see --help")
    for field in fields(settings):
        value = getattr(settings, field.name)
        if field.name not in values or value != values[field.name]:
            setattr(settings, field.name, check_value(hints[field.name], value, f"--{field.name}"))
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
    leave_out = {"check", "json", "overwrite_output_dir", "run_dir", "output_dir", "stage"}
    values = {f.name: getattr(settings, f.name) for f in fields(settings) if f.name not in leave_out}
    return json.loads(json.dumps(values))


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads `1e-4` as a string, because it has no dot; everybody who writes a learning rate means a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The docstring as it is written, and each flag's default."""

    def _format_action_invocation(self, action):
        action.option_strings = [o for o in action.option_strings if "-" not in o.lstrip("-")] or action.option_strings
        return super()._format_action_invocation(action)


class _Parser(TrlParser):
    def error(self, message):
        required = "the following arguments are required: "
        if message.startswith(required):
            names = [name.split("/")[0] for name in message.removeprefix(required).split(", ")]
            message = f"{', '.join(names)} missing: give the flag, or the key in a recipe (--config)"
        raise InputError(re.sub(r"^argument (--\w+)/\S+:", r"\1:", message))  # argparse names both spellings of a flag


def _split_equals(argv):
    """TrlParser does not know `--config=x`: take every `--name=value` apart."""
    out = []
    for word in argv:
        name, equals, value = word.partition("=")
        out += [name, value] if equals and name.startswith("--") else [word]
    return out


def _config_path(argv):
    if "--config" not in argv:
        return None
    at = argv.index("--config") + 1
    if at == len(argv):
        raise InputError("--config needs the path of a recipe")
    return argv[at]


def _holds_table(hint):
    """Is it a dict or a TypedDict, or a list of them?"""
    return dict in (hint, get_origin(hint)) or is_typeddict(hint) or any(map(_holds_table, get_args(hint)))


def _yaml_value(text):
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        raise argparse.ArgumentTypeError(f"not YAML: {text}") from None


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
