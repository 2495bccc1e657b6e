# SPDX-License-Identifier: Apache-2.0
"""Commands shown in the pages can be typed: modules, flags, keys, configurations, scripts and make targets exist."""

from __future__ import annotations

import importlib
import importlib.util
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ovd.commands import COMMANDS
from pretrain.engine.errors import UserError
from tests.docs.pages import PAGES, ROOT, blocks, name_of, prose

MAKE_TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
COMMAND = re.compile(r"(?:[A-Z_]+=\S* )*(?:\S*/)?(?:python3?|torchrun|make|wordbox) ")
CONFIGURED = frozenset({"ovd.train", "ovd.embed", "pretrain.train"})
"""These read `--config FILE key=value …`; the others have an `argparse` parser."""


def commands(page: Path) -> Iterator[list[str]]:
    """Words of every command in a block of shell or in backticks that stands there in full."""
    text = "\n".join(text for language, text in blocks(page) if language == "sh")
    lines = re.sub(r"\\\n\s*", " ", text).splitlines() + re.findall(r"`([^`\n]+)`", prose(page))
    for line in (line.strip().removeprefix("$ ") for line in lines):
        if COMMAND.match(line) and "…" not in line and " ..." not in line:
            words = shlex.split(line, comments=True)
            while re.match(r"[A-Z_]+=", words[0]):
                words = words[1:]
            words = words[: words.index(">")] if ">" in words else words
            yield words[: words.index("|")] if "|" in words else words


def test_pages__show_commands() -> None:
    assert sum(1 for page in PAGES for _ in commands(page)) >= 60


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_pages__commands_are_accepted(
    page: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    assert not [f"{shlex.join(words)}: {why}" for words in commands(page) if (why := problem(words, capsys))]


def problem(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What is wrong with a command, or nothing."""
    if words[0].endswith("make"):
        return ", ".join(w for w in words[1:] if re.fullmatch(r"[a-z-]+", w) and w not in MAKE_TARGETS)
    if words[0].endswith("wordbox"):
        command, arguments = words[1], words[2:]
        if command.startswith("-"):
            return ""
        if command not in COMMANDS:
            return f"no command {command}"
        return "" if command == "demo" else refused(COMMANDS[command].module, arguments, capsys)
    if "-m" in words:
        module, *arguments = words[words.index("-m") + 1 :]
        if module.startswith(("ovd.", "pretrain.")):
            return refused(module, arguments, capsys)
    script = next((word for word in words[1:] if word.endswith(".py")), None)
    if script is None or script in {"app.py"}:
        return ""
    if not (ROOT / script).exists():
        return f"no {script}"
    helpers = ("benchmarks/_common.py", "benchmarks/claims/common.py")
    source = "".join((ROOT / file).read_text(encoding="utf-8") for file in (script, *helpers))
    flags = [word.partition("=")[0] for word in words if word.startswith("--")]
    return ", ".join(flag for flag in flags if f'"{flag}"' not in source)


def refused(module: str, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What the command's own parser says against its arguments."""
    if importlib.util.find_spec(module) is None:
        return f"no module {module}"
    main = getattr(importlib.import_module(module), "main", None)
    if main is None or "--help" in arguments:
        return ""
    if module not in CONFIGURED:
        known = output_of(main, ["--help-all"], capsys)
        return ", ".join(
            flag for word in arguments if (flag := word.partition("=")[0]).startswith("--") and flag not in known
        )
    return output_of(main, [*arguments, "--print-config"], capsys, wrong=True) if "--config" in arguments else ""


def output_of(
    main: Callable[[list[str]], object],
    arguments: list[str],
    capsys: pytest.CaptureFixture[str],
    *,
    wrong: bool = False,
) -> str:
    """What a command prints; with `wrong`, only its complaint."""
    try:
        main(arguments)
    except UserError as error:
        return str(error)
    except SystemExit as end:
        out, err = capsys.readouterr()
        return err if end.code else "" if wrong else out
    return ""


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_documented_output__is_real(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Blocks of `console`: a command and its error; `…` stands for what is left out."""
    for text in (text for language, text in blocks(page) if language == "console"):
        command, _, shown = text.partition("\n")
        module, *arguments = shlex.split(command)[3:]  # "$ python -m"
        said = f"error: {output_of(importlib.import_module(module).main, arguments, capsys)}"
        assert re.fullmatch(re.escape(shown.strip()).replace("…", ".*"), said.strip())


@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "CONTRIBUTING.md"], ids=name_of)
def test_pages__named_files_exist(page: Path) -> None:
    text = prose(page)
    files = set(
        re.findall(r"`((?:ovd|pretrain|scripts|benchmarks|examples|tests|configs)/[\w/.-]+\.(?:py|yaml))`", text)
    )
    configs = {f"configs/{name}" for name in re.findall(r"`((?:pretrain|paper|photos|cifar)/[\w/]+\.yaml)`", text)}
    assert not {name for name in files | configs if not (ROOT / name).exists()}
