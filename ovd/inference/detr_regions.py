# SPDX-License-Identifier: Apache-2.0
"""Detection transformers for inference: with an open vocabulary, a closed list of classes, or of UP-DETR's pretext.

Shapes: Q queries, K boxes, R regions, C classes, D embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import box_convert, nms

from ovd.inference.arrays import Floats, as_array, unit_rows
from ovd.inference.rcnn_regions import InputSize
from ovd.inference.region_model import ConditionedBoxes, PatchLocator, RegionModel
from ovd.inference.scoring import Calibration, RegionSet
from ovd.modeling.detr.attention_mask import query_groups
from ovd.regions.crops import crop_regions
from pretrain.engine.errors import UserError

if TYPE_CHECKING:
    from ovd.modeling.detr.network import Detr
    from ovd.modeling.detr.structures import Memory
    from ovd.modeling.export import DetectorCard

OBJECTNESS_WEIGHT = 0.5  # exponents of word and objectness in a score: their geometric mean
PASSES_PER_BATCH = 8  # sets of classes that go through the decoder at once
CONDITIONED_NMS_IOU = 0.7  # IoU above which the boxes of two conditioned queries are one region
KNOWS_NO_WORDS = (
    "this transformer knows no words (it was pretrained on patches, or on a closed list of classes); "
    "train it with model.variant=text"
)


class DetrRegionModel(RegionModel):
    """Common to all transformers: proposals, and queries that are conditioned on embeddings.

    The network predicts objectness and embedding apart, so scores are the geometric mean of class and objectness.

    Args:
        model: in eval mode.
        card: its card.
        background_words: (B, D) embeddings.
        top: regions kept per picture.
    """

    objectness_weight = OBJECTNESS_WEIGHT

    def __init__(self, *, model: Detr, card: DetectorCard, background_words: Floats, top: int = 150) -> None:
        self.detr, self.card, self.top = model, card, top
        self.background_words = unit_rows(as_array(background_words))
        self.calibration = Calibration(**card.calibration)
        self.to_input = InputSize(card.short_side, card.long_side)
        head = card.model.get("head", {})
        self.patches, self.patch_size = int(head.get("patches", 1)), int(head.get("patch_size", 64))
        if not model.patch2query.unit:  # patches were embedded by the backbone, not by the image-text encoder
            self.example_encoder = PatchEncoder(model=model, side=self.patch_size)

    def regions(self, image: NDArray[np.uint8]) -> RegionSet:
        """Raise: only `OpenVocabularyDetr` has regions to classify."""
        raise UserError(KNOWS_NO_WORDS)

    def propose(self, image: NDArray[np.uint8], *, top: int) -> tuple[Floats, Floats]:
        """Boxes of the free queries; see `RegionModel.propose`."""
        boxes, objectness, _ = self.free_queries(image)
        order = objectness.argsort(descending=True)[:top]
        return as_array(boxes[order]), as_array(objectness[order])

    @torch.no_grad()
    def free_queries(self, image: NDArray[np.uint8]) -> tuple[Tensor, Tensor, Tensor]:
        """(Q, 4) boxes in pixels, (Q,) objectness and (Q, D) embeddings of all free queries, in their order."""
        output = self.detr.predict(self.memory(image))
        return in_pixels(output.boxes[0], image), output.logits[0].sigmoid(), output.embeddings[0]

    def conditioned_queries(
        self, image: NDArray[np.uint8], rows_CD: Floats, *, classes_per_pass: int
    ) -> ConditionedBoxes:
        """Search for words, crops or means of both with queries conditioned on their embeddings.

        Args:
            image: (H, W, 3) uint8 RGB.
            rows_CD: embeddings in the model's space.
            classes_per_pass: classes that share the queries; at most as many as queries. Training used
                ``model.conditioned``.
        """
        rows = torch.as_tensor(rows_CD)
        boxes, score, class_id = self.decode_conditioned(self.memory(image), rows, classes_per_pass)
        return ConditionedBoxes(as_array(in_pixels(boxes, image)), as_array(score), as_array(class_id))

    @torch.no_grad()
    def memory(self, image: NDArray[np.uint8]) -> Memory:
        """The transformer encoder's output for one picture."""
        return self.detr.memory([{"image": self.to_input(image)}])

    @torch.no_grad()
    def decode_conditioned(
        self, memory: Memory, rows_CD: Tensor, classes_per_pass: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes, scores and rows of `conditioned_queries`; boxes are centre boxes in [0, 1]."""
        count = min(classes_per_pass, self.detr.queries)
        passes = -(-len(rows_CD) // count)
        # The last pass repeats its first classes rather than giving each more queries than in training.
        row, last = torch.arange(passes * count), (passes - 1) * count
        row[last:] = last + torch.arange(count) % (len(rows_CD) - last)
        group = query_groups(self.detr.queries, count)
        boxes, scores = [], []
        for conditions in rows_CD[row].to(self.detr.device).unflatten(0, (passes, count)).split(PASSES_PER_BATCH):
            output = self.detr.predict(memory.repeated(len(conditions)), conditions_NMD=conditions)
            boxes.append(output.boxes)
            scores.append(output.logits.sigmoid())
        class_id = (torch.arange(passes)[:, None] * count + group).flatten().to(self.detr.device)
        valid = class_id < len(rows_CD)
        return torch.cat(boxes).flatten(0, 1)[valid], torch.cat(scores).flatten()[valid], class_id[valid]


class OpenVocabularyDetr(DetrRegionModel):
    """A transformer trained with text embeddings: its free queries are regions that any words can be compared with."""

    def regions(self, image: NDArray[np.uint8]) -> RegionSet:
        """The ``top`` free queries, best objectness first; see `RegionModel.regions`."""
        boxes, objectness, embedding = self.free_queries(image)
        order = objectness.argsort(descending=True)[: self.top]
        return region_set(boxes[order], objectness[order], embedding[order], image)

    def conditioned_regions(self, image: NDArray[np.uint8], rows_CD: Floats, *, classes_per_pass: int) -> RegionSet:
        """Regions that conditioned queries found, best score first.

        Scores of queries conditioned on different words are not comparable, so words only help to *find*: the region is
        embedded from what is inside its box, as for free queries. Without a region tower its embedding is the one that
        its query was conditioned on.

        Args:
            image, rows_CD, classes_per_pass: see `conditioned_queries`.

        Returns:
            at most as many regions as there are queries (and as ``top``), no two of which overlap by more than
            `CONDITIONED_NMS_IOU`.
        """
        memory, rows = self.memory(image), torch.as_tensor(rows_CD)
        centre_boxes, score, class_id = self.decode_conditioned(memory, rows, classes_per_pass)
        boxes = in_pixels(centre_boxes, image)
        keep = nms(boxes.float(), score, CONDITIONED_NMS_IOU)[: min(self.top, self.detr.queries)]
        if self.detr.region_tower is None:
            embedding = rows.to(boxes)[class_id[keep]]
        else:
            with torch.no_grad():
                embedding = self.detr.region_embeddings(memory, torch.zeros_like(keep), centre_boxes[keep])
        return region_set(boxes[keep], score[keep], F.normalize(embedding.float(), dim=1), image)


class ClosedSetDetr(DetrRegionModel):
    """A transformer with a closed list of classes."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Their names, in the order of the labels."""
        assert self.card is not None
        return self.card.classes

    @torch.no_grad()
    def labels(self, image: NDArray[np.uint8]) -> tuple[Floats, Floats, NDArray[np.int64]]:
        """(Q, 4) boxes in pixels, (Q,) scores and (Q,) best classes of the free queries."""
        output = self.detr.predict(self.memory(image))
        assert output.classes is not None  # a network with `class_embed`
        score, label = output.classes[0].softmax(-1)[:, :-1].max(-1)
        return as_array(in_pixels(output.boxes[0], image)), as_array(score), as_array(label)


class PretextDetr(DetrRegionModel, PatchLocator):
    """A transformer of UP-DETR's pretext."""

    def locate(self, image: NDArray[np.uint8], rows_CD: Floats) -> ConditionedBoxes:
        """Search with as many patches per pass as in pretraining; see `PatchLocator.locate`."""
        return self.conditioned_queries(image, rows_CD, classes_per_pass=self.patches)

    @torch.no_grad()
    def patch_rows(self, crops: Sequence[tuple[NDArray[np.uint8], Sequence[float]]]) -> Floats:
        """See `PatchLocator.patch_rows`."""
        if self.example_encoder is None:
            raise UserError("this transformer's patches live in the image-text encoder's space: embed crops with it")
        patches = [
            crop_regions(picture, np.array([box]), size=self.patch_size, scales=(1.0,))[0] for picture, box in crops
        ]
        return as_array(self.detr.pooled(torch.cat(patches).to(self.detr.device)))


class PatchEncoder:
    """The transformer's own image space as the encoder of a user's crops (`ovd.regions.cutting.CropEncoder`).

    Args:
        model: its backbone embeds.
        side: pixels.
    """

    def __init__(self, *, model: Detr, side: int) -> None:
        self.model, self.image_size, self.embed_dim = model, side, model.embed_dim
        mean = model.pixel_mean.flatten() / 255
        self.image_mean = (float(mean[0]), float(mean[1]), float(mean[2]))

    def prepare(self, images: Tensor) -> Tensor:
        """uint8 (N, 3, h, w) → float (N, 3, S, S), still in 0…255: the model normalises."""
        pixels = images.to(self.model.device).float()
        if pixels.shape[-2:] != (self.image_size, self.image_size):
            size = (self.image_size, self.image_size)
            pixels = F.interpolate(pixels, size, mode="bilinear", antialias=True).clamp(0, 255)
        return pixels

    def encode_image(self, pixels: Tensor) -> Tensor:
        """(N, 3, S, S) → (N, D)."""
        return self.model.pooled(pixels)

    @torch.inference_mode()
    def crop_rows(self, crops: NDArray[np.uint8]) -> Floats:
        """See `CropEncoder`."""
        return as_array(self.encode_image(self.prepare(torch.from_numpy(crops))))


def detr_region_model(
    model: Detr, *, card: DetectorCard, background_words: Floats, top: int = 150
) -> OpenVocabularyDetr | ClosedSetDetr | PretextDetr:
    """The class that fits what a transformer was trained for: words, a closed list, or neither; arguments as theirs."""
    kind: type[OpenVocabularyDetr | ClosedSetDetr | PretextDetr] = PretextDetr
    if model.classifier is not None:
        kind = OpenVocabularyDetr
    elif model.class_embed is not None:
        kind = ClosedSetDetr
    return kind(model=model, card=card, background_words=background_words, top=top)


def in_pixels(boxes: Tensor, image: NDArray[np.uint8]) -> Tensor:
    """Centre boxes (K, 4) in [0, 1] → corners in pixels of the picture, inside it."""
    height, width = image.shape[:2]
    return box_convert(boxes, "cxcywh", "xyxy").clamp(0, 1) * boxes.new_tensor([width, height, width, height])


def region_set(boxes: Tensor, objectness: Tensor, embedding: Tensor, image: NDArray[np.uint8]) -> RegionSet:
    """Regions of one head without masks."""
    return RegionSet(
        boxes=as_array(boxes),
        objectness=as_array(objectness),
        text=as_array(embedding),
        image=None,
        masks=None,
        size=(image.shape[0], image.shape[1]),
    )
