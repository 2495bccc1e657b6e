# SPDX-License-Identifier: Apache-2.0
"""An image tower out of timm's EfficientNet family: stem, stages, last convolution, average pool, projection.

Shapes: `N` pictures, `S` side, `F` pooled features, `K` classes of ImageNet, `D` joint embedding. A projection of the
pooled map lets a detector pool a box out of the map in place of the picture (F-VLM, arXiv:2209.15639).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import skip_init

from pretrain.config_photos import ConseShare, TimmTower
from pretrain.engine.errors import UserError


class ConseProjection(nn.Module):
    """A trained projection, ensembled with what ImageNet's classifier says of the same features.

    The projection prefers the words that it was trained on. ConSE (arXiv:1312.5650) knows words by the classes of
    ImageNet that are near them: the mean of the classes' words, weighted by their probabilities. The embedding is
    ``(1 - share) · unit(learned) + share · unit(ConSE)``; nothing but the projection is trained.

    Args:
        learned: the projection, `F` to `D`.
        conse: share, and number of classes.
    """

    words_KD: Tensor

    def __init__(self, learned: nn.Linear, *, conse: ConseShare) -> None:
        super().__init__()
        self.learned = learned
        # Without a draw of random numbers: what is trained starts as it does without ConSE.
        self.classifier = skip_init(nn.Linear, learned.in_features, conse.classes).requires_grad_(False)
        nn.init.zeros_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)
        self.register_buffer("words_KD", torch.zeros(conse.classes, learned.out_features))
        self.share, self.top = conse.share, conse.top

    def forward(self, features_NF: Tensor) -> Tensor:
        # Probabilities need more digits than bfloat16 has.
        with torch.autocast(features_NF.device.type, enabled=False):
            features_NF = features_NF.float()
            conse_ND = conse_embedding(self.classifier(features_NF), self.words_KD, top=self.top)
            return torch.lerp(F.normalize(self.learned(features_NF), dim=1), conse_ND, self.share)


def conse_embedding(logits_NK: Tensor, words_KD: Tensor, *, top: int) -> Tensor:
    """(N, D) unit rows: the words of the `top` most probable classes, weighted by their probabilities (ConSE)."""
    value, index = logits_NK.float().softmax(1).topk(min(top, logits_NK.shape[1]), dim=1)
    return F.normalize((value[..., None] * words_KD[index]).sum(1), dim=1)


class TimmImage(nn.Module):
    """(N, 3, S, S) -> (N, D). Batch norms always use their stored statistics.

    Raises:
        UserError: unknown to timm, or a network of another family.
    """

    def __init__(self, *, tower: TimmTower, embed_dim: int) -> None:
        super().__init__()
        import timm

        if not timm.is_model(tower.name):
            raise UserError(f"encoder.image.name: timm has no model {tower.name!r}")
        network = timm.create_model(tower.name, pretrained=False, num_classes=0)
        names = [name for name, _ in network.named_children()]
        if not {"conv_stem", "bn1", "blocks", "conv_head", "bn2"} <= set(names):
            raise UserError(
                f"encoder.image.name: {tower.name} is not of the EfficientNet family; take tf_efficientnet_lite0 to 4"
            )
        self.backbone = network
        self.width = cast(int, network.num_features)
        learned = nn.Linear(self.width, embed_dim)
        nn.init.normal_(learned.weight, std=self.width**-0.5)
        nn.init.zeros_(learned.bias)
        self.proj = learned if tower.conse is None else ConseProjection(learned, conse=tower.conse)
        self.frozen_stages = 0

    @property
    def learned(self) -> nn.Linear:
        """The trained projection, without ConSE."""
        return self.proj if isinstance(self.proj, nn.Linear) else self.proj.learned

    @property
    def stages(self) -> Sequence[nn.Module]:
        """The network's stages between stem and last convolution."""
        return list(cast(nn.Sequential, self.backbone.blocks))

    def freeze(self, stages: int) -> None:
        """Train no stem and none of the first `stages` stages; of more stages than there are, nothing but `proj`."""
        self.frozen_stages = min(stages, len(self.stages) + 1)
        children = dict(self.backbone.named_children())
        frozen = [children["conv_stem"], children["bn1"], *self.stages[:stages]] if stages else []
        frozen += [children["conv_head"], children["bn2"]] if stages > len(self.stages) else []
        for part in frozen:
            part.requires_grad_(False)

    def train(self, mode: bool = True) -> TimmImage:
        """Batch norms stay in eval mode."""
        super().train(mode)
        for part in self.backbone.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.eval()
        return self

    def lower(self, pixels: Tensor) -> Tensor:
        """(N, 3, S, S) -> the map after the frozen stages, without gradient where there are any."""
        children = dict(self.backbone.named_children())
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen_stages):
            x = children["bn1"](children["conv_stem"](pixels))
            for stage in self.stages[: self.frozen_stages]:
                x = stage(x)
        return x

    def upper(self, x: Tensor) -> Tensor:
        """The map of `lower` -> (N, width) pooled features."""
        return pooled(self.backbone, x, first_stage=self.frozen_stages)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.proj(self.upper(self.lower(pixels)))


def pooled(network: nn.Module, x: Tensor, *, first_stage: int) -> Tensor:
    """The map before a stage of an EfficientNet -> (N, width), by its further stages and average pool."""
    children = dict(network.named_children())
    for stage in list(cast(nn.Sequential, children["blocks"]))[first_stage:]:
        x = stage(x)
    return children["bn2"](children["conv_head"](x)).mean((2, 3))
