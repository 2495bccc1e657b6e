# SPDX-License-Identifier: Apache-2.0
"""The detections of one picture, and their forms: masks, polygons, rows, drawings, COCO results, supervision.

Shapes: C classes, n detections, M mask side.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypedDict

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ovd.pictures import ImageLike, to_rgb
from pretrain.data.masks import JsonRle, encode_mask
from pretrain.engine.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from supervision import Detections as SupervisionDetections

    from ovd.inference.postprocess import Candidates

MASK_THRESHOLD = 0.5


class _Mask(TypedDict, total=False):
    segmentation: JsonRle


class CocoResult(_Mask):
    """One row of a COCO results file; ``bbox`` is x, y, width, height, ``segmentation`` compressed run lengths."""

    image_id: int | str
    category_id: int
    bbox: list[float]
    score: float


DetectionRow = TypedDict(
    "DetectionRow", {"class": str, "score": float, "x1": float, "y1": float, "x2": float, "y2": float}
)
"""One detection as plain values: columns of the CSV that ``wordbox predict --format csv`` writes."""


def paste_mask(mask_MM: NDArray[np.float32], box: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.bool_]:
    """Draw one mask from the frame of its box onto the picture.

    Bilinear, with cell centres at (i + ½) / M of the box; a pixel is set when the value at its centre is at least
    `MASK_THRESHOLD` and its centre is inside the box.

    Args:
        mask_MM: (M, M) probabilities.
        box: (4,) x1, y1, x2, y2 in pixels.
        size: (height, width) of the picture.

    Returns:
        (height, width) bool.
    """
    height, width = size
    canvas = np.zeros((height, width), dtype=bool)
    x1, y1, x2, y2 = (float(v) for v in box)
    if not (x2 > x1 and y2 > y1):
        return canvas
    # First and last pixel whose centre (index + ½) lies in the box.
    left, right = max(0, int(np.ceil(x1 - 0.5))), min(width, int(np.floor(x2 - 0.5)) + 1)
    top, bottom = max(0, int(np.ceil(y1 - 0.5))), min(height, int(np.floor(y2 - 0.5)) + 1)
    if left >= right or top >= bottom:
        return canvas
    u = (np.arange(left, right, dtype=np.float32) + np.float32(0.5 - x1)) / np.float32(x2 - x1)
    v = (np.arange(top, bottom, dtype=np.float32) + np.float32(0.5 - y1)) / np.float32(y2 - y1)
    canvas[top:bottom, left:right] = sampled(mask_MM, v, u) >= MASK_THRESHOLD
    return canvas


def sampled(mask_MM: NDArray[np.float32], v: NDArray[np.float32], u: NDArray[np.float32]) -> NDArray[np.float32]:
    """Bilinear values of a mask at every pair of ``v`` (down) and ``u`` (right), in shares of its side.

    The outer half cell belongs to the mask: it does not fade to zero inside the box.
    """
    side = len(mask_MM)
    values = np.asarray(mask_MM, dtype=np.float32)
    for at in (v, u):  # first the rows, then, turned, the columns
        cell = np.clip(at * side - np.float32(0.5), 0, side - 1)
        low = np.minimum(cell.astype(np.int64), max(side - 2, 0))
        share = (cell - low)[:, None]
        values = ((1 - share) * values[low] + share * values[np.minimum(low + 1, side - 1)]).T
    return values


@dataclass(kw_only=True, repr=False)
class Detections:
    """The detections of one picture, best score first.

    ``detections[i]``, ``detections[:10]``, ``detections["dog"]`` and ``detections[detections.confidence > 0.5]`` are
    some of them.

    Attributes:
        xyxy: (n, 4) float32 corners in pixels of the original picture.
        confidence: (n,) float32 in [0, 1].
        class_id: (n,) int64, index into ``names``.
        class_name: n names.
        size: (height, width) of the picture.
        names: the C classes asked for.
        best: (C,) float32, best score of each class over all regions, shown or not.
        threshold: the score from which detections are listed.
        region: (n,) int64, index of the region in `Regions`.
        box_masks: (n, M, M) float32 mask probabilities in the frame of each box, or None.
        notices: what parsing the class names changed.
    """

    xyxy: NDArray[np.float32]
    confidence: NDArray[np.float32]
    class_id: NDArray[np.int64]
    class_name: list[str]
    size: tuple[int, int]
    names: tuple[str, ...]
    best: NDArray[np.float32]
    threshold: float
    region: NDArray[np.int64]
    box_masks: NDArray[np.float32] | None = None
    notices: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        candidates: Candidates,
        *,
        boxes: NDArray[np.float32],
        size: tuple[int, int],
        names: tuple[str, ...],
        best: NDArray[np.float32],
        threshold: float,
        masks: NDArray[np.float32] | None = None,
        notices: tuple[str, ...] = (),
    ) -> Detections:
        """Detections of the candidates that `ovd.inference.postprocess.postprocess` returns.

        Args:
            candidates: regions with class and score, best first.
            boxes: (R, 4) of all regions.
            masks: (R, M, M) of all regions, or None.
            size, names, best, threshold, notices: see the attributes.
        """
        height, width = size
        border = np.array([width, height, width, height], np.float32)
        return cls(
            # Scaled from the network's input, a box at the border ends 1e-5 pixels behind it.
            xyxy=np.clip(boxes[candidates.region], 0, border),
            confidence=candidates.score,
            class_id=candidates.class_id,
            class_name=[names[i] for i in candidates.class_id],
            size=size,
            names=names,
            best=best,
            threshold=threshold,
            region=candidates.region,
            box_masks=None if masks is None else masks[candidates.region],
            notices=notices,
        )

    def __len__(self) -> int:
        return len(self.confidence)

    def __getitem__(
        self, index: int | slice | str | Sequence[int] | NDArray[np.int64] | NDArray[np.bool_]
    ) -> Detections:
        """Some of the detections: by number, slice, name of a class, numbers, or one bool for each.

        Raises:
            IndexError: no such detection, or another number of bools.
            UserError: a class that was not asked for.
        """
        if isinstance(index, str):
            if index not in self.names:
                raise UserError(f"{index!r} is none of the classes asked for{did_you_mean(index, self.names)}")
            return self.chosen(np.flatnonzero(self.class_id == self.names.index(index)))
        if isinstance(index, bool):  # NumPy would take it for all or none
            raise IndexError(
                f"{index} is one bool for {len(self)} detections: class_name is a list, which is compared as a whole; "
                'detections["dog"] are those of a class'
            )
        if isinstance(index, Sequence) and not len(index):
            index = slice(0)  # NumPy would read an empty list as floats
        return self.chosen(np.atleast_1d(np.arange(len(self))[index]))

    def __repr__(self) -> str:
        counts = ", ".join(f"{name} × {count}" for name, count in Counter(self.class_name).items())
        height, width = self.size
        masks = "" if self.box_masks is None else ", with masks"
        return f"<Detections in {width} × {height} pixels: {counts or 'none'}{masks}>"

    def mask_of(self, index: int) -> NDArray[np.bool_] | None:
        """The (H, W) bool mask of one detection, or None when the model has no masks."""
        if self.box_masks is None:
            return None
        return paste_mask(self.box_masks[index], self.xyxy[index], self.size)

    @property
    def mask(self) -> NDArray[np.bool_] | None:
        """(n, H, W) bool masks, drawn when asked for: n × H × W bytes. `mask_of` draws one at a time."""
        if self.box_masks is None:
            return None
        masks = np.zeros((len(self), *self.size), dtype=bool)
        for i in range(len(self)):
            masks[i] = self.mask_of(i)
        return masks

    @property
    def not_found(self) -> list[tuple[str, float]]:
        """(class, best score) of every class without a detection at the threshold, in the order typed.

        A best score of the threshold or more: another class scores as high or higher on the same box.
        """
        detected = set(self.class_id.tolist())
        return [(name, float(self.best[i])) for i, name in enumerate(self.names) if i not in detected]

    def above(self, threshold: float) -> Detections:
        """The detections with at least this score; equals asking again with a higher threshold."""
        chosen = self.chosen(np.flatnonzero(self.confidence >= threshold))
        return replace(chosen, threshold=max(threshold, self.threshold))

    def chosen(self, keep: NDArray[np.int64]) -> Detections:
        """Some of the detections, by index."""
        return replace(
            self,
            xyxy=self.xyxy[keep],
            confidence=self.confidence[keep],
            class_id=self.class_id[keep],
            class_name=[self.class_name[i] for i in keep],
            region=self.region[keep],
            box_masks=None if self.box_masks is None else self.box_masks[keep],
        )

    def draw(self, image: ImageLike, *, masks: bool = True) -> Image.Image:
        """Draw boxes, labels and masks onto a copy of the picture.

        Args:
            image: the picture that was searched, see `ovd.pictures.to_rgb`.
            masks: fill the masks, where there are any.

        Returns:
            an upright RGB picture: ``.save("found.jpg")`` and ``.show()`` are Pillow's, and notebooks display it.

        Raises:
            UserError: a picture of another size.
        """
        from ovd.drawing import draw_detections

        return Image.fromarray(draw_detections(self._pixels(image), self, masks=masks))

    def crops(self, image: ImageLike) -> list[Image.Image]:
        """Cut the boxes out of the picture; outwards to whole pixels, at least one each.

        Args:
            image: the picture that was searched, see `ovd.pictures.to_rgb`.

        Returns:
            n upright RGB pictures.

        Raises:
            UserError: a picture of another size.
        """
        picture = Image.fromarray(self._pixels(image))
        low = np.clip(np.floor(self.xyxy[:, :2]), 0, (picture.width - 1, picture.height - 1))
        high = np.clip(np.ceil(self.xyxy[:, 2:]), low + 1, (picture.width, picture.height))
        corners = np.concatenate([low, high], axis=1).astype(int).tolist()
        return [picture.crop((x1, y1, x2, y2)) for x1, y1, x2, y2 in corners]

    def _pixels(self, image: ImageLike) -> NDArray[np.uint8]:
        pixels = to_rgb(image)
        (height, width), (is_high, is_wide) = self.size, pixels.shape[:2]
        if (is_high, is_wide) != (height, width):
            raise UserError(
                f"the picture has {is_wide} × {is_high} pixels, these are detections in {width} × {height}: give the "
                "picture that was searched"
            )
        return pixels

    def to_rows(self) -> list[DetectionRow]:
        """Return plain values, best first, for ``pandas.DataFrame``, ``json.dump`` or ``csv.DictWriter``.

        Corners are in pixels, rounded to hundredths.
        """
        return [
            {
                "class": name,
                "score": round(float(score), 5),
                "x1": round(float(x1), 2),
                "y1": round(float(y1), 2),
                "x2": round(float(x2), 2),
                "y2": round(float(y2), 2),
            }
            for name, score, (x1, y1, x2, y2) in zip(self.class_name, self.confidence, self.xyxy, strict=True)
        ]

    def to_supervision(self) -> SupervisionDetections:
        """Convert to `supervision.Detections`, with ``data["class_name"]``.

        Raises:
            UserError: the package is not installed.
        """
        try:
            from supervision import Detections as Target
        except ImportError as problem:
            raise UserError("to_supervision needs the package: pip install supervision") from problem
        return Target(
            xyxy=self.xyxy.copy(),
            mask=self.mask,
            confidence=self.confidence.copy(),
            class_id=self.class_id.astype(int),
            data={"class_name": np.array(self.class_name, dtype=object if not self.class_name else None)},
        )

    def to_coco(
        self, image_id: int, *, category_ids: Sequence[int] | None = None, masks: bool = True
    ) -> list[CocoResult]:
        """Return rows of a COCO results file.

        Args:
            image_id: id of the picture.
            category_ids: id of each class; ``class_id`` + 1 when None.
            masks: add ``segmentation`` as compressed RLE.
        """
        rows = []
        for i in range(len(self)):
            x1, y1, x2, y2 = (float(v) for v in self.xyxy[i])
            class_id = int(self.class_id[i])
            row: CocoResult = {
                "image_id": int(image_id),
                "category_id": class_id + 1 if category_ids is None else int(category_ids[class_id]),
                "bbox": [round(v, 2) for v in (x1, y1, x2 - x1, y2 - y1)],
                "score": round(float(self.confidence[i]), 5),
            }
            if masks and (mask := self.mask_of(i)) is not None:
                row["segmentation"] = encode_mask(mask)
            rows.append(row)
        return rows

    def polygons(self, index: int, *, side: int = 112) -> list[list[float]]:
        """Outline of one mask as closed polygons [x1, y1, x2, y2, …] in pixels, for drawing; [] without masks.

        Args:
            index: which detection.
            side: resolution at which the outline is followed, in cells over the box.
        """
        if self.box_masks is None:
            return []
        import cv2

        x1, y1, x2, y2 = (float(v) for v in self.xyxy[index])
        centres = (np.arange(side, dtype=np.float32) + np.float32(0.5)) / np.float32(side)
        binary = np.pad((sampled(self.box_masks[index], centres, centres) >= MASK_THRESHOLD).astype(np.uint8), 1)
        contours, _ = cv2.findContours(binary, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
        result = []
        for contour in contours:
            if cv2.contourArea(contour) < 0.004 * side * side:  # crumbs below half a per cent of the box
                continue
            points = cv2.approxPolyDP(contour, 0.6, True)[:, 0].astype(np.float64)
            if len(points) < 3:
                continue
            points = (points - 1 + 0.5) / side * (x2 - x1, y2 - y1) + (x1, y1)
            result.append([round(float(v), 1) for v in points.reshape(-1)])
        return result
