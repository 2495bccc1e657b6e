# SPDX-License-Identifier: Apache-2.0
"""Large pictures in tiles, through supervision's ``InferenceSlicer``, for objects that vanish when a picture is shrunk.

The network sees the whole picture once, and overlapping tiles of it at their own size. What a tile cuts off at its
inner border is left out: an object smaller than the overlap is whole in some tile, a larger one in the picture.

Shapes: n detections of all tiles, M mask side.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ovd.detections import Detections
from ovd.detector import Detector
from ovd.inference.postprocess import (
    CROSS_CLASS_IOU,
    MAX_DETECTIONS,
    NMS_IOU,
    Candidates,
    ClassifyOptions,
    postprocess,
)
from ovd.pictures import ImageLike, to_rgb
from ovd.query import Query
from pretrain.engine.errors import UserError

if TYPE_CHECKING:
    from typing_extensions import Unpack

OVERLAP = 0.25  # of a tile's side
CUT = 2.0  # pixels from the border of a tile within which a box counts as cut off there
SIDES = ("left", "top", "right", "bottom")
MOST = 10_000  # tiles of a picture


class TiledDetector(Detector):
    """A detector that runs on the whole picture and on tiles of it.

    Args:
        detector: runs on each.
        side: of a tile in pixels; None: the short side that the network was trained at.

    Raises:
        UserError: supervision is not installed.
    """

    def __init__(self, detector: Detector, *, side: int | None = None) -> None:
        try:
            import supervision  # noqa: F401
        except ImportError as problem:
            raise UserError("--tiles needs the package supervision: pip install supervision") from problem
        card = detector.model.card
        self.side = side or (256 if card is None else card.short_side)
        # `predict` keeps results by sha256: those without tiles, or with others, must not be taken for these.
        digest = f"{detector.card.get('sha256', '')} in tiles of {self.side}"
        super().__init__(
            model=detector.model,
            encoder=detector.text.encoder,
            templates=detector.templates,
            cache_size=0,
            text_cache=detector.text.cache_dir,
            crop_refinement=detector.crop_refinement,
            card={**detector.card, "sha256": digest},
        )

    def answer(
        self, image: ImageLike, query: Query, *, threshold: float | None = None, **options: Unpack[ClassifyOptions]
    ) -> Detections:
        """Detect in the whole picture and, where it is larger than a tile, in its tiles; see `Detector.answer`."""
        pixels = to_rgb(image)
        overview = super().answer(pixels, query, threshold=threshold, **options)
        height, width = pixels.shape[:2]
        if max(height, width) <= self.side:
            return overview
        step = self.side - round(OVERLAP * self.side)
        if (tiles := (height // step + 1) * (width // step + 1)) > MOST:
            raise UserError(
                f"{width}×{height} pixels are {tiles:,} tiles of {self.side}; give --tile-side a larger number"
            )
        parts: list[Detections] = []

        def detect(tile: NDArray[np.uint8]) -> Any:
            detections = super(TiledDetector, self).answer(tile, query, threshold=threshold, **options)
            parts.append(detections)
            return _with_cuts(detections, len(parts) - 1)

        import supervision

        slicer = supervision.InferenceSlicer(
            callback=detect,
            slice_wh=self.side,
            overlap_wh=round(OVERLAP * self.side),
            overlap_filter=supervision.OverlapFilter.NONE,
        )
        moved = slicer(pixels)
        return _joined(overview, parts, moved, limit=options.get("limit", MAX_DETECTIONS))


def _with_cuts(detections: Detections, part: int) -> Any:
    """A tile's boxes for supervision, with where they come from and the sides at which the tile cuts them off."""
    from supervision import Detections as Target

    height, width = detections.size
    x1, y1, x2, y2 = detections.xyxy.T
    cut = {"left": x1 < CUT, "top": y1 < CUT, "right": x2 > width - CUT, "bottom": y2 > height - CUT}
    rows = {"part": np.full(len(detections), part), "row": np.arange(len(detections))}
    return Target(
        xyxy=detections.xyxy.copy(),
        confidence=detections.confidence.copy(),
        class_id=detections.class_id.astype(int),
        data={**cut, **rows},
    )


def _joined(overview: Detections, parts: list[Detections], moved: Any, *, limit: int) -> Detections:
    """The whole picture's detections and those of the tiles that no tile cuts off, after NMS."""
    height, width = overview.size
    boxes, scores, classes, masks = [overview.xyxy], [overview.confidence], [overview.class_id], [overview.box_masks]
    if len(moved):
        x1, y1, x2, y2 = moved.xyxy.T
        at_border = {"left": x1 < CUT, "top": y1 < CUT, "right": x2 > width - CUT, "bottom": y2 > height - CUT}
        inner = np.zeros(len(moved), dtype=bool)
        for side in SIDES:
            inner |= np.asarray(moved.data[side], dtype=bool) & ~at_border[side]
        uncut = moved[~inner]
        boxes.append(uncut.xyxy.astype(np.float32))
        scores.append(uncut.confidence.astype(np.float32))
        classes.append(uncut.class_id.astype(np.int64))
        for part, row in zip(uncut.data["part"], uncut.data["row"], strict=True):
            tile_masks = parts[int(part)].box_masks
            masks.append(None if tile_masks is None else tile_masks[int(row) : int(row) + 1])
    xyxy, score = np.concatenate(boxes), np.concatenate(scores)
    box_masks = None if overview.box_masks is None else np.concatenate([m for m in masks if m is not None])
    candidates = Candidates(np.arange(len(score)), np.concatenate(classes), score)
    return Detections.of(
        postprocess(xyxy, candidates, nms_iou=NMS_IOU, cross_class_iou=CROSS_CLASS_IOU, limit=limit),
        boxes=xyxy,
        size=overview.size,
        names=overview.names,
        best=np.max([overview.best, *(part.best for part in parts)], axis=0),
        threshold=overview.threshold,
        masks=box_masks,
        notices=overview.notices,
    )
