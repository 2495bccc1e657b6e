# SPDX-License-Identifier: Apache-2.0
"""CLIP's and text distillation's step, observed: what learns, what stays, what is clamped."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from pretrain.clip_augment import augment, grey_axis_rotation
from pretrain.config import AugmentConfig, CbowTower, ClipMethod, EncoderConfig, ResNetTower, ViTTower
from pretrain.data.targets import PhraseBatch
from pretrain.methods.clip import Clip
from pretrain.methods.text_distill import TextDistill
from pretrain.nets.towers import JointEncoder, build_encoder

PLAIN = AugmentConfig(crop_scale=(1.0, 1.0), flip=0.0, brightness=0.0, contrast=0.0, colour=0.0)
TEXT = CbowTower(width=16, hidden=16, context_length=8)
VIT = ViTTower(kind="vit", patch_size=8, width=32, layers=1, heads=2, image_size=16)


def make(**changes: Any) -> JointEncoder:
    torch.manual_seed(0)
    return build_encoder(EncoderConfig(**{"embed_dim": 8, "image": VIT, "text": TEXT, **changes}))


def colours(count: int, seed: int) -> dict[str, Any]:
    """Plain pictures of four colours with their names: learnable in seconds."""
    names = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 220), "white": (240, 240, 240)}
    labels = torch.randint(0, 4, (count,), generator=torch.Generator().manual_seed(seed))
    palette = torch.tensor(list(names.values()), dtype=torch.uint8)
    image = palette[labels][:, :, None, None].expand(count, 3, 16, 16).clone()
    return {"image": image, "caption": [f"a {list(names)[int(i)]} square" for i in labels], "class_id": labels}


def learn(task: torch.nn.Module, batches: list[Any], lr: float = 3e-3) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in task.parameters() if p.requires_grad], lr=lr)
    losses = []
    for step, batch in enumerate(batches):
        loss, _ = task(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        getattr(task, "after_step", lambda *_: None)(step, len(batches))
        losses.append(loss.item())
    return losses


def test_clip__learns_to_match_pictures_with_words() -> None:
    task = Clip(encoder=make())
    losses = learn(task, [colours(16, seed) for seed in range(60)])
    # With shared nouns the floor is the entropy of the targets, about log 4.
    assert losses[-1] < losses[0] - 0.5
    encoder = task.encoder.eval()
    with torch.no_grad():
        test = colours(32, 999)
        image = F.normalize(encoder.encode_image(encoder.prepare(test["image"])), dim=-1)
        words = ["a red square", "a green square", "a blue square", "a white square"]
        text = F.normalize(encoder.encode_text(encoder.tokenize(words)), dim=-1)
        assert ((image @ text.T).argmax(1) == test["class_id"]).float().mean() > 0.9


def test_same_noun_positive__false_counts_only_the_own_caption() -> None:
    batch = colours(8, 0)
    batch["class_id"][:] = 1
    batch["caption"] = ["the same words"] * 8
    shared = Clip(encoder=make(), augmentation=PLAIN)(batch)[1]["batch_top1"]
    own = Clip(encoder=make(), same_noun_positive=False, augmentation=PLAIN)(batch)[1]["batch_top1"]
    assert shared == 1.0
    assert own < 1.0


@pytest.mark.parametrize("projection", [False, True])
def test_freeze_text__keeps_weights_and_is_not_checkpointed(projection: bool) -> None:
    task = Clip(encoder=make(text_projection=projection), freeze_text=True).train()
    before = {k: v.clone() for k, v in task.state_dict().items()}
    learn(task, [colours(8, seed) for seed in range(3)])
    changed = {k for k, v in task.state_dict().items() if not torch.equal(v, before[k])}
    frozen = {k for k in before if k.startswith(task.untracked)}
    assert frozen == {k for k in before if k.startswith("encoder.text.trunk." if projection else "encoder.text.")}
    assert not changed & frozen
    assert ("encoder.text.proj.weight" in changed) == projection
    assert "encoder.visual.proj" in changed
    trunk: Any = task.encoder.text.trunk if projection else task.encoder.text  # type: ignore[union-attr]
    assert not trunk.training and task.encoder.visual.training  # type: ignore[union-attr]


def test_clip__trains_both_towers_and_logit_scale() -> None:
    task = Clip(encoder=make()).train()
    before = {k: v.detach().clone() for k, v in task.named_parameters()}
    learn(task, [colours(8, 0)])
    changed = {k for k, v in task.named_parameters() if not torch.equal(v, before[k])}
    assert {"encoder.logit_scale", "encoder.text.token_embedding.weight", "encoder.visual.conv1.weight"} <= changed
    assert task.untracked == ()


def test_clip__temperature_is_clamped_after_the_step() -> None:
    task = Clip(encoder=make())
    with torch.no_grad():
        task.encoder.logit_scale.fill_(8.0)
    task.after_step(0, 10)
    assert task.encoder.logit_scale.exp().item() == pytest.approx(100)


def test_clip__needs_both_towers() -> None:
    with pytest.raises(ValueError, match="image tower and a text tower"):
        Clip(encoder=make(image=None))


# --- augmentation ----------------------------------------------------------------------------------------------------


def picture() -> torch.Tensor:
    ramp = torch.linspace(0.1, 0.6, 16)
    return torch.stack([ramp.expand(16, 16), ramp[:, None].expand(16, 16), torch.full((16, 16), 0.3)])[None]


def test_augment__off_changes_nothing() -> None:
    torch.testing.assert_close(augment(picture(), PLAIN, 16), picture())


def test_augment__flip_mirrors_left_and_right() -> None:
    flipped = augment(picture(), PLAIN.model_copy(update={"flip": 1.0}), 16)
    torch.testing.assert_close(flipped, picture().flip(-1))


def test_augment__crops_lie_inside_the_picture() -> None:
    torch.manual_seed(0)
    many = augment(picture().expand(64, 3, 16, 16), PLAIN.model_copy(update={"crop_scale": (0.3, 0.5)}), 16)
    spread = many[:, 0].amax((1, 2)) - many[:, 0].amin((1, 2))
    assert (spread < 0.8 * 0.5).all()  # less than the whole ramp
    assert (spread > 0.3 * 0.5).all()
    assert many[:, 0].min() >= 0.1 - 1e-4 and many[:, 0].max() <= 0.6 + 1e-4
    assert len({round(float(v), 4) for v in many[:, 0].mean((1, 2))}) > 32  # drawn per picture


def test_augment__colours_differ_by_picture_and_stay_in_range() -> None:
    torch.manual_seed(0)
    config = PLAIN.model_copy(update={"brightness": 0.5, "contrast": 0.5, "colour": 0.5})
    many = augment(torch.rand(32, 3, 16, 16), config, 16)
    assert many.min() >= 0 and many.max() <= 1
    torch.manual_seed(1)
    first = augment(picture().expand(2, 3, 16, 16), config, 16)
    assert not torch.allclose(first[0], first[1])
    torch.manual_seed(1)
    torch.testing.assert_close(augment(picture().expand(2, 3, 16, 16), config, 16), first)


def test_augment__hue_rotates_around_grey() -> None:
    turn = grey_axis_rotation(torch.tensor([2 * math.pi / 3, 0.7]))
    torch.testing.assert_close(turn[0] @ torch.tensor([1.0, 0, 0]), torch.tensor([0.0, 1, 0]))  # red becomes green
    torch.testing.assert_close(turn[1] @ torch.full((3,), 0.4), torch.full((3,), 0.4))
    torch.testing.assert_close(turn[1] @ turn[1].T, torch.eye(3))


def test_augment__hue_keeps_brightness_and_grey() -> None:
    torch.manual_seed(0)
    many = picture().expand(32, 3, 16, 16)
    turned = augment(many, PLAIN.model_copy(update={"hue": 1.0}), 16)
    inside = ((turned > 0) & (turned < 1)).all(1)  # where nothing was clipped
    torch.testing.assert_close(turned.mean(1)[inside], many.mean(1)[inside])
    assert (turned - many).abs().amax((1, 2, 3)).median() > 0.1
    grey = augment(many, PLAIN.model_copy(update={"grey": 1.0}), 16)
    torch.testing.assert_close(grey[:, 0], grey[:, 2])
    some = augment(torch.rand(400, 3, 4, 4), PLAIN.model_copy(update={"grey": 0.3}), 4)
    assert (some.std(1).amax((1, 2)) < 1e-6).float().mean().item() == pytest.approx(0.3, abs=0.08)


def test_augment__random_filter_keeps_plain_areas() -> None:
    torch.manual_seed(0)
    config = PLAIN.model_copy(update={"random_filter": 1.0})
    plain = augment(torch.full((2, 3, 16, 16), 0.3), config, 16)
    torch.testing.assert_close(plain, plain[..., :1, :1].expand_as(plain))  # also at the border
    assert not torch.allclose(plain[0], plain[1])
    assert plain.min() >= 0 and plain.max() <= 1


# --- distillation ----------------------------------------------------------------------------------------------------


def test_text_distill__learns_its_teacher() -> None:
    encoder = make(image=None)
    words = ["dog", "puppy", "car", "automobile", "red rose", "tulip", "hammer", "saw"]
    teacher = F.normalize(torch.randn(8, 8, generator=torch.Generator().manual_seed(1)), dim=-1)
    batch = PhraseBatch(encoder.tokenize(words), teacher)
    task = TextDistill(encoder=encoder)
    losses = learn(task, [batch] * 200, lr=1e-2)
    assert losses[-1] < 0.2 * losses[0]
    got = F.normalize(encoder.encode_text(encoder.tokenize(words)), dim=-1)
    assert ((got @ teacher.T).argmax(1) == torch.arange(8)).all()
    assert not task.encoder.logit_scale.requires_grad


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"encoder": {"text": {"kind": "cbow"}}}, "encoder.image is missing"),
        ({"encoder": {"image": {"kind": "resnet"}}}, "give encoder.text"),
        ({"encoder": {"image": {"kind": "resnet"}, "text": {"kind": "cbow"}}, "freeze_text": True}, "random weights"),
        ({"encoder": {"image": {"kind": "vit", "image_size": 60}}}, "not a multiple of patch_size"),
    ],
)
def test_method_config__impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClipMethod.model_validate({"name": "clip", **settings})


def test_encoder_config__default_image_tower_is_a_resnet() -> None:
    assert (
        ClipMethod.model_validate(
            {"name": "clip", "encoder": {"image": {"kind": "resnet"}, "text": TEXT}}
        ).encoder.image
        == ResNetTower()
    )
