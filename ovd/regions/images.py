# SPDX-License-Identifier: Apache-2.0
"""The pictures of a region store: generated scenes, a COCO file, or a folder.

Each is an `ovd.regions.layout.ImageSource`, or a `BoxedImageSource` where it has ground truth. A fingerprint hashes
what decides the pixels, not where they lie: a data set may move to another disk, but a picture that is replaced under
its old name is another one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pretrain.data.coco import GroundTruth, read_ground_truth
from pretrain.data.folder import list_images, read_image, require_files
from pretrain.engine.errors import UserError
from pretrain.engine.faults import BAD_IMAGES_ALLOWED

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ovd.regions.layout import ImageId
    from pretrain.data.scenes import SceneSource


HASHED_WHOLE = 1 << 20
"""Bytes up to which a file is hashed whole; of a larger one its size, beginning, middle and end are."""


def content_sha256(root: Path, named: Sequence[tuple[ImageId, str]]) -> str:
    """sha256 over ids, names and content of files; one that is missing counts as such.

    Args:
        root: the folder that names are relative to.
        named: (id, name) of each file.
    """
    digest = hashlib.sha256()
    for image_id, name in named:
        digest.update(json.dumps([image_id, name]).encode())
        try:
            with open(root / name, "rb") as file:
                size = file.seek(0, os.SEEK_END)
                digest.update(str(size).encode())
                starts: tuple[int, ...] = (0,)
                length = HASHED_WHOLE
                if size > HASHED_WHOLE:
                    length = HASHED_WHOLE // 4
                    starts = (0, (size - HASHED_WHOLE) // 2, size - length)
                for start in starts:
                    file.seek(start)
                    digest.update(file.read(length))
        except OSError as error:  # reading it will say so, where it is read
            digest.update(f"cannot be read: {type(error).__name__}".encode())
    return digest.hexdigest()


class ScenePictures:
    """Generated scenes; the id of a scene is its index.

    Args:
        source: the scenes. Their fingerprint covers what decides the pixels (split, seed, size, hash of the data set)
            and the first scene, so that a change of the generator shows. Length and labels are left out: the first
            n scenes of a longer source are the same, and so are scenes with fewer labels.
    """

    def __init__(self, source: SceneSource) -> None:
        self.source = source
        self.ids: Sequence[ImageId] = range(len(source))

    def __len__(self) -> int:
        return len(self.ids)

    def image(self, index: int) -> NDArray[np.uint8]:
        """uint8 RGB ``(H, W, 3)``."""
        return self.source.scene(index).image

    def boxes(self, index: int) -> NDArray[np.float32]:
        """Ground truth ``(n, 4)`` xyxy, of the labelled objects."""
        return self.source.scene(index).boxes

    def fingerprint(self) -> str:
        """sha256 over the parameters and the first scene."""
        of = self.source
        data = [of.stickers.split_hash, *filter(None, [of.stickers.extra_hash])]  # older stores know no extra styles
        text = json.dumps(["stickers", of.split, of.seed, list(of.size), *data])
        return hashlib.sha256(text.encode() + np.ascontiguousarray(self.image(0)).tobytes()).hexdigest()


class FolderPictures:
    """All pictures under a folder, sorted; the id of a picture is its path relative to the folder.

    Args:
        root: the folder.

    Raises:
        UserError: the folder is missing or holds no pictures.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)
        self._names = [path.relative_to(self.root).as_posix() for path in list_images(self.root)]
        self.ids: Sequence[ImageId] = list(self._names)

    def __len__(self) -> int:
        return len(self.ids)

    def image(self, index: int) -> NDArray[np.uint8]:
        """uint8 RGB ``(H, W, 3)``, upright."""
        return read_image(self.root / self._names[index])

    def fingerprint(self) -> str:
        """sha256 over names and content of the files."""
        return content_sha256(self.root, [(name, name) for name in self._names])


class CocoPictures:
    """The pictures of a COCO annotation file, in its order; ids are COCO's.

    Args:
        annotations: the file, ``.json`` or ``.json.gz``, or what was read from another format's files.
        root: the folder its file names are relative to.

    Raises:
        UserError: a file that `pretrain.data.coco.check_ground_truth` refuses, or one that lists no pictures.
    """

    def __init__(self, annotations: str | os.PathLike[str] | GroundTruth, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)
        truth = annotations if isinstance(annotations, GroundTruth) else read_ground_truth(Path(annotations))
        if not truth.sizes:
            raise UserError(f"{truth.where}: lists no pictures")
        self.notices = [f"{truth.where}: {warning}" for warning in truth.warnings]
        self._names = {image_id: truth.file_of(image_id) for image_id in truth.sizes}
        missing = require_files(self._names.values(), self.root, where=truth.where, allowed=BAD_IMAGES_ALLOWED)
        self.notices += [missing] if missing else []
        self._boxes: dict[ImageId, list[list[float]]] = {}
        for annotation in truth.annotations:
            x, y, w, h = annotation["bbox"]
            if not annotation["iscrowd"]:
                self._boxes.setdefault(annotation["image_id"], []).append([x, y, x + w, y + h])
        self.ids: Sequence[ImageId] = [*truth.files]

    def __len__(self) -> int:
        return len(self.ids)

    def image(self, index: int) -> NDArray[np.uint8]:
        """uint8 RGB ``(H, W, 3)``, upright."""
        return read_image(self.root / self._names[self.ids[index]])

    def boxes(self, index: int) -> NDArray[np.float32]:
        """Ground truth ``(n, 4)`` xyxy without crowds."""
        return np.asarray(self._boxes.get(self.ids[index], ()), dtype=np.float32).reshape(-1, 4)

    def fingerprint(self) -> str:
        """sha256 over ids, file names and content of the pictures."""
        return content_sha256(self.root, sorted(self._names.items(), key=lambda item: str(item[0])))

    def boxes_fingerprint(self) -> str:
        """sha256 over the ground truth that `boxes` answers with."""
        rows = [[str(i), self._boxes.get(i, [])] for i in self.ids]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()
