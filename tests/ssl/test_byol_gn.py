# SPDX-License-Identifier: Apache-2.0
"""BYOL without batch statistics: nothing anywhere looks at the batch, and folding changes no feature."""

from __future__ import annotations

import torch
from torch import nn

from pretrain.config_ssl import BackboneConfig, ByolMethod
from pretrain.config_views import ViewConfig
from pretrain.engine.optim import LARS, default_groups
from pretrain.methods.build import build_method
from pretrain.methods.byol import BYOL
from pretrain.nets.standardised import StandardisedConv2d, StandardisedLinear, folded, without_batch_norm
from tests.ssl.small import Views, as_float


def task() -> BYOL:
    torch.manual_seed(0)
    config = ByolMethod(
        name="byol_gn",
        backbone=BackboneConfig(name="resnet18", stem="small", norm="gn_ws"),
        views=(ViewConfig(size=32, count=2),),
        hidden=32,
        dim=16,
    )
    made = build_method(config, batch_size=8, device=torch.device("cpu"))
    assert isinstance(made, BYOL)
    return made


def test_byol_gn__no_module_of_either_network_has_batch_statistics() -> None:
    made = task()
    kinds = {type(m) for m in made.modules()}
    assert not [kind for kind in kinds if issubclass(kind, nn.modules.batchnorm._BatchNorm)]
    assert StandardisedConv2d in kinds and StandardisedLinear in kinds and nn.GroupNorm in kinds
    assert nn.Conv2d not in kinds, "every convolution is standardised"
    assert list(made.named_buffers()) == [], "no running statistics"


def test_byol_gn__the_output_of_one_picture_does_not_depend_on_the_others() -> None:
    made = task().train()
    pixels = as_float(Views((32,)).batch(6)["views"][0])
    with torch.no_grad():
        alone = made.predictor(made.projector(made.backbone(pixels[:1])))
        together = made.predictor(made.projector(made.backbone(pixels)))[:1]
        target = made.target_projector(made.target_backbone(pixels[:1]))
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        target, made.target_projector(made.target_backbone(pixels))[:1].detach(), rtol=1e-4, atol=1e-5
    )


def test_weight_standardisation__folds_to_plain_convolutions_with_the_same_features() -> None:
    made, views = task(), Views((32, 32))
    optimizer = LARS(default_groups(made.named_parameters(), weight_decay=1e-6), lr=1.0)
    for step in range(2):
        optimizer.zero_grad()
        made(views.batch(4, first=4 * step))[0].backward()
        optimizer.step()
        made.after_step(step, 2)
    plain = folded(made.backbone)
    assert {type(m) for m in plain.modules() if isinstance(m, nn.Conv2d)} == {nn.Conv2d}
    assert any(isinstance(m, StandardisedConv2d) for m in made.backbone.modules()), "the trained one stays as it was"
    pixels = as_float(views.batch(3)["views"][0])
    torch.testing.assert_close(plain(pixels), made.backbone(pixels), rtol=1e-5, atol=1e-5)
    assert list(plain.state_dict()) == list(made.backbone.state_dict())


def test_fold__keeps_activations_inside_norms() -> None:
    from timm.layers import BatchNormAct2d

    network = nn.Sequential(nn.Conv2d(3, 16, 1), BatchNormAct2d(16))
    out = without_batch_norm(network)(torch.randn(2, 3, 8, 8))
    assert float(out.min()) == 0.0 and not any(
        isinstance(m, nn.modules.batchnorm._BatchNorm) for m in network.modules()
    )
