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
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from PIL import Image, ImageOps

from pretrain.engine.errors import BadImageError, UserError

if TYPE_CHECKING:
    from numpy.typing import NDArray

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


class Scenes(Protocol):
    """The part of ``pretrain.data.stickers.SceneSource`` that regions need."""

    def __len__(self) -> int:
        """Number of scenes."""
        ...

    def scene(self, index: int) -> Any:
        """An object with ``image`` uint8 ``(H, W, 3)`` and ``boxes`` float ``(n, 4)``."""
        ...


class SceneImages:
    """Generated scenes; the id of a scene is its index.

    Args:
        source: the scenes.
        parameters: what they are generated from (split, seed, size, hash of the splits …). It goes into the fingerprint
            together with the pixels of the first scene, so that a change of the generator itself shows. The length does
            not: the first n scenes of a longer source are the same scenes.
    """

    def __init__(self, source: Scenes, parameters: dict[str, Any]) -> None:
        self.source = source
        self.parameters = dict(parameters)
        self.ids: Sequence[int] = range(len(source))

    def image(self, index: int) -> NDArray[np.uint8]:
        """uint8 RGB ``(H, W, 3)``."""
        return np.asarray(self.source.scene(index).image)

    def boxes(self, index: int) -> NDArray[np.float32]:
        """Ground truth ``(n, 4)`` xyxy."""
        return np.asarray(self.source.scene(index).boxes, dtype=np.float32).reshape(-1, 4)

    def fingerprint(self) -> str:
        """sha256 over the parameters and the first scene."""
        digest = hashlib.sha256(json.dumps(self.parameters, sort_keys=True, default=str).encode())
        if len(self.source):
            digest.update(np.ascontiguousarray(self.image(0)).tobytes())
        return digest.hexdigest()


class FolderImages:
    """All pictures under a folder, sorted; the id of a picture is its path relative to the folder.

    Args:
        root: the folder.

    Raises:
        UserError: the folder is missing or holds no pictures.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)
        if not self.root.is_dir():
            raise UserError(f"{self.root}: no such folder of pictures")
        files = sorted(p for p in self.root.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        if not files:
            raise UserError(f"{self.root}: holds no pictures ({', '.join(SUFFIXES)})")
        self.ids: Sequence[str] = [p.relative_to(self.root).as_posix() for p in files]

    def image(self, index: int) -> NDArray[np.uint8]:
        """uint8 RGB ``(H, W, 3)``, upright."""
        return read_image(self.root / self.ids[index])

    def fingerprint(self) -> str:
        """sha256 over names and sizes of the files."""
        digest = hashlib.sha256()
        for name in self.ids:
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
            data = json.loads(Path(annotations).read_text(encoding="utf-8"))
            self._names = {int(entry["id"]): str(entry["file_name"]) for entry in data["images"]}
            self._boxes: dict[int, list[list[float]]] = {}
            for entry in data.get("annotations", ()):
                if not entry.get("iscrowd"):
                    x, y, w, h = map(float, entry["bbox"])
                    self._boxes.setdefault(int(entry["image_id"]), []).append([x, y, x + w, y + h])
        except OSError as error:
            raise UserError(f"{annotations}: {error.strerror or error}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{annotations}: not a COCO annotation file ({error!r})") from error
        if not self._names:
            raise UserError(f"{annotations}: lists no pictures")
        self.ids: Sequence[int] = list(self._names)

    def image(self, index: int) -> NDArray[np.uint8]:
        """uint8 RGB ``(H, W, 3)``, upright."""
        return read_image(self.root / self._names[self.ids[index]])

    def boxes(self, index: int) -> NDArray[np.float32]:
        """Ground truth ``(n, 4)`` xyxy without crowds."""
        return np.asarray(self._boxes.get(self.ids[index], ()), dtype=np.float32).reshape(-1, 4)

    def fingerprint(self) -> str:
        """sha256 over ids and file names."""
        return hashlib.sha256(json.dumps(sorted(self._names.items())).encode()).hexdigest()


def read_image(path: Path) -> NDArray[np.uint8]:
    """Read a picture as uint8 RGB ``(H, W, 3)``, turned as its EXIF orientation says.

    Raises:
        BadImageError: it is missing, damaged, or too large to be a photo.
    """
    try:
        with Image.open(path) as picture:
            return np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadImageError(path, str(error)) from error
