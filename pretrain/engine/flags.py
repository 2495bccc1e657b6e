# SPDX-License-Identifier: Apache-2.0
"""Flags of the commands without a configuration file. Imports no torch.

A short ``--help``, all of it in ``--help-all``, and mistakes that are ``UserError``.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

from pretrain.engine.errors import UserError, nearest


class CommandParser(argparse.ArgumentParser):
    """A parser whose ``--help`` shows the common options and whose ``--help-all`` shows the rest.

    Args:
        prog: how the command is called, ``wordbox predict``.
        description: one or a few lines: what the command does.
        details: what ``--help-all`` says in place of the description.
        options: of `argparse.ArgumentParser`.

    Attributes:
        elsewhere: flags of similar tools → what they are here, for the message about an unknown one.
    """

    def __init__(
        self, prog: str | None = None, description: str | None = None, *, details: str | None = None, **options: Any
    ) -> None:
        formatter = options.pop("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(
            prog=prog, description=description, add_help=False, formatter_class=formatter, allow_abbrev=False, **options
        )
        self._details = details
        self._hidden: dict[argparse.Action, str | None] = {}
        self.elsewhere: Mapping[str, str] = {}
        self.add_argument("-h", "--help", action="help", help="this text")
        self._help_all = self.add_argument(
            "--help-all",
            action=_ShowAll,
            nargs=0,
            default=argparse.SUPPRESS,
            help="at length" if details else argparse.SUPPRESS,
        )

    def hide(self, *names: str) -> None:
        """Leave options to ``--help-all``.

        Args:
            names: their ``dest``.
        """
        by_name = {action.dest: action for action in self._actions}
        for name in names:
            action = by_name[name]
            self._hidden[action], action.help = action.help, argparse.SUPPRESS
        self._help_all.help = f"{len(self._hidden)} more options"

    def show_all(self) -> None:
        """Show what `hide` left out, and the details."""
        for action, text in self._hidden.items():
            action.help = text
        self._hidden.clear()
        self._help_all.help = argparse.SUPPRESS
        self.description = self._details or self.description

    def error(self, message: str) -> NoReturn:
        """Raise a `UserError` instead of printing the usage and leaving."""
        if unknown := re.fullmatch(r"unrecognized arguments: (.*)", message):
            unknown_flag = unknown[1].split()[0].partition("=")[0]
            close = nearest(unknown_flag.lstrip("-"), [flag.lstrip("-") for flag in self.flags()], 1)
            if unknown_flag in self.elsewhere:
                message += f" - here it is {self.elsewhere[unknown_flag]}"
            elif close and unknown_flag.startswith("--"):
                message += f" - did you mean '--{close[0]}'?"
            elif not unknown_flag.startswith("-"):
                message += ". Values with spaces or commas go in quotes"
        if flag := re.fullmatch(r"argument (?:.*/)?(--[\w-]+): expected one argument", message):
            message += f"; one that begins with a minus is written {flag[1]}=-VALUE"
        raise UserError(f"{message}; see {self.prog} --help")

    def flags(self) -> Iterator[str]:
        """Every flag, ``--out`` and so on."""
        for action in self._actions:
            yield from action.option_strings


class _ShowAll(argparse.Action):
    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        assert isinstance(parser, CommandParser)
        parser.show_all()
        parser.print_help()
        parser.exit()


def integer(lowest: int, highest: int | None = None) -> Callable[[str], int]:
    """An argparse type: an integer in a range."""

    def read(text: str) -> int:
        number = int(text)
        if number < lowest or (highest is not None and number > highest):
            span = f"from {lowest} to {highest}" if highest is not None else f"at least {lowest}"
            raise argparse.ArgumentTypeError(f"{text} must be {span}")
        return number

    read.__name__ = "integer"  # argparse names it in its message about what is no number
    return read


def above_zero(text: str) -> float:
    """An argparse type: a finite number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} must be above 0")
    return number


def share(text: str) -> float:
    """An argparse type: a number from 0 to 1."""
    number = float(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{text} must be between 0 and 1")
    return number


share.__name__ = "number"
