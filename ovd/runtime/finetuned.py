# SPDX-License-Identifier: Apache-2.0
"""Classes that were added by fine-tuning, without torch: what `ovd.modeling.proposals.classes.ClassBranch.detect` and
`ovd.modeling.fvlm.finetuned.FinetunedClasses.append_to` do with tensors, done with arrays.

Shapes: P boxes of one branch, R boxes of all, O fine-tuned classes of all branches.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ovd.inference.arrays import Floats, best_first, platt_scaled, sigmoid
from ovd.inference.finetuned_names import FinetunedNames
from ovd.inference.postprocess import batched_nms
from ovd.modeling.export import FinetunedCard
from ovd.runtime.cells import CellGraph
from ovd.runtime.files import RuntimeCard, branch_graph

CANDIDATES = 1000
"""Best (cell, class) pairs that enter NMS, as in `ovd.modeling.proposals.classes`."""
MIN_SCORE = 1e-3
MIN_SIDE = 1  # of a box, in pixels of the picture


class FinetunedBoxes(NamedTuple):
    """(R, 4) boxes in pixels of the picture, and (R, O) calibrated scores of fine-tuned classes."""

    boxes: Floats
    scores: Floats


class OnnxBranches:
    """All branches of an export.

    Args:
        folder: of the export.
        card: its card.
        branches: on the detector's card, oldest first: their calibration is the one that counts.
        names: of their classes.
        threads: see `Graph`.
    """

    def __init__(
        self,
        folder: Path,
        card: RuntimeCard,
        *,
        branches: Sequence[FinetunedCard],
        names: FinetunedNames,
        threads: int | None = None,
    ) -> None:
        self._branches = [
            (one, np.array(columns), CellGraph(folder / branch_graph(one), card, threads=threads))
            for one, columns in zip(branches, names.columns(branches), strict=True)
        ]
        self._classes = len(names.words.words)

    def __call__(self, image: NDArray[np.uint8]) -> FinetunedBoxes:
        """Boxes of an (H, W, 3) RGB picture: each has a score of one class."""
        boxes = [np.zeros((0, 4), np.float32)]
        scores = [np.zeros((0, self._classes), np.float32)]
        for card, columns, graph in self._branches:
            box, class_id, score = self._detected(image, card, graph)
            column = columns[class_id]
            active = column >= 0
            rows = np.zeros((int(active.sum()), self._classes), np.float32)
            calibrated = platt_scaled(score[active], slope=card.slope, offset=card.offset)
            rows[np.arange(len(rows)), column[active]] = calibrated
            boxes.append(box[active])
            scores.append(rows)
        return FinetunedBoxes(np.concatenate(boxes), np.concatenate(scores))

    @staticmethod
    def _detected(
        image: NDArray[np.uint8], card: FinetunedCard, graph: CellGraph
    ) -> tuple[Floats, NDArray[np.int64], Floats]:
        """((P, 4) boxes, (P,) classes of the branch, (P,) its scores), best first."""
        cells = graph(image, side=card.side)
        score_AC = np.nan_to_num(sigmoid(cells.words))
        pairs = best_first(score_AC.ravel(), CANDIDATES)
        pairs = pairs[score_AC.ravel()[pairs] >= MIN_SCORE]
        cell, class_id = np.divmod(pairs, score_AC.shape[1])
        boxes = cells.boxes(cell) * cells.to_picture
        is_large = ((boxes[:, 2:] - boxes[:, :2]) >= MIN_SIDE).all(axis=1)
        boxes, class_id, scores = boxes[is_large], class_id[is_large], score_AC[cell, class_id][is_large]
        keep = batched_nms(boxes, scores, class_id, card.nms, limit=card.top)
        return boxes[keep], class_id[keep], scores[keep]
