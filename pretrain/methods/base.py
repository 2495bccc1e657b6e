# SPDX-License-Identifier: Apache-2.0
"""Base class of self-supervised methods: backbone, projector, augmentations, and building from a configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from pretrain.config_ssl import SslMethod
from pretrain.data.crops import ViewBatch
from pretrain.engine.task import Task

ConfigT = TypeVar("ConfigT", bound=SslMethod)
Augment = Sequence[Callable[[Tensor], Tensor]]
"""One function per view: (N, 3, S, S) uint8 → normalised float."""


class HeadMemory(NamedTuple):
    """Bytes that a method needs beside its backbone."""

    trained: int  # parameters of the heads, each with a gradient and a velocity
    extra: int = 0  # everything else
    extra_for: str = ""  # what that is, for the error message


class SelfSupervised(Task, Generic[ConfigT]):
    """Base class of the methods that learn from views of a picture.

    Args:
        backbone: (N, 3, H, W) → (N, width); the network that is exported.
        projector: (N, width) → (N, D).
        augment: one function per view.
    """

    two_views: ClassVar[bool] = True
    shares_batch_norm: ClassVar[bool] = True  # several GPUs normalise together

    def __init__(self, *, backbone: nn.Module, projector: nn.Module, augment: Augment) -> None:
        super().__init__()
        if self.two_views and len(augment) != 2:
            raise ValueError(f"{type(self).__name__} compares two views, not {len(augment)}")
        self.backbone, self.projector, self.augment = backbone, projector, augment
        self._last: dict[str, Tensor] = {}

    @classmethod
    def build_projector(cls, config: ConfigT, width: int) -> nn.Module:
        """The projector, with fresh weights, behind features of length ``width``."""
        raise NotImplementedError

    @classmethod
    def from_config(cls, config: ConfigT, *, backbone: nn.Module, augment: Augment, batch_size: int) -> Self:
        """The method with fresh weights.

        Args:
            config: section of the method.
            backbone: has its output length as ``width``.
            augment: one function per view.
            batch_size: of one pass, over all processes.

        Raises:
            UserError: the batch does not fit the method.
        """
        return cls(backbone=backbone, projector=cls.build_projector(config, width_of(backbone)), augment=augment)

    @classmethod
    def head_memory(cls, config: ConfigT, width: int) -> HeadMemory:
        """Memory of heads and queues; called on the meta device."""
        return HeadMemory(parameter_bytes(cls.build_projector(config, width)))

    @classmethod
    def learning_rate(cls, config: ConfigT, lr: float, *, batch_size: int) -> float:
        """``optim.lr`` scaled to the batch, where the method has a rule for that."""
        return lr

    @torch.no_grad()
    def augmented(self, batch: ViewBatch) -> list[Tensor]:
        """Each view of the batch, (N, 3, S, S) uint8, through its own augmentation.

        Raises:
            ValueError: the batch has another number of views than the method has augmentations.
        """
        views = batch["views"]
        if len(views) != len(self.augment):
            raise ValueError(f"the batch has {len(views)} views, the method {len(self.augment)} augmentations")
        with torch.autocast(views[0].device.type, enabled=False):  # pixels stay exact; only the networks are autocast
            return [augment(view) for augment, view in zip(self.augment, views, strict=True)]

    def project(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """(N, D) projections of two views, one pass each: batch norm sees one view at a time."""
        z_a, z_b = self.projector(self.backbone(a)), self.projector(self.backbone(b))
        self._last = {"projection": z_a.detach(), "projection_b": z_b.detach()}
        return z_a, z_b

    def health(self) -> Mapping[str, Tensor]:
        """Projections of the last forward pass."""
        return self._last


def width_of(backbone: nn.Module) -> int:
    """Length of a backbone's features."""
    return int(backbone.width)  # type: ignore[arg-type]


def parameter_bytes(module: nn.Module) -> int:
    """Memory of the parameters, as float32."""
    return sum(p.numel() for p in module.parameters()) * torch.float32.itemsize
