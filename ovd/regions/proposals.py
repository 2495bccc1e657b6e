# SPDX-License-Identifier: Apache-2.0
"""Class-agnostic proposals: the proposers' interface, selection, and resizing with their picture.

All boxes are ``(P, 4)`` float32 xyxy in pixels; a picture of width ``W`` spans ``[0, W]``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

import numpy as np

from ovd.inference.arrays import as_array

if TYPE_CHECKING:
    from numpy.typing import NDArray

MIN_SIDE = 2.0
"""Boxes with a side under this many pixels are dropped: a crop of them shows nothing."""


class Proposals(NamedTuple):
    """Boxes ``(P, 4)`` and scores ``(P,)``, float32, best first."""

    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]


@runtime_checkable
class Proposer(Protocol):
    """Anything that finds objects without naming them; ``ovd.inference.region_model.RegionModel`` is one."""

    def propose(self, image: NDArray[np.uint8], *, top: int) -> tuple[object, object]:
        """Return boxes ``(P, 4)`` xyxy in original pixels and scores ``(P,)``, ``P <= top``; arrays or tensors."""
        ...


@runtime_checkable
class PositionProposer(Proposer, Protocol):
    """A proposer that knows the boxes of a picture by its position in the source."""

    def propose_at(self, index: int) -> tuple[object, object]:
        """Boxes ``(P, 4)`` and scores ``(P,)`` of picture ``index``."""
        ...


class GroundTruthProposer:
    """Proposes the annotated boxes of picture ``index``: for tests and upper bounds, never for training.

    Args:
        boxes_of: returns the ``(n, 4)`` xyxy boxes of a picture by its position in the source.
    """

    def __init__(self, boxes_of: Callable[[int], NDArray[np.floating]]) -> None:
        self._boxes_of = boxes_of

    def propose_at(self, index: int) -> tuple[object, object]:
        """The boxes of picture ``index``, all with score 1."""
        boxes = np.asarray(self._boxes_of(index), dtype=np.float32).reshape(-1, 4)
        return boxes, np.ones(len(boxes), dtype=np.float32)

    def propose(self, image: NDArray[np.uint8], *, top: int) -> tuple[object, object]:
        """Not possible: ground truth belongs to a position, not to pixels."""
        raise TypeError("GroundTruthProposer knows boxes by position: call propose_at(index)")


def select_proposals(
    boxes: object, scores: object, *, width: int, height: int, top: int, min_side: float = MIN_SIDE
) -> Proposals:
    """Clip to the picture, drop what cannot be cropped, keep the ``top`` best.

    Args:
        boxes: ``(P, 4)`` array or tensor, xyxy in pixels; may hold NaN or hang out of the picture.
        scores: ``(P,)`` array or tensor; may hold NaN.
        width: width of the picture.
        height: height of the picture.
        top: how many to keep.
        min_side: boxes with a shorter side after clipping are dropped.

    Returns:
        at most ``top`` proposals by falling score; equal scores keep their order.
    """
    box_P4 = as_array(boxes).astype(np.float32, copy=False).reshape(-1, 4)
    score_P = as_array(scores).astype(np.float32, copy=False).reshape(-1)
    if len(box_P4) != len(score_P):
        raise ValueError(f"{len(box_P4)} boxes but {len(score_P)} scores")
    finite = np.isfinite(box_P4).all(axis=1) & np.isfinite(score_P)
    box_P4, score_P = box_P4[finite], score_P[finite]
    box_P4 = np.clip(box_P4, 0, np.array([width, height, width, height], dtype=np.float32))
    large = ((box_P4[:, 2:] - box_P4[:, :2]) >= min_side).all(axis=1)
    box_P4, score_P = box_P4[large], score_P[large]
    order = np.argsort(-score_P, kind="stable")[:top]
    return Proposals(np.ascontiguousarray(box_P4[order]), np.ascontiguousarray(score_P[order]))


def large_enough(boxes: NDArray[np.float32]) -> NDArray[np.bool_]:
    """(P,) bool: which of ``(P, 4)`` boxes have both sides of at least `MIN_SIDE` pixels."""
    return (boxes[:, 2:] - boxes[:, :2]).min(axis=1, initial=np.inf) >= MIN_SIDE


def resize_boxes(boxes: NDArray[np.float32], old_hw: tuple[int, int], new_hw: tuple[int, int]) -> NDArray[np.float32]:
    """Scale ``(P, 4)`` boxes with a picture resized from ``old_hw`` to ``new_hw`` (height, width)."""
    sy, sx = new_hw[0] / old_hw[0], new_hw[1] / old_hw[1]
    return boxes * np.array([sx, sy, sx, sy], dtype=np.float32)
