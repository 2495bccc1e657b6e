# SPDX-License-Identifier: Apache-2.0
"""The transformer as a detector: losses, padding, denoising, conditions, official checkpoints, export."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torchvision.ops import batched_nms, box_convert, generalized_box_iou, nms, roi_align

from ovd.config_detr import DetrConfig
from ovd.detector import Detector
from ovd.evaluation.examples import PretextPredictor, example_predictor
from ovd.examples import Crop
from ovd.inference import detr_regions
from ovd.inference.scoring import Calibration
from ovd.modeling.backbone import load_bottom_up
from ovd.modeling.classifier import NovelLabelError
from ovd.modeling.detr.build import build_detr
from ovd.modeling.detr.checkpoints import init_detr, read_initial_weights, refuse_other_attention
from ovd.modeling.detr.matcher import QueryAssignment, hungarian_match
from ovd.modeling.detr.network import Detr
from ovd.modeling.detr.structures import DecoderOutput, Targets
from ovd.modeling.export import DetectorCard, save_detector
from ovd.modeling.load import load_detector_model
from ovd.modeling.region_head import init_body, init_projection
from ovd.modeling.task import DetectionTask
from ovd.regions.crops import crop_regions
from pretrain.config import EncoderConfig, ResNetTower
from pretrain.engine.config import OptimConfig
from pretrain.engine.errors import UserError
from pretrain.engine.optim import build_optimizer, clip_gradients, gradient_norm
from pretrain.nets.towers import ResNetImage, build_encoder, export_backbone
from tests.detector.fakes import WordEncoder
from tests.updetr.small import STRIDE, C, D, make, picture, region_tower

TWO = [[4.0, 6.0, 40.0, 50.0], [20.0, 10.0, 60.0, 30.0]]


@pytest.mark.parametrize("arch", ["detr", "conditional"])
@pytest.mark.parametrize("variant", ["text", "closed"])
def test_training__empty_targets_tiny_pictures_and_padding_are_finite(arch: str, variant: str) -> None:
    model = make(arch, variant=variant, denoising=2 if arch == "conditional" else 0).train()
    batches = [
        [picture(64, 96, TWO, [1, 2]), picture(1, 3, [], []), picture(64, 40, [], [])],
        [picture(8, 8, [], [])],
    ]
    for batch in batches:
        model.zero_grad()
        losses = model(batch)
        sum(losses.values()).backward()
        assert all(torch.isfinite(v) for v in losses.values())
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        assert gradients and all(torch.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize("arch", ["detr", "conditional"])
def test_padding__a_picture_gives_the_same_boxes_alone_and_beside_a_larger_one(arch: str) -> None:
    model = make(arch).eval()
    small, large = picture(48, 32, [], []), picture(96, 128, [], [], seed=1)
    alone, beside = (model.predict(model.memory(batch)) for batch in ([small], [small, large]))
    torch.testing.assert_close(beside.boxes[0], alone.boxes[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(beside.logits[0], alone.logits[0], atol=1e-5, rtol=1e-4)


def crafted(layers: int = 3) -> tuple[DecoderOutput, Targets]:
    torch.manual_seed(1)
    out = DecoderOutput(torch.randn(layers, 2, 6, 16), torch.rand(layers, 2, 6, 4) * 0.4 + 0.2)
    return out, Targets(torch.rand(2, 3, 4) * 0.4 + 0.2, torch.tensor([[1, 2, 0], [3, 0, 0]]), [3, 1])


def test_losses__equal_a_plain_loop_over_layers_and_pictures() -> None:
    model = make("conditional").train()
    assert model.object_embed is not None and model.classifier is not None
    out, targets = crafted()
    out, total = (
        DecoderOutput(out.states, out.boxes),
        {"loss_object": 0.0, "loss_l1": 0.0, "loss_giou": 0.0, "loss_text": 0.0},
    )
    number = 4
    model.requires_grad_(False)
    for states, boxes in zip(out.states, out.boxes, strict=True):
        for n, count in enumerate(targets.counts):
            p = model.object_embed(states[n])[:, 0].sigmoid()
            text = model.classifier(model.feature_align(states[n]))
            want, label = targets.boxes[n, :count], targets.labels[n, :count]
            object_part = 0.25 * (1 - p) ** 2 * -p.log() - 0.75 * p**2 * -(1 - p).log()
            cost = (
                5 * torch.cdist(boxes[n], want, p=1)
                - 2 * generalized_box_iou(box_convert(boxes[n], "cxcywh", "xyxy"), box_convert(want, "cxcywh", "xyxy"))
                + 2 * object_part[:, None]
                - text.softmax(-1)[:, label]
            )
            pairs = hungarian_match(cost[None, None], [count])
            q, t = pairs.query, pairs.target
            hit = torch.zeros(6)
            hit[q] = 1
            focal = torch.where(hit > 0, 0.25 * (1 - p) ** 2 * -p.log(), 0.75 * p**2 * -(1 - p).log())
            total["loss_object"] += 2 * float(focal.sum()) / number
            total["loss_l1"] += 5 * float((boxes[n][q] - want[t]).abs().sum()) / number
            giou = generalized_box_iou(
                box_convert(boxes[n][q], "cxcywh", "xyxy"), box_convert(want[t], "cxcywh", "xyxy")
            ).diagonal()
            total["loss_giou"] += 2 * float((1 - giou).sum()) / number
            total["loss_text"] += float(F.cross_entropy(text[q], label[t], reduction="sum")) / number
    got = model.criterion(out, targets, model, num_targets=4)
    assert set(got) == set(total)
    for name, value in total.items():
        assert float(got[name]) == pytest.approx(value, rel=1e-4), name


def test_losses__weighted_cross_entropy_is_detrs() -> None:
    model = make("detr", variant="closed", loss={"object": 1.0, "object_kind": "weighted"}).train()
    assert model.class_embed is not None
    out, targets = crafted(layers=1)
    assignment = QueryAssignment(*torch.tensor([[0, 0, 0, 0], [0, 0, 0, 1], [4, 1, 0, 5], [0, 1, 2, 0]]))
    logits = model.class_embed(out.states[0])
    label = torch.full((2, 6), C)
    label[0, 4], label[0, 1], label[0, 0], label[1, 5] = 1, 2, 0, 3
    weight = torch.ones(C + 1)
    weight[-1] = 0.1
    expected = F.cross_entropy(logits.flatten(0, 1), label.flatten(), weight=weight)
    everything = torch.ones(2, 6, dtype=torch.bool)
    losses = model.criterion.assigned(out, targets, model, assignment, num_targets=4, valid_NQ=everything)
    got = losses["loss_class"]
    torch.testing.assert_close(got, expected)


def test_losses__novel_label_is_an_error() -> None:
    with pytest.raises(NovelLabelError):
        make("conditional", novel=(2,)).train()([picture(64, 64, TWO, [1, 2])])


def test_denoising__free_queries_do_not_see_the_answers() -> None:
    torch.manual_seed(0)
    model = make("conditional", denoising=2).train()
    batch = [picture(64, 64, TWO, [1, 2])]
    losses = {}
    for groups in (2, 0):
        model.denoising.groups = groups
        losses[groups] = model(batch)
    for name, value in losses[0].items():
        torch.testing.assert_close(losses[2][name], value)
    assert {f"{n}_dn" for n in losses[0]} <= set(losses[2])


@pytest.mark.parametrize("variant", ["text", "closed"])
def test_denoising__padded_queries_count_nowhere(variant: str) -> None:
    model = make("conditional", variant=variant, denoising=1, box_noise=0.0, label_noise=0.0).train()
    alone = model([picture(64, 64, TWO[:1], [1])])
    extra = picture(64, 64, [], [])
    beside = model([picture(64, 64, TWO[:1], [1]), extra])
    kind = ("loss_object_dn", "loss_text_dn") if variant == "text" else ("loss_class_dn",)
    for name in ("loss_l1_dn", "loss_giou_dn", *kind):
        torch.testing.assert_close(beside[name], alone[name])


def test_denoising__outputs_of_a_picture_do_not_depend_on_its_batch_mates() -> None:
    model = make("conditional", denoising=2, box_noise=0.0, label_noise=0.0).train()
    few, many = picture(64, 64, TWO[:1], [1]), picture(64, 64, [*TWO, [1.0, 40.0, 20.0, 60.0]], [2, 0, 3], seed=1)
    outputs = []
    for batch in ([few], [few, many]):
        targets = Targets.of_instances([x["instances"] for x in batch], device=model.device)
        free, dn = model.decode_with_denoising(model.memory(batch), targets)
        assert dn is not None
        real = [copy * (dn.boxes.shape[2] // 2) for copy in range(2)]  # its one object in each group
        outputs.append((free.boxes[:, 0], free.states[:, 0], dn.boxes[:, 0, real], dn.states[:, 0, real]))
    for alone, together in zip(*outputs, strict=True):
        torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-5)


def test_denoising__process_without_objects_has_all_losses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    met: list[int] = []
    monkeypatch.setattr("ovd.modeling.detr.criterion.distributed.all_sum", lambda values: met.append(1) or values)
    model = make("conditional", denoising=2).train()
    some, meetings = model([picture(64, 96, TWO, [1, 2])]), len(met)
    none = model([picture(64, 96, [], [])])
    assert set(none) == set(some) and any(name.endswith("_dn") for name in none)
    assert len(met) == 2 * meetings
    assert all(float(value) == 0.0 for name, value in none.items() if name.endswith("_dn"))


def test_frozen_backbone__keeps_weights_and_statistics_and_builds_no_graph() -> None:
    model = make("conditional").train()
    before = {k: v.clone() for k, v in model.backbone.state_dict().items()}
    sum(model([picture(64, 64, TWO, [1, 2])]).values()).backward()
    assert all(p.grad is None for p in model.backbone.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.backbone.state_dict().items())
    assert not model.maps(torch.randn(1, 3, 32, 32))["res4"].requires_grad
    free = make("conditional", frozen=False).train()
    sum(free([picture(64, 64, TWO, [1, 2])]).values()).backward()
    assert all(p.grad is not None for p in free.backbone.parameters())


def test_clipping__really_limits_the_norm_over_all_parameters() -> None:
    model = make("conditional", frozen=False).train()
    task = DetectionTask(model=model, pretrained_prefixes=("backbone.",), pretrained_lr_scale=0.1)
    optim = OptimConfig(name="sgd", lr=1.0, momentum=0.0)
    optimizer = build_optimizer(task.param_groups(optim), optim)
    task([picture(64, 64, TWO, [1, 2])])[0].backward()
    everything = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    norm = gradient_norm(optimizer)
    torch.testing.assert_close(norm, everything.norm())
    assert norm > 0.1
    clip_gradients(optimizer, norm=norm, max_norm=0.1)
    clipped = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert float(clipped.norm()) == pytest.approx(0.1, rel=1e-4)


@pytest.mark.parametrize("arch", ["detr", "conditional"])
def test_conditions__groups_do_not_see_each_other_and_words_are_trained(arch: str) -> None:
    model = make(arch, conditioned=3).train()
    losses = model([picture(64, 64, TWO, [1, 2]), picture(64, 64, [], [])])
    words = {k: v for k, v in losses.items() if k.endswith("_words")}
    assert set(words) == {"loss_object_words", "loss_l1_words", "loss_giou_words"}
    sum(words.values()).backward()
    gradient = model.patch2query.weight.grad
    assert gradient is not None and gradient.abs().sum() > 0
    model.eval()
    conditions = torch.randn(1, 3, D)
    memory = model.memory([picture(64, 64, [], [])])
    first = model.predict(memory, conditions_NMD=conditions)
    conditions[0, 0] = torch.randn(D)
    second = model.predict(memory, conditions_NMD=conditions)
    torch.testing.assert_close(first.embeddings[0, 2:], second.embeddings[0, 2:])
    assert not torch.allclose(first.embeddings[0, :2], second.embeddings[0, :2])


# --- official checkpoints: names written down here, not taken from the code

ATTENTION = ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
PAPER: dict[str, Any] = {
    "arch": "detr", "variant": "closed", "width": 32, "heads": 4, "ffn": 64, "encoder_layers": 6, "decoder_layers": 6,
    "queries": 100, "pre_norm": True, "embed_space": "ssl",
    "backbone": {"depth": 18, "stem": "imagenet", "features": ["res5"]},
}  # fmt: skip


def official_transformer() -> set[str]:
    names = set()
    for stack, attentions, norms in (("encoder", ["self_attn"], 2), ("decoder", ["self_attn", "multihead_attn"], 3)):
        for i in range(6):
            layer = f"transformer.{stack}.layers.{i}"
            names |= {f"{layer}.{a}.{k}" for a in attentions for k in ATTENTION}
            names |= {f"{layer}.linear{n}.{k}" for n in (1, 2) for k in ("weight", "bias")}
            names |= {f"{layer}.norm{n}.{k}" for n in range(1, norms + 1) for k in ("weight", "bias")}
        names |= {f"transformer.{stack}.norm.{k}" for k in ("weight", "bias")}
    heads = ["class_embed", "input_proj", "patch2query", *(f"bbox_embed.layers.{i}" for i in range(3))]
    heads += [f"feature_align.layers.{i}" for i in range(2)]
    return names | {f"{h}.{k}" for h in heads for k in ("weight", "bias")} | {"query_embed.weight"}


def paper_model(**changes: Any) -> Detr:
    torch.manual_seed(len(changes))
    return build_detr(
        DetrConfig.model_validate({**PAPER, **changes}),
        embed_dim=0, rows=None, trainable=None, classes=4, pixel_mean=[0.0] * 3, pixel_std=[1.0] * 3,
    )  # fmt: skip


def test_official__names_of_the_transformer_are_those_of_the_released_checkpoints() -> None:
    names = {k for k in paper_model().state_dict() if not k.startswith("backbone.")}
    assert names == official_transformer()


def test_backbone__what_is_frozen_stays_and_the_rest_is_trained() -> None:
    whole, partly = (
        paper_model(backbone={**PAPER["backbone"], "frozen": False, "freeze_at": stage}) for stage in (0, 2)
    )
    trained = [{k for k, p in m.backbone.named_parameters() if p.requires_grad} for m in (whole, partly)]
    assert {k.split(".")[0] for k in trained[0]} == {"stem", "res2", "res3", "res4", "res5"}
    assert trained[1] == {k for k in trained[0] if k.split(".")[0] not in ("stem", "res2")}


def test_official__checkpoint_with_namespace_loads_all_keys(tmp_path: Path) -> None:
    from torchvision.models import resnet18

    model = paper_model()
    released = {k: torch.randn_like(v) for k, v in model.state_dict().items() if not k.startswith("backbone.")}
    body = resnet18(weights=None).state_dict()
    released |= {
        f"backbone.0.body.{k}": v for k, v in body.items() if "num_batches" not in k and not k.startswith("fc.")
    }
    released["bbox_attention.weight"] = torch.zeros(2)
    file = tmp_path / "up-detr.pth"
    torch.save({"model": released, "args": argparse.Namespace(lr=1e-4), "epoch": 60}, file)
    given, has_backbone = read_initial_weights(file)
    assert has_backbone
    report = init_detr(model, given, source=str(file))
    assert report.unexpected == ("bbox_attention.weight",)
    assert set(report.skipped) == {"class_embed.weight", "class_embed.bias"}
    assert not report.missing and not report.other_shape and not report.notes
    state = model.state_dict()
    for name in official_transformer() - {"class_embed.weight", "class_embed.bias"}:
        assert torch.equal(state[name], released[name]), name
    assert torch.equal(state["backbone.res3.0.conv1.weight"], body["layer2.0.conv1.weight"])
    assert not torch.equal(state["class_embed.weight"], released["class_embed.weight"])


class _Code:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return print, ("this must not run",)


def test_official__a_file_that_would_run_code_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "bad.pth"
    torch.save({"model": {}, "args": _Code()}, file)
    with pytest.raises(UserError, match="cannot be read as weights only"):
        read_initial_weights(file)
    torch.save([torch.zeros(1)], file)
    with pytest.raises(UserError, match="no table of tensors"):
        read_initial_weights(file)
    with pytest.raises(UserError, match="no such checkpoint"):
        read_initial_weights(tmp_path / "absent.pth")
    assert "must not run" not in capsys.readouterr().out


@pytest.mark.parametrize(("queries", "said"), [(4, "first 4 of 6"), (9, "the other 3 start anew")])
def test_start__keeps_query_embeddings_and_says_what_happened_to_them(queries: int, said: str) -> None:
    source, target = make("conditional", variant="agnostic"), make("conditional", queries=queries, seed=1)
    fresh = target.query_embed.weight.detach().clone()
    rows = target.classifier.rows.clone() if target.classifier is not None else None
    report = init_detr(target, source.state_dict(), source="there", backbone=False)
    assert said in report.notes and said in str(report)
    kept = min(queries, 6)
    assert torch.equal(target.query_embed.weight[:kept], source.query_embed.weight[:kept])
    assert torch.equal(target.query_embed.weight[kept:], fresh[kept:])
    assert torch.equal(target.query_anchor[:kept], source.query_anchor[:kept])
    assert target.object_embed is not None and source.object_embed is not None
    assert torch.equal(target.object_embed.weight, source.object_embed.weight)  # "matched?" survives
    assert target.classifier is not None and torch.equal(target.classifier.rows, rows)
    assert "feature_align.layers.1.weight" in report.other_shape  # another space


def test_start__another_architecture_is_refused() -> None:
    with pytest.raises(UserError, match="transformer tensors fit"):
        init_detr(make("conditional", width=32), make("conditional").state_dict(), source="there")


def test_start__weights_that_fit_but_compute_something_else_are_refused(tmp_path: Path) -> None:
    exported(tmp_path)
    state, _ = read_initial_weights(tmp_path)
    config = DetrConfig.model_validate(SMALL)
    refuse_other_attention(tmp_path, state, config)
    for change, said in (({"heads": 4}, "model.heads=2, not 4"), ({"pre_norm": not config.pre_norm}, "model.pre_norm")):
        with pytest.raises(UserError, match=said):
            refuse_other_attention(tmp_path, state, config.model_copy(update=change))


# --- behind the detector's interface

SMALL: dict[str, Any] = {
    "arch": "conditional", "width": 16, "heads": 2, "ffn": 16, "encoder_layers": 1, "decoder_layers": 1, "queries": 8,
    "conditioned": 4, "backbone": {"features": ["res3"]},
}  # fmt: skip


def exported(folder: Path, **changes: Any) -> Detr:
    config = DetrConfig.model_validate({**SMALL, **changes})
    torch.manual_seed(0)
    rows = F.normalize(torch.randn(C, D))
    model = build_detr(
        config, embed_dim=D, rows=rows, trainable=None, classes=C, pixel_mean=[127.5] * 3, pixel_std=[64.0] * 3
    ).eval()
    card = DetectorCard(
        model={**config.model_dump(mode="json"), "head": {"scale": config.scale}},
        embed_dim=D,
        pixel_mean=(127.5,) * 3,
        pixel_std=(64.0,) * 3,
        encoder="none",
        encoder_fingerprint="0",
        short_side=64,
        long_side=128,
        classes=tuple("abcde") if config.variant != "agnostic" else (),
        novel=(),
        background_words=("a", "b") if config.variant == "text" else (),
        calibration=Calibration(objectness_weight=1.0).record(),
        config_hash="0",
    )
    save_detector(folder, model, card, background_words=rows[: len(card.background_words)], half=False)  # type: ignore[arg-type]
    return model


def test_region_model__boxes_are_in_original_pixels(tmp_path: Path) -> None:
    model = exported(tmp_path)
    loaded = load_detector_model(tmp_path, top=5)
    image = np.random.default_rng(0).integers(0, 256, (128, 192, 3), dtype=np.uint8)
    regions = loaded.regions(image)
    assert len(regions) == 5 and regions.size == (128, 192) and regions.text.shape == (5, D)
    assert (regions.objectness[:-1] >= regions.objectness[1:]).all()
    small = F.interpolate(
        torch.from_numpy(image).permute(2, 0, 1)[None].float(), (64, 96), mode="bilinear", antialias=True
    )[0]
    found = model.predict(model.memory([{"image": small}]))
    best = int(found.logits[0].argmax())
    expected = (
        box_convert(found.boxes[0, best], "cxcywh", "xyxy").clamp(0, 1) * torch.tensor([192, 128, 192, 128])
    ).tolist()
    assert regions.boxes[0].tolist() == pytest.approx(expected, abs=1e-2)
    boxes, scores = loaded.propose(image, top=3)
    assert boxes.shape == (3, 4) and scores[0] == pytest.approx(float(regions.objectness[0]))


def test_region_model__words_run_in_chunks_with_their_own_queries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported(tmp_path)
    loaded: Any = load_detector_model(tmp_path)
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    rows = torch.randn(6, D)
    read: list[int] = []
    memory = loaded.detr.memory
    monkeypatch.setattr(loaded.detr, "memory", lambda batch: read.append(1) or memory(batch))
    boxes, scores, owner = loaded.conditioned_queries(image, rows, classes_per_pass=4)
    assert len(read) == 1  # the backbone and the encoder see the picture once, however many words are asked
    assert np.bincount(owner).tolist() == [2] * 6 and boxes.shape == (12, 4) and scores.shape == (12,)
    again = loaded.conditioned_queries(image, rows[4:5], classes_per_pass=4)
    np.testing.assert_allclose(boxes[owner == 4], again[0], rtol=1e-4, atol=1e-3)
    monkeypatch.setattr(detr_regions, "PASSES_PER_BATCH", 1)
    for one, other in zip(
        loaded.conditioned_queries(image, rows, classes_per_pass=4), (boxes, scores, owner), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("tower", [False, True])
def test_region_model__conditioned_regions_are_classified_by_embedding(tmp_path: Path, tower: bool) -> None:
    exported(tmp_path, region_tower=tower, backbone={"features": ["res4"]})
    loaded: Any = load_detector_model(tmp_path)
    image = np.random.default_rng(0).integers(0, 256, (128, 192, 3), dtype=np.uint8)
    rows = F.normalize(torch.randn(6, D), dim=1)
    boxes, scores, owner = loaded.conditioned_queries(image, rows, classes_per_pass=4)
    conditioned = loaded.conditioned_regions(image, rows, classes_per_pass=4)
    # As many as there are queries.
    kept = nms(torch.from_numpy(boxes), torch.from_numpy(scores), detr_regions.CONDITIONED_NMS_IOU)[:8]
    assert conditioned.size == (128, 192) and len(conditioned) == len(kept) < len(boxes)
    np.testing.assert_allclose(conditioned.boxes, boxes[kept], rtol=1e-4)
    np.testing.assert_allclose(conditioned.objectness, scores[kept], rtol=1e-4)
    expected = rows[owner[kept]]
    if tower:
        shares = box_convert(
            torch.from_numpy(conditioned.boxes) / torch.tensor([192.0, 128, 192, 128]), "xyxy", "cxcywh"
        )
        memory = loaded.memory(image)
        expected = F.normalize(loaded.detr.region_embeddings(memory, torch.zeros_like(kept), shares), dim=1)
    np.testing.assert_allclose(conditioned.text, expected.detach(), atol=1e-5, rtol=1e-4)
    assert len(load_detector_model(tmp_path, top=2).conditioned_regions(image, rows, classes_per_pass=4)) == 2


def test_region_model__a_pretrained_transformer_proposes_but_knows_no_words(tmp_path: Path) -> None:
    exported(tmp_path, variant="agnostic", embed_space="ssl", conditioned=0)
    loaded: Any = load_detector_model(tmp_path)
    image = np.zeros((64, 64, 3), dtype=np.uint8)
    assert loaded.propose(image, top=4)[0].shape == (4, 4)
    with pytest.raises(UserError, match="knows no words"):
        loaded.regions(image)
    crops = [np.full((20, 30, 3), 200, np.uint8), np.zeros((9, 9, 3), np.uint8)]
    rows = loaded.patch_rows([(crop, (0, 0, crop.shape[1], crop.shape[0])) for crop in crops])
    boxes, _, owner = loaded.locate(image, rows)
    assert boxes.shape == (16, 4) and np.bincount(owner).tolist() == [8, 8]
    encoder = loaded.example_encoder
    crop = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    assert encoder.encode_image(encoder.prepare(crop)).shape == (2, encoder.embed_dim)


def test_find__pretext_model_is_conditioned_on_examples(tmp_path: Path) -> None:
    exported(tmp_path, variant="agnostic", embed_space="ssl", conditioned=0)
    model: Any = load_detector_model(tmp_path)
    detector = Detector(model=model, encoder=WordEncoder())
    rng = np.random.default_rng(0)
    image, mug, cup = (rng.integers(0, 256, shape, dtype=np.uint8) for shape in ((64, 96, 3), (20, 30, 3), (9, 9, 3)))
    examples = {"mug": [mug], "cup": [cup, mug]}
    every = {"threshold": 0.0, "nms_iou": 1.0, "cross_class_iou": None}
    found = detector.find(image, examples=examples, **every)
    first, second = (model.detr.pooled(model_patch(model, crop)) for crop in (mug, cup))
    rows = torch.cat([first, (first + second) / 2])  # two crops of one thing are averaged
    boxes, scores, owner = model.locate(image, rows)
    order = np.argsort(-scores)
    assert found.names == ("mug", "cup") and found.size == (64, 96)
    np.testing.assert_allclose(found.confidence, scores[order], rtol=1e-5)
    np.testing.assert_allclose(found.xyxy, boxes[order], rtol=1e-4, atol=1e-3)
    assert found.class_id.tolist() == owner[order].tolist()
    assert found.best.tolist() == pytest.approx([float(scores[owner == c].max()) for c in (0, 1)], rel=1e-5)
    few = detector.find(image, examples=examples, threshold=float(found.confidence[2]), nms_iou=1.0, limit=2)
    assert len(few) <= 2 and few.confidence[0] == found.confidence[0]
    for words, shown in (("mug", None), ("mug", examples), (None, {"mug": [mug], "-cup": [cup]})):
        with pytest.raises(UserError, match="pretrained on patches"):
            detector.find(image, words, examples=shown)
    with pytest.raises(UserError, match="between 0 and 1"):
        detector.find(image, examples=examples, threshold=2.0)


def test_evaluation__the_pretext_model_is_conditioned_on_the_crops_of_its_classes(tmp_path: Path) -> None:
    exported(tmp_path, variant="agnostic", embed_space="ssl", conditioned=0)
    model: Any = load_detector_model(tmp_path)
    detector = Detector(model=model, encoder=WordEncoder())
    rng = np.random.default_rng(0)
    image, *crops = (rng.integers(0, 256, shape, dtype=np.uint8) for shape in ((64, 96, 3), (20, 30, 3), (9, 9, 3)))
    shown = {7: [Crop(crops[0])], 4: [Crop(crops[1])]}
    every = example_predictor(detector, shown, limit=1000)
    assert isinstance(every, PretextPredictor)
    rows = torch.cat([model.detr.pooled(model_patch(model, crop)) for crop in crops])
    boxes, scores, owner = model.locate(image, rows)
    kept = batched_nms(*map(torch.from_numpy, (boxes, scores, owner)), every.nms_iou)
    found = every(image, 1)
    assert [one["category_id"] for one in found] == [(7, 4)[int(owner[k])] for k in kept]
    assert [one["score"] for one in found] == pytest.approx([float(scores[k]) for k in kept], rel=1e-4)
    x1, y1, x2, y2 = boxes[kept[0]].tolist()
    assert found[0]["bbox"] == pytest.approx([x1, y1, x2 - x1, y2 - y1], abs=0.01)
    some = example_predictor(detector, shown, present={1: frozenset({4}), 2: frozenset()}, limit=3)
    assert {one["category_id"] for one in some(image, 1)} == {4} and len(some(image, 1)) <= 3
    assert some(image, 2) == []


def model_patch(model: Any, crop: np.ndarray) -> torch.Tensor:
    """A whole picture as the pretext cuts a patch."""
    return crop_regions(crop, np.array([[0, 0, crop.shape[1], crop.shape[0]]]), size=model.patch_size, scales=(1.0,))[0]


def test_forward__in_eval_mode_gives_detectron2_instances() -> None:
    model = make("conditional").eval()
    found = model([{**picture(64, 96, [], []), "height": 128, "width": 192}])[0]["instances"]
    assert found.image_size == (128, 192) and len(found) == 6
    assert float(found.pred_boxes.tensor.max()) > 96 or STRIDE > 96
    assert ((found.scores >= 0) & (found.scores <= 1)).all()


# --- the region tower


def test_region_tower__embeds_what_lies_in_the_box_of_its_own_picture() -> None:
    model = make(region_tower=region_tower()).eval()
    small, large = picture(48, 32, [], []), picture(96, 128, [], [], seed=1)
    memory = model.memory([small, large])
    boxes = torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.5, 0.25, 1.0, 0.5]])
    found = model.region_embeddings(memory, torch.arange(2), boxes)
    maps = memory.maps["res4"]
    corners = torch.tensor(
        [[0.0, 8, 12, 24, 36], [1.0, 0, 0, 128, 48]]
    )  # shares of each picture, not of the padded batch
    pooled = roi_align(maps, corners, 4, spatial_scale=1 / STRIDE, sampling_ratio=2, aligned=True)
    assert model.region_tower is not None
    torch.testing.assert_close(found, model.region_tower(pooled)[1])


def test_region_tower__embeds_free_queries_only() -> None:
    plain, model = make().eval(), make(region_tower=region_tower()).eval()
    batch = [picture(64, 96, TWO, [1, 2])]
    free, other = (network.predict(network.memory(batch)) for network in (model, plain))
    torch.testing.assert_close(free.boxes, other.boxes)
    expected = model.region_embeddings(model.memory(batch), torch.zeros(6, dtype=torch.int64), free.boxes[0])
    torch.testing.assert_close(free.embeddings[0], F.normalize(expected, dim=-1))
    rows = torch.randn(1, 2, D)
    conditioned, expected_z = (
        network.predict(network.memory(batch), conditions_NMD=rows).embeddings for network in (model, plain)
    )
    torch.testing.assert_close(conditioned, expected_z)


def test_region_tower__its_loss_is_the_text_loss_of_labelled_boxes_and_moves_no_box() -> None:
    model = make(region_tower=region_tower(), box_noise=0.0, novel=(4,)).train()
    batch = [picture(64, 96, TWO, [1, 2]), picture(64, 64, [], []), picture(48, 64, TWO[:1], [0], seed=2)]
    losses = model(batch)
    model.zero_grad()
    losses["loss_text"].backward()
    moved = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert moved <= {"region_tower", "classifier"} and "region_tower" in moved
    memory = model.memory(batch)
    targets = Targets.of_instances([x["instances"] for x in batch], device=model.device)
    boxes = torch.stack([targets.boxes[0, 0], targets.boxes[0, 1], targets.boxes[2, 0]])
    z = model.region_embeddings(memory, torch.tensor([0, 0, 2]), boxes)
    assert model.classifier is not None
    expected = F.cross_entropy(model.classifier(z), torch.tensor([1, 2, 0]))  # noise 0: the boxes themselves
    assert float(losses["loss_text"]) == pytest.approx(float(expected), rel=1e-5)
    with pytest.raises(NovelLabelError):
        model([picture(64, 96, TWO, [1, 4])])


def test_region_tower__starts_as_the_last_stage_and_survives_export(tmp_path: Path) -> None:
    encoder = build_encoder(EncoderConfig(embed_dim=D, image=ResNetTower(image_size=64)))
    changes = {"region_tower": True, "backbone": {"features": ["res4", "res5"]}}
    model = exported(tmp_path / "random", **changes)
    assert model.region_tower is not None
    assert isinstance(encoder.visual, ResNetImage)
    state = export_backbone(encoder)
    load_bottom_up(model.backbone, state, source="the encoder")
    init_body(model.region_tower, state, source="the encoder")
    init_projection(model.region_tower, encoder.visual.proj.weight)
    model.eval()
    encoder.eval()
    pixels = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    memory = model.memory([{"image": pixels[0]}])
    whole = torch.tensor([[0.5, 0.5, 1.0, 1.0]])
    # The whole of a picture of 64 pixels is the encoder's own res4, but for how RoIAlign reads between its cells.
    said = F.normalize(model.region_embeddings(memory, torch.zeros(1, dtype=torch.int64), whole)[0], dim=0)
    res4 = memory.maps["res4"]
    pooled = roi_align(
        res4, [torch.tensor([[0.0, 0, 64, 64]])], 4, spatial_scale=1 / 16, sampling_ratio=2, aligned=True
    )
    features = model.region_tower.body(res4).mean(dim=(2, 3))
    own = F.normalize(encoder.visual.proj(features)[0], dim=0)
    torch.testing.assert_close(
        own, F.normalize(encoder.encode_image(model.normalised(pixels))[0], dim=0), atol=1e-4, rtol=0
    )
    near = F.normalize(model.region_tower(pooled)[1][0], dim=0)
    torch.testing.assert_close(said, near)
    loaded = load_detector_model(tmp_path / "random", top=5)
    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    assert loaded.regions(image).text.shape == (5, D)


@pytest.mark.parametrize(
    "changes", [{"variant": "closed"}, {"backbone": {"features": ["res5"]}}, {"variant": "agnostic", "conditioned": 0}]
)
def test_region_tower__needs_words_and_its_map(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="region_tower reads res4 for words"):
        DetrConfig.model_validate({"arch": "conditional", "region_tower": True, **changes})
