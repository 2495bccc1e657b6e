# SPDX-License-Identifier: Apache-2.0
"""Scorers of a picture's regions, one column per class, for `Detector` and `Predictor`.

Shapes: R regions, C classes, E examples, N negatives, B background words, D joint embedding.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from ovd.inference.arrays import Floats
from ovd.inference.ensemble import FIXED_TEXT_WEIGHT
from ovd.inference.scoring import Calibration, RegionSet, score_regions, vocabulary_probabilities

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from ovd.inference.region_model import RegionModel


PER_CLASS = {"per_class": True}
"""Metadata of a scorer's fields that have one row per class."""


class Scorer(Protocol):
    """Scores regions for a fixed list of classes."""

    @property
    def rows(self) -> Floats:
        """(C, D) embeddings of the classes."""

    def __call__(self, regions: RegionSet) -> Floats:
        """(R, C) scores in [0, 1]."""

    def select(self, columns: Sequence[int]) -> Scorer:
        """A scorer of some of the classes, by index."""


DataclassScorer = TypeVar("DataclassScorer", bound="DataclassInstance")


def select_classes(scorer: DataclassScorer, columns: Sequence[int]) -> DataclassScorer:
    """`Scorer.select` of a dataclass: its `PER_CLASS` fields are reduced to some of their rows, the others stay."""
    chosen, values = list(columns), vars(scorer)
    per_class = [f.name for f in fields(scorer) if f.metadata == PER_CLASS and values[f.name] is not None]
    return replace(scorer, **{name: values[name][chosen] for name in per_class})


class Shown(NamedTuple):
    """Scores of the classes that have a region at or above a threshold.

    Attributes:
        best: (C,) best score of each class.
        classes: (S,) numbers of those that reach the threshold, in their order.
        score_RS: their scores.
    """

    best: Floats
    classes: NDArray[np.int64]
    score_RS: Floats

    @classmethod
    def of(cls, score_RC: Floats, *, threshold: float) -> Shown:
        """Of the scores of all classes."""
        best_C = score_RC.max(axis=0, initial=0.0)
        classes = np.flatnonzero(best_C >= threshold)
        return cls(best_C, classes, score_RC[:, classes])

    @classmethod
    def in_order(cls, best: Floats, classes: NDArray[np.int64], score_RS: Floats) -> Shown:
        """Of classes in any order."""
        order = np.argsort(classes)
        return cls(best, classes[order], score_RS[:, order])

    @classmethod
    def joined(cls, parts: Sequence[tuple[NDArray[np.int64], Shown]]) -> Shown:
        """Of parts of the classes, each with the numbers of its classes."""
        best_C = np.empty(sum(len(numbers) for numbers, _ in parts), np.float32)
        for numbers, shown in parts:
            best_C[numbers] = shown.best
        classes = np.concatenate([numbers[shown.classes] for numbers, shown in parts])
        return cls.in_order(best_C, classes, np.concatenate([shown.score_RS for _, shown in parts], axis=1))


class ManyWordsScorer(ABC):
    """A `Scorer` that is faster when only scores above a threshold are needed."""

    @abstractmethod
    def shown(self, regions: RegionSet, *, threshold: float) -> Shown:
        """What `Shown.of` says of all scores."""


@dataclass(frozen=True, kw_only=True)
class PublishedScorer:
    """One softmax over the vocabulary and the background, as ViLD is evaluated.

    Attributes:
        rows: (C, D) unit text embeddings.
        background: (D,) or None.
        scale: inverse temperature: the one of training, never a fitted one, because fitting sees novel labels.
        exponent: of the text head where there are two heads; a number or (C,).
    """

    rows: Floats
    background: Floats | None
    scale: float = 100.0
    exponent: float | Floats = FIXED_TEXT_WEIGHT

    def __call__(self, regions: RegionSet) -> Floats:
        """See `Scorer`."""
        return vocabulary_probabilities(
            regions.text, regions.image, self.rows, self.background, scale=self.scale, exponent=self.exponent
        )

    def select(self, columns: Sequence[int]) -> PublishedScorer:
        """See `Scorer`; the softmax is over those that are left."""
        exponent = self.exponent[list(columns)] if isinstance(self.exponent, np.ndarray) else self.exponent
        return replace(self, rows=self.rows[list(columns)], exponent=exponent)


@dataclass(frozen=True, kw_only=True)
class CalibratedScorer:
    """Every class alone against the background words, as the page shows it.

    Attributes:
        rows: (C, D) unit text embeddings.
        background_words: (B, D) unit text embeddings.
        background: (D,) or None.
        calibration: of the checkpoint.
    """

    rows: Floats = field(metadata=PER_CLASS)
    background_words: Floats
    background: Floats | None
    calibration: Calibration

    def __call__(self, regions: RegionSet) -> Floats:
        """See `Scorer`."""
        return score_regions(
            regions.text,
            regions.image,
            regions.objectness,
            self.rows,
            self.background_words,
            self.background,
            self.calibration,
        )

    def select(self, columns: Sequence[int]) -> CalibratedScorer:
        """See `Scorer`."""
        return select_classes(self, columns)


@dataclass(frozen=True, kw_only=True)
class ObjectnessScorer:
    """Another scorer's ``class^(1−w) · objectness^w``, for embeddings that do not say that a region is nothing.

    Attributes:
        scorer: gives the class scores.
        weight: w.
    """

    scorer: Scorer
    weight: float

    @property
    def rows(self) -> Floats:
        """See `Scorer`."""
        return self.scorer.rows

    def __call__(self, regions: RegionSet) -> Floats:
        """See `Scorer`."""
        score_RC = self.scorer(regions)
        objectness_R1 = regions.objectness[:, None].clip(0, 1)
        result: Floats = score_RC ** (1 - self.weight) * np.power(objectness_R1, self.weight, dtype=score_RC.dtype)
        return result

    def select(self, columns: Sequence[int]) -> ObjectnessScorer:
        """See `Scorer`."""
        return replace(self, scorer=self.scorer.select(columns))


class QueryScores(NamedTuple):
    """Scores of a query.

    Attributes:
        score_RC: of the classes to look for.
        negative_RN: of the negative words and examples.
    """

    score_RC: Floats
    negative_RN: Floats

    def shown(self, *, threshold: float) -> Shown:
        """The classes with a region to show.

        A region that looks as much like a negative word or example as like a class, or more, is left out: -1.
        """
        score_RC = self.score_RC
        if self.negative_RN.shape[1]:
            score_RC = np.where(score_RC <= self.negative_RN.max(axis=1, keepdims=True), np.float32(-1), score_RC)
        return Shown.of(score_RC, threshold=threshold)


@dataclass(frozen=True, kw_only=True)
class QueryScorer:
    """Scores words and examples of one query; no class depends on another one.

    Attributes:
        words: (W, D) unit text embeddings, negative words included.
        phrases: of each word its name and synonyms.
        word_is_negative: (W,) bool.
        examples: (E, D) unit image embeddings, negative examples included.
        example_is_negative: (E,) bool.
        columns: the class of each column: the words to look for, then the examples to look for.
        classes: C.
        model: whose background words, background and calibration count.
    """

    words: Floats
    phrases: tuple[tuple[str, ...], ...]
    word_is_negative: NDArray[np.bool_]
    examples: Floats
    example_is_negative: NDArray[np.bool_]
    columns: list[int]
    classes: int
    model: RegionModel

    @cached_property
    def _parts(self) -> tuple[list[Scorer], list[Scorer]]:
        """Scorers of the classes, words first, and scorers of the negatives.

        Negatives are scored against the checkpoint's background words only: they do not compete with one another.
        """
        background_words = self.model.background_words
        negative_words, negatives = self.words[self.word_is_negative], self.examples[self.example_is_negative]
        competitors = np.concatenate([background_words, negative_words])
        return (
            [
                *self._of_words(~self.word_is_negative, competitors),
                self.model.example_scorer(self.examples[~self.example_is_negative], competitors, negatives),
            ],
            [
                *self._of_words(self.word_is_negative, background_words),
                self.model.example_scorer(negatives, background_words, negatives[:0]),
            ],
        )

    def __call__(self, regions: RegionSet) -> QueryScores:
        """Score all regions of a picture."""
        column_RK, negative_RN = (_as_table([scorer(regions) for scorer in scorers]) for scorers in self._parts)
        if not len(self.examples):
            return QueryScores(column_RK, negative_RN)
        score_RC = np.zeros((len(column_RK), self.classes), np.float32)
        for column, class_id in enumerate(self.columns):
            score_RC[:, class_id] = np.maximum(score_RC[:, class_id], column_RK[:, column])
        return QueryScores(score_RC, negative_RN)

    def shown(self, regions: RegionSet, *, threshold: float) -> Shown:
        """See `QueryScores.shown`."""
        words = self._parts[0][0]
        if isinstance(words, ManyWordsScorer) and not len(self.examples) and not self.word_is_negative.any():
            return words.shown(regions, threshold=threshold)
        return self(regions).shown(threshold=threshold)

    def kind_of(self, classes: NDArray[np.int64]) -> NDArray[np.bool_]:
        """(S, S) bool: of some of the classes, by number, which is a kind of which; see `RegionModel.kind_of`."""
        wanted = [group for group, negative in zip(self.phrases, self.word_is_negative, strict=True) if not negative]
        phrases: dict[int, list[str]] = {number: [] for number in classes.tolist()}
        for group, number in zip(wanted, self.columns, strict=False):  # columns of examples come after those of words
            if number in phrases:
                phrases[number] += group
        return self.model.kind_of(list(phrases.values()))

    def _of_words(self, chosen: NDArray[np.bool_], competitors: Floats) -> list[Scorer]:
        if not chosen.any():
            return []
        phrases = [group for group, keep in zip(self.phrases, chosen.tolist(), strict=True) if keep]
        return [self.model.scorer(self.words[chosen], phrases, competitors)]


def _as_table(scores: list[Floats]) -> Floats:
    """(R, K) the columns of several scorers side by side; of one scorer they are not copied."""
    filled = [columns for columns in scores if columns.shape[1]]
    return filled[0] if len(filled) == 1 else np.concatenate(scores, axis=1)
