# SPDX-License-Identifier: Apache-2.0
"""A CLIP batch encoded in pieces: the gradient of the whole batch, with the memory of a piece."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.config import AugmentConfig, CbowTower, ClipMethod, EncoderConfig, ResNetTower
from pretrain.methods.clip import Clip
from pretrain.nets.chunked import encode_in_chunks
from pretrain.nets.towers import JointEncoder

PLAIN = AugmentConfig(crop_scale=(1.0, 1.0), flip=0.0, brightness=0.0, contrast=0.0, colour=0.0)
WORDS, DIM, SIDE = 11, 6, 4


class Picture(nn.Module):
    """Two layers, with what stands between them; keeps a diary of its pieces."""

    def __init__(self, between: nn.Module) -> None:
        super().__init__()
        self.first, self.between, self.last = nn.Linear(3 * SIDE * SIDE, 8), between, nn.Linear(8, DIM)
        self.diary: list[str] = []

    def forward(self, pixels: Tensor) -> Tensor:
        self.diary.append(f"encode {len(pixels)}")
        hidden = self.between(self.first(pixels.flatten(1)).tanh())
        if hidden.requires_grad:
            hidden.register_hook(lambda _: self.diary.append("gradient"))
        return self.last(hidden.tanh())


class Text(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.last = nn.Embedding(WORDS, 8), nn.Linear(8, DIM)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.last(self.words(tokens).mean(1).tanh())


def tokens_of(texts: Sequence[str]) -> Tensor:
    return torch.tensor([[len(text) % WORDS, ord(text[-1]) % WORDS] for text in texts])


def task_of(*, chunk: int | None, between: nn.Module | None = None, **changes: Any) -> Clip:
    torch.manual_seed(0)
    encoder = JointEncoder(
        visual=Picture(between or nn.Identity()), text=Text(), tokenizer=tokens_of, embed_dim=DIM, image_size=SIDE,
        image_mean=(0.5, 0.5, 0.5), image_std=(0.25, 0.25, 0.25), config={},
    )  # fmt: skip
    options: dict[str, Any] = {"augmentation": PLAIN, "names": ["axe", "bee", "crab", "dodo"], **changes}
    return Clip(encoder=encoder, chunk=chunk, **options).train()


def batch_of(count: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    return {
        "image": torch.randint(0, 256, (count, 3, SIDE, SIDE), generator=generator, dtype=torch.uint8),
        "caption": [f"a picture of {'x' * (i % 3)}{chr(97 + i % 7)}" for i in range(count)],
        "class_id": torch.arange(count) % 4,
    }


def step(task: Clip, *, count: int = 8, autocast: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(5)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss, _ = task(batch_of(count))
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in task.named_parameters() if p.grad is not None}


def same(ours: dict[str, Tensor], true: dict[str, Tensor]) -> None:
    assert ours.keys() == true.keys()
    for name in true:
        torch.testing.assert_close(ours[name], true[name], rtol=1e-4, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("chunk", [1, 3, 4, 8, 100])
@pytest.mark.parametrize("nouns", [True, False])
def test_clip_chunks__loss_and_every_gradient_equal_those_of_the_whole_batch(chunk: int, nouns: bool) -> None:
    changes: dict[str, Any] = {} if nouns else {"names": None, "same_noun_positive": False}
    loss, true = step(task_of(chunk=None, **changes))
    value, ours = step(task_of(chunk=chunk, **changes))
    assert value.item() == pytest.approx(loss.item(), rel=1e-6)
    assert "encoder.logit_scale" in true and "encoder.text.words.weight" in true
    same(ours, true)


def test_clip_chunks__augmentations_are_those_of_the_whole_batch() -> None:
    changed = {"augmentation": AugmentConfig()}
    (loss, true), (value, ours) = (step(task_of(chunk=chunk, **changed)) for chunk in (None, 3))
    assert value.item() == pytest.approx(loss.item(), rel=1e-6)
    same(ours, true)
    assert loss != step(task_of(chunk=None))[0]


def test_clip_chunks__a_large_batch_stays_uint8_and_becomes_float_chunk_by_chunk(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kept: list[tuple[Tensor, ...]] = []

    def noted(encode: Any, *inputs: Tensor, **options: Any) -> Tensor:
        kept.append(inputs)
        return encode_in_chunks(encode, *inputs, **options)

    monkeypatch.setattr("pretrain.methods.clip.encode_in_chunks", noted)
    every = AugmentConfig(hue=0.5, grey=0.5, random_filter=0.5)
    step(task_of(chunk=2, augmentation=every), count=64)
    pictures, *numbers = kept[0]
    assert pictures.dtype == torch.uint8 and len(pictures) == 64
    assert sum(value[0].numel() for value in numbers) < 120, "a few numbers of each picture, none per pixel"


def test_chunked__second_pass_repeats_dropout_and_restores_rng() -> None:
    """A piece as large as the batch draws what the batch draws: equal gradients, if the second pass draws it again."""
    _, true = step(task_of(chunk=None, between=nn.Dropout(0.5)))
    after = torch.rand(1)
    _, ours = step(task_of(chunk=8, between=nn.Dropout(0.5)))
    assert torch.equal(torch.rand(1), after)
    same(ours, true)


def test_clip_chunks__accumulated_and_scaled_losses_scale_the_gradient() -> None:
    """What the loop does to a loss before the backward pass: divide it, and multiply it for fp16."""
    _, true = step(task_of(chunk=None))
    task = task_of(chunk=3)
    for _ in range(2):
        loss, _ = task(batch_of(8))
        (loss * 512 / 2).backward()
    same({n: p.grad / 512 for n, p in task.named_parameters() if p.grad is not None}, true)


def test_clip_chunks__under_autocast_both_passes_compute_alike() -> None:
    (loss, true), (value, ours) = (step(task_of(chunk=chunk), autocast=True) for chunk in (None, 4))
    assert value.item() == pytest.approx(loss.item(), rel=1e-6)
    flat, expected = (torch.cat([grads[name].flatten() for name in true]) for grads in (ours, true))
    assert F.cosine_similarity(flat, expected, dim=0) > 1 - 1e-4  # sums over pieces round apart in bf16
    assert flat.norm() / expected.norm() == pytest.approx(1, abs=1e-2)


def test_clip_chunks__one_chunk_at_a_time_is_encoded_with_activations() -> None:
    """A piece's second pass comes after the gradient has gone through the one before, whose activations are gone."""
    task = task_of(chunk=3)
    step(task)
    picture: Any = task.encoder.visual
    assert picture.diary[:3] == ["encode 3", "encode 3", "encode 2"]
    assert picture.diary[3:] == ["encode 2", "gradient", "encode 3", "gradient", "encode 3", "gradient"]


def test_clip_chunks__only_embeddings_are_kept_between_the_passes() -> None:
    """Of six samples in pieces of four and two: no hidden layer (eight wide) is saved for the backward pass."""
    hidden = {6 * 8, 4 * 8, 2 * 8}
    kept: dict[int | None, int] = {}
    for chunk in (None, 4):
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: s.append(t) or t, lambda t: t):  # type: ignore[misc]
            task_of(chunk=chunk)(batch_of(6))
        kept[chunk] = sum(t.numel() in hidden and t.grad_fn is not None for t in saved)
    assert kept[None] > 2
    assert kept[4] == 0


def test_clip_chunks__batch_norm_normalises_chunks_and_counts_each_once() -> None:
    """In training mode a piece is a batch of its own; the second pass normalises alike and counts nothing."""
    task, by_hand = task_of(chunk=4, between=nn.BatchNorm1d(8)), task_of(chunk=None, between=nn.BatchNorm1d(8))
    value, ours = step(task)
    encoder, batch = by_hand.encoder, batch_of(8)
    pixels = encoder.normalise(batch["image"].float() / 255)
    image = torch.cat([encoder.encode_image(piece) for piece in pixels.split(4)])
    by_hand.encoder.visual, known = nn.Identity(), by_hand.encoder.visual
    by_hand.encoder.encode_image = lambda pixels: image  # type: ignore[method-assign]
    loss, _ = by_hand(batch)
    by_hand.encoder.visual = known
    loss.backward()
    assert value.item() == pytest.approx(loss.item(), rel=1e-5)
    same(ours, {name: p.grad for name, p in by_hand.named_parameters() if p.grad is not None})
    norm, other = task.encoder.visual.between, known.between  # type: ignore[union-attr]
    assert norm.num_batches_tracked == 2
    torch.testing.assert_close(norm.running_mean, other.running_mean)
    torch.testing.assert_close(norm.running_var, other.running_var)
    assert norm.track_running_stats


def test_clip_chunks__batch_norm_in_eval_mode_makes_no_difference() -> None:
    tasks = [task_of(chunk=chunk, between=nn.BatchNorm1d(8)) for chunk in (None, 3)]
    for task in tasks:
        task.encoder.visual.between.eval()  # type: ignore[union-attr]
    (loss, true), (value, ours) = (step(task) for task in tasks)
    assert value.item() == pytest.approx(loss.item(), rel=1e-6)
    same(ours, true)


def test_clip_chunks__a_frozen_text_tower_needs_no_second_pass() -> None:
    task, whole = (task_of(chunk=chunk, freeze_text=True) for chunk in (3, None))
    _, true = step(whole)
    _, ours = step(task)
    same(ours, true)
    assert not any(name.startswith("encoder.text.") for name in ours)


def test_clip_chunks__the_size_is_a_key_of_the_method() -> None:
    towers = EncoderConfig(image=ResNetTower(), text=CbowTower())
    assert ClipMethod(name="clip", encoder=towers).chunk is None
    assert ClipMethod(name="clip", encoder=towers, chunk=64).chunk == 64
    with pytest.raises(ValueError, match="chunk"):
        ClipMethod(name="clip", encoder=towers, chunk=0)
