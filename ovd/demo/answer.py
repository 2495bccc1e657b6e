# SPDX-License-Identifier: Apache-2.0
"""What the page and the ``/detect`` endpoint answer: one JSON-ready dict, made here and nowhere else.

Needs no Gradio. Everything below the floor score is left out, everything above is sent once: threshold, class toggles
and downloads then work in the browser.
"""

from __future__ import annotations

import base64
import io
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ovd.colours import class_styles
from ovd.detector import Detections, Detector, to_rgb
from pretrain.engine.errors import BadImageError, UserError

SCHEMA = 1
FLOOR = 0.05  # lowest score sent; the slider's left end
MAX_FILE_BYTES = 10_000_000
PREVIEW_SIDE = 1600  # pixels; what is shown and saved as PNG


class Answerer:
    """Answers questions about pictures with one detector.

    Args:
        detector: shared by all requests.
        previews: pictures whose preview is remembered.
    """

    def __init__(self, *, detector: Detector, previews: int = 8) -> None:
        self.detector = detector
        self._previews: OrderedDict[str, str] = OrderedDict()
        self._keep = previews

    def answer(
        self, image: str | Path | None, classes: str, threshold: float | None = None, *, preview: bool = False
    ) -> dict[str, Any]:
        """Find the typed classes.

        Args:
            image: picture file.
            classes: words in the grammar of `ovd.vocabulary`.
            threshold: lowest score to send; the floor when None.
            preview: add the upright picture, at most `PREVIEW_SIDE` long, as a data URL without metadata.

        Returns:
            See docs/api.md for the keys.

        Raises:
            UserError: no picture, no words, or something unreadable; the message is for the person.
        """
        start = time.perf_counter()
        if not image:
            raise UserError("Choose a picture first: drop one here, paste it, or click an example")
        # Words first: a typing mistake should not cost a run of the network.
        vocabulary = self.detector.resolve(classes)
        pixels = _read(Path(image))
        read = time.perf_counter()
        known = self.detector.runs
        regions = self.detector.embed(pixels)
        cached = self.detector.runs == known
        embedded = time.perf_counter()
        default = self.detector.threshold
        floor = min(FLOOR, default / 4)
        found = regions.classify(vocabulary, threshold=floor if threshold is None else threshold)
        classified = time.perf_counter()
        result = describe(found, default=default, floor=floor)
        result["negatives"] = [c.name for c in vocabulary.negatives]
        result["vocabulary"] = vocabulary.hash
        for row, entry in zip(result["classes"], vocabulary.positives, strict=True):
            row["synonyms"] = list(entry.synonyms)
        result["model"] = {key: self.detector.card.get(key) for key in ("name", "sha256")}
        result["regions"] = len(regions)
        result["cached"] = cached
        result["ms"] = {
            "read": _ms(read - start),
            "network": _ms(embedded - read),
            "words": _ms(classified - embedded),
        }
        if preview:
            result["preview"] = self._preview(regions.key, pixels)
        return result

    def _preview(self, key: str, pixels: NDArray[np.uint8]) -> str:
        found = self._previews.get(key)
        if found is None:
            found = data_url(pixels)
            self._previews[key] = found
            while len(self._previews) > self._keep:
                self._previews.popitem(last=False)
        return found


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 1)


def _read(path: Path) -> NDArray[np.uint8]:
    """Read an uploaded picture; messages do not show the server's paths."""
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise UserError(f"The picture has {size / 1e6:.1f} MB; at most {MAX_FILE_BYTES / 1e6:.0f} MB are allowed")
        return to_rgb(path)
    except BadImageError as problem:
        raise UserError(f"This picture cannot be used: {problem.reason.replace(str(path), 'the file')}") from problem
    except OSError as problem:
        raise UserError("The picture is not there any more; upload it again") from problem


def data_url(pixels: NDArray[np.uint8], *, side: int = PREVIEW_SIDE) -> str:
    """Encode a picture as a JPEG data URL, shrunk to ``side``; carries no metadata."""
    image = Image.fromarray(pixels)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def describe(found: Detections, *, default: float, floor: float) -> dict[str, Any]:
    """Turn detections into the JSON of the page and the endpoint.

    Args:
        found: detections from the floor upwards.
        default: the threshold the page starts with.
        floor: the lowest threshold it offers.
    """
    height, width = found.size
    return {
        "schema": SCHEMA,
        "size": [width, height],
        "threshold": round(default, 4),
        "floor": round(floor, 4),
        "classes": [
            {
                "id": i,
                "name": name,
                "best": round(float(found.best[i]), 4),
                "colour": style.colour,
                "ink": style.ink,
                "dash": list(style.dash),
            }
            for i, (name, style) in enumerate(zip(found.names, class_styles(found.names), strict=True))
        ],
        "detections": [
            {
                "class": int(found.class_id[i]),
                "score": round(float(found.confidence[i]), 4),
                "box": [round(float(v), 1) for v in found.xyxy[i]],
                "polygons": found.polygons(i),
            }
            for i in range(len(found))
        ],
        "notices": list(found.notices),
    }
