# SPDX-License-Identifier: Apache-2.0
"""The command line every command shares: ``--config FILE key=value …`` and a few flags. Imports no torch."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from pretrain.engine.config import (
    ConfigChoice,
    Section,
    config_hash,
    describe,
    dump_config,
    find_config,
    load_config,
)
from pretrain.engine.config_schema import overview, walk
from pretrain.engine.config_yaml import read_chain, read_overrides
from pretrain.engine.errors import ConfigError, did_you_mean

SectionT = TypeVar("SectionT", bound=Section)

FLAGS = {
    "check": "Build everything, read two batches, do one step, write nothing, and end.",
    "resume": "Go on from the newest good checkpoint in out, exactly; refused when training keys changed.",
    "overwrite": "Start anew although out is not empty.",
}


@dataclass(frozen=True)
class Options:
    """Flags of a command line that are not part of the configuration."""

    check: bool = False
    resume: bool = False
    overwrite: bool = False
    print_config: bool = False
    config: str | None = None


def command_line(
    model: type[SectionT] | ConfigChoice[SectionT],
    argv: Sequence[str],
    *,
    prog: str,
    doc: str,
    default_config: str | None = None,
    flags: Sequence[str] = ("check", "resume", "overwrite"),
) -> tuple[SectionT, Options]:
    """Parse a command's arguments into its configuration.

    ``--some-key VALUE`` is accepted for every key of the model and means ``some_key=VALUE``.

    Args:
        model: What the command's configuration consists of; the keys of all sections where a key chooses.
        argv: Arguments after the program name.
        prog: How the command is called, for the help: ``python -m ovd.train``.
        doc: What the command does; first paragraph of the help.
        default_config: File used without ``--config``; ``None``: the defaults of the model alone.
        flags: Which of ``FLAGS`` the command has.

    Raises:
        ConfigError: With everything wrong on the command line and in the configuration.
        SystemExit: 0, after ``--help``, ``--help-all`` or ``--print-config``.
    """
    fields = dict(model.walk() if isinstance(model, ConfigChoice) else walk(model))
    switches = ("print-config", *flags)
    problems: list[str] = []
    overrides: list[str] = []
    seen: set[str] = set()
    config: str | None = None
    wants_help, everything, section = False, False, None
    rest = list(argv)
    while rest:
        argument = rest.pop(0)
        name, equals, value = argument.removeprefix("--").partition("=")
        key = name.replace("-", "_")
        if argument in ("-h", "--help", "--help-all"):
            wants_help, everything = True, everything or argument == "--help-all"
            if rest and not rest[0].startswith("-") and "=" not in rest[0]:
                section = rest.pop(0)
        elif not argument.startswith("-"):
            if equals:
                overrides.append(argument)
            elif argument.endswith((".yaml", ".yml")):
                problems.append(f"'{argument}': name the file with --config {argument}")
            else:
                problems.append(f"'{argument}': expected key=value or a flag; see --help")
        elif argument.startswith("--") and not equals and name in switches:
            seen.add(key)
        elif argument.startswith("--") and (name == "config" or key in fields):
            if not equals and name != "config" and fields[key].annotation is bool:
                value = "true"
            elif not equals and (not rest or rest[0].startswith("--")):
                problems.append(f"{argument} needs a value" + (": a YAML file" if name == "config" else ""))
                continue
            elif not equals:
                value = rest.pop(0)
            if name != "config":
                overrides.append(f"{key}={value}")
            elif config is not None:
                problems.append("--config is given twice; let one file inherit from the other with 'base:'")
            else:
                config = value
        else:
            hint = did_you_mean(
                argument, [f"--{known}" for known in ("help", "help-all", "config", *switches, *fields)]
            )
            problems.append(f"unknown flag '{argument}'{hint or '; see --help'}")
            if rest and not rest[0].startswith("-") and "=" not in rest[0]:
                rest.pop(0)  # most likely its value: one mistake, one problem
    if config is None:
        config = default_config
    if wants_help:
        shown = _chosen(model, config, overrides)
        print(
            _help(shown, prog, doc, default_config, flags, everything) if section is None else describe(shown, section)
        )
        raise SystemExit(0)
    if {"resume", "overwrite"} <= seen:
        problems.append("--resume and --overwrite exclude each other")
    if problems:
        raise ConfigError(problems)
    cfg = load_config(model, config, overrides)
    options = Options(**dict.fromkeys(seen, True), config=config)
    if options.print_config:
        print(f"{dump_config(cfg)}# hash of the training keys: {config_hash(cfg)}")
        raise SystemExit(0)
    return cfg, options


def _chosen(
    model: type[SectionT] | ConfigChoice[SectionT], config: str | None, overrides: Sequence[str]
) -> type[SectionT]:
    """Whose keys the help shows: those of the configuration that is named, as far as it can be read."""
    if not isinstance(model, ConfigChoice):
        return model
    try:
        chain, _ = read_chain(find_config(config)) if config is not None else ([], [])
        changes, _ = read_overrides(overrides, lambda old, new: new)
        return model.choose([*chain, changes])
    except ConfigError:
        return model.sections[model.default]


def _help(
    model: type[Section], prog: str, doc: str, default_config: str | None, flags: Sequence[str], everything: bool
) -> str:
    default = f" Without it: {default_config}." if default_config else ""
    rows = {
        "--config FILE": f"Configuration; a bare name is looked up under configs/.{default}",
        "key=value": "Set one key, for example loop.steps=100; a later one wins. --key value is the same.",
        "--print-config": "Print the resolved configuration as YAML and its hash, and end.",
        **{f"--{flag}": FLAGS[flag] for flag in flags},
        "--help SECTION": "The keys of one section below, or one key.",
        "--help-all": "All keys of all sections.",
    }
    usage = f"usage: {prog} [--config FILE] [key=value ...] [flags]"
    lines = [f"  {left:<18} {right}" for left, right in rows.items()]
    plain_doc = inspect.cleandoc(doc).replace("``", "`")  # a module's docstring will do
    keys = describe(model) if everything else overview(model)
    return "\n".join([usage, "", plain_doc, "", *lines, "", keys])
