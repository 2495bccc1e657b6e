# SPDX-License-Identifier: Apache-2.0
"""What ImageNet's classifier sees in a box: the mean of its classes' words (ConSE, arXiv:1312.5650).

The encoder's image tower started from this network and was trained on crops of everyday words; in doing so it forgot
many of ImageNet's classes. So the network as it was also looks at the picture, frozen. Its last map is pooled in each
box, as F-VLM (arXiv:2209.15639) pools an encoder's, and classified.

Shapes: ``P`` regions, ``K`` classes of ImageNet, ``D`` joint embedding. Pictures are (H, W, 3) uint8 RGB.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ovd.config_fvlm import ConseConfig
from ovd.inference.scoring import Deferred
from ovd.modeling.fvlm.part_file import read_part, save_part
from ovd.modeling.fvlm.tower import STRIDE, padded_pixels
from ovd.pictures import resized_copy
from pretrain.config_photos import WordsLoss
from pretrain.data.lexicon import read_lexicon
from pretrain.engine.errors import UserError
from pretrain.engine.state import load_tensors
from pretrain.nets.batch_norm import fold_batch_norms
from pretrain.nets.conse import conse_targets
from pretrain.nets.imagenet import PIXEL_MEAN, PIXEL_STD, read_imagenet
from pretrain.nets.timm_tower import PARTS, create_efficientnet
from pretrain.nets.towers import JointEncoder

FILE = "conse.safetensors"
"""Of an exported detector's folder."""
FORMAT = "conse/1"


class RegionConse(nn.Module):
    """A frozen ImageNet network of timm's EfficientNet family, pooled in boxes.

    Args:
        config: which network, and the size of a picture in it.
        embed_dim: D.
    """

    words_KD: Tensor

    def __init__(self, config: ConseConfig, *, embed_dim: int) -> None:
        super().__init__()
        network = create_efficientnet(config.name, key="model.conse.name")
        self.trunk = nn.Sequential(*(network.get_submodule(part) for part in PARTS))
        self.classifier = cast(nn.Linear, network.get_submodule("classifier"))
        self.register_buffer("words_KD", torch.zeros(self.classifier.out_features, embed_dim))
        self.side, self.precision = config.side, torch.float32
        self.requires_grad_(False).eval()
        self.trunk.to(memory_format=torch.channels_last)

    @classmethod
    def from_package(cls, config: ConseConfig, encoder: JointEncoder) -> RegionConse:
        """The network of an installed package, with the words of its classes in the encoder's space.

        Raises:
            UserError: the package is missing or holds another network.
        """
        conse = cls(config, embed_dim=encoder.embed_dim)
        network = read_imagenet(config.package, config.name, key="model.conse")
        for mine, part in zip((*conse.trunk, conse.classifier), (*PARTS, "classifier"), strict=True):
            mine.load_state_dict(network.get_submodule(part).state_dict())
        loss = WordsLoss()  # the encoder's distillation has the same targets
        words_KD = conse_targets(read_lexicon(), encoder, levels=loss.conse_levels, decay=loss.conse_decay)
        if len(words_KD) != len(conse.words_KD):
            raise UserError(
                f"model.conse.package: the network has {len(conse.words_KD)} classes, ImageNet {len(words_KD)}"
            )
        conse.words_KD.copy_(words_KD)
        return conse

    def prepare(self, precision: torch.dtype, *, fold: bool) -> RegionConse:
        """Make it fast, after its weights were read: a saved one would hold what is left of them.

        Args:
            precision: of its convolutions; bfloat16 takes half the time of float32 on a CPU that has it.
            fold: fold batch norms into convolutions.

        Returns:
            itself.
        """
        if fold:
            fold_batch_norms(self.trunk)
        self.trunk.to(precision)
        self.precision = precision
        return self

    def train(self, mode: bool = True) -> RegionConse:
        """Always in eval mode."""
        return super().train(False)

    def forward(self, pixels: Tensor, boxes_P4: Tensor) -> Tensor:
        """(P, D) means of the classes' words, not normalised: short where the classifier is in doubt.

        Args:
            pixels: (1, 3, H, W) normalised RGB; H and W multiples of 32.
            boxes_P4: x1, y1, x2, y2 in its pixels.
        """
        last = self.trunk(pixels.to(self.precision)).float()
        # Pooling and classifier are linear: of fewer cells than boxes, the logits are pooled, not the features.
        logits_SK = self.classifier(last.flatten(2)[0].T)
        y_PH = overlaps(boxes_P4[:, 1], boxes_P4[:, 3], cells=last.shape[2])
        x_PW = overlaps(boxes_P4[:, 0], boxes_P4[:, 2], cells=last.shape[3])
        share_PS = (y_PH[:, :, None] * x_PW[:, None, :]).flatten(1)
        share_PS = share_PS / share_PS.sum(1, keepdim=True).clamp(min=1e-6)
        return (share_PS @ logits_SK).softmax(1) @ self.words_KD

    def deferred(self, image: NDArray[np.uint8], boxes_P4: Tensor) -> Deferred:
        """The same of boxes in pixels of a picture, computed when it is first asked for."""
        height, width = image.shape[:2]
        small = resized_copy(image, self.side)
        boxes = boxes_P4.cpu() * torch.tensor([small.shape[1] / width, small.shape[0] / height]).repeat(2)
        return Deferred(lambda: self.embed(small, boxes).cpu().numpy())

    @torch.inference_mode()
    def embed(self, small: NDArray[np.uint8], boxes_P4: Tensor) -> Tensor:
        """The same of boxes in pixels of a picture with its longest side at ``side`` pixels."""
        device = self.words_KD.device
        pixels = padded_pixels(small, mean=255 * PIXEL_MEAN, std=255 * PIXEL_STD, device=device)
        return self(pixels.contiguous(memory_format=torch.channels_last), boxes_P4.to(device))


def overlaps(low_P: Tensor, high_P: Tensor, *, cells: int) -> Tensor:
    """(P, cells) how much of each cell of the last map, along one axis, lies in a box, in pixels."""
    edge = STRIDE * torch.arange(cells, dtype=low_P.dtype, device=low_P.device)
    shared = torch.minimum(high_P[:, None], edge + STRIDE) - torch.maximum(low_P[:, None], edge)
    return shared.clamp(min=0)


def save_conse(folder: Path, conse: RegionConse) -> None:
    """Write ``conse.safetensors``, in half precision."""
    save_part(folder / FILE, conse, file_format=FORMAT)


def load_conse(
    folder: Path,
    config: ConseConfig,
    *,
    embed_dim: int,
    precision: torch.dtype = torch.bfloat16,
    fold: bool = False,
) -> RegionConse:
    """The network of an exported detector's folder; `precision` and `fold` as in `RegionConse.prepare`.

    Raises:
        UserError: no such file, or one of another network.
    """
    tensors = read_part(folder / FILE, file_format=FORMAT)
    conse = RegionConse(config, embed_dim=embed_dim)
    load_tensors(conse, tensors, source=folder / FILE)
    return conse.prepare(precision, fold=fold)
