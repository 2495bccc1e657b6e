# SPDX-License-Identifier: Apache-2.0
"""The detector of photographs for inference: its regions, and what scores them.

Shapes: R regions, C classes, K known words, B background words, D joint embedding.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ovd.inference.everything import OwnWords, open_shift
from ovd.inference.hints import hint_of, unknown_word
from ovd.inference.known_words import Phrases, WordList
from ovd.inference.region_model import RegionModel, unit_rows
from ovd.inference.scorers import Scorer
from ovd.inference.scoring import Calibration, RegionSet, competitive_probabilities

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
        pooled = self.model.pooled(image, self.model.proposer.regions(image, top=self.top))
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
                if len(group) > 1 and self.trained.is_english and (hint := hint_of(phrase)) is not None:
                    found.append(hint)
                elif (head := self.trained.head_of(phrase)) is not None:
                    why = "separate words with commas" if " and " in phrase else "attributes are not understood"
                    found.append(f"{phrase!r} is looked for as {head!r}: {why}")
                elif len(group) == 1:
                    order = (self.background_words.to(row) @ row).argsort(descending=True).tolist()
                    nouns = (
                        self.trained.words[i] for i in order if self.trained.words[i] in self.trained.lexicon.nouns
                    )
                    words = list(islice(nouns, 3))
                    found.append(unknown_word(phrase, words, english=self.trained.is_english))
        return tuple(found)

    def own_words(self) -> OwnWords:
        """The proposal network's words, and the nouns of the training that are not above them; one of each meaning."""
        nouns = [w for w in self.trained.words if w in self.trained.lexicon.nouns]
        relations = self.known.relations([[word] for word in nouns])
        above = relations.same_or_below.any(dim=1).tolist()
        one_of = {self.trained.line_of(word)[0]: word for word in reversed([*self.known.words, *nouns])}
        first = frozenset(one_of.values())
        others = [(w, kinds) for w, kinds, is_above in zip(nouns, relations.above.numpy(), above, strict=True)
                  if w in first and not is_above]  # fmt: skip
        names = (*self.known.words, *(word for word, _ in others))
        known = len(self.known.words)
        kind_of = np.zeros((len(names), len(names)), dtype=bool)
        kind_of[known:, :known] = np.stack([kinds for _, kinds in others]) if others else False
        shift = np.full(len(names), open_shift(), dtype=np.float32)
        shift[:known] = 0
        number = {self.trained.line_of(name)[0]: i for i, name in enumerate(names)}
        family = [next(number[k] for k in reversed(self.trained.line_of(name)) if k in number) for name in names]
        return OwnWords(names=names, shift=shift, kind_of=kind_of, family=np.array(family))

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
            scale=float(self.model.head.scale.detach()),
            calibration=self.calibration,
        )


@dataclass(frozen=True, kw_only=True)
class WordScorer:
    """Scores words alone: no column depends on another.

    A word that the proposal network knows has its score and the region head's, in a geometric mean. Any other word has
    the softmax of the image tower's own embedding against all words that contradict it, times powers of objectness and
    area; the head, which learned the known words from many boxes and the others from few photos, is worse at it.
    A word above known ones is the best of them: where the embedding's answer was taken too, superordinate words lost.

    Attributes:
        rows: (C, D) unit text embeddings.
        competitors: (B, D) unit text embeddings of what a region may be instead.
        rivals: (C, B) bool: competitors that contradict the class; synonyms and words above or below it do not.
        known: (C, K) bool: known words that are the class or a kind of it.
        scale: inverse temperature of the head.
        calibration: of the checkpoint.
    """

    rows: Tensor
    competitors: Tensor
    rivals: Tensor
    known: Tensor
    scale: float
    calibration: Calibration

    def select(self, columns: Tensor) -> WordScorer:
        """See `Scorer`."""
        return replace(
            self,
            rows=self.rows[columns],
            rivals=self.rivals[columns],
            known=self.known[columns],
        )

    def __call__(self, regions: RegionSet) -> Tensor:
        """See `Scorer`."""
        return torch.where(self.known.any(dim=1), self.known_scores(regions), self.open_scores(regions))

    def known_scores(self, regions: RegionSet) -> Tensor:
        """(R, C) scores by the best known word of each class; near 0 for a class without any."""
        assert regions.bias is not None and regions.known is not None
        head_RC = (
            self.scale * regions.text.to(self.rows) @ self.rows.T + regions.bias.to(self.rows)[:, None]
        ).sigmoid()
        own_RC = best_of(regions.known.to(self.rows), self.known)
        c = self.calibration
        score_RC = own_RC ** (1 - c.head_weight) * head_RC**c.head_weight
        return (c.slope * score_RC.logit(eps=EPS) + c.offset).sigmoid()

    def open_scores(self, regions: RegionSet) -> Tensor:
        """(R, C) scores by the image tower's embedding alone."""
        assert regions.image is not None
        image, c = regions.image.to(self.rows), self.calibration
        score_RC = competitive_probabilities(
            image, self.rows, self.competitors, None, scale=c.open_scale, keep_CB=self.rivals
        )
        boxes = regions.boxes.to(self.rows)
        area_R = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1) / (regions.size[0] * regions.size[1])
        whole_R = regions.objectness.to(self.rows).clamp(0, 1).pow(c.open_objectness) * area_R.pow(c.open_area)
        score_RC = score_RC * whole_R[:, None]
        return (c.open_slope * score_RC.logit(eps=EPS) + c.open_offset).sigmoid()


def best_of(known_RK: Tensor, members_CK: Tensor) -> Tensor:
    """(R, C): the best of each class's known words; 0 for a class without any."""
    best_RC = known_RK.new_zeros(len(known_RK), len(members_CK))
    for column in members_CK.any(dim=1).nonzero()[:, 0].tolist():  # few of many: (R, C, K) at once would be large
        best_RC[:, column] = known_RK[:, members_CK[column]].amax(dim=1)
    return best_RC
