# SPDX-License-Identifier: Apache-2.0
"""Atomic writes, locks and hashes of files. Standard library only: commands import it before torch."""

from __future__ import annotations

import contextlib
import filecmp
import gzip
import hashlib
import json
import os
import shutil
import uuid
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pretrain.engine.errors import MACHINE_FAULTS, UserError, shorten

EXPORTED = "exported"  # folder of a run with what it hands over
NAME_BYTES = 255  # of a file's name: ext4, XFS, APFS, NFS and NTFS alike


def sha256_of(path: str | Path) -> str:
    """The sha256 of a file, in hex."""
    digest = hashlib.sha256()  # hashlib.file_digest needs Python 3.11
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


class _RepeatedKeyError(ValueError):
    """A key that an object has twice."""


def parse_json(text: str) -> Any:
    """Content of a JSON text, in which no object may have a key twice: Python's parser would drop the first value.

    Raises:
        ValueError: not JSON (`json.JSONDecodeError`), or a key that is repeated.
    """
    return json.loads(text, object_pairs_hook=_table)


def _table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        repeated = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise _RepeatedKeyError(
            f"the key {shorten(repr(repeated))} stands twice in one object, and only one of them can count"
        )
    return table


def read_json(path: str | os.PathLike[str], *, hint: str = "") -> Any:
    """Content of a JSON file, or of one that gzip packed (``.json.gz``).

    Args:
        path: the file.
        hint: what the file is or how to get it, as a sentence without its end; closes every message.

    Raises:
        UserError: missing, a folder, unreadable, not UTF-8, not JSON (with line and column), or with a key that an
            object has twice.
    """
    path = Path(path)
    closing = f"; {hint}" if hint else ""
    try:
        packed = path.suffix == ".gz"
        return parse_json((gzip.decompress(path.read_bytes()) if packed else path.read_bytes()).decode("utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file{closing}.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file in UTF-8 (byte {error.start}). Is it packed{closing}?") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: not a whole gzip file ({error}){closing}.") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}){closing}.") from error
    except json.JSONDecodeError as error:
        where = f"{error.msg} at line {error.lineno}, column {error.colno}"
        raise UserError(f"{path}: not JSON: {where}{closing}.") from error
    except (RecursionError, ValueError) as error:
        kind = "" if isinstance(error, _RepeatedKeyError) else "not JSON: "
        raise UserError(f"{path}: {kind}{error}{closing}.") from error


def read_text(path: str | os.PathLike[str], *, hint: str = "") -> str:
    """Content of a UTF-8 text file, without a byte order mark.

    Args:
        path: the file.
        hint: what the file is, as a sentence without its end; closes every message.

    Raises:
        UserError: missing, a folder, unreadable, or not UTF-8.
    """
    path = Path(path)
    closing = f"; {hint}" if hint else ""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file in UTF-8 (byte {error.start}); save it as UTF-8{closing}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}){closing}") from error


def flush_to_disk(path: Path) -> None:
    """Make a file's content, or the renames and new files of a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fitting_name(stem: str, ending: str) -> str:
    """``stem`` + ``ending``; a stem too long for a file system is cut, and closed by its hash to stay unique."""
    room = NAME_BYTES - len(os.fsencode(ending))
    if len(os.fsencode(stem)) <= room:
        return stem + ending
    mark = f"~{hashlib.sha256(os.fsencode(stem)).hexdigest()[:8]}"
    while len(os.fsencode(stem)) > room - len(mark):
        stem = stem[:-1]
    return stem + mark + ending


def require_writable(folder: Path) -> None:
    """Make a folder for results that come much later, and write into it once.

    Raises:
        UserError: it cannot be made, or nothing can be written there.
    """
    probe = folder / f".{uuid.uuid4().hex}.tmp"
    write_atomically(probe, b"")
    probe.unlink()


def require_writable_file(path: Path, *, flag: str) -> None:
    """Make the folder of a file for results that come much later, and write into it once.

    Args:
        path: the file; an existing one stays as it is.
        flag: that names it, such as ``--report``.

    Raises:
        UserError: it is a folder, or nothing can be written there.
    """
    if path.is_dir():
        raise UserError(f"{flag} {path}: is a folder; name a file in it")
    require_writable(path.parent)


@contextlib.contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A new folder beside ``target`` to write into, which takes its place when all is written; else nothing is left.

    Several processes may write the same ``target`` at once, each in a folder of its own. A ``target`` that holds the
    same files by then stays as it is: its writer may be using them.

    Raises:
        UserError: the disk is full or not writable; an old ``target`` is untouched.
    """
    temporary = target.with_name(fitting_name(f".{target.name}", f".{uuid.uuid4().hex}.new"))
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for path in temporary.rglob("*"):  # else a power cut could leave the new name and empty files
            flush_to_disk(path)
        with locked_folder(target.parent):
            if not _same_files(temporary, target):
                _replace_folder(target, temporary)
    except OSError as error:
        if error.errno not in MACHINE_FAULTS:
            raise
        text = f"cannot write {target}: {error.strerror or error}; free some space or choose another folder"
        raise UserError(text) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def locked_folder(folder: Path, *, wait: bool = True) -> Iterator[bool]:
    """Let one process in at a time, where the file system has such locks. The kernel drops it when the process ends.

    Args:
        folder: exists.
        wait: for the process that is in.

    Yields:
        False: another process is in, which is not waited for.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield True
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        alone = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            alone = False
        except OSError:  # NFS locks no folders
            pass
        yield alone
    finally:
        os.close(descriptor)


def write_problem(problem: OSError, folder: Path) -> str:
    """What kept a folder from being written; where it is somebody else's, whose, and who writes.

    Args:
        problem: as the system reports it.
        folder: that was to be written, whether it is there or not.
    """
    text = problem.strerror or str(problem)
    if not isinstance(problem, PermissionError) or not hasattr(os, "getuid"):
        return text
    nearest = next((path for path in (folder, *folder.parents) if os.path.exists(path)), None)
    if nearest is None or (owner := nearest.stat().st_uid) == os.getuid():
        return text
    return f"{text}; {nearest} belongs to user {owner}, and this command runs as user {os.getuid()}"


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Make a folder for results and lock it, so that two commands do not mix their results.

    Raises:
        UserError: another command writes there, or the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot write there: {write_problem(error, folder)}") from error
    with locked_folder(folder, wait=False) as alone:
        if not alone:
            raise UserError(f"{folder}: another command writes there; wait for it, or give another --out")
        yield


def _same_files(one: Path, other: Path) -> bool:
    """Whether two folders hold files of the same names and bytes."""
    names = [sorted(path.relative_to(folder) for path in folder.rglob("*")) for folder in (one, other)]
    return names[0] == names[1] and all(
        (other / name).is_dir() if (one / name).is_dir() else filecmp.cmp(one / name, other / name, shallow=False)
        for name in names[0]
    )


def _replace_folder(target: Path, replacement: Path) -> None:
    """Rename ``replacement`` to ``target``; an old one is whole until then, and removed after."""
    old = replacement.with_suffix(".old")
    if target.is_dir() and not target.is_symlink():
        target.rename(old)
    try:
        replacement.rename(target)
    except BaseException:  # Ctrl-C, too
        if old.is_dir() and not target.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def write_json(path: Path, value: object, *, indent: int | None = None) -> None:
    """Replace a file's content by JSON, see `write_atomically`.

    A file name that is no UTF-8 holds surrogates, which are written as ``\\udcXX``: any reader takes the file, and
    Python's os.fsencode gives the name back.
    """
    write_atomically(path, json.dumps(value, ensure_ascii=False, indent=indent).encode("utf-8", "backslashreplace"))


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a file's content so that a reader sees the old or the new content, never a part.

    Raises:
        UserError: if the disk is full or not writable; the old file is untouched.
    """
    # Machines may share a folder, and numbers: a random name.
    temporary = path.with_name(fitting_name(f".{path.name}", f".{uuid.uuid4().hex}.tmp"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        flush_to_disk(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):  # where its folder is none
            temporary.unlink()
        text = f"cannot write {path}: {error.strerror or error}; free some space or choose another folder"
        raise UserError(text) from error
