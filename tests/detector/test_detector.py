# SPDX-License-Identifier: Apache-2.0
"""What the public detector promises: coordinates, scores, negatives, thresholds, caching, conversions."""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from ovd.detections import Detections, paste_mask
from ovd.detector import Detector
from ovd.formats.exports import CSV_COLUMNS
from ovd.inference.crop_refinement import refine_with_crops
from ovd.inference.regions import Regions
from ovd.inference.scoring import RegionSet
from ovd.pictures import to_rgb
from ovd.regions.crops import embed_regions
from ovd.weights import detector_folder, read_model_card
from pretrain.engine.errors import BadImageError, UserError
from pretrain.engine.files import whole_folder
from tests.detector.fakes import COLOURS, ColourModel, WordEncoder, make_detector, picture
from tests.fuzz.damage import FUZZ


def test_detect__boxes_are_in_original_pixels() -> None:
    detector = make_detector()
    detector.set_classes(["red", "blue", "unicorn"])
    detections = detector.detect(picture([("red", 10, 20, 50, 70), ("blue", 80, 30, 150, 110)]))
    by_name = dict(zip(detections.class_name, detections.xyxy.tolist(), strict=True))
    assert by_name == {"red": [10, 20, 50, 70], "blue": [80, 30, 150, 110]}
    assert detections.confidence.dtype == detections.xyxy.dtype == np.float32
    assert detections.class_id.tolist() == [detections.names.index(n) for n in detections.class_name]
    assert (np.diff(detections.confidence) <= 0).all()
    assert detections.mask is not None and detections.mask.shape == (2, 120, 160) and detections.mask.dtype == bool
    red = detections.mask[detections.class_name.index("red")]
    assert red.sum() == 40 * 50 and red[20:70, 10:50].all()


def test_not_found__lists_absent_classes_with_best_score() -> None:
    detector = make_detector()
    detections = detector.embed(picture()).classify("red, unicorn, dragon")
    assert [name for name, _ in detections.not_found] == ["unicorn", "dragon"]
    assert all(0 <= score < detections.threshold for _, score in detections.not_found)
    assert detections.best[0] == pytest.approx(detections.confidence[0])


def test_scores__do_not_depend_on_other_words() -> None:
    regions = make_detector().embed(picture())
    alone = regions.classify("red", threshold=0.0, one_class_per_region=False)
    many = regions.classify("red," + ",".join(f"word{i}" for i in range(80)), threshold=0.0, one_class_per_region=False)
    assert alone.best[0] == pytest.approx(many.best[0], abs=1e-6)


def test_synonyms__belong_to_one_class() -> None:
    detections = make_detector().embed(picture()).classify(["colour: red, blue"])
    assert set(detections.class_name) == {"colour"} and len(detections) == 2


def test_negatives__remove_regions_more_like_them() -> None:
    regions = make_detector().embed(picture())
    assert set(regions.classify("red, blue").class_name) == {"red", "blue"}
    detections = regions.classify("red, blue thing, -blue", threshold=0.0)
    assert [80, 30, 150, 110] not in detections.xyxy.tolist() and [10, 20, 50, 70] in detections.xyxy.tolist()


def test_negatives__close_to_a_class_still_count() -> None:
    """Near-synonyms in the bank do not compete; a word the person typed with a minus does."""
    regions = make_detector().embed(picture())
    assert "blue thing" in regions.classify("blue thing").class_name
    assert "blue thing" not in regions.classify("blue thing, -blue").class_name


def test_cache__new_words_do_not_run_the_network() -> None:
    detector = make_detector()
    detector.embed(picture()).classify("red")
    detections = detector.embed(picture().copy()).classify("blue")
    assert detections.class_name == ["blue"]
    assert detector.model.runs == 1
    detector.embed(picture([("green", 1, 1, 60, 60)])).classify("blue")
    assert detector.model.runs == 2


def test_scorer__same_words_typed_again_reuse_it() -> None:
    """As for a folder of pictures and one list of strings."""
    detector = make_detector()
    scorer = detector.scorer(detector.query("red: crimson; blue"))
    assert detector.scorer(detector.query(["red: crimson", "blue"])) is scorer
    for other in ("red, blue", "blue; red: crimson", "red: crimson; -blue"):
        assert detector.scorer(detector.query(other)) is not scorer


def test_cache__is_bounded() -> None:
    detector = make_detector(cache_size=1)
    first, second = picture(), picture([("green", 1, 1, 60, 60)])
    for image in (first, second, first):
        detector.embed(image)
    assert detector.model.runs == 3


def test_threshold__higher_equals_filtering_a_lower_one() -> None:
    """What the page's slider relies on."""
    generator = torch.Generator().manual_seed(3)
    detector = make_detector()
    corner = torch.rand(200, 2, generator=generator) * 80
    side = torch.rand(200, 2, generator=generator) * 60 + 10
    text = torch.nn.functional.normalize(
        torch.randn(200, 64, generator=generator) * 0.05 + torch.from_numpy(detector.model.encoder.word("red"))
        * torch.rand(200, 1, generator=generator), dim=-1)  # fmt: skip
    regions = RegionSet(
        boxes=torch.cat([corner, corner + side], 1), objectness=torch.ones(200), text=text, image=None, masks=None,
        size=(150, 150),
    )  # fmt: skip
    asked = Regions(regions=regions, key="", detector=detector)
    low = asked.classify("red, blue, green", threshold=0.02)
    assert len(low) > 20
    for level in (0.1, 0.3, 0.6, 0.9):
        high, filtered = asked.classify("red, blue, green", threshold=level), low.above(level)
        assert high.region.tolist() == filtered.region.tolist()
        assert high.class_name == filtered.class_name
        assert high.not_found == filtered.not_found


def _boxes_detector(boxes: list[list[float]], words: list[str]) -> Regions:
    detector = make_detector()
    text = np.stack([detector.model.encoder.word(w) for w in words])
    regions = RegionSet(
        boxes=torch.tensor(boxes), objectness=torch.ones(len(boxes)), text=text, image=None, masks=None, size=(200, 200)
    )
    return Regions(regions=regions, key="", detector=detector)


def test_boxes__end_at_the_border_of_the_picture() -> None:
    """Scaled from the network's input they end 1e-5 pixels behind it, and supervision warns of every tile."""
    detections = _boxes_detector([[-3e-5, 10, 100, 200.00003]], ["red"]).classify("red")
    assert detections.xyxy.tolist() == [[0, 10, 100, 200]]


def test_nms__is_per_class() -> None:
    first, shifted, far = [0.0, 0, 100, 100], [0.0, 20, 100, 120], [120.0, 120, 180, 180]
    assert len(_boxes_detector([first, shifted, far], ["red"] * 3).classify("red")) == 2
    assert len(_boxes_detector([first, shifted], ["red", "blue"]).classify("red, blue")) == 2


def test_cross_class_nms__keeps_the_better_class() -> None:
    regions = _boxes_detector([[0.0, 0, 100, 100], [0.0, 2, 100, 101]], ["red", "blue"])
    assert len(regions.classify("red, blue")) == 1
    assert len(regions.classify("red, blue", cross_class_iou=None)) == 2
    pairs = regions.classify("red, blue", threshold=0.0, one_class_per_region=False, cross_class_iou=None)
    assert len(pairs) == 2 and len(regions.classify("red, red thing", one_class_per_region=False, threshold=0.2,
                                                    cross_class_iou=None)) == 2  # fmt: skip


def test_detect__no_regions_give_no_detections() -> None:
    detector = make_detector()
    empty = RegionSet(boxes=torch.zeros(0, 4), objectness=torch.zeros(0), text=torch.zeros(0, 64), image=None,
                      masks=torch.zeros(0, 28, 28), size=(10, 12))  # fmt: skip
    detections = Regions(regions=empty, key="", detector=detector).classify("red, -blue")
    assert len(detections) == 0 and detections.xyxy.shape == (0, 4)
    assert detections.mask is not None and detections.mask.shape == (0, 10, 12)
    assert detections.not_found == [("red", 0.0)]
    assert len(detections.to_supervision()) == 0 and detections.to_coco(1) == []


@pytest.mark.parametrize("threshold", [-0.1, 1.5, float("nan")])
def test_threshold__outside_0_to_1_is_refused(threshold: float) -> None:
    with pytest.raises(UserError, match="between 0 and 1"):
        make_detector().embed(picture()).classify("red", threshold=threshold)


@pytest.mark.parametrize("classes", ["dog", ["dog", "cat"]])
def test_detect__classes_given_as_the_threshold_are_an_error_that_says_where_they_go(classes: Any) -> None:
    detector = make_detector()
    detector.set_classes("red")
    with pytest.raises(UserError, match=r"threshold is a number .* classes go to set_classes"):
        detector.detect(picture(), classes)


def test_detect__without_classes_says_what_to_call() -> None:
    detector = make_detector()
    with pytest.raises(UserError, match="set_classes"):
        detector.detect(picture())
    assert detector.model.runs == 0


def test_to_supervision__has_the_same_numbers() -> None:
    detections = make_detector().embed(picture()).classify("red, blue")
    converted = detections.to_supervision()
    assert converted.xyxy.tolist() == detections.xyxy.tolist()
    assert converted.confidence.tolist() == detections.confidence.tolist()
    assert converted.data["class_name"].tolist() == detections.class_name
    assert converted.mask.shape == (2, 120, 160)


def test_to_rows__has_the_columns_of_the_csv() -> None:
    detections = make_detector().embed(picture()).classify("red, blue")
    rows = json.loads(json.dumps(detections.to_rows()))
    assert [row["class"] for row in rows] == detections.class_name
    assert [[row[k] for k in ("x1", "y1", "x2", "y2")] for row in rows] == detections.xyxy.tolist()
    assert [row["score"] for row in rows] == pytest.approx(detections.confidence, abs=1e-5)
    assert set(rows[0]) == set(CSV_COLUMNS) - {"file", "width", "height"}
    assert detections[:0].to_rows() == []


def test_draw__and_crops_use_the_upright_picture(tmp_path: Path) -> None:
    """What opening the file and cutting it by the boxes gets wrong."""
    turned = Image.fromarray(np.rot90(picture()))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "p.png", exif=exif)
    detections = make_detector().find(tmp_path / "p.png", "red, blue")
    for name, crop, box in zip(
        detections.class_name, detections.crops(tmp_path / "p.png"), detections.xyxy, strict=True
    ):
        assert crop.size == (box[2] - box[0], box[3] - box[1]) and (np.asarray(crop) == COLOURS[name]).all()
    drawn = detections.draw(tmp_path / "p.png", masks=False)
    changed = (np.asarray(drawn) != picture()).any(axis=2)
    assert changed[20, 10] and not changed[45, 30]  # the corner of the red box, its middle
    assert (np.asarray(detections[:0].draw(picture())) == picture()).all()


def test_crops__of_boxes_at_the_border_have_a_pixel() -> None:
    detections = make_detector().find(picture(), "red, blue")
    detections.xyxy[:] = [[-3.2, 10.5, 4.5, 11.5], [159.9, 119.9, 160.0, 120.0]]
    assert [crop.size for crop in detections.crops(picture())] == [(5, 2), (1, 1)]


def test_draw__a_picture_of_another_size_is_refused() -> None:
    detections = make_detector().find(picture(), "red")
    for method in (detections.draw, detections.crops):
        with pytest.raises(UserError, match=r"has 120 × 160 pixels, these are detections in 160 × 120"):
            method(np.ascontiguousarray(np.rot90(picture())))


def test_to_coco__has_the_same_box_and_mask() -> None:
    from pycocotools import mask as coco_mask

    detections = make_detector().embed(picture()).classify("red, blue")
    rows = detections.to_coco(7, category_ids=[40, 50])
    for i, row in enumerate(rows):
        x1, y1, x2, y2 = detections.xyxy[i].tolist()
        assert row["image_id"] == 7 and row["category_id"] == [40, 50][detections.class_id[i]]
        assert row["bbox"] == [x1, y1, x2 - x1, y2 - y1]
        assert (coco_mask.decode(row["segmentation"]).astype(bool) == detections.mask_of(i)).all()
    assert [r["category_id"] for r in detections.to_coco(7, masks=False)] == [c + 1 for c in detections.class_id]


def test_masks__are_none_without_a_mask_head() -> None:
    detections = make_detector(masks=False).embed(picture()).classify("red")
    assert detections.mask is None and detections.polygons(0) == []
    assert "segmentation" not in detections.to_coco(1)[0] and detections.to_supervision().mask is None


def test_polygons__follow_the_mask() -> None:
    detections = make_detector().embed(picture()).classify("red")
    (outline,) = detections.polygons(0)
    points = np.array(outline).reshape(-1, 2)
    assert np.abs(points.min(0) - (10, 20)).max() <= 1 and np.abs(points.max(0) - (50, 70)).max() <= 1


@settings(FUZZ, max_examples=60)
@given(
    st.floats(-20, 60), st.floats(-20, 60), st.floats(1, 70), st.floats(1, 70), st.integers(1, 40), st.integers(1, 40)
)
def test_paste_mask__full_mask_covers_the_box(
    x1: float, y1: float, w: float, h: float, height: int, width: int
) -> None:
    box = np.array([x1, y1, x1 + w, y1 + h], np.float32)
    pasted = paste_mask(np.ones((28, 28), np.float32), box, (height, width))
    x1, y1, x2, y2 = box.tolist()
    column, row = np.arange(width) + 0.5, np.arange(height) + 0.5
    expected = ((row >= y1) & (row <= y2))[:, None] & ((column >= x1) & (column <= x2))[None]
    assert pasted.shape == (height, width)
    assert (pasted == expected).all()


def test_paste_mask__cells_are_in_place() -> None:
    mask = np.zeros((28, 28), np.float32)
    mask[:14, 14:] = 1  # upper right quarter
    pasted = paste_mask(mask, np.array([10.0, 20.0, 66.0, 76.0], np.float32), (100, 100))
    expected = np.zeros((100, 100), bool)
    expected[20:48, 38:66] = True
    assert (pasted == expected).all()


@pytest.mark.parametrize("box", [[5.0, 5, 5, 9], [9.0, 5, 5, 9], [300.0, 300, 320, 320], [float("nan")] * 4])
def test_paste_mask__degenerate_and_outside_boxes_are_empty(box: list[float]) -> None:
    assert not paste_mask(np.ones((28, 28), np.float32), np.array(box, np.float32), (50, 50)).any()


def test_to_rgb__arrays_are_rgb_grey_or_rgba() -> None:
    rgb = picture()
    assert to_rgb(rgb) is rgb or (to_rgb(rgb) == rgb).all()
    assert to_rgb(rgb[:, :, 0]).shape == rgb.shape
    clear = np.dstack([rgb, np.zeros(rgb.shape[:2], np.uint8)])
    assert (to_rgb(clear) == 255).all()  # transparent: white paper
    assert (to_rgb(np.dstack([rgb, np.full(rgb.shape[:2], 255, np.uint8)])) == rgb).all()


@pytest.mark.parametrize(
    "bad", [np.zeros((4, 4, 3)), np.zeros((4, 4, 2), np.uint8), np.zeros((0, 4, 3), np.uint8), np.zeros(4, np.uint8), 7]
)
def test_to_rgb__invalid_array_is_refused(bad: object) -> None:
    with pytest.raises(UserError, match="picture"):
        to_rgb(bad)  # type: ignore[arg-type]


def test_to_rgb__several_pictures_go_one_by_one() -> None:
    with pytest.raises(UserError, match="not list; several go one by one"):
        to_rgb([picture(), picture()])  # type: ignore[arg-type]


@pytest.mark.parametrize("address", ["https://example.org/bus.jpg?x=1", "rtsp://camera/1", Path("http://a/b.jpg")])
def test_to_rgb__nothing_is_fetched_from_an_address(address: str | Path) -> None:
    with pytest.raises(BadImageError, match="is an address, and nothing is fetched"):
        to_rgb(address)


def test_to_rgb__array_over_the_pixel_limit_is_refused() -> None:
    with pytest.raises(UserError, match="at most 100 "):
        to_rgb(np.zeros((20, 20, 3), np.uint8), max_pixels=100)


def test_detector_module__needs_no_detectron2() -> None:
    import subprocess
    import sys
    from pathlib import Path

    code = (
        "import sys; sys.modules['detectron2'] = None\n"
        "from tests.detector.fakes import make_detector, picture\n"
        "assert make_detector().embed(picture()).classify('red').class_name == ['red']"
    )
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True)


def test_to_rgb__pillow_bytes_and_paths_are_equal(tmp_path: Path) -> None:
    image = Image.fromarray(picture())
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90°
    buffer = io.BytesIO()
    image.save(buffer, "PNG", exif=exif)
    (tmp_path / "p.png").write_bytes(buffer.getvalue())
    expected = np.rot90(picture(), -1)
    assert (to_rgb(Image.open(tmp_path / "p.png")) == expected).all()
    assert (to_rgb(buffer.getvalue()) == expected).all()
    assert (to_rgb(tmp_path / "p.png") == expected).all()
    assert (to_rgb(str(tmp_path / "p.png")) == expected).all()


@pytest.mark.parametrize("mode", ["L", "P", "LA", "RGBA", "CMYK", "1", "YCbCr"])
def test_to_rgb__pillow_modes_become_rgb(mode: str) -> None:
    source = Image.fromarray(picture()).convert("RGB" if mode != "LA" else "L").convert(mode)
    pixels = to_rgb(source)
    assert pixels.shape == (120, 160, 3)
    if mode not in ("L", "LA", "1"):
        assert np.abs(pixels[40, 30].astype(int) - picture()[40, 30]).max() < 40


@pytest.mark.parametrize("content", [b"", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"GIF89a" + b"\0" * 30])
def test_to_rgb__unsupported_file_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(UserError):
        to_rgb(content)
    (tmp_path / "p.png").write_bytes(content)
    with pytest.raises(BadImageError, match="p.png"):
        to_rgb(tmp_path / "p.png")


@pytest.mark.parametrize("name", ["clip-photo", "clip-sticker"])
def test_load__an_encoder_is_no_detector(name: str) -> None:
    with pytest.raises(UserError, match=f"{name} is an encoder; the detectors are default, vild-photo"):
        detector_folder(name)


@pytest.mark.parametrize("name", ["no/such/folder", "no-such-weights"])
def test_load__unknown_weights_are_a_user_error(name: str) -> None:
    pytest.importorskip("ovd.weights")
    with pytest.raises(UserError, match=f"{name}|manifest.json"):
        detector_folder(name)


def test_load__reads_the_card_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    assert read_model_card(tmp_path) == {"name": tmp_path.name, "sha256": hashlib.sha256(b"weights").hexdigest()}
    run = tmp_path / "cells" / "exported"
    run.mkdir(parents=True)
    (run / "model.safetensors").write_bytes(b"weights")
    assert read_model_card(run)["name"] == "cells"  # the run's name; all of them are exported
    (tmp_path / "card.md").write_text("# x\n\n**What it is for.** Drawings.\nNot photos.\n\n**Data.** None.\n")
    (tmp_path / "card.json").write_text('{"metrics": {"AP50": 0.3}}')
    card = read_model_card(tmp_path)
    assert card["purpose"] == "Drawings. Not photos." and card["metrics"] == {"AP50": 0.3}
    (tmp_path / "card.json").write_text("[")
    with pytest.raises(UserError, match="card.json"):
        read_model_card(tmp_path)


def test_load__run_folder_means_its_export(tmp_path: Path) -> None:
    pytest.importorskip("ovd.weights")
    assert detector_folder(tmp_path) == tmp_path
    (tmp_path / "exported").mkdir()
    (tmp_path / "exported" / "model.json").write_text("{}")
    assert detector_folder(str(tmp_path)) == tmp_path / "exported"


# -- crop refinement ---------------------------------------------------------------------------------------------------


class _Grey(ColourModel):
    """Boxes of `ColourModel`, but its own embeddings say nothing of the colours."""

    def regions(self, image: np.ndarray) -> RegionSet:
        detections = super().regions(image)
        # The last, the whole picture, is the likeliest.
        rising = np.linspace(0.3, 0.9, len(detections), dtype=np.float32)
        return replace(detections, text=np.stack([self.encoder.word("fog")] * len(detections)), objectness=rising)


def test_crop_refinement__classifies_by_crops() -> None:
    encoder = WordEncoder()
    detector = Detector(model=_Grey(encoder), encoder=encoder, crop_refinement=300)
    blind = Detector(model=_Grey(encoder), encoder=encoder)
    assert len(blind.find(picture(), ["red", "blue"], threshold=0.3)) == 0
    detections = detector.find(picture(), ["red", "blue"], threshold=0.3)
    by_box = {tuple(box): name for box, name in zip(detections.xyxy.tolist(), detections.class_name, strict=True)}
    assert by_box[10, 20, 50, 70] == "red" and by_box[80, 30, 150, 110] == "blue"
    before = encoder.crops
    detector.find(picture(), ["yellow"])  # the same picture: other words, no crop again
    assert encoder.crops == before


def test_crop_refinement__only_of_the_most_likely_regions() -> None:
    encoder = WordEncoder()
    detector = Detector(model=_Grey(encoder), encoder=encoder, crop_refinement=1)
    detections = detector.embed(picture()).regions
    fog = encoder.word("fog")
    refined = np.abs(detections.text @ fog - 1) > 1e-4
    assert refined.tolist() == [False] * (len(detections) - 1) + [True]
    crop = embed_regions(encoder, picture(), detections.boxes[-1:])[0]
    mixed = 0.3 * fog + 0.7 * crop.numpy()
    np.testing.assert_allclose(detections.text[-1], mixed / np.linalg.norm(mixed), rtol=1e-5, atol=1e-6)
    assert encoder.crops == 4  # one region at two scales, twice


def test_crop_refinement__changes_the_image_head() -> None:
    encoder = WordEncoder()
    detections = _Grey(encoder).regions(picture())
    two = replace(detections, image=np.stack([encoder.word("mist")] * len(detections)))
    again = refine_with_crops(two, picture(), encoder, count=1)
    assert np.array_equal(again.text, two.text)
    assert again.image is not None and not np.array_equal(again.image[-1], two.text[-1])
    assert two.image is not None and np.array_equal(again.image[:-1], two.image[:-1])


def test_crop_refinement__skips_slivers_and_empty_pictures() -> None:
    encoder = WordEncoder()
    detections = _Grey(encoder).regions(picture())
    thin = replace(detections, boxes=np.array([[3.0, 3.0, 4.5, 60.0]] * len(detections), np.float32))
    assert refine_with_crops(thin, picture(), encoder, count=50) is thin
    none = RegionSet(
        boxes=torch.zeros(0, 4), objectness=torch.zeros(0), text=torch.zeros(0, 64), image=None, masks=None, size=(9, 9)
    )
    assert len(refine_with_crops(none, picture(), encoder, count=50)) == 0
    assert encoder.crops == 0


def test_crop_refinement__large_picture_gives_the_same() -> None:
    encoder = WordEncoder()
    small = picture()
    large = np.repeat(np.repeat(small, 25, axis=0), 25, axis=1)  # 4000×3000
    detections = _Grey(encoder).regions(small)
    far = replace(detections, boxes=detections.boxes * 25, size=large.shape[:2])
    near, again = (
        refine_with_crops(detections, small, encoder, count=50),
        refine_with_crops(far, large, encoder, count=50),
    )
    assert np.array_equal(again.boxes, far.boxes)
    assert ((near.text * again.text).sum(axis=1) > 0.99).all()


def test_crop_refinement__negative_count_is_refused() -> None:
    encoder = WordEncoder()
    with pytest.raises(UserError, match="crop_refinement is -1"):
        Detector(model=ColourModel(encoder), encoder=encoder, crop_refinement=-1)


def test_crop_refinement__needs_an_image_tower() -> None:
    encoder = WordEncoder()
    encoder.has_image_tower = False
    with pytest.raises(UserError, match="image tower"):
        Detector(model=ColourModel(encoder), encoder=encoder, crop_refinement=5)


def test_second_look__is_an_alias_of_crop_refinement() -> None:
    encoder = WordEncoder()
    assert Detector(model=ColourModel(encoder), encoder=encoder, second_look=7).crop_refinement == 7


def test_second_look__in_a_card_is_read(tmp_path: Path) -> None:
    from ovd.modeling.export import read_card

    card = json.loads((detector_folder("vild-sticker") / "model.json").read_text())
    assert card["second_look"] == 40 and read_card(detector_folder("vild-sticker")).crop_refinement == 40
    card["crop_refinement"] = card.pop("second_look")
    (tmp_path / "model.json").write_text(json.dumps(card))
    assert read_card(tmp_path).crop_refinement == 40


def seven_detections(masks: NDArray[np.float32] | None = None) -> Detections:
    rng = np.random.default_rng(0)
    names = ("dog", "cat")
    class_id = np.array([0, 1, 0, 0, 1, 0, 0])
    return Detections(
        xyxy=rng.uniform(0, 50, (7, 4)).astype(np.float32),
        confidence=np.linspace(0.9, 0.3, 7).astype(np.float32),
        class_id=class_id,
        class_name=[names[i] for i in class_id],
        size=(60, 80),
        names=names,
        best=np.array([0.9, 0.8], np.float32),
        threshold=0.2,
        region=np.arange(7),
        box_masks=masks,
    )


@pytest.mark.parametrize(
    ("index", "kept"),
    [(2, [2]), (-1, [6]), (slice(1, 3), [1, 2]), ([5, 0], [5, 0]), (np.array([4]), [4]), (slice(0), []), ([], []),
     (np.array([1, 0, 0, 0, 0, 0, 1], dtype=bool), [0, 6])],
    ids=str,
)  # fmt: skip
def test_detections__index_gives_some_of_them(index: Any, kept: list[int]) -> None:
    detections = seven_detections(np.random.default_rng(1).uniform(size=(7, 4, 4)).astype(np.float32))
    some = detections[index]
    assert len(some) == len(kept) and some.class_name == [detections.class_name[i] for i in kept]
    for name in ("xyxy", "confidence", "class_id", "region", "box_masks"):
        np.testing.assert_array_equal(getattr(some, name), getattr(detections, name)[kept])


@pytest.mark.parametrize("index", [7, -8, np.ones(3, dtype=bool)], ids=str)
def test_detections__wrong_index_is_refused(index: Any) -> None:
    with pytest.raises(IndexError):
        seven_detections()[index]


def test_detections__of_a_class_by_its_name() -> None:
    detections = seven_detections()
    assert detections["cat"].class_name == ["cat", "cat"]
    with pytest.raises(UserError, match="'cta' is none of the classes asked for - did you mean 'cat'"):
        detections["cta"]
    with pytest.raises(IndexError, match=r'detections\["dog"\] are those of a class'):
        detections[detections.class_name == "cat"]  # type: ignore[comparison-overlap]


def test_detections__are_iterated_one_by_one_and_print_short() -> None:
    detections = seven_detections()
    assert [one.class_name for one in detections] == [[name] for name in detections.class_name]
    assert repr(detections) == "<Detections in 80 × 60 pixels: dog × 5, cat × 2>"
    assert repr(detections[:0]) == "<Detections in 80 × 60 pixels: none>"


def test_load__a_folder_that_is_replaced_in_the_meantime_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replaced(folder: Path, *args: object, **options: object) -> None:
        with whole_folder(folder) as fresh:
            (fresh / "model.json").write_text("of a later training")

    (tmp_path / "exported").mkdir()
    monkeypatch.setattr("ovd.detector.detector_folder", Path)
    monkeypatch.setattr("ovd.detector.load_trained", replaced)
    with pytest.raises(UserError, match="exported: another export took its place while it was read; load it again"):
        Detector.load(tmp_path / "exported")
