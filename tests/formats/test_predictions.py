# SPDX-License-Identifier: Apache-2.0
"""``wordbox predict --format``: the same boxes in every format."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from PIL import Image

from ovd.formats.names import FORMATS, parse_formats
from ovd.formats.predictions import write_predictions
from ovd.picture_files import PictureFiles
from ovd.predict import predict
from ovd.vocabulary import Vocabulary
from pretrain.engine.errors import UserError
from tests.detector.fakes import make_detector, picture


def test_predictions__boxes_and_scores_are_written_in_every_format(tmp_path: Path) -> None:
    photos, out = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    Image.fromarray(picture()).save(photos / "a.png")
    Image.fromarray(picture([("yellow", 5, 5, 60, 60)])).save(photos / "none.png")
    pictures = PictureFiles.collect([photos])
    words = Vocabulary.parse("blue, red")
    predict(detector=make_detector(cache_size=0), pictures=pictures, vocabulary=words, out=out, masks=False)
    write_predictions(out, FORMATS, pictures.paths)
    assert {path.name for path in out.iterdir()} >= set(FORMATS)
    rows = list(csv.DictReader((out / "csv/detections.csv").open(encoding="utf-8")))
    assert {(r["file"], r["class"], r["x1"], r["y1"], r["x2"], r["y2"]) for r in rows} == {
        ("a.png", "red", "10.0", "20.0", "50.0", "70.0"), ("a.png", "blue", "80.0", "30.0", "150.0", "110.0")
    }  # fmt: skip
    assert all(0.3 < float(r["score"]) <= 1 for r in rows)
    lines = (out / "yolo/labels/a.txt").read_text().splitlines()
    assert sorted(lines) == ["0 0.718750 0.583333 0.437500 0.666667", "1 0.187500 0.375000 0.250000 0.416667"]
    assert (out / "yolo/labels/none.txt").read_text() == "" and not (out / "yolo/images").exists()
    coco = json.loads((out / "coco/annotations/instances_all.json").read_text())
    assert [one["score"] for one in coco["annotations"]] == sorted((float(r["score"]) for r in rows), reverse=True)
    labelme = json.loads((out / "labelme/a.json").read_text())
    assert (out / "labelme" / labelme["imagePath"]).resolve() == photos / "a.png"


@pytest.mark.parametrize(
    ("text", "said"),
    [("yolo,pascal", r"--format yolo,pascal: unknown 'pascal'"), ("ylo", "did you mean 'yolo'"), (",", "one or more")],
)
def test_predictions__unknown_formats_are_refused(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse_formats(text)
    assert parse_formats("CSV, yolo,csv") == ("csv", "yolo")
