# SPDX-License-Identifier: Apache-2.0
"""Where the pictures of a region store come from: generated scenes, a COCO file, or a folder.

Each source has ``ids`` (what the store is read by), ``image(index)``, ``fingerprint()``, and ``boxes(index)`` where it
has ground truth. A fingerprint hashes what decides the pixels, not where they lie: a data set may move to another disk.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ovd.data.lvis import picture_file
from pretrain.data.folder import list_images, read_image
from pretrain.engine.errors import UserError
from pretrain.engine.files import read_json

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ovd.regions.layout import ImageId
    from pretrain.data.scenes import SceneSource


class SceneImages:
    """Generated scenes; the id of a scene is its index.

    Args:
        source: the scenes. Their fingerprint covers what decides the pixels (split, seed, size, hash of the data set)
            and the first scene, so that a change of the generator shows. Length and labels are left out: the first
            n scenes of a longer source are the same, and so are scenes with fewer labels.
    """

    def __init__(self, source: SceneSource) -> None:
        self.source = source
        self.ids: Sequence[ImageId] = range(len(source))

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


class FolderImages:
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

    def image(self, index: int) -> NDArray[np.uint8]:
        """uint8 RGB ``(H, W, 3)``, upright."""
        return read_image(self.root / self._names[index])

    def fingerprint(self) -> str:
        """sha256 over names and sizes of the files."""
        digest = hashlib.sha256()
        for name in self._names:
            digest.update(json.dumps([name, (self.root / name).stat().st_size]).encode())
        return digest.hexdigest()


class CocoImages:
    """The pictures of a COCO annotation file, in its order; ids are COCO's.

    Args:
        annotations: the JSON file.
        root: the folder its file names are relative to.

    Raises:
        UserError: the file is missing or not COCO.
    """

    def __init__(self, annotations: str | os.PathLike[str], root: str | os.PathLike[str]) -> None:
        self.root = Path(root)
        try:
            data = read_json(annotations)
            self._names = {int(entry["id"]): picture_file(entry, where=str(annotations)) for entry in data["images"]}
            self._boxes: dict[int, list[list[float]]] = {}
            for entry in data.get("annotations", ()):
                if not entry.get("iscrowd"):
                    x, y, w, h = map(float, entry["bbox"])
                    self._boxes.setdefault(int(entry["image_id"]), []).append([x, y, x + w, y + h])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{annotations}: not a COCO annotation file ({error!r})") from error
        if not self._names:
            raise UserError(f"{annotations}: lists no pictures")
        self._ids = list(self._names)
        self.ids: Sequence[ImageId] = list(self._ids)

    def image(self, index: int) -> NDArray[np.uint8]:
        """uint8 RGB ``(H, W, 3)``, upright."""
        return read_image(self.root / self._names[self._ids[index]])

    def boxes(self, index: int) -> NDArray[np.float32]:
        """Ground truth ``(n, 4)`` xyxy without crowds."""
        return np.asarray(self._boxes.get(self._ids[index], ()), dtype=np.float32).reshape(-1, 4)

    def fingerprint(self) -> str:
        """sha256 over ids and file names."""
        return hashlib.sha256(json.dumps(sorted(self._names.items())).encode()).hexdigest()
