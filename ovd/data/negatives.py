# SPDX-License-Identifier: Apache-2.0
"""Photos without the fine-tuned classes, learned as background.

A branch trained on blood cells alone also detects them in living rooms.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ovd.data.copies import photo_groups
from ovd.data.finetune_photos import BoxLabels
from ovd.pictures import require_decodable, upright_size
from pretrain.data.folder import list_images, read_image
from pretrain.engine.errors import BadImageError, UserError
from pretrain.engine.identity import files_identity

MOST_DECODED = 1000
"""Photos of a folder up to which all are decoded before a training: among more a few damaged ones do not end it."""


class NegativePhotos:
    """Photos without an object of the classes, except for boxes that are neither object nor background.

    Args:
        folder: that the names are relative to.
        names: of the photos.
        doubtful: (T, 4) float32 x1, y1, x2, y2 of such boxes, pixels, by name.
        notices: on skipped pictures of the folder.
    """

    def __init__(
        self,
        *,
        folder: Path,
        names: Sequence[str],
        doubtful: Mapping[str, NDArray[np.float32]] | None = None,
        notices: Sequence[str] = (),
    ) -> None:
        self.folder, self.names, self.notices = folder, tuple(names), tuple(notices)
        self.doubtful = doubtful or {}

    @classmethod
    def of_folder(cls, folder: Path, *, labelled: Sequence[Path] = ()) -> NegativePhotos:
        """All pictures of a folder, but for those that cannot be read or are labelled ones.

        Args:
            folder: searched with its folders.
            labelled: photos with objects of the classes; copies of them in the folder are skipped, whatever their name.

        Raises:
            UserError: there is no such folder, or no picture left in it.
        """
        where = "data.negatives"
        if not folder.is_dir():
            raise UserError(f"{where}: {folder}: no such folder of photos")
        files, notices = list_images(folder), []
        groups = photo_groups([*labelled, *files])[len(labelled) :]
        others = [file for file, group in zip(files, groups, strict=True) if group >= len(labelled)]
        if same := len(files) - len(others):
            notices.append(f"{where}: {same} of {len(files)} photos in {folder} are labelled ones and no negatives")
        usable, unread = [], []
        for file in others:
            try:
                if len(others) <= MOST_DECODED:
                    require_decodable(file)
                else:
                    upright_size(file)
                usable.append(file)
            except BadImageError as problem:
                unread.append(str(problem))
        if unread:
            notices.append(f"{where}: {len(unread)} photos cannot be read and are left out (first: {unread[0]})")
        if not usable:
            raise UserError(f"{'; '.join(notices)}; none is left. Give a folder of other photos, or null")
        return cls(folder=folder, names=[file.relative_to(folder).as_posix() for file in usable], notices=notices)

    def __len__(self) -> int:
        return len(self.names)

    def image(self, index: int) -> NDArray[np.uint8]:
        """Photo ``index``, (H, W, 3) RGB.

        Raises:
            BadImageError: it cannot be read.
        """
        return read_image(self.folder / self.names[index])

    def boxes(self, index: int) -> BoxLabels:
        """Its doubtful boxes."""
        corners = self.doubtful.get(self.names[index], np.zeros((0, 4), np.float32))
        return BoxLabels(corners=corners, classes=np.full(len(corners), -1, np.int64))

    def identity(self) -> dict[str, str]:
        """Names and content of the photos. What is doubtful in them follows from the labels and the detector, whose
        boxes differ in their last digits from machine to machine."""
        return files_identity("negatives", self.folder, self.names)
