# SPDX-License-Identifier: Apache-2.0
"""Searching by crop: what is found, how words and crops mix, what a score depends on, which mistakes are explained."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ovd.detector import Detector
from ovd.examples import Crop, Example, ExampleEmbedder, parse_examples
from ovd.inference.arrays import unit_rows
from ovd.inference.example_scorers import CENTRE_PRIOR, CentredCosineScorer
from ovd.inference.scoring import Calibration, RegionSet
from ovd.picture_files import PictureFiles
from ovd.predict import main, predict
from ovd.query_flags import named_example
from ovd.vocabulary import TEMPLATES_STICKER
from pretrain.engine.errors import UserError
from tests.detector.fakes import COLOURS, ColourModel, WordEncoder, make_detector, picture

RED = np.full((30, 40, 3), COLOURS["red"], dtype=np.uint8)
BLUE = np.full((30, 40, 3), COLOURS["blue"], dtype=np.uint8)
SCENE = [("red", 10, 20, 50, 70), ("blue", 80, 30, 150, 110)]


def boxes_by_name(examples: Any, classes: str | None = None, **options: Any) -> dict[str, list[float]]:
    found = make_detector().find(picture(SCENE), classes, examples=examples, **options)
    return dict(zip(found.class_name, found.xyxy.tolist(), strict=True))


def test_examples__crop_of_another_picture() -> None:
    assert boxes_by_name({"thing": RED}) == {"thing": [10, 20, 50, 70]}
    assert boxes_by_name([BLUE]) == {"example 1": [80, 30, 150, 110]}


def test_examples__box_on_the_picture() -> None:
    assert boxes_by_name([(80, 30, 150, 110)]) == {"example 1": [80, 30, 150, 110]}
    assert boxes_by_name({"mine": (10.0, 20.0, 50.0, 70.0)}) == {"mine": [10, 20, 50, 70]}


def test_examples__box_on_another_picture() -> None:
    other = picture([("blue", 5, 5, 60, 60)])
    assert boxes_by_name({"b": Crop(other, (5, 5, 60, 60))}) == {"b": [80, 30, 150, 110]}


def test_query__words_and_crops_are_one_list() -> None:
    detector = make_detector()
    found = detector.find(picture(SCENE), "red, unicorn", examples={"my thing": BLUE})
    assert found.names == ("red", "unicorn", "my thing")
    assert dict(zip(found.class_name, found.class_id.tolist(), strict=True)) == {"red": 0, "my thing": 2}
    assert [name for name, _ in found.not_found] == ["unicorn"]


def test_query__word_and_crop_of_one_name_take_the_better_score() -> None:
    detector = make_detector()
    query = detector.query("Red, blue", {"red": BLUE})
    found = detector.embed(picture(SCENE)).classify(query, threshold=0.0)
    assert found.names == ("Red", "blue")
    assert any("Red" in n or "red" in n for n in found.notices)
    regions = detector.embed(picture(SCENE))
    mixed, _ = regions.scores(query)
    word, _ = regions.scores(detector.query("red"))
    crop, _ = regions.scores(detector.query(None, {"x": BLUE}))
    np.testing.assert_allclose(mixed[:, 0], np.maximum(word[:, 0], crop[:, 0]), rtol=1e-6)


def test_scores__do_not_depend_on_other_words_or_examples() -> None:
    detector = make_detector()
    regions = detector.embed(picture(SCENE))
    alone, _ = regions.scores(detector.query(None, {"a": RED}))
    many, _ = regions.scores(detector.query("green, yellow, blue", {"b": BLUE, "a": RED}))
    np.testing.assert_allclose(many[:, 4], alone[:, 0], rtol=1e-5)


def test_negatives__words_and_examples_remove_regions() -> None:
    assert set(boxes_by_name({"a": RED, "b": BLUE})) == {"a", "b"}
    # A class of its own that is a little like both; the negative example claims the blue one.
    both = np.concatenate([RED, BLUE], axis=1)
    assert (
        boxes_by_name({"both": both}, threshold=0.01)
        and [80, 30, 150, 110] not in boxes_by_name({"both": both, "-no": BLUE}, threshold=0.01).values()
    )
    assert [80, 30, 150, 110] not in boxes_by_name({"both": both}, "-blue", threshold=0.01).values()


def test_examples__crops_of_one_name_are_averaged() -> None:
    encoder = WordEncoder()
    embedder = ExampleEmbedder(encoder=encoder)
    (pair,) = parse_examples([("x", RED), ("X", BLUE)])
    assert pair.name == "x" and len(pair.crops) == 2
    (expected,) = unit_rows((encoder.word("red") + encoder.word("blue"))[None])
    np.testing.assert_allclose(embedder.embed([pair])[0], expected, rtol=1e-5, atol=1e-6)


def test_examples__box_is_embedded_with_surroundings() -> None:
    encoder = WordEncoder()
    crop = Crop(picture([("red", 40, 40, 80, 80)]), (40, 40, 80, 80))
    row = ExampleEmbedder(encoder=encoder).embed([Example("x", (crop,))])[0]
    # 1x shows red alone, 1.5x shows 1/2.25 red on grey (ViLD: the sum of both, normalised).
    wide = encoder.word("red") / 2.25 + encoder.word("grey") * (1 - 1 / 2.25)
    (expected,) = unit_rows((encoder.word("red") + wide)[None])
    assert float(row @ expected) > 0.999
    assert float(row @ encoder.word("red")) < 0.95


def test_crops__are_embedded_once() -> None:
    detector = make_detector()
    for _ in range(3):
        detector.find(picture(SCENE), examples={"a": RED.copy()})
    assert detector.text.encoder.crops == 2 and detector.model.runs == 1  # type: ignore[attr-defined]


def test_examples__paths_bytes_and_pillow(tmp_path: Path) -> None:
    Image.fromarray(RED).save(tmp_path / "red.png")
    buffer = io.BytesIO()
    Image.fromarray(RED).save(buffer, "PNG")
    for given in (tmp_path / "red.png", str(tmp_path / "red.png"), buffer.getvalue(), Image.fromarray(RED)):
        assert boxes_by_name({"r": given}) == {"r": [10, 20, 50, 70]}


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ({"mug": np.zeros((0, 5, 3), np.uint8)}, "'mug': the crop is empty"),
        ({"mug": RED[:4]}, "'mug' is 40×4 pixels; at least 8×8"),
        ({"mug": (10, 10, 13, 60)}, "'mug' is 3×50 pixels"),
        ({"mug": (155, 10, 190, 60)}, "'mug' is 5×50 pixels"),
        ({"mug": (200, 10, 260, 60)}, "outside the picture of 160×120"),
        ({"mug": (50, 60, 10, 20)}, "empty or outside"),
        ({"mug": (float("nan"), 1, 20, 20)}, "NaN"),
        ({"mug": b"no picture"}, "'mug'"),
        ({"mug": RED.astype(np.float32)}, "'mug': picture arrays must be uint8"),
        ({"mug": 7}, "'mug': a picture must be"),
        ({"mug": [], "-cup": RED}, "Type at least one class"),
        ({"mug": RED, "-mug": BLUE}, "both as a class and with a minus"),
        ([], "no classes yet"),
        ({f"e{i}": RED for i in range(101)}, "at most 100"),
    ],
)
def test_examples__errors_name_the_example(examples: Any, message: str) -> None:
    detector = make_detector()
    if message.startswith("Type"):
        with pytest.raises(UserError, match=message):
            detector.find(picture(), "", examples=examples)
        return
    with pytest.raises(UserError) as caught:
        detector.find(picture(), examples=examples)
    assert message in str(caught.value)
    assert detector.runs == 0, "a mistake should not cost a run of the network"


def test_examples__box_without_a_picture_is_refused() -> None:
    with pytest.raises(UserError, match="needs the picture it lies on"):
        parse_examples([(1, 2, 30, 40)])


def test_crops__need_an_image_tower() -> None:
    class Words(WordEncoder):
        has_image_tower = False

    encoder = Words()
    detector = Detector(model=ColourModel(encoder), encoder=encoder)
    with pytest.raises(UserError, match="cannot search by example"):
        detector.find(picture(), examples=[RED])
    assert detector.find(picture(SCENE), "red").class_name == ["red"]


def test_examples__model_may_have_its_own_encoder() -> None:
    class Negated(WordEncoder):
        def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
            return super().encode_image(pixels) * torch.tensor([-1.0])

    encoder = WordEncoder()
    model = ColourModel(encoder)
    model.example_encoder = Negated()  # type: ignore[attr-defined]
    detector = Detector(model=model, encoder=encoder)
    assert [10, 20, 50, 70] not in detector.find(picture(SCENE), examples={"r": RED}, threshold=0.1).xyxy.tolist()


def direction(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x)


def test_example_scorer__equals_a_derivation_by_hand() -> None:
    """The image head where there are two; images centred on the picture's regions, words on their own mean."""
    unit = unit_rows(np.random.default_rng(0).standard_normal((9, 8)))
    regions = RegionSet(boxes=np.zeros((2, 4)), objectness=np.array([0.5, 1.0]), text=unit[:2],
                        image=unit[2:4], masks=None, size=(1, 1))  # fmt: skip
    calibration = Calibration(
        bank_limit=1.0, example_logit_scale=7.0, example_objectness_weight=1.0, example_slope=2.0, example_offset=-1.0
    )
    scorer = CentredCosineScorer(
        rows=unit[4:5], background_words=unit[5:8], negatives=unit[8:], calibration=calibration
    )
    got = scorer(regions)
    mean = (unit[2] + unit[3]) / (2 + CENTRE_PRIOR)
    for r in range(2):
        z = direction(unit[2 + r] - mean)
        likeness = 7.0 * float(z @ direction(unit[4] - mean))
        rivals = [float(z @ direction(w - unit[5:8].mean(0))) for w in unit[5:8]]
        rivals.append(float(z @ direction(unit[8] - mean)))
        p = math.exp(likeness) / (math.exp(likeness) + sum(math.exp(7.0 * v) for v in rivals)) * (0.5, 1.0)[r]
        assert float(got[r, 0]) == pytest.approx(1 / (1 + math.exp(1.0) * ((1 - p) / p) ** 2), rel=1e-6)


def test_crops__common_component_is_removed() -> None:
    common, parts = 3.0 * np.eye(8)[0], np.eye(8)[1:]
    regions = RegionSet(boxes=np.zeros((7, 4)), objectness=np.ones(7), text=unit_rows(parts + common),
                        image=None, masks=None, size=(1, 1))  # fmt: skip
    example = unit_rows(parts[:1] + common)
    many = RegionSet(**{**vars(regions), "boxes": np.zeros((140, 4)), "objectness": np.ones(140),
                        "text": np.tile(regions.text, (20, 1))})  # fmt: skip
    bank = unit_rows(np.random.default_rng(1).standard_normal((12, 8)))
    calibration = Calibration(example_logit_scale=10.0)
    scorer = CentredCosineScorer(rows=example, background_words=bank, negatives=bank[:0], calibration=calibration)
    score = scorer(many)[:7, 0]
    assert float(regions.text[0] @ example[0] - regions.text[1] @ example[0]) < 0.11
    assert float(score[0]) > 0.9 and float(score[1:].max()) < 0.2


def test_example_scorer__no_regions_no_scores() -> None:
    empty = RegionSet(boxes=np.zeros((0, 4)), objectness=np.zeros(0), text=np.zeros((0, 8)), image=None,
                      masks=None, size=(1, 1))  # fmt: skip
    words = np.eye(8, dtype=np.float32)
    scorer = CentredCosineScorer(rows=words[:2], background_words=words, negatives=words[:0], calibration=Calibration())
    assert scorer(empty).shape == (0, 2)


def test_calibration__of_examples_leaves_words_unchanged() -> None:
    words = Calibration(logit_scale=5.0, slope=2.0, threshold=0.2)
    fitted = Calibration(logit_scale=9.0, objectness_weight=0.5, slope=3.0, offset=-1.0, threshold=0.4)
    both = words.with_examples(fitted)
    assert (both.logit_scale, both.slope, both.threshold) == (5.0, 2.0, 0.2)
    assert both.of_examples().threshold == 0.4 and both.of_examples().slope == 3.0


def test_threshold__is_that_of_words_or_of_crops() -> None:
    encoder = WordEncoder()
    model = ColourModel(encoder, threshold=0.3)
    model.calibration = model.calibration.with_examples(Calibration(logit_scale=20.0, threshold=0.6))
    detector = Detector(model=model, encoder=encoder)
    assert detector.threshold_for(detector.query("red")) == 0.3
    assert detector.threshold_for(detector.query(None, {"a": RED})) == 0.6
    assert detector.threshold_for(detector.query("red", {"a": RED})) == 0.6
    assert detector.find(picture(SCENE), examples={"a": RED}).threshold == 0.6


def test_example_hash__differs_by_crop() -> None:
    detector = make_detector()
    hashes = {
        detector.query(*asked).hash
        for asked in [("red", None), ("red", {"a": RED}), ("red", {"a": BLUE}), ("red", {"b": RED}), (None, {"a": RED})]
    }
    assert len(hashes) == 5
    assert detector.query("red").hash == detector.resolve("red").hash


# ---- python -m ovd.predict --example ------------------------------------------------------------------------------


def test_predict__another_example_is_another_command(tmp_path: Path) -> None:
    Image.fromarray(picture(SCENE)).save(tmp_path / "scene.png")
    pictures = PictureFiles({"scene.png": tmp_path / "scene.png"})
    detector = make_detector(cache_size=0)
    query = detector.query("red", {"my mug": BLUE})
    assert predict(detector=detector, pictures=pictures, vocabulary=query, out=tmp_path / "out") == []
    images = json.loads((tmp_path / "out" / "images.json").read_text())
    names = {c["id"]: c["name"] for c in images["categories"]}
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {names[r["category_id"]]: r["bbox"] for r in results} == {"red": [10, 20, 40, 50],
                                                                     "my mug": [80, 30, 70, 80]}  # fmt: skip
    with pytest.raises(UserError, match=r"words or examples was \w+ \(red, my mug\), is"):
        other = detector.query("red", {"my mug": RED})
        predict(detector=detector, pictures=pictures, vocabulary=other, out=tmp_path / "out")


def test_named_example__splits_name_and_path(tmp_path: Path) -> None:
    crop = tmp_path / "mug.png"
    Image.fromarray(RED).save(crop)
    assert named_example(f"my mug={crop}") == ("my mug", crop)
    assert named_example(str(crop)) == ("mug", crop)
    assert named_example(f"-poster={crop}") == ("-poster", crop)
    with pytest.raises(UserError, match="no such file"):
        named_example("my mug=nowhere.png")


def test_predict__no_classes_is_explained(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--example CROP"):
        main([str(tmp_path), "--out", str(tmp_path / "out")])
    crop = tmp_path / "mug.png"
    Image.fromarray(RED).save(crop)
    with pytest.raises(UserError, match="Type at least one class"):
        main([str(crop), f"--example=-poster={crop}", "--out", str(tmp_path / "out")])


def test_query__vocabulary_keeps_its_templates() -> None:
    assert make_detector().query("-poster", {"a": RED}).words.templates == TEMPLATES_STICKER


def test_question__is_an_alias_of_query() -> None:
    detector = make_detector()
    assert detector.question("red", {"a": RED}).hash == detector.query("red", {"a": RED}).hash
