# SPDX-License-Identifier: Apache-2.0
"""How good are frozen features? A k-nearest-neighbour vote, a linear classifier, and one from a few labels per class.

All measure the *online* backbone in eval mode. The processes of a group share the work; the figures do not depend on
their number. `python -m pretrain.probe` is the command; `Probe` measures while a training runs.

Shapes: `N` queries, `M` bank, `D` features, `C` classes.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.config_views import CifarImages, FolderImages, StickerSingles, ViewConfig
from pretrain.data.crops import crop_box, resized
from pretrain.data.images import ImageSet, build_images
from pretrain.data.render import U8, Dice
from pretrain.engine import distributed
from pretrain.engine.config import OptimConfig
from pretrain.engine.errors import BadImageError, UserError
from pretrain.engine.optim import LARS, lr_at


class Normalise(NamedTuple):
    """What the backbone was trained on: side of a picture, mean and standard deviation of RGB in [0, 1]."""

    size: int
    mean: Sequence[float]
    std: Sequence[float]

    def __call__(self, pictures: Sequence[U8], device: torch.device) -> Tensor:
        batch = torch.from_numpy(np.stack(pictures)).to(device).permute(0, 3, 1, 2).float() / 255
        mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (self.mean, self.std))
        return (batch - mean) / std


# --- pictures into features ------------------------------------------------------------------------------------------


def centre(picture: U8, size: int) -> U8:
    """The evaluation view: short side to 8/7 of ``size``, centre crop. A picture of that very size stays as it is."""
    height, width = picture.shape[:2]
    if (height, width) == (size, size):
        return picture
    scale = size / 0.875 / min(height, width)
    wide, tall = max(size, round(width * scale)), max(size, round(height * scale))
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    picture = np.asarray(cv2.resize(picture, (wide, tall), interpolation=method), np.uint8)
    top, left = (tall - size) // 2, (wide - size) // 2
    return picture[top : top + size, left : left + size]


def random_crop(picture: U8, size: int, *key: int) -> U8:
    """The training view of the linear protocol: a crop of area .08 to 1, ratio 3/4 to 4/3, flipped half of the time."""
    dice = Dice(*key)
    view = ViewConfig(size=size, crop_scale=(0.08, 1.0))
    top, left, tall, wide = crop_box(picture.shape[0], picture.shape[1], view, dice)
    crop = resized(picture[top : top + tall, left : left + wide], size, "bilinear")
    return np.ascontiguousarray(crop[:, ::-1]) if dice.chance(view.flip) else crop


@contextmanager
def frozen(backbone: nn.Module) -> Iterator[None]:
    """Eval mode and no gradient; afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for module in backbone.modules()]
    backbone.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def features(
    backbone: nn.Module,
    images: ImageSet,
    indices: Sequence[int],
    normalise: Normalise,
    *,
    batch: int = 256,
    view: Callable[[U8, int], U8] | None = None,
) -> Tensor:
    """Backbone features (len(indices), D) in float32; each process computes a share, all get the whole.

    Args:
        view: (picture, index) → picture of the right size; None: the evaluation view.
    """
    world, device = distributed.world_size(), distributed.device_of(backbone)
    mine = list(indices)[distributed.rank() :: world]
    share = -(-len(indices) // world)
    mine += list(indices)[: share - len(mine)]  # equal shares; what is too much is cut off below
    rows = []
    with frozen(backbone):
        for start in range(0, share, batch):
            part = mine[start : start + batch]
            make = view or (lambda picture, index: centre(picture, normalise.size))
            pictures = [make(images.image(i), i) for i in part]
            rows.append(backbone(normalise(pictures, device)).float())
    found = torch.cat(rows)
    if world == 1:
        return found
    parts = [torch.empty_like(found) for _ in range(world)]
    dist.all_gather(parts, found)
    return torch.stack(parts, dim=1).flatten(0, 1)[: len(indices)]  # rank r had every W-th from r on


def labels(images: ImageSet, indices: Sequence[int]) -> Tensor:
    """Labels (len(indices),).

    Raises:
        UserError: A picture has none.
    """
    found = torch.tensor([images.label(i) for i in indices], dtype=torch.int64)
    if len(found) == 0 or int(found.min()) < 0:
        raise UserError("the probe needs labelled pictures: sticker_singles, or a folder with a subfolder per class")
    return found


# --- measures --------------------------------------------------------------------------------------------------------


def knn(
    query_ND: Tensor, bank_MD: Tensor, labels_M: Tensor, *, classes: int, k: int = 200, temperature: float = 0.1
) -> Tensor:
    """Scores (N, C) of the weighted vote (Wu et al., arXiv:1805.01978, §3.4): each of the k nearest by cosine adds
    exp(cosine / temperature) to its class. k = 200 and temperature .1 are what the field reports (MoCo's CIFAR demo).
    """
    query, bank = F.normalize(query_ND.float(), dim=1), F.normalize(bank_MD.float(), dim=1)
    labels_M = labels_M.to(bank.device)
    scores = []
    for part in query.split(1024):
        cosine, nearest = (part @ bank.T).topk(min(k, len(bank)), dim=1)
        votes = torch.zeros(len(part), classes, device=bank.device)
        scores.append(votes.scatter_add_(1, labels_M[nearest], ((cosine - 1) / temperature).exp()))  # − 1: no overflow
    return torch.cat(scores)


def accuracy(scores_NC: Tensor, labels_N: Tensor) -> float:
    """Share of rows whose largest score is the label's."""
    return float((scores_NC.argmax(1).cpu() == labels_N.cpu()).float().mean())


class Recipe(NamedTuple):
    """How a paper trains its linear classifier; the learning rate is for a batch of 256."""

    lr: float
    epochs: int
    weight_decay: float = 0.0
    optimizer: str = "sgd"
    nesterov: bool = False
    milestones: tuple[float, ...] = ()  # shares of the run; empty: cosine
    batch: int = 256


PROTOCOLS = {
    "simclr": Recipe(0.1, 90, nesterov=True, batch=4096),  # arXiv:2002.05709, appendix B.6
    "moco": Recipe(30.0, 100, milestones=(0.6, 0.8)),  # arXiv:1911.05722, §4.1
    "byol": Recipe(
        0.2, 80, nesterov=True, batch=1024
    ),  # arXiv:2006.07733, appendix D.1 (there the best of five learning rates)
    "swav": Recipe(0.3, 100, weight_decay=1e-6),  # arXiv:2006.09882, appendix; the reference's eval_linear.py
    "simsiam": Recipe(0.1, 90, optimizer="lars", batch=4096),  # the reference's README; the paper's appendix A has .02
    "barlow_twins": Recipe(0.3, 100, weight_decay=1e-6),  # arXiv:2103.03230, §4.1
}


LARGE = 100_000  # pictures; with fewer, LARS and batches of 4,096 have too few steps to get anywhere
SMALL = "swav"
PROTOCOL_OF = {"moco_v1": "moco", "moco_v2": "moco", "byol_gn": "byol", **{name: name for name in PROTOCOLS}}


def linear(
    backbone: nn.Module,
    train: ImageSet,
    normalise: Normalise,
    *,
    classes: int,
    protocol: Recipe,
    batch_size: int | None = None,
    epochs: int | None = None,
    augment: bool = True,
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> nn.Linear:
    """Train a linear layer on the frozen backbone.

    Args:
        batch_size: Instead of the protocol's; the learning rate follows it.
        augment: Fresh random crops and flips in every epoch, as the papers do; otherwise the features of the evaluation
            view are computed once: far quicker, and a little worse.
        epochs: Instead of the protocol's.

    Returns:
        The trained layer.
    """
    indices, device = list(range(len(train))), distributed.device_of(backbone)
    target = labels(train, indices).to(device)
    fixed = features(backbone, train, indices if not augment else indices[:1], normalise)
    head = nn.Linear(fixed.shape[1], classes).to(device)
    noise = torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        head.weight.copy_(0.01 * noise)
        head.bias.zero_()
    batch_size = min(batch_size or protocol.batch, len(train))
    epochs = epochs or protocol.epochs
    steps = len(train) // batch_size
    lr = protocol.lr * batch_size / 256
    total = epochs * steps
    optimizer: torch.optim.Optimizer
    if protocol.optimizer == "lars":
        optimizer = LARS(head.parameters(), lr=lr, weight_decay=protocol.weight_decay)
    else:
        optimizer = torch.optim.SGD(
            head.parameters(), lr=lr, momentum=0.9, weight_decay=protocol.weight_decay, nesterov=protocol.nesterov
        )
    schedule = OptimConfig(
        name="sgd",
        lr=lr,
        schedule="step" if protocol.milestones else "cosine",
        milestones=tuple(sorted({max(1, round(total * share)) for share in protocol.milestones})),
    )
    for epoch in range(epochs):
        order = np.random.default_rng([seed, epoch]).permutation(len(train))
        for step in range(steps):
            chosen = order[step * batch_size : (step + 1) * batch_size].tolist()
            if augment:
                x = features(
                    backbone, train, chosen, normalise,
                    view=lambda picture, i, epoch=epoch: random_crop(  # type: ignore[misc]
                        picture, normalise.size, seed, epoch, i
                    ),
                )  # fmt: skip
            else:
                x = fixed[chosen]
            for group in optimizer.param_groups:
                group["lr"] = lr_at(epoch * steps + step, schedule, total=total)
            optimizer.zero_grad()
            loss = F.cross_entropy(head(x), target[chosen])
            loss.backward()
            optimizer.step()
        if (epoch + 1) % max(1, epochs // 10) == 0 and distributed.is_main():
            say(f"linear: epoch {epoch + 1}/{epochs}, loss {loss.item():.3f}")
    return head


def few_labels(
    train_MD: Tensor, labels_M: Tensor, test_ND: Tensor, *, classes: int, shots: int, seed: int, decay: float = 1e-3
) -> Tensor:
    """Scores (N, C) of a logistic regression on ``shots`` examples per class (fewer where a class has fewer).

    On unit features with ``decay`` · |W|² / 2 beside the mean cross-entropy, solved to the end by L-BFGS: no step size
    or epochs that would have to be chosen on labels that a few-shot setting does not have.
    """
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(labels_M)))
    chosen = torch.cat([order[labels_M.cpu()[order] == c][:shots] for c in range(classes)])
    x, y = F.normalize(train_MD[chosen], dim=1), labels_M.to(train_MD.device)[chosen]
    weight = torch.zeros(classes, x.shape[1] + 1, device=x.device, requires_grad=True)
    solver = torch.optim.LBFGS([weight], max_iter=200, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        solver.zero_grad()
        logits = x @ weight[:, :-1].T + weight[:, -1]
        loss = F.cross_entropy(logits, y) + decay / 2 * weight[:, :-1].square().sum()
        loss.backward()
        return loss

    solver.step(objective)
    with torch.no_grad():
        return F.normalize(test_ND, dim=1) @ weight[:, :-1].T + weight[:, -1]


# --- during training -------------------------------------------------------------------------------------------------


class Probe:
    """kNN within a time budget, for ``Monitored``: a fixed bank and fixed queries, decoded once and kept.

    Bank and queries are taken in turns, so that a probe that runs out of time is smaller and still fair; the processes
    agree on where to stop.

    Args:
        train: Bank.
        test: Queries.
        normalise: Size and colours the backbone expects.
        seconds: Time budget of one probe.
        bank: Pictures of the bank, at most.
        queries: Queries, at most.
        k: Neighbours.
        temperature: Of the vote.
    """

    def __init__(
        self,
        train: ImageSet,
        test: ImageSet,
        normalise: Normalise,
        *,
        seconds: float,
        bank: int = 2000,
        queries: int = 1000,
        k: int = 20,
        temperature: float = 0.1,
        batch: int = 128,
    ) -> None:
        self.normalise, self.seconds, self.k, self.temperature = normalise, seconds, k, temperature
        self.batch = batch
        self.parts: list[tuple[bool, ImageSet, list[int]]] = []
        rng = np.random.default_rng(0)
        some = rng.permutation(len(train))[:bank].tolist()
        asked = rng.permutation(len(test))[:queries].tolist()
        pieces = -(-len(some) // batch)
        for i in range(pieces):
            self.parts += [(True, train, some[i::pieces]), (False, test, asked[i::pieces])]
        self._kept: dict[tuple[bool, int], U8] = {}

    def __call__(self, backbone: nn.Module) -> dict[str, float]:
        """ "knn" accuracy, "seconds" it took, "bank" and "queries" used."""
        begun = time.perf_counter()
        rows: dict[bool, list[Tensor]] = {True: [], False: []}
        names: dict[bool, list[Tensor]] = {True: [], False: []}
        for number, (is_bank, source, indices) in enumerate(self.parts):
            late = distributed.all_sum([float(time.perf_counter() - begun > self.seconds)])[0] > 0
            if late and number >= 2 and number % 2 == 0:
                break
            if indices:
                kept = _Kept(source, is_bank, self._kept, self.normalise.size)
                rows[is_bank].append(features(backbone, kept, indices, self.normalise, batch=self.batch))
                names[is_bank].append(labels(source, indices))
        bank, query = torch.cat(rows[True]), torch.cat(rows[False])
        y_bank, y_query = torch.cat(names[True]), torch.cat(names[False])
        classes = int(max(y_bank.max(), y_query.max())) + 1
        scores = knn(query, bank, y_bank, classes=classes, k=self.k, temperature=self.temperature)
        return {
            "knn": accuracy(scores, y_query),
            "seconds": time.perf_counter() - begun,
            "bank": float(len(bank)),
            "queries": float(len(query)),
        }


class _Kept:
    """Evaluation views, made once."""

    def __init__(self, source: ImageSet, is_bank: bool, kept: dict[tuple[bool, int], U8], size: int) -> None:
        self.source, self.is_bank, self.kept, self.size = source, is_bank, kept, size

    def __len__(self) -> int:
        return len(self.source)

    def image(self, index: int) -> U8:
        key = (self.is_bank, index)
        if key not in self.kept:
            try:
                self.kept[key] = centre(self.source.image(index), self.size)
            except BadImageError as error:  # a training does not end for it, and every process must go on alike
                print(f"warning: probe: a grey picture stands for {error}", file=sys.stderr, flush=True)
                self.kept[key] = np.full((self.size, self.size, 3), 128, np.uint8)
        return self.kept[key]

    def label(self, index: int) -> int:
        return self.source.label(index)


# --- data and report -------------------------------------------------------------------------------------------------


def open_data(text: str, *, size: int | None, views: int = 2, key: str = "--data") -> tuple[ImageSet, ImageSet, int]:
    """Training pictures, test pictures, and the side that suits them.

    Args:
        text: "sticker_singles"; "cifar:ROOT"; or a folder with `train/CLASS/…` and `val/CLASS/…` (ImageNet's layout).
        size: Another side.
        views: Pictures of each sticker.
        key: Who named them, for messages.

    Raises:
        UserError: There is no such data, or the two halves have different classes.
    """
    kind, _, root = text.partition(":")
    if text == "sticker_singles":
        side = size or 64
        stickers = StickerSingles(kind="sticker_singles", size=max(16, side), views=views)  # 16: the least they draw
        held_out = stickers.model_copy(update={"split": "val"})
        return build_images(stickers), build_images(held_out), side
    if kind == "cifar" and root:
        cifar = CifarImages(kind="cifar", root=Path(root))
        try:
            return build_images(cifar), build_images(cifar.model_copy(update={"split": "test"})), size or 32
        except UserError as error:
            raise UserError(f"{key} {text}: {error}") from error
    folders = [Path(text) / name for name in ("train", "val")]
    missing = next((folder for folder in folders if not folder.is_dir()), None)
    if missing is not None:
        raise UserError(
            f"{key} {text}: {missing} is not a folder; give sticker_singles, cifar:ROOT, or a folder with "
            "train/CLASS/ and val/CLASS/"
        )
    train_set, test_set = (build_images(FolderImages(root=folder, classes=True)) for folder in folders)
    ours, theirs = train_set.classes, test_set.classes  # type: ignore[attr-defined]
    if ours != theirs:
        odd = sorted(set(ours) ^ set(theirs))
        raise UserError(
            f"{key} {text}: train and val have different classes, for example {odd[0]!r}; give both the same"
        )
    return train_set, test_set, size or 224


class Few:
    """The first pictures of a fixed shuffle: a smaller set of the same kind."""

    def __init__(self, images: ImageSet, count: int, seed: int) -> None:
        self.images = images
        self.chosen = np.random.default_rng(seed).permutation(len(images))[:count]

    def __len__(self) -> int:
        return len(self.chosen)

    def image(self, index: int) -> U8:
        return self.images.image(int(self.chosen[index]))

    def label(self, index: int) -> int:
        return self.images.label(int(self.chosen[index]))


def evaluate(
    backbone: nn.Module,
    train: ImageSet,
    test: ImageSet,
    normalise: Normalise,
    *,
    measures: Sequence[str],
    k: int,
    temperature: float,
    recipe: str,
    epochs: int | None,
    shots: Sequence[int],
    seed: int,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """The chosen measures as one report."""
    x_test = features(backbone, test, range(len(test)), normalise)
    y_test, y_train = labels(test, range(len(test))), labels(train, range(len(train)))
    classes = int(max(y_train.max(), y_test.max())) + 1
    report: dict[str, Any] = {"train": len(train), "test": len(test), "classes": classes, "width": x_test.shape[1]}
    x_train = features(backbone, train, range(len(train)), normalise) if {"knn", "few"} & set(measures) else None
    if x_train is not None and "knn" in measures:
        scores = knn(x_test, x_train, y_train, classes=classes, k=k, temperature=temperature)
        report["knn"] = {"top1": accuracy(scores, y_test), "k": min(k, len(train)), "temperature": temperature}
    for name in ("linear", "linear_cached"):
        if name in measures:
            begun = time.perf_counter()
            head = linear(
                backbone, train, normalise, classes=classes, protocol=PROTOCOLS[recipe], epochs=epochs,
                augment=name == "linear", seed=seed, say=say,
            )  # fmt: skip
            with torch.no_grad():
                top1 = accuracy(head(x_test), y_test)
            report[name] = {
                "top1": top1, "protocol": recipe, "epochs": epochs or PROTOCOLS[recipe].epochs,
                "seconds": time.perf_counter() - begun,
            }  # fmt: skip
    if x_train is not None and "few" in measures:
        report["few"] = []
        for count in shots:
            found = [
                accuracy(few_labels(x_train, y_train, x_test, classes=classes, shots=count, seed=seed + i), y_test)
                for i in range(5)
            ]
            mean, std = float(np.mean(found)), float(np.std(found))
            report["few"].append({"shots": count, "top1": mean, "std": std, "draws": len(found)})
    return report
