# SPDX-License-Identifier: Apache-2.0
"""Distinguishes YOLO's poses from its outlines where ``data.yaml`` does not say which they are.

Both are lines of many numbers. Of a pose the first four are the box ``cx cy width height``, and the others keypoints in
it, ``x y`` or ``x y v`` with a visibility of 0, 1 or 2. Read as an outline the object would be another one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

BORDER = 0.02
"""Share of the picture by which a keypoint may lie outside its box, and a box outside the picture."""
ENOUGH = 5
"""Lines, of which a data set's form is certain: a few spiky outlines may look like poses by chance."""


def keypoint_shape(values: Sequence[float]) -> tuple[int, int] | None:
    """(number of keypoints, numbers of each) of a line that can be a pose; None: it cannot.

    Args:
        values: without the class.
    """
    if len(values) < 6:
        return None
    cx, cy, w, h = values[:4]
    box = (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2)
    if min(w, h) <= 0 or min(box) < -BORDER or max(box) > 1 + BORDER:
        return None
    for each in (3, 2):
        points = [values[start : start + each] for start in range(4, len(values), each)]
        if len(values[4:]) % each == 0 and all(_is_keypoint(point, box) for point in points):
            return len(points), each
    return None


def _is_keypoint(point: Sequence[float], box: tuple[float, float, float, float]) -> bool:
    x, y = point[:2]
    if len(point) == 3 and point[2] not in (0, 1, 2):
        return False
    unseen = x == y == 0
    return unseen or (box[0] - BORDER <= x <= box[2] + BORDER and box[1] - BORDER <= y <= box[3] + BORDER)


@dataclass
class Outlines:
    """The lines of a data set that were read as outlines.

    Attributes:
        count: of them.
        shapes: of keypoints, where they could be poses.
        far: of those whose second point, the width and height of a pose, lies outside the pose's box. Neighbours of an
            outline are near each other.
    """

    count: int = 0
    shapes: set[tuple[int, int] | None] = field(default_factory=set)
    far: int = 0

    def add(self, values: Sequence[float]) -> None:
        """Note an outline x1 y1 x2 y2 …, in shares of the picture."""
        self.count += 1
        self.shapes.add(keypoint_shape(values))
        cx, cy, w, h = values[:4]
        self.far += abs(w - cx) > w / 2 or abs(h - cy) > h / 2

    @property
    def are_poses(self) -> bool:
        """Whether they are certainly poses."""
        return self.count >= ENOUGH and self.far > 0 and self._shape is not None

    @property
    def _shape(self) -> tuple[int, int] | None:
        return next(iter(self.shapes)) if len(self.shapes) == 1 else None

    def poses_notice(self) -> str | None:
        """What to say where all of them are, or may be, poses."""
        if self._shape is None:
            return None
        are = "look like" if self.are_poses else "may be"
        return f"all {self.count} outlines {are} poses, a box and keypoints in it; if so, {keypoints_hint(self._shape)}"


def keypoints_hint(shape: tuple[int, int]) -> str:
    """The next step for labels whose data.yaml does not say that they are poses."""
    return f"write kpt_shape: [{shape[0]}, {shape[1]}] into data.yaml for their boxes"
