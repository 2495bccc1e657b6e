# SPDX-License-Identifier: Apache-2.0
"""Completion of ``wordbox`` in a shell, through the package argcomplete.

    eval "$(wordbox completion bash)"          in ~/.bashrc; zsh likewise in ~/.zshrc
    wordbox completion fish > ~/.config/fish/completions/wordbox.fish

Commands, flags and the keys of configurations (``loop.st<TAB>``) are completed, and files where a flag takes one.
"""

from __future__ import annotations

import argparse
import importlib
import os
from typing import Any

from ovd.commands import GROUPS, Command
from pretrain.engine.cli import FLAGS
from pretrain.engine.config import Section
from pretrain.engine.config_choice import ConfigChoice
from pretrain.engine.config_schema import walk
from pretrain.engine.errors import UserError
from pretrain.engine.flags import CommandParser

SHELLS = ("bash", "zsh", "fish")
NEEDED = "completion needs the package argcomplete: pip install argcomplete"


def parser() -> CommandParser:
    """Return the command line."""
    flags = CommandParser("wordbox completion", __doc__)
    flags.add_argument("shell", choices=SHELLS, help="whose completion to print")
    return flags


def main(argv: list[str]) -> int:
    """Print what a shell has to read; returns the exit status."""
    shell = parser().parse_args(argv).shell
    try:
        from argcomplete.shell_integration import shellcode
    except ImportError as problem:
        raise UserError(NEEDED) from problem
    print(shellcode(["wordbox"], True, shell))
    return 0


def complete() -> None:
    """Answer a shell's request for completions and exit; does nothing without argcomplete."""
    try:
        import argcomplete
    except ImportError:
        return
    typed = os.environ.get("COMP_LINE", "").split()
    argcomplete.autocomplete(command_tree(typed[1] if len(typed) > 1 else None))


def command_tree(only: str | None) -> argparse.ArgumentParser:
    """A parser of all commands; only the one requested has its flags, so the others need not be imported."""
    tree = argparse.ArgumentParser(prog="wordbox")
    tree.add_argument("--version", action="store_true")
    below = tree.add_subparsers(parser_class=argparse.ArgumentParser)
    for commands in GROUPS.values():
        for command in commands:
            if command.name == only and command.name != "demo":
                _add(below, command)
            else:
                below.add_parser(command.name, help=command.does)
    return tree


def _add(below: Any, command: Command) -> None:
    if not command.config:
        parser = importlib.import_module(command.module).parser()
        parser.show_all()
        below.add_parser(command.name, parents=[parser], add_help=False)
        return
    module, _, name = command.config.partition(":")
    flags = below.add_parser(command.name)
    flags.add_argument("--config", metavar="FILE")
    for flag in ("print-config", "help-all", *FLAGS):
        flags.add_argument(f"--{flag}", action="store_true")
    keys = [f"{key}=" for key in _keys(vars(importlib.import_module(module))[name])]
    flags.add_argument("key", nargs="*").completer = lambda **_: keys


def _keys(config: type[Section] | ConfigChoice[Any]) -> list[str]:
    """The dotted keys that take a value, of a command's configuration."""
    fields = config.walk() if isinstance(config, ConfigChoice) else walk(config)
    return list(dict.fromkeys(key for key, _ in fields if "[" not in key))


if __name__ == "__main__":
    from pretrain.engine.errors import run_cli

    run_cli(main)
