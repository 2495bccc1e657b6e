# SPDX-License-Identifier: Apache-2.0
"""The contrastive loss against an independent float64 derivation, on one process and on two."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pretrain.losses import clip_contrastive, clip_contrastive_top1, embedding_distillation


def reference(image: np.ndarray, text: np.ndarray, scale: float, labels: np.ndarray | None) -> float:
    """Written from the definition: the mean over both directions of -log of the softmax share of the right partners."""
    image = image / np.linalg.norm(image, axis=1, keepdims=True)
    text = text / np.linalg.norm(text, axis=1, keepdims=True)
    total = 0.0
    for queries, keys in ((image, text), (text, image)):
        for i in range(len(queries)):
            logits = [math.exp(scale) * float(queries[i] @ keys[j]) for j in range(len(keys))]
            log_total = math.log(sum(math.exp(v - max(logits)) for v in logits)) + max(logits)
            right = [i] if labels is None else [j for j in range(len(keys)) if labels[j] == labels[i]]
            total -= sum(logits[j] - log_total for j in right) / len(right)
    return total / (2 * len(image))


def test_contrastive__class_names_are_extra_texts_for_pictures() -> None:
    generator = np.random.default_rng(4)
    image, text, names = (generator.normal(size=(n, 5)) for n in (4, 4, 3))
    labels = np.array([0, 2, 0, 1])
    got, right = clip_contrastive_top1(
        torch.tensor(image),
        torch.tensor(text),
        torch.tensor(1.5),
        labels_N=torch.tensor(labels),
        names_CD=torch.tensor(names),
    )
    image, text, names = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (image, text, names))
    keys, owners = np.vstack([text, names]), np.concatenate([labels, np.arange(3)])
    total, hits = 0.0, 0
    for i in range(4):
        logits = math.exp(1.5) * keys @ image[i]
        mine = owners == labels[i]
        total -= float(np.mean(logits[mine])) - math.log(float(np.exp(logits).sum()))
        hits += bool(mine[int(logits.argmax())])
        other = math.exp(1.5) * image @ text[i]
        total -= float(np.mean(other[labels == labels[i]])) - math.log(float(np.exp(other).sum()))
    assert float(got) == pytest.approx(total / 8, rel=1e-5) and float(right) == pytest.approx(hits / 4)


@pytest.mark.parametrize("labels", [None, [0, 1, 0, 2, 0, 1]])
@pytest.mark.parametrize("scale", [0.0, math.log(1 / 0.07), math.log(100)])
def test_contrastive__equals_its_definition(labels: list[int] | None, scale: float) -> None:
    generator = np.random.default_rng(3)
    image, text = generator.normal(size=(6, 5)), 7 * generator.normal(size=(6, 5))
    got = clip_contrastive(
        torch.tensor(image, dtype=torch.float32),
        torch.tensor(text, dtype=torch.float32),
        torch.tensor(scale),
        labels_N=None if labels is None else torch.tensor(labels),
    )
    assert got.item() == pytest.approx(
        reference(image, text, scale, None if labels is None else np.array(labels)), rel=1e-5
    )


def test_contrastive__accuracy_counts_captions_of_the_same_noun() -> None:
    image = torch.eye(3)
    text = torch.eye(3)[[1, 0, 2]]  # pictures 0 and 1 find each other's captions
    scale = torch.tensor(1.0)
    assert clip_contrastive_top1(image, text, scale)[1].item() == pytest.approx(1 / 3)
    assert clip_contrastive_top1(image, text, scale, labels_N=torch.tensor([5, 5, 6]))[1].item() == 1.0


def test_contrastive__is_finite_at_the_largest_scale_in_fp16() -> None:
    image = torch.nn.functional.normalize(torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), dim=1).half()
    loss = clip_contrastive(image, -image, torch.tensor(math.log(100)))
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)


def _process(rank: int, folder: str, labels: bool) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", LOCAL_RANK=str(rank))
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.set_num_threads(1)
    data = torch.load(f"{folder}/data.pt", weights_only=True)
    part = slice(4 * rank, 4 * rank + 4)
    weight, scale = data["weight"].requires_grad_(), data["scale"].requires_grad_()
    loss, right = clip_contrastive_top1(
        data["image"][part] @ weight,
        data["text"][part] @ weight.flip(0),
        scale,
        labels_N=data["labels"][part] if labels else None,
    )
    loss.backward()
    for value in (loss := loss.detach(), weight.grad, scale.grad, right):
        dist.all_reduce(value)
        value /= 2  # what DistributedDataParallel does to gradients
    if rank == 0:
        torch.save({"loss": loss, "weight": weight.grad, "scale": scale.grad, "right": right}, f"{folder}/got.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("labels", [False, True])
def test_contrastive__two_processes_equal_one(tmp_path: Path, labels: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    data = {
        "image": torch.randn(8, 6, generator=generator),
        "text": torch.randn(8, 6, generator=generator),
        "weight": torch.randn(6, 6, generator=generator),
        "scale": torch.tensor(2.0),
        "labels": torch.tensor([0, 1, 2, 0, 1, 1, 3, 0]),
    }
    torch.save(data, tmp_path / "data.pt")
    mp.start_processes(_process, args=(str(tmp_path), labels), nprocs=2, start_method="spawn")
    got = torch.load(tmp_path / "got.pt", weights_only=True)
    weight, scale = data["weight"].requires_grad_(), data["scale"].requires_grad_()
    loss, right = clip_contrastive_top1(
        data["image"] @ weight, data["text"] @ weight.flip(0), scale, labels_N=data["labels"] if labels else None
    )
    loss.backward()
    torch.testing.assert_close(got["loss"], loss.detach())
    torch.testing.assert_close(got["weight"], weight.grad)
    torch.testing.assert_close(got["scale"], scale.grad)
    torch.testing.assert_close(got["right"], right)


def test_distillation__equals_its_definition() -> None:
    generator = np.random.default_rng(5)
    student, teacher = generator.normal(size=(5, 4)), generator.normal(size=(5, 4))
    s = student / np.linalg.norm(student, axis=1, keepdims=True)
    t = teacher / np.linalg.norm(teacher, axis=1, keepdims=True)
    cosine = float((s * t).sum(1).mean())
    divergence = 0.0
    for i in range(5):
        others = [j for j in range(5) if j != i]
        p = np.exp(np.array([t[i] @ t[j] for j in others]) / 0.1)
        q = np.exp(np.array([s[i] @ s[j] for j in others]) / 0.1)
        p, q = p / p.sum(), q / q.sum()
        divergence += float((p * np.log(p / q)).sum()) / 5
    got, got_cosine = embedding_distillation(
        torch.tensor(student), torch.tensor(teacher), similarity_weight=0.7, temperature=0.1
    )
    assert got_cosine.item() == pytest.approx(cosine, rel=1e-5)
    assert got.item() == pytest.approx(1 - cosine + 0.7 * divergence, rel=1e-4)


def test_distillation__perfect_student_has_loss_0() -> None:
    teacher = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    loss, cosine = embedding_distillation(3 * teacher, teacher, similarity_weight=1.0, temperature=0.05)
    assert loss.item() == pytest.approx(0, abs=1e-5)
    assert cosine.item() == pytest.approx(1)
