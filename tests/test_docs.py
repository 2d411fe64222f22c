"""README and docs tell the truth about the tree: every file they name is there, every block of Python is valid."""

import re

import numpy as np
import pytest
from conftest import ROOT

from dilqur.data.token_shards import TokenShards
from dilqur.tokenizer.text_tokenizer import TextTokenizer

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


def test_token_ids_of_another_tool_become_shards_as_the_page_says(made, tmp_path, monkeypatch):
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    (block,) = [b for b in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "train.bin" in b]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tokenizer").symlink_to(made / "tokenizer")
    tokenizer = TextTokenizer(made / "tokenizer")
    texts = ["Salam, dünya!", "", "Bakı şəhərdir."]
    documents = [[*tokenizer.encode(text), tokenizer.eos_id] for text in texts]
    np.concatenate(documents).astype(np.uint16).tofile("train.bin")
    (tmp_path / "shards").mkdir()
    exec(compile(block, "data.md", "exec"), {})
    shards = TokenShards("shards").check_files(verify=True)
    assert [shards.document(i).tolist() for i in range(3)] == documents
    assert shards.manifest["utf8_bytes"] == sum(len(text.encode()) for text in texts)
