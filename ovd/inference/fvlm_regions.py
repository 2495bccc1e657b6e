# SPDX-License-Identifier: Apache-2.0
"""The detector of photographs for inference: what scores its regions, whatever runs its networks.

`ovd.inference.fvlm_torch` runs them with torch, `ovd.runtime.regions` with ONNX Runtime.

Shapes: R regions, C classes, K known words, O fine-tuned classes, B background words, D joint embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from ovd.inference.arrays import Floats, best_first, logit, sigmoid, unit_rows
from ovd.inference.everything import PromptFreeWords, open_shift
from ovd.inference.finetuned_names import FinetunedNames
from ovd.inference.fvlm_ensemble import EnsembleScorer, head_exponents
from ovd.inference.hints import hint_of, unknown_word
from ovd.inference.known_words import Phrases, WordList
from ovd.inference.open_words import EPS, DistinctRows, OpenWords, Rivals, distinct_rows
from ovd.inference.region_model import RegionModel
from ovd.inference.scorers import ManyWordsScorer, Scorer, Shown
from ovd.inference.scoring import Calibration, RegionSet
from ovd.inference.word_profiles import ProfileScorer

if TYPE_CHECKING:
    from ovd.modeling.export import DetectorCard


class FvlmNetwork(Protocol):
    """The networks of a detector of photographs.

    Attributes:
        sides: longest sides, in pixels, at which the proposal network looks at a picture.
    """

    sides: tuple[int, ...]

    @property
    def scale(self) -> float:
        """Inverse temperature of the region head."""

    def regions(self, image: NDArray[np.uint8], *, top: int) -> RegionSet:
        """The best ``top`` regions of a uint8 (H, W, 3) RGB picture."""

    def propose(self, image: NDArray[np.uint8], *, top: int) -> tuple[Floats, Floats]:
        """((P, 4) boxes in its pixels, (P,) objectness) of the proposal network alone."""


class FvlmRegionModel(RegionModel):
    """A region head on a frozen image tower, at the boxes of a proposal network.

    Args:
        network: all three.
        card: its card.
        background_words: (B, D) embeddings of the training's words.
        known: the words that the proposal network scores.
        trained: the training's words.
        finetuned: classes that were added, in the order of the regions' scores of them; None: there are none.
        top: regions kept per picture.
    """

    softmax = False
    card: DetectorCard

    def __init__(
        self,
        *,
        network: FvlmNetwork,
        card: DetectorCard,
        background_words: Floats,
        known: WordList,
        trained: WordList,
        finetuned: FinetunedNames | None = None,
        top: int = 150,
    ) -> None:
        self.network, self.card, self.finetuned, self.top = network, card, finetuned, top
        self.background_words = unit_rows(background_words)
        self.known, self.trained = known, trained
        self.calibration = Calibration(**card.calibration)

    @cached_property
    def _labelled(self) -> WordList:
        """The words that were looked for in every photo of the training; it remembers their relations."""
        return WordList(words=self.card.classes, lexicon=self.trained.lexicon)

    def regions(self, image: NDArray[np.uint8]) -> RegionSet:
        """See `RegionModel.regions`."""
        return self.network.regions(image, top=self.top)

    def propose(self, image: NDArray[np.uint8], *, top: int) -> tuple[Floats, Floats]:
        """The proposal network's own boxes; see `RegionModel.propose`."""
        return self.network.propose(image, top=top)

    def set_sides(self, sides: tuple[int, ...]) -> None:
        """See `RegionModel.set_sides`."""
        self.network.sides = sides

    def notices(self, phrases: Phrases, rows: Floats) -> tuple[str, ...]:
        """Of phrases that are no noun of the lexicon: what is looked for, or the nearest words of the training."""
        notices = []
        for group, row in zip(phrases, rows, strict=True):
            for phrase in group:
                if self.trained.understands(phrase) or (self.finetuned is not None and self.finetuned.has(phrase)):
                    continue
                if len(group) > 1 and self.trained.is_english and (hint := hint_of(phrase)) is not None:
                    notices.append(hint)
                elif (head := self.trained.head_of(phrase)) is not None:
                    why = "separate words with commas" if " and " in phrase else "attributes are not understood"
                    notices.append(f"{phrase!r} is looked for as {head!r}: {why}")
                elif len(group) == 1:
                    order = best_first(self.background_words[: len(self.trained.words)] @ row).tolist()
                    nouns = (
                        self.trained.words[i] for i in order if self.trained.words[i] in self.trained.lexicon.nouns
                    )
                    words = list(islice(nouns, 3))
                    notices.append(unknown_word(phrase, words, english=self.trained.is_english))
        return tuple(notices)

    def prompt_free_words(self) -> PromptFreeWords:
        """The proposal network's words, and the nouns of the training that are not above them; one of each meaning.

        Classes that were added are found where somebody asks: a branch knows the photos that it was trained on, and on
        others it finds its classes where nothing is.
        """
        nouns = [w for w in self.trained.words if w in self.trained.lexicon.nouns]
        relations = self.known.relations([[word] for word in nouns])
        above: list[bool] = relations.same_or_below.any(axis=1).tolist()  # type: ignore[assignment]
        one_of = {self.trained.line_of(word)[0]: word for word in reversed([*self.known.words, *nouns])}
        first = frozenset(one_of.values())
        others = [(w, kinds) for w, kinds, is_above in zip(nouns, relations.above, above, strict=True)
                  if w in first and not is_above]  # fmt: skip
        names = (*self.known.words, *(word for word, _ in others))
        known = len(self.known.words)
        kind_of = np.zeros((len(names), len(names)), dtype=bool)
        kind_of[known:, :known] = np.stack([kinds for _, kinds in others]) if others else False
        shift = np.full(len(names), open_shift(), dtype=np.float32)
        shift[:known] = 0
        number = {self.trained.line_of(name)[0]: i for i, name in enumerate(names)}
        family = [next(number[k] for k in reversed(self.trained.line_of(name)) if k in number) for name in names]
        return PromptFreeWords(names=names, shift=shift, kind_of=kind_of, family=np.array(family))

    def scorer(self, rows: Floats, phrases: Phrases, competitors: Floats) -> Scorer:
        """See `RegionModel.scorer`; the training's words come first among the competitors."""
        relations = self.known.relations(phrases)
        spared = self.trained.relations(phrases).related
        rivals = np.ones((len(phrases), len(competitors)), dtype=bool)
        rivals[:, : spared.shape[1]] = ~spared
        if not self.known.words:
            labelled = self._labelled.relations(phrases)
            return EnsembleScorer(
                rows=rows,
                competitors=competitors,
                rivals=rivals,
                exponent=head_exponents(
                    str(self.card.model.get("variant")), np.asarray(labelled.same_or_below.any(axis=1))
                ),
                scale=self.network.scale,
                calibration=self.calibration,
            )
        finetuned_CO = finetuned_only_C = None
        if self.finetuned is not None:
            finetuned_CO = self.finetuned.answering(phrases)
            finetuned_only_C = np.array(
                [
                    any(self.finetuned.has(p) for p in group) and not any(self.known.is_one(p) for p in group)
                    for group in phrases
                ],
                dtype=bool,
            )
        return WordScorer(
            rows=rows,
            competitors=competitors,
            rivals=rivals,
            known=relations.same_or_below,
            scale=self.network.scale,
            calibration=self.calibration,
            finetuned=finetuned_CO,
            finetuned_only=finetuned_only_C,
        )

    def example_scorer(self, rows: Floats, competitors: Floats, negatives: Floats) -> Scorer:
        """See `RegionModel.example_scorer`. Negatives are scored on their own: `ovd.inference.scorers.QueryScorer`."""
        return ProfileScorer(rows=rows, words=competitors, calibration=self.calibration.of_examples())


@dataclass(frozen=True, kw_only=True)
class WordScorer(ManyWordsScorer):
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
        finetuned: (C, O) bool: an object of the fine-tuned class is also one of the class; None: there are none.
        finetuned_only: (C,) bool: a fine-tuned class that the proposal network does not know: no other box is it.
    """

    rows: Floats
    competitors: Floats
    rivals: NDArray[np.bool_]
    known: NDArray[np.bool_]
    scale: float
    calibration: Calibration
    finetuned: NDArray[np.bool_] | None = None
    finetuned_only: NDArray[np.bool_] | None = None

    def select(self, columns: Sequence[int]) -> WordScorer:
        """See `Scorer`."""
        chosen = list(columns)
        return replace(
            self,
            rows=self.rows[chosen],
            rivals=self.rivals[chosen],
            known=self.known[chosen],
            finetuned=None if self.finetuned is None else self.finetuned[chosen],
            finetuned_only=None if self.finetuned_only is None else self.finetuned_only[chosen],
        )

    @cached_property
    def _split(self) -> tuple[NDArray[np.bool_], WordScorer, WordScorer]:
        """(C,) which classes have a known word; those alone; the others alone."""
        known: NDArray[np.bool_] = np.asarray(self.known.any(axis=1))
        return known, self.select(np.flatnonzero(known).tolist()), self.select(np.flatnonzero(~known).tolist())

    @cached_property
    def _open(self) -> OpenWords:
        return OpenWords(
            rows=self.rows,
            competitors=self.competitors,
            rivals=Rivals.of(self.rivals),
            calibration=self.calibration,
        )

    @cached_property
    def _kinds(self) -> DistinctRows:
        return distinct_rows(self.known)

    def __call__(self, regions: RegionSet) -> Floats:
        """See `Scorer`."""
        known, known_words, other_words = self._split
        score_RC = np.empty((len(regions), len(self.rows)), np.float32)
        if known.any():
            score_RC[:, known] = known_words.known_scores(regions)
        if not known.all():
            score_RC[:, ~known] = other_words.open_scores(regions)
        if self.finetuned is not None and self.finetuned_only is not None and regions.finetuned is not None:
            score_RC[:, self.finetuned_only] = 0
            concerned = np.flatnonzero(self.finetuned.any(axis=1))
            finetuned_RC = best_of(regions.finetuned, self.finetuned[concerned])
            score_RC[:, concerned] = np.maximum(score_RC[:, concerned], finetuned_RC)
        return score_RC

    def shown(self, regions: RegionSet, *, level: float) -> Shown:
        """See `ManyWordsScorer`."""
        known, known_words, other_words = self._split
        if self.finetuned is not None or known.all():
            return Shown.of(self(regions), level=level)
        one = Shown.of(known_words.known_scores(regions), level=level)
        other = other_words.open_shown(regions, level=level)
        best_C = np.empty(len(self.rows), np.float32)
        best_C[known], best_C[~known] = one.best, other.best
        classes = np.concatenate([np.flatnonzero(known)[one.classes], np.flatnonzero(~known)[other.classes]])
        return Shown.in_order(best_C, classes, np.concatenate([one.score_RS, other.score_RS], axis=1))

    def known_scores(self, regions: RegionSet) -> Floats:
        """(R, C) scores by the best known word of each class; near 0 for a class without any."""
        assert regions.bias is not None and regions.known is not None
        head_RC = sigmoid(self.scale * (regions.text @ self.rows.T) + regions.bias[:, None])
        c = self.calibration
        best_RC = best_of(regions.known, self._kinds.rows)[:, self._kinds.of]
        score_RC = best_RC ** (1 - c.head_weight) * head_RC**c.head_weight
        return sigmoid(c.slope * logit(score_RC, eps=EPS) + c.offset)

    def open_scores(self, regions: RegionSet) -> Floats:
        """(R, C) scores by the image tower's embedding alone."""
        return self._open(regions)

    def open_shown(self, regions: RegionSet, *, level: float) -> Shown:
        """Of `open_scores`, the classes that reach a level."""
        return self._open.shown(regions, level=level)


def best_of(known_RK: Floats, members_CK: NDArray[np.bool_]) -> Floats:
    """(R, C): the best of each class's known words; 0 for a class without any."""
    best_RC = np.zeros((len(known_RK), len(members_CK)), np.float32)
    for column in np.flatnonzero(members_CK.any(axis=1)):  # few of many: (R, C, K) at once would be large
        best_RC[:, column] = known_RK[:, members_CK[column]].max(axis=1)
    return best_RC
