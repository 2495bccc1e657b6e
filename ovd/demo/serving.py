# SPDX-License-Identifier: Apache-2.0
"""Serve a page: environment, address, and one uvicorn server in a thread, behind the limits of `ovd.demo.limits`.

Gradio's own ``launch`` is not used: it takes neither a socket nor a protocol nor a limit of connections, asks itself
over whatever proxy the environment names, and reads a dozen ``GRADIO_`` variables. `gradio.mount_gradio_app` is the
documented other way. Gradio and torch are not imported at the top: ``app.py --help`` answers at once.
"""

from __future__ import annotations

import errno
import inspect
import ipaddress
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import webbrowser
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TypedDict

from ovd.demo.request_queue import WAITING
from pretrain.engine.errors import UserError

if TYPE_CHECKING:
    import gradio as gr
    from fastapi import FastAPI
    from starlette.types import ASGIApp
    from uvicorn.protocols.http.h11_impl import H11Protocol

    from ovd.demo.bodies import Limits

log = logging.getLogger(__name__)

FOLDER_PREFIX = "ovd-page-"
THREADS = WAITING + 8  # all admitted requests, most of them waiting, and some for Gradio's own work
SHUTDOWN_SECONDS = 2  # seconds that running requests get when the page stops
PROXY_VARIABLES = ("http_proxy", "https_proxy", "all_proxy", "ftp_proxy", "ws_proxy", "wss_proxy")
ROOT_PATH = "GRADIO_ROOT_PATH"  # where a reverse proxy serves the page; the only one of Gradio's variables that counts


def prepare_environment(folder: str | Path | None = None) -> Path:
    """Switch off everything in Gradio that would call out, and give it a private folder for uploads.

    Must run before Gradio is imported. Folders that killed pages left behind are removed.

    Args:
        folder: where uploads go; a new folder with mode 0700 when None.

    Returns:
        The folder, locked as long as this process lives. The caller deletes it.

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


_locks: list[
    int
] = []  # descriptors, open until the process ends: the kernel lets go of the locks then, however it ends


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


def plain_host(host: str) -> str:
    """An address as sockets want it: ``[::1]`` without its brackets."""
    return host[1:-1] if host.startswith("[") and host.endswith("]") else host


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    try:
        return ipaddress.ip_address(plain_host(host)).is_loopback
    except ValueError:
        return host == "localhost"


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens at the address: nobody can take the port between this check and the start.

    A client that connects before the start waits.

    Args:
        host: name or address, IPv6 with or without brackets.
        port: 0 for any free one.

    Raises:
        UserError: the port is taken or not allowed, or the host is not an address of this machine.
    """
    try:
        return _bound_socket(plain_host(host), port)
    except (socket.gaierror, UnicodeError) as problem:
        raise UserError(f"--host {host}: not an address of this machine") from problem
    except OverflowError as problem:
        raise UserError(f"--port {port}: must be between 0 and 65535") from problem
    except PermissionError as problem:
        raise UserError(f"--port {port}: not allowed for this user; take one above 1023") from problem
    except OSError as problem:
        if problem.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
            raise UserError(f"--host {host}: not an address of this machine ({problem.strerror})") from problem
        raise UserError(
            f"port {port} on {host} is taken ({problem.strerror}). Stop what runs there, or try --port {port + 1}"
        ) from problem


def _bound_socket(host: str, port: int) -> socket.socket:
    if not host:
        raise socket.gaierror("empty")
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen()  # or another page could bind the port too, while this one loads
    except BaseException:
        listener.close()
        raise
    return listener


def url_of(host: str, port: int) -> str:
    """What to type into a browser on this machine."""
    plain = plain_host(host)
    name = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(plain, plain)
    if ":" in name:
        name = f"[{name.replace('%', '%25')}]"
    return f"http://{name}:{port}"


class Server:
    """uvicorn in a thread of its own.

    Args:
        app: ASGI application.
        listener: from `listen`.
        protocol: makes another protocol of the limited one, or None.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        listener: socket.socket,
        protocol: Callable[[type[H11Protocol]], type[H11Protocol]] | None = None,
    ) -> None:
        import uvicorn

        from ovd.demo.connections import Connections, protocol_class

        limited = protocol_class(Connections.for_this_process())
        self._door = listener
        self._server = uvicorn.Server(
            uvicorn.Config(
                app,
                http=limited if protocol is None else protocol(limited),
                ws="none",
                lifespan="on",
                log_config=None,
                log_level="warning",
                access_log=False,
                server_header=False,
                backlog=1024,
                timeout_graceful_shutdown=SHUTDOWN_SECONDS,
            )
        )
        self._thread = threading.Thread(target=self._serve, name="page", daemon=True)

    def _serve(self) -> None:
        self._server.run(sockets=[self._door])

    def start(self, *, seconds: float = 120.0) -> None:
        """Return when it accepts requests.

        Raises:
            UserError: it does not within so many seconds.
        """
        self._thread.start()
        end = time.monotonic() + seconds
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > end:
                raise UserError("the page's server did not start; the lines above say why")
            time.sleep(0.005)

    def close(self) -> None:
        """Stop accepting, give running requests `SHUTDOWN_SECONDS` seconds, and end."""
        self._server.should_exit = True
        self._thread.join(SHUTDOWN_SECONDS + 5)
        self._door.close()


@dataclass(frozen=True)
class Served:
    """A page that is served.

    Attributes:
        url: for this machine.
        share_url: for everybody, or None.
    """

    url: str
    share_url: str | None
    _server: Server
    _page: gr.Blocks

    def close(self) -> None:
        """Stop serving; requests that are being answered get a moment."""
        self._page._queue.close()
        self._page.is_running = False
        self._page.app.stop_event.set()  # ends the streams that keep browsers in touch
        self._server.close()


class StopSignals:
    """Waits for Ctrl-C or SIGTERM, from `listen` on.

    Attributes:
        status: of the process then: 130 after Ctrl-C, 0 after SIGTERM.
    """

    def __init__(self) -> None:
        self.status = 0
        self._stop = threading.Event()

    def listen(self) -> None:
        """Take the signals."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._leave)

    def wait(self, seconds: float | None = None) -> None:
        """Until one comes, or so many seconds have passed."""
        self._stop.wait(seconds)

    def _leave(self, number: int, _frame: FrameType | None) -> None:
        self.status = 130 if number == signal.SIGINT else 0
        self._stop.set()


class ServeOptions(TypedDict, total=False):
    """How a page is served.

    Attributes:
        allow_hosts: names under which a proxy serves the page.
        share: make a public link through Gradio's tunnel.
        open_browser: open the page in a browser.
        seconds: returns how long one answer takes at present.
        limits: other sizes and times.
    """

    allow_hosts: Sequence[str]
    share: bool
    open_browser: bool
    seconds: Callable[[], float]
    limits: Limits | None


def serve(
    page: gr.Blocks,
    *,
    listener: socket.socket,
    host: str,
    theme: gr.themes.Base,
    head: str,
    allow_hosts: Sequence[str] = (),
    share: bool = False,
    open_browser: bool = False,
    seconds: Callable[[], float] = lambda: 1.0,
    limits: Limits | None = None,
) -> Served:
    """Serve a page from a background thread.

    Args:
        page: with its queue configured.
        listener: from `listen`.
        host: as given to `listen`.
        theme: of the page.
        head: HTML for its head.
        allow_hosts, share, open_browser, seconds, limits: see `ServeOptions`.

    Raises:
        UserError: it cannot be served or shared.
    """
    from ovd.demo.endpoints import Endpoints
    from ovd.demo.hosts import AllowedHosts
    from ovd.demo.limits import PageGate
    from ovd.demo.memory import release_idle_memory
    from ovd.demo.request_queue import RequestQueue
    from ovd.demo.uploads import Uploads

    page.max_threads = page._queue.max_thread_count = THREADS
    page.state_session_capacity = 64
    app = _mounted(page, theme, head)
    uploads = Uploads(Path(os.environ["GRADIO_TEMP_DIR"]))
    names = AllowedHosts.of(host, allow_hosts)
    gate = PageGate(
        app,
        names=names,
        queue=RequestQueue(page, seconds=seconds, on_idle=release_idle_memory),
        endpoints=Endpoints(page, uploads),
        uploads=uploads,
        limits=limits,
    )
    server = Server(gate, listener=listener)
    server.start()
    port = listener.getsockname()[1]
    url = url_of(host, port)
    share_url = None
    if share:
        share_url = _share(page, port)
        names.trust(share_url)
    if open_browser:
        webbrowser.open(url)
    return Served(url, share_url, server, page)


def _mounted(page: gr.Blocks, theme: gr.themes.Base, head: str) -> FastAPI:
    """Gradio's application with the page, without its pages and reports for developers."""
    import gradio as gr
    from fastapi import FastAPI

    return gr.mount_gradio_app(
        FastAPI(openapi_url=None, docs_url=None, redoc_url=None),
        page,
        path="/",
        footer_links=["api"],
        run_history=False,
        root_path=os.environ.get(ROOT_PATH) or None,
        show_error=False,
        max_file_size="10mb",
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=theme,
        head=head,
    )


def _share(page: gr.Blocks, port: int) -> str:
    """A public link, through the tunnel that Gradio's ``launch(share=True)`` uses."""
    from gradio import networking

    try:
        return networking.setup_tunnel(
            local_host="127.0.0.1",
            local_port=port,
            share_token=page.share_token,
            share_server_address=None,
            share_server_tls_certificate=None,
        )
    except Exception as problem:  # httpx, a missing or foreign program, a refused connection
        reason = (str(problem) or type(problem).__name__).splitlines()[0]
        raise UserError(f"--share: no public link could be made ({reason}); start without it") from problem
