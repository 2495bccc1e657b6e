# SPDX-License-Identifier: Apache-2.0
"""Other libraries' backbones at the size of the views: built for it, or refused with the reason, never a traceback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.config_ssl import BackboneConfig
from pretrain.engine.errors import UserError
from pretrain.methods.build import build_method
from pretrain.nets.backbones import build_backbone, load_backbone, problem_with, save_backbone
from tests.ssl.ssl_cases import section

VIT = "timm:vit_tiny_patch16_224"


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        (VIT, [64]),
        (VIT, [64, 32]),  # big and small crops: the places of the patches are moved
        ("timm:swin_tiny_patch4_window7_224", [64]),
        ("timm:convnext_atto", [64]),
        ("torchvision:vit_b_16", [32]),
        ("torchvision:mobilenet_v3_small", [64, 32]),
    ],
)
def test_backbone__takes_every_size_of_the_views(name: str, sizes: list[int]) -> None:
    backbone = build_backbone(BackboneConfig(name=name), sizes=sizes)
    assert backbone.training, "as it was built: the trial leaves no trace"
    for size in sizes:
        assert backbone.eval()(torch.rand(2, 3, size, size)).shape == (2, backbone.width)


@pytest.mark.parametrize(
    ("name", "sizes", "said"),
    [
        ("timm:convnext_atto", [16], "cannot take pictures of 16 pixels .*Kernel size"),
        ("torchvision:vgg11", [8], "cannot take pictures of 8 pixels .*too small"),
        (VIT, [8], "cannot take pictures of 8 pixels"),
        ("torchvision:vit_b_16", [40], "cannot take pictures of 40 pixels .*patch size"),
        ("torchvision:vit_b_16", [64, 32], "cannot take pictures of 32 pixels"),
        ("timm:mixer_s32_224", [64, 32], r"takes pictures of one size only; method\.views has \[32, 64\]"),
    ],
)
def test_backbone__views_that_it_cannot_take_are_named_with_the_reason(name: str, sizes: list[int], said: str) -> None:
    with pytest.raises(UserError, match=f"method.backbone.name.*{said}"):
        build_backbone(BackboneConfig(name=name), sizes=sizes)


@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize(
    ("name", "last"), [("torchvision:resnet18", "bn2"), ("timm:resnet18", "bn2"), ("timm:resnet50", "bn3")]
)
def test_zero_init__residual_blocks_of_other_libraries_start_as_the_config_says(
    name: str, last: str, zero: bool
) -> None:
    backbone = build_backbone(BackboneConfig(name=name, zero_init=zero), sizes=[64])
    gains = [p for key, p in backbone.named_parameters() if key.endswith(f"{last}.weight") and ".layer" in key]
    assert len(gains) in (8, 16) and all(bool((gain == (0 if zero else 1)).all()) for gain in gains)


def test_stem__one_that_another_library_does_not_take_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    build_backbone(BackboneConfig(name="timm:resnet18", stem="small"), sizes=[64])
    assert "stem: small is for our ResNets; timm:resnet18 has its own" in capsys.readouterr().err
    build_backbone(BackboneConfig(name="resnet18", stem="small"), sizes=[64])
    assert capsys.readouterr().err == ""


def test_timm__an_unknown_tag_is_named() -> None:
    with pytest.raises(UserError, match=r"method\.backbone\.name: timm:vit_tiny_patch16_224\.foo: .*tag"):
        build_backbone(BackboneConfig(name="timm:vit_tiny_patch16_224.foo"))


def test_vit__of_small_pictures_is_saved_and_loaded(tmp_path: Path) -> None:
    config = BackboneConfig(name=VIT)
    net = build_backbone(config, sizes=[32]).eval()
    save_backbone(tmp_path, net, config=config, method="simsiam", size=32, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    loaded, _ = load_backbone(tmp_path)
    pixels = torch.rand(2, 3, 32, 32)
    assert torch.equal(net(pixels), loaded(pixels))
    assert problem_with(loaded, 32) is None
    assert "64" in str(problem_with(loaded, 64))


@pytest.mark.parametrize("method", ["swav", "moco_v2"])
def test_vit__learns_from_crops_of_two_sizes_without_batch_norm(method: str) -> None:
    torch.manual_seed(0)
    views: list[dict[str, Any]] = [{"size": 32, "count": 2}]
    if method == "swav":
        views.append({"size": 16, "count": 2})
    chosen = section(method, backbone={"name": VIT}, views=views)
    task = build_method(chosen, batch_size=8, device=torch.device("cpu"))
    pixels = [torch.randint(0, 256, (8, 3, v["size"], v["size"]), dtype=torch.uint8) for v in views for _ in range(2)]
    loss, _ = task({"views": pixels, "index": torch.arange(8)})
    loss.backward()
    place = dict(task.backbone.named_parameters())["network.pos_embed"]  # type: ignore[operator,union-attr]
    assert place.grad is not None and place.grad.abs().sum() > 0
