# SPDX-License-Identifier: Apache-2.0
"""Class-agnostic recall: the share of objects that have a box, whatever its class.

The same numbers as `COCOeval` with `useCats = 0` on ground truth that holds the group only. Objects of the other group
are ignored; a detection on one still counts towards the number of detections.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as mask_tools

IOU_THRESHOLDS: NDArray[np.float64] = np.linspace(0.5, 0.95, 10)  # COCO's ten


def matched_objects(
    iou_DG: NDArray[np.float64], thresholds: Sequence[float] | NDArray[np.float64] = IOU_THRESHOLDS
) -> NDArray[np.bool_]:
    """Which objects COCO's greedy matching finds in one image.

    Args:
        iou_DG: IoU of D detections, best score first, with G objects (no crowds).
        thresholds: IoU thresholds T.

    Returns:
        (T, G) true where the object was matched. Each detection, in order, takes the free object it overlaps most, if
        by at least the threshold; of equals, the last (as pycocotools).
    """
    T, (_, G) = len(thresholds), iou_DG.shape
    matched = np.zeros((T, G), dtype=bool)
    if iou_DG.size == 0:
        return matched
    reversed_DG = iou_DG[:, ::-1]  # argmax takes the first of equals
    best_D = iou_DG.max(axis=1)
    for t, threshold in enumerate(thresholds):
        threshold = min(threshold, 1 - 1e-10)
        free = np.ones(G, dtype=bool)
        for d in np.flatnonzero(best_D >= threshold):
            overlap = np.where(free, reversed_DG[d], -1.0)
            g = int(overlap.argmax())
            if overlap[g] >= threshold:
                free[g] = False
        matched[t] = ~free[::-1]
    return matched


def class_agnostic_recall(
    objects: Mapping[Any, Sequence[Mapping[str, Any]]],
    detections: Mapping[Any, Sequence[Mapping[str, Any]]],
    groups: Mapping[str, Collection[int]],
    *,
    shape: str = "bbox",
    caps: Sequence[int] = (100, 300),
) -> dict[str, dict[int, NDArray[np.float64]]]:
    """Recall of each group of categories by the best-scored detections of each image, names ignored.

    Args:
        objects: image id -> annotations with `category_id`, `iscrowd` and `shape`. Crowds count neither way.
        detections: image id -> detections with `score` and `shape`.
        groups: name -> category ids.
        shape: `"bbox"` (x, y, w, h) or `"segmentation"` (compressed run lengths).
        caps: how many detections of an image may be used.

    Returns:
        group -> cap -> (10,) recall at IoU .5, .55 … .95; NaN for a group without objects.
    """
    hits = {name: {cap: np.zeros(len(IOU_THRESHOLDS)) for cap in caps} for name in groups}
    total = dict.fromkeys(groups, 0)
    for image_id, everything in objects.items():
        # Ascending category ids first: the order in which pycocotools breaks ties of score and overlap.
        real = sorted((a for a in everything if not a["iscrowd"]), key=lambda a: a["category_id"])
        if not real:
            continue
        ranked = sorted(detections.get(image_id, ()), key=lambda d: d["category_id"])
        order = np.argsort([-d["score"] for d in ranked], kind="stable")[: max(caps)]
        iou_DG = (
            np.asarray(mask_tools.iou([ranked[i][shape] for i in order], [a[shape] for a in real], [0] * len(real)))
            if len(order)
            else np.zeros((0, len(real)))
        )
        for name, ids in groups.items():
            members = [n for n, a in enumerate(real) if a["category_id"] in ids]
            total[name] += len(members)
            for cap in caps if members else ():
                hits[name][cap] += matched_objects(iou_DG[:cap, members]).sum(axis=1)
    return {
        name: {cap: hit / total[name] if total[name] else np.full(len(hit), np.nan) for cap, hit in by_cap.items()}
        for name, by_cap in hits.items()
    }
