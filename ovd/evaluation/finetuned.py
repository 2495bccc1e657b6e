# SPDX-License-Identifier: Apache-2.0
"""AP and score calibration of a branch of fine-tuned classes on labelled photos."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ovd.data.finetune_photos import FinetunePhotos
from ovd.detections import CocoResult
from ovd.evaluation.coco import evaluate
from ovd.evaluation.matching import match_table
from ovd.evaluation.reliability import Reliability, reliability
from ovd.inference.calibration import fit_platt
from ovd.modeling.export import DetectorCard, FinetunedCard
from ovd.modeling.fvlm.finetuned import Branch, FinetunedClasses
from ovd.modeling.proposals.classes import ClassBranch
from ovd.words import name_key
from pretrain.engine.errors import UserError

MIN_RIGHT = 3
"""Fewest right, and fewest wrong, boxes that a sigmoid is fitted to."""


class BranchScores(NamedTuple):
    """How well a branch detects its classes in photos.

    Attributes:
        ap50: mean over the classes that are there, AP at IoU .5; NaN where there is none.
        scores: (N,) uncalibrated.
        correct: (N,) bool.
    """

    ap50: float
    scores: Tensor
    correct: Tensor

    def fitted(self) -> tuple[float, float]:
        """Slope and offset of the scores' sigmoid; (1, 0) with too few detections to fit.

        Few boxes may be separated without a fault, and the sigmoid be a step. So targets are drawn to the middle as
        if one more box of each kind had been seen (Platt 1999, section 2.2).
        """
        right = int(self.correct.sum())
        wrong = len(self.correct) - right
        if min(right, wrong) < MIN_RIGHT:
            return 1.0, 0.0
        target = torch.where(self.correct, (right + 1) / (right + 2), 1 / (wrong + 2))
        return fit_platt(self.scores, target)


def score_branch(
    branch: ClassBranch,
    photos: FinetunePhotos,
    chosen: Sequence[int],
    *,
    names: Sequence[str | None],
    side: int,
    nms: float,
    top: int,
) -> BranchScores:
    """Run a branch over some photos, in eval mode.

    Args:
        branch: of fine-tuned classes.
        photos: with labels.
        chosen: of them.
        names: of the branch's classes; the photos' classes are found among them by name, others are left out;
            None: a class that a later branch took over.
        side, nms, top: of `ClassBranch.detect`.
    """
    category = {name_key(name): number + 1 for number, name in enumerate(photos.names)}
    ids = [None if name is None else category.get(name_key(name)) for name in names]
    was_training = branch.training
    branch.eval()
    results: list[CocoResult] = []
    for index in chosen:
        boxes, classes, scores = branch.detect(photos.image(index), side=side, nms=nms, top=top)
        for (x1, y1, x2, y2), number, score in zip(boxes.tolist(), classes.tolist(), scores.tolist(), strict=True):
            if (category_id := ids[number]) is not None:
                box = [x1, y1, x2 - x1, y2 - y1]
                results.append({"image_id": index, "category_id": category_id, "bbox": box, "score": score})
    branch.train(was_training)
    truth = photos.as_coco(chosen)
    answered = {category_id for category_id in ids if category_id is not None}
    annotations = [annotation for annotation in truth["annotations"] if annotation["category_id"] in answered]
    truth = {**truth, "annotations": annotations}
    tables = match_table(truth, results).values()
    return BranchScores(
        ap50=evaluate(truth, results, iou_types=("bbox",)).values["bbox/AP50"],
        scores=torch.cat([torch.from_numpy(table.score[~table.ignored]) for table in tables]),
        correct=torch.cat([torch.from_numpy(table.correct[~table.ignored]) for table in tables]),
    )


def recalibrated(
    card: DetectorCard, finetuned: FinetunedClasses, photos: FinetunePhotos
) -> tuple[DetectorCard, dict[str, float], Reliability]:
    """The card with its fine-tuned classes' scores fitted to photos; figures of a fit to one half of them on the other.

    Branches of which the photos show no class stay as they are.

    Raises:
        UserError: too few boxes are found to fit anything.
    """
    if len(photos) < 2:
        raise UserError(f"{photos.where}: one photo; more photos are needed to fit anything. Nothing was changed")
    named = {name_key(name) for name in photos.names}
    cards, scores, correct, figures = [], [], [], {}
    for branch in finetuned.branches:
        columns = zip(branch.card.names, branch.columns.tolist(), strict=True)
        active = [name if column >= 0 else None for name, column in columns]
        if not named & {name_key(name) for name in active if name is not None}:
            cards.append(branch.card)
            continue
        fitted, other_half, score = _fit_branch(branch, photos, active)
        cards.append(fitted)
        scores.append(score)
        correct.append(other_half.correct)
        figures[f"ap50_{fitted.file}"] = other_half.ap50
    curve = reliability(torch.cat(scores).numpy(), torch.cat(correct).numpy())
    figures["ece"] = curve.ece
    return replace(card, finetuned=tuple(cards)), figures, curve


def _fit_branch(
    branch: Branch, photos: FinetunePhotos, names: Sequence[str | None]
) -> tuple[FinetunedCard, BranchScores, Tensor]:
    """(card fitted to all photos, detections in the second half, their scores fitted to the first half).

    Args:
        branch: to be fitted.
        photos: every second one is of the first half.
        names: of its classes; None: a later branch's.

    Raises:
        UserError: too few right or wrong boxes.
    """
    card = branch.card
    halves = [
        score_branch(
            branch.network,
            photos,
            range(start, len(photos), 2),
            names=names,
            side=card.side,
            nms=card.nms,
            top=card.top,
        )
        for start in (0, 1)
    ]
    both = BranchScores(
        ap50=float("nan"),
        scores=torch.cat([half.scores for half in halves]),
        correct=torch.cat([half.correct for half in halves]),
    )
    if both.fitted() == (1.0, 0.0):
        listed = ", ".join(name for name in names if name is not None)
        raise UserError(
            f"{photos.where}: fewer than {MIN_RIGHT} right or wrong boxes of {listed} are found; more photos are "
            "needed to fit anything. Nothing was changed"
        )
    slope, offset = halves[0].fitted()
    score = (slope * halves[1].scores.logit(eps=1e-6) + offset).sigmoid()
    slope, offset = both.fitted()
    return replace(card, slope=slope, offset=offset), halves[1], score
