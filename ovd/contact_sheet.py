# SPDX-License-Identifier: Apache-2.0
"""A contact sheet: one self-contained HTML file with the detections of each class, lowest scores first."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw

from ovd.colours import class_styles
from ovd.formats.shapes import LabelledPictures, Picture, Shape
from ovd.pictures import to_rgb
from pretrain.engine.errors import BadImageError

if TYPE_CHECKING:
    from numpy.typing import NDArray

SIDE = 112  # pixels of a thumbnail
AROUND = 0.25  # of a box's longer side, shown on every side of it
PER_CLASS = 60  # thumbnails of a class
WITHOUT = 24  # pictures in which nothing was found

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:75rem;padding:0 1rem;color:#1a1a1a;background:#fff}
h1{font-size:1.4rem}h2{font-size:1.1rem;margin:2rem 0 .5rem;border-bottom:3px solid;padding-bottom:.2rem}
p{margin:.3rem 0;color:#555}nav a{margin-right:1rem}
.sheet{display:flex;flex-wrap:wrap;gap:.6rem}
figure{margin:0;width:112px}figure img{display:block;width:112px;height:112px;object-fit:contain;background:#eee}
figcaption{font-size:.75rem;overflow:hidden;text-overflow:ellipsis;white-space:nowrap}
@media(prefers-color-scheme:dark){body{color:#eee;background:#161616}p{color:#aaa}a{color:#8cf}
figure img{background:#2a2a2a}}
"""


@dataclass(frozen=True, kw_only=True)
class _Sample:
    picture: Picture
    shape: Shape

    @property
    def score(self) -> float:
        return 1.0 if self.shape.score is None else self.shape.score


def contact_sheet(labelled: LabelledPictures, *, title: str, threshold: float) -> str:
    """The page.

    Args:
        labelled: pictures with their detections.
        title: of the page.
        threshold: from which detections are listed, for the page to say.

    Returns:
        HTML; thumbnails are in it.
    """
    by_class: dict[str, list[_Sample]] = {name: [] for name in labelled.names}
    for picture in labelled.pictures:
        for shape in picture.shapes:
            by_class[shape.name].append(_Sample(picture=picture, shape=shape))
    chosen = {name: sorted(rows, key=lambda f: f.score)[:PER_CLASS] for name, rows in by_class.items()}
    without = [picture for picture in labelled.pictures if not picture.shapes]
    thumbnails = _thumbnails([f for rows in chosen.values() for f in rows], without[:WITHOUT])
    sections = []
    for (name, rows), style in zip(by_class.items(), class_styles(labelled.names), strict=True):
        figures = [_figure(thumbnails[id(f)], f"{f.score:.2f}", f.picture.file) for f in chosen[name]]
        note = f"{len(rows)} found" + (
            f", the {len(chosen[name])} most doubtful are shown" if len(rows) > PER_CLASS else ""
        )
        sections.append(_section(name, note, figures, colour=style.colour))
    if without:
        figures = [_figure(thumbnails[id(p)], "", p.file) for p in without[:WITHOUT]]
        note = f"{len(without)} pictures" + (f", {WITHOUT} are shown" if len(without) > WITHOUT else "")
        sections.append(_section("nothing found", note, figures, colour="#888888"))
    links = " ".join(
        f'<a href="#c{i}">{html.escape(name)} ({len(rows)})</a>' for i, (name, rows) in enumerate(by_class.items())
    )
    head = (
        f"<h1>{html.escape(title)}</h1>\n<p>{len(labelled.pictures)} pictures, "
        f"{sum(map(len, by_class.values()))} objects from a score of {threshold:.2f} on. In each class the doubtful "
        f"come first: if they are wrong, run again with a higher --threshold.</p>\n<nav>{links}</nav>"
    )
    body = "\n".join(section.replace("<h2", f'<h2 id="c{i}"', 1) for i, section in enumerate(sections))
    return (
        '<!doctype html>\n<html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style>\n{head}\n{body}\n</html>\n"
    )


def _section(title: str, note: str, figures: Sequence[str], *, colour: str) -> str:
    rows = "\n".join(figures) or "<p>none</p>"
    head = f'<h2 style="border-color:{colour}">{html.escape(title)}</h2>\n<p>{note}</p>\n'
    return f'{head}<div class="sheet">\n{rows}\n</div>'


def _figure(data: str, score: str, file: str) -> str:
    name = html.escape(file, quote=True)
    caption = f"{score} {name}".strip()
    return f'<figure title="{name}"><img alt="{name}" src="{data}"><figcaption>{caption}</figcaption></figure>'


def _thumbnails(samples: Sequence[_Sample], pictures: Sequence[Picture]) -> dict[int, str]:
    """Data URLs by the identity of what they show; every picture is read once."""
    samples_of: dict[str, list[_Sample]] = {}
    for sample in samples:
        samples_of.setdefault(sample.picture.file, []).append(sample)
    result: dict[int, str] = {}
    for rows in samples_of.values():
        pixels = _pixels(rows[0].picture)
        result |= {id(sample): _data_url(_crop(pixels, sample.shape)) for sample in rows}
    return result | {id(picture): _data_url(Image.fromarray(_pixels(picture))) for picture in pictures}


def _pixels(picture: Picture) -> NDArray[np.uint8]:
    try:
        return to_rgb(picture.source)
    except BadImageError:  # deleted since it was predicted
        return np.full((SIDE, SIDE, 3), 128, dtype=np.uint8)


def _crop(pixels: NDArray[np.uint8], shape: Shape) -> Image.Image:
    """A box with its surroundings and outline."""
    height, width = pixels.shape[:2]
    x1, y1, x2, y2 = shape.box
    margin = AROUND * max(x2 - x1, y2 - y1, 8.0)
    left, top = max(0, round(x1 - margin)), max(0, round(y1 - margin))
    right, bottom = min(width, max(round(x2 + margin), left + 1)), min(height, max(round(y2 + margin), top + 1))
    if left >= right or top >= bottom:
        left, top, right, bottom = 0, 0, width, height
    crop = Image.fromarray(pixels[top:bottom, left:right])
    scale = SIDE / max(crop.size)
    crop = crop.resize((max(1, round(crop.width * scale)), max(1, round(crop.height * scale))))
    corners = [(x1 - left) * scale, (y1 - top) * scale, (x2 - left) * scale - 1, (y2 - top) * scale - 1]
    if corners[2] > corners[0] and corners[3] > corners[1]:
        pen = ImageDraw.Draw(crop)
        pen.rectangle(corners, outline="white", width=3)
        pen.rectangle(corners, outline="black", width=1)
    return crop


def _data_url(image: Image.Image) -> str:
    image.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
