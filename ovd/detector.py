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
import re
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import batched_nms

from ovd.examples import ExampleEmbedder, Question, parse_examples
from ovd.modeling.scoring import Calibration, RegionSet, score_examples, score_regions
from ovd.modeling.second_look import look_again
from ovd.text import TextEmbedder, TextEncoder
from ovd.vocabulary import TEMPLATE_SETS, TEMPLATES_STICKER, Vocabulary
from pretrain.data.folder import MAX_PIXELS, read_image
from pretrain.engine.errors import UserError
from pretrain.engine.files import read_json, sha256_of

if TYPE_CHECKING:
    from supervision import Detections as SupervisionDetections

    from ovd.examples import ExamplesLike
    from ovd.modeling.build import DetectorCard
    from ovd.regions.crops import RegionEncoder
    from pretrain.nets.towers import JointEncoder

    ImageLike = str | Path | bytes | bytearray | memoryview | Image.Image | NDArray[Any]

# Class-aware NMS. Detectron2 and ViLD take .5, which AP rewards and leaves a box and its half side by side on the page:
# of the shown boxes .59 are right with .3 and .52 with .5 (80 validation scenes of seed 3000).
NMS_IOU = 0.3
CROSS_CLASS_IOU = 0.85  # two classes on (nearly) the same box are two names for one thing: the better one is shown
MAX_DETECTIONS = 300  # LVIS protocol
MASK_THRESHOLD = 0.5


class RegionModel(Protocol):
    """What the detector needs of a network; `ovd.modeling.build.load_detector_model` returns one.

    A network whose regions live in another image space than its text encoder's (a DETR pretrained on patches) also has
    ``example_encoder``, a `ovd.regions.crops.RegionEncoder` into that space; examples are then embedded with it.
    """

    background: Tensor | None
    bank: Tensor
    calibration: Calibration

    def regions(self, image: NDArray[np.uint8]) -> RegionSet:
        """Return the regions of a uint8 (H, W, 3) RGB picture, embedded and in original pixels."""


def paste_mask(mask_MM: Tensor, box: Tensor, size: tuple[int, int], *, threshold: float = MASK_THRESHOLD) -> Tensor:
    """Draw one mask from the frame of its box onto the picture.

    Bilinear, with cell centres at (i + ½) / M of the box; a pixel is set when the value at its centre is at least
    ``threshold`` and its centre is inside the box.

    Args:
        mask_MM: (M, M) probabilities.
        box: (4,) x1, y1, x2, y2 in pixels.
        size: (height, width) of the picture.
        threshold: in (0, 1).

    Returns:
        (height, width) bool.
    """
    height, width = size
    canvas = torch.zeros(height, width, dtype=torch.bool)
    x1, y1, x2, y2 = (float(v) for v in box)
    if not (x2 > x1 and y2 > y1):
        return canvas
    # First and last pixel whose centre (index + ½) lies in the box.
    left, right = max(0, int(np.ceil(x1 - 0.5))), min(width, int(np.floor(x2 - 0.5)) + 1)
    top, bottom = max(0, int(np.ceil(y1 - 0.5))), min(height, int(np.floor(y2 - 0.5)) + 1)
    if left >= right or top >= bottom:
        return canvas
    u = (torch.arange(left, right, dtype=torch.float32) + 0.5 - x1) / (x2 - x1) * 2 - 1
    v = (torch.arange(top, bottom, dtype=torch.float32) + 0.5 - y1) / (y2 - y1) * 2 - 1
    grid = torch.stack([u.expand(len(v), -1), v[:, None].expand(-1, len(u))], dim=-1)
    # Border padding: the outer half cell belongs to the mask, it must not fade to zero inside the box.
    values = F.grid_sample(mask_MM[None, None].float(), grid[None], align_corners=False, padding_mode="border")[0, 0]
    canvas[top:bottom, left:right] = values >= threshold
    return canvas


def to_rgb(image: ImageLike, *, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """Read any picture into an upright (H, W, 3) uint8 RGB array.

    Args:
        image: path, encoded bytes, Pillow image, or array: (H, W) grey, (H, W, 3) RGB or (H, W, 4) RGBA, uint8.
        max_pixels: larger pictures are refused before they are decoded.

    Raises:
        UserError: unsupported type, shape, format, size, or a damaged file (`BadImageError` for files).
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8:
            raise UserError(f"picture arrays must be uint8, 0 to 255, not {image.dtype}")
        if image.ndim == 2:
            image = np.repeat(image[:, :, None], 3, axis=2)
        if image.ndim != 3 or image.shape[2] not in (3, 4) or 0 in image.shape:
            raise UserError(f"picture arrays must be (H, W), (H, W, 3) or (H, W, 4), not {image.shape}")
        if image.shape[0] * image.shape[1] > max_pixels:
            raise UserError(f"picture has {image.shape[1]}×{image.shape[0]} pixels; at most {max_pixels:,} are allowed")
        if image.shape[2] == 4:
            alpha = image[:, :, 3:].astype(np.uint16)
            image = ((image[:, :, :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
        return np.ascontiguousarray(image)
    if isinstance(image, (str, Path)):
        return read_image(Path(image), max_pixels=max_pixels)
    if isinstance(image, (bytes, bytearray, memoryview)):
        return read_image(bytes(image), max_pixels=max_pixels)
    if isinstance(image, Image.Image):
        if image.width * image.height > max_pixels:
            raise UserError(f"picture has {image.width}×{image.height} pixels; at most {max_pixels:,} are allowed")
        if image.mode[0] in "IF":
            raise UserError(f"pictures of mode {image.mode} have no fixed white: convert to 8 bits first")
        upright = ImageOps.exif_transpose(image)
        transparent = upright.has_transparency_data
        return to_rgb(np.array(upright.convert("RGBA" if transparent else "RGB")), max_pixels=max_pixels)
    raise UserError(f"a picture must be a path, bytes, a Pillow image or an array, not {type(image).__name__}")


@dataclass(kw_only=True)
class Detections:
    """What was found in one picture, best score first.

    Attributes:
        xyxy: (n, 4) float32 corners in pixels of the original picture.
        confidence: (n,) float32 in [0, 1].
        class_id: (n,) int64, index into ``names``.
        class_name: n names.
        size: (height, width) of the picture.
        names: the C classes asked for.
        best: (C,) float32, best score of each class over all regions, shown or not.
        threshold: the score from which detections are listed.
        region: (n,) int64, index of the region in `Regions`.
        box_masks: (n, M, M) float32 mask probabilities in the frame of each box, or None.
        notices: what parsing the class names changed.
    """

    xyxy: NDArray[np.float32]
    confidence: NDArray[np.float32]
    class_id: NDArray[np.int64]
    class_name: list[str]
    size: tuple[int, int]
    names: tuple[str, ...]
    best: NDArray[np.float32]
    threshold: float
    region: NDArray[np.int64]
    box_masks: Tensor | None = None
    notices: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.confidence)

    def mask_of(self, index: int) -> NDArray[np.bool_] | None:
        """The (H, W) bool mask of one detection, or None when the model has no masks."""
        if self.box_masks is None:
            return None
        return paste_mask(self.box_masks[index], torch.from_numpy(self.xyxy[index]), self.size).numpy()

    @property
    def mask(self) -> NDArray[np.bool_] | None:
        """(n, H, W) bool masks, drawn when asked for: n × H × W bytes. `mask_of` draws one at a time."""
        if self.box_masks is None:
            return None
        masks = np.zeros((len(self), *self.size), dtype=bool)
        for i in range(len(self)):
            masks[i] = self.mask_of(i)
        return masks

    @property
    def not_found(self) -> list[tuple[str, float]]:
        """(class, best score) of every class without a detection at the threshold, in the order typed."""
        found = set(self.class_id.tolist())
        return [(name, float(self.best[i])) for i, name in enumerate(self.names) if i not in found]

    def above(self, threshold: float) -> Detections:
        """The detections with at least this score; equals asking again with a higher threshold."""
        keep = np.flatnonzero(self.confidence >= threshold)
        return Detections(
            xyxy=self.xyxy[keep],
            confidence=self.confidence[keep],
            class_id=self.class_id[keep],
            class_name=[self.class_name[i] for i in keep],
            size=self.size,
            names=self.names,
            best=self.best,
            threshold=max(threshold, self.threshold),
            region=self.region[keep],
            box_masks=None if self.box_masks is None else self.box_masks[torch.from_numpy(keep)],
            notices=self.notices,
        )

    def to_supervision(self) -> SupervisionDetections:
        """Convert to `supervision.Detections`, with ``data["class_name"]``.

        Raises:
            UserError: the package is not installed.
        """
        try:
            from supervision import Detections as Target
        except ImportError as problem:
            raise UserError("to_supervision needs the package: pip install supervision") from problem
        return Target(
            xyxy=self.xyxy.copy(),
            mask=self.mask,
            confidence=self.confidence.copy(),
            class_id=self.class_id.astype(int),
            data={"class_name": np.array(self.class_name, dtype=object if not self.class_name else None)},
        )

    def to_coco(
        self, image_id: int, *, category_ids: Sequence[int] | None = None, masks: bool = True
    ) -> list[dict[str, Any]]:
        """Return rows of a COCO results file.

        Args:
            image_id: id of the picture.
            category_ids: id of each class; ``class_id`` + 1 when None.
            masks: add ``segmentation`` as compressed RLE.
        """
        rows = []
        for i in range(len(self)):
            x1, y1, x2, y2 = (float(v) for v in self.xyxy[i])
            class_id = int(self.class_id[i])
            row: dict[str, Any] = {
                "image_id": int(image_id),
                "category_id": class_id + 1 if category_ids is None else int(category_ids[class_id]),
                "bbox": [round(v, 2) for v in (x1, y1, x2 - x1, y2 - y1)],
                "score": round(float(self.confidence[i]), 5),
            }
            if masks and (mask := self.mask_of(i)) is not None:
                row["segmentation"] = _rle(mask)
            rows.append(row)
        return rows

    def polygons(self, index: int, *, side: int = 112) -> list[list[float]]:
        """Outline of one mask as closed polygons [x1, y1, x2, y2, …] in pixels, for drawing; [] without masks.

        Args:
            index: which detection.
            side: resolution at which the outline is followed, in cells over the box.
        """
        if self.box_masks is None:
            return []
        import cv2

        x1, y1, x2, y2 = (float(v) for v in self.xyxy[index])
        fine = F.interpolate(self.box_masks[index][None, None].float(), size=(side, side), mode="bilinear")[0, 0]
        binary = np.pad((fine >= MASK_THRESHOLD).numpy().astype(np.uint8), 1)
        contours, _ = cv2.findContours(binary, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
        result = []
        for contour in contours:
            if cv2.contourArea(contour) < 0.004 * side * side:  # crumbs below half a per cent of the box
                continue
            points = cv2.approxPolyDP(contour, 0.6, True)[:, 0].astype(np.float64)
            if len(points) < 3:
                continue
            points = (points - 1 + 0.5) / side * (x2 - x1, y2 - y1) + (x1, y1)
            result.append([round(float(v), 1) for v in points.reshape(-1)])
        return result


def _rle(mask: NDArray[np.bool_]) -> dict[str, Any]:
    from pycocotools import mask as coco_mask

    rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": [int(v) for v in rle["size"]], "counts": rle["counts"].decode("ascii")}


@dataclass(kw_only=True)
class Regions:
    """One picture after the network: boxes and embeddings, ready for any words.

    Attributes:
        regions: boxes, objectness, embeddings and masks, see `RegionSet`.
        key: sha256 of the pixels.
        default: the words and thresholds to use when `classify` is called without words.
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
        level = self.detector.threshold_of(asked) if threshold is None else float(threshold)
        if not 0.0 <= level <= 1.0:
            raise UserError(f"threshold must be between 0 and 1, not {threshold}")
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
        keep = batched_nms(boxes, score, class_id, nms_iou)
        if cross_class_iou is not None and len(keep) > 1:
            keep = keep[_distinct(boxes[keep], cross_class_iou)]
        keep = keep[:limit]
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
            first (`ovd.modeling.second_look`); 0: none. About 1.4 milliseconds each with the shipped encoder on two
            CPU cores.
        card: what is known of the weights (name, sha256, data, AP …).

    Raises:
        UserError: a second look, but an encoder without an image tower.
    """

    def __init__(
        self,
        *,
        model: RegionModel,
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
        if second_look and image_encoder is None:
            raise UserError("a second look needs an encoder with an image tower; this one knows texts only (0: none)")
        self.examples = _example_embedder(model, image_encoder)
        self.second_look = second_look
        self._image_encoder = image_encoder
        self.templates = tuple(templates)
        self.card = dict(card or {})
        self.vocabulary: Vocabulary | None = None
        self.runs = 0  # pictures that went through the network
        self._cache_size = cache_size
        self._cache: OrderedDict[str, RegionSet] = OrderedDict()
        self._lock = threading.RLock()

    @classmethod
    def load(
        cls, weights: str | Path = "default", *, device: str = "auto", second_look: int | None = None, **options: Any
    ) -> Detector:
        """Load a trained detector.

        Args:
            weights: name in ``weights/manifest.json`` ("default") or a folder written by ``python -m ovd.train``.
            device: "auto", "cpu", "cuda" or "cuda:N".
            second_look: see the constructor; None: as many regions as the scores were calibrated for.
            options: ``cache_size``, ``text_cache`` of the constructor.

        Raises:
            UserError: unknown name, missing or damaged files.
        """
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            where = torch.device(device)
        except RuntimeError as problem:
            raise UserError(f"unknown device {device!r}; use auto, cpu, cuda or cuda:0") from problem
        if where.type == "cuda" and not torch.cuda.is_available():
            raise UserError(f"device {device!r} asked for, but torch finds no CUDA; use device cpu or auto")
        folder = find_weights(weights)
        from ovd.modeling.build import load_detector_model  # Detectron2: slow, and not needed to say "no such weights"

        model = load_detector_model(folder, device=str(where))
        encoder = _load_encoder_of(folder, model.card).to(where)
        templates = TEMPLATE_SETS[model.card.templates]  # words are asked for as the classes were trained
        looks = model.card.second_look if second_look is None else second_look
        card = read_model_card(folder)
        return cls(model=model, encoder=encoder, templates=templates, second_look=looks, card=card, **options)

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
        if self.examples is None:
            raise UserError(
                "these weights cannot search by example: their encoder has no image tower. Ask with words, or load "
                "a detector that was trained against an image-text encoder"
            )
        return words, self.examples.embed(question.examples).to(device)

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
        key = hashlib.sha256(f"{pixels.shape}".encode() + pixels.tobytes()).hexdigest()
        with self._lock:
            found = self._cache.get(key)
            if found is None:
                with torch.inference_mode():
                    found = self.model.regions(pixels)
                    if self.second_look and self._image_encoder is not None:
                        found = look_again(found, pixels, self._image_encoder, count=self.second_look)
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
        return self.embed(pixels).classify(question, threshold=threshold, **options)


def _image_tower(encoder: TextEncoder) -> RegionEncoder | None:
    """The encoder as an encoder of crops, or None where it knows texts only."""
    if not hasattr(encoder, "encode_image") or getattr(encoder, "visual", encoder) is None:
        return None
    return cast("RegionEncoder", encoder)


def _example_embedder(model: RegionModel, image_encoder: RegionEncoder | None) -> ExampleEmbedder | None:
    """The image side of a detector: the model's own, or its encoder's, or None where there is neither."""
    own = getattr(model, "example_encoder", None) or image_encoder
    return None if own is None else ExampleEmbedder(encoder=own)


_PURPOSE = re.compile(r"\*\*What it is for\.\*\*\s*(.+?)(?:\n\s*\n|\Z)", re.DOTALL)  # paragraph of a card.md


def find_weights(weights: str | Path) -> Path:
    """Return the folder of a detector given by path or by its name in ``weights/manifest.json``.

    Raises:
        UserError: no such folder or name, or files that do not have the hash of the manifest.
    """
    from ovd.weights import weights_folder

    folder = Path(weights)
    if folder.is_dir():
        exported = folder / "exported"  # the folder of a whole run was given
        return exported if (exported / "model.json").is_file() and not (folder / "model.json").exists() else folder
    if isinstance(weights, Path) or "/" in str(weights):
        raise UserError(f"no detector at {weights}: give a folder written by ovd.train, or the name of shipped weights")
    return weights_folder(str(weights))


def _load_encoder_of(folder: Path, card: DetectorCard) -> JointEncoder:
    """Load the encoder a detector was trained against, and make sure that it is that one."""
    from ovd.weights import weights_folder
    from pretrain.nets.towers import load_encoder

    spec = card.encoder
    beside = [folder / "encoder", folder / spec, Path(spec)]
    if spec.startswith("open_clip:"):
        encoder = load_encoder(spec)
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


def read_model_card(folder: Path) -> dict[str, Any]:
    """Return what is known of a detector.

    ``name``, ``sha256`` of its weights file, ``text`` (its ``card.md``) and the keys of its ``card.json`` (``data``,
    ``metrics``, ``purpose``), where there are such files.
    """
    card: dict[str, Any] = {"name": folder.name}
    file = folder / "card.json"
    if file.is_file():
        stored = read_json(file)
        if not isinstance(stored, dict):
            raise UserError(f"{file}: must hold one JSON object")
        card.update(stored)
    text = folder / "card.md"
    if text.is_file():
        card["text"] = text.read_text(encoding="utf-8")
        if "purpose" not in card and (said := _PURPOSE.search(card["text"])):
            card["purpose"] = " ".join(said.group(1).split())
    card["sha256"] = sha256_of(folder / "model.safetensors")
    return card
