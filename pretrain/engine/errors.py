# SPDX-License-Identifier: Apache-2.0
"""Errors that a user can fix, and the one place where a command turns them into an exit status.

Anything that is neither a ``UserError`` nor a fault of the machine (a full disk, too little memory) is a defect of this
program and keeps its traceback.
"""

from __future__ import annotations

import difflib
import errno
import gc
import io
import os
import re
import shutil
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

MACHINE_FAULTS = frozenset({
    errno.EACCES, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ELOOP, errno.EMFILE, errno.ENAMETOOLONG, errno.ENFILE,
    errno.ENOSPC, errno.EPERM, errno.EROFS, errno.ESTALE,
})  # fmt: skip
_CONTROLS = re.compile("\n(?!  )|[\0-\x08\x0b-\x1f\x7f\x80-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+:/", re.IGNORECASE)  # of which Path has left one slash; C:/ has one letter
NEEDS_TORCH = 'pip install "wordbox[train]"'
"""The line that brings torch and all that trains but Detectron2."""
NEEDS_DETECTRON2 = "python -m ovd.build_detectron2"
"""The line that brings Detectron2, which no package index has."""
TRAINING_PACKAGES = frozenset({"detectron2", "fvcore", "open_clip", "scipy", "timm", "torch", "torchvision"})
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, what a shell reports
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE, what a C program killed by ``| head`` reports


class UserError(Exception):
    """A mistake in what the user gave. The message names the file, key or class and the next step."""


class ConfigError(UserError):
    """Everything that is wrong with a configuration.

    Attributes:
        problems: one line per problem, each beginning with where it stands (``file:line`` or the override).
    """

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems: list[str] = list(problems)
        if len(self.problems) == 1:
            message = self.problems[0]
        else:
            message = "\n  ".join([f"{len(self.problems)} problems in the configuration:", *self.problems])
        super().__init__(message)


class BadImageError(UserError):
    """An image file that cannot be read.

    Attributes:
        path: the file.
    """

    def __init__(self, path: str | os.PathLike[str], reason: str = "cannot be read as an image") -> None:
        self.path = Path(path)
        self.reason = reason
        super().__init__(f"{self.path}: {reason}")

    def __reduce__(self) -> tuple[type[BadImageError], tuple[str, str]]:
        # Default pickling calls cls(message); data-loader workers send this exception between processes.
        return BadImageError, (str(self.path), self.reason)


def warn(text: object) -> None:
    """Print a warning on standard error, on one line."""
    print(on_one_line(f"warning: {text}"), file=sys.stderr, flush=True)


def first_line(error: BaseException) -> str:
    """The first line of another library's error, or its type when it has no text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def shorten(text: str, limit: int = 80) -> str:
    """``text``, cut to ``limit`` characters: a message quotes what was given, however long that is."""
    return text if len(text) <= limit else text[: limit - 3] + "..."


def on_one_line(text: str) -> str:
    r"""``text`` with the control characters that names of files may hold written as ``\n``, ``\x1b`` and so on.

    A line that is indented was meant as one.
    """
    return _CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


def nearest(word: str, choices: Iterable[str], count: int = 3) -> list[str]:
    """The ``choices`` spelt most like ``word``, best first; empty when none is close."""
    by_lower = {choice.lower(): choice for choice in choices}
    return [by_lower[m] for m in difflib.get_close_matches(word.lower(), list(by_lower), n=count, cutoff=0.6)]


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """``" - did you mean 'x'?"`` to append to a message, or nothing when no choice is close."""
    close = nearest(word, choices, 1)
    return f" - did you mean '{close[0]}'?" if close else ""


def near_names(word: str, choices: Iterable[str]) -> str:
    """``"; did you mean x or y?"`` to append to a message, or nothing when no choice is close."""
    close = nearest(word, choices)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def absent(path: str | os.PathLike[str], fact: str = "no such file or folder") -> str:
    """What to say of a path that is not there: ``fact``, or why it cannot be a path of this machine."""
    text = os.fspath(path)
    if _ADDRESS.match(text):
        return "is an address, and nothing is fetched from the network; download it and give the file"
    if "*" in text:
        return f"{fact}; patterns are for the shell: leave the quotes out, or give the folder"
    return fact


def fault_of_the_machine(error: OSError) -> str | None:
    """Message about a full, read-only or forbidden disk, whichever call met it; None: it is none of these."""
    if isinstance(error, shutil.Error) and error.args and isinstance(error.args[0], list) and error.args[0]:
        source, target, reason = error.args[0][0]  # of copying a folder, a list of what could not be copied
        return f"{source} cannot be copied to {target}: {reason}"
    if error.errno not in MACHINE_FAULTS:
        return None
    where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
    return f"{where}{error.strerror}; free some space, or choose a folder that you can read and write"


def out_of_memory(error: BaseException) -> str | None:
    """The message for an out-of-memory error of the machine or a GPU; None for other errors.

    torch has no class of its own for the memory of the machine, and is not imported here.
    """
    text = str(error)
    full = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if not full and not (isinstance(error, RuntimeError) and "DefaultCPUAllocator" in text):
        return None
    request = re.search(r"allocate (\d+) bytes|allocate ([\d.]+ [KMGT]iB)", text)
    size = "" if request is None else f" ({request[2] or f'{int(request[1]) / 1e9:.1f} GB'} more were requested)"
    return f"out of memory{size}; training needs less with a smaller loop.batch_size or a larger loop.accumulate"


def ignore_old_torch_calls() -> None:
    """Silence torch's deprecation warnings about calls by Detectron2 and its libraries.

    Nothing a user could change.
    """
    warnings.filterwarnings("ignore", message=".*torch.jit.script.*", category=FutureWarning)
    warnings.filterwarnings("ignore", message="torch.meshgrid: ", category=UserWarning)


def run_cli(main: Callable[[list[str]], int | None], argv: list[str] | None = None) -> NoReturn:
    """Run a command's ``main`` and end the process with its exit status.

    Args:
        main: takes the arguments after the program name; returns the exit status, ``None`` meaning 0.
        argv: arguments; those of the process when ``None``.

    Raises:
        SystemExit: always. 2 after a ``UserError`` (printed as ``error: …`` on stderr), 130 after Ctrl-C, 141 when
            the reader of standard output went away, otherwise what ``main`` returned or raised. Also 2 where the
            machine is at fault (`fault_of_the_machine`, `out_of_memory`). Other exceptions pass.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a Latin-1 terminal must not turn an error into a traceback
    ignore_old_torch_calls()
    try:
        status = main(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
    except UserError as error:
        # Every process that torchrun starts reads the same configuration: one of them says what is wrong with it.
        if not isinstance(error, ConfigError) or os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {on_one_line(str(error))}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in TRAINING_PACKAGES:
            raise
        is_next = error.name.partition(".")[0] == "detectron2" and find_spec("torch") is not None
        remedy = NEEDS_DETECTRON2 if is_next else NEEDS_TORCH
        print(f"error: this needs {error.name}, which is not installed: {remedy}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        # The interpreter flushes stdout once more at exit; give it somewhere to go (Python docs, signal module).
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_BROKEN_PIPE)
    except OSError as error:
        fault = fault_of_the_machine(error)
        if fault is None:
            raise
        print(f"error: {on_one_line(fault)}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    except (MemoryError, RuntimeError) as error:
        fault = out_of_memory(error)
        if fault is None:
            raise
        print(f"error: {fault}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    finally:
        gc.freeze()  # the process ends: without it all that is loaded, torch too, is searched for garbage once more
        if argv is None:  # the work is done: a signal that comes now ends the process, not with a traceback
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_DFL)
    sys.exit(0 if status is None else status)
