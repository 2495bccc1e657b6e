# SPDX-License-Identifier: Apache-2.0
"""Stages that build on each other: which command makes what another one lacks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pretrain.engine.config import Section, find_config, plain
from pretrain.engine.config_yaml import REPOSITORY, read_chain
from pretrain.engine.errors import ConfigError, UserError

OUTPUTS = ("out", "cache")  # keys that name what a run writes itself


def require_stages(cfg: Section) -> None:
    """Refuse a configuration that names what an earlier stage has not made yet.

    Raises:
        UserError: naming each key, and the command that makes what it names.
    """
    missing = [
        (key, value)
        for key, value in _paths(plain(cfg))
        if key.split(".")[0] not in OUTPUTS and not Path(value).exists()
    ]
    commands = stage_commands() if missing else {}
    problems = []
    for key, value in missing:
        makers = [command for out, command in commands.items() if f"{value}/".startswith(f"{out}/")]
        if makers:
            problems.append(f"{key}: {value} is not there yet; make it with `{makers[0]}`")
    if problems:
        raise UserError("; ".join(problems) + f" (or set {missing[0][0]} to one you have)")


def stage_commands() -> dict[str, str]:
    """Output folder of each shipped configuration → the command that makes it."""
    commands: dict[str, str] = {}
    root = REPOSITORY / "configs"
    for path in sorted(root.rglob("*.yaml"), key=lambda path: (len(path.parts), path)):
        name = path.relative_to(root).as_posix()
        try:
            chain, _ = read_chain(find_config(name))
        except ConfigError:
            continue
        merged: dict[str, Any] = {}
        for layer in chain:  # the innermost base first
            merged |= layer.value if isinstance(layer.value, dict) else {}
        out = str(merged["out"].value) if "out" in merged else ""
        module = "pretrain.train" if "method" in merged else "ovd.embed" if "proposer" in merged else "ovd.train"
        commands.setdefault(out, f"python -m {module} --config {name}")
    commands.pop("", None)
    return commands


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
