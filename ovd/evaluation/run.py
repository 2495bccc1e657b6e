# SPDX-License-Identifier: Apache-2.0
"""Runs a model over generated scenes or the pictures of a COCO file: results and proposals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ovd.detections import CocoResult
from pretrain.data.coco import image_sizes, picture_file
from pretrain.data.coco_entries import CocoJson, ImageId
from pretrain.data.images import IdentifiedPictures
from pretrain.engine.errors import UserError

if TYPE_CHECKING:
    from pretrain.data.scenes import ObjectEntry, SceneEntry, SceneSource

Predict = Callable[[NDArray[np.uint8], ImageId], list[CocoResult]]
QUOTED = 10  # faults in a message
OnImage = Callable[[int, int], None]


def run_source(
    source: SceneSource,
    predict: Predict | None,
    *,
    propose: Predict | None = None,
    on_image: OnImage | None = None,
) -> tuple[CocoJson, list[CocoResult] | None, list[CocoResult] | None]:
    """Run a model over generated scenes; nothing touches the disk.

    Args:
        source: scenes with all labels; scene `index` becomes image id `index + 1`.
        predict: `(image uint8 (H, W, 3) RGB, image_id) -> COCO results of that image`; None for proposals alone.
        propose: class-agnostic proposals, likewise.
        on_image: called with (images done, images in all).

    Returns:
        COCO ground truth, the results and the proposals; None for what was not wanted.

    Raises:
        UserError: a source that hides the labels of novel objects.
    """
    if source.labels != "all":
        raise UserError("this source hides the labels of novel objects (labels=base), so they cannot be evaluated.")
    scenes = _Scenes(source)
    results, proposals = _run(scenes, predict, propose, on_image)
    return scenes.ground_truth(), results, proposals


def run_images(
    gt: CocoJson,
    folder: Path,
    predict: Predict | None,
    *,
    propose: Predict | None = None,
    on_image: OnImage | None = None,
    where: str = "the annotations",
) -> tuple[list[CocoResult] | None, list[CocoResult] | None]:
    """The model's results, and its proposals, on the pictures of a COCO file.

    Args:
        gt: ground truth; every image needs `file_name`, or LVIS's `coco_url`.
        folder: what `file_name` is relative to.
        where: the file, for messages.

    Other arguments as `run_source`.

    Raises:
        UserError: an image without a file name, unreadable, or of another size than the file says.
    """
    return _run(_Files(gt, folder, where=where), predict, propose, on_image)


def _run(
    pictures: IdentifiedPictures, predict: Predict | None, propose: Predict | None, on_image: OnImage | None
) -> tuple[list[CocoResult] | None, list[CocoResult] | None]:
    results: list[CocoResult] = []
    proposals: list[CocoResult] = []
    faults: list[str] = []
    for index, image_id in enumerate(pictures.ids):
        try:
            image = pictures.image(index)
        except UserError as problem:
            faults.append(str(problem))
        if faults:  # the others are read all the same: one message names all that have to be repaired
            continue
        if predict is not None:
            results += predict(image, image_id)
        if propose is not None:
            proposals += propose(image, image_id)
        if on_image is not None:
            on_image(index + 1, len(pictures))
    if len(faults) > 1:
        more = [f"and {len(faults) - QUOTED} more"] if len(faults) > QUOTED else []
        raise UserError("\n  ".join([f"{len(faults)} pictures cannot be evaluated:", *faults[:QUOTED], *more]))
    if faults:
        raise UserError(faults[0])
    return None if predict is None else results, None if propose is None else proposals


class _Scenes:
    """Generated scenes, whose labels are noted as they are read."""

    def __init__(self, source: SceneSource) -> None:
        self.source = source
        self.ids: Sequence[ImageId] = range(1, len(source) + 1)
        self._images: list[SceneEntry] = []
        self._annotations: list[ObjectEntry] = []

    def __len__(self) -> int:
        return len(self.source)

    def image(self, index: int) -> NDArray[np.uint8]:
        """Scene ``index``; each is read once, in their order."""
        from pretrain.data.scenes import coco_objects

        scene = self.source.scene(index)
        image, objects = coco_objects(scene, image_id=index + 1, first_annotation_id=len(self._annotations) + 1)
        self._images.append(image)
        self._annotations += objects
        return scene.image

    def ground_truth(self) -> CocoJson:
        """Labels of the scenes that were read."""
        from pretrain.data.export import coco_header

        header = coco_header(self.source.stickers, self.source)
        return {**header, "images": self._images, "annotations": self._annotations}


class _Files:
    """The pictures of a COCO file; see `run_images`."""

    def __init__(self, gt: CocoJson, folder: Path, *, where: str) -> None:
        from pretrain.data.folder import require_files

        self.folder, self.sizes = folder, image_sizes(gt)
        self.names = [picture_file(entry, where=f"images[{n}]") for n, entry in enumerate(gt["images"])]
        self.ids: Sequence[ImageId] = [entry["id"] for entry in gt["images"]]
        require_files(self.names, folder, where=where)

    def __len__(self) -> int:
        return len(self.names)

    def image(self, index: int) -> NDArray[np.uint8]:
        """Picture ``index``, of the size that the file says."""
        from pretrain.data.folder import read_image

        path, size = self.folder / self.names[index], self.sizes[self.ids[index]]
        image = read_image(path)
        if size is not None and image.shape[:2] != size:
            raise UserError(
                f"{path}: {image.shape[1]}×{image.shape[0]} px, but the annotations say "
                f"{size[1]}×{size[0]}: boxes would be off. (Resized, or turned by its EXIF orientation?)"
            )
        return image
