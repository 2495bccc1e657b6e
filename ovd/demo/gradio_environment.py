# SPDX-License-Identifier: Apache-2.0
"""The process that Gradio runs in: environment variables, its import, and a locked folder for uploads.

Gradio and torch are not imported at the top: ``app.py --help`` answers at once.
"""

from __future__ import annotations

import inspect
import logging
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from pretrain.engine.errors import UserError

log = logging.getLogger(__name__)

FOLDER_PREFIX = "ovd-page-"
PROXY_VARIABLES = ("http_proxy", "https_proxy", "all_proxy", "ftp_proxy", "ws_proxy", "wss_proxy")
ROOT_PATH = "GRADIO_ROOT_PATH"  # where a reverse proxy serves the page; the only one of Gradio's variables that counts

_locks: list[int] = []  # descriptors, open until the process ends, however it ends: then the kernel releases the locks


def prepare_environment(folder: str | Path | None = None) -> Path:
    """Switch off everything in Gradio that would call out, and give it a private folder for uploads.

    Must run before Gradio is imported. Folders that killed pages left behind are removed.

    Args:
        folder: where uploads go; a new folder with mode 0700 when None.

    Returns:
        the folder, locked as long as this process lives. The caller deletes it.

    Raises:
        UserError: no folder can be made, or a variable of the environment makes no sense.
    """
    root_path = os.environ.get(ROOT_PATH, "")
    if root_path and not root_path.startswith(("/", "http://", "https://")):
        raise UserError(f"{ROOT_PATH}={root_path!r}: give the path that a proxy serves the page at, like /wordbox")
    ignored = sorted(n for n in os.environ if n.startswith("GRADIO_") and n != ROOT_PATH)
    for name in ignored:
        del os.environ[name]
    if ignored:
        log.warning("%s: ignored, the flags of this page decide (--help)", ", ".join(ignored))
    try:
        if folder is None:
            remove_leftovers(Path(tempfile.gettempdir()))
            target = _new_locked_folder()
        else:
            target = Path(folder)
            target.mkdir(mode=0o700, parents=True, exist_ok=True)
            target.chmod(0o700)
            _lock(target)
    except OSError as problem:
        raise UserError(f"no folder for uploads ({problem}); set TMPDIR to a folder that can be written") from problem
    os.environ["GRADIO_TEMP_DIR"] = str(target)
    # Telemetry, the version check and model hubs: a page about private pictures has no business on the network.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ["DO_NOT_TRACK"] = "1"
    # Gradio computes a table of the last 10,000 answers after each answer, for a monitoring page that is switched off.
    os.environ["GRADIO_ANALYTICS_MAX_EVENTS"] = "1"
    os.environ["GRADIO_ANALYTICS_CACHE_FREQUENCY"] = "1000000000"
    return target


def load_gradio() -> None:
    """Import Gradio with no proxy in the environment, and without its stub files.

    Its httpx fails at import on proxies it does not know (SOCKS), and the page goes through none. And at each import it
    parses all its components to write ``.pyi`` files beside them, which takes half of the 2.3 seconds; it leaves that
    when a class has no file.
    """
    if "gradio" in sys.modules:
        return
    proxies = {name: os.environ.pop(name) for name in list(os.environ) if name.lower() in PROXY_VARIABLES}
    file_of = inspect.getfile

    def no_file(thing: Any) -> str:
        if isinstance(thing, type) and thing.__module__.startswith("gradio."):
            raise OSError("no stub file is wanted")
        return file_of(thing)

    inspect.getfile = no_file  # type: ignore[assignment]
    try:
        import gradio  # noqa: F401
    finally:
        inspect.getfile = file_of
        os.environ.update(proxies)  # a browser that is opened later needs them


def _lock(folder: Path) -> None:
    if (descriptor := _try_lock(folder)) is not None:
        _locks.append(descriptor)


def _new_locked_folder() -> Path:
    """A new folder, with mode 0700. Named when it is locked: a page that starts meanwhile removes unlocked ones."""
    unlocked = Path(tempfile.mkdtemp(prefix=f"new-{FOLDER_PREFIX}"))
    _lock(unlocked)
    return unlocked.rename(unlocked.with_name(unlocked.name.removeprefix("new-")))


def _try_lock(folder: Path) -> int | None:
    """A descriptor that holds the folder's lock; None if another process has it, or there are no such locks."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    descriptor = -1
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY)
        if os.fstat(descriptor).st_uid != os.getuid():
            raise PermissionError
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        if descriptor >= 0:
            os.close(descriptor)
        return None
    return descriptor


def remove_leftovers(parent: Path) -> list[Path]:
    """Remove the folders of pages that were killed: this user's, and locked by no process. Returns them."""
    removed = []
    for folder in sorted(parent.glob(f"{FOLDER_PREFIX}*")):
        if (descriptor := _try_lock(folder)) is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(descriptor)
            removed.append(folder)
    return removed
