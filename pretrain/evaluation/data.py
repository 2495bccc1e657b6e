# SPDX-License-Identifier: Apache-2.0
"""Labelled pictures to evaluate features on, by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pretrain.config_views import CifarData, StickerSingles
from pretrain.data.images import FolderSet, ImageSet, build_images
from pretrain.data.render import U8
from pretrain.engine.errors import UserError


def open_data(text: str, *, size: int | None, views: int = 2, key: str = "--data") -> tuple[ImageSet, ImageSet, int]:
    """Training pictures, test pictures, and the side that suits them.

    Args:
        text: "sticker_singles"; "cifar:ROOT"; or a folder with `train/CLASS/…` and `val/CLASS/…` (ImageNet's layout).
        size: another side.
        views: pictures of each sticker.
        key: who named them, for messages.

    Raises:
        UserError: there is no such data, or the two halves have different classes.
    """
    kind, _, root = text.partition(":")
    if text == "sticker_singles":
        side = size or 64
        stickers = StickerSingles(kind="sticker_singles", size=max(16, side), views=views)  # 16: the least they draw
        validation = stickers.model_copy(update={"split": "val"})
        return build_images(stickers), build_images(validation), side
    if kind == "cifar" and root:
        cifar = CifarData(kind="cifar", root=Path(root))
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
    train_set, test_set = (FolderSet(folder, classes=True) for folder in folders)
    train_classes, test_classes = train_set.classes, test_set.classes
    if train_classes != test_classes:
        odd = sorted(set(train_classes) ^ set(test_classes))
        raise UserError(
            f"{key} {text}: train and val have different classes, for example {odd[0]!r}; give both the same"
        )
    return train_set, test_set, size or 224


class Subset:
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
