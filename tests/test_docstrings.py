"""Docstrings that ``help()`` and an editor show entry by entry: each a sentence of its own, none left out."""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "lowvram_lab"
SECTIONS = ("Args:", "Attributes:", "Raises:")
SPELT_SMALL = ("ipywidgets", "pip ", "torch ", "transformers ")

modules = pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))


def documented(path):
    """Every class and function of a file that says more than a line about itself, with that text."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            text = ast.get_docstring(node) or ""
            if "\n" in text:
                yield node, text


def entries(text: str) -> dict[str, dict[str, str]]:
    """Section → name → its text in one line."""
    found: dict[str, dict[str, str]] = {}
    section = name = ""
    for line in text.splitlines():
        if line and not line.startswith(" "):
            section, name = line if line in SECTIONS else "", ""
            continue
        if not section:
            continue
        if entry := re.fullmatch(r" {4}(\*{0,2}[\w.]+): (.*)", line):
            name = entry.group(1)
            found.setdefault(section, {})[name] = entry.group(2)
        elif name and line.strip():
            found[section][name] += " " + line.strip()
    return found


@modules
def test_every_entry_is_a_sentence_of_its_own(path):
    for node, text in documented(path):
        for section in entries(text).values():
            for name, said in section.items():
                where = f"{node.name}, {name}: {said}"
                assert said[0].isupper() or said[0] in "\"`'(0123456789" or said.startswith(SPELT_SMALL), where
                assert said.endswith((".", "?", "`", ")")) and not said.endswith(".."), where


@modules
def test_no_argument_and_no_field_is_left_out(path):
    for node, text in documented(path):
        found = entries(text)
        if isinstance(node, ast.ClassDef):
            names = [
                part.target.id
                for part in node.body
                if isinstance(part, ast.AnnAssign) and not part.target.id.startswith("_")
            ]
            said = found.get("Attributes:")
        else:
            every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            names = [argument.arg for argument in every if argument.arg not in ("self", "cls")]
            said = found.get("Args:")
        if said is not None:
            assert set(names) <= set(said), f"{node.name}: {set(names) - set(said)}"
