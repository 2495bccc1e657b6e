# SPDX-License-Identifier: Apache-2.0
"""What one method is when another's particulars are taken away: the same numbers, so the parts are shared."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.losses import clip_contrastive, sinkhorn, swav_loss
from pretrain.methods.byol import BYOL
from pretrain.methods.moco import MoCo
from pretrain.methods.simclr import SimCLR
from pretrain.methods.simsiam import SimSiam
from pretrain.methods.swav import SwAV
from pretrain.nets.heads import mlp
from tests.ssl.small import Views

SIDE, WIDTH, DIM = 6, 10, 8


def pixels_of(pixels: Tensor) -> Tensor:
    return pixels.double() / 255 - 0.5


AUGMENT = (pixels_of, pixels_of)


def backbone() -> nn.Module:
    """Without batch norm: SimCLR passes both views together, SimSiam and MoCo one by one."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE * SIDE, WIDTH), nn.Tanh()).double()


def projector() -> nn.Module:
    torch.manual_seed(1)
    return nn.Linear(WIDTH, DIM).double()


def batch(first: int = 0, count: int = 8) -> dict[str, Any]:
    return Views((SIDE, SIDE)).batch(count, first)


def gradients(loss: Tensor, *modules: nn.Module) -> Tensor:
    """Of the parameters of the modules, as one vector."""
    parameters = [p for module in modules for p in module.parameters()]
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, retain_graph=True)])


def embeddings(task: Any, images: dict[str, Any]) -> list[Tensor]:
    return [task.projector(task.backbone(pixels_of(view))) for view in images["views"]]


def cosines(left: Tensor, right: Tensor) -> Tensor:
    return F.normalize(left, dim=1) @ F.normalize(right, dim=1).T


def test_byol__without_momentum_on_simsiams_heads_is_simsiam() -> None:
    """BYOL is 4 + 4 x SimSiam, over several steps: its target is the online network with the gradient stopped."""
    tasks: list[Any] = []
    for method in (BYOL, SimSiam):
        torch.manual_seed(3)
        heads = {
            "projector": mlp([WIDTH, DIM, DIM, DIM], last_norm="plain").double(),
            "predictor": mlp([DIM, 4, DIM], last_bias=True).double(),
        }
        only: dict[str, Any] = {"momentum": 0.0} if method is BYOL else {}
        tasks.append(method(backbone=backbone(), augment=AUGMENT, **heads, **only).train())
    byol, simsiam = tasks
    start = simsiam.backbone[1].weight.detach().clone()
    for number in range(4):
        images = batch(first=8 * number)
        learnt = [[task.backbone, task.projector, task.predictor] for task in tasks]
        (ours, _), (theirs, _) = byol(images), simsiam(images)
        assert ours.item() == pytest.approx(4 + 4 * theirs.item(), rel=1e-10)
        of_byol, of_simsiam = gradients(ours, *learnt[0]), gradients(theirs, *learnt[1])
        torch.testing.assert_close(of_byol, 4 * of_simsiam, rtol=1e-8, atol=1e-10)
        for modules, gradient in zip(learnt, (of_byol / 4, of_simsiam), strict=True):
            parameters = [p for module in modules for p in module.parameters()]
            with torch.no_grad():
                vector = nn.utils.parameters_to_vector(parameters) - 0.5 * gradient
                nn.utils.vector_to_parameters(vector, parameters)
        byol.after_step(0, 10)  # the first step of the schedule, again and again: momentum 0
    assert (simsiam.backbone[1].weight - start).abs().max() > 1e-3


def test_simsiam__without_predictor_and_stop_gradient_plus_negatives_is_simclr() -> None:
    temperature = 0.2
    simsiam = SimSiam(
        backbone=backbone(), projector=projector(), predictor=nn.Identity(), augment=AUGMENT, stop_gradient=False
    )
    simclr = SimCLR(backbone=backbone(), projector=projector(), augment=AUGMENT, temperature=temperature)
    images = batch()
    attraction, _ = simsiam(images)
    z = torch.cat(embeddings(simsiam, images))
    others = ~torch.eye(len(z), dtype=torch.bool)
    similarities = cosines(z, z)[others].view(16, 15)
    repulsion = (similarities / temperature).exp().sum(1).log()
    ours = attraction / temperature + repulsion.mean()
    theirs, _ = simclr(images)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-10)
    torch.testing.assert_close(
        gradients(ours, simsiam.backbone, simsiam.projector), gradients(theirs, simclr.backbone, simclr.projector)
    )
    alone = gradients(attraction / temperature, simsiam.backbone, simsiam.projector)
    assert F.cosine_similarity(alone, gradients(theirs, simclr.backbone, simclr.projector), dim=0) < 0.99


def test_moco__with_a_queue_of_the_batch_and_no_momentum_is_infonce() -> None:
    """A query's queue: the other keys of its batch. Then a query chooses among the keys of the batch."""
    temperature = 0.2
    moco = MoCo(
        backbone=backbone(), projector=projector(), augment=AUGMENT, dim=DIM, queue=7, momentum=0.0,
        temperature=temperature,
    ).train()  # fmt: skip
    with torch.no_grad():
        for parameter in moco.backbone.parameters():
            parameter.mul_(1.5)  # as an optimiser's step would; the momentum encoder lags behind until it is moved
    moco.after_step(0, 1)
    images = batch()
    z_a, z_b = embeddings(moco, images)
    keys = F.normalize(z_b.detach(), dim=1)
    infonce = F.cross_entropy(cosines(z_a, keys) / temperature, torch.arange(8))
    total = torch.zeros((), dtype=torch.float64)
    for i in range(8):
        moco.queue.copy_(torch.cat([keys[:i], keys[i + 1 :]]))
        loss, _ = moco({"views": [view[i : i + 1] for view in images["views"]]})
        total = total + loss / 8
    assert total.item() == pytest.approx(infonce.item(), rel=1e-5)  # keys are float32 in the queue
    ours, theirs = (gradients(loss, moco.backbone, moco.projector) for loss in (total, infonce))
    assert F.cosine_similarity(ours, theirs, dim=0) > 1 - 1e-8
    assert ours.norm() / theirs.norm() == pytest.approx(1, abs=1e-5)
    other = F.cross_entropy(cosines(z_b, z_a) / temperature, torch.arange(8))
    clip = clip_contrastive(z_a, z_b, torch.tensor(math.log(1 / temperature), dtype=torch.float64))
    assert clip.item() == pytest.approx((total.item() + other.item()) / 2, rel=1e-5)  # CLIP: both directions of it


def test_moco__the_whole_batch_in_the_queue_counts_the_right_key_once_more() -> None:
    temperature = 0.2
    moco = MoCo(
        backbone=backbone(), projector=projector(), augment=AUGMENT, dim=DIM, queue=8, momentum=0.0,
        temperature=temperature,
    ).train()  # fmt: skip
    images = batch()
    moco(images)  # fills the queue with the keys of this batch
    loss, _ = moco(images)
    z_a, z_b = embeddings(moco, images)
    logits = cosines(z_a, z_b.detach()) / temperature
    right = logits.diagonal()
    expected = (logits.exp().sum(1) + right.exp()).log() - right
    assert loss.item() == pytest.approx(expected.mean().item(), rel=1e-5)


def test_swav__with_one_hot_codes_is_a_softmax_over_prototypes() -> None:
    """Hard codes make it classification: the prototypes are the rows of a classifier of unit features."""
    temperature = 0.1
    torch.manual_seed(5)
    swav: Any = SwAV(
        backbone=backbone(), projector=projector(), augment=AUGMENT, dim=DIM, prototypes=4, temperature=temperature,
        epsilon=1e-4, iterations=50,
    ).double().train()  # fmt: skip
    images = batch(count=16)
    scores = [F.normalize(z, dim=1) @ swav.prototypes.T for z in embeddings(swav, images)]
    codes = [sinkhorn(one.detach().float(), epsilon=1e-4, iterations=50) for one in scores]
    labels = [code.argmax(1) for code in codes]
    classify = sum(F.cross_entropy(scores[1 - i] / temperature, labels[i]) for i in range(2)) / 2
    given = swav_loss(
        scores, temperature=temperature, epsilon=1.0, iterations=1, codes=[F.one_hot(one, 4) for one in labels]
    )
    assert given.item() == pytest.approx(classify.item(), rel=1e-10)  # type: ignore[union-attr]
    learnt = [swav.backbone, swav.projector]
    torch.testing.assert_close(gradients(given, *learnt), gradients(classify, *learnt))  # type: ignore[arg-type]
    assert all(code.max(1).values.min() > 0.999 for code in codes)  # so small an epsilon makes them hard by itself
    loss, _ = swav(images)
    assert loss.item() == pytest.approx(given.item(), rel=1e-3)
    assert F.cosine_similarity(gradients(loss, *learnt), gradients(given, *learnt), dim=0) > 1 - 1e-4
