# SPDX-License-Identifier: Apache-2.0
"""The web page: a picture and words in, boxes and masks out. Built on Gradio, served on this machine.

Gradio is imported inside functions: `prepare_environment` has to run first, as Gradio reads its switches at import.
"""

from __future__ import annotations

import base64
import html
import logging
import socket
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ovd.demo.answer import Answerer
from ovd.demo.gradio_environment import load_gradio
from ovd.demo.model_manager import KINDS, Offer
from ovd.demo.schema import Answer
from ovd.demo.serving import Served, ServeOptions, serve
from ovd.formats.names import FORMATS
from ovd.inference.everything import EVERYTHING
from pretrain.engine.errors import UserError
from pretrain.engine.files import read_json

if TYPE_CHECKING:
    import gradio as gr
    from gradio.data_classes import ImageData
    from typing_extensions import Unpack


log = logging.getLogger(__name__)

CACHE = (600, 3600)  # every 10 minutes, uploads older than an hour are deleted
TITLE = "Open-vocabulary detector"
EXAMPLES = Path(__file__).parent / "examples"
PLACEHOLDER = "dog, traffic light\nmug: cup, coffee mug\n-poster"
CARD_ROWS = {
    "name": "Weights",
    "sha256": "SHA-256",
    "purpose": "Made for",
    "data": "Trained on",
    "metrics": "Measured",
}
HELP = (
    "Separate names with commas, semicolons or lines. A colon adds synonyms "
    "(`mug: cup, coffee mug`); a minus excludes look-alikes (`-poster`)."
)

ENDPOINT = (
    "Find the named classes in one picture. classes: names separated by commas, semicolons or "
    "lines, `name: synonym, synonym`, `-negative`; `everything` for all words that the weights know. threshold: lowest "
    "score to return, null for all. examples: null or a list of {name, image, box}: pictures of what to look for. "
    "weights: their name, null for those that the page starts with."
)
PACK = (
    "Labels of many answers as one zip, base64. found: a list of {name, size, boxes: [{name, score, box, polygons}]}. "
    f"form: {', '.join(FORMATS)}."
)
# `Answerer` lets one request at a time to the model; the others are decoded, or wait in it.
ONE_QUEUE: dict[str, Any] = {"concurrency_limit": None, "concurrency_id": "requests"}


@dataclass(frozen=True)
class PageExample:
    """One click-to-try picture."""

    picture: Path
    classes: str


def shipped_examples(folder: Path) -> list[PageExample]:
    """The examples listed in a folder's ``examples.json``, leaving out what is not there."""
    index = folder / "examples.json"
    if not index.is_file():
        return []
    rows = read_json(index)
    return [PageExample(folder / row["picture"], row["classes"]) for row in rows if (folder / row["picture"]).is_file()]


def _asset(name: str) -> str:
    return (resources.files("ovd.demo") / name).read_text(encoding="utf-8")


def _card_text(card: Mapping[str, Any]) -> str:
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
    return table or "These weights have no model card."


def _header(offers: Sequence[Offer]) -> str:
    """HTML on top of the page: which weights answer, what they are good for, and a choice where there are several."""
    first = offers[0]
    purpose = str(first.card.get("purpose", ""))
    intro = f"Weights <b>{html.escape(first.name)}</b>" + (f": {html.escape(purpose)}" if purpose else "")
    choice = ""
    if len(offers) > 1:
        rows = [
            f'<label><input type="radio" name="wordbox-weights" value="{html.escape(o.name)}" data-number="{number}" '
            f'data-purpose="{html.escape(str(o.card.get("purpose", "")))}"{" checked" if o is first else ""}>'
            f"<span>{KINDS[o.kind]}</span> <code>{html.escape(o.name)}</code></label>"
            for number, o in enumerate(offers)
        ]
        choice = f"<fieldset><legend>Made for</legend>{''.join(rows)}</fieldset>"
    return _asset("header.html").replace("@CHOICE@", _literal(choice)).replace("@PURPOSE@", _literal(intro))


def _literal(text: str) -> str:
    """HTML whose braces and dollars Gradio's templates leave alone."""
    return text.replace("{", "&#123;").replace("}", "&#125;").replace("$", "&#36;").replace("`", "&#96;")


def _weights_classes(number: int) -> list[str]:
    """Classes of what belongs to one of the weights on offer; that of the first is shown at the start."""
    return [f"wordbox-weights-{number}", *(["wordbox-other-weights"] if number else [])]


def build_page(answerer: Answerer, *, examples: list[PageExample] | None = None) -> gr.Blocks:
    """Lay out the page.

    Args:
        answerer: answers the requests.
        examples: click-to-try pictures; None: for each of the weights the shipped ones of the kind they are made for.

    Returns:
        the Gradio app, queue configured; `launch_page` serves it.
    """
    load_gradio()
    import gradio as gr

    handlers = Handlers(answerer)
    offers = list(answerer.manager.offers.values())
    ready = [examples] if examples is not None else [shipped_examples(EXAMPLES / offer.kind) for offer in offers]
    answerer.add_examples([e.picture for group in ready for e in group])
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=CACHE) as page:
        weights = _html("header", elem_id="wordbox-header", template=_header(offers), css=False)
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=300):
                picture, words, query_examples = _inputs()
                with gr.Row(elem_id="wordbox-buttons"):
                    # ovd-find, ovd-view, ovd-image and ovd-words keep their names: scripts drive the page by them.
                    find = gr.Button("Find", variant="primary", elem_id="ovd-find", min_width=90)
                    everything = gr.Button("What is in this picture?", elem_id="wordbox-everything", min_width=190)
                picks = gr.Column(visible=any(ready), elem_id="wordbox-examples")
            with gr.Column(scale=3, min_width=320):
                view = _html("view", elem_id="ovd-view", more=("save", "zoom", "session"))
        run: dict[str, Any] = {"outputs": view, "api_visibility": "private", "show_progress": "minimal", **ONE_QUEUE}
        find.click(fn=handlers.find, inputs=[picture, words, query_examples, weights], api_name="find", **run)
        with picks:
            for number, group in enumerate(ready):
                if group:
                    with gr.Column(elem_classes=["wordbox-packaged-pictures", *_weights_classes(number)]):
                        _example_gallery(handlers, offers[number], group, picture, words, view)
        everything.click(fn=handlers.everything, inputs=[picture, weights], api_name="everything", **run)
        with gr.Accordion("Many pictures at once", open=False):
            rows = "".join(f'<option value="{name}">{name}</option>' for name in FORMATS)
            _html("many", elem_id="wordbox-batch", template=_asset("many.html").replace("@FORMATS@", rows))
        with gr.Accordion("About these weights", open=True, elem_id="wordbox-card"):
            for number, offer in enumerate(offers):
                with gr.Column(elem_classes=_weights_classes(number)):
                    gr.Markdown(_card_text(offer.card), sanitize_html=True, elem_classes="wordbox-card-facts")
                    if text := str(offer.card.get("text", "")):
                        gr.Markdown(text, sanitize_html=True)
        _add_endpoints(handlers, picture, words)
    # `ovd.demo.request_queue` refuses requests when the queue is full, before Gradio would.
    page.queue(max_size=1000, default_concurrency_limit=None, api_open=False)
    return page


def _example_gallery(
    handlers: Handlers, offer: Offer, examples: list[PageExample], picture: gr.Image, words: gr.Textbox, view: gr.HTML
) -> None:
    """Click-to-try pictures of one of the weights on offer, which answer about them."""
    import gradio as gr

    def find(image: str | None, classes: str) -> Answer:
        return handlers.find(image, classes, weights=offer.name)

    gr.Examples(
        [[str(e.picture), e.classes] for e in examples],
        inputs=[picture, words],
        outputs=view,
        fn=find,
        run_on_click=True,
        cache_examples=False,
        label="Examples",
        examples_per_page=8,
        api_visibility="private",
    )


class Handlers:
    """Functions behind the page and the endpoint.

    Args:
        answerer: answers the requests.
    """

    def __init__(self, answerer: Answerer) -> None:
        self.answerer = answerer

    def find(self, image: str | None, classes: str, examples: Any = None, weights: Any = None) -> Answer:
        """For the page: errors are part of the answer, drawn as text by the page itself."""
        try:
            return self.answerer.answer(image, classes or "", examples=examples, weights=weights, preview=True)
        except UserError as problem:
            return {"error": str(problem)}
        except Exception:
            return {"error": _logged()}

    def everything(self, image: str | None, weights: Any = None) -> Answer:
        """For the page: prompt-free detection."""
        return self.find(image, EVERYTHING, weights=weights)

    def detect(
        self,
        image: str | None,
        classes: str,
        threshold: float | None = None,
        examples: Any = None,
        weights: str | None = None,
    ) -> Answer:
        """Find the named classes in one picture, and what looks like the examples."""
        with _documented_for_programs():
            return self.answerer.answer(image, classes or "", threshold, examples=examples, weights=weights)

    def pack(self, found: Any, form: str) -> dict[str, str]:
        """Labels of many answers as one zip."""
        with _documented_for_programs():
            data = self.answerer.pack(found, form)
            return {"name": f"labels-{form}.zip", "zip": base64.b64encode(data).decode("ascii")}


@contextmanager
def _documented_for_programs() -> Iterator[None]:
    """What goes wrong inside becomes the error text of the call."""
    import gradio as gr

    try:
        yield
    except UserError as problem:
        raise gr.Error(html.escape(str(problem), quote=False), print_exception=False) from problem
    except Exception as problem:
        raise gr.Error(_logged(), print_exception=False) from problem


def _logged() -> str:
    """Log the present exception; the message for the person, without what it says."""
    ticket = uuid.uuid4().hex[:8]
    log.exception("request %s failed", ticket)
    return f"Internal error. The log has the details under {ticket}."


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
        label="What to look for", lines=4, max_lines=12, placeholder=PLACEHOLDER, info=HELP, elem_id="ovd-words"
    )
    return picture, words, _html("ask", elem_id="wordbox-example-search")


def _path_of(upload: ImageData | None) -> str | None:
    return None if upload is None else upload.path


def _html(
    name: str, *, elem_id: str, more: Sequence[str] = (), template: str | None = None, css: bool = True
) -> gr.HTML:
    """A component of our own: ``NAME.html``, ``NAME.css`` and ``NAME.js`` of this folder.

    Args:
        name: of the files.
        elem_id: of the component.
        more: scripts that follow in the scope of the first.
        template: in place of ``NAME.html``.
        css: whether there is a ``NAME.css``.
    """
    import gradio as gr

    return gr.HTML(
        None,
        html_template=_asset(f"{name}.html") if template is None else template,
        css_template=_asset(f"{name}.css") if css else "",
        js_on_load="\n".join(_asset(f"{part}.js") for part in (name, *more)),
        apply_default_css=False,
        elem_id=elem_id,
    )


def _add_endpoints(handlers: Handlers, picture: gr.Image, words: gr.Textbox) -> None:
    """``/detect`` and ``/pack`` for programs, on invisible components."""
    import gradio as gr

    threshold = gr.Number(value=None, label="threshold", visible=False, minimum=0, maximum=1)
    crops = gr.JSON(value=None, visible=False, label="examples")
    weights = gr.Textbox(value=None, label="weights", visible=False)
    gr.Button(visible=False).click(
        fn=handlers.detect,
        inputs=[picture, words, threshold, crops, weights],
        outputs=gr.JSON(visible=False, label="result"),
        api_name="detect",
        api_description=ENDPOINT,
        **ONE_QUEUE,
    )
    gr.Button(visible=False).click(
        fn=handlers.pack,
        inputs=[gr.JSON(visible=False, label="found"), gr.Textbox(visible=False, label="form")],
        outputs=gr.JSON(visible=False, label="zip"),
        api_name="pack",
        api_description=PACK,
        **ONE_QUEUE,
    )


def launch_page(
    page: gr.Blocks,
    *,
    listener: socket.socket,
    host: str = "127.0.0.1",
    **options: Unpack[ServeOptions],
) -> Served:
    """Serve the page from a background thread.

    Args:
        page: from `build_page`.
        listener, host: see `ovd.demo.serving.serve`.
        options: see `ServeOptions`.
    """
    import gradio as gr

    theme = gr.themes.Base(
        primary_hue=gr.themes.colors.blue,
        neutral_hue=gr.themes.colors.slate,
        radius_size=gr.themes.sizes.radius_md,
        font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"],
        font_mono=["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"],
    ).set(  # Gradio's own have a contrast of 2.6
        body_text_color_subdued="*neutral_600",
        block_info_text_color="*neutral_600",
        input_placeholder_color="*neutral_500",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_dark="*primary_600",
    )
    return serve(
        page,
        listener=listener,
        host=host,
        theme=theme,
        head=f"<style>{_asset('page.css')}</style>",  # as `css` Gradio rewrites the selectors and loses @media
        **options,
    )
