# SPDX-License-Identifier: Apache-2.0
"""The web page: a picture and words in, boxes and masks out. Built on Gradio, served on this machine.

Gradio is imported inside functions: `prepare_environment` has to run first, as Gradio reads its switches at import.
"""

from __future__ import annotations

import html
import logging
import os
import socket
import tempfile
import time
import urllib.request
import uuid
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ovd.demo.answer import Answerer
from pretrain.engine.errors import UserError
from pretrain.engine.files import read_json

if TYPE_CHECKING:
    import gradio as gr

log = logging.getLogger(__name__)

QUEUE = 16  # waiting requests; the next one is told to come back
THREADS = 8  # Gradio's default of 40 only makes two cores swap between requests
CACHE = (600, 3600)  # every 10 minutes, uploads older than an hour are deleted
TITLE = "Open-vocabulary detector"
PLACEHOLDER = "dog, traffic light\nmug: cup, coffee mug\n-poster"
CARD_ROWS = {
    "name": "Weights",
    "sha256": "SHA-256",
    "purpose": "Made for",
    "data": "Trained on",
    "metrics": "Measured",
}
HELP = (
    "Separate names with commas, semicolons or lines. A colon adds other words for the same thing "
    "(`mug: cup, coffee mug`); a minus removes look-alikes (`-poster`)."
)

ENDPOINT = (
    "Find the named classes in one picture. classes: names separated by commas, semicolons or "
    "lines, `name: synonym, synonym`, `-negative`. threshold: lowest score to return, null for all. examples: "
    "null or a list of {name, image, box}: pictures of what to look for."
)
ONE_AT_A_TIME: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model"}


def prepare_environment(folder: str | Path | None = None) -> Path:
    """Switch off everything in Gradio that would call out, and give it a private folder for uploads.

    Must run before Gradio is imported.

    Args:
        folder: where uploads go; a new folder with mode 0700 when None.

    Returns:
        The folder. The caller deletes it.
    """
    target = Path(tempfile.mkdtemp(prefix="ovd-page-")) if folder is None else Path(folder)
    target.mkdir(mode=0o700, parents=True, exist_ok=True)
    target.chmod(0o700)
    os.environ["GRADIO_TEMP_DIR"] = str(target)
    # Telemetry, the version check and model hubs: a page about private pictures has no business on the network.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ["DO_NOT_TRACK"] = "1"
    # Gradio talks to itself once when it starts; behind a proxy that request would be sent to the proxy and fail.
    for name in ("NO_PROXY", "no_proxy"):
        known = [part for part in os.environ.get(name, "").split(",") if part]
        os.environ[name] = ",".join(dict.fromkeys([*known, "127.0.0.1", "localhost", "::1"]))
    return target


@dataclass(frozen=True)
class Example:
    """One click-to-try picture."""

    picture: Path
    classes: str


def shipped_examples(folder: Path | None = None) -> list[Example]:
    """The examples listed in ``examples/examples.json``, leaving out what is not there."""
    root = Path(__file__).parent / "examples" if folder is None else folder
    index = root / "examples.json"
    if not index.is_file():
        return []
    rows = read_json(index)
    return [Example(root / row["picture"], row["classes"]) for row in rows if (root / row["picture"]).is_file()]


def _asset(name: str) -> str:
    return (resources.files("ovd.demo") / name).read_text(encoding="utf-8")


def _card_text(card: dict[str, Any]) -> str:
    """Markdown table of the model card panel; values come from the weights folder and are escaped all the same."""
    rows = []
    for key, label in CARD_ROWS.items():
        value = card.get(key)
        if isinstance(value, dict):
            value = " · ".join(f"{name} {number}" for name, number in value.items())
        if value and not (key == "purpose" and card.get("text")):  # the card says it in its own words
            text = html.escape(str(value)).replace("|", "\\|").replace("\n", " ")
            rows.append(f"| **{label}** | {f'`{text}`' if key == 'sha256' else text} |")
    table = "| | |\n|---|---|\n" + "\n".join(rows) if rows else ""
    return table or "No card comes with these weights."


def _header(card: dict[str, Any]) -> str:
    """HTML on top of the page; says which weights answer and what they are good for."""
    purpose = str(card.get("purpose", ""))
    after = f": {html.escape(purpose)}" if purpose else ""
    return _asset("header.html").replace("@WEIGHTS@", f"<b>{html.escape(str(card.get('name', 'unnamed')))}</b>{after}")


def build_page(answerer: Answerer, *, examples: list[Example] | None = None) -> gr.Blocks:
    """Lay out the page.

    Args:
        answerer: answers the requests.
        examples: click-to-try pictures; the shipped ones when None.

    Returns:
        The Gradio app, queue configured; `launch_page` serves it.
    """
    import gradio as gr

    handlers = Handlers(answerer)
    ready = shipped_examples() if examples is None else examples
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=CACHE) as page:
        gr.HTML(_header(answerer.detector.card), padding=False, elem_id="ovd-header", js_on_load=None)
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=300):
                picture, words, query_examples = _inputs()
                button = gr.Button("Find", variant="primary", elem_id="ovd-find")
                picks = gr.Column(visible=bool(ready), elem_id="ovd-examples")
            with gr.Column(scale=3, min_width=320):
                view = _html("view", elem_id="ovd-view")
        inputs = [picture, words, query_examples]
        run = {"fn": handlers.find, "inputs": inputs, "outputs": view, "api_visibility": "private", **ONE_AT_A_TIME}
        button.click(**run, api_name="find", show_progress="minimal")
        words.submit(**run, api_name="find_submit", show_progress="minimal")
        if ready:
            with picks:
                gr.Examples(
                    [[str(e.picture), e.classes] for e in ready],
                    inputs=[picture, words],
                    outputs=view,
                    fn=handlers.find,
                    run_on_click=True,
                    cache_examples=False,
                    label="Examples",
                    examples_per_page=8,
                    api_visibility="private",
                )
        with gr.Accordion("About these weights", open=True, elem_id="ovd-card"):
            gr.Markdown(_card_text(answerer.detector.card), sanitize_html=True, elem_classes="ovd-facts")
            if text := str(answerer.detector.card.get("text", "")):
                gr.Markdown(text, sanitize_html=True)
        _add_endpoint(handlers, picture, words)
    page.queue(max_size=QUEUE, default_concurrency_limit=1)
    return page


class Handlers:
    """What the page and the endpoint call.

    Args:
        answerer: answers the requests.
    """

    def __init__(self, answerer: Answerer) -> None:
        self.answerer = answerer

    def find(self, image: str | None, classes: str, examples: Any = None) -> dict[str, Any]:
        """For the page: errors are part of the answer, drawn as text by the page itself."""
        try:
            return self.answerer.answer(image, classes or "", examples=examples, preview=True)
        except UserError as problem:
            return {"error": str(problem)}
        except Exception:
            return {"error": _logged()}

    def detect(
        self, image: str | None, classes: str, threshold: float | None = None, examples: Any = None
    ) -> dict[str, Any]:
        """Find the named classes in one picture, and what looks like the examples."""
        import gradio as gr

        try:
            return self.answerer.answer(image, classes or "", threshold, examples=examples)
        except UserError as problem:
            raise gr.Error(html.escape(str(problem), quote=False), print_exception=False) from problem
        except Exception as problem:
            raise gr.Error(_logged(), print_exception=False) from problem


def _logged() -> str:
    """Log the present exception; the message for the person, without what it says."""
    ticket = uuid.uuid4().hex[:8]
    log.exception("request %s failed", ticket)
    return f"Something went wrong inside. The log has the details under {ticket}."


def _inputs() -> tuple[gr.Image, gr.Textbox, gr.HTML]:
    """The picture, the words and the examples of a query."""
    import gradio as gr

    picture = gr.Image(
        label="Picture",
        type="filepath",
        image_mode=None,  # the file as it is: to_rgb knows transparency and 16 bits, the default does not
        sources=["upload", "clipboard"],
        height=260,
        buttons=[],
        elem_id="ovd-image",
    )
    words = gr.Textbox(
        label="What to look for",
        lines=4,
        max_lines=12,
        placeholder=PLACEHOLDER,
        info=HELP,
        elem_id="ovd-words",
    )
    return picture, words, _html("ask", elem_id="ovd-ask")


def _html(name: str, *, elem_id: str) -> gr.HTML:
    """A component of our own: ``NAME.html``, ``NAME.css`` and ``NAME.js`` of this folder."""
    import gradio as gr

    return gr.HTML(
        None,
        html_template=_asset(f"{name}.html"),
        css_template=_asset(f"{name}.css"),
        js_on_load=_asset(f"{name}.js"),
        apply_default_css=False,
        elem_id=elem_id,
    )


def _add_endpoint(handlers: Handlers, picture: gr.Image, words: gr.Textbox) -> None:
    """The ``/detect`` endpoint for programs, on invisible components."""
    import gradio as gr

    level = gr.Number(value=None, label="threshold", visible=False, minimum=0, maximum=1)
    crops = gr.JSON(value=None, visible=False, label="examples")
    result = gr.JSON(visible=False, label="result")
    gr.Button(visible=False).click(
        fn=handlers.detect,
        inputs=[picture, words, level, crops],
        outputs=result,
        api_name="detect",
        api_description=ENDPOINT,
        **ONE_AT_A_TIME,
    )


def free_port(host: str, port: int) -> int:
    """Return a port that can be bound: ``port`` itself, or a free one for 0.

    Raises:
        UserError: the port is taken or not allowed, or the host is not an address of this machine.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            return int(probe.getsockname()[1])
    except socket.gaierror as problem:
        raise UserError(f"--host {host}: not an address of this machine") from problem
    except OverflowError as problem:
        raise UserError(f"--port {port}: must be between 0 and 65535") from problem
    except PermissionError as problem:
        raise UserError(f"--port {port}: not allowed for this user; take one above 1023") from problem
    except OSError as problem:
        raise UserError(
            f"port {port} on {host} is taken ({problem.strerror}). Stop what runs there, or try --port {port + 1}"
        ) from problem


def launch_page(page: gr.Blocks, *, host: str, port: int, share: bool = False, open_browser: bool = False) -> str:
    """Serve the page from a background thread.

    Args:
        page: from `build_page`.
        host: address to listen on.
        port: a free port, see `free_port`.
        share: make a public link through Gradio's tunnel.
        open_browser: open the page in a browser.

    Returns:
        The local URL.
    """
    import gradio as gr

    theme = gr.themes.Base(
        primary_hue=gr.themes.colors.blue,
        neutral_hue=gr.themes.colors.slate,
        radius_size=gr.themes.sizes.radius_md,
        font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"],
        font_mono=["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"],
    )
    try:
        _, url, _ = page.launch(
            server_name=host,
            server_port=port,
            share=share,
            inbrowser=open_browser,
            prevent_thread_lock=True,
            quiet=True,
            show_error=False,
            max_threads=THREADS,
            max_file_size="10mb",
            allowed_paths=[],
            enable_monitoring=False,
            state_session_capacity=64,
            strict_cors=True,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            run_history=False,
            # Skips Gradio's own look at the page, which gives up after three seconds and calls a busy machine a proxy
            # problem; `_wait_until_served` looks instead.
            _frontend=False,
            footer_links=["api"],
            theme=theme,
            head=f"<style>{_asset('page.css')}</style>",  # as `css` Gradio rewrites the selectors and loses @media
        )
    except OSError as problem:
        raise UserError(f"cannot serve on {host}:{port}: {problem}") from problem
    _wait_until_served(str(url))
    return str(url)


def _wait_until_served(url: str, *, seconds: float = 120.0) -> None:
    """Return when the page answers with status 200."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    end = time.monotonic() + seconds
    while True:
        try:
            with opener.open(url, timeout=max(1.0, end - time.monotonic())) as answer:
                if answer.status == 200:
                    return
                problem = f"status {answer.status}"
        except OSError as error:
            problem = str(error)
        if time.monotonic() > end:
            raise UserError(f"the page at {url} did not answer within {seconds:.0f} seconds ({problem})")
        time.sleep(0.1)
