# SPDX-License-Identifier: Apache-2.0
"""A transformer small enough for tests, on a backbone of one convolution."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from ovd.config_detr import DetrConfig
from ovd.data.samples import LabelledSample, PatchSample
from ovd.modeling.classifier import EmbeddingClassifier
from ovd.modeling.detr.network import Detr
from ovd.modeling.detr.structures import FeatureMap
from ovd.modeling.detr.transformer import ConditionalDecoderLayer, EncoderLayer
from ovd.modeling.region_head import RegionHead, conv_fc_head

C, D, STRIDE, CHANNELS = 5, 12, 16, 8


class OneConv(nn.Module):
    """res4 at stride 16, with a batch norm whose statistics must not move when it is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, CHANNELS, STRIDE, stride=STRIDE, bias=False)
        self.norm = nn.BatchNorm2d(CHANNELS)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        below, right = -x.shape[-2] % STRIDE, -x.shape[-1] % STRIDE
        return {"res4": self.norm(self.conv(nn.functional.pad(x, (0, right, 0, below))))}


def make(
    arch: str = "conditional",
    *,
    variant: str = "text",
    novel: tuple[int, ...] = (),
    seed: int = 0,
    region_tower: RegionHead | None = None,
    frozen: bool = True,
    **changes: Any,
) -> Detr:
    """One with variant text, closed or agnostic (whose space is the backbone's); ``changes`` of the configuration."""
    torch.manual_seed(seed)
    trainable = torch.ones(C, dtype=torch.bool)
    trainable[list(novel)] = False
    backbone = OneConv()
    config = DetrConfig.model_validate(
        {
            "arch": arch, "variant": variant, "width": 16, "heads": 2, "ffn": 24, "encoder_layers": 1,
            "decoder_layers": 2, "queries": 6, "scale": 10.0, "embed_space": "clip" if variant == "text" else "ssl",
            "backbone": {"features": ["res4"], "frozen": frozen}, "region_tower": region_tower is not None, **changes,
        }
    )  # fmt: skip
    classifier = None
    if variant == "text":
        classifier = EmbeddingClassifier(rows=torch.randn(C, D), trainable=trainable, scale=10.0)
    model = Detr(
        config,
        backbone=backbone,
        features=[FeatureMap("res4", CHANNELS, STRIDE)],
        embed_dim=CHANNELS if variant == "agnostic" else D,
        classifier=classifier,
        num_classes=C,
        region_tower=region_tower,
        pixel_mean=[127.5] * 3,
        pixel_std=[64.0] * 3,
    )
    for part in model.modules():  # as if trained: these branches start at zero, and nothing could leak through them
        if isinstance(part, EncoderLayer | ConditionalDecoderLayer):
            nn.init.xavier_uniform_(part.self_attn.out_proj.weight)
            nn.init.xavier_uniform_(part.linear2.weight)
    return model


def picture(height: int, width: int, boxes: list[list[float]], labels: list[int], *, seed: int = 0) -> LabelledSample:
    """A labelled training sample of noise."""
    generator = torch.Generator().manual_seed(seed)
    instances = Instances((height, width))
    instances.gt_boxes = Boxes(torch.tensor(boxes).reshape(-1, 4))
    instances.gt_classes = torch.tensor(labels, dtype=torch.int64)
    pixels = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
    return {"image": pixels, "instances": instances}


def patch_batch(count: int, patches: int, *, side: int = 64, seed: int = 0) -> list[PatchSample]:
    """Samples of the pretext, of noise."""
    generator = torch.Generator().manual_seed(seed)
    samples: list[PatchSample] = []
    for _ in range(count):
        low = torch.rand(patches, 2, generator=generator) * side / 2
        size = 8 + torch.rand(patches, 2, generator=generator) * side / 3
        samples.append(
            {
                "image": torch.randint(0, 256, (3, side, side), generator=generator, dtype=torch.uint8),
                "boxes": torch.cat([low, low + size], dim=1),
                "patches": torch.randint(0, 256, (patches, 1, 3, 16, 16), generator=generator, dtype=torch.uint8),
                "size": (side, side),
            }
        )
    return samples


def region_tower(seed: int = 3) -> RegionHead:
    """A head that reads the small backbone's map."""
    torch.manual_seed(seed)
    return conv_fc_head(in_channels=CHANNELS, resolution=4, embed_dim=D, norm="", conv_dims=(8,), fc_dims=(16,))
