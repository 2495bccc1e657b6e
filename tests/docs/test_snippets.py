# SPDX-License-Identifier: Apache-2.0
"""Python in the pages parses, imports what exists, and calls what our public classes have."""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path

import pytest

import ovd
from tests.docs.pages import PAGES, blocks, name_of

PUBLIC = {"detector": ovd.Detector, "regions": ovd.Regions, "detections": ovd.Detections, "words": ovd.Vocabulary}


def members(kind: type) -> set[str]:
    return {*dir(kind), *inspect.get_annotations(kind), *inspect.signature(kind).parameters}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_pages__python_imports_exist(page: Path) -> None:
    wrong = []
    for node in (node for language, text in blocks(page) if language == "python" for node in ast.walk(ast.parse(text))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in ("ovd", "pretrain"):
            module = importlib.import_module(node.module)
            wrong += [f"{node.module}.{alias.name}" for alias in node.names if not hasattr(module, alias.name)]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in PUBLIC:
            kind = PUBLIC[node.value.id]
            if node.attr not in members(kind):
                wrong.append(f"{node.value.id}.{node.attr}")
    assert not wrong
