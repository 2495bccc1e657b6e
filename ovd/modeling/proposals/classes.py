# SPDX-License-Identifier: Apache-2.0
"""A branch for fine-tuned classes: the dense detector again, with class rows of its own, trained on the user's labels.

The detector it is added to does not change, nor do its scores of other words. The trunk starts as a copy of the
proposal network's and has a lower learning rate. Each level's head starts with the proposal network's box regression
and random class rows. A row is a class's learned embedding; text encoders play no part.

Shapes: ``N`` pictures, ``A`` cells, ``C`` own classes, ``P`` boxes of one picture.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from ovd.inference.postprocess import batched_nms
from ovd.modeling.proposals.architecture import PIXEL_MEAN, PIXEL_STD, STEP, Architecture, Head, adopt_trunk
from ovd.modeling.proposals.assign import PredictedBoxes, assign, class_losses
from ovd.modeling.proposals.cells import Cells, cell_centres, decode, gather
from ovd.modeling.proposals.network import BOX_WEIGHT, PRIOR, SIDES_WEIGHT, ProposalDetector
from ovd.pictures import resized
from pretrain.engine.distributed import shares

if TYPE_CHECKING:
    from ovd.data.mosaic import FinetuneSample

CANDIDATES = 1000
"""Best (cell, class) pairs that enter NMS."""
MIN_SCORE = 1e-3


class ClassBoxes(NamedTuple):
    """Boxes of one picture, best first.

    Attributes:
        boxes: (P, 4) x1, y1, x2, y2 in its pixels.
        classes: (P,) int64.
        scores: (P,) 0…1, as trained: the expected IoU with an object of the class.
    """

    boxes: NDArray[np.float32]
    classes: NDArray[np.int64]
    scores: NDArray[np.float32]


class ClassBranch(nn.Module):
    """A dense detector with ``classes`` classes; in training it returns losses, see `forward`."""

    def __init__(self, architecture: Architecture, *, classes: int) -> None:
        super().__init__()
        self.architecture, self.classes = architecture, classes
        self._trunk = adopt_trunk(self, architecture)
        self.heads = nn.ModuleList([architecture.class_head(classes) for _ in architecture.strides])
        self.register_buffer("mean", torch.tensor(PIXEL_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(PIXEL_STD).view(1, 3, 1, 1), persistent=False)

    @property
    def trunk(self) -> nn.Module:
        """Normalised pixels to one map per stride."""
        return self._trunk[0]

    @torch.no_grad()
    def init_from(self, proposals: ProposalDetector) -> None:
        """Copy trunk and boxes; class rows are initialised."""
        self.trunk.load_state_dict(proposals.backbone.trunk.state_dict())
        for new, old in zip(self.heads, proposals.proposal_generator.heads, strict=True):
            class_head, head = cast(Head, new), cast(Head, old)
            class_head.hidden.load_state_dict(head.hidden.state_dict())
            for mine, theirs in zip(class_head.side_rows(), head.side_rows(), strict=True):
                mine.copy_(theirs)
            weight, bias = class_head.word_rows()
            nn.init.normal_(weight, std=0.01)
            nn.init.constant_(bias, math.log(PRIOR / (1 - PRIOR)))

    def cells(self, pixels_N3HW: Tensor) -> Cells:
        """Predictions of each cell for RGB 0…255; H and W multiples of 32."""
        normal = (pixels_N3HW.float() - cast(Tensor, self.mean)) / cast(Tensor, self.std)
        dtype = next(self.trunk.parameters()).dtype
        return gather(self.heads, self.trunk(normal.to(dtype, memory_format=torch.channels_last)))

    def forward(self, batch: Sequence[FinetuneSample]) -> dict[str, Tensor]:
        """Losses of a batch of canvases of one size, over all processes' positives."""
        device = next(self.parameters()).device
        pixels = torch.stack([sample["image"] for sample in batch]).to(device)
        cells = self.cells(pixels)
        centres, strides = cell_centres(pixels.shape[2], pixels.shape[3], self.architecture.strides, device=device)
        words, sides = cells.words.float(), cells.sides.float()
        boxes = decode(sides, centres, strides)
        sums = []
        for n, sample in enumerate(batch):
            truth, classes = sample["boxes"].to(device), sample["classes"].to(device)
            objects, ignored = truth[classes >= 0], truth[classes < 0]
            labels = classes[classes >= 0]
            assignment = assign(boxes[n], words[n].sigmoid()[:, labels], centres, objects, ignored)
            sums.append(
                class_losses(
                    words=words[n],
                    predicted=PredictedBoxes(boxes[n], sides[n], centres, strides),
                    objects=objects,
                    classes=labels,
                    assignment=assignment,
                )
            )
        scores, box, dfl, weight = (torch.stack(values).sum() for values in zip(*sums, strict=True))
        weight = weight.clamp_min(1.0)
        (share,) = shares([float(weight)])
        return {
            "loss_classes": share * scores / weight,
            "loss_box": share * BOX_WEIGHT * box / weight,
            "loss_sides": share * SIDES_WEIGHT * dfl / weight,
        }

    @torch.inference_mode()
    def detect(self, image: NDArray[np.uint8], *, side: int, nms: float, top: int) -> ClassBoxes:
        """The best boxes of an (H, W, 3) RGB picture with its longest side at ``side`` pixels."""
        height, width = image.shape[:2]
        image = resized(image, side / max(height, width))
        size = image.shape[:2]
        device = next(self.parameters()).device
        pixels = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))).to(device)
        pixels = F.pad(pixels, (0, -size[1] % STEP, 0, -size[0] % STEP))
        cells = self.cells(pixels[None])
        centres, strides = cell_centres(pixels.shape[1], pixels.shape[2], self.architecture.strides, device=device)
        score_AC = cells.words[0].float().sigmoid().nan_to_num(0.0)
        best = score_AC.flatten().topk(min(CANDIDATES, score_AC.numel()))
        pairs = best.indices[best.values >= MIN_SCORE]
        cell, class_id = pairs // self.classes, pairs % self.classes
        boxes = decode(cells.sides[0][cell].float(), centres[cell], strides[cell]).nan_to_num(0.0)
        boxes[:, 0::2] = boxes[:, 0::2].clamp(0, size[1]) * (width / size[1])
        boxes[:, 1::2] = boxes[:, 1::2].clamp(0, size[0]) * (height / size[0])
        nonempty = (boxes[:, 2] - boxes[:, 0] >= 1) & (boxes[:, 3] - boxes[:, 1] >= 1)
        candidates = ClassBoxes(
            boxes[nonempty].cpu().numpy(),
            class_id[nonempty].cpu().numpy(),
            score_AC.flatten()[pairs][nonempty].cpu().numpy(),
        )
        keep = batched_nms(candidates.boxes, candidates.scores, candidates.classes, nms, limit=top)
        return ClassBoxes(candidates.boxes[keep], candidates.classes[keep], candidates.scores[keep])
