# SPDX-License-Identifier: Apache-2.0
"""Query by example: crops and boxes of objects to find, alone or beside words.

    detector.find("desk.jpg", examples={"my mug": ["mug1.png", "mug2.png"], "-poster": "poster.png"})
    detector.find("desk.jpg", "lamp, chair", examples=[(120, 40, 210, 160)])       # a box on that picture

An example is embedded like the regions of the distillation (ViLD section 3.2: the crop at 1x and 1.5x through the image
encoder), so region and example live in one space and their cosine is the similarity. Several crops of one name are
embedded one by one and averaged.

Shapes: E examples, V crops of one example, D joint embedding.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ovd.inference.arrays import Floats, unit_rows
from ovd.locks import ComputeLock
from ovd.pictures import ImageLike, to_rgb
from ovd.regions.cutting import CropEncoder, crop_rows
from ovd.vocabulary import split_name
from pretrain.engine.errors import UserError

if TYPE_CHECKING:
    Box = Sequence[float] | NDArray[Any]
    CropLike: TypeAlias = "ImageLike | Box | Crop"
    ExamplesLike: TypeAlias = (
        "Mapping[str, CropLike | Sequence[CropLike]] | Iterable[CropLike | tuple[str, CropLike] | Example]"
    )

MIN_SIDE = 8  # pixels; below it a crop is a smear of its surroundings
MAX_EXAMPLES = 100
MAX_CROPS = 50  # of one example
REMEMBERED_CROPS = 256  # the least recently used one goes first


@dataclass(frozen=True, eq=False)
class Crop:
    """A part of a picture that shows the thing to find, with its surroundings where there are any.

    Attributes:
        pixels: (H, W, 3) uint8 RGB, the whole picture.
        box: x1, y1, x2, y2 in its pixels, inside it; None: the picture is the crop.
    """

    pixels: NDArray[np.uint8]
    box: tuple[float, float, float, float] | None = None

    @property
    def corners(self) -> tuple[float, float, float, float]:
        """The box, or the border of the picture."""
        height, width = self.pixels.shape[:2]
        return self.box or (0.0, 0.0, float(width), float(height))

    @property
    def hash(self) -> str:
        """sha256 over pixels and box."""
        head = f"{self.pixels.shape} {self.corners}".encode()
        return hashlib.sha256(head + np.ascontiguousarray(self.pixels).tobytes()).hexdigest()


@dataclass(frozen=True, eq=False)
class Example:
    """A class given by crops instead of words.

    Attributes:
        name: what its boxes are called.
        crops: one or more pictures of it.
        negative: regions that look more like it than like a class are left out.
    """

    name: str
    crops: tuple[Crop, ...]
    negative: bool = False

    @property
    def hash(self) -> str:
        """sha256 over the crops, in their order."""
        return hashlib.sha256("".join(crop.hash for crop in self.crops).encode()).hexdigest()


def parse_examples(examples: ExamplesLike, *, picture: NDArray[np.uint8] | None = None) -> tuple[Example, ...]:
    """Read examples in any form.

    Args:
        examples: a mapping of names to one crop or several, or a list of crops, (name, crop) pairs and `Example`s. A
            crop is a picture (path, bytes, Pillow image, uint8 array), a box of four numbers on ``picture``, or a
            `Crop`. Crops without a name are separate things, "example 1", "example 2", …; a name with a minus is a
            negative example; crops of one name belong together.
        picture: (H, W, 3) uint8 RGB, what boxes without a picture lie on.

    Raises:
        UserError: an empty crop, a box that is too small or outside, something that is no picture; it names the
            example.
    """
    pairs: list[tuple[str, Any]] = []
    if isinstance(examples, Mapping):
        for name, crops in examples.items():
            pairs.extend(
                (str(name), crop) for crop in (list(cast("Iterable[Any]", crops)) if _is_several(crops) else [crops])
            )
    elif isinstance(examples, (str, bytes, Path, Image.Image, np.ndarray, Crop)):
        pairs.append(("", examples))
    else:
        for item in examples:
            if isinstance(item, Example):
                pairs.extend((("-" if item.negative else "") + item.name, crop) for crop in item.crops)
            elif isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str):
                pairs.append((item[0], item[1]))
            else:
                pairs.append(("", item))
    merged: dict[tuple[str, bool], tuple[str, list[Crop]]] = {}
    for number, (raw, crop) in enumerate(pairs, 1):
        name, negative = split_name(raw)
        name = name or f"example {number}"
        stored = merged.setdefault((name.casefold(), negative), (name, []))[1]
        stored.append(read_crop(crop, name=name, picture=picture))
        if len(stored) > MAX_CROPS:
            raise UserError(f"example {name!r} has more than {MAX_CROPS} crops; choose the best few")
    if len(merged) > MAX_EXAMPLES:
        raise UserError(f"{len(merged)} examples; at most {MAX_EXAMPLES} are allowed")
    for folded, negative in merged:
        if negative and (folded, False) in merged:
            raise UserError(f"example {merged[folded, True][0]!r} is given both as a class and with a minus")
    return tuple(Example(name, tuple(crops), negative) for (_, negative), (name, crops) in merged.items())


def _is_several(crops: Any) -> bool:
    """Whether a mapping's value is a list of crops rather than one picture or box."""
    return isinstance(crops, (list, tuple)) and not _is_box(crops)


def _is_box(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return value.shape == (4,)
    return isinstance(value, (list, tuple)) and len(value) == 4 and all(isinstance(v, (int, float)) for v in value)


def read_crop(crop: Any, *, name: str, picture: NDArray[np.uint8] | None = None) -> Crop:
    """One crop in any form, checked; see `parse_examples`."""

    if isinstance(crop, Crop):
        pixels, box = crop.pixels, crop.box
    elif _is_box(crop):
        if picture is None:
            raise UserError(f"example {name!r}: a box needs the picture it lies on; give Crop(pixels, box)")
        pixels, box = picture, tuple(float(v) for v in crop)  # type: ignore[assignment]
    else:
        pixels, box = crop, None
    if isinstance(pixels, np.ndarray) and 0 in pixels.shape:
        raise UserError(f"example {name!r}: the crop is empty ({'×'.join(map(str, pixels.shape[1::-1]))} pixels)")
    try:
        pixels = to_rgb(pixels)
    except UserError as problem:
        raise UserError(f"example {name!r}: {problem}") from problem
    height, width = pixels.shape[:2]
    if box is not None:
        if not np.isfinite(box).all():
            raise UserError(f"example {name!r}: the box has NaN or infinite coordinates")
        # What hangs out of the picture shows nothing; the rest is the crop.
        box = (max(0.0, box[0]), max(0.0, box[1]), min(float(width), box[2]), min(float(height), box[3]))
        if box[2] <= box[0] or box[3] <= box[1]:
            raise UserError(f"example {name!r}: the box is empty or outside the picture of {width}×{height} pixels")
    result = Crop(pixels, box)
    x1, y1, x2, y2 = result.corners
    if min(x2 - x1, y2 - y1) < MIN_SIDE:
        raise UserError(
            f"example {name!r} is {x2 - x1:.0f}×{y2 - y1:.0f} pixels; "
            f"at least {MIN_SIDE}×{MIN_SIDE} are needed to tell what it shows"
        )
    return result


class ExampleEmbedder:
    """Embeds examples with an image encoder and remembers the crops seen last.

    Args:
        encoder: image encoder in eval mode; that of the space the detector's regions live in.
    """

    def __init__(self, *, encoder: CropEncoder) -> None:
        self.encoder = encoder
        self._memory: OrderedDict[str, Floats] = OrderedDict()
        self._lock = ComputeLock()

    def embed(self, examples: Sequence[Example]) -> Floats:
        """(E, D) float32 unit rows: the mean of an example's unit crop embeddings, normalised again."""
        if not examples:
            return np.zeros((0, self.encoder.embed_dim), np.float32)
        with self._lock:
            rows = [np.stack([self._crop(crop) for crop in e.crops]).mean(axis=0) for e in examples]
        return unit_rows(np.stack(rows))

    def _crop(self, crop: Crop) -> Floats:
        key = crop.hash
        if key not in self._memory:
            self._memory[key] = crop_rows(self.encoder, crop.pixels, np.array([crop.corners]))[0]
        self._memory.move_to_end(key)
        while len(self._memory) > REMEMBERED_CROPS:
            self._memory.popitem(last=False)
        return self._memory[key]
