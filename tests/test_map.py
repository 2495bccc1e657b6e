# SPDX-License-Identifier: Apache-2.0
"""CONTRIBUTING's map is true: each file exists and defines, at its top level or as an attribute, the name beside it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROW = re.compile(r"^\| ([^|]+) \| `([\w/]+\.py)` \| `(\w+)` \|$", re.MULTILINE)


def section(title: str) -> str:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    return text.split(f"## {title}\n", 1)[1].split("\n## ", 1)[0]


MAP = ROW.findall(section("Where an expert looks first"))


def names_in(source: str) -> set[str]:
    """Functions, classes, methods and what is assigned to or read as an attribute."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Attribute):
            names.add(node.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


def test_map__has_every_row_of_its_table() -> None:
    rows = [line for line in section("Where an expert looks first").splitlines() if line.startswith("| ")]
    assert len(MAP) == len(rows) - 2 >= 25  # head and rule


@pytest.mark.parametrize(("part", "file", "name"), MAP, ids=[part for part, _, _ in MAP])
def test_map__file_defines_the_name(part: str, file: str, name: str) -> None:
    path = ROOT / file
    assert path.is_file(), f"{part}: no {file}"
    assert name in names_in(path.read_text(encoding="utf-8")), f"{part}: {file} does not define {name}"


def test_glossary__has_at_most_fifteen_rows() -> None:
    words = [line for line in section("Our own words").splitlines() if line.startswith("| ")][2:]
    assert 0 < len(words) <= 15
