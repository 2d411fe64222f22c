"""A recipe: YAML and flags become checked settings; what is wrong is said in one line, with file and line."""

import subprocess
import sys
from dataclasses import dataclass, field
from typing import Annotated, Literal, Required

import pytest
from pydantic import Field
from typing_extensions import TypedDict

from dilqur.common.errors import InputError
from dilqur.pipeline.settings_parser import parse, setting, to_dict


class Dataset(TypedDict, total=False):
    __pydantic_config__ = {"extra": "forbid"}
    path: Required[str]
    weight: Annotated[float, Field(gt=0)]


@dataclass(kw_only=True)
class Settings:
    model: str = field(default="base", metadata={"help": "where it lies"})
    bf16: bool = False
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    max_steps: Annotated[int, Field(ge=1)] | None = None
    report_to: list[Literal["tensorboard", "wandb"]] = field(default_factory=list)
    datasets: list[Dataset] | None = None
    output_dir: str | None = setting("where the result goes", default=None, recorded=False)


def settings(*flags, recipe=None, positional=None):
    return parse(Settings, "What it does.", [*(["--config", str(recipe)] if recipe else []), *flags], positional)


@pytest.fixture
def recipe(tmp_path):
    def write(text):
        (tmp_path / "stage.yaml").write_text(text, encoding="utf-8")
        return tmp_path / "stage.yaml"

    return write


def test_a_flag_wins_over_the_recipe_and_the_recipe_over_the_default(recipe):
    file = recipe("learning_rate: 2e-3\nmax_steps: 10\n")
    got = settings("--max_steps", "20", recipe=file)
    assert (got.learning_rate, got.max_steps, got.bf16, got.config) == (2e-3, 20, False, str(file))


@pytest.mark.parametrize("written", ["1e-4", "1.0e-4", "0.0001", "1E-4"])
def test_a_learning_rate_is_a_number_however_it_is_written(recipe, written):
    # YAML 1.1 reads 1e-4 as a string, because it has no dot
    assert settings(recipe=recipe(f"learning_rate: {written}\n")).learning_rate == 1e-4
    assert settings("--learning_rate", written).learning_rate == 1e-4


@pytest.mark.parametrize("flags", [["--bf16", "true"], ["--bf16=true"], ["--bf16"]])
def test_a_switch_can_be_given_in_three_ways(flags):
    assert settings(*flags).bf16 is True


def test_tables_are_the_same_in_a_recipe_and_on_the_command_line(recipe):
    expected = [{"path": "pack/web", "weight": 0.7}, {"path": "pack/wiki"}]
    text = "[{path: pack/web, weight: 0.7}, {path: pack/wiki}]"
    assert settings(recipe=recipe(f"datasets: {text}\n")).datasets == expected
    assert settings("--datasets", "{path: pack/web, weight: 0.7}", "{path: pack/wiki}").datasets == expected


def test_a_bare_word_at_the_start_is_the_positional_argument():
    assert settings("folder", "--bf16", positional="model").model == "folder"


def test_an_empty_recipe_and_one_of_comments_give_the_defaults(recipe):
    for text in ("", "# nothing yet\n"):
        assert to_dict(settings(recipe=recipe(text))) == to_dict(settings())


def test_what_says_only_where_and_whether_to_run_is_not_in_a_manifest():
    assert "output_dir" not in to_dict(settings("--output_dir", "x"))


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("bf16: true\nlearnin_rate: 1\n", 2, "unknown key learnin_rate, did you mean learning_rate?"),
        ("env: {CUDA_VISIBLE_DEVICES: 0}\n", 1, "unknown key env"),
        ("max_steps: 1\n\n# again\nmax_steps: 2\n", 4, "max_steps is already set in line 1"),
        ("bf16: 7\n", 1, "bf16 should be a valid boolean, not 7"),
        ("bf16: 'true'\n", 1, "bf16 should be a valid boolean, not 'true'"),
        ("max_steps: true\n", 1, "max_steps should be a valid integer, not True"),
        ("max_steps: 1.5\n", 1, "max_steps should be a valid integer, not 1.5"),
        ("max_steps: 0\n", 1, "max_steps should be greater than or equal to 1, not 0"),
        ("learning_rate: -1e-3\n", 1, "learning_rate should be greater than 0, not -0.001"),
        ("learning_rate: [1, 2]\n", 1, "learning_rate should be a valid number"),
        ("report_to: wandb\n", 1, "report_to should be a valid list, not 'wandb'"),
        ("report_to: [mlflow]\n", 1, "report_to[0] should be 'tensorboard' or 'wandb', not 'mlflow'"),
        ("datasets:\n  - {path: a, wieght: 1}\n", 1, "datasets[0].wieght unknown key"),
        ("datasets:\n  - path: a\n    path: b\n", 3, "path is set twice"),
        ("datasets: [{weight: 1}]\n", 1, "datasets[0].path field required"),
        ("bf16: true\n  model: x\n", 2, "not valid YAML"),
        ("- bf16\n", 1, "a recipe is a table"),
        ("model: [unclosed\n", 2, "not valid YAML"),
    ],
)
def test_what_is_wrong_in_a_recipe_is_said_with_its_line(recipe, text, line, words):
    file = recipe(text)
    with pytest.raises(InputError) as refused:
        settings(recipe=file)
    assert str(refused.value).startswith(f"{file}:{line}: ")
    assert words in str(refused.value)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--learnin_rate", "1"], "unknown argument --learnin_rate, did you mean --learning_rate?"),
        (
            ["--learning", "1"],
            "unknown argument --learning",
        ),  # no abbreviations: a later key could change their meaning
        (["--max_steps", "many"], "--max_steps should be a valid integer, not 'many'"),
        (["--max_steps", "0"], "--max_steps should be greater than or equal to 1"),
        (["--bf16", "7"], "--bf16"),
        (["--datasets", "{path: [}"], "not YAML"),
        (["--config"], "--config needs the path of a recipe"),
        (["--config", "missing.yaml"], "missing.yaml: cannot read this recipe"),
    ],
)
def test_what_is_wrong_on_the_command_line_is_said_with_the_flag(flags, words):
    with pytest.raises(InputError) as refused:
        settings(*flags)
    assert words in str(refused.value)


def test_a_recipe_that_is_not_text_is_refused(tmp_path):
    (tmp_path / "stage.yaml").write_bytes(b"model: \xff\n")
    with pytest.raises(InputError, match="cannot read this recipe"):
        settings(recipe=tmp_path / "stage.yaml")


def test_reading_a_recipe_loads_neither_torch_nor_transformers():
    code = (
        "import sys, dilqur.pipeline.settings_parser, dilqur.pipeline.stage; "
        "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
