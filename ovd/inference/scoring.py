# SPDX-License-Identifier: Apache-2.0
"""From region embeddings to calibrated scores that do not depend on the number of typed words.

A plain softmax over the typed words gives the same mediocre region .73 with one word and .02 with a thousand. Here
every class is scored on its own against a *fixed* set of competitors: the checkpoint's background words, the learned
background and the user's negative words. So no column depends on another.

Shapes: ``R`` regions, ``C`` typed classes, ``B`` background words, ``D`` joint embedding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from ovd.inference.arrays import Floats, as_array, platt_scaled, sigmoid, softmax, unit_rows
from ovd.inference.ensemble import FIXED_TEXT_WEIGHT, geometric_ensemble


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Turns a checkpoint's cosines into scores; fitted per checkpoint and stored with it.

    Attributes:
        logit_scale: inverse temperature of the softmax (ViLD trains with 100).
        text_weight: exponent of the text head where there are two heads.
        objectness_weight: exponent e of the proposal's objectness in ``score · objectness^e``.
        slope, offset: ``score = sigmoid(slope · logit(raw) + offset)``, fitted so that .7 is right seven times in ten.
        bank_limit: background words with a cosine above it to the typed class are its near-synonyms and do not compete
            with it.
        threshold: default of the page and of ``detect``.
        prompt_free_threshold: lowest score shown in prompt-free detection, where ``wordbox calibrate`` fitted one;
            None: as `ovd.inference.everything` has it.
        head_weight: exponent of the region head beside the proposal network's own score, for words that the latter
            knows (`ovd.inference.fvlm_regions`); slope and offset are those words'. Of 0 to .4 in tenths, .2 has the
            best mean AP on the photos that the head was chosen on.
        open_scale: inverse temperature of all other words, which are scored by the image tower's own embedding.
        open_objectness, open_quality, open_area: exponents of the objectness, of the localisation quality and of the
            box's share of the picture, for these words: parts of a thing look like the thing.
        open_unknown: exponent, for these words, of the probability that a region is none of the words that contradict
            the word, of those that the proposal network or labels know.
        open_conse: share of ConSE's embedding in that of the image tower, for these words, see
            `RegionSet.open_embedding`.
        open_slope, open_offset: their sigmoid.
        open_fallback: highest score of a class by the image tower's embedding of its hyponyms, or of a word that the
            proposal network knows but does not find in the picture; 0: neither counts.
        example_*: the same for classes given by crops, see :meth:`of_examples`. Two image embeddings are
            closer than an image and its word, so a crop's cosines need another temperature and sigmoid. A detector of
            photographs compares distributions over words (`ovd.inference.example_scorers`): the temperature is theirs.
    """

    logit_scale: float = 100.0
    text_weight: float = FIXED_TEXT_WEIGHT
    objectness_weight: float = 0.0
    slope: float = 1.0
    offset: float = 0.0
    bank_limit: float = 0.7
    threshold: float = 0.3
    prompt_free_threshold: float | None = None
    head_weight: float = 0.2
    open_scale: float = 15.0
    open_objectness: float = 1.0
    open_quality: float = 0.0
    open_area: float = 0.25
    open_unknown: float = 0.0
    open_conse: float = 0.0
    open_slope: float = 1.0
    open_offset: float = 0.0
    open_fallback: float = 0.0
    example_logit_scale: float = 20.0
    example_objectness_weight: float = 0.5
    example_slope: float = 1.0
    example_offset: float = 0.0
    example_threshold: float = 0.5

    def of_examples(self) -> Calibration:
        """The calibration of examples."""
        return replace(
            self,
            logit_scale=self.example_logit_scale,
            objectness_weight=self.example_objectness_weight,
            slope=self.example_slope,
            offset=self.example_offset,
            threshold=self.example_threshold,
        )

    def with_examples(self, fitted: Calibration) -> Calibration:
        """This calibration with the example values of one that was fitted on examples; undoes `of_examples`."""
        return replace(
            self,
            example_logit_scale=fitted.logit_scale,
            example_objectness_weight=fitted.objectness_weight,
            example_slope=fitted.slope,
            example_offset=fitted.offset,
            example_threshold=fitted.threshold,
        )

    def record(self) -> dict[str, float]:
        """The fields as a file keeps them; what was not fitted is left out."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def uncalibrated(self) -> Calibration:
        """The same scores before the sigmoid is applied, and without the fallback, which is of scores after it."""
        return replace(self, slope=1.0, offset=0.0, open_slope=1.0, open_offset=0.0, open_fallback=0.0)


class Deferred:
    """An array that is computed when it is first asked for; what it is computed from is then let go."""

    def __init__(self, compute: Callable[[], Floats]) -> None:
        self._compute: Callable[[], Floats] | None = compute
        self._value: Floats | None = None

    def __call__(self) -> Floats:
        """The array."""
        compute = self._compute
        if compute is not None:  # threads that ask at once compute the same
            self._value, self._compute = compute(), None
        assert self._value is not None
        return self._value

    def __reduce__(self) -> tuple[type[Deferred], tuple[Callable[[], Floats]]]:
        """Pickles and copies hold the array, not what it is computed from."""
        return Deferred, (partial(np.copy, self()),)


@dataclass(kw_only=True)
class RegionSet:
    """The regions of one picture, before any word is typed.

    Arrays; tensors of whatever device are brought here when one is made.

    Attributes:
        boxes: (R, 4) float32 x1, y1, x2, y2 in pixels of the original picture.
        objectness: (R,) in [0, 1].
        text: (R, D) unit rows, the text head's embeddings.
        image: (R, D) unit rows, the image head's, or None where one head does both.
        masks: (R, M, M) mask probabilities in the frame of each box, or None.
        size: (height, width) of the original picture.
        word_scores: (R, K) in [0, 1], the proposal network's scores of the words it was trained on, or None.
        bias: (R,) logit of any word beside its cosine to the text head, or None (`ovd.modeling.fvlm.head`).
        conse: (R, D) means of the words of ImageNet's classes, weighted by their probabilities, computed when first
            needed, or None: 1 long where the classifier is certain, near 0 where it is in doubt
            (`ovd.modeling.fvlm.conse`).
        quality: (R,) in [0, 1], how well boxes fit objects, also those that the proposal network has no word for, or
            None (`ovd.modeling.fvlm.quality`).
        finetuned: (R, O) in [0, 1], calibrated scores of classes that were added by fine-tuning, or None. Their boxes
            have objectness 0 and no score of any other word.
    """

    boxes: Floats
    objectness: Floats
    text: Floats
    image: Floats | None
    masks: Floats | None
    size: tuple[int, int]
    word_scores: Floats | None = None
    bias: Floats | None = None
    conse: Deferred | None = None
    quality: Floats | None = None
    finetuned: Floats | None = None

    def __post_init__(self) -> None:
        self.boxes, self.objectness, self.text = (as_array(x) for x in (self.boxes, self.objectness, self.text))
        self.image, self.masks, self.word_scores, self.bias, self.quality, self.finetuned = (
            None if x is None else as_array(x)
            for x in (self.image, self.masks, self.word_scores, self.bias, self.quality, self.finetuned)
        )

    def __len__(self) -> int:
        return len(self.boxes)

    def at(self, index: NDArray[np.bool_] | NDArray[np.int64]) -> RegionSet:
        """Some of the regions."""

        def some(values: Floats | None) -> Floats | None:
            return None if values is None else values[index]

        conse = self.conse
        return replace(
            self,
            boxes=self.boxes[index],
            objectness=self.objectness[index],
            text=self.text[index],
            image=some(self.image),
            masks=some(self.masks),
            word_scores=some(self.word_scores),
            bias=some(self.bias),
            conse=None if conse is None else Deferred(lambda: conse()[index]),
            quality=some(self.quality),
            finetuned=some(self.finetuned),
        )

    def head_probabilities(self, rows_CD: Floats, *, scale: float) -> Floats:
        """(R, C) probabilities of words by the head that learned them (`ovd.modeling.fvlm.head`).

        Args:
            rows_CD: unit text embeddings.
            scale: inverse temperature of the head.
        """
        assert self.bias is not None
        return sigmoid(scale * (self.text @ rows_CD.T) + self.bias[:, None])

    @property
    def distilled(self) -> Floats:
        """(R, D) of the head that was distilled from image embeddings: the image head, or the one head of both."""
        return self.text if self.image is None else self.image

    def open_embedding(self, share: float) -> Floats:
        """(R, D) unit rows that words unknown to the proposal network are compared with.

        ``(1 - share · c) · image + share · conse``, where ``c`` is ConSE's length: where the classifier is in doubt,
        the image head's embedding is all that counts.
        """
        if self.conse is None or not share:
            return self.distilled
        conse_RD = self.conse()
        certainty_R1 = np.linalg.norm(conse_RD, axis=1, keepdims=True)
        return unit_rows((1 - share * certainty_R1) * self.distilled + share * conse_RD)

    @property
    def is_finetuned(self) -> NDArray[np.bool_]:
        """(R,) bool: boxes of fine-tuned classes, which have no score of any other word."""
        if self.finetuned is None:
            return np.zeros(len(self), dtype=bool)
        return np.asarray((self.finetuned > 0).any(axis=1))


def competitor_mask(classes_CD: Floats, words_BD: Floats, *, limit: float) -> NDArray[np.bool_]:
    """(C, B) bool: True where a background word competes with a class, False for its near-synonyms."""
    return classes_CD @ words_BD.T <= limit


def competitive_probabilities(
    regions_RD: Floats,
    classes_CD: Floats,
    words_BD: Floats,
    background_D: Floats | None,
    *,
    scale: float,
    mask_CB: NDArray[np.bool_],
) -> Floats:
    """(R, C) probability of each class against the background words and the background, each column on its own.

    ``p_c = e^{s·c} / (e^{s·c} + Σ_competitors e^{s·b} + e^{s·bg})``. All inputs are unit rows.

    Args:
        mask_CB: bool: which background words compete with which class, see `competitor_mask`.
    """
    classes_RC = scale * (regions_RD @ classes_CD.T)
    words_RB = scale * (regions_RD @ words_BD.T)
    if background_D is not None:
        words_RB = np.concatenate([words_RB, scale * (regions_RD @ background_D)[:, None]], axis=1)
        mask_CB = np.pad(mask_CB, ((0, 0), (0, 1)), constant_values=True)
    if words_RB.shape[1] == 0:
        raise ValueError("scores need at least one competitor: a background word or a background embedding")
    # One shift per region keeps every exponential in range; a sum over the kept words (never total − left out) keeps
    # the digits.
    shift_R1 = words_RB.max(axis=1, keepdims=True)
    odds_RB = np.exp(words_RB - shift_R1)
    all_C = mask_CB.all(axis=1)  # most of ten thousand words have no near-synonym: their sum is one and the same
    against_RC = np.empty_like(classes_RC)
    against_RC[:, all_C] = shift_R1 + np.log(np.maximum(odds_RB.sum(axis=1, keepdims=True), 1e-30))
    some_RC = odds_RB @ mask_CB[~all_C].T.astype(odds_RB.dtype)
    against_RC[:, ~all_C] = shift_R1 + np.log(np.maximum(some_RC, 1e-30))
    return sigmoid(classes_RC - against_RC)


def score_regions(
    text_RD: Floats,
    image_RD: Floats | None,
    objectness_R: Floats,
    classes_CD: Floats,
    words_BD: Floats,
    background_D: Floats | None,
    calibration: Calibration,
) -> Floats:
    """(R, C) scores in [0, 1]; column c depends on class c alone.

    Args:
        text_RD: unit rows of the text head.
        image_RD: unit rows of the image head, or None. It has no background of its own, so the background
            words are all it competes with.
        objectness_R: in [0, 1].
        classes_CD: unit rows of the typed classes.
        words_BD: unit rows of the checkpoint's background words and of the user's negative words.
        background_D: unit learned background, or None.
        calibration: the checkpoint's.
    """
    scale, mask_CB = (
        calibration.logit_scale,
        competitor_mask(classes_CD, words_BD, limit=calibration.bank_limit),
    )
    score = competitive_probabilities(text_RD, classes_CD, words_BD, background_D, scale=scale, mask_CB=mask_CB)
    if image_RD is not None:
        image = competitive_probabilities(image_RD, classes_CD, words_BD, None, scale=scale, mask_CB=mask_CB)
        score = geometric_ensemble(score, image, calibration.text_weight)
    if calibration.objectness_weight:
        score = score * np.power(objectness_R.clip(0, 1), calibration.objectness_weight, dtype=score.dtype)[:, None]
    if (calibration.slope, calibration.offset) != (1.0, 0.0):
        score = platt_scaled(score, slope=calibration.slope, offset=calibration.offset)
    return score


def vocabulary_probabilities(
    text_RD: Floats,
    image_RD: Floats | None,
    classes_CD: Floats,
    background_D: Floats | None,
    *,
    scale: float,
    exponent: Floats | float = FIXED_TEXT_WEIGHT,
) -> Floats:
    """(R, C) scores of the published evaluation: one softmax over the whole vocabulary, background column dropped.

    The text head's softmax includes the background, the image head's does not (released code).
    """
    logits = scale * (text_RD @ classes_CD.T)
    if background_D is not None:
        logits = np.concatenate([logits, scale * (text_RD @ background_D)[:, None]], axis=1)
    score = softmax(logits)[:, : len(classes_CD)]
    if image_RD is not None:
        score = geometric_ensemble(score, softmax(scale * (image_RD @ classes_CD.T)), exponent)
    return score
