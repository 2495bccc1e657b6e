# SPDX-License-Identifier: Apache-2.0
"""Residual networks with torchvision's parameter names and a stem for small pictures.

`small`: 3x3 convolution with stride 2, then the usual 3x3 max pool with stride 2; `imagenet`: the 7x7 convolution of
He et al. (arXiv:1512.03385, table 1). Both divide the side by 4, so that `layer1` … `layer4` stand at strides 4, 8, 16,
32 and the checkpoint becomes a detector's backbone without any change of geometry. `cifar`: a 3x3 convolution alone,
for pictures of 32 pixels (SimCLR, appendix B.9); it keeps the side and suits no detector.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.models.resnet import ResNet as TorchvisionResNet

LAYERS: dict[int, tuple[type[BasicBlock] | type[Bottleneck], list[int]]] = {
    18: (BasicBlock, [2, 2, 2, 2]),
    34: (BasicBlock, [3, 4, 6, 3]),
    50: (Bottleneck, [3, 4, 6, 3]),
    101: (Bottleneck, [3, 4, 23, 3]),
}


class ResNet(TorchvisionResNet):
    """Maps pictures (N, 3, H, W) to pooled features (N, width); there is no classification layer.

    Args:
        depth: 18, 34, 50 or 101.
        stem: "small" (3x3), "imagenet" (7x7) or "cifar" (3x3, stride 1, no pooling).
        zero_init: start every residual block as the identity (last norm's gain 0).
    """

    def __init__(
        self, *, depth: int = 18, stem: Literal["small", "imagenet", "cifar"] = "small", zero_init: bool = True
    ) -> None:
        block, layers = LAYERS[depth]
        super().__init__(block, layers, zero_init_residual=zero_init)
        self.width = 512 * block.expansion
        if stem != "imagenet":
            self.conv1 = nn.Conv2d(3, 64, 3, stride=2 if stem == "small" else 1, padding=1, bias=False)
            nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        if stem == "cifar":
            self.maxpool = nn.Identity()
        self.fc = nn.Identity()

    def stages(self, pixels: Tensor) -> dict[str, Tensor]:
        """Feature maps `layer1` … `layer4` at strides 4, 8, 16, 32."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(pixels))))
        stages = {}
        for number, layer in enumerate((self.layer1, self.layer2, self.layer3, self.layer4), 1):
            x = layer(x)
            stages[f"layer{number}"] = x
        return stages

    def forward(self, x: Tensor) -> Tensor:
        return torch.flatten(self.avgpool(self.stages(x)["layer4"]), 1)
