# SPDX-License-Identifier: Apache-2.0
"""LVIS's protocol on top of COCO's: federated labels, 300 detections per image, means by frequency.

The steps are those of the ``lvis`` package (0.5.3, ``lvis/eval.py``), whose digits the tests compare where it is
installed. It is no dependency: it does not run with numpy 2 (``np.float``) and asks for the OpenCV build with windows.

* The best 300 detections of each *image* over all categories stay (COCO: 100 per image and category).
* A detection of a category that was not annotated in its image is dropped.
* An unmatched detection of a category that is not exhaustively labelled in its image counts neither way.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ovd.data.lvis import FREQUENCIES, Federated, split_of
from ovd.data.splits import Split
from ovd.evaluation.coco import LVIS_DETECTIONS, Metrics, evaluate


def evaluate_lvis(
    gt: Mapping[str, Any],
    results: Sequence[Mapping[str, Any]] | None,
    split: Split | None = None,
    iou_types: Sequence[str] | None = None,
    *,
    proposals: Sequence[Mapping[str, Any]] | None = None,
    where: tuple[str, str] = ("annotations", "predictions"),
) -> Metrics:
    """Evaluate results on an LVIS file.

    Args:
        gt: content of the file.
        split: None takes ViLD's, by frequency.

    Other arguments and errors as :func:`ovd.evaluation.coco.evaluate`.

    Returns:
        metrics with ``TYPE/APr``, ``APc``, ``APf`` besides COCO's names; means are over categories that have objects.
    """
    split = split or split_of("lvis", gt, where=where[0])
    labels = Federated.of(gt, where=where[0])
    metrics = evaluate(
        gt, results, split, iou_types, max_dets=LVIS_DETECTIONS, proposals=proposals, where=where, federated=labels
    )
    for kind, prefix in (("bbox", ""), ("segm", "segm_")):
        for name in ("AP", "AP50", "AP75") if f"{kind}/AP" in metrics.values else ():
            for frequency in FREQUENCIES:
                rows = [r for r in metrics.per_class if labels.frequency[r.id] == frequency]
                finite = [value for r in rows if not math.isnan(value := r.values[prefix + name])]
                metrics.values[f"{kind}/{name}{frequency}"] = sum(finite) / len(finite) if finite else math.nan
    return metrics
