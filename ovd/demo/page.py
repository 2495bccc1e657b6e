# SPDX-License-Identifier: Apache-2.0
"""The web page: a picture and words in, boxes and masks out. Built on Gradio, served on this machine.

Gradio is imported inside functions: `prepare_environment` has to run first, as Gradio reads its switches at import.
"""

from __future__ import annotations

import html
import logging
import socket
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ovd.demo.answer import Answerer
from ovd.demo.serving import Served, load_gradio, serve
from pretrain.engine.errors import UserError
from pretrain.engine.files import read_json

if TYPE_CHECKING:
    import gradio as gr
    from gradio.data_classes import ImageData

    from ovd.demo.limits import Limits
    from ovd.detector import Detector

log = logging.getLogger(__name__)

CACHE = (600, 3600)  # every 10 minutes, uploads older than an hour are deleted
TITLE = "Open-vocabulary detector"
EXAMPLES = Path(__file__).parent / "examples"
STICKER_ENCODER = "clip-sticker"
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
# `Answerer` lets one question at a time to the model; the others are read, or wait in it.
ONE_LINE: dict[str, Any] = {"concurrency_limit": None, "concurrency_id": "questions"}


@dataclass(frozen=True)
class Example:
    """One click-to-try picture."""

    picture: Path
    classes: str


def kind_of_pictures(detector: Detector) -> str:
    """Folder of the examples that a detector is made for: stickers, or photos."""
    card = detector.model.card
    return "stickers" if card is not None and card.encoder == STICKER_ENCODER else "photos"


def shipped_examples(folder: Path) -> list[Example]:
    """The examples listed in a folder's ``examples.json``, leaving out what is not there."""
    index = folder / "examples.json"
    if not index.is_file():
        return []
    rows = read_json(index)
    return [Example(folder / row["picture"], row["classes"]) for row in rows if (folder / row["picture"]).is_file()]


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
        examples: click-to-try pictures; None: the shipped ones of the kind that the detector is made for.

    Returns:
        The Gradio app, queue configured; `launch_page` serves it.
    """
    load_gradio()
    import gradio as gr

    handlers = Handlers(answerer)
    ready = shipped_examples(EXAMPLES / kind_of_pictures(answerer.detector)) if examples is None else examples
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
        run = {"fn": handlers.find, "inputs": inputs, "outputs": view, "api_visibility": "private", **ONE_LINE}
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
    # `ovd.demo.line` says when the line is full, before Gradio would; nothing goes past it.
    page.queue(max_size=1000, default_concurrency_limit=None, api_open=False)
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
    # Gradio would open the file before `Handlers` do: what is no picture ends there, as "Error" and a traceback.
    picture.preprocess = _path_of
    words = gr.Textbox(
        label="What to look for",
        lines=4,
        max_lines=12,
        placeholder=PLACEHOLDER,
        info=HELP,
        elem_id="ovd-words",
    )
    return picture, words, _html("ask", elem_id="ovd-ask")


def _path_of(upload: ImageData | None) -> str | None:
    return None if upload is None else upload.path


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
        **ONE_LINE,
    )


def launch_page(
    page: gr.Blocks,
    *,
    door: socket.socket,
    host: str = "127.0.0.1",
    allow_hosts: Sequence[str] = (),
    share: bool = False,
    open_browser: bool = False,
    seconds: Callable[[], float] = lambda: 1.0,
    limits: Limits | None = None,
) -> Served:
    """Serve the page from a background thread; arguments as in `ovd.demo.serving.serve`.

    Args:
        page: from `build_page`.
    """
    import gradio as gr

    theme = gr.themes.Base(
        primary_hue=gr.themes.colors.blue,
        neutral_hue=gr.themes.colors.slate,
        radius_size=gr.themes.sizes.radius_md,
        font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"],
        font_mono=["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"],
    )
    return serve(
        page,
        door=door,
        host=host,
        theme=theme,
        head=f"<style>{_asset('page.css')}</style>",  # as `css` Gradio rewrites the selectors and loses @media
        allow_hosts=allow_hosts,
        share=share,
        open_browser=open_browser,
        seconds=seconds,
        limits=limits,
    )
