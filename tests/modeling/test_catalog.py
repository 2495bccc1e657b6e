# SPDX-License-Identifier: Apache-2.0
"""Sticker Scenes in Detectron2's catalog."""

from __future__ import annotations

from detectron2.data import DatasetCatalog, MetadataCatalog
from pycocotools import mask as coco_mask

from ovd.data.catalog import StickerImages, register_stickers
from pretrain.data.stickers import Stickers


def test_registered_records_hold_the_boxes_and_masks_of_the_scenes() -> None:
    images = StickerImages(stickers=Stickers.load(), split="val", seed=3, length=2, size=96, labels="all")
    register_stickers("stickers-test", images)
    try:
        records = DatasetCatalog.get("stickers-test")
        metadata = MetadataCatalog.get("stickers-test")
        assert metadata.thing_classes == list(images.names) and set(metadata.novel_classes) == images.novel
        for index, record in enumerate(records):
            labelled = images.load(index)
            assert (record["image_id"], record["height"], record["width"]) == (labelled.image_id, 96, 96)
            assert [a["category_id"] for a in record["annotations"]] == labelled.classes.tolist()
            assert [a["bbox"] for a in record["annotations"]] == labelled.boxes.tolist()
            for annotation, mask in zip(record["annotations"], labelled.masks, strict=True):
                assert (coco_mask.decode(annotation["segmentation"]).astype(bool) == mask).all()
    finally:
        DatasetCatalog.remove("stickers-test")
        MetadataCatalog.remove("stickers-test")
