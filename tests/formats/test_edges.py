# SPDX-License-Identifier: Apache-2.0
"""Label files as other tools, editors and systems leave them: read as they are meant, or one line that says what is."""

from __future__ import annotations

import json
import struct
import zlib
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest

from ovd.convert import main
from ovd.formats.read import read_labels
from ovd.vocabulary import Vocabulary
from pretrain.engine.errors import UserError
from pretrain.engine.files import alone_in
from tests.formats.cases import coco_content, make_coco
from tests.formats.test_readers import picture, voc, voc_object, yolo

# --- names are words, whatever YAML takes them for


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("[no, yes]", ["no", "yes"]),
        ("[010, 1e3]", ["010", "1e3"]),
        ("[2024-01-01, null]", ["2024-01-01", "null"]),
        ("{0: on, 1: off}", ["on", "off"]),
        ("{'1': b, '0': a}", ["a", "b"]),
        ("['no', \"0x10\"]", ["no", "0x10"]),
    ],
)
def test_yaml_names__stay_as_they_are_written(written: str, meant: list[str], tmp_path: Path) -> None:
    file = yolo(tmp_path, yaml=f"train: images\nnc: 2\nnames: {written}\n")
    assert sorted(read_labels(file).truth().categories.items()) == [(1, meant[0]), (2, meant[1])]
    assert Vocabulary.load(file).names == tuple(meant)


def test_json_names__are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    file = tmp_path / "names.json"
    file.write_text(json.dumps({"names": {str(n): f"class {n}" for n in (10, 9, 2)}}))
    assert Vocabulary.load(file).names == ("class 2", "class 9", "class 10")


@pytest.mark.parametrize(
    "names", ["[cat, ]x", "[cat, '']", "[cat, [dog]]", "{a: cat}", "{-1: cat}", "[" * 3000, r'["\UFFFFFFFF"]']
)
def test_data_yaml__invalid_names_are_refused(names: str, tmp_path: Path) -> None:
    file = yolo(tmp_path, yaml=f"train: images\nnames: {names}\n")
    with pytest.raises(UserError, match=r"data.yaml: (names|not YAML|YAML nested)"):
        read_labels(file)


@pytest.mark.parametrize("names", ["[cat]\nnames: [dog]", "\n  0: cat\n  1: dog\n  1: cow"])
def test_data_yaml__a_key_that_stands_twice_is_refused(names: str, tmp_path: Path) -> None:
    file = yolo(tmp_path, yaml=f"train: images\nnames: {names}\n")
    with pytest.raises(UserError, match=r"data.yaml: not YAML: the key '(names|1)' stands twice in the table of line"):
        read_labels(file)


@pytest.mark.parametrize(("name", "text"), [("a.json", '{"0": "a", "0": "b"}'), ("a.yaml", "names: [a]\nnames: [b]")])
def test_word_list__a_duplicate_key_is_refused(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=rf"{name}: .*the key '(0|names)' stands twice"):
        Vocabulary.load(tmp_path / name)
    if name.endswith(".json"):
        with pytest.raises(UserError, match="stands twice"):
            Vocabulary.parse(text)


# --- files that are no UTF-8, empty, or hidden


@pytest.mark.parametrize("name", ["classes.txt", "train.txt", "data.yaml", "labels/a.txt"])
@pytest.mark.parametrize("text", [b"caf\xe9\n", "caf\u00e9\n".encode("utf-16")], ids=["latin-1", "utf-16"])
def test_names_file__that_is_not_utf_8_is_named(name: str, text: bytes, tmp_path: Path) -> None:
    file = yolo(tmp_path, yaml="train: train.txt\nnames: [cat]\n")
    (tmp_path / "train.txt").write_text("images/a.jpg\n")
    if name == "classes.txt":
        file.unlink()
    (tmp_path / name).write_bytes(text)
    with pytest.raises(UserError, match=rf"{name}.*(UTF-8|utf-8)"):
        read_labels(tmp_path)


def test_names_file__an_empty_list_of_classes_is_named(tmp_path: Path) -> None:
    yolo(tmp_path).unlink()
    (tmp_path / "classes.txt").write_text("\n")
    with pytest.raises(UserError, match=r"classes\.txt: is empty"):
        read_labels(tmp_path)


def test_labels__macos_files_are_skipped(tmp_path: Path) -> None:
    voc(tmp_path / "voc", voc_object())
    yolo(tmp_path / "yolo").rename(tmp_path / "yolo/mine.yaml")
    for file in ("voc/Annotations/._a.xml", "yolo/._mine.yaml"):
        (tmp_path / file).write_bytes(b"\0\5\x16\7")
    assert len(read_labels(tmp_path / "voc").content["images"]) == 1
    assert len(read_labels(tmp_path / "yolo").content["images"]) == 1


@pytest.mark.parametrize("encoding", ["gbk", "shift_jis", "utf-8", "latin-1"])
def test_xml__is_read_in_the_encoding_that_it_names(encoding: str, tmp_path: Path) -> None:
    name = "caf\u00e9" if encoding == "latin-1" else "\u82b1"
    voc(tmp_path, voc_object())
    head = f'<?xml version="1.0" encoding="{encoding}"?>'
    text = f"{head}<annotation><filename>a.jpg</filename>{voc_object(name)}</annotation>"
    (tmp_path / "Annotations/a.xml").write_bytes(text.encode(encoding))
    assert read_labels(tmp_path).truth().categories == {1: name}


@pytest.mark.parametrize("encoding", ["nonsense", "utf-16", "hex"])
def test_xml__in_another_encoding_than_it_names_is_refused(encoding: str, tmp_path: Path) -> None:
    head = f'<?xml version="1.0" encoding="{encoding}"?>'
    with pytest.raises(UserError, match=rf"a\.xml:1: is not in {encoding}"):
        read_labels(voc(tmp_path, voc_object(), head=head))


@pytest.mark.parametrize(
    ("text", "noticed"), [(b"caf\xe9\n", False), ("caf\xe9\n".encode("utf-16"), True), (b"b\n", True)]
)
def test_split_list__holds_names_as_they_are_on_disk(text: bytes, noticed: bool, tmp_path: Path) -> None:
    (tmp_path / "ImageSets/Main").mkdir(parents=True)
    (tmp_path / "ImageSets/Main/val.txt").write_bytes(text)
    voc(tmp_path, voc_object())
    (tmp_path / "Annotations/a.xml").rename(tmp_path / "Annotations/caf\udce9.xml")
    labels = read_labels(tmp_path)
    assert [entry["split"] for entry in labels.content["images"]] == ["" if noticed else "val"]
    assert ("names in ImageSets/Main have no XML file" in "".join(labels.notices)) is noticed


@pytest.mark.parametrize("name", ["my photo.jpg", "new\nline.jpg", "caf\udce9.jpg"])
def test_voc__keeps_the_split_of_a_picture_whatever_its_name(name: str, tmp_path: Path) -> None:
    content = coco_content()
    content["images"][0]["file_name"] = name
    file = make_coco(tmp_path)
    (tmp_path / "photos/a.jpg").rename(tmp_path / "photos" / name)
    file.write_text(json.dumps(content))
    assert main([str(file), "--images", str(tmp_path / "photos"), "--to", "voc", "--out", str(tmp_path / "out")]) == 0
    labels = read_labels(tmp_path / "out")
    assert sorted(entry["split"] for entry in labels.content["images"]) == ["train", "train", "val"]
    assert labels.notices == []


# --- pictures that would be lost or seen twice


@pytest.mark.parametrize("listed", [True, False])
def test_pictures__in_formats_that_are_not_read_are_counted(listed: bool, tmp_path: Path) -> None:
    file = yolo(tmp_path)
    picture(tmp_path / "images/b.gif")
    if listed:
        (tmp_path / "list.txt").write_text("images/a.jpg\nimages/b.gif\n")
        file.write_text("train: list.txt\nnames: [cat]\n")
    assert "skipped: 1 .gif" in "\n".join(read_labels(file).truth().warnings)


def test_coco__a_picture_with_two_ids_is_reported(tmp_path: Path) -> None:
    content = coco_content()
    content["images"][2]["file_name"] = content["images"][0]["file_name"]
    file = make_coco(tmp_path)
    file.write_text(json.dumps(content))
    assert "1 images name a file that another" in "\n".join(read_labels(file, images=tmp_path).truth().warnings)


def test_coco__a_picture_named_in_two_ways_is_counted(tmp_path: Path) -> None:
    content = coco_content()
    content["images"].append({**content["images"][0], "id": 9, "file_name": "./" + content["images"][0]["file_name"]})
    file = make_coco(tmp_path)
    file.write_text(json.dumps(content))
    assert "1 images name a file that another image names" in " ".join(
        read_labels(file, images=tmp_path / "photos").truth().warnings
    )


def test_yolo__another_folder_of_pictures_than_its_own_is_refused(tmp_path: Path) -> None:
    yolo(tmp_path)
    with pytest.raises(UserError, match=r"elsewhere: .* itself says where"):
        read_labels(tmp_path, images=Path("elsewhere"))


def test_yolo__pictures_are_found_in_the_split_below_images(tmp_path: Path) -> None:
    picture(tmp_path / "images/train/a.jpg")
    (tmp_path / "annotations").mkdir()
    content = {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [], "categories": []}
    (tmp_path / "annotations/instances_train.json").write_text(json.dumps(content))
    assert read_labels(tmp_path).root == tmp_path / "images/train"


def test_yolo__pictures_that_data_yaml_has_no_split_for_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = coco_content()
    content["images"][1].pop("split")
    file = make_coco(tmp_path)
    file.write_text(json.dumps(content))
    command = [str(file), "--images", str(tmp_path / "photos"), "--to", "yolo", "--out"]
    assert main([*command, str(tmp_path / "mixed")]) == 0
    assert "not in data.yaml, which has train, val and test: 1 of no part" in capsys.readouterr().err
    for entry in content["images"]:
        entry.pop("split", None)
    file.write_text(json.dumps(content))
    assert main([*command, str(tmp_path / "whole")]) == 0
    assert capsys.readouterr().err == ""


# --- labels of another kind, and names that another format cannot hold


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"version": "5.5.0", "shapes": [], "imagePath": "a.jpg"}, "LabelMe's"),
        ([{"id": 1, "data": {"image": "/data/upload/a.jpg"}, "annotations": []}], "Label Studio's own JSON"),
        ([{"image": "/data/upload/a.jpg", "label": [{"x": 1}]}], "Label Studio's own JSON"),
        ([{"image": "a.jpg", "annotations": [{"label": "cat", "coordinates": {}}]}], "CreateML's JSON"),
        ([{"name": "a.jpg", "labels": [{"category": "car"}]}], "BDD100K's JSON"),
        ({"_via_settings": {}, "_via_img_metadata": {}}, "a project of VIA's"),
        ({"a.jpg123": {"filename": "a.jpg", "size": 123, "regions": []}}, "an export of VIA's"),
        ({"metainfo": {"classes": ["cat"]}, "data_list": []}, "MMDetection's own JSON"),
        ({"classes": ["cat"], "labels": {"a": {"detections": []}}}, "FiftyOne's own JSON"),
        ({"description": "", "size": {"height": 80}, "objects": []}, "a file of Supervisely's"),
        ({**coco_content(), "annotations": [{"image_id": 1, "segments_info": []}]}, "a panoptic segmentation"),
        ({**coco_content(), "annotations": [{"image_id": 1, "caption": "a cat"}]}, "a caption"),
    ],
)
def test_labels__of_another_format_are_called_by_its_name(content: object, message: str, tmp_path: Path) -> None:
    file = make_coco(tmp_path)
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        read_labels(file, images=tmp_path / "photos").truth()


@pytest.mark.parametrize("to", ["voc", "cvat", "label-studio"])
def test_voc__names_that_xml_cannot_hold_do_not_break_the_file(to: str, tmp_path: Path) -> None:
    content = coco_content()
    content["categories"][0]["name"] = "be\x07ll"
    content["images"][0]["file_name"] = "caf\udce9.jpg"
    file = make_coco(tmp_path)
    (tmp_path / "photos/a.jpg").rename(tmp_path / "photos/caf\udce9.jpg")
    file.write_text(json.dumps(content))
    assert main([str(file), "--images", str(tmp_path / "photos"), "--to", to, "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out/ImageSets/Main/train.txt").is_file() is (to == "voc")
    for written in (tmp_path / "out").rglob("*.xml"):
        assert "\x07" not in "".join(ElementTree.fromstring(written.read_bytes()).itertext())


@pytest.mark.parametrize("name", ["a\0b.jpg", "\ud800.jpg"])
def test_coco__invalid_file_name_is_refused(name: str, tmp_path: Path) -> None:
    content = coco_content()
    content["images"][1]["file_name"] = name
    file = make_coco(tmp_path)
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"images\[1\]: file_name .* is not a valid file name"):
        read_labels(file, images=tmp_path / "photos").truth()


@pytest.mark.parametrize("to", ["coco", "yolo", "voc", "labelme", "cvat", "label-studio", "csv"])
def test_class_names__half_a_surrogate_pair_can_be_written(to: str, tmp_path: Path) -> None:
    content = coco_content()
    content["categories"][0]["name"] = "cat \ud83d"
    file = make_coco(tmp_path)
    file.write_text(json.dumps(content))
    assert main([str(file), "--images", str(tmp_path / "photos"), "--to", to, "--out", str(tmp_path / "out")]) == 0


# --- what exporters write that is neither right nor wrong


@pytest.mark.parametrize("nothing", ["", "~", "null"])
def test_split__without_a_folder_is_no_split(nothing: str, tmp_path: Path) -> None:
    file = yolo(tmp_path, yaml=f"train: images\nval: {nothing}\ntest: {nothing}\nnames: [cat]\n")
    assert len(read_labels(file).content["images"]) == 1


def test_yaml_names__nested_aliases_are_not_expanded(tmp_path: Path) -> None:
    levels = "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 20)}]\n" for a, b in pairwise("abcdefghij"))
    file = yolo(tmp_path, yaml=f"a: &a [x]\n{levels}names: *j\ntrain: images\n")
    with pytest.raises(UserError, match="names: .* is not a class index") as refused:
        read_labels(file)
    assert len(str(refused.value)) < 500


def test_voc__a_picture_of_absurd_size_is_left_out_by_name(tmp_path: Path) -> None:
    file = yolo(tmp_path)
    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    (tmp_path / "images/b.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk)
    assert "1 pictures cannot be read and are left out" in "\n".join(read_labels(file).notices)


def test_coco__windows_backslashes_are_pointed_out(tmp_path: Path) -> None:
    content = coco_content()
    content["images"][0]["file_name"] = "photos\\a.jpg"
    file = make_coco(tmp_path)
    file.write_text(json.dumps(content))
    command = [str(file), "--images", str(tmp_path / "photos"), "--to", "yolo", "--out", str(tmp_path / "out")]
    with pytest.raises(UserError, match="come from Windows: write them with /"):
        main(command)
    (tmp_path / "train.txt").write_text("images\\a.jpg\n")
    with pytest.raises(UserError, match="no such picture. Names with"):
        read_labels(yolo(tmp_path, yaml="train: train.txt\nnames: [cat]\n"))


@pytest.mark.parametrize("side", ["640", "640.0", " 640 "])
def test_voc__a_size_that_is_not_the_pictures_is_refused_however_it_is_written(side: str, tmp_path: Path) -> None:
    file = voc(tmp_path, voc_object()) / "Annotations/a.xml"
    file.write_text(file.read_text().replace("<width>80<", f"<width>{side}<"))
    with pytest.raises(UserError, match="says .* pixels, a.jpg has 80 × 60 upright"):
        read_labels(tmp_path)


def test_voc__a_picture_in_capitals_and_a_difficulty_in_words(tmp_path: Path) -> None:
    voc(tmp_path, voc_object(more="<difficult>True</difficult>"), voc_object("dog"))
    (tmp_path / "JPEGImages/a.jpg").rename(tmp_path / "JPEGImages/a.JPG")
    labels = read_labels(tmp_path)
    assert [one["iscrowd"] for one in labels.content["annotations"]] == [1, 0]


def test_coco__splits_may_name_their_pictures_by_whole_paths(tmp_path: Path) -> None:
    for part in ("train", "valid"):
        path = picture(tmp_path / "photos" / part / "a.jpg")
        content = {"images": [{"id": 1, "file_name": str(path)}], "annotations": [], "categories": []}
        (tmp_path / "set" / part).mkdir(parents=True)
        (tmp_path / "set" / part / "_annotations.coco.json").write_text(json.dumps(content))
    labels = read_labels(tmp_path / "set")
    assert all((labels.root / entry["file_name"]).is_file() for entry in labels.content["images"])


def test_convert__two_commands_do_not_write_into_one_folder(tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg")
    command = [str(make_coco(tmp_path)), "--to", "coco", "--pictures", "none", "--out", str(tmp_path / "out")]
    with alone_in(tmp_path / "out"), pytest.raises(UserError, match="out: another command writes there; wait for it"):
        main(command)
    assert main(command) == 0
    with pytest.raises(UserError, match="out: is not empty"):
        main(command)


def test_convert__a_missing_folder_or_an_empty_data_set_is_refused(tmp_path: Path) -> None:
    file = make_coco(tmp_path)
    command = [str(file), "--to", "coco", "--out", str(tmp_path / "out")]
    with pytest.raises(UserError, match="--images .*nowhere: no such folder"):
        main([*command, "--images", str(tmp_path / "nowhere")])
    file.write_text(json.dumps(coco_content() | {"images": [], "annotations": []}))
    with pytest.raises(UserError, match="has no pictures"):
        main(command)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", ["coco", "yolo", "voc", "labelme"])
def test_convert__writes_names_as_long_as_a_file_may_have(to: str, tmp_path: Path) -> None:
    content = coco_content()
    file = make_coco(tmp_path)
    for entry, name in zip(content["images"], ("長" * 83 + ".jpg", "a" * 251 + ".jpg"), strict=False):
        (tmp_path / "photos" / entry["file_name"]).rename(tmp_path / "photos" / name)
        entry["file_name"] = name
    file.write_text(json.dumps(content))
    assert main([str(file), "--images", str(tmp_path / "photos"), "--to", to, "--out", str(tmp_path / "out")]) == 0
    assert not list((tmp_path / "out").rglob("*.part"))
    if to != "labelme":
        assert len(read_labels(tmp_path / "out").truth().annotations) == len(content["annotations"])
