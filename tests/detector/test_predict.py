# SPDX-License-Identifier: Apache-2.0
"""The command for many pictures: outputs, going on after a stop, bad pictures, wrong input."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ovd.detector import Detector
from ovd.predict import Output, draw, find_pictures, main, predict_folder
from pretrain.engine.errors import UserError
from tests.detector.fakes import COLOURS, GREY, make_detector, picture


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    Image.fromarray(picture([("red", 10, 20, 60, 70)])).save(folder / "a.png")
    Image.fromarray(picture([("blue", 30, 30, 90, 80)])).save(folder / "more" / "b.png")
    return folder


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Detector:
    """`main` with a detector of colours in place of trained weights."""
    detector = make_detector()
    monkeypatch.setattr(Detector, "load", classmethod(lambda cls, weights="default", **options: detector))
    return detector


def test_results_name_the_files_and_hold_boxes_in_pixels(photos: Path, tmp_path: Path, command: Detector) -> None:
    out = tmp_path / "out"
    assert main([str(photos), "--classes", "red, blue", "--out", str(out)]) == 0
    images = json.loads((out / "images.json").read_text())
    assert [i["file_name"] for i in images["images"]] == ["a.png", "more/b.png"]
    results = json.loads((out / "results.json").read_text())
    assert [(r["image_id"], r["category_id"]) for r in results] == [(1, 1), (2, 2)]
    np.testing.assert_allclose(results[0]["bbox"], [10, 20, 50, 50], atol=1)
    assert (out / "drawings" / "more" / "b.png.jpg").is_file()


def test_a_second_call_runs_only_what_is_missing(photos: Path, tmp_path: Path, command: Detector) -> None:
    out = tmp_path / "out"
    arguments = [str(photos), "--classes", "red, blue", "--out", str(out), "--no-drawings"]
    main(arguments)
    whole = (out / "results.json").read_bytes()
    lines = (out / "results.jsonl").read_text().splitlines(keepends=True)
    (out / "results.jsonl").write_text(lines[0] + lines[1][:25])  # killed in the middle of the second line
    (out / "results.json").unlink()
    runs = command.model.runs  # type: ignore[attr-defined]
    command._cache.clear()
    main(arguments)
    assert command.model.runs == runs + 1  # type: ignore[attr-defined]
    assert (out / "results.json").read_bytes() == whole


def test_a_folder_of_another_run_is_refused_and_named(photos: Path, tmp_path: Path, command: Detector) -> None:
    out = tmp_path / "out"
    main([str(photos), "--classes", "red", "--out", str(out)])
    before = sorted(p.name for p in out.iterdir())
    with pytest.raises(UserError, match="classes"):
        main([str(photos), "--classes", "blue", "--out", str(out)])
    assert sorted(p.name for p in out.iterdir()) == before


def test_a_bad_picture_is_listed_once_and_the_rest_is_done(photos: Path, tmp_path: Path, command: Detector) -> None:
    (photos / "torn.png").write_bytes((photos / "a.png").read_bytes()[:80])
    out = tmp_path / "out"
    for _ in range(2):
        assert main([str(photos), "--classes", "red", "--out", str(out)]) == 1
    bad = [json.loads(line) for line in (out / "bad_images.jsonl").read_text().splitlines()]
    assert [entry["file"] for entry in bad] == ["torn.png"]
    assert len(json.loads((out / "images.json").read_text())["images"]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.png", "--classes", "red"], "no such picture"),
        (["{photos}", "--classes", " , "], "at least one class"),
        (["{photos}", "--classes", "red", "--threshold", "7"], "between 0 and 1"),
    ],
)
def test_wrong_input_is_one_clear_message_and_writes_nothing(
    photos: Path, tmp_path: Path, command: Detector, arguments: list[str], message: str
) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match=message):
        main([a.format(photos=photos) for a in arguments] + ["--out", str(out)])
    assert not out.exists()


def test_two_pictures_of_one_name_are_refused(photos: Path, tmp_path: Path) -> None:
    other = tmp_path / "a.png"
    other.write_bytes((photos / "a.png").read_bytes())
    with pytest.raises(UserError, match=r"'a\.png'"):
        find_pictures([photos, other])


def test_an_empty_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no picture found"):
        find_pictures([tmp_path])


def test_drawings_show_box_label_and_mask_and_carry_no_exif(photos: Path, tmp_path: Path) -> None:
    detector = make_detector()
    detector.set_classes(["red"])
    exif = Image.Exif()
    exif[0x010E] = "secret place"
    Image.open(photos / "a.png").save(photos / "a.png", exif=exif)
    out = Output(tmp_path / "out", {})
    predict_folder(detector, [(photos / "a.png", "a.png")], out, threshold=None, drawings=True)
    drawn = Image.open(tmp_path / "out" / "drawings" / "a.png.jpg")
    assert not drawn.getexif()
    changed = np.abs(np.asarray(drawn).astype(int) - picture([("red", 10, 20, 60, 70)]).astype(int)).max(axis=2) > 40
    rows, columns = np.nonzero(changed)
    assert rows.min() >= 0 and columns.min() >= 6 and changed[20, 12:58].mean() > 0.9  # the upper edge of the box


@pytest.mark.parametrize("name", ["椅子", "стул", "καρέκλα"])
def test_labels_of_other_scripts_are_not_question_marks(name: str) -> None:
    detector = make_detector()
    image = picture([("red", 10, 60, 100, 150)])
    detector.set_classes(["red"])
    found = detector.detect(image)

    def drawn(label: str) -> np.ndarray:
        found.class_name, found.names = [label], (label,)
        return draw(image, found)[35:60]

    import cv2

    if not hasattr(cv2, "FontFace"):
        pytest.skip("this OpenCV has no Unicode face (version 5 has)")
    from ovd.colours import class_styles

    assert class_styles([name])  # any script has a colour
    questions = drawn("?" * len(name))
    assert np.count_nonzero((drawn(name) != questions).any(axis=2)) > 30


def test_fakes__colours_are_told_apart() -> None:
    assert GREY not in COLOURS.values()
