# SPDX-License-Identifier: Apache-2.0
"""SimSiam as alternating optimisation (arXiv:2011.10566, §5.2): several steps of θ with fixed targets η learn as well.

`alternate_K`: the targets of K steps come from the network as it was before the first of them. K = 1 is SimSiam.
"""

from __future__ import annotations

from typing import Any

import torch
from common import VIEW, WIDTH, augment, experiment, lines, network
from torch import Tensor

from pretrain.data.crops import ViewBatch
from pretrain.losses import negative_cosine
from pretrain.methods.simsiam import SimSiam
from pretrain.nets.ema import ema_update, momentum_copy
from pretrain.nets.heads import mlp

VIEWS = [VIEW, VIEW]


class Alternating(SimSiam):
    """SimSiam whose targets come from a copy of the network that is renewed every ``steps`` steps."""

    def __init__(self, *, steps: int, **parts: Any) -> None:
        super().__init__(**parts)
        self.steps = steps
        self.fixed_backbone, self.fixed_projector = momentum_copy(self.backbone), momentum_copy(self.projector)

    def forward(self, batch: ViewBatch) -> tuple[Tensor, dict[str, Tensor]]:
        a, b = self.augmented(batch)
        z_a, z_b = self.projector(self.backbone(a)), self.projector(self.backbone(b))
        with torch.no_grad():
            eta_a, eta_b = (self.fixed_projector(self.fixed_backbone(view)) for view in (a, b))
        self._last = {"projection": z_a.detach(), "projection_b": z_b.detach()}
        return (negative_cosine(self.predictor(z_a), eta_b) + negative_cosine(self.predictor(z_b), eta_a)) / 2, {}

    def after_step(self, step: int, total: int) -> None:
        if (step + 1) % self.steps == 0:
            ema_update(self.fixed_backbone, self.backbone, momentum=0.0)
            ema_update(self.fixed_projector, self.projector, momentum=0.0)


def make(steps: int) -> Alternating:
    return Alternating(
        steps=steps,
        backbone=network(),
        projector=mlp((WIDTH, 256, 256), last_norm="plain"),
        predictor=mlp((256, 64, 256), last_bias=True),
        augment=augment(VIEWS),
    )


def case(every: int) -> Any:
    return lambda steps: {
        "make": lambda: make(every), "steps": steps or 600, "views": VIEWS, "optim": {"lr": 0.1},
    }  # fmt: skip


CASES = {f"alternate_{every}": case(every) for every in (1, 10, 50)}


def main(argv: list[str] | None = None) -> None:
    torch.set_num_threads(1)
    experiment(
        "simsiam_alternating",
        __doc__,
        CASES,
        plot=lambda axes, results: lines(axes, results, "steps with the same targets"),
        argv=argv,
    )


if __name__ == "__main__":
    main()
