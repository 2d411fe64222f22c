"""The rooms of dilqur/, and the one rule between them: a module imports from its own room and from those before it in ROOMS."""

import ast

from conftest import ROOT

ROOMS = (
    "common", "pipeline", "data", "tokenizer", "models", "kernels", "checkpoint", "estimate", "cleaning", "transplant", "training",
    "assistant", "evals", "report", "preflight", "benchmarking",
)  # fmt: skip


def test_all_of_dilqur_is_in_rooms():
    there = sorted(path.name for path in (ROOT / "dilqur").iterdir() if path.name not in ("__init__.py", "__pycache__"))
    assert there == sorted(ROOMS)


def test_modules_import_from_their_room_and_those_before_it():
    wrong = set()
    for file in (ROOT / "dilqur").glob("*/*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dilqur."):
                room = node.module.split(".")[1]
                if ROOMS.index(room) > ROOMS.index(file.parent.name):
                    wrong.add(f"{file.parent.name}/{file.name} -> {node.module}")
            else:
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                wrong |= {
                    f"{file.parent.name}/{file.name}: import {name}" for name in names if name.startswith("dilqur")
                }
    assert not wrong, "\n".join(sorted(wrong))
