# SPDX-License-Identifier: Apache-2.0
"""Tiles: small things that the whole picture loses, nothing twice, nothing cut."""

from __future__ import annotations

import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from ovd.inference.scoring import RegionSet
from ovd.picture_files import PictureFiles
from ovd.predict import predict
from ovd.tiles import TiledDetector
from pretrain.engine.errors import UserError
from tests.detector.fakes import make_detector, picture

pytest.importorskip("supervision")
SIDE = 128  # of a tile, and the longest side at which the detector below sees a picture


def shrinking_detector(*, masks: bool = True) -> TiledDetector:
    """Like a network: it sees a picture at most `SIDE` pixels long, and nothing of less than 6 pixels there."""
    detector = make_detector(cache_size=0, masks=masks)
    network = detector.model.regions

    def regions(image: np.ndarray) -> RegionSet:
        scale = min(1.0, SIDE / max(image.shape[:2]))
        small = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_NEAREST)
        found = network(small)
        sides = found.boxes[:, 2:] - found.boxes[:, :2]
        found.objectness[sides.min(axis=1) < 6] = 0.0
        found.boxes /= scale
        found.size = (image.shape[0], image.shape[1])
        keep = found.objectness > 0
        return RegionSet(
            boxes=found.boxes[keep], objectness=found.objectness[keep], text=found.text[keep], image=None,
            masks=None if found.masks is None else found.masks[keep], size=found.size,
        )  # fmt: skip

    detector.model.regions = regions  # type: ignore[method-assign]
    return TiledDetector(detector, side=SIDE)


def plain(tiled: TiledDetector, image: np.ndarray) -> list[str]:
    return super(TiledDetector, tiled).answer(image, tiled.query("red, blue")).class_name


def test_tiles__small_objects_found_without_duplicates() -> None:
    small = [("red", 30, 40, 50, 60), ("red", 500, 300, 520, 318), ("red", 250, 200, 268, 222)]
    image = picture([*small, ("blue", 300, 60, 480, 200)], size=(400, 640))
    tiled = shrinking_detector()
    assert plain(tiled, image) == ["blue"]
    found = tiled.answer(image, tiled.query("red, blue"))
    boxes = {tuple(box.round().astype(int).tolist()) for box in found.xyxy}
    assert sorted(found.class_name) == ["blue", "red", "red", "red"]
    assert {(x1, y1, x2, y2) for _, x1, y1, x2, y2 in small} <= boxes
    blue = found.xyxy[found.class_name.index("blue")]
    assert np.abs(blue - (300, 60, 480, 200)).max() <= 6  # not a part of it from one tile
    assert found.size == (400, 640) and found.names == ("red", "blue")


def test_tiles__masks_are_at_their_boxes() -> None:
    image = picture([("red", 500, 300, 520, 318)], size=(400, 640))
    tiled = shrinking_detector()
    found = tiled.answer(image, tiled.query("red, blue"))
    mask = found.mask_of(0)
    assert mask is not None and mask[300:318, 500:520].mean() > 0.9 and mask.sum() <= 20 * 18 + 80
    assert shrinking_detector(masks=False).answer(image, tiled.query("red")).mask is None


def test_tiles__objects_at_the_picture_border_are_kept() -> None:
    image = picture([("red", 0, 0, 20, 20), ("red", 620, 380, 640, 400)], size=(400, 640))
    tiled = shrinking_detector()
    assert len(tiled.answer(image, tiled.query("red"))) == 2


def test_tiles__small_picture_is_one_run() -> None:
    tiled = shrinking_detector()
    assert tiled.answer(picture([("red", 10, 10, 60, 60)], size=(100, 120)), tiled.query("red")).class_name == ["red"]
    assert tiled.runs == 1
    empty = tiled.answer(picture([("yellow", 1, 1, 5, 5)], size=(300, 300)), tiled.query("red"))
    assert len(empty) == 0 and empty.box_masks is not None and len(empty.box_masks) == 0


def test_tiles__results_of_other_settings_are_refused(tmp_path: Path) -> None:
    Image.fromarray(picture()).save(tmp_path / "a.png")
    pictures, words = PictureFiles.collect([tmp_path / "a.png"]), make_detector().query("red").words
    predict(detector=make_detector(cache_size=0), pictures=pictures, vocabulary=words, out=tmp_path / "out")
    with pytest.raises(UserError, match="has results of another command"):
        predict(detector=shrinking_detector(), pictures=pictures, vocabulary=words, out=tmp_path / "out")


def test_tiles__too_many_or_missing_package_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    tiled = TiledDetector(make_detector(cache_size=0), side=4)
    with pytest.raises(UserError, match=r"640×400 pixels are .* tiles of 4; give --tile-side"):
        tiled.answer(picture([("red", 0, 0, 20, 20)], size=(400, 640)), tiled.query("red"))
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(UserError, match="--tiles needs the package supervision: pip install supervision"):
        TiledDetector(make_detector())
