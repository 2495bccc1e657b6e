# SPDX-License-Identifier: Apache-2.0
"""The command line every command shares: ``--config FILE key=value …`` and a few flags. Imports no torch."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from pydantic.fields import FieldInfo

from pretrain.engine.config import Section, config_hash, dump_config, load_config
from pretrain.engine.config_choice import ConfigChoice
from pretrain.engine.config_schema import describe, overview, walk
from pretrain.engine.config_yaml import find_config, read_chain, read_overrides
from pretrain.engine.errors import ConfigError, did_you_mean

SectionT = TypeVar("SectionT", bound=Section)

FLAGS = {
    "check": "build everything, read two batches, do one step, write nothing, and exit",
    "resume": "resume exactly from the newest good checkpoint in out; refused when training keys changed",
    "overwrite": "start again although out is not empty",
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
    flags: Sequence[str] = ("check", "resume", "overwrite"),
) -> tuple[SectionT, Options]:
    """Parse a command's arguments into its configuration.

    ``--some-key VALUE`` is accepted for every key of the model and means ``some_key=VALUE``.

    Args:
        model: what the command's configuration consists of; the keys of all sections where a key chooses.
        argv: arguments after the program name.
        prog: how the command is called, for the help: ``python -m ovd.train``.
        doc: what the command does; first paragraph of the help.
        flags: which of ``FLAGS`` the command has.

    Raises:
        ConfigError: with everything wrong on the command line and in the configuration.
        SystemExit: 0, after ``--help``, ``--help-all`` or ``--print-config``.
    """
    fields = dict(model.walk() if isinstance(model, ConfigChoice) else walk(model))
    arguments = _Arguments.read(argv, fields=fields, switches=("print-config", *flags))
    if arguments.wants_help:
        chosen = _chosen(model, arguments.config, arguments.overrides)
        if arguments.section is not None:
            print(describe(chosen, arguments.section))
        else:
            print(_help(chosen, prog, doc, flags, arguments.everything))
        raise SystemExit(0)
    if {"resume", "overwrite"} <= arguments.switches:
        arguments.problems.append("--resume and --overwrite exclude each other")
    if arguments.problems:
        raise ConfigError(arguments.problems)
    cfg = load_config(model, arguments.config, arguments.overrides)
    options = Options(**dict.fromkeys(arguments.switches, True), config=arguments.config)
    if options.print_config:
        print(f"{dump_config(cfg)}# hash of the training keys: {config_hash(cfg)}")
        raise SystemExit(0)
    return cfg, options


@dataclass(kw_only=True)
class _Arguments:
    """The arguments of a command, sorted.

    Attributes:
        config: of ``--config``.
        overrides: ``key=value``.
        switches: flags without a value that are given, as names of `Options`.
        wants_help, everything, section: ``--help`` or ``--help-all``; all keys; the section that is named.
        problems: what is wrong.
    """

    config: str | None = None
    overrides: list[str] = field(default_factory=list)
    switches: set[str] = field(default_factory=set)
    wants_help: bool = False
    everything: bool = False
    section: str | None = None
    problems: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, argv: Sequence[str], *, fields: Mapping[str, FieldInfo], switches: Sequence[str]) -> _Arguments:
        """Sort the arguments.

        Args:
            argv: they.
            fields: of the configuration, by dotted key.
            switches: flags without a value.
        """
        arguments, remaining = cls(), list(argv)
        while remaining:
            argument = remaining.pop(0)
            name, equals, _ = argument.removeprefix("--").partition("=")
            if argument in ("-h", "--help", "--help-all"):
                arguments._help(argument, remaining)
            elif not argument.startswith("-"):
                arguments._override(argument)
            elif argument.startswith("--") and not equals and name in switches:
                arguments.switches.add(name.replace("-", "_"))
            elif argument.startswith("--") and (name == "config" or name.replace("-", "_") in fields):
                arguments._key(argument, remaining, fields)
            else:
                arguments._unknown(argument, remaining, ("help", "help-all", "config", *switches, *fields))
        return arguments

    def _help(self, argument: str, remaining: list[str]) -> None:
        self.wants_help, self.everything = True, self.everything or argument == "--help-all"
        if remaining and not remaining[0].startswith("-") and "=" not in remaining[0]:
            self.section = remaining.pop(0)

    def _override(self, argument: str) -> None:
        if "=" in argument:
            self.overrides.append(argument)
        elif argument.endswith((".yaml", ".yml")):
            self.problems.append(f"'{argument}': name the file with --config {argument}")
        else:
            self.problems.append(f"'{argument}': expected key=value or a flag; see --help")

    def _key(self, argument: str, remaining: list[str], fields: Mapping[str, FieldInfo]) -> None:
        """``--config FILE``, ``--key VALUE`` or ``--key=VALUE``; a key that is true or false needs no value."""
        name, equals, value = argument.removeprefix("--").partition("=")
        key = name.replace("-", "_")
        if not equals and name != "config" and fields[key].annotation is bool:
            value = "true"
        elif not equals and (not remaining or remaining[0].startswith("--")):
            self.problems.append(f"{argument} needs a value" + (": a YAML file" if name == "config" else ""))
            return
        elif not equals:
            value = remaining.pop(0)
        if name != "config":
            self.overrides.append(f"{key}={value}")
        elif self.config is not None:
            self.problems.append("--config is given twice; let one file inherit from the other with 'base:'")
        else:
            self.config = value

    def _unknown(self, argument: str, remaining: list[str], names: Sequence[str]) -> None:
        hint = did_you_mean(argument, [f"--{name}" for name in names])
        self.problems.append(f"unknown flag '{argument}'{hint or '; see --help'}")
        if remaining and not remaining[0].startswith("-") and "=" not in remaining[0]:
            remaining.pop(0)  # most likely its value: one mistake, one problem


def _chosen(
    model: type[SectionT] | ConfigChoice[SectionT], config: str | None, overrides: Sequence[str]
) -> type[SectionT]:
    """The section whose keys the help shows: that of the named configuration, as far as it can be read."""
    if not isinstance(model, ConfigChoice):
        return model
    try:
        chain, _ = read_chain(find_config(config)) if config is not None else ([], [])
        changes, _ = read_overrides(overrides, lambda old, new: new)
        return model.choose([*chain, changes])
    except ConfigError:
        return model.sections[model.default]


def _help(model: type[Section], prog: str, doc: str, flags: Sequence[str], everything: bool) -> str:
    rows = {
        "--config FILE": "configuration; a bare name is looked up under configs/",
        "key=value": "set one key, for example loop.steps=100; the last one wins; --key value is the same",
        "--print-config": "print the resolved configuration as YAML with its hash, and exit",
        **{f"--{flag}": FLAGS[flag] for flag in flags},
        "--help SECTION": "the keys of one section below, or one key",
        "--help-all": "all keys of all sections",
    }
    usage = f"usage: {prog} [--config FILE] [key=value ...] [flags]"
    lines = [f"  {name:<18} {text}" for name, text in rows.items()]
    plain_doc = inspect.cleandoc(doc).replace("``", "`")  # a module's docstring will do
    keys = describe(model) if everything else overview(model)
    return "\n".join([usage, "", plain_doc, "", *lines, "", keys])
