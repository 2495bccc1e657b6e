# SPDX-License-Identifier: Apache-2.0
"""Running a model over generated scenes or the pictures of a COCO file: its results and its proposals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ovd.detections import CocoResult
from pretrain.data.coco import image_sizes, picture_file
from pretrain.data.coco_entries import CocoJson, ImageId
from pretrain.engine.errors import UserError

if TYPE_CHECKING:
    from pretrain.data.scenes import SceneSource

Predict = Callable[[NDArray[np.uint8], ImageId], list[CocoResult]]


def run_source(
    source: SceneSource,
    predict: Predict | None,
    *,
    propose: Predict | None = None,
    on_image: Callable[[int, int], None] | None = None,
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
    from pretrain.data.export import coco_header
    from pretrain.data.scenes import ObjectEntry, SceneEntry, coco_objects

    if source.labels != "all":
        raise UserError("this source hides the labels of novel objects (labels=base), so nothing can be said of them.")
    images: list[SceneEntry] = []
    annotations: list[ObjectEntry] = []
    collector = _Collector(predict, propose)
    for index in range(len(source)):
        scene = source.scene(index)
        image_id = index + 1
        image, objects = coco_objects(scene, image_id=image_id, first_annotation_id=len(annotations) + 1)
        images.append(image)
        annotations += objects
        collector(scene.image, image_id)
        if on_image is not None:
            on_image(image_id, len(source))
    gt = {**coco_header(source.stickers, source), "images": images, "annotations": annotations}
    return gt, collector.results, collector.proposals


def run_images(
    gt: CocoJson,
    folder: Path,
    predict: Predict | None,
    *,
    propose: Predict | None = None,
    on_image: Callable[[int, int], None] | None = None,
) -> tuple[list[CocoResult] | None, list[CocoResult] | None]:
    """The model's results, and its proposals, on the pictures of a COCO file.

    Args:
        gt: ground truth; every image needs `file_name`, or LVIS's `coco_url`.
        folder: what `file_name` is relative to.

    Other arguments as `run_source`.

    Raises:
        UserError: an image without a file name, unreadable, or of another size than the file says.
    """
    from pretrain.data.folder import look_for, read_image

    collector = _Collector(predict, propose)
    sizes = image_sizes(gt)
    names = [picture_file(entry, where=f"images[{n}]") for n, entry in enumerate(gt["images"])]
    look_for(names, folder, where="the annotations")
    for n, (entry, name) in enumerate(zip(gt["images"], names, strict=True)):
        image = read_image(folder / name)
        size = sizes[entry["id"]]
        if size is not None and image.shape[:2] != size:
            raise UserError(
                f"{folder / name}: {image.shape[1]}×{image.shape[0]} px, but the annotations say "
                f"{size[1]}×{size[0]}: boxes would be off. (Resized, or turned by its EXIF orientation?)"
            )
        collector(image, entry["id"])
        if on_image is not None:
            on_image(n + 1, len(gt["images"]))
    return collector.results, collector.proposals


class _Collector:
    """Results and proposals of one picture after another; None for what is not wanted."""

    def __init__(self, predict: Predict | None, propose: Predict | None) -> None:
        self.predict, self.propose = predict, propose
        self.results: list[CocoResult] | None = None if predict is None else []
        self.proposals: list[CocoResult] | None = None if propose is None else []

    def __call__(self, image: NDArray[np.uint8], image_id: ImageId) -> None:
        if self.predict is not None and self.results is not None:
            self.results += self.predict(image, image_id)
        if self.propose is not None and self.proposals is not None:
            self.proposals += self.propose(image, image_id)
