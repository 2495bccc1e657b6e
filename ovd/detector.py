# SPDX-License-Identifier: Apache-2.0
"""The public detector: words and a picture in, boxes and masks out.

    from ovd import Detector

    detector = Detector.load("default")
    detector.set_classes(["dog", "mug: cup, coffee mug", "-poster"])
    detections = detector.detect("desk.jpg")
    detections = detector.find("desk.jpg", "lamp", examples={"my mug": "mug.png"})     # by word and by example

A picture is run through the network once (`Detector.embed`); asking it for other words is a matrix product and NMS
(`Regions.classify`). A class's score does not depend on the other words typed or the other examples shown.

Shapes: R regions, C classes, D joint embedding, n detections, M mask side.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.ops import batched_nms

from ovd.detections import Detections
from ovd.examples import ExampleEmbedder, Question, parse_examples
from ovd.inference.crop_refinement import look_again
from ovd.inference.scoring import Calibration, RegionSet, score_examples, score_regions
from ovd.pictures import ImageLike, to_rgb
from ovd.text import TextEmbedder, TextEncoder
from ovd.vocabulary import TEMPLATE_SETS, TEMPLATES_STICKER, Vocabulary
from ovd.weights import detector_folder, read_model_card, weights_folder
from pretrain.engine.distributed import pick_device
from pretrain.engine.errors import UserError

if TYPE_CHECKING:
    from ovd.examples import Example, ExamplesLike
    from ovd.modeling.export import DetectorCard
    from ovd.regions.crops import RegionEncoder
    from pretrain.nets.towers import JointEncoder

# Class-aware NMS. Detectron2 and ViLD take .5, which AP rewards and leaves a box and its half side by side on the page:
# of the shown boxes .59 are right with .3 and .52 with .5 (80 validation scenes of seed 3000).
NMS_IOU = 0.3
CROSS_CLASS_IOU = 0.85  # two classes on (nearly) the same box are two names for one thing: the better one is shown
MAX_DETECTIONS = 300  # LVIS protocol


class RegionFinder(Protocol):
    """What the detector needs of a network; `ovd.modeling.load.load_detector_model` returns one.

    A network whose regions live in another image space than its text encoder's (a DETR pretrained on patches) also has
    ``example_encoder``, a `ovd.regions.crops.RegionEncoder` into that space; examples are then embedded with it.
    """

    background: Tensor | None
    bank: Tensor
    calibration: Calibration

    def regions(self, image: NDArray[np.uint8]) -> RegionSet:
        """Return the regions of a uint8 (H, W, 3) RGB picture, embedded and in original pixels."""


@dataclass(kw_only=True)
class Regions:
    """One picture after the network: boxes and embeddings, ready for any words.

    Attributes:
        regions: boxes, objectness, embeddings and masks, see `RegionSet`.
        key: sha256 of the pixels.
        detector: whose words and threshold serve when `classify` is called without.
    """

    regions: RegionSet
    key: str
    detector: Detector = field(repr=False)

    def __len__(self) -> int:
        return len(self.regions)

    @torch.inference_mode()
    def scores(self, question: Question | Vocabulary) -> tuple[Tensor, Tensor]:
        """Score all regions.

        Returns:
            (R, C) scores of the classes to look for, and (R, N) of the negative words and examples.
        """
        asked = Question(question) if isinstance(question, Vocabulary) else question
        model, found = self.detector.model, self.regions
        words, shown = self.detector.rows(asked, device=found.text.device)
        negative = torch.tensor([c.negative for c in asked.words.classes], dtype=torch.bool, device=words.device)
        avoided = torch.tensor([e.negative for e in asked.examples], dtype=torch.bool, device=words.device)
        own = model.bank.to(words)
        bank = torch.cat([own, words[negative]])
        background = None if model.background is None else model.background.to(words)
        calibration = model.calibration

        def said(rows: Tensor, against: Tensor) -> Tensor:
            return score_regions(found.text, found.image, found.objectness, rows, against, background, calibration)

        def seen(rows: Tensor, against: Tensor, avoided: Tensor) -> Tensor:
            if not len(rows):
                return rows.new_zeros(len(found), 0)
            return score_examples(found, rows, against, avoided, calibration)

        unwanted = shown[avoided]
        column_RK = torch.cat([said(words[~negative], bank), seen(shown[~avoided], bank, unwanted)], dim=1)
        # Negative words are scored against the checkpoint's bank only: they do not compete with one another.
        against_RN = torch.cat([said(words[negative], own), seen(unwanted, own, unwanted[:0])], dim=1)
        if not asked.examples:
            return column_RK.cpu(), against_RN.cpu()
        owner = torch.tensor(asked.columns, device=column_RK.device).expand(len(column_RK), -1)
        score_RC = column_RK.new_zeros(len(column_RK), len(asked.names)).scatter_reduce(1, owner, column_RK, "amax")
        return score_RC.cpu(), against_RN.cpu()

    @torch.inference_mode()
    def classify(
        self,
        vocabulary: Question | Vocabulary | str | Iterable[str] | None = None,
        *,
        threshold: float | None = None,
        limit: int = MAX_DETECTIONS,
        one_class_per_region: bool = True,
        nms_iou: float = NMS_IOU,
        cross_class_iou: float | None = CROSS_CLASS_IOU,
    ) -> Detections:
        """Name the regions with the words and examples given; the network is not run.

        A region that looks more like a negative word or example than like a class is left out.

        Args:
            vocabulary: words, or words and examples (`Detector.question`); those of `Detector.set_classes` when None.
            threshold: lowest score listed; the checkpoint's calibrated default when None.
            limit: at most so many detections, best first.
            one_class_per_region: show each region under its best class only; False lists every class above the
                threshold, as COCO and LVIS evaluation want it.
            nms_iou: class-aware NMS.
            cross_class_iou: of two classes on boxes overlapping more than this the better is kept; None keeps both.

        Raises:
            UserError: no words, or a threshold outside [0, 1].
        """
        asked = vocabulary if isinstance(vocabulary, Question) else Question(self.detector.resolve(vocabulary))
        level = self.detector.level_of(asked, threshold)
        score_RC, against_RN = self.scores(asked)
        names = asked.names
        best_C = score_RC.max(dim=0).values if len(score_RC) else torch.zeros(len(names))
        if against_RN.shape[1]:
            beaten = score_RC < against_RN.max(dim=1, keepdim=True).values
            score_RC = score_RC.masked_fill(beaten, -1.0)
            best_C = score_RC.clamp_min(0.0).max(dim=0).values if len(score_RC) else best_C
        if one_class_per_region and len(score_RC):
            top_R, class_R = score_RC.max(dim=1)
            region = torch.nonzero(top_R >= level)[:, 0]
            score, class_id = top_R[region], class_R[region]
        else:
            region, class_id = torch.nonzero(score_RC >= level, as_tuple=True)
            score = score_RC[region, class_id]
        boxes = self.regions.boxes.cpu().float()[region]
        keep = _without_doubles(boxes, score, class_id, nms_iou, cross_class_iou)[:limit]
        chosen = region[keep]
        ids = class_id[keep].numpy().astype(np.int64)
        return Detections(
            xyxy=boxes[keep].numpy(),
            confidence=score[keep].float().numpy(),
            class_id=ids,
            class_name=[names[i] for i in ids],
            size=self.regions.size,
            names=names,
            best=best_C.float().numpy(),
            threshold=level,
            region=chosen.numpy().astype(np.int64),
            box_masks=None if self.regions.masks is None else self.regions.masks.cpu()[chosen],
            notices=asked.notices,
        )


def picture_key(pixels: NDArray[np.uint8]) -> str:
    """sha256 of a picture's size and pixels."""
    return hashlib.sha256(f"{pixels.shape}".encode() + pixels.tobytes()).hexdigest()


def _without_doubles(
    boxes: Tensor, score: Tensor, class_id: Tensor, nms_iou: float, cross_class_iou: float | None
) -> Tensor:
    """Indices that remain after NMS within each class and, unless None, between classes; best score first."""
    keep = batched_nms(boxes, score, class_id, nms_iou)
    if cross_class_iou is not None and len(keep) > 1:
        keep = keep[_distinct(boxes[keep], cross_class_iou)]
    return keep


def _distinct(boxes: Tensor, iou: float) -> Tensor:
    """Indices that remain when later boxes overlapping an earlier kept one by more than ``iou`` are left out."""
    order = torch.arange(len(boxes), 0, -1, dtype=torch.float32)  # already sorted by score: earlier is better
    same = batched_nms(boxes, order, torch.zeros(len(boxes), dtype=torch.long), iou)
    return same.sort().values


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
        second_look: how many of a picture's regions the encoder's image tower sees as crops too, best objectness
            first (`ovd.inference.crop_refinement`); 0: none. About 1.4 milliseconds each with the shipped encoder on
            two CPU cores.
        card: what is known of the weights (name, sha256, data, AP …).

    Raises:
        UserError: a second look at fewer than 0 regions, or with an encoder without an image tower.
    """

    def __init__(
        self,
        *,
        model: RegionFinder,
        encoder: TextEncoder,
        templates: Sequence[str] = TEMPLATES_STICKER,
        cache_size: int = 8,
        text_cache: str | Path | None = None,
        second_look: int = 0,
        card: dict[str, Any] | None = None,
    ) -> None:
        self.model = model
        self.text = TextEmbedder(encoder=encoder, cache_dir=text_cache)
        image_encoder = _image_tower(encoder)
        if second_look < 0:
            raise UserError(f"second_look is {second_look}: 0 (none) or more regions")
        if second_look and image_encoder is None:
            raise UserError("a second look needs an encoder with an image tower; this one knows texts only (0: none)")
        self.examples = _example_embedder(model, image_encoder)
        self.second_look = second_look
        self._second_encoder = image_encoder if second_look else None
        self.templates = tuple(templates)
        self.card = dict(card or {})
        self.vocabulary: Vocabulary | None = None
        self.runs = 0  # pictures that went through the network
        self._cache_size = cache_size
        self._cache: OrderedDict[str, RegionSet] = OrderedDict()
        self._lock = threading.RLock()

    @classmethod
    def load(
        cls,
        weights: str | Path = "default",
        *,
        device: str = "auto",
        second_look: int | None = None,
        masks: bool = True,
        **options: Any,
    ) -> Detector:
        """Load a trained detector.

        Args:
            weights: name in ``weights/manifest.json`` ("default") or a folder written by ``python -m ovd.train``.
            device: "auto", "cpu", "cuda" or "cuda:N".
            second_look: see the constructor; None: as many regions as the scores were calibrated for.
            masks: False finds boxes only, in less time.
            options: ``cache_size``, ``text_cache`` of the constructor.

        Raises:
            UserError: unknown name, missing or damaged files.
        """
        where = pick_device(device)
        folder = detector_folder(weights)
        from ovd.modeling.load import load_detector_model  # Detectron2: slow, and not needed to say "no such weights"

        model = load_detector_model(folder, device=str(where), masks=masks)
        encoder = _load_encoder_of(folder, model.card).to(where)
        templates = TEMPLATE_SETS[model.card.templates]  # words are asked for as the classes were trained
        looks = model.card.second_look if second_look is None else second_look
        card = read_model_card(folder)
        return cls(model=model, encoder=encoder, templates=templates, second_look=looks, card=card, **options)

    @property
    def locates(self) -> bool:
        """Whether the network is a pretext's transformer: it finds what examples show, and has no regions to name."""
        return bool(getattr(self.model, "locates", False))

    @property
    def threshold(self) -> float:
        """The checkpoint's default threshold."""
        return self.model.calibration.threshold

    def threshold_of(self, question: Question) -> float:
        """The default threshold of a question: of words, of examples, or the higher of both where both are asked."""
        calibration = self.model.calibration
        levels = [calibration.threshold] if question.words.positives else []
        levels += [calibration.example_threshold] if question.shown else []
        return max(levels)

    def level_of(self, question: Question, threshold: float | None) -> float:
        """The threshold that was given, or the default one of the question.

        Raises:
            UserError: outside [0, 1].
        """
        level = self.threshold_of(question) if threshold is None else float(threshold)
        if not 0.0 <= level <= 1.0:
            raise UserError(f"threshold must be between 0 and 1, not {threshold}")
        return level

    def question(
        self,
        classes: Vocabulary | str | Iterable[str] | None = None,
        examples: ExamplesLike | None = None,
        *,
        picture: NDArray[np.uint8] | None = None,
    ) -> Question:
        """Words and examples as one list of classes, for `Regions.classify`.

        Args:
            classes: words as for `set_classes`; None: those of `set_classes`, or with examples no words.
            examples: see `ovd.examples.parse_examples`.
            picture: (H, W, 3) uint8 RGB, what boxes among the examples lie on.

        Raises:
            UserError: neither a word nor an example to look for, or an example that cannot be used.
        """
        shown = parse_examples(examples, picture=picture) if examples is not None else ()
        if not any(not e.negative for e in shown):
            return Question(self.resolve(classes), shown)
        if classes is None or not isinstance(classes, Vocabulary):
            classes = Vocabulary.parse(classes or (), templates=self.templates, alone=False)
        return Question(classes, shown)

    def rows(self, question: Question, *, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """Embeddings of a question: (C, D) of all its words and (E, D) of all its examples, negative ones included.

        Raises:
            UserError: examples, but no image encoder.
        """
        words = self.text.embed(question.words).to(device)
        if not question.examples:
            return words, words[:0]
        return words, self.embed_examples(question.examples).to(device)

    def embed_examples(self, examples: Sequence[Example]) -> Tensor:
        """(E, D) unit rows of examples in the space of the regions.

        Raises:
            UserError: these weights have no image tower.
        """
        if self.examples is None:
            raise UserError(
                "these weights cannot search by example: their encoder has no image tower. Ask with words, or load "
                "a detector that was trained against an image-text encoder"
            )
        return self.examples.embed(examples)

    def resolve(self, vocabulary: Vocabulary | str | Iterable[str] | None) -> Vocabulary:
        """Return a `Vocabulary` for words in any form; the one of `set_classes` for None."""
        if vocabulary is None:
            if self.vocabulary is None:
                raise UserError('no classes yet: call set_classes(["mug", …]) or pass the words')
            return self.vocabulary
        if isinstance(vocabulary, Vocabulary):
            return vocabulary
        return Vocabulary.parse(vocabulary, templates=self.templates)

    def set_classes(self, classes: Vocabulary | str | Iterable[str]) -> Vocabulary:
        """Set the words `detect` looks for, and embed them.

        Args:
            classes: ``["dog", "mug: cup, coffee mug", "-poster"]``, a string in the same grammar, or a `Vocabulary`.

        Returns:
            The vocabulary, with ``notices`` about merged duplicates.
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
            found = self._cache.get(key)
            if found is None:
                with torch.inference_mode():
                    found = self.model.regions(pixels)
                    if self._second_encoder is not None:
                        found = look_again(found, pixels, self._second_encoder, count=self.second_look)
                self.runs += 1
                if self._cache_size:
                    self._cache[key] = found
                    while len(self._cache) > self._cache_size:
                        self._cache.popitem(last=False)
            else:
                self._cache.move_to_end(key)
        return Regions(regions=found, key=key, detector=self)

    def detect(self, image: ImageLike, threshold: float | None = None, **options: Any) -> Detections:
        """Find the classes of `set_classes` in a picture.

        Args:
            image: see `to_rgb`.
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
        **options: Any,
    ) -> Detections:
        """Find words, things shown by crops, or both in one picture.

        Args:
            image: see `to_rgb`.
            classes: words as for `set_classes`; None: those of `set_classes`, or with examples no words.
            examples: ``[crop, …]``, ``{"my mug": [crop, crop]}`` and more, see `ovd.examples.parse_examples`; a box
                of four numbers lies on ``image``.
            threshold: lowest score; the checkpoint's calibrated default when None.
            options: see `Regions.classify`.

        Raises:
            UserError: nothing to look for, or a picture or an example that cannot be used.
        """
        pixels = to_rgb(image)
        question = self.question(classes, examples, picture=pixels)  # first: a mistake should not cost a run
        return self.answer(pixels, question, threshold=threshold, **options)

    def answer(
        self, image: ImageLike, question: Question, *, threshold: float | None = None, **options: Any
    ) -> Detections:
        """What `find` does with a question that is ready: regions are named, or, by a transformer of the pretext, told.

        Args:
            image, threshold, options: see `find`.
            question: of `question`.
        """
        if not self.locates:
            return self.embed(image).classify(question, threshold=threshold, **options)
        return self._located(to_rgb(image), question, threshold, **options)

    @torch.inference_mode()
    def patches_of(self, examples: Sequence[Example]) -> Tensor:
        """(E, D) what queries of a pretext's transformer are told of examples: as its patches are embedded, several
        crops as their mean. Only where `locates`.

        Raises:
            UserError: these weights have no image tower.
        """
        model: Any = self.model
        if model.example_encoder is not None:
            shown = [[(crop.pixels, crop.corners) for crop in example.crops] for example in examples]
            return torch.stack([model.patch_rows(crops).mean(0) for crops in shown])
        return self.embed_examples(examples)

    @torch.inference_mode()
    def _located(
        self,
        pixels: NDArray[np.uint8],
        question: Question,
        threshold: float | None,
        *,
        limit: int = MAX_DETECTIONS,
        nms_iou: float = NMS_IOU,
        cross_class_iou: float | None = CROSS_CLASS_IOU,
    ) -> Detections:
        """What queries find that are told the examples; the score is how certain a query is.

        Raises:
            UserError: words or negative examples, which such a model does not know.
        """
        if question.words.classes or len(question.shown) < len(question.examples):
            raise UserError(
                "this transformer was pretrained on patches: it finds what examples show, and knows neither words nor "
                "things to leave out; ask with examples only, or train it on labels with model.variant=text"
            )
        level = self.level_of(question, threshold)
        model: Any = self.model
        with self._lock:
            boxes, score, owner = model.ask(pixels, self.patches_of(question.shown), at_once=model.patches)
            self.runs += 1
        class_id = torch.tensor(question.columns)[owner]
        best = torch.zeros(len(question.names)).scatter_reduce(0, class_id, score, "amax")
        region = torch.nonzero(score >= level)[:, 0]
        alone = _without_doubles(boxes[region].float(), score[region], class_id[region], nms_iou, cross_class_iou)
        keep = region[alone][:limit]
        ids = class_id[keep].numpy().astype(np.int64)
        return Detections(
            xyxy=boxes[keep].float().numpy(),
            confidence=score[keep].float().numpy(),
            class_id=ids,
            class_name=[question.names[i] for i in ids],
            size=(pixels.shape[0], pixels.shape[1]),
            names=question.names,
            best=best.numpy(),
            threshold=level,
            region=keep.numpy().astype(np.int64),
            notices=question.notices,
        )


def _image_tower(encoder: TextEncoder) -> RegionEncoder | None:
    """The encoder as an encoder of crops, or None where it knows texts only."""
    if not hasattr(encoder, "encode_image") or getattr(encoder, "visual", encoder) is None:
        return None
    return cast("RegionEncoder", encoder)


def _example_embedder(model: RegionFinder, image_encoder: RegionEncoder | None) -> ExampleEmbedder | None:
    """The image side of a detector: the model's own, or its encoder's, or None where there is neither."""
    own = getattr(model, "example_encoder", None) or image_encoder
    return None if own is None else ExampleEmbedder(encoder=own)


def _load_encoder_of(folder: Path, card: DetectorCard) -> JointEncoder:
    """Load the encoder a detector was trained against, and make sure that it is that one."""
    from pretrain.nets.encoders import load_encoder

    spec = card.encoder
    beside = [folder / "encoder", folder / spec, Path(spec)]
    if spec.startswith("open_clip:"):
        encoder = load_encoder(spec)
    elif file := next((p for p in (folder / spec, Path(spec)) if p.is_file()), None):
        encoder = load_encoder(file)
    elif found := next((p for p in beside if (p / "config.json").is_file()), None):
        encoder = load_encoder(found)
    else:
        encoder = load_encoder(weights_folder(spec))
    if encoder.fingerprint() != card.encoder_fingerprint:
        raise UserError(
            f"{folder}: trained against another text encoder than {spec!r} is now "
            f"({card.encoder_fingerprint[:12]}, found {encoder.fingerprint()[:12]}); words would mean nothing to it"
        )
    return encoder
