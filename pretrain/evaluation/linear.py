# SPDX-License-Identifier: Apache-2.0
"""Classifiers on frozen features: the papers' linear protocols, and a logistic regression from a few labels per class.

Shapes: `N` queries, `M` training pictures, `D` features, `C` classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.config_views import InputSpec
from pretrain.data.images import ImageSet
from pretrain.engine import distributed
from pretrain.engine.config import OptimConfig
from pretrain.engine.optim import LARS, lr_at
from pretrain.evaluation.features import features, labels, random_crop


class Recipe(NamedTuple):
    """How a paper trains its linear classifier; the learning rate is for a batch of 256."""

    lr: float
    epochs: int
    weight_decay: float = 0.0
    optimizer: str = "sgd"
    nesterov: bool = False
    milestones: tuple[float, ...] = ()  # shares of the run; empty: cosine
    batch: int = 256


PROTOCOLS = {
    "simclr": Recipe(0.1, 90, nesterov=True, batch=4096),  # arXiv:2002.05709, appendix B.6
    "moco": Recipe(30.0, 100, milestones=(0.6, 0.8)),  # arXiv:1911.05722, §4.1
    # arXiv:2006.07733, appendix D.1 (there the best of five learning rates)
    "byol": Recipe(0.2, 80, nesterov=True, batch=1024),
    "swav": Recipe(0.3, 100, weight_decay=1e-6),  # arXiv:2006.09882, appendix; the reference's eval_linear.py
    "simsiam": Recipe(0.1, 90, optimizer="lars", batch=4096),  # the reference's README; the paper's appendix A has .02
    "barlow_twins": Recipe(0.3, 100, weight_decay=1e-6),  # arXiv:2103.03230, §4.1
}


LARGE = 100_000  # pictures; with fewer, LARS and batches of 4,096 have too few steps to get anywhere
SMALL = "swav"
PROTOCOL_OF = {"moco_v1": "moco", "moco_v2": "moco", "byol_gn": "byol", **{name: name for name in PROTOCOLS}}


def protocol_for(method: str, *, pictures: int) -> str:
    """Name of the method's own protocol; with few training pictures, SwAV's."""
    return PROTOCOL_OF.get(method, SMALL) if pictures >= LARGE else SMALL


def linear_classifier(
    backbone: nn.Module,
    train: ImageSet,
    inputs: InputSpec,
    *,
    classes: int,
    protocol: Recipe,
    batch_size: int | None = None,
    epochs: int | None = None,
    augment: bool = True,
    seed: int = 0,
    log: Callable[[str], None] = print,
) -> nn.Linear:
    """Train a linear layer on the frozen backbone.

    Args:
        batch_size: instead of the protocol's; the learning rate follows it.
        augment: fresh random crops and flips in every epoch, as the papers do; otherwise the features of the evaluation
            view are computed once: far quicker, and a little worse.
        epochs: instead of the protocol's.

    Returns:
        the trained layer.
    """
    indices, device = list(range(len(train))), distributed.device_of(backbone)
    target = labels(train, indices).to(device)
    fixed = features(backbone, train, indices if not augment else indices[:1], inputs)
    head = _initial_head(fixed.shape[1], classes, seed).to(device)
    batch_size = min(batch_size or protocol.batch, len(train))
    epochs = epochs or protocol.epochs
    steps = len(train) // batch_size
    lr = protocol.lr * batch_size / 256
    total = epochs * steps
    optimizer, schedule = _optimizer(head, protocol, lr), _schedule(protocol, lr, total)
    for epoch in range(epochs):
        order = np.random.default_rng([seed, epoch]).permutation(len(train))
        for step in range(steps):
            chosen = order[step * batch_size : (step + 1) * batch_size].tolist()
            if augment:
                x = features(
                    backbone, train, chosen, inputs,
                    view=lambda picture, i, epoch=epoch: random_crop(  # type: ignore[misc]
                        picture, inputs.size, seed, epoch, i
                    ),
                )  # fmt: skip
            else:
                x = fixed[chosen]
            for group in optimizer.param_groups:
                group["lr"] = lr_at(epoch * steps + step, schedule, total=total)
            optimizer.zero_grad()
            loss = F.cross_entropy(head(x), target[chosen])
            loss.backward()
            optimizer.step()
        if (epoch + 1) % max(1, epochs // 10) == 0 and distributed.is_main():
            log(f"linear: epoch {epoch + 1}/{epochs}, loss {loss.item():.3f}")
    return head


def _initial_head(dim: int, classes: int, seed: int) -> nn.Linear:
    """Normal weights with a deviation of .01, which MoCo's and SwAV's linear evaluation start from."""
    head = nn.Linear(dim, classes)
    noise = torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        head.weight.copy_(0.01 * noise)
        head.bias.zero_()
    return head


def _optimizer(head: nn.Linear, protocol: Recipe, lr: float) -> torch.optim.Optimizer:
    if protocol.optimizer == "lars":
        return LARS(head.parameters(), lr=lr, weight_decay=protocol.weight_decay)
    return torch.optim.SGD(
        head.parameters(), lr=lr, momentum=0.9, weight_decay=protocol.weight_decay, nesterov=protocol.nesterov
    )


def _schedule(protocol: Recipe, lr: float, total: int) -> OptimConfig:
    """What `lr_at` follows over so many steps; its optimiser plays no part."""
    return OptimConfig(
        name="sgd",
        lr=lr,
        schedule="step" if protocol.milestones else "cosine",
        milestones=tuple(sorted({max(1, round(total * share)) for share in protocol.milestones})),
    )


def few_labels(
    train_MD: Tensor, labels_M: Tensor, test_ND: Tensor, *, classes: int, shots: int, seed: int, decay: float = 1e-3
) -> Tensor:
    """Scores (N, C) of a logistic regression on ``shots`` examples per class (fewer where a class has fewer).

    On unit features with ``decay`` · |W|² / 2 beside the mean cross-entropy, solved to the end by L-BFGS: no step size
    or epochs that would have to be chosen on labels that a few-shot setting does not have.
    """
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(labels_M)))
    chosen = torch.cat([order[labels_M.cpu()[order] == c][:shots] for c in range(classes)])
    x, y = F.normalize(train_MD[chosen], dim=1), labels_M.to(train_MD.device)[chosen]
    weight = torch.zeros(classes, x.shape[1] + 1, device=x.device, requires_grad=True)
    solver = torch.optim.LBFGS([weight], max_iter=200, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        solver.zero_grad()
        logits = x @ weight[:, :-1].T + weight[:, -1]
        loss = F.cross_entropy(logits, y) + decay / 2 * weight[:, :-1].square().sum()
        loss.backward()
        return loss

    solver.step(objective)
    with torch.no_grad():
        return F.normalize(test_ND, dim=1) @ weight[:, :-1].T + weight[:, -1]
