# SPDX-License-Identifier: Apache-2.0
"""A dense detector in Detectron2's parts: a backbone, a class-agnostic proposal generator, and the network of both.

Registered under Detectron2's names, so that its own configuration builds them too: ``MODEL.BACKBONE.NAME:
picodet_backbone`` or ``nanodet_backbone``, ``MODEL.PROPOSAL_GENERATOR.NAME: DenseProposals``,
``MODEL.META_ARCHITECTURE: ProposalDetector``.

Each level has two heads. The detector's own is frozen and scores its 80 words. The class-agnostic head starts as its
copy and predicts boxes, *objectness* and *quality*. Objectness starts at the best word's logit, so that an untrained
network ranks boxes as the detector does, and learns from objects and background. Quality is the box's IoU and learns
from objects alone. On another backbone (`ovd.modeling.proposals.pyramid`) there is only the class-agnostic head, which
starts at random.

Shapes: ``N`` pictures, ``A`` cells, ``K`` known words, ``P`` proposals of one picture.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import BACKBONE_REGISTRY, Backbone
from detectron2.modeling.meta_arch import META_ARCH_REGISTRY, ProposalNetwork
from detectron2.modeling.proposal_generator.build import PROPOSAL_GENERATOR_REGISTRY
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import nms

from ovd.data.samples import LabelledSample
from ovd.modeling.proposals.architecture import (
    ARCHITECTURES,
    PIXEL_MEAN,
    PIXEL_STD,
    STEP,
    Architecture,
    Head,
    adopt_trunk,
)
from ovd.modeling.proposals.assign import BoxLosses, PredictedBoxes, assign, class_agnostic_losses
from ovd.modeling.proposals.cells import cell_centres, decode, flat, gather
from pretrain.engine.distributed import shares
from pretrain.engine.state import load_tensors

Ranking = Literal["words", "objectness", "quality", "both"]
PRIOR = 0.01
"""Initial probability of an object, or of a class, in heads that start at random (arXiv:1708.02002, section 4.1)."""
BOX_WEIGHT, SIDES_WEIGHT = 2.0, 0.25
"""Of the box's GIoU and of the sides' distributions (arXiv:2006.04388, section 4)."""


class DenseBackbone(Backbone):
    """Backbone and neck of a dense detector: normalised RGB (N, 3, H, W) to its levels, from ``p3``."""

    size_divisibility = STEP

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = architecture
        self._trunk = adopt_trunk(self, architecture)

    @property
    def trunk(self) -> nn.Module:
        """Pixels to the list of maps."""
        return self._trunk[0]

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        dtype = next(self.trunk.parameters()).dtype  # an export for a CPU is bfloat16
        maps = self.trunk(pixels.to(dtype, memory_format=torch.channels_last))
        return dict(zip(self.architecture.levels, maps, strict=True))

    def freeze(self) -> None:
        """Train none of it."""
        self.requires_grad_(False)

    def output_shape(self) -> dict[str, ShapeSpec]:
        return level_shapes(self.architecture)


def level_shapes(architecture: Architecture) -> dict[str, ShapeSpec]:
    """Channels and stride of each map, by its name."""
    levels = zip(architecture.levels, architecture.strides, strict=True)
    return {name: ShapeSpec(channels=architecture.channels, stride=stride) for name, stride in levels}


@BACKBONE_REGISTRY.register()
def nanodet_backbone(cfg: Any, input_shape: ShapeSpec) -> DenseBackbone:
    """For Detectron2's own configuration; nothing in it changes the network."""
    return DenseBackbone(ARCHITECTURES["nanodet"])


@BACKBONE_REGISTRY.register()
def picodet_backbone(cfg: Any, input_shape: ShapeSpec) -> DenseBackbone:
    """For Detectron2's own configuration; nothing in it changes the network."""
    return DenseBackbone(ARCHITECTURES["picodet"])


class ClassAgnosticHead(nn.Module):
    """(N, C, h, w) to objectness (added to the best word's logit), quality and sides: (N, 1 + 1 + 4·bins, h, w).

    Args:
        architecture: whose hidden layers it has.
        prior: initial probability of an object, where there are no words.
    """

    def __init__(self, architecture: Architecture, *, prior: float | None = None) -> None:
        super().__init__()
        self.hidden = architecture.hidden()
        self.scores = nn.Conv2d(architecture.channels, 2, 1)
        self.sides = nn.Conv2d(architecture.channels, 4 * architecture.bins, 1)
        nn.init.zeros_(self.scores.weight)
        assert self.scores.bias is not None
        nn.init.zeros_(self.scores.bias)
        if prior is not None:
            nn.init.constant_(self.scores.bias[:1], math.log(prior / (1 - prior)))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.hidden(x)
        return torch.cat([self.scores(hidden), self.sides(hidden)], dim=1)

    @torch.no_grad()
    def init_from(self, head: Head) -> None:
        """Copy boxes and objectness of the head with words."""
        self.hidden.load_state_dict(head.hidden.state_dict())
        weight, bias = head.side_rows()
        assert self.sides.bias is not None
        self.sides.weight.copy_(weight)
        self.sides.bias.copy_(bias)


class DensePredictions(NamedTuple):
    """Predictions for all cells: of a batch, with ``N`` pictures in front, or of one picture.

    Attributes:
        objectness: (N, A) logits.
        quality: (N, A) logits.
        words: (N, A, K) logits of the known words.
        sides: (N, A, 4, bins) logits of the distances to the box's sides.
        centres: (A, 2) x and y of the cells' centres, in pixels.
        strides: (A,) of the cells, in pixels.
    """

    objectness: Tensor
    quality: Tensor
    words: Tensor
    sides: Tensor
    centres: Tensor
    strides: Tensor

    def of_picture(self, n: int) -> DensePredictions:
        """Those of one picture of the batch."""
        return self._replace(
            objectness=self.objectness[n], quality=self.quality[n], words=self.words[n], sides=self.sides[n]
        )

    def boxes(self, cells: Tensor | None = None) -> Tensor:
        """Boxes x1, y1, x2, y2 in pixels: (N, A, 4) of all cells, or (P, 4) of the (P,) ``cells`` of one picture."""
        if cells is None:
            return decode(self.sides, self.centres, self.strides)
        return decode(self.sides[cells], self.centres[cells], self.strides[cells])


@PROPOSAL_GENERATOR_REGISTRY.register()
class DenseProposals(nn.Module):
    """Boxes of all cells, the best ones kept by non-maximum suppression.

    Args:
        architecture: of the heads.
        ranking: what orders the boxes: the best known word (the detector as it is, with its boxes; class-agnostic heads
            do not run), objectness, quality, or the geometric mean of the latter two.
        nms: IoU above which the lesser of two boxes goes.
        pre_nms: best boxes of a picture that enter NMS.
        post_nms: boxes kept of a picture.
        known: whether there are frozen heads that score K words; without them there is no ranking by words.
    """

    @configurable
    def __init__(
        self,
        *,
        architecture: Architecture,
        ranking: Ranking = "words",
        nms: float = 0.6,
        pre_nms: int = 1000,
        post_nms: int = 100,
        known: bool = True,
    ) -> None:
        super().__init__()
        self.architecture, self.ranking, self.nms = architecture, ranking, nms
        self.pre_nms, self.post_nms = pre_nms, post_nms
        levels = architecture.levels
        self.heads = nn.ModuleList([architecture.known_head() for _ in levels] if known else [])
        prior = None if known else PRIOR
        # "nameless" in checkpoints
        self.nameless = nn.ModuleList([ClassAgnosticHead(architecture, prior=prior) for _ in levels])

    @classmethod
    def from_config(cls, cfg: Any, input_shape: Mapping[str, ShapeSpec]) -> dict[str, Any]:
        """Detectron2's configuration, ``MODEL.RPN``; the heads are those of the backbone's architecture."""
        rpn = cfg.MODEL.RPN
        return {
            "architecture": _architecture_of(input_shape),
            "nms": rpn.NMS_THRESH,
            "pre_nms": rpn.PRE_NMS_TOPK_TEST,
            "post_nms": rpn.POST_NMS_TOPK_TEST,
        }

    def forward(
        self, images: ImageList, features: Mapping[str, Tensor], gt_instances: list[Instances] | None = None
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """(proposals, losses): proposals in eval mode only, losses in training only.

        Proposals have ``proposal_boxes``, ``objectness_logits`` (of the ranking's score, best first), ``quality`` (P,)
        and ``words`` (P, K), both 0…1. ``gt_instances`` have ``gt_boxes`` and, where something is neither object nor
        background, ``gt_classes`` of -1 there.
        """
        maps = [features[name] for name in self.architecture.levels]
        predictions = self.predict(maps, size=images.tensor.shape[-2:])
        if self.training:
            if gt_instances is None:
                raise ValueError("training needs gt_instances")
            return [], self.losses(predictions, images.image_sizes, gt_instances)
        return [self.select(predictions.of_picture(n), size) for n, size in enumerate(images.image_sizes)], {}

    def predict(self, maps: Sequence[Tensor], *, size: Sequence[int]) -> DensePredictions:
        """Run the heads on the (N, C, h, w) maps of a batch whose padded pictures have this (height, width)."""
        height, width = size
        centres, strides = cell_centres(height, width, self.architecture.strides, device=maps[0].device)
        words, word_sides = maps[0].new_zeros(len(maps[0]), len(centres), 0).float(), None
        if self.heads:
            with torch.no_grad():
                words, word_sides = gather(self.heads, maps)
            words = words.float()
        if self.ranking == "words" and not self.training and word_sides is not None:
            # These scores were trained to be the IoU of the same head's boxes, so the best one is also the quality.
            best = words.amax(dim=2)
            return DensePredictions(best, best, words, word_sides, centres, strides)
        outputs = torch.cat([flat(head(x)) for head, x in zip(self.nameless, maps, strict=True)], dim=1).float()
        objectness, quality, sides = outputs[..., 0], outputs[..., 1], outputs[..., 2:].unflatten(2, (4, -1))
        if self.heads:
            objectness = words.amax(dim=2) + objectness
        return DensePredictions(objectness, quality, words, sides, centres, strides)

    def losses(
        self, predictions: DensePredictions, sizes: Sequence[tuple[int, int]], gt_instances: Sequence[Instances]
    ) -> dict[str, Tensor]:
        """Each loss of the batch, divided by the weight or number of its positives over all processes.

        Args:
            predictions: of the batch.
            sizes: (height, width) of each picture without its padding.
            gt_instances: see `forward`.
        """
        boxes = predictions.boxes()
        sums = []
        for n, (truth, (height, width)) in enumerate(zip(gt_instances, sizes, strict=True)):
            labelled = truth.gt_classes >= 0
            objects, ignored = truth.gt_boxes.tensor[labelled], truth.gt_boxes.tensor[~labelled]
            one = predictions.of_picture(n)
            assignment = assign(boxes[n], one.objectness.sigmoid(), one.centres, objects, ignored)
            inside = (one.centres[:, 0] < width) & (one.centres[:, 1] < height)  # padding is no background
            sums.append(
                class_agnostic_losses(
                    objectness=one.objectness,
                    quality=one.quality,
                    predicted=PredictedBoxes(boxes[n], one.sides, one.centres, one.strides),
                    objects=objects,
                    assignment=assignment._replace(valid=assignment.valid & inside),
                )
            )
        total = BoxLosses(*(torch.stack(values).sum() for values in zip(*sums, strict=True)))
        weight, positives = total.weight.clamp_min(1.0), total.positives.clamp_min(1.0)
        by_weight, by_positives = shares([float(weight), float(positives)])
        return {
            "loss_objectness": by_weight * total.objectness / weight,
            "loss_box": by_weight * BOX_WEIGHT * total.box / weight,
            "loss_sides": by_weight * SIDES_WEIGHT * total.sides / weight,
            "loss_quality": by_positives * total.quality / positives,
        }

    def select(self, predictions: DensePredictions, size: tuple[int, int]) -> Instances:
        """The best boxes of one picture of (height, width) ``size``; only theirs are decoded."""
        score, quality = predictions.objectness.sigmoid(), predictions.quality.sigmoid()
        if self.ranking == "quality":
            score = quality
        elif self.ranking == "both":
            score = (score * quality).sqrt()
        score = score.nan_to_num(0.0)
        top = score.topk(min(self.pre_nms, len(score))).indices
        clipped = Boxes(predictions.boxes(top).nan_to_num(0.0))
        clipped.clip(size)
        nonempty = clipped.nonempty(threshold=1.0)
        top, candidates = top[nonempty], clipped[nonempty]
        best = nms(candidates.tensor, score[top], self.nms)[: self.post_nms]
        top = top[best]
        proposals = Instances(size)
        proposals.proposal_boxes = candidates[best]
        proposals.objectness_logits = score[top].logit(eps=1e-6)
        proposals.quality = quality[top]
        proposals.words = predictions.words[top].sigmoid()
        return proposals


@META_ARCH_REGISTRY.register()
class ProposalDetector(ProposalNetwork):
    """Detectron2's network of a backbone and a proposal generator, on pictures padded with black as NanoDet's were.

    ``canvas``: in training every picture is padded to this (height, width), so that all batches have one shape: each
    new one costs seconds of planning on a CPU.
    """

    canvas: tuple[int, int] | None = None

    def forward(self, batched_inputs: Sequence[LabelledSample]) -> Any:
        """In training the dict of losses; in eval mode the proposals (:class:`Instances`) of each input."""
        images = self.preprocess(batched_inputs)
        features = self.backbone(images.tensor)
        truth = [x["instances"].to(self.device) for x in batched_inputs] if self.training else None
        proposals, losses = self.proposal_generator(images, features, truth)
        return losses if self.training else proposals

    def preprocess(self, batched_inputs: Sequence[LabelledSample]) -> ImageList:
        """RGB 0…255 at the top left, black below and right, then normalised."""
        pixels = [x["image"].to(self.device) for x in batched_inputs]
        sizes = [(p.shape[-2], p.shape[-1]) for p in pixels]
        step = self.backbone.size_divisibility
        height, width = (-(-max(side) // step) * step for side in zip(*sizes, strict=True))
        if self.training and self.canvas is not None:
            height, width = max(height, self.canvas[0]), max(width, self.canvas[1])
        padded = [F.pad(p, (0, width - p.shape[-1], 0, height - p.shape[-2])) for p in pixels]
        batch = torch.stack(padded).float()
        return ImageList((batch - self.pixel_mean) / self.pixel_std, sizes)


def _architecture_of(levels: Mapping[str, ShapeSpec]) -> Architecture:
    """The architecture whose backbone has these levels."""
    for architecture in ARCHITECTURES.values():
        if level_shapes(architecture) == dict(levels):
            return architecture
    raise ValueError(f"no dense detector has the levels {dict(levels)}")


def build_proposal_detector(
    *,
    ranking: Ranking,
    nms: float,
    pre_nms: int,
    post_nms: int,
    architecture: Architecture = ARCHITECTURES["nanodet"],
    backbone: Backbone | None = None,
    pixel_mean: tuple[float, ...] = PIXEL_MEAN,
    pixel_std: tuple[float, ...] = PIXEL_STD,
) -> ProposalDetector:
    """The network with random weights.

    Args:
        ranking, nms, pre_nms, post_nms: of `DenseProposals`.
        architecture: of backbone and heads.
        backbone: another, with ``freeze()`` and maps like the architecture's; there are no heads that score words.
        pixel_mean, pixel_std: of RGB, 0…255.
    """
    return ProposalDetector(
        backbone=backbone or DenseBackbone(architecture),
        proposal_generator=DenseProposals(
            architecture=architecture,
            ranking=ranking,
            nms=nms,
            pre_nms=pre_nms,
            post_nms=post_nms,
            known=backbone is None,
        ),
        pixel_mean=pixel_mean,
        pixel_std=pixel_std,
    )


def init_from_converted(model: ProposalDetector, tensors: Mapping[str, Tensor], *, source: str = "tensors") -> None:
    """Load what a converter of ``scripts/`` wrote; the class-agnostic heads start as copies.

    Args:
        model: to be started.
        tensors: of the file: ``backbone.``, ``neck.`` and ``heads.``.
        source: for messages.

    Raises:
        UserError: names or shapes that do not fit.
    """
    backbone, neck = model.backbone.trunk.children()
    modules: dict[str, nn.Module] = {
        "backbone.": backbone,
        "neck.": neck,
        "heads.": model.proposal_generator.heads,
    }
    for prefix, module in modules.items():
        part = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        load_tensors(module, part, source=source)
    generator = model.proposal_generator
    for class_agnostic, head in zip(generator.nameless, generator.heads, strict=True):
        class_agnostic.init_from(head)
