"""README and docs tell the truth about the tree: every file they name is there, every block of Python is valid."""

import re

import pytest
from conftest import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MADE_BY_A_RUN = ("runs/", "data/", "models/", "checkpoints/", ".venv/")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_file_it_names_is_there(page):
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"(?<![\w/.-])((?:[\w.-]+/)+[\w.-]*[\w/])", text) + re.findall(
        r"\]\((?!https?:)([^)#]+)\)", text
    )
    for name in named:
        if name.startswith(MADE_BY_A_RUN) or name == "slurm/site.env" or "NAME" in name or "meta-llama" in name:
            continue
        if "." in name or name.split("/")[0] in (
            "scripts",
            "data_tools",
            "slurm",
            "recipes",
            "dilqur",
            "accelerate_configs",
        ):
            assert (ROOT / name).exists() or (page.parent / name).exists(), f"{page.name} names {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_its_python_is_valid(page):
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        compile(block, str(page), "exec")


def test_every_program_is_in_the_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for program in (*ROOT.glob("data_tools/*.py"), *ROOT.glob("scripts/*.py")):
        assert f"`{program.parent.name}/{program.name}`" in readme
