# SPDX-License-Identifier: Apache-2.0
"""``wordbox serve --label-studio``: boxes for Label Studio, from the words of a project's labelling configuration.

    wordbox serve --label-studio --label-studio-url http://localhost:8080 --access-token TOKEN

In the project's settings, under Model, connect http://localhost:9090; then *Retrieve Predictions* in the list of tasks,
or open a task. Each label is asked as the word that it shows, or by the words of its ``predicted_values``.

Pictures are read from the task itself, from below --root, and from Label Studio; from no other host. The token is also
read from LABEL_STUDIO_API_KEY, its address from LABEL_STUDIO_URL, user and password from BASIC_AUTH_USER and
BASIC_AUTH_PASS. Ctrl-C stops it.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from ovd.query_flags import add_detector_flags, load_detector
from pretrain.engine.errors import UserError, run_cli, warn
from pretrain.engine.flags import CommandParser, integer, share

DESCRIPTION = """\
Boxes for Label Studio, from the words of a project's labelling configuration: its machine-learning backend.

    wordbox serve --label-studio --label-studio-url http://localhost:8080 --access-token TOKEN"""


def parser() -> CommandParser:
    """Return the command line."""
    flags = CommandParser("wordbox serve", DESCRIPTION, details=__doc__, usage="wordbox serve --label-studio [options]")
    add = flags.add_argument
    add("--label-studio", action="store_true", help="what is served: the machine-learning backend of Label Studio")
    add(
        "--label-studio-url",
        metavar="URL",
        default=os.environ.get("LABEL_STUDIO_URL"),
        help="of Label Studio, the only host that pictures are fetched from (default: LABEL_STUDIO_URL)",
    )
    add("--access-token", metavar="TOKEN", help="of a user of Label Studio (default: LABEL_STUDIO_API_KEY)")
    add("--root", type=Path, metavar="FOLDER", help="its local files (LOCAL_FILES_DOCUMENT_ROOT), read from here")
    add("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1, this machine only)")
    add("--port", type=integer(0, 65535), default=9090, help="port to listen on, 0 for any free one (default 9090)")
    add(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="also answer under this name, such as host.docker.internal (may be given more than once)",
    )
    add("--user", help="of basic authentication (default: BASIC_AUTH_USER)")
    add("--password", help="of basic authentication (default: BASIC_AUTH_PASS)")
    add("--threshold", type=share, default=None, help="lowest score (default: the calibrated one)")
    add("--seconds", type=integer(1), default=80, help="for one request of Label Studio, which waits 100 (default 80)")
    add_detector_flags(add)
    flags.hide("seconds", "encoder", "sides", "device", "runtime", "threads")
    return flags


def main(argv: list[str]) -> int:
    """Serve until a signal comes; returns 0 after SIGTERM, 130 after Ctrl-C."""
    options = parser().parse_args(argv)
    if not options.label_studio:
        raise UserError("say what to serve: wordbox serve --label-studio (the page is wordbox demo)")
    credentials = _credentials(options)
    from ovd.demo.address import is_loopback, listen, url_of
    from ovd.demo.logs import configure
    from ovd.demo.serving import StopSignals
    from ovd.label_studio.pictures import PictureSource

    configure()
    token = options.access_token or os.environ.get("LABEL_STUDIO_API_KEY")
    pictures = PictureSource(url=options.label_studio_url, token=token, root=options.root)
    if not is_loopback(options.host) and credentials is None:
        warn(
            f"--host {options.host} lets all who can reach this machine use the backend, and see through it "
            "the pictures that its token opens; give --user and --password"
        )
    listener = listen(options.host, options.port)  # before the slow part, so that a taken port is an error at once
    signals = StopSignals()
    try:
        from ovd.demo.hosts import AllowedHosts
        from ovd.demo.serving import Server
        from ovd.label_studio.app import BackendGate, build_app
        from ovd.label_studio.backend import Backend
        from ovd.label_studio.reason import with_reasons

        detector = load_detector(options, masks=False)
        backend = Backend(
            detector,
            pictures,
            name=str(detector.card.get("name") or Path(options.weights).name),
            threshold=options.threshold,
            seconds=options.seconds,
        )
        gate = BackendGate(
            build_app(backend), names=AllowedHosts.of(options.host, options.allow_host), credentials=credentials
        )
        server = Server(gate, listener=listener, protocol=with_reasons)
        server.start()
        signals.listen()
        print(
            f"Connect {url_of(options.host, listener.getsockname()[1])} in Label Studio  (Ctrl-C stops it)", flush=True
        )
        signals.wait()
        server.close()
    finally:
        listener.close()
    return signals.status


def _credentials(options: argparse.Namespace) -> tuple[str, str] | None:
    """User and password; None without either.

    Raises:
        UserError: one of them only.
    """
    user = options.user or os.environ.get("BASIC_AUTH_USER", "")
    password = options.password or os.environ.get("BASIC_AUTH_PASS", "")
    if bool(user) != bool(password):
        raise UserError("basic authentication needs both --user and --password")
    return (user, password) if user else None


if __name__ == "__main__":
    run_cli(main)
