# SPDX-License-Identifier: Apache-2.0
"""Serve a page: one uvicorn server in a thread, behind the limits of `ovd.demo.limits`.

Gradio's own ``launch`` is not used: it takes neither a socket nor a protocol nor a limit of connections, asks itself
over whatever proxy the environment names, and reads a dozen ``GRADIO_`` variables. `gradio.mount_gradio_app` is the
documented other way. Gradio is not imported at the top: ``app.py --help`` answers at once.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
import webbrowser
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, TypedDict

from ovd.demo.address import url_of
from ovd.demo.gradio_environment import ROOT_PATH
from ovd.demo.request_queue import WAITING
from pretrain.engine.errors import UserError

if TYPE_CHECKING:
    import gradio as gr
    from fastapi import FastAPI
    from starlette.types import ASGIApp
    from uvicorn.protocols.http.h11_impl import H11Protocol

    from ovd.demo.bodies import Limits

THREADS = WAITING + 8  # all admitted requests, most of them waiting, and some for Gradio's own work
SHUTDOWN_SECONDS = 2  # seconds that running requests get when the page stops


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
        self._listener = listener
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
        self._server.run(sockets=[self._listener])

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
        self._listener.close()


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
