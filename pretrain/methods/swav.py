# SPDX-License-Identifier: Apache-2.0
"""SwAV (Caron et al., arXiv:2006.09882): predict from one view to which prototypes another view was assigned.

Particular to it: the assignment ("code") comes from Sinkhorn-Knopp over the global batch, so that all prototypes are
used equally (§3.1), and has no gradient; small crops predict the codes of the big ones, only which have codes
(§3.2), with one forward pass per resolution; the prototypes are unit vectors in every forward pass, and frozen for
the first steps; a queue of earlier embeddings lets small batches use many prototypes (appendix A).

Shapes: `N` samples of this process, `V` crops, `D` embedding, `K` prototypes, `Q` queue.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

from pretrain.config_ssl import SwavMethod
from pretrain.data.crops import ViewBatch
from pretrain.engine.config import OptimConfig
from pretrain.engine.distributed import gather_with_grad, rank, world_size
from pretrain.engine.errors import UserError
from pretrain.engine.optim import ParamGroup
from pretrain.losses import swav_loss
from pretrain.methods.base import Augment, HeadMemory, SelfSupervised, parameter_bytes, width_of
from pretrain.nets.heads import mlp


class SwAV(SelfSupervised[SwavMethod]):
    """One step: crops in, swapped prediction loss out.

    Args:
        backbone: (N, 3, H, W) → (N, width).
        projector: (N, width) → (N, D).
        augment: one function per crop, the big crops first.
        dim: D, length of the projector's output.
        prototypes: K.
        big_crops: how many of the crops give codes.
        temperature: of the softmax over prototypes.
        epsilon: sharpness of the codes; smaller is sharper.
        iterations: of Sinkhorn-Knopp.
        freeze_steps: optimiser steps before the prototypes begin to learn.
        queue_length: earlier embeddings per big crop, over all processes; 0: no queue.
        queue_start: optimiser steps before the queue begins to fill; it is used from when it is full.
    """

    two_views = False
    prototypes: nn.Parameter
    queue: Tensor
    queue_pointer: Tensor
    queue_filled: Tensor
    updates: Tensor

    def __init__(
        self,
        *,
        backbone: nn.Module,
        projector: nn.Module,
        augment: Augment,
        dim: int,
        prototypes: int,
        big_crops: int = 2,
        temperature: float = 0.1,
        epsilon: float = 0.05,
        iterations: int = 3,
        freeze_steps: int = 0,
        queue_length: int = 0,
        queue_start: int = 0,
    ) -> None:
        super().__init__(backbone=backbone, projector=projector, augment=augment)
        if not 2 <= big_crops <= len(augment):
            raise ValueError(f"SwAV needs at least two big crops, got {big_crops} of {len(augment)}")
        if queue_length % world_size():
            raise UserError(
                f"method.queue_length: {queue_length} does not divide among {world_size()} processes; take a multiple"
            )
        self.big_crops, self.temperature, self.epsilon, self.iterations = big_crops, temperature, epsilon, iterations
        self.freeze_steps, self.queue_length, self.queue_start = freeze_steps, queue_length, queue_start
        self.prototypes = nn.Parameter(torch.empty(prototypes, dim))
        nn.init.kaiming_uniform_(self.prototypes, a=5**0.5)  # the reference's: a linear layer without bias
        self._normalise()
        # The queue is the same in every process: checkpoints hold one, and any number of processes can go on with it.
        self.register_buffer("queue", torch.zeros(big_crops, queue_length, dim))
        self.register_buffer("queue_pointer", torch.zeros((), dtype=torch.int64))
        self.register_buffer("queue_filled", torch.zeros((), dtype=torch.int64))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    @classmethod
    def build_projector(cls, config: SwavMethod, width: int) -> nn.Module:
        """Two layers."""
        return mlp([width, config.hidden, config.dim], bias=True, last_bias=True)

    @classmethod
    def from_config(cls, config: SwavMethod, *, backbone: nn.Module, augment: Augment, batch_size: int) -> Self:
        """See `SelfSupervised.from_config`.

        Raises:
            UserError: more prototypes than samples.
        """
        assigned = batch_size + config.queue_length
        if assigned < config.prototypes:
            raise UserError(
                f"method.prototypes: {config.prototypes} cannot be used alike by {assigned} samples (batch of one "
                "pass over all processes, and queue); take fewer, or a larger loop.batch_size or method.queue_length"
            )
        return cls(
            backbone=backbone,
            projector=cls.build_projector(config, width_of(backbone)),
            augment=augment,
            dim=config.dim,
            prototypes=config.prototypes,
            big_crops=config.big_crops,
            temperature=config.temperature,
            epsilon=config.epsilon,
            iterations=config.iterations,
            freeze_steps=config.freeze_steps,
            queue_length=config.queue_length,
            queue_start=config.queue_start,
        )

    @classmethod
    def head_memory(cls, config: SwavMethod, width: int) -> HeadMemory:
        """The projector with the prototypes, and the queue."""
        trained = parameter_bytes(cls.build_projector(config, width)) + 4 * config.prototypes * config.dim
        return HeadMemory(trained, extra=4 * config.big_crops * config.queue_length * config.dim, extra_for="the queue")

    def forward(self, batch: ViewBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics.

        Args:
            batch: "views", V of (N, 3, S, S) uint8, those of one size next to each other, the big crops first.
        """
        crops = self.augmented(batch)
        features = [  # one pass per resolution
            self.backbone(torch.cat(list(same)))
            for _, same in itertools.groupby(crops, key=lambda crop: crop.shape[-1])
        ]
        projection = self.projector(torch.cat(features))  # one pass of the head over all crops
        with torch.autocast(projection.device.type, enabled=False):
            z = F.normalize(projection.float(), dim=1)
            scores = (z @ self.prototypes.float().T).chunk(len(crops))
        big = z.detach().chunk(len(crops))[: self.big_crops]
        loss = swav_loss(
            list(scores),
            temperature=self.temperature,
            epsilon=self.epsilon,
            iterations=self.iterations,
            big_crops=self.big_crops,
            queue_scores=self._queue_scores(),
        )
        self._enqueue(big)
        heads = projection.detach().chunk(len(crops))
        self._last = {"projection": heads[0], "projection_b": heads[1], "scores": scores[0].detach()}
        return loss, {}

    @torch.no_grad()
    def _queue_scores(self) -> list[Tensor] | None:
        """This process's part of the queue against the prototypes of now, one (Q/W, K) per big crop."""
        if not self.queue_length or self.queue_filled < self.queue_length:
            return None
        part = self.queue_length // world_size()
        local = self.queue[:, rank() * part : (rank() + 1) * part]
        with torch.autocast(self.queue.device.type, enabled=False):
            return [rows.float() @ self.prototypes.float().T for rows in local]

    @torch.no_grad()
    def _enqueue(self, big: Sequence[Tensor]) -> None:
        """Write the embeddings of all processes over the oldest ones."""
        if not self.training or not self.queue_length or self.updates < self.queue_start:
            return
        new = gather_with_grad(torch.stack(list(big), dim=1))[-self.queue_length :]  # (W·N, big crops, D)
        rows = (self.queue_pointer + torch.arange(len(new), device=new.device)) % self.queue_length
        self.queue[:, rows] = new.transpose(0, 1).to(self.queue.dtype)
        self.queue_pointer.copy_((self.queue_pointer + len(new)) % self.queue_length)
        self.queue_filled.copy_((self.queue_filled + len(new)).clamp(max=self.queue_length))

    def after_backward(self, step: int) -> None:
        """Drop the gradient of frozen prototypes, so that the optimiser skips them and keeps no state for them.

        Taking ``requires_grad`` away instead would leave DistributedDataParallel waiting for their gradient.
        """
        if step < self.freeze_steps:
            self.prototypes.grad = None

    def after_step(self, step: int, total: int) -> None:
        """Count the step and normalise the prototypes again."""
        self.updates.fill_(step + 1)
        if step >= self.freeze_steps:
            self._normalise()

    @torch.no_grad()
    def _normalise(self) -> None:
        self.prototypes.copy_(F.normalize(self.prototypes, dim=1))

    def param_groups(self, optim: OptimConfig) -> list[ParamGroup]:
        """One group: the reference decays and rescales biases and norms as well."""
        return [{"params": list(self.parameters()), "weight_decay": optim.weight_decay}]
