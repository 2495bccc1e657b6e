# SPDX-License-Identifier: Apache-2.0
"""MoCo (He et al., arXiv:1911.05722; v2: Chen et al., arXiv:2003.04297): contrast a query with a queue of keys.

Particular to it: negatives come from a queue of earlier keys, so their number does not depend on the batch (§3.1); keys
come from a momentum copy of the encoder, moved *before* the keys are computed, by the weights of the previous step
(algorithm 1); batch norm must not let a query recognise its key by shared statistics, so the keys of all processes are
shuffled among them (§3.3). One process alone normalises in groups, as several GPUs would ("split batch norm" of the
authors' CIFAR notebook), and shuffles as well: a query's group and its key's must differ.
The queue and its pointer are part of every checkpoint. Its length need not be a multiple of the batch: it wraps.

Shapes: `N` samples of this process, `M` = processes x N, `D` embedding, `K` queue.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

from pretrain.config_ssl import MoCoMethod
from pretrain.data.crops import ViewBatch
from pretrain.engine.config import OptimConfig
from pretrain.engine.distributed import gather_with_grad, rank, world_size
from pretrain.engine.errors import UserError
from pretrain.engine.optim import ParamGroup
from pretrain.losses import moco_infonce
from pretrain.methods.base import Augment, HeadMemory, SelfSupervised, parameter_bytes, width_of
from pretrain.nets.ema import ema_update, flat_parameters, momentum_copy
from pretrain.nets.heads import mlp


class SplitBatchNorm2d(nn.BatchNorm2d):
    """Batch norm over groups of the batch, as if each were on its own GPU; running statistics are the groups' mean.

    In eval mode it is plain batch norm.
    """

    splits = 8

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        if not self.training:
            return super().forward(x)
        if n % self.splits:
            raise ValueError(f"{n} samples cannot be normalised in {self.splits} equal groups")
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            raise ValueError("split batch norm needs running statistics")
        mean, variance = self.running_mean.repeat(self.splits), self.running_var.repeat(self.splits)
        grouped = F.batch_norm(
            x.view(self.splits, n // self.splits, c, h, w).transpose(0, 1).reshape(-1, self.splits * c, h, w),
            mean,
            variance,
            self.weight.repeat(self.splits),
            self.bias.repeat(self.splits),
            True,
            self.momentum or 0.1,
            self.eps,
        )
        self.running_mean.copy_(mean.view(self.splits, c).mean(0))
        self.running_var.copy_(variance.view(self.splits, c).mean(0))
        self.num_batches_tracked.add_(1)
        return grouped.view(-1, self.splits, c, h, w).transpose(0, 1).reshape(n, c, h, w)


def split_batch_norm(module: nn.Module, splits: int) -> nn.Module:
    """Let the batch norms of a network normalise in groups; same parameters, same names. Returns the module."""
    if splits > 1:
        for layer in module.modules():
            if type(layer) is nn.BatchNorm2d:
                layer.__class__ = SplitBatchNorm2d
                layer.splits = splits  # type: ignore[assignment]
            elif isinstance(layer, nn.BatchNorm2d) and type(layer) is not SplitBatchNorm2d:
                raise UserError(
                    f"method.bn_splits: the backbone's {type(layer).__name__} cannot be split; take another backbone, "
                    "or bn_splits: 1 (on one process BN statistics then leak the positive key)"
                )
    return module


class MoCo(SelfSupervised[MoCoMethod]):
    """One step: query view and key view in, InfoNCE against the queue out.

    Args:
        backbone: (N, 3, H, W) → (N, width), the query encoder.
        projector: (N, width) → (N, D).
        augment: one function per view: query, key.
        dim: D.
        queue: K.
        momentum: of the key encoder.
        temperature: of the softmax.
        symmetric: each view is query once and key once; the sum of both losses, as in the authors' CIFAR notebook.
    """

    shares_batch_norm = False  # keys are shuffled instead (§3.3)
    queue: Tensor
    queue_pointer: Tensor

    def __init__(
        self,
        *,
        backbone: nn.Module,
        projector: nn.Module,
        augment: Augment,
        dim: int,
        queue: int = 65536,
        momentum: float = 0.999,
        temperature: float = 0.07,
        symmetric: bool = False,
    ) -> None:
        super().__init__(backbone=backbone, projector=projector, augment=augment)
        self.key_backbone, self.key_projector = momentum_copy(backbone), momentum_copy(projector)
        self.momentum, self.temperature, self.symmetric = momentum, temperature, symmetric
        self.register_buffer("queue", F.normalize(torch.randn(queue, dim), dim=1))
        self.register_buffer("queue_pointer", torch.zeros((), dtype=torch.int64))

    @classmethod
    def build_projector(cls, config: MoCoMethod, width: int) -> nn.Module:
        """One layer in v1, two in v2."""
        if config.name == "moco_v1":
            return mlp([width, config.dim], last_bias=True)
        return mlp([width, config.hidden, config.dim], norm="none", bias=True, last_bias=True)

    @classmethod
    def from_config(cls, config: MoCoMethod, *, backbone: nn.Module, augment: Augment, batch_size: int) -> Self:
        """The method; on one process batch norm is split into groups.

        Raises:
            UserError: the batch does not fit the queue or the groups.
        """
        splits = checked_splits(config, batch_size)
        backbone = split_batch_norm(backbone, splits)
        method = cls(
            backbone=backbone,
            projector=cls.build_projector(config, width_of(backbone)),
            augment=augment,
            dim=config.dim,
            queue=config.queue,
            momentum=config.momentum,
            temperature=config.temperature,
            symmetric=config.symmetric,
        )
        method.check_samples = splits * max(2, -(-cls.check_samples // splits))  # equal groups, as of the whole batch
        return method

    @classmethod
    def head_memory(cls, config: MoCoMethod, width: int) -> HeadMemory:
        """The projector, its momentum copy, and the queue."""
        projector = parameter_bytes(cls.build_projector(config, width))
        extra = projector + 4 * config.queue * config.dim
        return HeadMemory(projector, extra=extra, extra_for="the key projector and the queue")

    def forward(self, batch: ViewBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics.

        Args:
            batch: "views", two of (N, 3, S, S) uint8: query and key.
        """
        a, b = self.augmented(batch)
        loss, keys = self._loss_and_keys(a, b)
        if self.symmetric:
            other_loss, other_keys = self._loss_and_keys(b, a)
            loss, keys = loss + other_loss, torch.cat([keys, other_keys])
        if self.training:
            self._enqueue(gather_with_grad(keys))
        return loss, {}

    def _loss_and_keys(self, query_view: Tensor, key_view: Tensor) -> tuple[Tensor, Tensor]:
        query = self.projector(self.backbone(query_view))
        key = self._keys(key_view)
        loss = moco_infonce(query, key, self.queue, temperature=self.temperature)
        with torch.no_grad():
            unit = F.normalize(query.detach().float(), dim=1)
            self._last = {
                "projection": query.detach(),
                "positive": (unit * key).sum(1),
                "negative": unit @ self.queue.mean(0),  # the mean cosine with all of them
            }
        return loss, key

    @torch.no_grad()
    def _keys(self, view: Tensor) -> Tensor:
        """(N, D) unit keys; pictures are shuffled among processes before the key encoder, and their keys back after it.

        For plain batch norm on one process the order makes no difference, for split batch norm it does.
        """
        count, processes = len(view), world_size()
        order = torch.randperm(count * processes, device=view.device)
        if processes > 1:
            dist.broadcast(order, src=0)  # one order for all: the first process's
        local = slice(rank() * count, (rank() + 1) * count)
        shuffled = gather_with_grad(view)[order[local]]
        keys = F.normalize(self.key_projector(self.key_backbone(shuffled)).float(), dim=1)
        return gather_with_grad(keys)[order.argsort()[local]]

    @torch.no_grad()
    def _enqueue(self, keys: Tensor) -> None:
        """Write the keys of all processes, in order, over the oldest ones."""
        length = len(self.queue)
        keys = keys[-length:].to(self.queue.dtype)
        rows = (self.queue_pointer + torch.arange(len(keys), device=keys.device)) % length
        self.queue[rows] = keys
        self.queue_pointer.copy_((self.queue_pointer + len(keys)) % length)

    def after_step(self, step: int, total: int) -> None:
        """Move the key encoder towards the query encoder, once per step, before the next step computes keys."""
        ema_update(self.key_backbone, self.backbone, momentum=self.momentum)
        ema_update(self.key_projector, self.projector, momentum=self.momentum)

    def param_groups(self, optim: OptimConfig) -> list[ParamGroup]:
        """One group: weight decay on everything, biases and norms too (the authors' code)."""
        return [{"params": [p for p in self.parameters() if p.requires_grad], "weight_decay": optim.weight_decay}]

    def health(self) -> dict[str, Tensor]:
        """Query projections and cosines of the last forward pass, and both networks' parameters."""
        return {
            **self._last,
            "online_parameters": flat_parameters(self.backbone, self.projector),
            "target_parameters": flat_parameters(self.key_backbone, self.key_projector),
        }


def checked_splits(config: MoCoMethod, batch_size: int) -> int:
    """Groups of batch norm on this process.

    Raises:
        UserError: a batch of ``batch_size`` does not fit the queue or the groups.
    """
    keys = batch_size * (2 if config.symmetric else 1)
    if config.queue < keys:
        raise UserError(
            f"method.queue: {config.queue} is less than the {keys} keys of one step (loop.batch_size); take more"
        )
    splits = config.bn_splits if world_size() == 1 else 1
    if batch_size % splits or batch_size < 2 * splits:
        fitting = max(n for n in range(1, splits + 1) if batch_size % n == 0 and batch_size >= 2 * n)
        raise UserError(
            f"method.bn_splits: {batch_size} pictures (of one pass) do not make {splits} equal groups of two or "
            f"more; set method.bn_splits={fitting}, or another loop.batch_size"
        )
    return splits
