# SPDX-License-Identifier: Apache-2.0
"""Every link in the pages leads somewhere, the README leads to every guide, and pages keep to the house's layout."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.pages import PAGES, ROOT, anchors, blocks, links, name_of, prose

WIDTH = 120


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_pages__links_and_anchors_resolve(page: Path) -> None:
    broken = []
    for link in links(page):
        if re.match(r"https?:|mailto:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_pages__lines_have_at_most_120_columns(page: Path) -> None:
    text = page.read_text(encoding="utf-8").splitlines()
    long = [n for n, line in enumerate(text, 1) if len(line) > WIDTH and not re.match(r" *\||!\[", line)]
    assert not long


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_pages__code_blocks_are_closed(page: Path) -> None:
    assert not [line for line in prose(page).splitlines() if line.lstrip().startswith("```")]
    assert all(text.strip() for _, text in blocks(page))


def test_readme__links_to_every_guide() -> None:
    """Directly, or as the guide's index, which lists them all."""
    index = ROOT / "docs/guide/README.md"
    linked = {
        (page.parent / link.partition("#")[0]).resolve() for page in (ROOT / "README.md", index) for link in links(page)
    }
    assert index in linked
    assert not {page for page in PAGES if page.is_relative_to(ROOT / "docs")} - linked


@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "README.md"], ids=name_of)
def test_pages__begin_with_their_purpose(page: Path) -> None:
    lines = page.read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# ") and lines[1] == "" and lines[2]


def test_code__named_pages_exist() -> None:
    sources = [
        p
        for folder in ("ovd", "pretrain", "scripts", "benchmarks", "configs", "examples", "tests")
        for p in (ROOT / folder).rglob("*")
    ]
    named = {
        (p.relative_to(ROOT).as_posix(), page)
        for p in [*sources, ROOT / "app.py", ROOT / "Makefile", ROOT / "pyproject.toml"]
        if p.suffix in {".py", ".yaml", ".toml", ""} and p.is_file()
        for page in re.findall(r"\bdocs/[\w/]+\.md\b", p.read_text(encoding="utf-8"))
    }
    assert not {(source, page) for source, page in named if not (ROOT / page).exists()}
