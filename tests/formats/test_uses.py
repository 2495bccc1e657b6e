# SPDX-License-Identifier: Apache-2.0
"""Training, evaluation and calibration take labels in any of the three forms and see the same."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from ovd.config import DataConfig
from ovd.convert import main as convert
from ovd.embed import PicturesConfig, make_images
from ovd.evaluate import main as evaluate
from ovd.evaluation.labelled_scenes import labels_of
from ovd.evaluation.model import read_data
from ovd.evaluation.options import EvaluationOptions
from ovd.evaluation.scene_calibration import fit_labels
from ovd.formats.join import join_labels
from ovd.formats.labels import Labels
from ovd.training.inputs import labelled_images
from pretrain.data.coco import GroundTruth, check_ground_truth
from pretrain.engine.errors import UserError
from tests.detector.fakes import make_detector, picture
from tests.formats.cases import PARTS, coco_content, make_coco


@pytest.fixture
def sets(tmp_path: Path) -> dict[str, Path]:
    """The same data set in three forms."""
    coco = make_coco(tmp_path / "source")
    forms = {"coco": tmp_path / "coco", "yolo": tmp_path / "yolo", "voc": tmp_path / "voc"}
    for kind, out in forms.items():
        convert([str(coco), "--images", str(coco.parent / "photos"), "--to", kind, "--out", str(out)])
    return forms


@pytest.mark.parametrize("kind", ["yolo", "voc", "auto"])
def test_training__gets_the_same_pictures_boxes_and_classes(kind: str, sets: dict[str, Path]) -> None:
    annotations = sets["coco"] / "annotations/instances_train.json"
    section = {"kind": "coco", "images": str(sets["coco"] / "images"), "annotations": str(annotations)}
    reference = labelled_images(DataConfig.model_validate(section | {"split": "all", "labels": "all"}))
    path = sets["voc" if kind == "voc" else "yolo"]
    section = {"kind": kind, "annotations": str(path), "split": "all", "labels": "all"}
    images = labelled_images(DataConfig.model_validate(section))
    assert set(images.names) == set(reference.names) and len(images) == len(reference) == 2
    for index in range(2):
        one, other = images.load(index), reference.load(index)
        assert (one.image == other.image).all()
        assert np.abs(one.boxes - other.boxes).max() <= 0.5
        assert [images.names[i] for i in one.classes] == [reference.names[i] for i in other.classes]


def test_join__pictures_by_file_and_categories_by_name(tmp_path: Path) -> None:
    whole = coco_content()
    animals = {**whole, "annotations": [one for one in whole["annotations"] if one["category_id"] == 1]}
    cells = json.loads(json.dumps(whole))  # numbers pictures and categories its own way
    cells["annotations"] = [one for one in cells["annotations"] if one["category_id"] != 1]
    for image in cells["images"]:
        image["id"] += 40
        del image["split"]
    for one in cells["annotations"]:
        one["image_id"] += 40
        one["category_id"] = {2: 9, 3: 1}[one["category_id"]]
    cells["categories"] = [{"id": 9, "name": "Red Cell"}, {"id": 1, "name": whole["categories"][2]["name"]}]
    parts = [
        Labels(content=animals, root=tmp_path, kind="coco", where="animals.json"),
        Labels(content=cells, root=tmp_path / "sub", kind="coco", where="cells.json"),
    ]
    for image in cells["images"]:  # the same files, from another folder
        image["file_name"] = f"../{image['file_name']}"
    joined = join_labels(parts)
    assert joined.root == tmp_path.resolve() and [i["split"] for i in joined.content["images"]] == [*PARTS.values()]
    truth, reference = joined.truth(), check_ground_truth(whole)
    assert list(truth.files.values()) == list(reference.files.values())

    def boxes(of: GroundTruth) -> list[tuple[object, ...]]:
        return sorted((of.files[a["image_id"]], of.categories[a["category_id"]], *a["bbox"]) for a in of.annotations)

    assert boxes(truth) == boxes(reference)  # "Red Cell" is the category of the first file, "red cell"
    cells["images"][0]["width"] += 1
    with pytest.raises(UserError, match=r"cells\.json: a\.jpg has 81 × 60 pixels, in another label file 80 × 60"):
        join_labels(parts)


@pytest.mark.parametrize("kind", ["yolo", "voc", "auto"])
def test_embed__covers_the_pictures_that_are_trained_on(kind: str, sets: dict[str, Path]) -> None:
    path = str(sets["voc" if kind == "voc" else "yolo"])
    section = {"kind": kind, "annotations": path}
    trained = labelled_images(DataConfig.model_validate({**section, "split": "all", "labels": "all"}))
    embedded = make_images(PicturesConfig.model_validate(section))
    assert list(embedded.ids) == [trained.load(index).image_id for index in range(2)]
    assert (embedded.image(0) == trained.load(0).image).all()
    with pytest.raises(ValidationError, match=rf"pictures\.kind {kind} needs pictures\.annotations"):
        PicturesConfig.model_validate({"kind": kind})


def test_split__is_chosen_and_an_absent_one_is_named(sets: dict[str, Path]) -> None:
    section = {"kind": "yolo", "annotations": str(sets["yolo"]), "split": "all", "labels": "all"}
    with pytest.raises(UserError, match="has no annotation that split 'all'"):  # the picture of val shows nothing
        labelled_images(DataConfig.model_validate(section | {"part": "val"}))
    with pytest.raises(UserError, match=r"no part 'test' \(there: train, val\); 'all' takes all"):
        labelled_images(DataConfig.model_validate(section | {"part": "test"}))
    with pytest.raises(ValidationError, match=r"data\.kind voc needs data\.annotations"):
        DataConfig.model_validate({"kind": "voc", "split": "all"})


@pytest.mark.parametrize("kind", ["coco", "yolo", "voc"])
def test_evaluate__takes_the_split_for_it(kind: str, sets: dict[str, Path]) -> None:
    for text, files in ((f"{kind}:{sets[kind]}", {"c.jpg"}), (f"{sets[kind]}:train", {"a.jpg", "b.png"})):
        pictures = read_data(EvaluationOptions.parse(["--weights", "default", "--data", text]))
        assert pictures.gt is not None and pictures.folder is not None
        named = [pictures.folder / entry["file_name"] for entry in pictures.gt["images"]]
        assert all(path.is_file() for path in named)
        assert {path.name.removeprefix("sub_") for path in named} == files
        assert len(pictures.split.base) == 3


def test_evaluate__results_against_yolo_labels(
    sets: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right = [{"image_id": 1, "category_id": c, "bbox": b, "score": 0.9} for c, b in
             ((1, [10, 20, 30, 25]), (3, [0, 0, 80, 60]), (2, [70, 55, 10, 5]))]  # fmt: skip
    (tmp_path / "r.json").write_text(json.dumps(right))
    assert evaluate(["--annotations", f"{sets['yolo']}:train", "--predictions", str(tmp_path / "r.json")]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("all"))
    assert float(row.split()[1]) > 0.8  # two classes are found wholly, of the third one of two


@pytest.fixture
def colours(tmp_path: Path) -> Path:
    """A YOLO set of flat rectangles, which the fake detector finds."""
    for number in range(24):
        left = 5 + 2 * number
        image = picture([("red", left, 10, left + 40, 50)] + ([("blue", 90, 60, 150, 110)] if number % 2 else []))
        path = tmp_path / f"set/images/{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
        rows = [(0, left, 10, left + 40, 50)] + ([(1, 90, 60, 150, 110)] if number % 2 else [])
        label = tmp_path / f"set/labels/{number:02}.txt"
        label.parent.mkdir(exist_ok=True)
        label.write_text(
            "".join(f"{c} {(a + x) / 320} {(b + y) / 240} {(x - a) / 160} {(y - b) / 120}\n" for c, a, b, x, y in rows)
        )
    (tmp_path / "set/data.yaml").write_text("val: images\nnames: [red, blue]\n")
    return tmp_path / "set/data.yaml"


def test_calibrate__fits_scores_on_photos(colours: Path) -> None:
    detector = make_detector(cache_size=0)
    fitted, figures, _ = fit_labels(detector, labels_of(str(colours)), count=12)
    assert figures["scenes"] == 12 and figures["average_precision"] > 0.99
    assert figures["absent_words_quiet"] > 0.9 and figures["recall_at_threshold"] > 0.9
    assert fitted.of_examples() == detector.model.calibration.of_examples()  # what a crop's score means stays
    with pytest.raises(UserError, match=r"no part 'train' \(there: val\)"):
        labels_of(f"{colours}:train")
