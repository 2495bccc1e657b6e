# SPDX-License-Identifier: Apache-2.0
"""A ViLD training step against a plain Detectron2 Mask R-CNN with the same backbone, RPN, sampling and mask head.

The plain detector is Detectron2's own ``GeneralizedRCNN`` and ``StandardROIHeads``: ResNet-18 C4 with the last stage as
box head, a linear classifier over the base classes, class-agnostic boxes and masks. ViLD puts a projection and the text
classifier in its place and adds the offline regions of the distillation. Both see the same batches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from _common import milliseconds, parser, ratio, report, set_threads, show_ratio, take_turns

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ovd.config import ModelConfig


def plain_mask_rcnn(config: ModelConfig, *, classes: int) -> nn.Module:
    """Detectron2's own detector on the backbone of ``config`` (kind c4)."""
    from detectron2.layers import ShapeSpec
    from detectron2.modeling.box_regression import Box2BoxTransform
    from detectron2.modeling.matcher import Matcher
    from detectron2.modeling.meta_arch import GeneralizedRCNN
    from detectron2.modeling.poolers import ROIPooler
    from detectron2.modeling.roi_heads import FastRCNNOutputLayers, StandardROIHeads
    from detectron2.modeling.roi_heads.mask_head import MaskRCNNConvUpsampleHead
    from torch import nn

    from ovd.modeling.backbone import stage, stage_channels
    from ovd.modeling.vild.build import build_model

    # Backbone and RPN come from the same builder, so that only the heads differ.
    donor = build_model(
        config.model_copy(update={"variant": "agnostic"}),
        embed_dim=8,
        rows=None,
        trainable=None,
        pixel_mean=(127.5,) * 3,
        pixel_std=(64.0,) * 3,
    )
    head, depth = config.head, config.backbone.depth
    width = stage_channels(depth=depth, index=5)

    class LastStage(nn.Module):
        """Detectron2's C4 box head: the network's last stage, averaged."""

        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(*stage(depth=depth, index=5, norm=head.norm))
            self.output_shape = ShapeSpec(channels=width)

        def forward(self, pooled: torch.Tensor) -> torch.Tensor:
            return self.body(pooled).mean(dim=(2, 3))

    def pooler(resolution: int, stride: int) -> ROIPooler:
        return ROIPooler(output_size=resolution, scales=[1.0 / stride], sampling_ratio=2, pooler_type="ROIAlignV2")

    channels = stage_channels(depth=depth, index=3)
    mask_shape = ShapeSpec(channels=channels, height=head.mask_resolution, width=head.mask_resolution)
    heads = StandardROIHeads(
        num_classes=classes,
        batch_size_per_image=head.batch_per_image,
        positive_fraction=head.positive_fraction,
        proposal_matcher=Matcher([0.5], [0, 1], allow_low_quality_matches=False),
        box_in_features=["res4"],
        box_pooler=pooler(head.resolution, 16),
        box_head=LastStage(),
        box_predictor=FastRCNNOutputLayers(
            ShapeSpec(channels=width),
            box2box_transform=Box2BoxTransform(weights=(10.0, 10.0, 5.0, 5.0)),
            num_classes=classes,
            cls_agnostic_bbox_reg=True,
        ),
        mask_in_features=["res3"],
        mask_pooler=pooler(head.mask_resolution, 8),
        mask_head=MaskRCNNConvUpsampleHead(mask_shape, num_classes=1, conv_dims=list(head.mask_dims)),
    )
    return GeneralizedRCNN(
        backbone=donor.backbone,
        proposal_generator=donor.proposal_generator,
        roi_heads=heads,
        pixel_mean=(127.5,) * 3,
        pixel_std=(64.0,) * 3,
        input_format="RGB",
    )


def step_of(model: nn.Module, batches: list[list[Any]]) -> Callable[[], None]:
    """Forward, backward and update, on the next of ``batches`` each time."""
    import torch
    from detectron2.utils.events import EventStorage

    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=1e-5)
    turn = 0

    def step() -> None:
        nonlocal turn
        batch = batches[turn % len(batches)]
        turn += 1
        with EventStorage():
            losses = model(batch)
        optimiser.zero_grad()
        sum(losses.values()).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 5.0)
        optimiser.step()

    return step


def main() -> None:
    """Time both in turns."""
    flags = parser(__doc__ or "")
    flags.add_argument("--config", default="vild.yaml", help="training configuration (default vild.yaml)")
    flags.add_argument("--batch", type=int, default=4, help="pictures per step (default 4)")
    options = flags.parse_args()
    set_threads(options.threads)

    import numpy as np
    import torch
    from torch.nn import functional as F

    from ovd.config import TrainConfig
    from ovd.data.catalog import StickerImages
    from ovd.data.mapper import TrainingTransform, map_sample
    from ovd.data.samples import LabelledSample
    from ovd.modeling.vild.build import build_model
    from pretrain.data.stickers import Stickers
    from pretrain.engine.config import load_config

    config = load_config(TrainConfig, options.config)
    if config.model.backbone.kind != "c4" or config.data.kind != "stickers":
        raise SystemExit("error: this benchmark knows backbone.kind c4 on stickers")
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    stickers = Stickers.load()
    images = StickerImages(
        stickers=stickers, split="train", seed=config.data.seed, length=1000, size=config.data.size, labels="base"
    )
    transform = TrainingTransform(short_side=config.data.short_side, long_side=config.data.long_side, flip=0.5)
    dim = 384

    def sample(index: int) -> LabelledSample:
        count = 2 * config.regions_per_image
        low = rng.uniform(0, 0.7, (count, 2)) * config.data.size
        boxes = np.concatenate([low, low + rng.uniform(0.1, 0.3, (count, 2)) * config.data.size], axis=1)
        embedding = F.normalize(torch.from_numpy(rng.normal(size=(count, dim)).astype(np.float32))).numpy()
        return map_sample(
            images.load(index),
            transform=transform,
            rng=np.random.default_rng(index),
            offline=(boxes.astype(np.float32), embedding),
            regions_per_image=config.regions_per_image,
        )

    batches = [[sample(options.batch * b + i) for i in range(options.batch)] for b in range(4)]
    trainable = torch.ones(len(stickers.nouns), dtype=torch.bool)
    trainable[sorted(stickers.novel)] = False
    rows = F.normalize(torch.randn(len(stickers.nouns), dim))

    def ours(variant: str) -> nn.Module:
        return build_model(
            config.model.model_copy(update={"variant": variant}),
            embed_dim=dim,
            rows=rows,
            trainable=trainable,
            pixel_mean=(127.5,) * 3,
            pixel_std=(64.0,) * 3,
        )

    seconds = take_turns(
        {
            "plain": step_of(plain_mask_rcnn(config.model, classes=len(stickers.nouns)), batches),
            "text": step_of(ours("text"), batches),
            "vild": step_of(ours("vild"), batches),
        },
        rounds=options.rounds or 12,
        warmup=2,
    )
    text, vild = ratio(seconds["text"], seconds["plain"]), ratio(seconds["vild"], seconds["plain"])
    report(
        f"Training step, batch {options.batch}, {config.data.short_side} px, ResNet-{config.model.backbone.depth} C4, "
        f"{config.model.head.batch_per_image} sampled and {config.regions_per_image} offline regions per picture",
        [
            ("Detectron2 Mask R-CNN", f"{milliseconds(seconds['plain'])['p50_ms']:,.0f} ms", ""),
            ("ViLD-text", f"{milliseconds(seconds['text'])['p50_ms']:,.0f} ms", ""),
            ("ViLD", f"{milliseconds(seconds['vild'])['p50_ms']:,.0f} ms", ""),
            ("ViLD-text / Mask R-CNN", show_ratio(text), ""),
            ("ViLD / Mask R-CNN", show_ratio(vild), "aim: at most 1.3"),
        ],
        {"text_over_plain": text, "vild_over_plain": vild, "seconds": seconds},
        options.json,
    )


if __name__ == "__main__":
    main()
