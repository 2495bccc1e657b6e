# SPDX-License-Identifier: Apache-2.0
"""The detector of photographs for inference: its regions, and what scores them.

Shapes: R regions, C classes, K known words, B background words, D joint embedding.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ovd.inference.known_words import Phrases, WordList
from ovd.inference.region_model import RegionModel, unit_rows
from ovd.inference.scorers import Scorer
from ovd.inference.scoring import Calibration, RegionSet

if TYPE_CHECKING:
    from ovd.modeling.export import DetectorCard
    from ovd.modeling.fvlm.network import FvlmDetector

EPS = 1e-6


class FvlmRegionModel(RegionModel):
    """A region head on a frozen image tower, at the boxes of a proposal network.

    Args:
        model: in eval mode.
        card: its card.
        background_words: (B, D) embeddings of the training's words.
        known: the words that the proposal network scores.
        trained: the training's words.
        top: regions kept per picture.
    """

    softmax = False

    def __init__(
        self,
        *,
        model: FvlmDetector,
        card: DetectorCard,
        background_words: Tensor,
        known: WordList,
        trained: WordList,
        top: int = 150,
    ) -> None:
        self.model, self.card, self.top = model, card, top
        self.background_words = unit_rows(background_words)
        self.known, self.trained = known, trained
        self.calibration = Calibration(**card.calibration)

    @torch.inference_mode()
    def regions(self, image: NDArray[np.uint8]) -> RegionSet:
        """See `RegionModel.regions`."""
        pooled = self.model.pooled(image, top=self.top)
        out = self.model.head(pooled.features, pooled.known)
        height, width = image.shape[:2]
        return RegionSet(
            boxes=pooled.boxes.cpu(),
            objectness=pooled.objectness.cpu(),
            text=out.embedding.cpu(),
            image=self.model.tower.embed(pooled.features).cpu(),
            masks=None,
            size=(height, width),
            known=pooled.known.cpu(),
            bias=out.bias.cpu(),
        )

    @torch.inference_mode()
    def propose(self, image: NDArray[np.uint8], *, top: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """The proposal network's own boxes; see `RegionModel.propose`."""
        boxes, scores = self.model.proposer.propose(image, top=top)
        return boxes.numpy(), scores.numpy()

    def notices(self, phrases: Phrases, rows: Tensor) -> tuple[str, ...]:
        """Of phrases that are no noun of the lexicon: what is looked for, or the nearest words of the training."""
        found = []
        for group, row in zip(phrases, rows, strict=True):
            for phrase in group:
                if self.trained.understands(phrase):
                    continue
                if (head := self.trained.head_of(phrase)) is not None:
                    found.append(f"{phrase!r} is looked for as {head!r}: attributes are not understood")
                elif len(group) == 1:
                    nearest = (self.background_words.to(row) @ row).topk(min(3, len(self.trained.words))).indices
                    near = ", ".join(self.trained.words[i] for i in nearest.tolist())
                    found.append(f"{phrase!r} is no word these weights learned; the nearest they know: {near}")
        return tuple(found)

    def scorer(self, rows: Tensor, phrases: Phrases, competitors: Tensor) -> Scorer:
        """See `RegionModel.scorer`; the training's words come first among the competitors."""
        relations = self.known.relations(phrases)
        spared = self.trained.relations(phrases).related
        rivals = torch.ones(len(phrases), len(competitors), dtype=torch.bool)
        rivals[:, : spared.shape[1]] = ~spared
        return WordScorer(
            rows=rows,
            competitors=competitors,
            rivals=rivals,
            known=relations.same_or_below,
            parents=relations.above,
            scale=float(self.model.head.scale.detach()),
            calibration=self.calibration,
        )


@dataclass(frozen=True, kw_only=True)
class WordScorer:
    """Scores words alone: no column depends on another.

    Attributes:
        rows: (C, D) unit text embeddings.
        competitors: (B, D) unit text embeddings of what a region may be instead.
        rivals: (C, B) bool: competitors that contradict the class; synonyms and words above or below it do not.
        known: (C, K) bool: known words that are the class.
        parents: (C, K) bool: known words that the class is a kind of.
        scale: inverse temperature of the head.
        calibration: of the checkpoint.
    """

    rows: Tensor
    competitors: Tensor
    rivals: Tensor
    known: Tensor
    parents: Tensor
    scale: float
    calibration: Calibration

    def select(self, columns: Tensor) -> WordScorer:
        """See `Scorer`."""
        return replace(
            self,
            rows=self.rows[columns],
            rivals=self.rivals[columns],
            known=self.known[columns],
            parents=self.parents[columns],
        )

    def __call__(self, regions: RegionSet) -> Tensor:
        """See `Scorer`."""
        assert regions.bias is not None and regions.known is not None and regions.image is not None
        rows = self.rows
        text, bias = regions.text.to(rows), regions.bias.to(rows)[:, None]
        head_RC = (self.scale * text @ rows.T + bias).sigmoid()
        known_RK = regions.known.to(rows)
        own_RC = best_of(known_RK, self.known)
        c = self.calibration
        sure_RC = own_RC ** (1 - c.head_weight) * head_RC**c.head_weight
        sure_RC = (c.slope * sure_RC.logit(eps=EPS) + c.offset).sigmoid()
        open_RC = self.open_scores(regions, head_RC, known_RK)
        return torch.where(self.known.any(dim=1), sure_RC, open_RC)

    def open_scores(self, regions: RegionSet, head_RC: Tensor, known_RK: Tensor) -> Tensor:
        """(R, C) scores of words that the proposal network does not know."""
        return head_RC


def best_of(known_RK: Tensor, members_CK: Tensor) -> Tensor:
    """(R, C): the best of each class's known words; 0 for a class without any."""
    if not members_CK.shape[1]:
        return known_RK.new_zeros(len(known_RK), len(members_CK))
    return torch.where(members_CK[None], known_RK[:, None], known_RK.new_zeros(())).amax(dim=2)
