# SPDX-License-Identifier: Apache-2.0
"""Networks of timm and torchvision as backbones: stages, weights, training, export, refusals; weights are random."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor

from ovd.config import DetectorBackboneConfig, ModelConfig, TrainConfig
from ovd.config_detr import DetrTrainConfig
from ovd.modeling.backbone import build_bottom_up, build_fpn, load_bottom_up
from ovd.modeling.library_network import open_network, read_library_weights
from ovd.modeling.load import load_detector_model
from ovd.training import detr, rcnn
from pretrain.config_ssl import BackboneConfig as PretrainBackbone
from pretrain.engine.checkpoint import save_weights
from pretrain.engine.config import ConfigError, config_hash, load_config
from pretrain.engine.errors import UserError
from pretrain.nets.backbones import build_backbone, save_backbone

NAME = "timm:test_efficientnet"  # timm's own network for tests: small, of Lite2's family
NETWORKS = (
    NAME, "timm:tf_efficientnet_lite2", "timm:mobilenetv3_small_050", "timm:convnext_atto", "timm:regnetx_002",
    "timm:resnetv2_18", "torchvision:mobilenet_v2", "torchvision:regnet_y_400mf", "torchvision:shufflenet_v2_x0_5",
)  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_any_backbone__features_are_the_networks_at_the_stated_strides(name: str) -> None:
    torch.manual_seed(0)
    wanted = ("res3", "res4", "res5")
    ours = build_bottom_up(DetectorBackboneConfig(name=name, norm="BN"), out_features=wanted).eval()
    pixels = torch.randn(2, 3, 96, 160)
    with torch.no_grad():
        maps = ours(pixels)
    for stage, shape in ours.output_shape().items():
        assert maps[stage].shape == (2, shape.channels, 96 // shape.stride, 160 // shape.stride)
    if name.startswith("timm:"):  # against timm's own pyramid, with the same weights
        theirs = timm.create_model(name.removeprefix("timm:"), features_only=True, pretrained=False).eval()
        state = ours.state_dict()
        named = {key.removeprefix("network."): value for key, value in state.items()}
        flat = {key: named[key if key in named else key.replace("_", ".", 1)] for key in theirs.state_dict()}
        theirs.load_state_dict(flat)
        with torch.no_grad():
            expected = dict(zip(theirs.feature_info.reduction(), theirs(pixels), strict=True))
        for stage, shape in ours.output_shape().items():
            torch.testing.assert_close(maps[stage], expected[shape.stride])


def test_any_backbone__a_pyramid_and_its_frozen_stages() -> None:
    bottom_up = build_bottom_up(
        DetectorBackboneConfig(name=NAME, norm="BN", freeze_at=3), out_features=("res3", "res4")
    )
    fpn = build_fpn(bottom_up, in_features=("res3", "res4"), channels=16, norm="")
    assert {name: shape.stride for name, shape in fpn.output_shape().items()} == {"p3": 8, "p4": 16, "p5": 32}
    before = {name: value.clone() for name, value in bottom_up.state_dict().items()}
    optimiser = torch.optim.SGD([p for p in fpn.parameters() if p.requires_grad], 0.1)
    sum(maps.square().mean() for maps in fpn.train()(torch.randn(2, 3, 64, 64)).values()).backward()
    optimiser.step()
    changed = {name for name, value in bottom_up.state_dict().items() if not torch.equal(value, before[name])}
    parts = [part.path for part in open_network(NAME).parts]
    moved = {next(n for n, path in enumerate(parts) if f"network.{path}." in name) for name in changed}
    end = open_network(NAME).end("res3")
    assert moved == set(range(end, len(bottom_up.network.paths)))  # statistics of its norms too


def tensors_of(name: str) -> dict[str, Tensor]:
    torch.manual_seed(3)
    network = timm.create_model(name.removeprefix("timm:"), pretrained=False)
    return {key: torch.rand_like(v) * 0.2 if v.is_floating_point() else v for key, v in network.state_dict().items()}


@pytest.mark.parametrize("kind", ["file", "timm folder", "pretrained"])
def test_any_backbone__weights_come_from_a_file_a_timm_folder_or_a_pretraining(tmp_path: Path, kind: str) -> None:
    tensors, path, look = tensors_of(NAME), tmp_path / "weights.safetensors", None
    if kind == "file":
        save_weights(path, tensors, {})
    elif kind == "timm folder":
        path, look = tmp_path, ((0.5, 0.4, 0.3), (0.2, 0.2, 0.2))
        save_weights(tmp_path / "model.safetensors", tensors, {})
        info = {"architecture": "test_efficientnet", "pretrained_cfg": {"mean": look[0], "std": look[1]}}
        (tmp_path / "config.json").write_text(json.dumps(info))
    else:
        path, look = tmp_path, ((0.5, 0.4, 0.3), (0.2, 0.2, 0.2))
        config = PretrainBackbone(name=NAME)
        network = build_backbone(config, sizes=[64])
        network.network.load_state_dict(tensors, strict=False)  # type: ignore[union-attr, operator]
        save_backbone(tmp_path, network, config=config, method="simclr", size=64, mean=look[0], std=look[1])
    state, trained_on = read_library_weights(str(path), NAME)
    assert trained_on == look
    bottom_up = build_bottom_up(DetectorBackboneConfig(name=NAME), out_features=("res4",))
    report = load_bottom_up(bottom_up, state, source=str(path))
    for name, value in bottom_up.network.state_dict().items():
        assert torch.equal(value, tensors[name]), name
    assert "conv_head.weight" in report.unexpected and not report.other_shape
    with pytest.raises(UserError, match="does not fit this model: 0 of"):
        load_bottom_up(
            build_bottom_up(DetectorBackboneConfig(name="timm:regnetx_002"), out_features=("res4",)), state, source="x"
        )
    if kind != "file":
        with pytest.raises(UserError, match=f"weights of {NAME}; set model.backbone.name={NAME}"):
            read_library_weights(str(path), "timm:regnetx_002")


SMALL = [
    f"model.backbone.name={NAME}", "data.length=2", "data.size=96", "data.short_side=96", "encoder=clip-sticker",
]  # fmt: skip
FPN = [
    "model.backbone.kind=fpn", "model.backbone.fpn_levels=[res3, res4]", "model.backbone.fpn_channels=16",
    "model.proposals.anchor_sizes=[[24], [48], [80]]", "model.head.conv_dims=[16]", "model.head.fc_dims=[32]",
    "model.head.detail=null", 'model.head.norm=""', "model.head.mask_dims=[16, 16]", 'model.head.mask_norm=""',
]  # fmt: skip


@pytest.mark.parametrize("form", ["c4", "fpn"])
def test_any_backbone__trains_a_step_exports_and_loads(tmp_path: Path, form: str) -> None:
    tensors = tensors_of(NAME)
    save_weights(tmp_path / "lite.safetensors", tensors, {})
    extra = FPN if form == "fpn" else []
    config = load_config(
        TrainConfig, "vild_text.yaml",
        [*SMALL, *extra, "weights=null", f"backbone_weights={tmp_path / 'lite.safetensors'}", f"out={tmp_path / 'run'}",
         "model.backbone.pixel_mean=[127, 127, 127]", "model.backbone.pixel_std=[128, 128, 128]"],
    )  # fmt: skip
    parts = rcnn.build(config)
    model: Any = parts.model
    network = model.backbone.network if form == "c4" else model.backbone.bottom_up.network
    assert torch.equal(network.state_dict()["conv_stem.weight"], tensors["conv_stem.weight"])
    if form == "c4":  # the head goes on where the backbone ends, up to the features that the library classifies
        body = model.roi_heads.region_head.body.state_dict()
        assert {*network.state_dict(), *body} == {key for key in tensors if not key.startswith("classifier.")} - {
            key for key in tensors if key.endswith("num_batches_tracked")
        }
        assert torch.equal(body["conv_head.weight"], tensors["conv_head.weight"])
    assert model.pixel_mean.flatten().tolist() == [127.0] * 3 and model.pixel_std.flatten().tolist() == [128.0] * 3
    task = parts.task.train()
    loss, _ = task([parts.source.sample(0, 0), parts.source.sample(1, 0)])
    loss.backward()
    assert bool(torch.isfinite(loss))
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    rcnn.export(config, parts, tmp_path / "exported")
    image = np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)
    loaded = load_detector_model(tmp_path / "exported")
    wanted = model.half().float().eval()([{"image": torch.from_numpy(image).permute(2, 0, 1)}])[0]
    torch.testing.assert_close(torch.from_numpy(loaded.regions(image).text), wanted.text[:150], atol=1e-3, rtol=1e-3)
    assert loaded.card.pixel_mean == (127.0,) * 3
    again = load_config(
        TrainConfig, "vild_text.yaml", [*SMALL, *extra, f"weights={tmp_path / 'exported'}", f"out={tmp_path / 'b'}"]
    )
    assert rcnn.build(again).pixel_mean == [127.0] * 3  # pixels as that detector's backbone knows them


def test_library_backbone__works_in_detr(tmp_path: Path) -> None:
    save_weights(tmp_path / "lite.safetensors", tensors_of(NAME), {})
    given = [*SMALL, "weights=null", "cache=null", f"out={tmp_path / 'run'}", "model.backbone.features=[res4, res5]"]
    with pytest.raises(UserError, match="nothing is downloaded.*backbone_weights"):
        detr.build(load_config(DetrTrainConfig, "detr.yaml", given))
    config = load_config(
        DetrTrainConfig, "detr.yaml",
        [*given, f"backbone_weights={tmp_path / 'lite.safetensors'}", "model.region_tower=true"],
    )  # fmt: skip
    parts = detr.build(config)
    statistics = timm.get_pretrained_cfg("test_efficientnet").mean
    assert parts.pixel_mean == pytest.approx([255 * v for v in statistics])
    loss, _ = parts.task.train()([parts.source.sample(0, 0), parts.source.sample(1, 0)])
    loss.backward()
    assert bool(torch.isfinite(loss)) and parts.model.region_tower.projection.weight.grad is not None
    detr.export(config, parts, tmp_path / "exported")
    image = np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)
    assert len(load_detector_model(tmp_path / "exported").regions(image))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm:vit_tiny_patch16_224", "no feature pyramid .it takes pictures of 224 pixels only.*such as timm:tf_eff"),
        ("torchvision:vit_b_16", "gives no feature pyramid"),
        ("timm:hrnet_w18_small", "gives no feature pyramid .no part of it has a map of stride 16"),
        ("timm:tf_efficientnet_lite99", "timm has no network .*did you mean tf_efficientnet_lite4"),
        ("torchvision:resnet19", "torchvision has no network .*did you mean resnet1"),
    ],
)
def test_any_backbone__networks_without_a_pyramid_are_refused_in_one_line(name: str, message: str) -> None:
    with pytest.raises(UserError, match=f"^model.backbone.name: .*{message}") as caught:
        open_network(name)
    assert "\n" not in str(caught.value)


def test_any_backbone__a_stage_that_a_network_lacks_is_named() -> None:
    with pytest.raises(UserError, match=r"timm:resnet18_x has no map of stride 32 \(res5\); it has res4 \(stride 16\)"):
        from ovd.modeling.library_network import LibraryNetwork

        LibraryNetwork(name="timm:resnet18_x", parts=(), ends={"res4": 1}, statistics=((0.5,), (0.5,))).end("res5")


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        ({"name": "keras:resnet"}, "unknown backbone 'keras:resnet'; known are resnet, timm:NAME"),
        ({"name": "timm:"}, "unknown backbone"),
        ({"name": NAME, "norm": "GN"}, r"backbone\.norm 'GN' is for our ResNets"),
        ({"pixel_mean": (1, 2, 3)}, "pixel_mean and pixel_std belong together"),
        ({"pixel_mean": (1, 2, 3), "pixel_std": (0, 1, 1)}, "greater than 0"),
    ],
)
def test_library_backbone__contradictory_config_is_refused(backbone: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig.model_validate({"backbone": backbone, "proposals": {"anchor_sizes": ((24.0,),)}})


def test_any_backbone__without_weights_the_training_says_what_to_give(tmp_path: Path) -> None:
    given = [*SMALL, f"out={tmp_path}"]
    with pytest.raises(
        UserError, match="nothing is downloaded.*backbone_weights.*or begin with backbone_start=scratch"
    ):
        rcnn.build(load_config(TrainConfig, "mask_rcnn.yaml", given))
    parts = rcnn.build(load_config(TrainConfig, "mask_rcnn.yaml", [*given, "backbone_start=scratch"]))
    assert parts.task.pretrained_prefixes == ()
    with pytest.raises(ConfigError, match=r"model\.backbone\.name"):
        load_config(TrainConfig, "mask_rcnn.yaml", [f"out={tmp_path}", "model.backbone.name=timm"])


def test_config_hash__of_a_resnets_configuration_is_unchanged() -> None:
    config = load_config(TrainConfig, "mask_rcnn.yaml", ["out=x"])
    other = load_config(TrainConfig, "mask_rcnn.yaml", ["out=x", f"model.backbone.name={NAME}"])
    assert config_hash(config) == "cfb2ce4a9dc5" != config_hash(other)
