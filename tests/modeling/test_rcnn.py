# SPDX-License-Identifier: Apache-2.0
"""The Detectron2 assembly: conversion, variants, gradients, moving regions, saving."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.layers import ROIAlign, ShapeSpec
from detectron2.modeling.roi_heads.mask_head import MaskRCNNConvUpsampleHead
from detectron2.structures import BitMasks, Boxes, Instances
from torch import nn

from ovd.config import CutConfig, ModelConfig
from ovd.data.catalog import Labelled
from ovd.data.mapper import DetectionSource, TrainingTransform, map_sample
from ovd.modeling.backbone import build_resnet, load_bottom_up, to_detectron2, verify_conversion
from ovd.modeling.classifier import NovelLabelError
from ovd.modeling.export import DetectorCard, save_detector
from ovd.modeling.load import load_detector_model
from ovd.modeling.vild.build import build_model
from ovd.modeling.vild.mask_head import MaskHead
from ovd.modeling.vild.meta_arch import OpenVocabularyRCNN
from pretrain.engine.errors import UserError
from pretrain.nets.resnet import ResNet

C, D, SIDE = 6, 16, 96
FPN = {
    "backbone": {"kind": "fpn", "fpn_levels": ("res3", "res4"), "fpn_channels": 32},
    "proposals": {"anchor_sizes": ((24.0,), (48.0,), (80.0,))},
    "head": {"resolution": 7, "conv_dims": (32, 32), "fc_dims": (64, 64), "norm": "", "mask_dims": (16, 16)},
}
C4 = {"proposals": {"anchor_sizes": ((24.0, 48.0),)}, "head": {"mask_dims": (16, 16)}}
DETAIL = {**C4, "head": {"mask_dims": (32, 32), "mask_norm": "GN", "detail": 16, "detail_fc": 32}}


def make(variant: str, kind: dict[str, Any] = C4, novel: tuple[int, ...] = ()) -> OpenVocabularyRCNN:
    torch.manual_seed(0)
    trainable = torch.ones(C, dtype=torch.bool)
    trainable[list(novel)] = False
    return build_model(
        ModelConfig.model_validate({"variant": variant, **kind}),
        embed_dim=D,
        rows=torch.randn(C, D),
        trainable=trainable,
        pixel_mean=[127.5] * 3,
        pixel_std=[63.75] * 3,
    )


def batch(*, label: int = 1, regions: bool = True, count: int = 2) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(5)
    out = []
    for _ in range(count):
        boxes = torch.tensor([[10.0, 12.0, 50.0, 60.0], [40.0, 40.0, 90.0, 80.0]])
        instances = Instances((SIDE, SIDE))
        instances.gt_boxes = Boxes(boxes)
        instances.gt_classes = torch.tensor([label, 0])
        masks = torch.zeros(2, SIDE, SIDE, dtype=torch.bool)
        masks[0, 12:60, 10:50] = True
        masks[1, 40:80, 40:90] = True
        instances.gt_masks = BitMasks(masks)
        sample = {
            "image": torch.randint(0, 256, (3, SIDE, SIDE), generator=generator, dtype=torch.uint8),
            "instances": instances,
        }
        if regions:
            offline = Instances((SIDE, SIDE))
            offline.proposal_boxes = Boxes(boxes + 2)
            offline.embedding = torch.randn(2, D, generator=generator)
            sample["regions"] = offline
        out.append(sample)
    return out


@pytest.mark.parametrize("depth", [18, 50])
@pytest.mark.parametrize("stem", ["small", "imagenet"])
def test_backbone__converted_features_equal_the_source(depth: int, stem: Any) -> None:
    torch.manual_seed(0)
    source = ResNet(depth=depth, stem=stem, zero_init=False).eval()
    for module in source.modules():  # statistics that differ from their start, so that a lost tensor shows
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    ours = build_resnet(
        depth=depth, stem=stem, norm="FrozenBN", out_features=("res2", "res3", "res4", "res5"), freeze_at=0
    )
    load_bottom_up(ours, source.state_dict(), source="test")
    assert verify_conversion(source.stages, ours, torch.randn(2, 3, 64, 96)) < 1e-5
    with torch.no_grad():
        source.layer2[0].bn1.weight.mul_(1.01)
    with pytest.raises(UserError, match="res3"):
        verify_conversion(source.stages, ours, torch.randn(2, 3, 64, 96))


def test_backbone__a_checkpoint_that_does_not_fit_is_refused_with_counts() -> None:
    ours = build_resnet(depth=18, stem="imagenet", norm="FrozenBN", out_features=("res4",), freeze_at=0)
    with pytest.raises(UserError, match=r"of \d+ tensors match.*stem"):
        load_bottom_up(ours, ResNet(depth=18, stem="small").state_dict(), source="file.safetensors")


def test_backbone__names_follow_detectron2() -> None:
    names = to_detectron2(
        {
            "conv1.weight": torch.zeros(1),
            "layer3.1.bn2.bias": torch.zeros(1),
            "layer2.0.downsample.1.weight": torch.zeros(1),
            "fc.weight": torch.zeros(1),
        }
    )
    assert set(names) == {"stem.conv1.weight", "res4.1.conv2.norm.bias", "res3.0.shortcut.norm.weight"}


@pytest.mark.parametrize("kind", [C4, DETAIL, FPN], ids=["c4", "detail", "fpn"])
@pytest.mark.parametrize(
    ("variant", "wanted"),
    [
        ("agnostic", set()),
        ("text", {"loss_text"}),
        ("image", {"loss_distill"}),
        ("vild", {"loss_text", "loss_distill"}),
        ("ensemble", {"loss_text", "loss_distill"}),
    ],
)
def test_variants__have_their_losses_and_all_trained_parameters_get_gradients(
    variant: str, wanted: set[str], kind: dict[str, Any]
) -> None:
    model = make(variant, kind).train()
    label = 0 if variant in ("agnostic", "image") else 1
    losses = model(batch(label=label))
    assert set(losses) == {"loss_rpn_cls", "loss_rpn_loc", "loss_box", "loss_mask"} | wanted
    sum(losses.values()).backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []


def test_training__a_picture_without_labels_is_background_only() -> None:
    data = batch()
    empty = Instances((SIDE, SIDE))
    empty.gt_boxes = Boxes(torch.zeros(0, 4))
    empty.gt_classes = torch.zeros(0, dtype=torch.long)
    empty.gt_masks = BitMasks(torch.zeros(0, SIDE, SIDE, dtype=torch.bool))
    model = make("vild").train()
    mixed = model([data[0], {**data[1], "instances": empty}])
    assert all(torch.isfinite(v) for v in mixed.values()) and float(mixed["loss_box"].detach()) > 0
    alone = model([{**data[1], "instances": empty}])
    assert float(alone["loss_box"].detach()) == 0.0 and float(alone["loss_mask"].detach()) == 0.0


def gradient_reaches(model: OpenVocabularyRCNN, loss: str, prefix: str) -> bool:
    model.zero_grad()
    model(batch())[loss].backward()
    return any(
        p.grad is not None and float(p.grad.abs().sum()) > 0
        for n, p in model.named_parameters()
        if n.startswith(prefix)
    )


def test_ensemble__each_loss_trains_its_own_head_and_both_train_the_backbone() -> None:
    model = make("ensemble").train()
    assert gradient_reaches(model, "loss_text", "roi_heads.region_head.") and not gradient_reaches(
        model, "loss_text", "roi_heads.image_head."
    )
    assert gradient_reaches(model, "loss_distill", "roi_heads.image_head.") and not gradient_reaches(
        model, "loss_distill", "roi_heads.region_head."
    )
    assert gradient_reaches(model, "loss_distill", "backbone.") and gradient_reaches(model, "loss_text", "backbone.")


def test_vild__distillation_and_text_share_one_head() -> None:
    model = make("vild").train()
    assert gradient_reaches(model, "loss_text", "roi_heads.region_head.projection") and gradient_reaches(
        model, "loss_distill", "roi_heads.region_head.projection"
    )


def test_training__novel_label_that_leaks_in_is_an_error() -> None:
    with pytest.raises(NovelLabelError):
        make("text", novel=(1,)).train()(batch(label=1))


def test_training__distilling_without_regions_is_an_error() -> None:
    with pytest.raises(ValueError, match="no offline regions"):
        make("vild").train()(batch(regions=False))


def test_distillation__target_is_reached_by_training_on_it() -> None:
    norm = {"backbone": {"norm": "BN"}, "head": {"norm": "BN", "mask": False}, "proposals": C4["proposals"]}
    model = make("image", norm).train()
    data = batch(label=0, count=1)
    optimiser = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(20):
        optimiser.zero_grad()
        loss = model(data)["loss_distill"]
        loss.backward()
        optimiser.step()
    features = model.backbone(model.preprocess_image(data).tensor)
    out = model.roi_heads.outputs(features, [data[0]["regions"].proposal_boxes])
    assert out.image is not None
    assert float(torch.cosine_similarity(out.image, data[0]["regions"].embedding).min()) > 0.9


def test_inference__is_sorted_inside_the_picture_and_unit_norm() -> None:
    result = make("ensemble").eval()(batch(count=1))[0]
    assert result.text is not None and result.image is not None and result.masks is not None
    assert bool((result.objectness[:-1] >= result.objectness[1:]).all()) and 0 <= float(result.objectness.min()) <= 1
    assert float(result.boxes.min()) >= 0 and float(result.boxes.max()) <= SIDE
    torch.testing.assert_close(result.text.norm(dim=1), torch.ones(len(result.text)))
    assert result.masks.shape[1:] == (28, 28) and 0 <= float(result.masks.min()) and float(result.masks.max()) <= 1


def card_for(variant: str, kind: dict[str, Any] = C4) -> DetectorCard:
    config = ModelConfig.model_validate({"variant": variant, **kind})
    return DetectorCard(
        model=config.model_dump(mode="json"),
        embed_dim=D,
        pixel_mean=(127.5,) * 3,
        pixel_std=(63.75,) * 3,
        encoder="none",
        encoder_fingerprint="0",
        short_side=SIDE,
        long_side=2 * SIDE,
        classes=tuple("abcdef"),
        novel=(2,),
        background_words=("a", "b"),
        calibration={"threshold": 0.25},
        config_hash="0",
    )


def test_detail__boxes_and_masks_read_the_fine_map_and_embeddings_do_not() -> None:
    torch.manual_seed(0)
    model = make("vild", DETAIL)
    heads = model.roi_heads
    features = {
        "res3": torch.randn(1, 128, 12, 11, requires_grad=True),  # an odd side: res4 is rounded up
        "res4": torch.randn(1, 256, 6, 6, requires_grad=True),
    }
    boxes = [Boxes(torch.tensor([[8.0, 8.0, 60.0, 70.0]]))]
    prepared = heads.prepare(features)
    assert prepared["detail"].shape == (1, 16, 12, 11)
    nn.init.normal_(heads.box_regressor.weight)

    def sources(output: torch.Tensor) -> tuple[bool, bool]:
        fine, coarse = torch.autograd.grad(
            output.square().sum(), [features["res3"], features["res4"]], allow_unused=True, retain_graph=True
        )
        return (fine is not None and bool(fine.any()), coarse is not None and bool(coarse.any()))

    flat, text, _ = heads.embed(prepared, boxes)
    assert sources(heads.regress(prepared, boxes, flat)) == (True, True)
    assert text is not None and sources(text) == (False, True)


def test_export__keeps_the_names_that_older_checkpoints_have() -> None:
    model = make("ensemble")
    state = model.state_dict()
    assert {name.split(".")[1] for name in state if name.endswith("projection.bias")} == {"tower", "image_tower"}
    assert {name for name, _ in model.named_parameters()} - set(state) == {
        name
        for name, _ in model.named_parameters()
        if name.startswith(("roi_heads.region_head", "roi_heads.image_head"))
    }
    other = make("ensemble")
    other.load_state_dict({name: torch.zeros_like(value) for name, value in state.items()})
    assert not any(bool(value.any()) for value in other.roi_heads.image_head.state_dict().values())
    assert not any(bool(value.any()) for value in other.roi_heads.region_head.state_dict().values())


@pytest.mark.parametrize("regions", [0, 3])
@pytest.mark.parametrize("classes", [1, 2])
@pytest.mark.parametrize("dims", [[8, 8, 6], [6]])
def test_masks__logits_and_gradients_are_those_of_detectron2(regions: int, classes: int, dims: list[int]) -> None:
    kind: dict[str, Any] = {"num_classes": classes, "conv_dims": dims, "conv_norm": "BN" if regions else ""}
    ours, theirs = (c(ShapeSpec(channels=5, height=7, width=4), **kind) for c in (MaskHead, MaskRCNNConvUpsampleHead))
    theirs.load_state_dict(ours.state_dict())
    for head in (ours, theirs):
        head.double()
    torch.nn.init.normal_(ours.predictor.bias)
    theirs.predictor.bias.data.copy_(ours.predictor.bias)
    pooled = torch.randn(regions, 5, 7, 4, dtype=torch.float64)
    found, expected = ours.layers(pooled), theirs.layers(pooled)
    assert found.shape == (regions, classes, 14, 8)
    torch.testing.assert_close(found, expected)
    weight = torch.randn_like(found)
    for logits in (found, expected):
        (logits * weight).sum().backward()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=lambda text, name=name: f"{name}: {text}")


def test_detail__is_refused_with_a_pyramid() -> None:
    with pytest.raises(ValueError, match=r"head\.detail belongs to backbone\.kind c4"):
        ModelConfig.model_validate({**FPN, "head": {"detail": 16}})


@pytest.mark.parametrize(
    ("variant", "kind"), [("vild", C4), ("ensemble", C4), ("vild", DETAIL)], ids=["vild", "ensemble", "detail"]
)
def test_export__loads_again_and_gives_the_same_regions(tmp_path: Path, variant: str, kind: dict[str, Any]) -> None:
    model = make(variant, kind).eval()
    save_detector(tmp_path, model, card_for(variant, kind), background_words=torch.randn(2, D), half=False)
    loaded = load_detector_model(tmp_path)
    image = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    got = loaded.regions(image)
    wanted = model([{"image": torch.from_numpy(image).permute(2, 0, 1)}])[0]
    torch.testing.assert_close(torch.from_numpy(got.text), wanted.text[: len(got)])
    torch.testing.assert_close(torch.from_numpy(got.boxes), wanted.boxes[: len(got)])
    assert loaded.calibration.threshold == 0.25 and loaded.background_words.shape == (2, D)


def test_export__without_masks_the_mask_head_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_detector(
        tmp_path, make("vild", C4).eval(), card_for("vild", C4), background_words=torch.randn(2, D), half=False
    )
    image = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    with_masks = load_detector_model(tmp_path).regions(image)
    monkeypatch.setattr(MaskHead, "layers", None)  # cannot be called
    bare = load_detector_model(tmp_path, masks=False).regions(image)
    assert with_masks.masks is not None and bare.masks is None
    torch.testing.assert_close(bare.boxes, with_masks.boxes)
    torch.testing.assert_close(bare.text, with_masks.text)


def test_export__boxes_follow_the_original_size() -> None:
    model = make("vild").eval()
    from ovd.inference.rcnn_regions import RCNNRegionModel

    small = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    large = small.repeat(2, axis=0).repeat(2, axis=1)
    region_model = RCNNRegionModel(model=model, card=card_for("vild"), background_words=torch.randn(2, D).numpy())
    assert region_model.regions(large).size == (2 * SIDE, 2 * SIDE)
    assert float(region_model.regions(large).boxes.max()) > SIDE + 1


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "model.json").unlink(), "no such file; a detector is a folder"),
        (lambda f: (f / "model.json").write_text("{"), "JSON"),
        (lambda f: (f / "model.json").write_text('{"format": 99}'), "format"),
    ],
)
def test_export__a_damaged_folder_is_refused_with_the_next_step(tmp_path: Path, damage: Any, message: str) -> None:
    save_detector(tmp_path, make("vild"), card_for("vild"), background_words=torch.randn(2, D))
    damage(tmp_path)
    with pytest.raises(UserError, match=message):
        load_detector_model(tmp_path)


def labelled(height: int = 80, width: int = 120) -> Labelled:
    masks = np.zeros((2, height, width), dtype=bool)
    masks[0, 10:40, 20:70] = True
    masks[1, 30:75, 60:110] = True
    boxes = np.array([[20, 10, 70, 40], [60, 30, 110, 75]], dtype=np.float32)
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Labelled(image=image, boxes=boxes, masks=masks, classes=np.array([0, 1]), image_id=7)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("crop", [None, 64])
def test_mapper__offline_proposals_move_with_the_picture(seed: int, crop: int | None) -> None:
    """Ground-truth boxes given as proposals must stay on their objects under resize, crop and flip."""
    data = labelled()
    transform = TrainingTransform(short_side=64, long_side=200, scale=(0.7, 1.6), crop=crop, flip=0.5)
    out = map_sample(
        data,
        transform=transform,
        rng=np.random.default_rng(seed),
        offline=(data.boxes, np.eye(2, 4, dtype=np.float32)),
        regions_per_image=8,
    )
    height, width = out["image"].shape[1:]
    assert out["instances"].image_size == (height, width)
    for box, embedding in zip(out["regions"].proposal_boxes.tensor, out["regions"].embedding, strict=True):
        index = int(embedding.argmax())
        where = (out["instances"].gt_classes == index).nonzero()
        if len(where) == 0:
            continue
        truth = out["instances"].gt_boxes.tensor[int(where[0, 0])]
        # Masks are resized to whole pixels, boxes are not: one pixel is what they may differ by.
        assert float((box - truth).abs().max()) <= 1.5


def test_mapper__detr_crop_of_the_resized_picture() -> None:
    cut = CutConfig(probability=0.5, short_sides=(80, 100), sides=(48, 90))
    transform = TrainingTransform(short_side=64, long_side=200, cut=cut, flip=0.0)
    cuts = 0
    for seed in range(200):
        steps = transform.draw(80, 120, np.random.default_rng(seed)).transforms
        if len(steps) == 1:
            continue
        cuts += 1
        first, rectangle, _ = steps
        assert (first.new_h, first.new_w) in {(80, 120), (100, 150)}
        assert 48 <= rectangle.h <= 90 and 48 <= rectangle.w <= 90
        assert 0 <= rectangle.y0 <= first.new_h - rectangle.h and 0 <= rectangle.x0 <= first.new_w - rectangle.w
        out = map_sample(
            labelled(), transform=transform, rng=np.random.default_rng(seed), offline=None, regions_per_image=0
        )
        assert min(out["image"].shape[1:]) == 64 or max(out["image"].shape[1:]) == 200
        boxes = out["instances"].gt_boxes.tensor
        assert bool((boxes >= 0).all()) and bool((boxes[:, 2] <= out["image"].shape[2]).all())
    assert 70 < cuts < 130
    tiny = TrainingTransform(short_side=64, long_side=200, cut=CutConfig(short_sides=(32,), probability=1.0))
    _, rectangle, _ = tiny.draw(80, 120, np.random.default_rng(0)).transforms[:3]
    assert (rectangle.h, rectangle.w) == (32, 48), "a picture smaller than the least side stays whole"


def test_mapper__flip_mirrors_boxes_masks_and_regions_alike() -> None:
    data = labelled()
    transform = TrainingTransform(short_side=80, long_side=200, flip=1.0)
    out = map_sample(
        data, transform=transform, rng=np.random.default_rng(0), offline=(data.boxes, np.eye(2, 4)), regions_per_image=8
    )
    np.testing.assert_array_equal(out["image"].numpy(), data.image[:, ::-1].transpose(2, 0, 1))
    wanted = torch.tensor([[50.0, 10.0, 100.0, 40.0], [10.0, 30.0, 60.0, 75.0]])
    torch.testing.assert_close(out["instances"].gt_boxes.tensor, wanted)
    order = out["regions"].embedding.argmax(dim=1)
    torch.testing.assert_close(out["regions"].proposal_boxes.tensor, wanted[order])
    assert bool(out["instances"].gt_masks.tensor[0, 10:40, 50:100].all())


class OneImage:
    names, novel = ("a", "b"), frozenset[int]()

    def __len__(self) -> int:
        return 1

    def load(self, index: int) -> Labelled:
        return labelled()


def test_source__sample_is_a_function_of_index_and_draw() -> None:
    source = DetectionSource(
        images=OneImage(), transform=TrainingTransform(short_side=64, long_side=200, scale=(0.5, 2.0)), seed=3
    )
    a, b, c = source.sample(0, 5), source.sample(0, 5), source.sample(0, 6)
    torch.testing.assert_close(a["image"], b["image"])
    assert a["image"].shape != c["image"].shape


@pytest.mark.parametrize("kind", [C4, DETAIL, FPN], ids=["c4", "detail", "fpn"])
def test_autocast__regions_are_read_at_exact_boxes_and_losses_are_float32(
    kind: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make("vild", kind).train()
    seen: list[torch.dtype] = []
    real = ROIAlign.forward

    def spy(self: ROIAlign, maps: torch.Tensor, rois: torch.Tensor) -> torch.Tensor:
        seen.append(maps.dtype)  # Detectron2 rounds the boxes to this
        return real(self, maps, rois)

    monkeypatch.setattr(ROIAlign, "forward", spy)
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(batch(label=1))
    assert seen and set(seen) == {torch.float32}
    assert {value.dtype for value in losses.values()} == {torch.float32}


def test_training__a_batch_that_is_not_finite_has_such_a_loss_and_raises_nothing() -> None:
    data = batch(label=1)
    data[0]["image"] = data[0]["image"].float() * float("nan")
    losses = make("vild").train()(data)
    assert not bool(torch.isfinite(sum(losses.values())))


def test_tower__an_odd_resolution_is_halved_upwards() -> None:
    model = make("vild", {**C4, "head": {**C4.get("head", {}), "resolution": 7}}).train()
    assert all(torch.isfinite(value) for value in model(batch(label=1)).values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head": {"mask_norm": "GN", "mask_dims": [48, 48]}}, "multiples of 32"),
        (
            {
                "backbone": {"kind": "fpn", "fpn_levels": ["res2", "res4"]},
                "proposals": {"anchor_sizes": [[8.0], [16.0], [32.0]]},
            },
            "must be neighbours",
        ),
    ],
)
def test_config__what_detectron2_would_fail_at_is_refused_first(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig.model_validate({**C4, **change})
