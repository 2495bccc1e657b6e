# SPDX-License-Identifier: Apache-2.0
"""The detector of photographs for inference: its scoring, independent of the runtime of its networks.

`ovd.inference.fvlm_torch` runs them with torch, `ovd.runtime.regions` with ONNX Runtime.

Shapes: R regions, C classes, K words of the proposal network, O fine-tuned classes, B background words, D joint
embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from ovd.inference.arrays import Floats, best_first, platt_scaled, unit_rows
from ovd.inference.everything import PromptFreeWords, open_shift
from ovd.inference.example_scorers import WordProfileScorer
from ovd.inference.finetuned_names import FinetunedNames
from ovd.inference.fvlm_ensemble import EnsembleScorer, head_exponents
from ovd.inference.hints import hint_of, unknown_word
from ovd.inference.hyponyms import Hyponyms, TrainingWords, best_of
from ovd.inference.known_words import Phrases, WordList
from ovd.inference.open_words import CompetitorGroups, DistinctRows, OpenWords, contradicting, distinct_rows
from ovd.inference.region_model import RegionModel
from ovd.inference.scorers import PER_CLASS, ManyWordsScorer, Scorer, Shown, select_classes
from ovd.inference.scoring import Calibration, RegionSet

if TYPE_CHECKING:
    from ovd.modeling.export import DetectorCard

INDISTINCT_SHARE = 0.5
"""Factor on a word's score for a kind that cannot be distinguished from it (*woman* of person): half may be one."""
FALLBACK_POWER = 3
"""Of the image embedding's score of a word that the proposal network does not find: only clear cases count. With 1, the
average precision of all 80 words falls by .018 on scenes of ``val``, by the teachers' labels; with 3 by .003."""
SAME_WORD = 0.999
"""Cosine of two text embeddings from which they are of one word."""


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
        proposal_words: those that the proposal network scores.
        training_words: those of the training.
        finetuned: classes that were added, in the order of the regions' scores of them; None: there are none.
        top: regions kept per picture.
    """

    has_published_protocol = False
    card: DetectorCard

    def __init__(
        self,
        *,
        network: FvlmNetwork,
        card: DetectorCard,
        background_words: Floats,
        proposal_words: WordList,
        training_words: WordList,
        finetuned: FinetunedNames | None = None,
        top: int = 150,
    ) -> None:
        self.network, self.card, self.finetuned, self.top = network, card, finetuned, top
        self.background_words = unit_rows(background_words)
        self.proposal_words, self.training_words = proposal_words, training_words
        self.calibration = Calibration(**card.calibration)

    @cached_property
    def _labelled(self) -> WordList:
        """The words that are exhaustively labelled in the training photos."""
        return WordList(words=self.card.classes, lexicon=self.training_words.lexicon)

    @cached_property
    def _hyponym_words(self) -> TrainingWords:
        """The training's words, as hyponyms of what is typed."""
        words = [[word] for word in self.training_words.words]
        return TrainingWords(
            rows=self.background_words[: len(words)],
            related=self.training_words.relations(words).related,
            known=self.proposal_words.relations(words).related,
        )

    @cached_property
    def _word_rows(self) -> Floats:
        """(K, D) embeddings of the proposal network's words; zeros where the training had no such word."""
        rows = np.zeros((len(self.proposal_words.words), self.background_words.shape[1]), np.float32)
        for row, word in zip(rows, self.proposal_words.words, strict=True):
            if (number := self.training_words.index_of(word)) is not None:
                row[:] = self.background_words[number]
        return rows

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
        """What is searched in place of a phrase; for unknown phrases, the nearest words of the training."""
        notices = []
        for group, row in zip(phrases, rows, strict=True):
            for phrase in group:
                if self.finetuned and self.finetuned.has(phrase):
                    continue
                if (general := self.proposal_words.general_of(phrase)) is not None:
                    notices.append(
                        f"{phrase!r} is searched as {general!r}, at half its score: these weights cannot tell"
                    )
                elif (member := self.proposal_words.member_of(phrase)) is not None:
                    notices.append(f"{phrase!r} is searched as {member!r}: one box for each")
                elif self.training_words.understands(phrase):
                    continue
                elif len(group) > 1 and self.training_words.is_english and (hint := hint_of(phrase)) is not None:
                    notices.append(hint)
                elif (head := self.training_words.head_of(phrase)) is not None:
                    why = "separate words with commas" if " and " in phrase else "the other words are ignored"
                    notices.append(f"{phrase!r} is searched as {head!r}: {why}")
                elif len(group) == 1:
                    notices.append(
                        unknown_word(
                            phrase,
                            self._nearest_nouns(row, count=3),
                            misspelt=self._misspelt(phrase),
                            english=self.training_words.is_english,
                        )
                    )
        return tuple(notices)

    def _misspelt(self, phrase: str) -> list[str]:
        """Fine-tuned classes and words of the training that are spelt like a phrase."""
        own = self.finetuned.words.misspelt(phrase) if self.finetuned else []
        return list(dict.fromkeys([*own, *self.training_words.misspelt(phrase)]))

    def _nearest_nouns(self, row: Floats, *, count: int) -> list[str]:
        """Nouns of the training whose embeddings are nearest to (D,) ``row``, best first."""
        words, nouns = self.training_words.words, self.training_words.lexicon.nouns
        order = best_first(self.background_words[: len(words)] @ row).tolist()
        return list(islice((words[i] for i in order if words[i] in nouns), count))

    def kind_of(self, phrases: Phrases) -> NDArray[np.bool_]:
        """See `RegionModel.kind_of`.

        Kinds of a word that the proposal network knows (*beagle* of *dog*, *woman* of *person*) are left out: the image
        embedding is too often wrong about them in scenes. So are kinds of a fine-tuned class: its labels decide.
        """
        same_or_below_CC = self.training_words.among(phrases)
        kind_of_CC = same_or_below_CC.T & ~same_or_below_CC
        kind_of_CC[:, [any(map(self._is_detected, group)) for group in phrases]] = False
        return kind_of_CC

    def _is_detected(self, phrase: str) -> bool:
        """Whether the proposal network or a fine-tuned branch learned boxes of just this."""
        return self.proposal_words.is_one(phrase) or (self.finetuned is not None and self.finetuned.has(phrase))

    def prompt_free_words(self) -> PromptFreeWords:
        """The proposal network's words, and the training's nouns that are not hypernyms of them; one for each meaning.

        Fine-tuned classes are left out: on photos unlike its training data a branch has false positives.
        """
        known, count = self.proposal_words.words, len(self.proposal_words.words)
        nouns = [word for word in self.training_words.words if word in self.training_words.lexicon.nouns]
        lines = {word: self.training_words.line_of(word) for word in (*known, *nouns)}
        first: dict[str, str] = {}  # of each meaning
        for word, line in lines.items():
            first.setdefault(line[0], word)
        relations = self.proposal_words.relations([[word] for word in nouns])
        is_hypernym = np.asarray((relations.same_or_below | relations.indistinct).any(axis=1))
        others = np.array(
            [i for i, word in enumerate(nouns) if first[lines[word][0]] == word and not is_hypernym[i]], dtype=np.int64
        )
        names = (*known, *(nouns[i] for i in others))
        kind_of = np.zeros((len(names), len(names)), dtype=bool)
        kind_of[count:, :count] = relations.above[others]
        shift = np.full(len(names), open_shift(), dtype=np.float32)
        shift[:count] = 0
        number = {lines[name][0]: i for i, name in enumerate(names)}
        family = [next(number[key] for key in reversed(lines[name]) if key in number) for name in names]
        return PromptFreeWords(names=names, shift=shift, kind_of=kind_of, family=np.array(family))

    def scorer(self, rows: Floats, phrases: Phrases, competitors: Floats) -> Scorer:
        """See `RegionModel.scorer`; the training's words come first among the competitors."""
        training = self.training_words.relations(phrases)
        competitor_mask = contradicting(training.related, len(competitors))
        if not self.proposal_words.words:
            return self._ensemble_scorer(rows, phrases, competitors, competitor_mask)
        relations = self.proposal_words.relations(phrases)
        is_guess = relations.indistinct.any(axis=1) & ~relations.same_or_below.any(axis=1)
        return WordScorer(
            rows=rows,
            competitors=competitors,
            competitor_mask=competitor_mask,
            word_rows=self._word_rows,
            hyponyms=relations.same_or_below | relations.indistinct,
            related=relations.related,
            scale=self.network.scale,
            calibration=self.calibration,
            share=np.where(is_guess, INDISTINCT_SHARE, 1).astype(np.float32),
            training=self._hyponym_words if self.calibration.open_fallback else None,
            below=training.same_or_below | training.indistinct,
            finetuned=None if self.finetuned is None else self.finetuned.answering(phrases),
            finetuned_only=None if self.finetuned is None else self._finetuned_only(self.finetuned, phrases),
        )

    def _ensemble_scorer(
        self, rows: Floats, phrases: Phrases, competitors: Floats, competitor_mask: NDArray[np.bool_]
    ) -> EnsembleScorer:
        """The scorer where the proposal network has no words: the heads alone classify."""
        from ovd.config_fvlm import FvlmConfig

        labelled, config = self._labelled.relations(phrases), self.card.architecture
        assert isinstance(config, FvlmConfig)
        is_labelled = np.asarray(labelled.same_or_below.any(axis=1))
        return EnsembleScorer(
            rows=rows,
            competitors=competitors,
            competitor_mask=competitor_mask,
            exponent=head_exponents(config.variant, is_labelled, novel=config.novel_exponent),
            labelled_rows=self.background_words[: len(self.card.classes)],
            related=labelled.related,
            is_labelled=is_labelled,
            scale=self.network.scale,
            calibration=self.calibration,
        )

    def _finetuned_only(self, finetuned: FinetunedNames, phrases: Phrases) -> NDArray[np.bool_]:
        """(C,) bool: fine-tuned classes that are no word of the proposal network."""
        return np.array(
            [
                any(finetuned.has(phrase) for phrase in group)
                and not any(self.proposal_words.is_one(phrase) for phrase in group)
                for group in phrases
            ],
            dtype=bool,
        )

    def example_scorer(self, rows: Floats, competitors: Floats, negatives: Floats) -> Scorer:
        """See `RegionModel.example_scorer`. Negatives are scored on their own: `ovd.inference.scorers.QueryScorer`."""
        return WordProfileScorer(rows=rows, words=competitors, calibration=self.calibration.of_examples())


@dataclass(frozen=True, kw_only=True)
class WordScorer(ManyWordsScorer):
    """Scores each word on its own: no column depends on another.

    *Closed* words are those that the proposal network scores, their synonyms, and their hypernyms. A word of the
    proposal network gets the geometric mean of that network's score and the region head's, a synonym the same, a
    hypernym the best of its hyponyms. Where that network finds none of them in the picture, the image tower's answer
    for the class and its hyponyms among the words of the training is used, at a lower score
    (`Calibration.open_fallback`).

    All other words are *open*: the head learned them from few photos and is worse at them. They get the softmax of the
    image tower's own embedding against all words that contradict them, times powers of objectness, of area, and of the
    probability that the region is none of the proposal network's words that contradict them; or, if that is higher,
    half of the best score of a hyponym among the words of the training.

    Attributes:
        rows: (C, D) unit text embeddings.
        competitors: (B, D) unit text embeddings of what a region may be instead.
        competitor_mask: (C, B) bool: competitors that contradict the class; its synonyms, hypernyms and hyponyms do
            not.
        word_rows: (K, D) unit text embeddings of the proposal network's words; zeros: the head did not learn the word.
        hyponyms: (C, K) bool: words of the proposal network that are the class or a kind of it.
        related: (C, K) bool: those that do not contradict the class: also words above it.
        scale: inverse temperature of the head.
        calibration: of the checkpoint.
        share: (C,) of a class's closed scores, 0…1: how likely an object of its words is one of the class; None: 1.
        training: the words of the training; None: hyponyms among them do not count.
        below: (C, H) bool: of these, words that are the class or a kind of it.
        finetuned: (C, O) bool: an object of the fine-tuned class is also one of the class; None: there are none.
        finetuned_only: (C,) bool: a fine-tuned class that the proposal network does not know: no other box is it.
    """

    rows: Floats = field(metadata=PER_CLASS)
    competitors: Floats
    competitor_mask: NDArray[np.bool_] = field(metadata=PER_CLASS)
    word_rows: Floats
    hyponyms: NDArray[np.bool_] = field(metadata=PER_CLASS)
    related: NDArray[np.bool_] = field(metadata=PER_CLASS)
    scale: float
    calibration: Calibration
    share: Floats | None = field(default=None, metadata=PER_CLASS)
    training: TrainingWords | None = None
    below: NDArray[np.bool_] | None = field(default=None, metadata=PER_CLASS)
    finetuned: NDArray[np.bool_] | None = field(default=None, metadata=PER_CLASS)
    finetuned_only: NDArray[np.bool_] | None = field(default=None, metadata=PER_CLASS)

    def select(self, columns: Sequence[int]) -> WordScorer:
        """See `Scorer`."""
        return select_classes(self, columns)

    @cached_property
    def _split(self) -> tuple[NDArray[np.bool_], WordScorer, WordScorer]:
        """(C,) which classes the proposal network scores; those alone; the others alone."""
        closed: NDArray[np.bool_] = np.asarray(self.hyponyms.any(axis=1))
        return closed, self.select(np.flatnonzero(closed).tolist()), self.select(np.flatnonzero(~closed).tolist())

    @cached_property
    def _open_split(self) -> tuple[NDArray[np.bool_], WordScorer, WordScorer]:
        """(C,) which classes have hyponyms that count; those alone; the others alone."""
        if self._open_hyponyms is None:
            return np.zeros(len(self.rows), dtype=bool), self, self
        general = self._is_general
        return general, self.select(np.flatnonzero(general).tolist()), self.select(np.flatnonzero(~general).tolist())

    @cached_property
    def _open(self) -> OpenWords:
        return OpenWords(
            rows=self.rows,
            competitors=self.competitors,
            groups=CompetitorGroups.of(self.competitor_mask, self.related),
            calibration=self.calibration,
        )

    @cached_property
    def _fallback(self) -> Hyponyms | None:
        """Of closed classes; without ConSE, which takes a fifth of the time of a photo and gains little here."""
        c = replace(self.calibration, open_conse=0.0)
        if self.training is None or self.below is None or not c.open_fallback:
            return None
        return Hyponyms.of(self.training, self.below, self.competitors, c, power=FALLBACK_POWER)

    @cached_property
    def _open_hyponyms(self) -> Hyponyms | None:
        """Of open classes."""
        c = self.calibration
        if self.training is None or self.below is None or not c.open_fallback or not self._is_general.any():
            return None
        return Hyponyms.of(self.training, self.below & self._is_general[:, None], self.competitors, c, power=1)

    @cached_property
    def _is_general(self) -> NDArray[np.bool_]:
        """(C,) classes with a word below them. The only one that `below` has of a class may be the class itself."""
        if self.below is None or self.training is None:
            return np.zeros(len(self.rows), dtype=bool)
        count_C = self.below.sum(axis=1)
        one = np.flatnonzero(count_C == 1)
        cosine = (self.rows[one] * self.training.rows[self.below[one].argmax(axis=1)]).sum(axis=1)
        is_general = np.asarray(count_C > 1)
        is_general[one] = cosine < SAME_WORD
        return is_general

    @cached_property
    def _distinct_hyponyms(self) -> DistinctRows:
        return distinct_rows(self.hyponyms)

    def __call__(self, regions: RegionSet) -> Floats:
        """See `Scorer`."""
        closed, closed_words, open_words = self._split
        score_RC = np.empty((len(regions), len(self.rows)), np.float32)
        if closed.any():
            score_RC[:, closed] = closed_words.closed_scores(regions)
        if not closed.all():
            score_RC[:, ~closed] = open_words.open_scores(regions)
        if self.finetuned is not None and self.finetuned_only is not None and regions.finetuned is not None:
            score_RC[:, self.finetuned_only] = 0
            concerned = np.flatnonzero(self.finetuned.any(axis=1))
            finetuned_RC = best_of(regions.finetuned, self.finetuned[concerned])
            score_RC[:, concerned] = np.maximum(score_RC[:, concerned], finetuned_RC)
        return score_RC

    def shown(self, regions: RegionSet, *, threshold: float) -> Shown:
        """See `ManyWordsScorer`."""
        closed, closed_words, open_words = self._split
        if self.finetuned is not None or closed.all():
            return Shown.of(self(regions), threshold=threshold)
        one = Shown.of(closed_words.closed_scores(regions), threshold=threshold)
        other = open_words.open_shown(regions, threshold=threshold)
        return Shown.joined([(np.flatnonzero(closed), one), (np.flatnonzero(~closed), other)])

    def closed_scores(self, regions: RegionSet) -> Floats:
        """(R, C) scores by the best of the proposal network's words for each class; near 0 for a class without any.

        At least the fallback: ``open_fallback · (open · (1 - best))^FALLBACK_POWER``, where ``open`` is the best open
        score of the class's hyponyms in the region, and ``best`` the class's best score in the picture without it.
        """
        assert regions.word_scores is not None
        c, word_RK = self.calibration, regions.word_scores
        head_RK = regions.head_probabilities(self.word_rows, scale=self.scale)
        head_RK = np.where(self.word_rows.any(axis=1), head_RK, word_RK)
        score_RK = word_RK ** (1 - c.head_weight) * head_RK**c.head_weight
        score_RK = platt_scaled(score_RK, slope=c.slope, offset=c.offset)
        score_RC = best_of(score_RK, self._distinct_hyponyms.rows)[:, self._distinct_hyponyms.of]
        if (fallback := self._fallback) is not None and len(regions):
            missed_C = 1 - score_RC.max(axis=0)
            few, open_FC = fallback.best(regions)
            score_RC[few] = np.maximum(score_RC[few], open_FC * missed_C**FALLBACK_POWER)
        return score_RC if self.share is None else score_RC * self.share

    def open_scores(self, regions: RegionSet) -> Floats:
        """(R, C) scores by the image tower's embedding alone."""
        score_RC = self._open(regions)
        if (hyponyms := self._open_hyponyms) is not None:
            few, best_FC = hyponyms.best(regions)
            score_RC[few] = np.maximum(score_RC[few], best_FC)
        return score_RC

    def open_shown(self, regions: RegionSet, *, threshold: float) -> Shown:
        """Of `open_scores`, the classes that reach a threshold."""
        general, general_words, plain_words = self._open_split
        if not general.any():
            return self._open.shown(regions, threshold=threshold)
        one = Shown.of(general_words.open_scores(regions), threshold=threshold)
        other = plain_words._open.shown(regions, threshold=threshold)
        return Shown.joined([(np.flatnonzero(general), one), (np.flatnonzero(~general), other)])
