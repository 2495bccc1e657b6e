# SPDX-License-Identifier: Apache-2.0
"""``wordbox label``: a data set that other readers take, a contact sheet, going on after an interruption."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ovd import label
from ovd.contact_sheet import PER_CLASS, contact_sheet
from ovd.formats.read import read_labels
from ovd.formats.shapes import LabelledPictures, Picture, Shape
from pretrain.engine.errors import UserError
from pretrain.engine.files import alone_in
from tests.detector.fakes import make_detector, picture


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Ten pictures: red and blue rectangles in nine, nothing of them in one."""
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    for number in range(9):
        shown = [("red", 5 + number, 20, 50 + number, 70), ("blue", 80, 30, 150, 110)][: 1 + number % 2]
        Image.fromarray(picture(shown)).save(folder / ("sub" if number > 6 else ".") / f"{number}.png")
    Image.fromarray(picture([("yellow", 5, 5, 60, 60)])).save(folder / "none.png")
    return folder


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The fake detector in place of the weights; counts the pictures that went through it."""
    seen: list[int] = []

    def load(options: object, examples: object, *, masks: bool) -> tuple[object, object]:
        detector = make_detector(cache_size=0, masks=masks)
        network = detector.model.regions

        def counted(image: np.ndarray) -> object:
            seen.append(1)
            return network(image)

        detector.model.regions = counted  # type: ignore[method-assign]
        return detector, detector.query("blue, red")

    monkeypatch.setattr(label, "load_query", load)
    return seen


def run(photos: Path, out: Path, *more: str) -> int:
    return label.main([str(photos), "--classes", "blue, red", "--out", str(out), *more])


@pytest.mark.parametrize("kind", ["coco", "yolo", "voc"])
def test_label__file_names_that_are_not_utf_8(kind: str, photos: Path, tmp_path: Path) -> None:
    first = sorted(photos.glob("*.png"))[0]
    first.rename(photos / "caf\udce9.png")
    (photos / "new\nline.png").write_bytes((photos / "caf\udce9.png").read_bytes())
    out = tmp_path / "caf\udce9"
    assert run(photos, out, "--format", kind) == 0
    assert "caf\\udce9.png" in (out / "contact_sheet.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", ["coco", "yolo", "yolo-seg", "voc"])
def test_label__writes_all_pictures_in_two_parts_with_boxes(kind: str, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    assert run(photos, out, "--format", kind) == 0
    labels = read_labels(out)
    truth = labels.truth()
    assert len(truth.sizes) == 10 and set(truth.parts.values()) == {"train", "val"}
    names = sorted(truth.categories[one["category_id"]] for one in truth.annotations)
    assert names == ["blue"] * 4 + ["red"] * 9
    assert all((labels.root / truth.file_of(i)).is_file() for i in truth.sizes)
    assert all("segmentation" in one for one in truth.annotations) == (kind == "yolo-seg")


def test_label__supervision_reads_the_data_set(photos: Path, tmp_path: Path) -> None:
    sv = pytest.importorskip("supervision")
    out = tmp_path / "set"
    run(photos, out, "--val", "0")
    data = sv.DetectionDataset.from_yolo(str(out / "images"), str(out / "labels"), str(out / "data.yaml"))
    assert data.classes == ["blue", "red"]
    found = next(found for path, _, found in data if path.endswith("1.png"))
    assert sorted(found.xyxy.round().tolist()) == [[6, 20, 51, 70], [80, 30, 150, 110]]


def test_label__resumes_after_an_interrupt(
    photos: Path, tmp_path: Path, fake: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "set"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("ovd.formats.write.write_labels", interrupted)
        run(photos, out)
    assert len(fake) == 10 and not (out / "labels").exists()
    run(photos, out)
    written = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.glob("images/**/*.png")}
    assert len(fake) == 10 and len(written) == 10
    run(photos, out)
    assert len(fake) == 10
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.glob("images/**/*.png")} == written


def test_label__other_command_needs_overwrite(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def mistaken(*_: object, **__: object) -> None:
        raise UserError("no such weights")

    out = tmp_path / "set"
    run(photos, out)
    with pytest.raises(UserError, match="format was yolo, is voc"):
        run(photos, out, "--format", "voc")
    assert run(photos, out, "--format", "voc", "--overwrite") == 0
    assert read_labels(out).kind == "voc" and not (out / "labels").exists()
    before = {path for path in out.rglob("*") if path.is_file()}
    monkeypatch.setattr(label, "load_query", mistaken)
    with pytest.raises(UserError, match="no such weights"):
        run(photos, out, "--overwrite")
    assert {path for path in out.rglob("*") if path.is_file()} == before  # a mistake costs nothing
    with pytest.raises(UserError, match="no such weights"):
        run(photos, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "images").mkdir()
    with pytest.raises(UserError, match="was not written by wordbox label"):
        run(photos, mine, "--overwrite")
    assert (mine / "images").is_dir()


def test_label__unreadable_picture_is_skipped_with_status_1(photos: Path, tmp_path: Path) -> None:
    (photos / "broken.jpg").write_bytes(b"\xff\xd8\xff no picture")
    assert run(photos, tmp_path / "set") == 1
    assert len(read_labels(tmp_path / "set").content["images"]) == 10


@pytest.mark.parametrize(("count", "val"), [(2, 0.2), (2, 0.9), (1, 0.5), (50, 0.2)])
def test_label__split_depends_on_file_names_only(count: int, val: float) -> None:
    def part_of(names: list[str]) -> dict[str, str]:
        pictures = tuple(
            Picture(id=n, file=name, target=name, source=Path(name), size=(1, 1), part="", shapes=())
            for n, name in enumerate(names)
        )
        found = label.with_parts(LabelledPictures(names=("a",), pictures=pictures), val)
        return {picture.file: picture.part for picture in found.pictures}

    names = [f"{n}.jpg" for n in range(count)]
    parts = part_of(names)
    assert set(parts.values()) == ({"train", "val"} if count > 1 else set(parts.values()))
    if count == 50:
        assert 4 <= list(parts.values()).count("val") <= 17
        more = part_of([*names, *(f"new{n}.jpg" for n in range(20))])
        assert {name: more[name] for name in names} == parts


# --- the sheet -------------------------------------------------------------------------------------------------------


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))


def test_contact_sheet__self_contained_and_sorted_by_doubt(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    Image.fromarray(picture()).save(file)
    shapes = tuple(
        Shape(index=0, name="<b>cup", box=(10, 20, 50, 70), score=score)
        for score in np.linspace(0.9, 0.3, PER_CLASS + 5)
    )
    one = Picture(id=1, file='"a".png', target="a.png", source=file, size=(120, 160), part="", shapes=shapes)
    none = Picture(id=2, file="gone.png", target="g.png", source=tmp_path / "gone", size=(9, 9), part="", shapes=())
    text = contact_sheet(
        LabelledPictures(names=("<b>cup", "dog"), pictures=(one, none)), title="my <set>", threshold=0.3
    )
    page = Tags()
    page.feed(text)
    assert not {"script", "link", "b", "set"} & {tag for tag, _ in page.seen}
    images = [attributes["src"] or "" for tag, attributes in page.seen if tag == "img"]
    assert len(images) == PER_CLASS + 1 and all(src.startswith("data:image/jpeg;base64,") for src in images)
    scores = [float(s) for s in re.findall(r"<figcaption>(\d\.\d\d)", text)]
    assert scores == sorted(scores) and scores[0] == 0.3
    assert "65 found, the 60 most doubtful are shown" in text and "my &lt;set&gt;" in text and "<p>none</p>" in text


def test_label__changed_and_added_pictures_are_processed(photos: Path, tmp_path: Path, fake: list[int]) -> None:
    out = tmp_path / "set"
    run(photos, out)
    Image.fromarray(picture([("blue", 10, 10, 60, 60)])).save(photos / "none.png")
    Image.fromarray(picture([("red", 30, 30, 90, 90)])).save(photos / "new.png")
    run(photos, out)
    assert len(fake) == 12
    truth = read_labels(out).truth()
    assert len(truth.sizes) == 11 and len(truth.annotations) == 15


def test_label__another_command_in_the_folder_is_not_disturbed(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(photos, out) == 0
    files = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with alone_in(out), pytest.raises(UserError, match="another command writes there"):
        run(photos, out, "--overwrite")
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == files


def test_label__a_folder_that_another_command_took_meanwhile_is_refused(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, out = label.load_query, tmp_path / "out"

    def slow(*arguments: object, **options: object) -> object:
        monkeypatch.setattr(label, "load_query", load)
        assert run(photos, out, "--format", "voc") == 0
        return load(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(label, "load_query", slow)
    with pytest.raises(UserError, match="has a data set of another command: format was voc, is yolo"):
        run(photos, out)
