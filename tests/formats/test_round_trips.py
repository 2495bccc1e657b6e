# SPDX-License-Identifier: Apache-2.0
"""What is written in a format is read back as it was, here and by other people's readers."""

from __future__ import annotations

import csv
import json
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ovd.convert import main
from ovd.formats.read import read_labels
from ovd.formats.shapes import joined, labelled_pictures, mask_outlines
from ovd.formats.supervised import detection_dataset
from pretrain.data.masks import decode, encode_mask
from pretrain.engine.errors import UserError
from tests.formats.cases import BOXES, EXPECTED, NAMES, coco_content, make_coco, objects, same


def convert(source: Path, to: str, out: Path, *more: str) -> Path:
    assert main([str(source), "--to", to, "--out", str(out), *more]) == 0
    return out


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    return make_coco(tmp_path / "source")


@pytest.fixture
def photos(coco: Path) -> str:
    return str(coco.parent / "photos")


@pytest.mark.parametrize(("to", "within"), [("coco", 0.001), ("yolo", 0.001), ("yolo-seg", 0.001), ("voc", 0.5)])
def test_round_trip__a_data_set_comes_back_as_it_was(
    to: str, within: float, coco: Path, photos: str, tmp_path: Path
) -> None:
    out = convert(coco, to, tmp_path / "out", "--images", photos)
    for part, stems in (("train", {"a", "b"}), ("val", {"c"}), (None, {"a", "b", "c"})):
        labels = read_labels(out, part=part)
        assert labels.kind == to.removesuffix("-seg")
        assert same(objects(labels), {s: rows for s, rows in EXPECTED.items() if s in stems}, within=within), part
        files = [labels.root / entry["file_name"] for entry in labels.content["images"]]
        assert all(file.is_file() for file in files) and labels.notices == []


@pytest.mark.parametrize("way", [("yolo", "voc", "coco"), ("voc", "yolo", "voc"), ("coco", "voc", "yolo")])
def test_round_trip__a_chain_of_formats_keeps_every_object(
    way: tuple[str, ...], coco: Path, photos: str, tmp_path: Path
) -> None:
    source = convert(coco, way[0], tmp_path / "0", "--images", photos)
    for step, to in enumerate(way[1:], 1):
        source = convert(source, to, tmp_path / str(step), "--pictures", "link")
    assert same(objects(read_labels(source)), EXPECTED, within=0.5)


def test_yolo__keeps_outlines(coco: Path, photos: str, tmp_path: Path) -> None:
    rows, columns = np.mgrid[:60, :80]
    disc = ((rows - 30) ** 2 + (columns - 40) ** 2 < 20**2) | ((rows < 8) & (columns < 9))
    content = coco_content()
    content["annotations"][0] |= {"segmentation": encode_mask(disc), "bbox": [0, 0, 60, 50], "area": int(disc.sum())}
    coco.write_text(json.dumps(content))
    out = convert(coco, "yolo-seg", tmp_path / "out", "--images", photos)
    back = next(one for one in read_labels(out).content["annotations"] if "segmentation" in one)
    mask = decode(back["segmentation"], (60, 80), "back")
    assert (mask & disc).sum() / (mask | disc).sum() > 0.97


def test_outlines__cover_the_pixels_of_a_mask_and_several_become_one() -> None:
    mask = np.zeros((20, 30), dtype=bool)
    mask[3:9, 4:12] = mask[12:18, 20:29] = True
    polygons = mask_outlines(mask)
    assert len(polygons) == 2
    assert (decode(polygons, (20, 30), "m") == mask).all()
    assert (decode([joined(polygons)], (20, 30), "m") == mask).mean() > 0.99


# --- other people's readers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["coco", "yolo", "voc"])
def test_supervision__reads_the_same(to: str, coco: Path, photos: str, tmp_path: Path) -> None:
    sv = pytest.importorskip("supervision")
    out = convert(coco, to, tmp_path / "out", "--images", photos, "--part", "train")
    if to == "coco":
        data = sv.DetectionDataset.from_coco(str(out / "images"), str(out / "annotations/instances_train.json"))
    elif to == "yolo":
        data = sv.DetectionDataset.from_yolo(
            str(out / "images/train"), str(out / "labels/train"), str(out / "data.yaml")
        )
    else:
        data = sv.DetectionDataset.from_pascal_voc(str(out / "JPEGImages"), str(out / "Annotations"))
    first = next(found for path, _, found in data if Path(path).stem == "a")
    rows = zip((data.classes[i] for i in first.class_id), first.xyxy.tolist(), strict=True)
    assert same({"a": sorted((name, tuple(box)) for name, box in rows)}, {"a": EXPECTED["a"]}, within=0.5)


def test_labelme__is_read_by_supervision(coco: Path, photos: str, tmp_path: Path) -> None:
    sv = pytest.importorskip("supervision")
    out = convert(coco, "labelme", tmp_path / "out", "--images", photos)
    content = json.loads((out / "train/a.json").read_text())
    assert (out / "train" / content["imagePath"]).resolve() == Path(photos, "a.jpg").resolve()
    assert (content["imageHeight"], content["imageWidth"]) == (60, 80)
    flat = tmp_path / "flat"
    flat.mkdir()
    (flat / "a.json").write_text(json.dumps(content | {"imagePath": "a.jpg"}))
    data = sv.DetectionDataset.from_labelme(photos, str(flat))
    first = next(found for path, _, found in data if Path(path).stem == "a")
    rows = zip((data.classes[i] for i in first.class_id), first.xyxy.tolist(), strict=True)
    assert same({"a": sorted((name, tuple(box)) for name, box in rows)}, {"a": EXPECTED["a"]}, within=0.001)


def test_coco__is_read_by_pycocotools(coco: Path, photos: str, tmp_path: Path) -> None:
    from pycocotools.coco import COCO

    out = convert(coco, "coco", tmp_path / "out", "--images", photos)
    data = COCO(str(out / "annotations/instances_train.json"))
    assert len(data.getAnnIds()) == 4 and [c["name"] for c in data.loadCats(data.getCatIds())] == list(NAMES)
    assert all(0 < one["area"] for one in data.loadAnns(data.getAnnIds()))


def test_supervision__takes_a_data_set(coco: Path, photos: str) -> None:
    pytest.importorskip("supervision")
    data = detection_dataset(labelled_pictures(read_labels(coco, images=Path(photos))))
    assert data.classes == list(NAMES) and len(data) == 3
    path, picture, found = next(row for row in data if row[0].endswith("a.jpg"))
    assert picture.shape == (60, 80, 3) and Path(path).is_file()
    assert found.data["class_name"].tolist() == [NAMES[i] for i, _ in BOXES["a.jpg"]]
    assert found.xyxy[0].tolist() == [10, 20, 40, 45]


# --- files for annotation tools --------------------------------------------------------------------------------------


def test_csv__has_a_line_per_object(coco: Path, photos: str, tmp_path: Path) -> None:
    out = convert(coco, "csv", tmp_path / "out", "--images", photos)
    rows = list(csv.DictReader((out / "detections.csv").open(encoding="utf-8")))
    assert len(rows) == 4
    assert rows[1] | {"class": "zebra: crossing", "file": "a.jpg", "x2": "80", "y2": "60", "score": ""} == rows[1]


def test_cvat__has_images_labels_and_boxes(coco: Path, photos: str, tmp_path: Path) -> None:
    root = ET.parse(convert(coco, "cvat", tmp_path / "out", "--images", photos) / "annotations.xml").getroot()
    assert [e.text for e in root.findall("meta/task/labels/label/name")] == list(NAMES)
    image = root.find("image[@name='a.jpg']")
    assert image is not None and (image.get("width"), image.get("height")) == ("80", "60")
    box = image.findall("box")[0]
    assert [float(box.get(k, "")) for k in ("xtl", "ytl", "xbr", "ybr")] == [10, 20, 40, 45]


def test_label_studio__has_percentages_of_the_picture(coco: Path, photos: str, tmp_path: Path) -> None:
    out = convert(coco, "label-studio", tmp_path / "out", "--images", photos)
    task = json.loads((out / "tasks.json").read_text())[0]
    assert task["data"]["image"].endswith("?d=a.jpg")
    first = task["predictions"][0]["result"][0]
    assert (first["type"], first["original_width"], first["original_height"]) == ("rectanglelabels", 80, 60)
    assert first["value"].pop("rectanglelabels") == ["cat"]
    assert first["value"] == pytest.approx({"x": 12.5, "y": 100 / 3, "width": 37.5, "height": 125 / 3, "rotation": 0})
    config = ET.parse(out / "label_config.xml").getroot()
    assert {e.get("name") for e in config} == {"image", first["from_name"], "outline"}


# --- pictures and folders --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["copy", "link", "none"])
def test_convert__copies_links_or_leaves_out_pictures(place: str, coco: Path, photos: str, tmp_path: Path) -> None:
    out = convert(coco, "yolo", tmp_path / "out", "--images", photos, "--pictures", place)
    picture = out / "images/train/sub/b.png"
    assert (out / "labels/train/sub/b.txt").is_file()
    assert (picture.is_symlink(), picture.exists()) == (place == "link", place != "none")


def test_yolo__pictures_of_one_stem_get_labels_of_their_own(tmp_path: Path) -> None:
    folder, images = tmp_path / "photos", []
    folder.mkdir()
    for number, name in enumerate(("x.png", "x.jpg", "X.bmp"), 1):
        Image.new("RGB", (20, 20)).save(folder / name)
        images.append({"id": number, "file_name": name, "width": 20, "height": 20})
    box = {"category_id": 1, "bbox": [1, 2, 3, 4], "iscrowd": 0, "area": 12}
    content = {"images": images, "categories": [{"id": 1, "name": "cat"}],
               "annotations": [{"id": i, "image_id": i, **box} for i in (1, 2, 3)]}  # fmt: skip
    (tmp_path / "labels.json").write_text(json.dumps(content))
    out = convert(tmp_path / "labels.json", "yolo", tmp_path / "out", "--images", str(folder))
    assert len(list((out / "labels").glob("*.txt"))) == 3
    assert sum(len(rows) for rows in objects(read_labels(out)).values()) == 3


@pytest.mark.parametrize("to", ["coco", "yolo", "voc", "labelme"])
def test_convert__keeps_pictures_of_one_name_in_two_parts(to: str, tmp_path: Path) -> None:
    for part, shade in (("train", 0), ("valid", 255)):
        for folder in ("images", "labels"):
            (tmp_path / "set" / part / folder).mkdir(parents=True)
        Image.new("L", (40, 40), shade).save(tmp_path / "set" / part / "images/a.png")
        (tmp_path / "set" / part / "labels/a.txt").write_text("0 .5 .5 .5 .5\n")
    (tmp_path / "set/data.yaml").write_text("train: train/images\nval: valid/images\nnames: [thing]\n")
    out = convert(tmp_path / "set/data.yaml", to, tmp_path / "out")
    if to == "labelme":
        shown = [out / Path(file).parent / json.loads(file.read_text())["imagePath"] for file in out.rglob("a.json")]
    else:
        truth = (labels := read_labels(out, part="all")).truth()
        assert sorted(truth.parts.values()) == ["train", "val"] and len(truth.annotations) == 2
        shown = [labels.root / truth.file_of(image_id) for image_id in truth.sizes]
    assert sorted(Image.open(path).getpixel((0, 0)) for path in shown) == [0, 255]


def test_crowds__are_difficult_in_voc_and_left_out_of_yolo(
    coco: Path, photos: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = coco_content()
    content["annotations"][0]["iscrowd"] = 1
    coco.write_text(json.dumps(content))
    back = read_labels(convert(coco, "voc", tmp_path / "voc", "--images", photos))
    assert [one["iscrowd"] for one in back.content["annotations"]] == [1, 0, 0, 0]
    assert "1 objects are difficult" in back.notices[0]
    yolo = read_labels(convert(coco, "yolo", tmp_path / "yolo", "--images", photos))
    assert len(yolo.content["annotations"]) == 3 and "1 crowds" in capsys.readouterr().err


def test_convert__overwrites_nothing_and_leaves_nothing_half_written(coco: Path, photos: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty"):
        main([str(coco), "--to", "yolo", "--out", str(out), "--images", photos])
    Path(photos, "a.jpg").unlink()
    with pytest.raises(UserError, match=r"1 of 3 pictures are not there \(first: .*a\.jpg\); give another --im"):
        main([str(coco), "--to", "yolo", "--out", str(tmp_path / "new"), "--images", photos])
    assert not (tmp_path / "new").exists()
