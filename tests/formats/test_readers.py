# SPDX-License-Identifier: Apache-2.0
"""Files as other tools write them, and files with mistakes: read, refused or counted, with file and line."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from ovd.formats.read import read_labels, recognise
from ovd.formats.spec import LabelSpec
from pretrain.engine.errors import UserError
from tests.formats.cases import EXPECTED, coco_content, make_pictures, objects, same


def picture(path: Path, size: tuple[int, int] = (80, 60)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(path)
    return path


def yolo(folder: Path, labels: str = "0 0.5 0.5 0.25 0.5\n", yaml: str = "train: images\nnames: [cat, dog]\n") -> Path:
    picture(folder / "images/a.jpg")
    (folder / "labels").mkdir(exist_ok=True)
    (folder / "labels/a.txt").write_text(labels)
    (folder / "data.yaml").write_text(yaml)
    return folder / "data.yaml"


def voc_object(name: str = "cat", box: tuple[object, ...] = (11, 21, 40, 45), more: str = "") -> str:
    tags = zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
    return f"<object><name>{name}</name>{more}<bndbox>{''.join(f'<{t}>{v}</{t}>' for t, v in tags)}</bndbox></object>"


def voc(folder: Path, *objects: str, head: str = "", filename: str = "a.jpg") -> Path:
    picture(folder / "JPEGImages/a.jpg")
    size = "<size><width>80</width><height>60</height><depth>3</depth></size>"
    text = f"<annotation>\n<filename>{filename}</filename>\n{size}\n" + "\n".join(objects) + "\n</annotation>"
    (folder / "Annotations").mkdir(exist_ok=True)
    (folder / "Annotations/a.xml").write_text(head + text)
    return folder


def boxes(path: Path, **options: object) -> list[list[float]]:
    return [one["bbox"] for one in read_labels(path, **options).content["annotations"]]  # type: ignore[arg-type]


# --- YOLO ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "place", ["train: ../train/images\nval: ../valid/images\n", "train: train/images\nval: valid\n"]
)
def test_yolo__roboflows_folders_are_found_beside_the_file(place: str, tmp_path: Path) -> None:
    for part in ("train", "valid"):
        picture(tmp_path / part / "images/a.jpg")
        (tmp_path / part / "labels").mkdir()
        (tmp_path / part / "labels/a.txt").write_text("1 .5 .5 .5 .5\n")
    (tmp_path / "data.yaml").write_text(f"{place}nc: 2\nnames: ['cat', 'dog']\nroboflow: {{version: 1}}\n")
    labels = read_labels(tmp_path, part="valid")
    assert [entry["file_name"] for entry in labels.content["images"]] == ["valid/images/a.jpg"]
    assert boxes(tmp_path) == [[20, 15, 40, 30], [20, 15, 40, 30]]
    assert labels.truth().categories == {1: "cat", 2: "dog"}


def test_yolo__a_list_of_paths_names_as_a_mapping_and_a_path(tmp_path: Path) -> None:
    yolo(tmp_path / "set", "7 .5 .5 .5 .5\n")
    (tmp_path / "set/val.txt").write_text("./images/a.jpg\n")
    file = tmp_path / "mine.yaml"
    file.write_text("path: set\nval: val.txt\nnames: {3: cat, 7: dog}\n")
    labels = read_labels(file, part="val")
    assert labels.truth().categories == {4: "cat", 8: "dog"} and labels.content["annotations"][0]["category_id"] == 8


def test_yolo__classes_txt_as_labelimg_and_label_studio_write_it(tmp_path: Path) -> None:
    yolo(tmp_path).unlink()
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    assert recognise(tmp_path) == "yolo" and boxes(tmp_path) == [[30, 15, 20, 30]]


def test_yolo__labels_beside_the_pictures(tmp_path: Path) -> None:
    picture(tmp_path / "all/a.jpg")
    (tmp_path / "all/a.txt").write_text("0 .5 .5 .5 .5")
    (tmp_path / "data.yaml").write_text("train: all\nnames: [cat]")
    assert boxes(tmp_path / "data.yaml") == [[20, 15, 40, 30]]


def test_yolo__outlines_scores_and_poses(tmp_path: Path) -> None:
    file = yolo(tmp_path, "0 .25 .25 .75 .25 .75 .75\n1 .5 .5 .5 .5 .875\n")
    outline, scored = read_labels(file).content["annotations"]
    assert outline["segmentation"] == [[20, 15, 60, 15, 60, 45]] and outline["bbox"] == [20, 15, 40, 30]
    assert scored["score"] == 0.875
    pose = yolo(tmp_path, "0 .5 .5 .5 .5 .1 .1 2 .9 .9 2\n", "train: images\nnames: [cat]\nkpt_shape: [2, 3]\n")
    assert boxes(pose) == [[20, 15, 40, 30]] and "segmentation" not in read_labels(pose).content["annotations"][0]


POSES = ((0.8, 0.5), (0.2, 0.3), (0.7, 0.7), (0.3, 0.8), (0.85, 0.2))


@pytest.mark.parametrize("each", ["{x} {y}", "{x} {y} 1", "{x} {y} 2"])
def test_yolo__poses_without_kpt_shape_are_no_outlines(tmp_path: Path, each: str) -> None:
    """Each line is a box of .2 × .2 and four points in it."""
    corners = [(-0.1, -0.1), (0.1, -0.1), (0.05, 0.1), (0.0, 0.0)]
    lines = [
        " ".join([f"0 {cx} {cy} .2 .2", *(each.format(x=cx + x, y=cy + y) for x, y in corners)]) for cx, cy in POSES
    ]
    file = yolo(tmp_path, "\n".join(lines))
    with pytest.raises(UserError, match=rf"write kpt_shape: \[4, {len(each.split())}\] into data.yaml"):
        read_labels(file)
    file.write_text(f"{file.read_text()}\nkpt_shape: [4, {len(each.split())}]\n")
    assert boxes(file)[0] == [56, 24, 16, 12]


def test_yolo__outlines_of_one_length_are_no_poses(tmp_path: Path) -> None:
    squares = [(cx - 0.1, cy - 0.1, cx + 0.1, cy - 0.1, cx + 0.1, cy + 0.1, cx - 0.1, cy + 0.1) for cx, cy in POSES]
    file = yolo(tmp_path, "\n".join(" ".join(map(str, (0, *square))) for square in squares))
    labels = read_labels(file)
    assert labels.notices == [] and boxes(file)[0] == [56, 24, 16, 12]
    # In the middle both are possible.
    yolo(tmp_path, "0 .4 .5 .5 .6 .5 .4\n0 .5 .5 .6 .6 .5 .6\n")
    assert "all 2 outlines may be poses" in " ".join(read_labels(file).notices)


def test_yolo__shares_are_of_the_picture_as_it_is_seen(tmp_path: Path) -> None:
    file = yolo(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90°
    Image.new("RGB", (80, 60)).save(tmp_path / "images/a.jpg", exif=exif)
    assert (
        read_labels(file).content["images"][0] | {"width": 60, "height": 80} == read_labels(file).content["images"][0]
    )
    assert boxes(file) == [[22.5, 20, 15, 40]]


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ("0 .5 .5 .5 .5\n2 .5 .5 .5 .5\n", r"labels/a\.txt:2: class 2 is not in names \(0 to 1\)"),
        ("0.5 .5 .5 .5 .5", r"a\.txt:1: class 0\.5 is not in names"),
        ("cat .5 .5 .5 .5", r"a\.txt:1: 'cat .5 .5 .5 .5': expected numbers"),
        ("0 40 30 20 30", r"a\.txt:1: coordinates must be shares of the picture, from 0 to 1; are these pixels\?"),
        ("0 .5 nan .5 .5", r"a\.txt:1: coordinates must be"),
        ("0 .5 .5 .5", r"a\.txt:1: 4 numbers are neither a box \(5\) nor an outline"),
        ("0 .5 .5 -.009 .5", r"a\.txt:1: the box has a negative width or height \(-0\.009 × 0\.5\)"),
        ("0 .5 .5 .5 .5 1.5", r"the sixth number, 1\.5, is not a score"),
        ("9 1 1\n8 1 1\n", r"(?s)2 mistakes in .*data\.yaml:\n.*a\.txt:1: class 9.*\n.*a\.txt:2: class 8"),
    ],
)
def test_yolo__mistakes_name_file_and_line(labels: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        read_labels(yolo(tmp_path, labels))


@pytest.mark.parametrize(
    ("yaml", "said"),
    [
        ("train: nowhere\nnames: [cat, dog]", r"data\.yaml: train: nowhere: no such folder"),
        ("train: images", r"data\.yaml: names: expected the list of classes"),
        ("train: images\nnames: [cat, dog]\nnc: 3", "nc is 3, but names has 2 classes"),
        ("names: [cat, dog]", "none of train, val and test names a folder"),
        ("train: [[a]]\nnames: [cat]", "train: expected a folder or a text file"),
        ("train: {", "not YAML"),
        ("- a", "expected the keys names, train"),
        ("train: images\nnames: {cat: 0}", "'cat': '0' is not a class index"),
    ],
)
def test_yolo__a_wrong_yaml_is_explained(yaml: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        read_labels(yolo(tmp_path, yaml=yaml))


def test_yolo__oddities_are_counted_with_the_first_place(tmp_path: Path) -> None:
    file = yolo(tmp_path, "0 .5 .5 .5 .5\n0 .5 .5 .5 .5\n1 .95 .5 .2 .5\n1 .5 .5 0 .5\n")
    picture(tmp_path / "images/empty.jpg")
    (tmp_path / "images/broken.jpg").write_bytes(b"no picture")
    notices = read_labels(file).notices
    for text in (
        r"1 lines occur twice in their file and count once \(first: .*labels/a\.txt:2\)",
        r"1 boxes reach over the border and are cut there \(first: .*a\.txt:3\)",
        r"1 boxes without area \(first: .*a\.txt:4\)",
        r"1 pictures have no label file: nothing is in them \(first: images/empty\.jpg\)",
        r"1 pictures cannot be read and are left out \(first: .*broken\.jpg",
    ):
        assert [notice for notice in notices if re.match(text, notice)], text


@pytest.mark.parametrize("name", ["b.txt", "a.TXT", "a.jpg.txt", "cafe\u0301.txt"])
def test_yolo__label_files_without_a_picture_are_counted(name: str, tmp_path: Path) -> None:
    file = yolo(tmp_path)
    picture(tmp_path / "images/caf\u00e9.jpg")
    (tmp_path / "labels" / name).write_text("0 .5 .5 .2 .2\n")
    for harmless in ("classes.txt", "._a.txt", "notes.md"):
        (tmp_path / "labels" / harmless).write_text("")
    assert [n for n in read_labels(file).notices if n.startswith("1 label files belong to no picture")]


def test_yolo__label_files_of_pictures_in_no_part_are_none_of_them(tmp_path: Path) -> None:
    file = yolo(tmp_path, yaml="train: train.txt\nnames: [cat, dog]\n")
    (tmp_path / "train.txt").write_text("images/a.jpg\n")
    picture(tmp_path / "images/held_out.jpg")
    (tmp_path / "labels/held_out.txt").write_text("0 .5 .5 .2 .2\n")
    assert not read_labels(file).notices


def test_yolo__pictures_that_share_a_label_file_are_counted(tmp_path: Path) -> None:
    file = yolo(tmp_path)
    picture(tmp_path / "images/a.png")
    assert [n for n in read_labels(file).notices if n.startswith("1 pictures share a label file with another one")]


def test_yolo__no_label_file_at_all_is_a_mistake(tmp_path: Path) -> None:
    file = yolo(tmp_path)
    (tmp_path / "labels/a.txt").unlink()
    with pytest.raises(UserError, match=r"no picture has a label file; looked for .*labels/a\.txt"):
        read_labels(file)


# --- Pascal VOC ------------------------------------------------------------------------------------------------------


def test_voc__pixels_count_from_1_unless_one_is_0(tmp_path: Path) -> None:
    assert boxes(voc(tmp_path / "a", voc_object())) == [[10, 20, 30, 25]]
    assert boxes(voc(tmp_path / "b", voc_object(), voc_object(box=(0, 5, 10, 10)))) == [[11, 21, 29, 24], [0, 5, 10, 5]]


def test_voc__parts_difficult_objects_and_parts_of_objects(tmp_path: Path) -> None:
    head = "<part><name>ear</name><bndbox><xmin>1</xmin></bndbox></part><difficult>1</difficult>"
    folder = voc(tmp_path, voc_object(more=head), voc_object("dog"))
    (folder / "ImageSets/Main").mkdir(parents=True)
    (folder / "ImageSets/Main/val.txt").write_text("a\nnot_here\n")
    labels = read_labels(folder, part="val")
    assert [one["iscrowd"] for one in labels.content["annotations"]] == [1, 0]
    assert labels.truth().categories == {1: "cat", 2: "dog"} and "difficult" in labels.notices[0]
    with pytest.raises(UserError, match=r"no part 'train' \(there: val\)"):
        read_labels(folder, part="train")


def test_voc__files_beside_their_pictures_in_roboflows_folders(tmp_path: Path) -> None:
    voc(tmp_path, voc_object(), filename="a_jpg.rf.1.jpg")
    (tmp_path / "valid").mkdir()
    (tmp_path / "Annotations/a.xml").rename(tmp_path / "valid/a.xml")
    (tmp_path / "JPEGImages/a.jpg").rename(tmp_path / "valid/a.jpg")
    (tmp_path / "Annotations").rmdir()
    labels = read_labels(tmp_path, part="val")
    assert labels.kind == "voc" and labels.content["images"][0]["file_name"] == "valid/a.jpg"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda p: voc(p, "<object>\n</object>"), r"Annotations/a\.xml:4: object without a name"),
        (lambda p: voc(p, voc_object(), voc_object(box=("x", 1, 2, 3))), r"a\.xml:5: cat: bndbox needs the numbers"),
        (lambda p: voc(p, voc_object(box=(40, 45, 11, 21))), r"a\.xml:4: cat: bndbox from .* is not a box"),
        (lambda p: voc(p, voc_object(box=(100, 100, 120, 120))), r"outside the picture of 80 × 60 pixels"),
        (lambda p: voc(p, voc_object(), filename="b.jpg") / "", None),
        (lambda p: voc(p, voc_object(more="<bndbox/>")), r"a\.xml:4: cat: more than one bndbox"),
        (lambda p: voc(p, "<object>"), r"a\.xml:5: not XML"),
        (lambda p: voc(p, voc_object(), head="<!DOCTYPE a [<!ENTITY b 'c'>]>\n"), r"a\.xml:1: has a document type"),
        (lambda p: voc(p), "no object in 1 XML files"),
    ],
)
def test_voc__mistakes_name_file_and_line(make: Callable[[Path], Path], said: str | None, tmp_path: Path) -> None:
    folder = make(tmp_path)
    if said is None:  # a file that was renamed with its picture: found by its own name
        assert boxes(folder) == [[10, 20, 30, 25]]
        return
    with pytest.raises(UserError, match=said):
        read_labels(folder)


def test_voc__the_picture_of_an_xml_file_has_its_name(tmp_path: Path) -> None:
    """A file that was copied with its picture still names the old one; its objects are not in that one."""
    voc(tmp_path, voc_object("cat"), filename="b.jpg")
    picture(tmp_path / "JPEGImages/b.jpg")
    (tmp_path / "Annotations/b.xml").write_text((tmp_path / "Annotations/a.xml").read_text().replace("cat", "dog"))
    read = read_labels(tmp_path)
    assert [i["file_name"] for i in read.content["images"]] == ["JPEGImages/a.jpg", "JPEGImages/b.jpg"]
    assert [one["image_id"] for one in read.content["annotations"]] == [1, 2]
    assert any("1 XML files name the picture of another one" in notice for notice in read.notices)


@pytest.mark.parametrize(("corner", "x"), [("0.43", 0.43), ("0.00", 0.0), ("0", 0.0), ("1", 0.0)])
def test_voc__a_corner_below_1_counts_from_0(corner: str, x: float, tmp_path: Path) -> None:
    assert boxes(voc(tmp_path, voc_object(box=(corner, 5, 40, 30))))[0][0] == x


def test_voc__turned_boxes_and_pictures_without_a_file_are_counted(tmp_path: Path) -> None:
    turn = "<attributes><attribute><name>rotation</name><value>45.0</value></attribute></attributes>"
    still = turn.replace("45", "0")
    voc(tmp_path, voc_object(more=turn), voc_object("dog", more=still))
    picture(tmp_path / "JPEGImages/unlabelled.jpg")
    notices = read_labels(tmp_path).notices
    assert any(notice.startswith("1 boxes are turned by an angle") for notice in notices)
    assert any(notice.startswith("1 pictures have no XML file and are left out") for notice in notices)


def test_voc__a_picture_of_another_size_or_none_is_refused(tmp_path: Path) -> None:
    folder = voc(tmp_path, voc_object())
    picture(folder / "JPEGImages/a.jpg", (40, 30))
    with pytest.raises(UserError, match=r"a\.xml:3: says 80 × 60 pixels, a\.jpg has 40 × 30 upright"):
        read_labels(folder)
    (folder / "JPEGImages/a.jpg").unlink()
    with pytest.raises(UserError, match=r"a\.xml: its picture a\.jpg is not in .*JPEGImages"):
        read_labels(folder)


# --- COCO, and which is which ----------------------------------------------------------------------------------------


def test_coco__pictures_are_looked_for_where_tools_put_them(tmp_path: Path) -> None:
    file = tmp_path / "annotations/instances_val2017.json"
    file.parent.mkdir()
    file.write_text(json.dumps(coco_content()))
    with pytest.raises(UserError, match=r"its picture a\.jpg is not in .*annotations; name the folder .*--images"):
        read_labels(file)
    make_pictures(tmp_path / "val2017")
    assert read_labels(file).root == tmp_path / "val2017"
    assert same(objects(read_labels(tmp_path, part="val")), EXPECTED, within=0)


def test_coco__roboflows_folders_become_one(tmp_path: Path) -> None:
    content = coco_content()
    for folder, part in (("train", "train"), ("valid", "val")):
        make_pictures(tmp_path / folder)
        images = [image for image in content["images"] if image["split"] == part]
        ids = {image["id"] for image in images}
        kept = [one for one in content["annotations"] if one["image_id"] in ids]
        text = json.dumps(content | {"images": images, "annotations": kept})
        (tmp_path / folder / "_annotations.coco.json").write_text(text)
    assert recognise(tmp_path) == "coco"
    assert same(objects(read_labels(tmp_path)), EXPECTED, within=0)
    assert set(objects(read_labels(tmp_path, prefer=("val",)))) == {"c"}


def test_coco__a_part_of_a_file_whose_images_have_one(tmp_path: Path) -> None:
    make_pictures(tmp_path)
    file = tmp_path / "all.json"
    file.write_text(json.dumps(coco_content()))
    assert set(objects(read_labels(file, part="validation"))) == {"c"}
    assert set(objects(read_labels(file))) == {"a", "b", "c"}


@pytest.mark.parametrize("text", ["readme.md", "."])
def test_read_labels__unknown_file_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "readme.md").write_text("hello")
    with pytest.raises(UserError, match="no labels that are known: give a COCO .json, a YOLO data.yaml"):
        recognise(tmp_path / text)
    with pytest.raises(UserError, match="no such file or folder"):
        recognise(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a/data.yaml", LabelSpec(path=Path("a/data.yaml"))),
        ("a/data.yaml:val", LabelSpec(path=Path("a/data.yaml"), part="val")),
        ("voc:a:test", LabelSpec(path=Path("a"), kind="voc", part="test")),
        ("yolo:a", LabelSpec(path=Path("a"), kind="yolo")),
        ("c:/a", LabelSpec(path=Path("c:/a"))),
    ],
)
def test_spec__is_format_path_and_split(text: str, expected: LabelSpec) -> None:
    assert LabelSpec.parse(text) == expected
