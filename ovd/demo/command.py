# SPDX-License-Identifier: Apache-2.0
"""The web page. ``wordbox demo`` (or ``python app.py``) serves it on http://127.0.0.1:7860 with the shipped weights.

Nothing is sent anywhere: no telemetry, no fonts from elsewhere, no model downloads. Ctrl-C stops it.
"""

from __future__ import annotations

import argparse
import shutil

from ovd.demo.address import is_loopback, listen
from ovd.demo.gradio_environment import prepare_environment
from ovd.demo.logs import configure
from ovd.demo.memory import freeze_loaded, limit_heaps
from ovd.demo.serving import StopSignals
from ovd.query_flags import add_detector_flags, load_detector
from pretrain.engine.errors import warn
from pretrain.engine.flags import CommandParser, integer
from pretrain.engine.loading import without_garbage_collection

SETTLING_SECONDS = 1
"""After which the page looks for garbage of its start: it holds everything up for a third of a second, and whoever
waited for the page has it by then."""


def parser() -> CommandParser:
    """Return the command line."""
    flags = CommandParser("wordbox demo", __doc__, usage="wordbox demo [flags]")
    flags.add_argument(
        "--port", type=integer(0, 65535), default=7860, help="port to listen on, 0 for any free one (default 7860)"
    )
    flags.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1, this machine only)"
    )
    flags.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="also answer under this name, that of a proxy in front of the page (may be given more than once)",
    )
    add_detector_flags(flags.add_argument, sides=False)
    flags.set_defaults(sides=None)
    flags.add_argument("--share", action="store_true", help="public link; pictures then leave the machine")
    flags.add_argument("--browser", action=argparse.BooleanOptionalAction, default=False, help="open a browser")
    return flags


def main(argv: list[str]) -> int:
    """Serve until a signal comes; returns 0 after SIGTERM, 130 after Ctrl-C."""
    options = parser().parse_args(argv)
    configure()
    if options.share:
        warn("--share sends pictures and words through Gradio's servers; whoever has the link can use the page")
    if not is_loopback(options.host):
        warn(f"--host {options.host} lets all who can reach this machine use the page; there is no password")
    if options.encoder:
        from ovd.with_encoder import fetch_elsewhere

        if (status := fetch_elsewhere(options.encoder)) != 0:  # before the page shuts itself off from the hub
            return status
    listener = listen(options.host, options.port)  # before the slow part, so that a taken port is an error at once
    folder = prepare_environment()
    signals = StopSignals()
    try:
        limit_heaps()
        with without_garbage_collection():
            from ovd.demo.answer import Answerer
            from ovd.demo.model_manager import manager_of
            from ovd.demo.page import build_page, launch_page

            manager = manager_of(options.weights, lambda weights: load_detector(options, weights=weights))
            answerer = Answerer(manager=manager)
            page = build_page(answerer)
            served = launch_page(
                page,
                listener=listener,
                host=options.host,
                allow_hosts=options.allow_host,
                share=options.share,
                open_browser=options.browser,
                seconds=lambda: answerer.seconds,
            )
            signals.listen()
            print(f"The page is at {served.url}  (Ctrl-C stops it)", flush=True)
            if served.share_url:
                print(f"and for everybody at {served.share_url}", flush=True)
            signals.wait(SETTLING_SECONDS)
            freeze_loaded()
        signals.wait()
        answerer.close()
        served.close()
    finally:
        listener.close()
        shutil.rmtree(folder, ignore_errors=True)
    return signals.status
