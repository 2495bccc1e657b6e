# SPDX-License-Identifier: Apache-2.0
"""Random query patch detection: patches, queries, losses; one test for each bug known of published code."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import box_convert

from ovd.config_detr import PatchConfig
from ovd.data.mapper import TrainingTransform
from ovd.data.patches import PatchSource
from ovd.modeling.detr.build import init_projections
from ovd.modeling.detr.matcher import box_cost, hungarian_match, object_cost
from ovd.modeling.detr.structures import DecoderOutput
from ovd.modeling.detr.updetr import PatchPretext
from ovd.regions.crops import crop_regions
from pretrain.engine.errors import BadImageError
from tests.updetr.small import CHANNELS, make, patch_batch


class Pictures:
    """Photos of noise with a bright thing in them."""

    def __init__(self, height: int = 120, width: int = 200, count: int = 3) -> None:
        self.height, self.width, self.count = height, width, count

    def __len__(self) -> int:
        return self.count

    def image(self, index: int) -> np.ndarray:
        picture = np.random.default_rng(index).integers(0, 60, (self.height, self.width, 3), dtype=np.uint8)
        picture[self.height // 4 : self.height // 2, self.width // 2 : self.width // 2 + 40] = (250, 40, 40)
        return picture

    def label(self, index: int) -> int:
        return -1


def source(*, images: Pictures | None = None, seed: int = 7, crop_scales: Any = (1.0,), **changes: Any) -> PatchSource:
    return PatchSource(
        images=images or Pictures(),
        transform=TrainingTransform(short_side=60, long_side=200, flip=0.0),
        seed=seed,
        config=PatchConfig(**{"count": 6, "size": 16, "variants": 3, **changes}),
        crop_scales=crop_scales,
    )


def task(
    patches: int = 3, *, arch: str = "conditional", queries: int = 6, width: int = 16, **changes: Any
) -> PatchPretext:
    model = make(arch, variant="agnostic", queries=queries, width=width)
    return PatchPretext(model=model, embed=lambda p: model.pooled(p[:, 0]), **changes).train()


# --- patches


@pytest.mark.parametrize("sampler", ["official", "log_uniform", "prior"])
def test_patches__are_a_pure_function_of_seed_picture_and_variant(sampler: Any) -> None:
    first, again = source(sampler=sampler), source(sampler=sampler)
    one = first.variant(1, 0)
    np.random.seed(0)
    torch.manual_seed(0)
    two = again.variant(1, 0)
    assert torch.equal(one["boxes"], two["boxes"]) and torch.equal(one["patches"], two["patches"])
    assert not torch.equal(one["boxes"], first.variant(1, 1)["boxes"])
    assert not torch.equal(one["boxes"], first.variant(2, 0)["boxes"])
    assert not torch.equal(one["boxes"], source(sampler=sampler, seed=8).variant(1, 0)["boxes"])
    assert torch.equal(first.sample(1, 4)["boxes"], first.variant(1, 1)["boxes"])  # draw 4 of 3 pictures: second epoch


@pytest.mark.parametrize("sampler", ["official", "log_uniform", "prior"])
def test_patches__lie_in_the_picture_and_are_not_too_small(sampler: Any) -> None:
    patches = source(sampler=sampler, min_side=8)
    for index in range(3):
        boxes = patches.boxes(patches.images.image(index), np.random.default_rng(index))
        assert boxes.shape == (6, 4)
        assert (boxes >= 0).all() and (boxes[:, 2] <= 200).all() and (boxes[:, 3] <= 120).all()
        assert (boxes[:, 2:] - boxes[:, :2] >= 8).all()


def test_patches__log_uniform_reaches_small_ones_and_avoids_near_duplicates() -> None:
    rng = np.random.default_rng(0)

    def drawn(sampler: Any) -> tuple[float, float]:
        patches = source(sampler=sampler, count=8, max_iou=0.5)
        small = doubles = 0
        image = patches.images.image(0)
        for _ in range(60):
            boxes = torch.from_numpy(patches.boxes(image, rng))
            sides = boxes[:, 2:] - boxes[:, :2]
            small += int((sides.prod(1).sqrt() < 0.2 * (120 * 200) ** 0.5).sum())
            low, high = (
                torch.maximum(boxes[:, None, :2], boxes[None, :, :2]),
                torch.minimum(boxes[:, None, 2:], boxes[None, :, 2:]),
            )
            inner = (high - low).clamp(min=0).prod(-1)
            iou = inner / (sides.prod(1)[:, None] + sides.prod(1)[None] - inner)
            doubles += int(((iou > 0.5).sum() - 8) / 2)
        return small / 480, doubles / 480

    ours, official = drawn("log_uniform"), drawn("official")
    assert ours[0] > 0.3 > official[0]
    assert ours[1] < 0.02 < official[1]


def test_patches__region_prior_finds_the_salient_object() -> None:
    patches = source(sampler="prior", count=4)
    thing = np.array([100, 30, 140, 60], dtype=np.float32)
    hits = 0
    for seed in range(10):
        boxes = patches.boxes(patches.images.image(0), np.random.default_rng(seed))
        low, high = np.maximum(boxes[:, :2], thing[:2]), np.minimum(boxes[:, 2:], thing[2:])
        inner = np.clip(high - low, 0, None).prod(1)
        hits += bool((inner / ((boxes[:, 2:] - boxes[:, :2]).prod(1) + 1200 - inner) > 0.4).any())
    assert hits >= 8


def test_patches__region_prior_respects_the_scale() -> None:
    """Specks that stand out are no patches: the transformer's cells are larger than they are."""
    patches = source(sampler="prior", count=12, scale=(0.15, 0.5), max_aspect=2.0, max_iou=0.7)
    boxes = np.concatenate([patches.boxes(patches.images.image(i), np.random.default_rng(i)) for i in range(3)])
    sides = boxes[:, 2:] - boxes[:, :2]
    share = np.sqrt(sides.prod(1) / (120 * 200))
    assert share.min() > 0.15 * 0.8 and share.max() < 0.5 * 1.2  # each border moves by a tenth


def test_patches__are_cut_from_the_stored_picture_and_their_boxes_follow_the_resize() -> None:
    patches = source()
    stored = patches.images.image(2)
    one = patches.variant(2, 0)
    assert one["image"].shape == (3, 60, 100)  # half the side
    boxes = patches.boxes(stored, np.random.default_rng([7, 2, 0]))
    torch.testing.assert_close(one["boxes"], torch.from_numpy(boxes) / 2)
    assert torch.equal(one["patches"], crop_regions(stored, boxes, size=16, scales=(1.0,)))


def test_resize__the_long_side_holds_for_every_drawn_scale() -> None:
    transform = TrainingTransform(short_side=400, long_side=600, scale=(0.8, 1.2), flip=0.0)
    rng = np.random.default_rng(0)
    sides = [transform.draw(375, 500, rng).apply_image(np.zeros((375, 500, 1), np.uint8)).shape[:2] for _ in range(60)]
    assert max(max(side) for side in sides) == 600 and min(min(side) for side in sides) < 350


def test_patches__jitter_changes_patches_only_and_is_deterministic() -> None:
    plain, jittered = source(), source(jitter=True)
    one, two = plain.variant(0, 0), jittered.variant(0, 0)
    assert torch.equal(one["image"], two["image"]) and torch.equal(one["boxes"], two["boxes"])
    assert not torch.equal(one["patches"], two["patches"])
    before = torch.get_rng_state()
    assert torch.equal(two["patches"], source(jitter=True).variant(0, 0)["patches"])
    assert torch.equal(before, torch.get_rng_state())


def test_patches__a_picture_too_small_for_them_is_replaced_by_the_loop() -> None:
    with pytest.raises(BadImageError, match="more than 16"):
        source(images=Pictures(height=16)).variant(0, 0)


# --- queries


@pytest.mark.parametrize("arch", ["detr", "conditional"])
@pytest.mark.parametrize(("queries", "patches"), [(6, 1), (6, 3), (7, 3), (24, 6), (5, 5)])
@pytest.mark.parametrize("grouped", [True, False])
def test_pretext__any_number_of_patches_and_queries_is_finite(
    arch: str, queries: int, patches: int, grouped: bool
) -> None:
    pretext = task(arch=arch, queries=queries, grouped=grouped)
    loss, parts = pretext(patch_batch(2, patches))
    loss.backward()
    assert set(parts) == {"loss_object", "loss_l1", "loss_giou", "loss_reconstruction"}
    assert all(torch.isfinite(v) for v in parts.values())
    gradients = [p.grad for p in pretext.parameters() if p.grad is not None]
    assert all(torch.isfinite(g).all() for g in gradients)


def test_queries__each_patch_goes_to_its_own_contiguous_share() -> None:
    pretext = task(mask_queries=0.0)
    embeddings = torch.randn(2, 3, CHANNELS)
    conditions, group = pretext.conditions(embeddings)
    assert group.tolist() == [0, 0, 1, 1, 2, 2]
    expected = pretext.detr.patch2query(embeddings).repeat_interleave(2, dim=1)
    torch.testing.assert_close(conditions, expected)


def test_queries__a_tenth_gets_no_patch_in_training_and_none_of_them_in_eval() -> None:
    pretext = task(mask_queries=0.1, queries=120)
    embeddings = torch.randn(40, 3, CHANNELS)
    torch.manual_seed(0)
    masked = (pretext.conditions(embeddings)[0] == 0).all(-1)  # per query and picture, not per patch
    assert 0.08 < float(masked.float().mean()) < 0.12
    assert not (masked.view(40, 3, 40).all(-1)).any()
    pretext.eval()
    assert not (pretext.conditions(embeddings)[0] == 0).all(-1).any()


def test_eval__is_deterministic_and_train_is_not() -> None:
    pretext, batch = task(mask_queries=0.5, shuffle=True), patch_batch(2, 3)
    assert not torch.equal(pretext.predict(batch)[0].boxes, pretext.predict(batch)[0].boxes)
    pretext.eval()
    assert torch.equal(pretext.predict(batch)[0].boxes, pretext.predict(batch)[0].boxes)


@pytest.mark.parametrize("arch", ["detr", "conditional"])
@pytest.mark.parametrize("mask", [True, False])
def test_attention_mask__hides_other_patches(arch: str, mask: bool) -> None:
    pretext = task(arch=arch, attention_mask=mask, mask_queries=0.0)
    batch = patch_batch(1, 3)
    first = pretext.predict(batch)[0].states
    batch[0]["patches"][0] = 255 - batch[0]["patches"][0]
    second = pretext.predict(batch)[0].states
    assert not torch.allclose(first[:, :, :2], second[:, :, :2])
    assert torch.allclose(first[:, :, 2:], second[:, :, 2:], atol=1e-5) == mask


def test_shuffle__is_one_permutation_of_the_object_queries() -> None:
    pretext = task(patches=1, shuffle=True, mask_queries=0.0, arch="detr")
    batch = patch_batch(2, 1)
    torch.manual_seed(3)
    shuffled = pretext.predict(batch)[0].boxes
    torch.manual_seed(3)
    order = torch.randperm(6)
    pretext.shuffle = False
    plain = pretext.predict(batch)[0].boxes
    assert not torch.allclose(shuffled, plain)
    torch.testing.assert_close(shuffled, plain[:, :, order])  # with one patch and no mask queries are exchangeable


def test_denoising__a_patch_with_a_noised_box_is_trained_on_its_box_alone() -> None:
    torch.manual_seed(0)
    model = make("conditional", variant="agnostic", denoising=2)
    pretext = PatchPretext(model=model, embed=lambda p: model.pooled(p[:, 0]), mask_queries=0.0).train()
    batch = patch_batch(2, 3)
    loss, parts = pretext(batch)
    dn_losses = {name for name in parts if name.endswith("_dn")}
    assert dn_losses == {"loss_object_dn", "loss_l1_dn", "loss_giou_dn"}  # they carry the embedding already
    assert float(loss.detach()) == pytest.approx(sum(float(v) for v in parts.values()), rel=1e-5)
    pretext.eval()
    free = pretext.predict(batch)[0]
    model.denoising.groups = 0
    torch.testing.assert_close(pretext.predict(batch)[0].boxes, free.boxes)
    plain = pretext.train()(batch)[1]
    for name, value in plain.items():  # free queries do not see the answers
        torch.testing.assert_close(parts[name], value)


def test_denoising__content_is_the_patch_and_the_anchor_its_noised_box() -> None:
    model = make("conditional", variant="agnostic", denoising=2, box_noise=0.0, label_noise=0.0)
    pretext = PatchPretext(model=model, embed=lambda p: model.pooled(p[:, 0]), mask_queries=0.0).train()
    _, targets, _ = pretext.predict(patch_batch(2, 3))
    dn = model.denoising.queries(targets, condition=model.patch2query, classifier=None)
    assert dn is not None and targets.embeddings is not None
    torch.testing.assert_close(dn.content, model.patch2query(targets.embeddings).repeat(1, 2, 1))
    torch.testing.assert_close(dn.anchors.sigmoid(), targets.boxes.repeat(1, 2, 1))
    assert dn.group.tolist() == [0, 0, 0, 1, 1, 1]
    torch.manual_seed(0)
    model.denoising.label_noise = 0.25  # share of them that gets the box only
    many = targets._replace(
        boxes=targets.boxes.repeat(1, 100, 1), embeddings=targets.embeddings.repeat(1, 100, 1), counts=[300, 300]
    )
    dn = model.denoising.queries(many, condition=model.patch2query, classifier=None)
    assert dn is not None
    assert 0.2 < float((dn.content == 0).all(-1).float().mean()) < 0.3


# --- losses


def test_reconstruction__squared_distance_of_unit_vectors() -> None:
    pretext = task(mask_queries=0.0)
    batch = patch_batch(2, 3)
    out, targets, group = pretext.predict(batch)
    model = pretext.detr
    assert model.object_embed is not None and targets.embeddings is not None
    cost = box_cost(out.boxes, targets.boxes, l1=5, giou=2) + 2 * object_cost(
        model.object_embed(out.states)[..., 0], kind="focal"
    )
    pairs = hungarian_match(cost, targets.counts, query_group_Q=group, target_group_NT=targets.groups)
    total = 0.0
    for layer, n, q, t in zip(*(c.tolist() for c in pairs), strict=True):
        z = F.normalize(model.feature_align(out.states[layer, n, q]), dim=0)
        p = F.normalize(targets.embeddings[n, t], dim=0)
        total += float(((z - p) ** 2).sum())
    got = model.criterion(out, targets, model, num_targets=6, query_group_Q=group)["loss_reconstruction"]
    assert float(got) == pytest.approx(total / 6, rel=1e-4)


def test_reconstruction__matched_target_without_gradient() -> None:
    pretext = task(grouped=False, mask_queries=0.0)
    _, targets, _ = pretext.predict(patch_batch(1, 3))
    assert targets.groups is None and targets.embeddings is not None and not targets.embeddings.requires_grad
    grouped = task(mask_queries=0.0)
    assert grouped.predict(patch_batch(1, 3))[1].groups is not None


def test_contrast__classifies_among_the_patches_of_the_picture() -> None:
    model = make("conditional", variant="agnostic", loss={"contrast": 1.0})
    pretext = PatchPretext(model=model, embed=lambda p: model.pooled(p[:, 0])).train()
    loss, parts = pretext(patch_batch(2, 3))
    loss.backward()
    assert float(parts["loss_contrast"]) > 0
    perfect = model.feature_align
    assert perfect.layers[-1].weight.grad is not None


def test_measure__a_perfect_answer_scores_one_and_a_constant_box_what_it_overlaps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretext = task()
    batch = patch_batch(2, 3)
    real = pretext.predict

    def answer(make_boxes: Any) -> Any:
        def predict(batch: list[dict[str, Any]]) -> Any:
            out, targets, group = real(batch)
            return DecoderOutput(out.states, make_boxes(out.boxes, targets.boxes, group)), targets, group

        return predict

    monkeypatch.setattr(pretext, "predict", answer(lambda predicted, true, group: true[:, group].expand_as(predicted)))
    measured = pretext.measure([batch, batch])
    assert measured["patch_miou"] == pytest.approx(1.0) and measured["patch_recall50"] == 1.0
    assert pretext.training  # as it was
    middle = torch.tensor([0.5, 0.5, 0.3, 0.3])
    monkeypatch.setattr(pretext, "predict", answer(lambda predicted, true, group: middle.expand_as(predicted)))
    true = torch.stack([x["boxes"] for x in batch]) / 64
    assert pretext.measure([batch])["patch_miou"] == pytest.approx(
        _mean_iou(box_convert(true, "xyxy", "cxcywh"), middle), rel=1e-4
    )


def _mean_iou(boxes: Tensor, constant: Tensor) -> float:
    total = []
    for x, y, w, h in boxes.reshape(-1, 4).tolist():
        cx, cy, cw, ch = constant.tolist()
        wide = max(0.0, min(x + w / 2, cx + cw / 2) - max(x - w / 2, cx - cw / 2))
        tall = max(0.0, min(y + h / 2, cy + ch / 2) - max(y - h / 2, cy - ch / 2))
        total.append(wide * tall / (w * h + cw * ch - wide * tall))
    return sum(total) / len(total)


def test_measure__a_patch_whose_most_similar_token_lies_elsewhere_counts_as_missed() -> None:
    pretext = task(patches=2)
    grid = torch.zeros(CHANNELS, 4, 4)
    grid[0, 0, 0], grid[1, 3, 2] = 1.0, 1.0  # two cells that stand out, among others that say nothing
    batch = [
        {
            "features": {"res4": grid}, "size": (64, 64), "embeddings": torch.eye(CHANNELS)[:2],
            "boxes": torch.tensor([[0.0, 0.0, 16.0, 16.0], [0.0, 0.0, 16.0, 32.0]]),
        }
    ]  # fmt: skip
    with torch.no_grad():
        pretext.detr.input_proj.weight.copy_(torch.eye(16, CHANNELS)[:, :, None, None])
        pretext.detr.input_proj.bias.zero_()
        pretext.detr.patch2query.weight.copy_(torch.eye(16, CHANNELS))
        pretext.detr.patch2query.bias.zero_()
    inside, area = pretext.most_similar_token(batch)
    assert inside.tolist() == [True, False]
    assert area.tolist() == [1 / 16, 1 / 8]


def test_report__measures_once_per_interval() -> None:
    pretext = task(held_out=[patch_batch(1, 3)], evaluate_every=10)
    assert "patch_miou" in pretext.report()[0]
    pretext.after_step(4, 100)
    assert pretext.report() == ({}, [])
    pretext.after_step(9, 100)
    assert "patch_miou" in pretext.report()[0]


def test_pretext__learns_to_find_patches_on_easy_pictures() -> None:
    """Four flat looks in the quarters of a picture; a query that ignores its patch can be right one time in four."""
    generator = torch.Generator().manual_seed(0)
    corner = torch.tensor([[0, 0], [32, 0], [0, 32], [32, 32]], dtype=torch.float32)
    samples = []
    for _ in range(16):
        look = torch.randn(4, CHANNELS, generator=generator) * 2
        order = torch.randperm(4, generator=generator)
        grid = look.T.reshape(CHANNELS, 2, 2).repeat_interleave(2, 1).repeat_interleave(2, 2)
        boxes = torch.cat([corner, corner + 32], 1)[order]
        samples.append({"features": {"res4": grid}, "size": (64, 64), "boxes": boxes, "embeddings": look[order]})
    pretext = task(queries=8, mask_queries=0.0, width=32)
    tokens = torch.cat([one["features"]["res4"].flatten(1).T for one in samples])
    init_projections(pretext.detr, tokens_SC=tokens, embeddings_PD=torch.cat([one["embeddings"] for one in samples]))
    optimizer = torch.optim.AdamW([p for p in pretext.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        pretext(samples)[0].backward()
        torch.nn.utils.clip_grad_norm_(pretext.parameters(), 1.0)
        optimizer.step()
    measured = pretext.measure([samples])
    assert measured["patch_miou"] > 0.4
    assert measured["patch_look_alike"] == 1.0 and measured["patch_area"] == 0.25


# --- where the projections start


def shifted(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Distinct looks under a large part shared by all of them, once as tokens and once as patches, shared otherwise."""
    generator = torch.Generator().manual_seed(seed)
    look = torch.randn(count, CHANNELS, generator=generator)
    return look + 30 * torch.randn(CHANNELS, generator=generator), 2 * look + 30 * torch.randn(
        CHANNELS, generator=generator
    )


def projected(model: Any, tokens: Tensor) -> Tensor:
    return model.input_proj(tokens[..., None, None])[..., 0, 0]


def test_patch2query__start_ignores_the_common_component() -> None:
    model = make(variant="agnostic")
    tokens, patches = shifted(50, seed=1)
    done = init_projections(model, tokens_SC=tokens, embeddings_PD=patches)
    with torch.no_grad():
        key, query = projected(model, tokens), model.patch2query(patches)
    assert "the same map" in done
    assert key.mean(0).abs().max() < 1e-3 and query.mean(0).abs().max() < 1e-3
    alike = F.normalize(query, dim=1) @ F.normalize(key, dim=1).T
    assert bool((alike.argmax(1) == torch.arange(50)).all())
    raw = F.normalize(patches, dim=1) @ F.normalize(tokens, dim=1).T
    assert float((raw.argmax(1) == torch.arange(50)).float().mean()) < 0.5  # what it is for


def test_patch2query__start_inverts_the_joint_projection() -> None:
    model = make(variant="text", width=32)  # 12 dimensions of 8 channels: the projection loses nothing
    tokens, _ = shifted(50, seed=2)
    projection = torch.randn(12, CHANNELS, generator=torch.Generator().manual_seed(3))
    init_projections(
        model, tokens_SC=tokens, embeddings_PD=(tokens - tokens.mean(0)) @ projection.T, projection_DC=projection
    )
    with torch.no_grad():
        key = projected(model, tokens)
        query = model.patch2query((tokens - tokens.mean(0)) @ projection.T)
    alike = F.normalize(query, dim=1) @ F.normalize(key, dim=1).T
    assert float((alike.argmax(1) == torch.arange(50)).float().mean()) > 0.9
    assert float(query.std(0).norm()) == pytest.approx(float(key.std(0).norm()), rel=1e-3)


def test_start__a_patch_of_another_space_keeps_its_random_projection() -> None:
    model = make(variant="text")
    before = model.patch2query.weight.clone()
    done = init_projections(model, tokens_SC=shifted(9, 1)[0], embeddings_PD=torch.randn(9, 12))
    assert "at random" in done and torch.equal(model.patch2query.weight, before)


def test_patch2query__start_from_one_patch_is_finite() -> None:
    model = make(variant="agnostic")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert "at random" in init_projections(model, tokens_SC=torch.randn(1, CHANNELS))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
