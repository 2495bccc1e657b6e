# SPDX-License-Identifier: Apache-2.0
"""Stages that build on each other: the command that makes a missing input."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pretrain.engine.config import Section, plain
from pretrain.engine.config_yaml import REPOSITORY, Item, find_config, read_chain
from pretrain.engine.errors import ConfigError, UserError

OUTPUTS = ("out", "cache")  # keys that name what a run writes itself
SCRIPTS = {
    "runs/teacher": "python scripts/teacher_embeddings.py --phrases runs/teacher/phrases.txt "
    "--out runs/teacher/targets.safetensors",  # docs/guide/clip.md
    "runs/photos/nanodet": "python scripts/convert_nanodet.py package/models/nanodet.json --out runs/photos/nanodet",
    "runs/photos/picodet": "python scripts/convert_picodet.py picodet/model.pdmodel --out runs/photos/picodet",
}
"""Folder → the script that makes it, of what no configuration does."""


def require_stages(cfg: Section) -> None:
    """Refuse a configuration that names what an earlier stage has not made yet.

    Raises:
        UserError: naming each key, and the command that makes what it names.
    """
    missing = [
        (key, value)
        for key, value in _paths(plain(cfg))
        if key.split(".")[0] not in (*OUTPUTS, *cfg.unread_keys()) and not Path(value).exists()
    ]
    commands = stage_commands() | SCRIPTS if missing else {}
    problems = []
    for key, value in missing:
        makers = [command for out, command in commands.items() if f"{value}/".startswith(f"{out}/")]
        if makers:
            problems.append(f"{key}: {value} is not there yet; make it with `{makers[0]}`")
        elif (REPOSITORY / value).exists():
            problems.append(f"{key}: {value} is not in this folder; run the command in {REPOSITORY}")
    if problems:
        raise UserError("; ".join(problems) + f" (or set {missing[0][0]} to one you have)")


def stage_commands() -> dict[str, str]:
    """Output folder of each shipped configuration → the command that makes it."""
    commands: dict[str, str] = {}
    for stage in shipped_stages():
        commands.setdefault(stage.out, f"python -m {stage.module} --config {stage.config}")
    commands.pop("", None)
    return commands


class Stage(NamedTuple):
    """A shipped configuration: its name, the module that runs it, and its output folder."""

    config: str
    module: str
    out: str


def shipped_stages() -> list[Stage]:
    """Every shipped configuration that can be read, those of the upper folders first."""
    stages: list[Stage] = []
    root = REPOSITORY / "configs"
    for path in sorted(root.rglob("*.yaml"), key=lambda path: (len(path.parts), path)):
        name = path.relative_to(root).as_posix()
        try:
            chain, _ = read_chain(find_config(name))
        except ConfigError:
            continue
        merged: dict[str, Item] = {}
        for layer in chain:  # the innermost base first
            merged |= layer.value if isinstance(layer.value, dict) else {}
        module = "pretrain.train" if "method" in merged else "ovd.embed" if "proposer" in merged else "ovd.train"
        stages.append(Stage(name, module, str(merged["out"].value) if "out" in merged else ""))
    return stages


def _paths(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text with a slash in nested values, and its dotted key."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _paths(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _paths(inner, key)
    elif isinstance(value, str) and "/" in value:
        yield key, value
