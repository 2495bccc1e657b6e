# SPDX-License-Identifier: Apache-2.0
"""``wordbox COMMAND …``: every command under one name.

Each is the ``main`` of a module and nothing else: ``wordbox predict`` and ``python -m ovd.predict`` are the same. A
module is imported when its command is called, so that help and mistakes answer at once.
"""

from __future__ import annotations

import importlib
import os

from ovd.commands import COMMANDS, ELSEWHERE, GROUPS
from pretrain.engine.errors import UserError, did_you_mean, run_cli


def main(argv: list[str]) -> int:
    """Run one command; returns its exit status."""
    if "_ARGCOMPLETE" in os.environ:
        from ovd.completion import complete

        complete()
    if not argv or argv[0] in ("-h", "--help", "--help-all"):
        print(help_text())
        return 0 if argv else 2
    if argv[0] in ("-V", "--version"):
        print(f"wordbox {version()}")
        return 0
    name = argv[0]
    if name not in COMMANDS:
        kind = "flag" if name.startswith("-") else "command"
        hint = f" - here it is '{ELSEWHERE[name]}'" if name in ELSEWHERE else did_you_mean(name, COMMANDS)
        raise UserError(f"unknown {kind} '{name}'{hint}; wordbox --help lists the commands")
    return importlib.import_module(COMMANDS[name].module).main(argv[1:]) or 0


def help_text() -> str:
    """Usage and all commands, without importing any of them."""
    width = max(map(len, COMMANDS))
    lines = ["usage: wordbox COMMAND ...", "", "Type class names, see boxes."]
    for title, commands in GROUPS.items():
        lines += ["", f"{title}:", *(f"  {command.name:{width}}  {command.does}" for command in commands)]
    return "\n".join([*lines, "", "wordbox COMMAND --help has the common options, --help-all the others."])


def version() -> str:
    """Of the installed distribution."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("wordbox")
    except PackageNotFoundError:
        return "(not installed)"


def run() -> None:
    """Entry point of the console command."""
    run_cli(main)


if __name__ == "__main__":
    run()
