# SPDX-License-Identifier: Apache-2.0
"""Answers of the page and of the ``/detect`` endpoint, as one JSON-ready dict.

Does not need Gradio. Everything above the floor score is sent once, so that threshold, class toggles and downloads work
in the browser.
"""

from __future__ import annotations

import base64
import hashlib
import io
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ovd.colours import class_styles
from ovd.demo.fair_semaphore import FairSemaphore
from ovd.demo.model_manager import ModelManager
from ovd.demo.pack import pack
from ovd.demo.schema import Answer, AnsweredClass
from ovd.detections import Detections
from ovd.detector import Detector
from ovd.examples import Crop
from ovd.inference.everything import EVERYTHING, is_everything, nearest_words
from ovd.inference.region_model import PatchLocator
from ovd.inference.regions import picture_key
from ovd.pictures import frame_count, to_rgb
from ovd.query import Query
from ovd.vocabulary import Vocabulary
from pretrain.data.folder import PAGE_PIXELS
from pretrain.engine.errors import BadImageError, UserError

P = ParamSpec("P")
T = TypeVar("T")

SCHEMA = 1
FLOOR = 0.05  # lowest score sent; the slider's left end
MAX_FILE_BYTES = 10_000_000
MAX_CROPS_SENT = 20
MAX_CROP_BYTES = 2_000_000  # of one crop; the page sends at most 384 × 384 pixels
MAX_CROP_PIXELS = 4_000_000  # of one crop, read from its header before it is decoded
MAX_CROPS_PIXELS = 25_000_000  # of all crops of a query: what one picture may have
MAX_DECODED = 3  # requests with decoded pictures: one at the model, one before and one behind it
LONG_TEXT = 20_000  # characters; longer texts are parsed one at a time
SLICE = 64  # classes that are embedded in one go, about 40 ms on two CPU cores
INITIAL_SECONDS = 0.5  # a guess, until the first answers have been timed
SMOOTHING = 8  # answers that the running mean of their time looks back on
CACHED_PREVIEWS = 8
PREVIEW_SIDE = 1600  # pixels; what is shown and saved as PNG
NEAR = 3  # nearest words of the vocabulary that are sent for each box


@dataclass(frozen=True)
class _ModelAnswer:
    """Result of the model's thread; times in seconds."""

    detections: Detections
    near: list[list[str]]  # nearest words of each detection
    key: str  # of the picture
    regions: int
    cached: bool  # whether the network was not run
    network: float
    words: float


_DATA_URL = re.compile(r"data:image/(png|jpeg|webp|bmp);base64,")


class Answerer:
    """Answers requests about pictures with one detector.

    Args:
        detector: shared by all requests; not with a manager.
        manager: the weights on offer.
        examples: pictures of the page, whose name an answer about one of them gives.
    """

    def __init__(
        self,
        *,
        detector: Detector | None = None,
        manager: ModelManager | None = None,
        examples: Sequence[Path] = (),
    ) -> None:
        if manager is None:
            if detector is None:
                raise ValueError("a detector or a manager")
            manager = ModelManager(detector)
        self.manager = manager
        self._examples: dict[tuple[int, str], str] = {}
        self.add_examples(examples)
        self.seconds = INITIAL_SECONDS  # that one request occupies the model, at present
        self._previews: OrderedDict[str, str] = OrderedDict()
        self._previewing = threading.Lock()
        self._decoded_slots = FairSemaphore(MAX_DECODED)
        # One thread each: first come, first served, and torch keeps the scratch memory of two threads only.
        self._model = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._words = ThreadPoolExecutor(1, thread_name_prefix="words")
        self._closed = False

    def answer(
        self,
        image: str | Path | None,
        classes: str,
        threshold: float | None = None,
        *,
        examples: Any = None,
        weights: Any = None,
        preview: bool = False,
    ) -> Answer:
        """Find the typed classes, and what looks like the examples.

        Args:
            image: picture file.
            classes: words in the grammar of `ovd.vocabulary`; "everything": all that the weights know.
            weights: name of an offer; None: those of the start.
            threshold: lowest score to send; the floor when None.
            examples: None or a list of ``{"name", "image", "box"}`` as a program or the page sent it, see
                `decode_examples`.
            preview: add the upright picture, at most `PREVIEW_SIDE` long, as a data URL without metadata.

        Returns:
            see docs/guide/python.md for the keys.

        Raises:
            UserError: no picture, no words, or something unreadable; the message is for the person.
        """
        start = time.perf_counter()
        if not image:
            raise UserError("Choose a picture first: drop one here, paste it, or click an example")
        name = self.manager.check(weights)
        detector = self.manager.loaded_detector(name) or self._on(self._model, self.manager.load, name)
        # Words first: a typing mistake should not cost a run of the network.
        words = self._parsed(detector, classes, alone=not examples)
        with self._decoded_slots:
            query = detector.query(EVERYTHING if is_everything(classes) else words, decode_examples(examples))
            if not query.names:
                replace(words, alone=True)  # which says what is missing
            default = detector.threshold_for(query)
            floor = min(FLOOR, default / 4)
            lowest = floor if threshold is None else threshold
            pixels = _read(Path(image))
            read = time.perf_counter()
            answered = self._on(self._model, self._run, detector, pixels, query, lowest)
            result = self._described(detector, answered, query, default=default, floor=floor)
            result["example"] = self._example(Path(image))
            result["notices"] += _frames_notice(Path(image))
            result["ms"]["read"] = _ms(read - start)
            if preview:
                result["preview"] = self._preview(answered.key, pixels)
            return result

    def add_examples(self, examples: Sequence[Path]) -> None:
        """Recognise these pictures by their bytes."""
        for path in examples:
            data = path.read_bytes()
            self._examples[len(data), hashlib.sha256(data).hexdigest()] = path.name

    def _example(self, image: Path) -> str | None:
        """The name of the example that this file is a copy of."""
        try:
            size = image.stat().st_size
            if all(size != sizes for sizes, _ in self._examples):
                return None
            return self._examples.get((size, hashlib.sha256(image.read_bytes()).hexdigest()))
        except OSError:  # removed meanwhile
            return None

    def pack(self, answered: Any, form: Any) -> bytes:
        """See `ovd.demo.pack.pack`; one at a time."""
        return self._on(self._words, pack, answered, form)

    def _parsed(self, detector: Detector, text: str, *, alone: bool) -> Vocabulary:
        """Parse and embed words on their own thread, in slices between which other requests get their turn.

        The embedder caches phrases: at the model they then cost next to nothing.
        """
        if not isinstance(text, str):
            raise UserError(f"classes must be a string, not {type(text).__name__}")
        parse = partial(Vocabulary.parse, text, templates=detector.templates, alone=alone)
        if is_everything(text):
            words = self._on(self._words, detector.query, text).words
        else:
            words = parse() if len(text) <= LONG_TEXT else self._on(self._words, parse)
        for start in range(0, len(words.classes), SLICE):
            part = replace(words, classes=words.classes[start : start + SLICE], alone=False)
            self._on(self._words, detector.text.embed, part)
        return words

    def _on(self, thread: ThreadPoolExecutor, work: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
        """Run a function on a thread, and wait for it."""
        try:
            return thread.submit(work, *args, **options).result()
        except (CancelledError, RuntimeError) as problem:
            if self._closed:
                raise UserError("The page is shutting down") from problem
            raise

    @property
    def detector(self) -> Detector:
        """The detector in memory."""
        return self.manager.current

    def close(self) -> None:
        """Refuse what waits, and finish what is being computed."""
        self._closed = True
        for thread in (self._words, self._model):
            thread.shutdown(wait=True, cancel_futures=True)

    def _run(self, detector: Detector, pixels: NDArray[np.uint8], query: Query, threshold: float) -> _ModelAnswer:
        """Run the network and score its regions; one request at a time."""
        start = time.perf_counter()
        runs = detector.runs
        if isinstance(detector.model, PatchLocator):
            detections = detector.answer(pixels, query, threshold=threshold)
            key, regions, embedded = picture_key(pixels), len(detections), time.perf_counter()
            near: list[list[str]] = [[] for _ in range(regions)]
        else:
            picture = detector.embed(pixels)
            embedded = time.perf_counter()
            detections = picture.classify(query, threshold=threshold)
            key, regions = picture.key, len(picture)
            near = nearest_words(detector.model, picture.regions, detections.region.tolist(), count=NEAR)
        end = time.perf_counter()
        self.seconds += (end - start - self.seconds) / SMOOTHING
        return _ModelAnswer(detections, near, key, regions, detector.runs == runs, embedded - start, end - embedded)

    def _described(
        self, detector: Detector, answered: _ModelAnswer, query: Query, *, default: float, floor: float
    ) -> Answer:
        result = describe(answered.detections, default=default, floor=floor)
        add_query(result, query)
        for row, near in zip(result["detections"], answered.near, strict=True):
            row["near"] = near
        if query.prompt_free is not None:
            drop_missing_classes(result)
        result["model"] = {key: detector.card.get(key) for key in ("name", "sha256")}
        result["regions"] = answered.regions
        result["cached"] = answered.cached
        result["ms"] = {"network": _ms(answered.network), "words": _ms(answered.words)}
        return result

    def _preview(self, key: str, pixels: NDArray[np.uint8]) -> str:
        with self._previewing:
            url = self._previews.get(key)
        if url is None:
            url = data_url(pixels)
            with self._previewing:
                self._previews[key] = url
                while len(self._previews) > CACHED_PREVIEWS:
                    self._previews.popitem(last=False)
        return url


def add_query(result: Answer, query: Query) -> None:
    """Add the query: its negatives and hash, and of each class its synonyms and number of crops."""
    result["negatives"] = [c.name for c in query.words.negatives] + [e.name for e in query.examples if e.negative]
    result["vocabulary"] = query.hash
    result["everything"] = query.prompt_free is not None
    synonyms = {c.name.casefold(): list(c.synonyms) for c in query.words.positives}
    crops = {e.name.casefold(): len(e.crops) for e in query.positive_examples}
    for row, name in zip(result["classes"], query.names, strict=True):
        row["synonyms"] = synonyms.get(name.casefold(), [])
        row["crops"] = crops.get(name.casefold(), 0)


def drop_missing_classes(result: Answer) -> None:
    """Keep only classes with a detection, of a prompt-free query's thousand words; in place."""
    numbers = sorted({row["class"] for row in result["detections"]})
    names = [result["classes"][old]["name"] for old in numbers]
    styles = class_styles(names)  # of these names only: few names share no colour
    classes: list[AnsweredClass] = []
    for new, (old, style) in enumerate(zip(numbers, styles, strict=True)):
        drawn: AnsweredClass = {"id": new, "colour": style.colour, "ink": style.ink, "dash": list(style.dash)}
        classes.append({**result["classes"][old], **drawn})
    new_of = {old: new for new, old in enumerate(numbers)}
    for row in result["detections"]:
        row["class"] = new_of[row["class"]]
    result["classes"] = classes


def decode_examples(rows: Any) -> list[tuple[str, Crop]] | None:
    """Read examples that came as JSON.

    Args:
        rows: None, or a list of ``{"name": "my mug", "image": "data:image/png;base64,…", "box": [x1, y1, x2, y2]}``;
            without ``name`` it is "example N", without ``box`` the picture is the crop.

    Raises:
        UserError: something else, or a picture that is too large or cannot be read.
    """
    if rows is None or rows == []:
        return None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError('examples must be a list like [{"name": "my mug", "image": "data:image/png;base64,…"}]')
    if len(rows) > MAX_CROPS_SENT:
        raise UserError(f"{len(rows)} crops; at most {MAX_CROPS_SENT} are allowed in one query")
    crops: list[tuple[str, Crop]] = []
    room = MAX_CROPS_PIXELS
    for number, row in enumerate(rows, 1):
        name = str(row.get("name") or "").strip() or f"example {number}"
        match = _DATA_URL.match(text) if isinstance(text := row.get("image"), str) else None
        if match is None:
            raise UserError(f"example {name!r}: image must be a data URL of a PNG, JPEG, WebP or BMP picture")
        if len(text) > MAX_CROP_BYTES * 4 // 3:
            raise UserError(f"example {name!r}: the crop has more than {MAX_CROP_BYTES // 1_000_000} MB; shrink it")
        try:
            data = base64.b64decode(text[match.end() :], validate=True)
            pixels = to_rgb(data, max_pixels=MAX_CROP_PIXELS)
        except ValueError as problem:
            raise UserError(f"example {name!r}: the data URL is not base64") from problem
        except BadImageError as problem:
            raise UserError(f"example {name!r} cannot be used: {problem.reason}") from problem
        room -= pixels.shape[0] * pixels.shape[1]
        if room < 0:
            raise UserError(f"the crops have more than {MAX_CROPS_PIXELS:,} pixels together; shrink them")
        box = row.get("box")
        if box is not None and not (
            isinstance(box, list) and len(box) == 4 and all(isinstance(v, (int, float)) for v in box)
        ):
            raise UserError(f"example {name!r}: box must be [x1, y1, x2, y2] in pixels of its picture, or left out")
        crops.append((name, Crop(pixels, None if box is None else (box[0], box[1], box[2], box[3]))))
    return crops


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 1)


def _frames_notice(path: Path) -> list[str]:
    """What to say of an animation or a file of several pages."""
    try:
        count = frame_count(path)
    except BadImageError:  # removed meanwhile
        return []
    return [f"The file has {count} frames or pages; the first was searched"] if count > 1 else []


def _read(path: Path) -> NDArray[np.uint8]:
    """Read an uploaded picture; messages do not show the server's paths."""
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise UserError(f"The picture has {size / 1e6:.1f} MB; at most {MAX_FILE_BYTES / 1e6:.0f} MB are allowed")
        return to_rgb(path, max_pixels=PAGE_PIXELS)
    except BadImageError as problem:
        raise UserError(f"This picture cannot be used: {problem.reason.replace(str(path), 'the file')}") from problem
    except OSError as problem:
        raise UserError("The picture is no longer on the server; upload it again") from problem


def data_url(pixels: NDArray[np.uint8], *, side: int = PREVIEW_SIDE) -> str:
    """Encode a picture as a JPEG data URL, shrunk to ``side``; carries no metadata."""
    image = Image.fromarray(pixels)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def describe(detections: Detections, *, default: float, floor: float) -> Answer:
    """Turn detections into the JSON of the page and the endpoint.

    Args:
        detections: from the floor upwards.
        default: the threshold the page starts with.
        floor: the lowest threshold it offers.
    """
    height, width = detections.size
    return {
        "schema": SCHEMA,
        "size": [width, height],
        "threshold": round(default, 4),
        "floor": round(floor, 4),
        "classes": [
            {
                "id": i,
                "name": name,
                "best": round(float(detections.best[i]), 4),
                "colour": style.colour,
                "ink": style.ink,
                "dash": list(style.dash),
            }
            for i, (name, style) in enumerate(zip(detections.names, class_styles(detections.names), strict=True))
        ],
        "detections": [
            {
                "class": int(detections.class_id[i]),
                "score": round(float(detections.confidence[i]), 4),
                "box": [round(float(v), 1) for v in detections.xyxy[i]],
                "polygons": detections.polygons(i),
            }
            for i in range(len(detections))
        ],
        "masks": detections.box_masks is not None,
        "notices": list(detections.notices),
    }
