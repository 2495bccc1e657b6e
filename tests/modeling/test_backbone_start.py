# SPDX-License-Identifier: Apache-2.0
"""``backbone_weights=``: a detector starts from what pretrain/ exported, with the same features, or says why not."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d
from torch import nn

from ovd.config import TrainConfig
from ovd.modeling.backbone import build_resnet, load_bottom_up, to_detectron2, verify_conversion
from ovd.training import inputs, rcnn
from pretrain.config_ssl import BackboneConfig
from pretrain.engine.checkpoint import load_model
from pretrain.engine.config import load_config
from pretrain.engine.errors import UserError
from pretrain.engine.state import load_tensors
from pretrain.export import export, read_source
from pretrain.nets.backbones import build_backbone, save_backbone
from pretrain.nets.towers import JointEncoder

PIXELS = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))


def exported(folder: Path, *, norm: str) -> tuple[Path, nn.Module]:
    """A backbone with statistics and weights that are not those of a start."""
    torch.manual_seed(1)
    config = BackboneConfig(name="resnet18", stem="small", norm=norm, zero_init=False)  # type: ignore[arg-type]
    network = build_backbone(config)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        network.train()(PIXELS)
    save_backbone(
        folder, network.eval(), config=config, method="byol_gn" if norm == "gn_ws" else "byol", size=64,
        mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4),
    )  # fmt: skip
    return folder, network


@pytest.mark.parametrize(("norm", "detector_norm"), [("bn", "FrozenBN"), ("bn", "BN"), ("gn_ws", "GN16")])
@pytest.mark.parametrize("through_export", [False, True])
def test_backbone_weights__the_detectors_features_are_the_pretrainings(
    tmp_path: Path, norm: str, detector_norm: str, through_export: bool
) -> None:
    folder, network = exported(tmp_path / "run", norm=norm)
    if through_export:
        export(read_source(str(folder)), to="torchvision", out=tmp_path / "out", pictures=PIXELS)
        folder = tmp_path / "out"
    tensors, look = inputs.backbone_tensors(str(folder), stem="small", norms={"model.backbone.norm": detector_norm})
    assert look == ((0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    stages = ("res2", "res3", "res4", "res5")
    resnet = build_resnet(depth=18, stem="small", norm=detector_norm, out_features=stages, freeze_at=0).eval()
    load_bottom_up(resnet, tensors, source="test")
    source: Any = read_source(str(folder if not through_export else tmp_path / "run")).network
    assert verify_conversion(source.stages, resnet, PIXELS) < 1e-5
    with torch.no_grad():  # and of the network itself: standardised weights were folded
        torch.testing.assert_close(resnet(PIXELS)["res5"].mean((2, 3)), network(PIXELS), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("norm", "detector_norm", "message"),
    [
        ("bn", "GN", "it has batch norms; set model.head.norm=FrozenBN or BN or SyncBN instead of GN"),
        ("bn", "GN16", "it has batch norms"),
        ("gn_ws", "FrozenBN", "it has group norms; set model.head.norm=GN16 instead of FrozenBN"),
        ("gn_ws", "GN", "it has group norms"),  # 32 groups: the tensors would fit
    ],
)
def test_backbone_weights__other_norms_are_refused(tmp_path: Path, norm: str, detector_norm: str, message: str) -> None:
    folder, _ = exported(tmp_path, norm=norm)
    with pytest.raises(UserError, match=message):
        inputs.backbone_tensors(str(folder), stem="small", norms={"model.head.norm": detector_norm})


def test_backbone_weights__another_stem_is_refused(tmp_path: Path) -> None:
    folder, _ = exported(tmp_path, norm="bn")
    with pytest.raises(UserError, match=r"its stem is small; set model\.backbone\.stem=small"):
        inputs.backbone_tensors(str(folder), stem="imagenet", norms={})


@pytest.mark.parametrize(("norm", "detector_norm"), [("bn", "BN"), ("gn_ws", "GN16")])
def test_backbone_weights__a_training_starts_from_them_region_head_included(
    tmp_path: Path, norm: str, detector_norm: str
) -> None:
    folder, _ = exported(tmp_path / "run", norm=norm)
    config = load_config(
        TrainConfig,
        "mask_rcnn.yaml",
        ["model.variant=text", f"backbone_weights={folder}", f"model.backbone.norm={detector_norm}",
         f"model.head.norm={detector_norm}", "model.backbone.freeze_at=0", "data.length=2", "data.size=96",
         f"out={tmp_path / 'detector'}"],
    )  # fmt: skip
    parts = rcnn.build(config)
    model: Any = parts.model
    own: Any = read_source(str(folder)).network
    assert torch.equal(model.backbone.stem.conv1.weight, own.conv1.weight)
    assert torch.equal(model.roi_heads.region_head.body[0].conv1.weight, own.layer4[0].conv1.weight)
    assert parts.pixel_mean == pytest.approx([102.0, 127.5, 153.0])  # colours as the backbone was trained on
    loss, _ = parts.task.train()([parts.source.sample(0, 0), parts.source.sample(1, 0)])
    loss.backward()
    assert bool(torch.isfinite(loss)) and model.backbone.stem.conv1.weight.grad is not None


# --- what is not loaded stays as it was


def test_frozen_norms__keep_their_statistics_when_other_tensors_are_loaded() -> None:
    """Detectron2 takes a dictionary without them for an old file, and sets them to zero and one."""
    model = nn.ModuleDict({"frozen": FrozenBatchNorm2d(3), "learned": nn.Linear(2, 2)})
    statistics = torch.tensor([4.0, 5.0, 6.0])
    model["frozen"].running_var.copy_(statistics)
    new = {"learned.weight": torch.ones(2, 2), "learned.bias": torch.ones(2)}
    load_tensors(model, new, source="here", strict="file")
    assert torch.equal(model["frozen"].running_var, statistics) and bool((model["learned"].weight == 1).all())
    load_model(model, {k: 2 * v for k, v in new.items()}, untracked=("frozen.",), where=Path("run"))
    assert torch.equal(model["frozen"].running_var, statistics) and bool((model["learned"].weight == 2).all())


def test_vild__starts_from_the_proposal_detector_and_its_region_head_from_clip(tmp_path: Path) -> None:
    small = ["data.length=2", "data.size=96", f"out={tmp_path}"]
    first = load_config(TrainConfig, "mask_rcnn.yaml", small)
    parts = rcnn.build(first)
    rcnn.export(first, parts, tmp_path / "exported")
    second = load_config(TrainConfig, "vild_text.yaml", [*small, f"weights={tmp_path / 'exported'}"])
    parts = rcnn.build(second)
    model: Any = parts.model
    visual: Any = parts.encoder.visual
    expected = {
        name.removeprefix("res5."): value
        for name, value in to_detectron2(visual.backbone.state_dict()).items()
        if name.startswith("res5.")
    }
    found = model.roi_heads.region_head.body.state_dict()
    assert len(expected) > 20 and {name for name in found if "num_batches" not in name} <= set(expected)
    for name, value in found.items():
        if "num_batches" not in name:
            assert torch.equal(value, expected[name]), name
    # As a whole: a region of CLIP's own features is embedded as CLIP embeds the picture.
    pixels = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        _, embedded = model.eval().roi_heads.region_head(visual.backbone.stages(pixels)["layer3"])
        torch.testing.assert_close(embedded, visual(pixels), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("network", ["model.backbone.stem=small", "model.backbone.name=timm:resnet18"])
def test_backbone_weights__missing_ones_are_named_by_their_key(network: str) -> None:
    config = load_config(
        TrainConfig, Path(__file__).parents[2] / "configs/mask_rcnn.yaml", [network, "backbone_weights=no/such"]
    )
    encoder = cast(JointEncoder, SimpleNamespace(image_mean=(0.5,) * 3, image_std=(0.5,) * 3))
    with pytest.raises(UserError, match=r"backbone_weights=no/such: no such file or folder; give a folder written by"):
        inputs.initial_backbone(config.model.backbone, config.backbone_weights, encoder, norms={})
