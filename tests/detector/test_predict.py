# SPDX-License-Identifier: Apache-2.0
"""Predicting files and folders: what is written, resumed, refused."""

from __future__ import annotations

import json
import os
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ovd.drawing import draw_detections, place_label, text_coverage
from ovd.picture_files import PictureFiles
from ovd.predict import drawn_names, main, parser, predict
from ovd.vocabulary import Vocabulary
from pretrain.engine.errors import UserError
from pretrain.engine.files import alone_in
from tests.detector.fakes import make_detector, picture

WORDS = Vocabulary.parse("blue, red, unicorn")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    exif = Image.Exif()
    exif[0x010F] = "secret camera"
    Image.fromarray(picture()).save(folder / "a.png", exif=exif)
    Image.fromarray(picture([("red", 5, 5, 60, 60)])).save(folder / "sub" / "a.png")
    Image.fromarray(picture([("yellow", 5, 5, 60, 60)])).save(folder / "z.bmp")
    return folder


def run(photos: Path, out: Path, **options: object) -> tuple[list[dict[str, str]], int]:
    detector = make_detector(cache_size=0)
    arguments: dict[str, object] = {"vocabulary": WORDS, **options}
    return predict(detector=detector, pictures=PictureFiles.collect([photos]), out=out, **arguments), detector.runs  # type: ignore[arg-type]


def test_predict__results_are_coco_with_ids(photos: Path, tmp_path: Path) -> None:
    from pycocotools.coco import COCO

    out = tmp_path / "out"
    failed, runs = run(photos, out)
    assert failed == [] and runs == 3 and not (out / "failed.json").exists()
    coco = COCO(str(out / "images.json"))
    loaded = coco.loadRes(str(out / "results.json"))
    rows = {
        (coco.imgs[r["image_id"]]["file_name"], coco.cats[r["category_id"]]["name"]): r
        for r in loaded.dataset["annotations"]
    }
    assert set(rows) == {("a.png", "red"), ("a.png", "blue"), ("sub/a.png", "red")}
    assert rows[("a.png", "red")]["bbox"] == [10, 20, 40, 50]
    assert loaded.annToMask(rows[("a.png", "red")]).sum() == 2000


@pytest.mark.parametrize(
    ("more", "files"),
    [([], "results.json, drawn/"), (["--no-draw", "--format", "csv,yolo"], "results.json, csv/, yolo/")],
)
def test_predict__last_line_names_the_results(
    more: list[str],
    files: str,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    detector = make_detector()
    monkeypatch.setattr("ovd.predict.load_query", lambda *_, **__: (detector, detector.query("red")))
    out = tmp_path / "out"
    assert main([str(photos), "--classes", "red", "--out", str(out), *more]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"in {out}: {files}"
    assert all((out / name).exists() for name in files.split(", "))


def test_predict__drawings_have_boxes_and_no_metadata(photos: Path, tmp_path: Path) -> None:
    run(photos, tmp_path / "out")
    drawn = tmp_path / "out" / "drawn"
    assert sorted(p.relative_to(drawn).as_posix() for p in drawn.rglob("*.jpg")) == ["a.jpg", "sub/a.jpg", "z.jpg"]
    assert not Image.open(drawn / "a.jpg").getexif()
    assert b"secret" not in (drawn / "a.jpg").read_bytes()
    assert np.abs(np.asarray(Image.open(drawn / "a.jpg")).astype(int) - picture()).mean() > 5
    assert np.abs(np.asarray(Image.open(drawn / "z.jpg")).astype(int) - picture([("yellow", 5, 5, 60, 60)])).mean() < 1


def test_predict__bad_picture_is_listed_and_skipped(photos: Path, tmp_path: Path) -> None:
    (photos / "broken.jpg").write_bytes(b"\xff\xd8\xff not a picture")
    failed, runs = run(photos, tmp_path / "out")
    assert [f["file_name"] for f in failed] == ["broken.jpg"] and runs == 3
    assert json.loads((tmp_path / "out" / "failed.json").read_text()) == failed
    assert len(json.loads((tmp_path / "out" / "images.json").read_text())["images"]) == 3


def test_predict__counts_pictures_of_several_frames_or_pages(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = Image.fromarray(picture()), Image.fromarray(picture([("red", 5, 5, 60, 60)]))
    for name in ("b.webp", "c.tiff", "d.png"):
        one.save(photos / name, save_all=True, append_images=[other])
    one.save(photos / "phone.jpg", "MPO", save_all=True, append_images=[other.resize((64, 48))])  # and its preview
    run(photos, tmp_path / "out")
    message = "3 pictures have several frames or pages; the first was searched (first: b.webp)"
    assert message in capsys.readouterr().err


def test_predict__resumes_to_identical_files(photos: Path, tmp_path: Path) -> None:
    run(photos, tmp_path / "whole")
    detector = make_detector(cache_size=0)
    network, seen = detector.model.regions, []

    def dies(image: np.ndarray) -> object:
        seen.append(image)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return network(image)

    detector.model.regions = dies  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        predict(detector=detector, pictures=PictureFiles.collect([photos]), vocabulary=WORDS, out=tmp_path / "out")
    assert not (tmp_path / "out" / "results.json").exists()
    _, runs = run(photos, tmp_path / "out")
    assert runs == 2
    for name in ("results.json", "images.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"vocabulary": Vocabulary.parse("red")},
            r"words or examples was \w+ \(blue, red, unicorn\), is \w+ \(red\)\.",
        ),
        ({"threshold": 0.5}, r"threshold was 0\.\d+, is 0\.5\."),
        ({"masks": False}, r"masks was True, is False\."),
    ],
)
def test_predict__other_commands_folder_needs_overwrite(
    photos: Path, tmp_path: Path, change: dict[str, object], said: str
) -> None:
    run(photos, tmp_path / "out")
    before = (tmp_path / "out" / "results.json").read_bytes()
    with pytest.raises(UserError, match=said):
        run(photos, tmp_path / "out", **change)
    assert (tmp_path / "out" / "results.json").read_bytes() == before
    _, runs = run(photos, tmp_path / "out", overwrite=True, **change)
    assert runs == 3


def test_predict__other_weights_are_another_command(photos: Path, tmp_path: Path) -> None:
    detector = make_detector(cache_size=0)
    for card, refused in (({"sha256": "1", "settings": "2"}, False), ({"sha256": "1", "settings": "3"}, True)):
        detector.card = card
        with pytest.raises(UserError, match="weights was 1 2, is 1 3") if refused else nullcontext():
            predict(detector=detector, pictures=PictureFiles.collect([photos]), vocabulary=WORDS, out=tmp_path / "out")


def answers(out: Path) -> dict[str, list[int]]:
    """Name of each picture → classes found in it."""
    names = {image["id"]: image["file_name"] for image in json.loads((out / "images.json").read_text())["images"]}
    found: dict[str, list[int]] = {name: [] for name in names.values()}
    for row in json.loads((out / "results.json").read_text()):
        found[names[row["image_id"]]].append(row["category_id"])
    return found


def test_predict__changed_picture_is_redone(photos: Path, tmp_path: Path) -> None:
    run(photos, tmp_path / "out")
    stamp = (photos / "z.bmp").stat()
    Image.fromarray(picture([("red", 5, 5, 60, 60)])).save(photos / "z.bmp")
    os.utime(photos / "z.bmp", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # copied with its time: the content tells
    _, runs = run(photos, tmp_path / "out")
    assert runs == 1 and answers(tmp_path / "out") == {"a.png": [2, 1], "sub/a.png": [2], "z.bmp": [2]}
    run(photos, tmp_path / "whole")
    for file in ("results.json", "images.json", "drawn/z.jpg"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_predict__added_pictures_join_and_removed_ones_are_refused(photos: Path, tmp_path: Path) -> None:
    run(photos, tmp_path / "out")
    Image.fromarray(picture([("blue", 5, 5, 60, 60)])).save(photos / "0.png")
    _, runs = run(photos, tmp_path / "out")
    assert runs == 1
    assert answers(tmp_path / "out") == {"0.png": [1], "a.png": [2, 1], "sub/a.png": [2], "z.bmp": []}
    (photos / "a.png").unlink()
    with pytest.raises(UserError, match=r"1 of its pictures are not among these, such as a\.png"):
        run(photos, tmp_path / "out")


def test_predict__repaired_picture_is_retried(photos: Path, tmp_path: Path) -> None:
    whole = (photos / "z.bmp").read_bytes()
    (photos / "z.bmp").write_bytes(whole[:900])
    (photos / "gone.png").symlink_to(photos / "nowhere.png")
    assert [one["file_name"] for one in run(photos, tmp_path / "out")[0]] == ["z.bmp"]
    (photos / "z.bmp").write_bytes(whole)
    failed, runs = run(photos, tmp_path / "out")
    assert failed == [] and runs == 1 and not (tmp_path / "out" / "failed.json").exists()


def test_predict__damaged_records_are_redone(photos: Path, tmp_path: Path) -> None:
    run(photos, tmp_path / "out")
    before = (tmp_path / "out" / "results.json").read_bytes()
    record = next((tmp_path / "out" / "parts").iterdir())
    for damaged in (record.read_bytes()[:12], json.dumps(json.loads(record.read_bytes()) | {"results": None}).encode()):
        record.write_bytes(damaged)
        assert run(photos, tmp_path / "out")[1] == 1
    (tmp_path / "out" / "drawn" / "z.jpg").unlink()
    assert run(photos, tmp_path / "out")[1] == 1
    assert (tmp_path / "out" / "drawn" / "z.jpg").is_file()
    assert (tmp_path / "out" / "results.json").read_bytes() == before


def test_predict__file_names_of_any_bytes_round_trip(tmp_path: Path) -> None:
    photos, names = tmp_path / "photos", [b"caf\xe9.png", "长".encode() * 83 + b".png", b"x" * 250 + b".webp"]
    photos.mkdir()
    for name in (*names, names[2].replace(b".webp", b".png")):
        Image.fromarray(picture()).save(photos / "p.png")
        os.rename(photos / "p.png", os.path.join(os.fsencode(photos), name[-255:]))
    for _ in range(2):
        assert run(photos, tmp_path / "out")[0] == []
    images = json.loads((tmp_path / "out" / "images.json").read_bytes().decode("utf-8"))["images"]
    stored = {os.fsencode(image["file_name"]) for image in images}
    assert stored == set(os.listdir(os.fsencode(photos)))
    drawn = [name for name in os.listdir(tmp_path / "out" / "drawn") if name.endswith(".jpg")]
    assert len(drawn) == len(set(drawn)) == 4


def test_predict__folder_with_other_files_is_refused(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        run(photos, tmp_path / "out")


def test_predict__without_masks_or_drawings(photos: Path, tmp_path: Path) -> None:
    run(photos, tmp_path / "out", draw=False, masks=False)
    assert not (tmp_path / "out" / "drawn").exists()
    assert all("segmentation" not in row for row in json.loads((tmp_path / "out" / "results.json").read_text()))


def test_predict__duplicate_names_and_missing_paths_are_refused(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="two pictures would be called 'a.png'"):
        PictureFiles.collect([photos, photos / "sub" / "a.png"])
    assert len(PictureFiles.collect([photos, photos / "a.png"])) == 3
    with pytest.raises(UserError, match="nowhere: no such file"):
        PictureFiles.collect([tmp_path / "nowhere"])
    with pytest.raises(UserError, match=r"\*\.jpg: no such file or folder; patterns are for the shell"):
        PictureFiles.collect([tmp_path / "*.jpg"])
    with pytest.raises(UserError, match="bus.jpg: is an address, and nothing is fetched"):
        PictureFiles.collect([Path("https://example.org/bus.jpg")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no picture"):
        PictureFiles.collect([tmp_path / "empty"])


def test_drawing__labels_in_every_script() -> None:
    cv2 = pytest.importorskip("cv2")
    if not hasattr(cv2, "FontFace"):
        pytest.skip("OpenCV 4 has no font for other scripts")
    unknown = text_coverage("??", 24)
    for text in ("椅子", "стул", "καρέκλα", "silla ñ"):
        drawn = text_coverage(text, 24)
        assert drawn.max() == 255 and (drawn.shape != unknown.shape or (drawn != unknown).any())
    assert (text_coverage("椅", 24).shape != text_coverage("子", 24).shape) or (
        text_coverage("椅", 24) != text_coverage("子", 24)
    ).any()


def test_drawing__boxes_across_the_border() -> None:
    detector = make_detector()
    found = detector.embed(picture([("red", 0, 0, 160, 120)])).classify("red")
    found.xyxy[0] = [-5.0, -8.0, 170.0, 130.0]
    pixels = picture()
    drawn = draw_detections(pixels, found)
    assert drawn.shape == pixels.shape and (pixels == picture()).all()


def test_drawing__labels_lie_beside_each_other_and_in_the_picture() -> None:
    size, label, taken = (400, 300), (120, 20), []
    for box in ((100, 100, 199, 199), (105, 100, 204, 199), (95, 102, 194, 210), (0, -9, 399, 309), (0, 0, 399, 299)):
        x1, y1, x2, y2 = place = place_label(box, label, taken=taken, size=size)
        assert (x2 - x1, y2 - y1) == label and 0 <= x1 < x2 <= 400 and 0 <= y1 < y2 <= 300
        assert not any(x1 < b[2] and b[0] < x2 and y1 < b[3] and b[1] < y2 for b in taken)
        taken.append(place)
    assert taken[0][:2] == (100, 80) and taken[3][:2] == (0, 0)
    taken = [(100, 0, 220, 20), (100, 40, 220, 60)]  # no place is free; below the box it covers 3 rows of the second
    assert place_label((100, 0, 219, 23), label, taken=taken, size=size)[:2] == (100, 23)
    assert place_label((5, 5, 8, 8), (40, 30), taken=[], size=(10, 10))[:2] == (0, 5)  # a picture smaller than a label


@pytest.mark.parametrize(("side", "most"), [(40, 75), (1000, 1080)])
def test_drawing__labels_of_small_objects_in_large_pictures_are_small(side: int, most: int) -> None:
    found = make_detector().embed(picture([("red", 0, 0, 160, 120)])).classify("red")
    found.xyxy[0] = [900.0, 900.0, 900.0 + side, 900.0 + side]
    rows = draw_detections(np.zeros((2000, 2000, 3), np.uint8), found, masks=False).any((1, 2)).nonzero()[0]
    assert side < rows.max() - rows.min() < most


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--classes", "red", "--threshold", "2"], "between 0 and 1"),
        (["--classes", " , "], "Type at least one class name"),
        (["--vocabulary", "no-such-words.txt"], "no-such-words.txt"),
        (["--classes", "red", "--weights", "no/such/weights"], "no/such/weights"),
        (["--classes", "red", "--tile-side", "128"], "--tile-side goes with --tiles"),
        (["--classes", "red", "--every", "2"], "are for videos"),
        (["--classes", "red", "--no-track"], "are for videos"),
        (["--classes", "red", "--threads", "99999999"], "from 1 to 1024"),
        (["--example", "mug=https://example.org/mug.png"], "mug.png: is an address, and nothing is fetched"),
        (["--classes", "red", "--conf", ".2"], "--conf .2 - here it is --threshold"),
    ],
)
def test_predict__command_line_mistakes_write_nothing(
    photos: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        main([str(photos), "--out", str(tmp_path / "out"), *arguments])
    assert not (tmp_path / "out").exists()


def test_predict__classes_and_vocabulary_exclude_each_other() -> None:
    with pytest.raises(UserError, match="--vocabulary: not allowed with argument --classes"):
        parser().parse_args(["x", "--out", "o", "--classes", "a", "--vocabulary", "b"])
    with pytest.raises(UserError, match="no classes: give --classes"):
        main(["x", "--out", "o"])


@pytest.mark.parametrize(
    ("names", "drawn"),
    [
        (["cat.png", "dog.png", "cat.jpg", "sub/cat.jpg"], ["cat.png.jpg", "dog.jpg", "cat.jpg.jpg", "sub/cat.jpg"]),
        (["a.jpg", "a.png", "a.png.jpg"], ["a.jpg.jpg", "a.png-2.jpg", "a.png.jpg"]),
        (["a.jpg", "a.jpg.bmp", "a.png"], ["a.jpg-2.jpg", "a.jpg.jpg", "a.png.jpg"]),
        (["A.jpg", "a.png"], ["A.jpg.jpg", "a.png.jpg"]),
    ],
)
def test_predict__drawings_have_unique_names(names: list[str], drawn: list[str]) -> None:
    assert drawn_names(names) == drawn


def test_predict__two_commands_do_not_share_a_folder(photos: Path, tmp_path: Path) -> None:
    """The second would take the first one's records, of other words, for its own."""
    with alone_in(tmp_path / "out"), pytest.raises(UserError, match="out: another command writes there; wait for it"):
        run(photos, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
    assert run(photos, tmp_path / "out")[0] == []
