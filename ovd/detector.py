# SPDX-License-Identifier: Apache-2.0
"""The public detector: words and a picture in, boxes and masks out.

    from ovd import Detector

    detector = Detector.load("default")
    detector.set_classes(["dog", "mug: cup, coffee mug", "-poster"])
    detections = detector.detect("desk.jpg")
    detections = detector.find("desk.jpg", "lamp", examples={"my mug": "mug.png"})     # by word and by example

A picture is run through the network once (`Detector.embed`); classifying its regions by other words is a matrix product
and NMS (`Regions.classify`). A class's score does not depend on the other words or examples of the query.

Shapes: R regions, C classes, E examples, D joint embedding.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ovd.detections import Detections
from ovd.examples import ExampleEmbedder, parse_examples
from ovd.inference.arrays import Floats
from ovd.inference.conditioned import conditioned_detections, require_examples_only
from ovd.inference.crop_refinement import refine_with_crops
from ovd.inference.encoder import image_tower
from ovd.inference.everything import is_everything
from ovd.inference.postprocess import ClassifyOptions
from ovd.inference.region_model import PatchLocator, RegionModel
from ovd.inference.regions import Regions, picture_key
from ovd.inference.scorers import QueryScorer
from ovd.inference.scoring import RegionSet
from ovd.inference.sides import apply_sides, card_with_sides
from ovd.locks import ComputeLock
from ovd.pictures import ImageLike, to_rgb
from ovd.query import Query
from ovd.runtime.choice import Runtime, load_trained
from ovd.text import TextEmbedder, TextEncoder, cut_phrases
from ovd.vocabulary import TEMPLATES_STICKER, Vocabulary
from ovd.weights import ModelCard, detector_folder
from pretrain.engine.errors import UserError, shorten

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ovd.examples import Example, ExamplesLike

REGIONS = 150
"""Default number of regions per picture."""
SCORERS = 4
"""Queries whose scorers are kept: preparing one for 10,000 words takes as long as a picture."""


class Detector:
    """Finds what is typed.

    Not bound to one vocabulary: `set_classes` is a convenience for `detect`; `Regions.classify` takes any words.
    One picture is run at a time (a lock), so a detector can be shared by threads.

    Args:
        model: the network.
        encoder: the encoder the network was trained against; examples need its image tower.
        templates: prompt templates for words given as text.
        cache_size: pictures whose regions are remembered (about 1.5 MB each for 300 regions).
        text_cache: folder for embeddings of whole vocabularies, or None.
        crop_refinement: how many of a picture's regions the encoder's image tower embeds as crops too, best objectness
            first (`ovd.inference.crop_refinement`); 0: none. About 1.4 milliseconds each with the shipped encoder on
            two CPU cores.
        card: what is known of the weights (name, sha256, data, AP …).
        second_look: the former name of ``crop_refinement``.

    Raises:
        UserError: crop refinement of fewer than 0 regions, or with an encoder without an image tower.
    """

    def __init__(
        self,
        *,
        model: RegionModel,
        encoder: TextEncoder,
        templates: Sequence[str] = TEMPLATES_STICKER,
        cache_size: int = 8,
        text_cache: str | Path | None = None,
        crop_refinement: int = 0,
        card: ModelCard | None = None,
        second_look: int | None = None,
    ) -> None:
        self.model = model
        self.text = TextEmbedder(encoder=encoder, cache_dir=text_cache)
        self.crop_refinement = crop_refinement if second_look is None else second_look
        image_encoder = image_tower(encoder)
        if self.crop_refinement < 0:
            raise UserError(f"crop_refinement is {self.crop_refinement}: 0 (none) or more regions")
        if self.crop_refinement and image_encoder is None:
            raise UserError("crop refinement needs an encoder with an image tower; this one knows texts only (0: none)")
        self._refiner = image_encoder if self.crop_refinement else None
        example_encoder = model.example_encoder or image_encoder
        self.examples = None if example_encoder is None else ExampleEmbedder(encoder=example_encoder)
        self.templates = tuple(templates)
        self.card = ModelCard(**(card or {}))
        self.vocabulary: Vocabulary | None = None
        self.runs = 0  # pictures that went through the network
        self._cache_size = cache_size
        self._cache: OrderedDict[str, RegionSet] = OrderedDict()
        self._scorers: list[tuple[Query, QueryScorer]] = []  # the last first
        self._lock = ComputeLock()

    @classmethod
    def load(
        cls,
        weights: str | Path = "default",
        *,
        device: str = "auto",
        runtime: Runtime = "auto",
        threads: int | None = None,
        crop_refinement: int | None = None,
        masks: bool = True,
        regions: int | None = None,
        second_look: int | None = None,
        encoder: str | None = None,
        sides: Sequence[int] | None = None,
        cache_size: int = 8,
        text_cache: str | Path | None = None,
    ) -> Detector:
        """Load a trained detector.

        Args:
            weights: name in ``weights/manifest.json`` ("default") or a folder written by ``python -m ovd.train``.
            device: "auto", "cpu", "cuda" or "cuda:N".
            runtime: "onnx" (`wordbox export --format onnx` wrote it; a CPU, no torch), "onnx-int8" (the same in 8
                bits), "torch", or "auto", see `ovd.runtime.choice`.
            threads: of a CPU; None: as many as the runtime takes by itself.
            crop_refinement: see the constructor; None: as many regions as the scores were calibrated for.
            masks: False finds boxes only, in less time.
            regions: kept per picture, best objectness first (default 150, with ``encoder`` 50).
            second_look: the former name of ``crop_refinement``.
            encoder: another image-text encoder that names crops of the boxes, such as
                ``"open_clip:ViT-B-32:laion2b_s34b_b79k"`` (fetched once) or ``"open_clip:ViT-B-32:FILE"``; see
                `ovd.with_encoder`.
            sides: longest sides, in pixels, at which a detector of photographs looks for boxes, as ``[832, 640, 416]``;
                more and larger ones find smaller things in more time. None: as shipped.
            cache_size, text_cache: see the constructor.

        Raises:
            UserError: unknown name, missing or damaged files, or files that a training replaced in the meantime.
        """
        folder = detector_folder(weights)
        inode = folder.stat().st_ino
        if crop_refinement is None:
            crop_refinement = second_look
        if encoder is None:
            parts = load_trained(
                folder, runtime, device=device, threads=threads, masks=masks, regions=regions or REGIONS
            )
        else:
            from ovd.with_encoder import load_with_encoder, refuse_options

            refuse_options(runtime, crop_refinement)
            parts = load_with_encoder(folder, encoder, device=device, threads=threads, masks=masks, regions=regions)
        if folder.stat().st_ino != inode:
            raise UserError(f"{folder}: another export took its place while it was read; load it again")
        apply_sides(parts.model, sides)
        return cls(
            model=parts.model,
            encoder=parts.encoder,
            templates=parts.templates,
            crop_refinement=parts.crop_refinement if crop_refinement is None else crop_refinement,
            card=card_with_sides(parts.card, sides),
            cache_size=cache_size,
            text_cache=text_cache,
        )

    def with_model(self, model: RegionModel) -> Detector:
        """A detector with the same encoder, prompts, refinement and card, whose regions come from another model."""
        return Detector(
            model=model,
            encoder=self.text.encoder,
            templates=self.templates,
            cache_size=self._cache_size,
            text_cache=self.text.cache_dir,
            crop_refinement=self.crop_refinement,
            card=self.card,
        )

    @property
    def threshold(self) -> float:
        """The checkpoint's default threshold for words."""
        return self.model.calibration.threshold

    def threshold_for(self, query: Query, threshold: float | None = None) -> float:
        """The threshold given, or the calibrated one: of words, of examples, or the higher of both in a mixed query.

        Raises:
            UserError: no number, or outside [0, 1].
        """
        if threshold is None:
            calibration = self.model.calibration
            if query.prompt_free is not None:
                return max(query.prompt_free.threshold, calibration.threshold)
            thresholds = [calibration.threshold] if query.words.positives else []
            thresholds += [calibration.example_threshold] if query.positive_examples else []
            return max(thresholds)
        if isinstance(threshold, str | Sequence):  # detect(picture, "dog")
            raise UserError(
                f"threshold is a number from 0 to 1, not {threshold!r}; classes go to set_classes, or to "
                "find(picture, classes)"
            )
        if not 0.0 <= float(threshold) <= 1.0:
            raise UserError(f"threshold must be between 0 and 1, not {threshold}")
        return float(threshold)

    def query(
        self,
        classes: Vocabulary | str | Iterable[str] | None = None,
        examples: ExamplesLike | None = None,
        *,
        picture: NDArray[np.uint8] | None = None,
    ) -> Query:
        """Words and examples as one list of classes, for `Regions.classify`.

        Args:
            classes: words as for `set_classes`; "everything": all words that the detector knows, each thing named once;
                None: those of `set_classes`, or with examples no words.
            examples: see `ovd.examples.parse_examples`.
            picture: (H, W, 3) uint8 RGB, what boxes among the examples lie on.

        Raises:
            UserError: neither a word nor an example to look for, or an example that cannot be used.
        """
        parsed = parse_examples(examples, picture=picture) if examples is not None else ()
        if is_everything(classes):
            if parsed:
                raise UserError("everything: leave the examples out, or name the classes to look for beside them")
            return self._all_words
        if all(e.negative for e in parsed):
            return Query(self.resolve(classes), parsed)
        if classes is None or not isinstance(classes, Vocabulary):
            classes = Vocabulary.parse(classes or (), templates=self.templates, alone=False)
        return Query(self._with_notices(classes), parsed)

    @cached_property
    def _all_words(self) -> Query:
        """The query for all words that the model knows.

        Raises:
            UserError: it names none.
        """
        words = self.model.prompt_free_words().with_threshold(self.model.calibration.prompt_free_threshold)
        if not words.names:
            raise UserError("everything: these weights do not say which words they know; name the classes to look for")
        return Query(Vocabulary.parse(list(words.names), templates=self.templates), prompt_free=words)

    question = query
    """The former name of `query`."""

    def scorer(self, query: Query) -> QueryScorer:
        """The scorer of a query.

        Raises:
            UserError: examples, but no image encoder.
        """
        for key, scorer in self._scorers:  # many pictures get the same query
            if query.has_scores_of(key):
                return scorer
        words = self.text.embed(query.words)
        scorer = QueryScorer(
            words=words,
            phrases=tuple(c.phrases for c in query.words.classes),
            word_is_negative=np.array([c.negative for c in query.words.classes], dtype=bool),
            examples=self.embed_examples(query.examples) if query.examples else words[:0],
            example_is_negative=np.array([e.negative for e in query.examples], dtype=bool),
            columns=query.columns,
            classes=len(query.names),
            model=self.model,
        )
        self._scorers = [(query, scorer), *self._scorers[: SCORERS - 1]]
        return scorer

    def embed_examples(self, examples: Sequence[Example]) -> Floats:
        """(E, D) unit rows of examples in the space of the regions.

        Raises:
            UserError: these weights have no image tower.
        """
        if self.examples is None:
            raise UserError(
                "these weights cannot search by example: their encoder has no image tower. Use words, or load "
                "a detector that was trained against an image-text encoder"
            )
        return self.examples.embed(examples)

    def resolve(self, vocabulary: Vocabulary | str | Iterable[str] | None) -> Vocabulary:
        """Return a `Vocabulary` for words in any form; the one of `set_classes` for None."""
        if vocabulary is None:
            if self.vocabulary is None:
                raise UserError('no classes yet: call set_classes(["mug", …]) or pass the words')
            return self.vocabulary
        if not isinstance(vocabulary, Vocabulary):
            vocabulary = Vocabulary.parse(vocabulary, templates=self.templates)
        return self._with_notices(vocabulary)

    def _with_notices(self, vocabulary: Vocabulary) -> Vocabulary:
        """The vocabulary, with notices on how its words are understood and which are longer than the encoder reads."""
        notices = list(self.model.notices([c.phrases for c in vocabulary.classes], self.text.embed(vocabulary)))
        if cut := cut_phrases(vocabulary, self.text.encoder):
            names = ", ".join(shorten(name, 60) for name in cut[:3]) + (" …" if len(cut) > 3 else "")
            notices.append(f"Longer than the text encoder reads, the end is ignored: {names}")
        if not notices:
            return vocabulary
        return replace(vocabulary, notices=tuple(dict.fromkeys([*vocabulary.notices, *notices])))

    def set_classes(self, classes: Vocabulary | str | Iterable[str]) -> Vocabulary:
        """Set the classes of `detect`, and embed them.

        Args:
            classes: ``["dog", "mug: cup, coffee mug", "-poster"]``, a string in the same grammar, or a `Vocabulary`.

        Returns:
            the vocabulary, with ``notices`` about merged duplicates.
        """
        vocabulary = self.resolve(classes)
        with self._lock:
            self.text.embed(vocabulary)
        self.vocabulary = vocabulary
        return vocabulary

    def embed(self, image: ImageLike) -> Regions:
        """Run the network on a picture, or return what is remembered of the same pixels.

        Raises:
            UserError: the picture cannot be read.
        """
        pixels = to_rgb(image)
        key = picture_key(pixels)
        with self._lock:
            regions = self._cache.get(key)
            if regions is None:
                regions = self.model.regions(pixels)
                if self._refiner is not None:
                    regions = refine_with_crops(regions, pixels, self._refiner, count=self.crop_refinement)
                self.runs += 1
                if self._cache_size:
                    self._cache[key] = regions
                    while len(self._cache) > self._cache_size:
                        self._cache.popitem(last=False)
            else:
                self._cache.move_to_end(key)
        return Regions(regions=regions, key=key, detector=self)

    def detect(
        self, image: ImageLike, threshold: float | None = None, **options: Unpack[ClassifyOptions]
    ) -> Detections:
        """Find the classes of `set_classes` in a picture.

        Args:
            image: path, bytes, Pillow image or uint8 RGB array, see `to_rgb`; one, not a list.
            threshold: lowest score; the checkpoint's calibrated default when None.
            options: see `Regions.classify`.
        """
        self.resolve(None)
        return self.embed(image).classify(threshold=threshold, **options)

    def find(
        self,
        image: ImageLike,
        classes: Vocabulary | str | Iterable[str] | None = None,
        *,
        examples: ExamplesLike | None = None,
        threshold: float | None = None,
        **options: Unpack[ClassifyOptions],
    ) -> Detections:
        """Find words, things given by crops, or both in one picture.

        Args:
            image: see `to_rgb`.
            classes: see `query`.
            examples: ``[crop, …]``, ``{"my mug": [crop, crop]}`` and more, see `ovd.examples.parse_examples`; a box
                of four numbers lies on ``image``.
            threshold: lowest score; the checkpoint's calibrated default when None.
            options: see `Regions.classify`.

        Raises:
            UserError: nothing to look for, or a picture or an example that cannot be used.
        """
        pixels = to_rgb(image)
        query = self.query(classes, examples, picture=pixels)  # first: a mistake should not cost a run
        return self.answer(pixels, query, threshold=threshold, **options)

    def answer(
        self, image: ImageLike, query: Query, *, threshold: float | None = None, **options: Unpack[ClassifyOptions]
    ) -> Detections:
        """Run a prepared query: classify regions, or condition a UP-DETR pretext model's queries on the examples.

        Args:
            image, threshold, options: see `find`.
            query: of `query`.
        """
        if isinstance(self.model, PatchLocator):
            return self._locate(self.model, to_rgb(image), query, threshold, **options)
        return self.embed(image).classify(query, threshold=threshold, **options)

    def patch_rows(self, model: PatchLocator, examples: Sequence[Example]) -> Floats:
        """(E, D) embeddings that condition a pretext model's queries: the mean over the crops of each example.

        Raises:
            UserError: these weights have no image tower.
        """
        if model.example_encoder is None:
            return self.embed_examples(examples)
        crops = [[(crop.pixels, crop.corners) for crop in example.crops] for example in examples]
        return np.stack([model.patch_rows(crops_of_class).mean(axis=0) for crops_of_class in crops])

    def _locate(
        self,
        model: PatchLocator,
        pixels: NDArray[np.uint8],
        query: Query,
        threshold: float | None,
        **options: Unpack[ClassifyOptions],
    ) -> Detections:
        """Find examples with queries conditioned on them.

        Raises:
            UserError: words or negative examples, which such a model does not know.
        """
        require_examples_only(query)
        threshold = self.threshold_for(query, threshold)
        with self._lock:
            located = model.locate(pixels, self.patch_rows(model, query.positive_examples))
            self.runs += 1
        size = (pixels.shape[0], pixels.shape[1])
        return conditioned_detections(located, query, size=size, threshold=threshold, **options)
