# SPDX-License-Identifier: Apache-2.0
"""Pictures with class-agnostic boxes: ground truth, or a teacher's boxes with scores.

Confident boxes are objects; doubtful ones are ignored: neither object nor background.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import torch
from detectron2.structures import Boxes, Instances
from numpy.typing import NDArray

from ovd.data.catalog import read_annotated
from ovd.data.joined import check_withheld, corners_of, is_object, join_images, no_such_part
from ovd.data.mapper import TrainingTransform, move_boxes
from ovd.data.samples import LabelledSample
from pretrain.data.coco import ImageId, read_ground_truth
from pretrain.data.folder import require_files
from pretrain.engine.errors import UserError
from pretrain.engine.faults import BAD_IMAGES_ALLOWED
from pretrain.engine.identity import file_identity, files_identity


class BoxedImages:
    """Pictures of one or several COCO files with their confident and doubtful boxes.

    Args:
        folder: that ``file_name`` is relative to.
        annotations: files of the same images: an image that occurs in two must have the same file name in both.
        part: only images whose ``split`` is this; None: all.
        confident, doubtful: thresholds on an annotation's ``score``; without one it is confident, a crowd doubtful.
        withheld: names of categories whose boxes are left out.

    Raises:
        UserError: an unreadable file, an unknown part or name, files that disagree, or no confident box at all.
    """

    def __init__(
        self,
        *,
        folder: Path,
        annotations: Sequence[Path],
        part: str | None,
        confident: float,
        doubtful: float,
        withheld: Collection[str] = (),
    ) -> None:
        hint = "data.annotations must be COCO annotation files"
        truths = [read_ground_truth(path, hint=hint) for path in annotations]
        check_withheld(withheld, truths)
        self.folder, self.annotations = folder, tuple(annotations)
        joined = join_images(truths)
        self.files, self.sizes = joined.files, joined.sizes
        boxes: dict[ImageId, tuple[list[list[float]], list[list[float]]]] = {}
        for truth in truths:
            for annotation in truth.annotations:
                sure = is_object(annotation, confident=confident, doubtful=doubtful)
                if sure is None or truth.categories[annotation["category_id"]] in withheld:
                    continue
                boxes.setdefault(annotation["image_id"], ([], []))[0 if sure else 1].append(annotation["bbox"])
        chosen = joined.of_part(part)
        if not chosen:
            raise no_such_part(part, joined.parts.values())
        self._boxes = {i: (corners_of(sure), corners_of(unsure)) for i, (sure, unsure) in boxes.items()}
        self.image_ids: list[ImageId] = [i for i in chosen if i in self._boxes and len(self._boxes[i][0])]
        if not self.image_ids:
            raise UserError(f"data.annotations: no image has a box with a score of at least {confident}")
        without = len(chosen) - len(self.image_ids)
        self.notices = [f"{truth.where}: {warning}" for truth in truths for warning in truth.warnings]
        where = ", ".join(map(str, annotations))
        names = [self.files[i] for i in self.image_ids]
        if missing := require_files(names, folder, where=where, allowed=BAD_IMAGES_ALLOWED):
            self.notices.append(missing)
        if without:
            self.notices.append(f"{without} of {len(chosen)} images have no confident box and are not used")

    def __len__(self) -> int:
        return len(self.image_ids)

    def boxes(self, index: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """((n, 4) confident, (m, 4) doubtful) boxes of a picture, x1, y1, x2, y2 in pixels."""
        return self._boxes[self.image_ids[index]]

    def identity(self) -> dict[str, str]:
        """Names and content of the pictures, and the annotation files."""
        names = [self.files[i] for i in self.image_ids]
        return {**files_identity("pictures", self.folder, names), "annotations": file_identity(self.annotations)}

    def image(self, index: int) -> NDArray[np.uint8]:
        """Picture ``index``, (H, W, 3) RGB.

        Raises:
            BadImageError: it cannot be read, or is not of the size that the annotations say.
        """
        image_id = self.image_ids[index]
        return read_annotated(self.folder / self.files[image_id], self.sizes[image_id])


class BoxSource:
    """The training loop's samples: Detectron2's dicts with ``image`` and ``instances``, doubtful boxes of class -1.

    Args:
        images: data set.
        transform: augmentation.
        seed: with the draw number it seeds each sample's augmentation.
    """

    def __init__(self, *, images: BoxedImages, transform: TrainingTransform, seed: int) -> None:
        self.images, self.transform, self.seed = images, transform, seed

    def __len__(self) -> int:
        return len(self.images)

    def identity(self) -> dict[str, str]:
        """Fingerprint of the pictures and boxes."""
        return self.images.identity()

    def sample(self, index: int, draw: int) -> LabelledSample:
        """Sample of picture ``index``; pure function of (index, draw)."""
        rng = np.random.default_rng([self.seed, draw])
        picture = self.images.image(index)
        transforms = self.transform.draw(picture.shape[0], picture.shape[1], rng)
        image = transforms.apply_image(picture)
        size = (image.shape[0], image.shape[1])
        instances = Instances(size)
        moved = [move_boxes(boxes, transforms, size) for boxes in self.images.boxes(index)]
        visible_boxes = [boxes[visible] for boxes, visible in moved]
        instances.gt_boxes = Boxes(torch.from_numpy(np.concatenate(visible_boxes).reshape(-1, 4)))
        instances.gt_classes = torch.cat(
            [torch.full((len(boxes),), c) for c, boxes in zip((0, -1), visible_boxes, strict=True)]
        )
        return {"image": torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))), "instances": instances}

    @staticmethod
    def collate(samples: list[LabelledSample]) -> list[LabelledSample]:
        """Detectron2 takes a list."""
        return samples
