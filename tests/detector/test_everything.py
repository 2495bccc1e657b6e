# SPDX-License-Identifier: Apache-2.0
"""What is in this picture: all words that a detector knows, each thing named once."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ovd.detector import Detector
from ovd.inference.arrays import as_array
from ovd.inference.everything import (
    MANY_THRESHOLD,
    MANY_WORDS,
    OPEN_THRESHOLD,
    SHOWN_THRESHOLD,
    PromptFreeWords,
    is_everything,
    nearest_words,
    open_shift,
)
from ovd.picture_files import PictureFiles
from ovd.predict import main, predict
from ovd.query import Query
from ovd.vocabulary import Vocabulary
from pretrain.engine.errors import UserError
from tests.detector.fakes import ColourModel, WordEncoder, make_detector, picture


def test_everything__each_object_has_one_name() -> None:
    detector = make_detector()
    detections = detector.find(picture(), "everything")
    assert sorted(detections.class_name) == ["blue", "red"]  # and not "red thing" too
    assert list(detections.confidence) == sorted(detections.confidence, reverse=True)
    assert detector.find(picture(), ["Everything "]).class_name == detections.class_name
    assert detector.embed(picture()).classify("everything").class_name == detections.class_name


def test_everything__nothing_known_is_empty() -> None:
    detections = make_detector().find(np.full((60, 80, 3), 128, np.uint8), "everything", threshold=0.9999)
    assert len(detections) == 0 and "red" in dict(detections.not_found)


def test_everything__nms_within_a_family() -> None:
    class Two(ColourModel):
        related = True

        def prompt_free_words(self) -> PromptFreeWords:
            own = PromptFreeWords.plain(["red", "green"])
            return replace(own, family=np.zeros(2, int)) if self.related else own

        def regions(self, image: np.ndarray) -> Any:  # the green box moved onto the red one: IoU .43
            found = super().regions(image)
            found.boxes[1] = found.boxes[0] + np.array([16, 0, 16, 0], np.float32)
            return found

    encoder = WordEncoder()
    model = Two(encoder)
    scene = picture([("red", 10, 20, 50, 70), ("green", 80, 30, 120, 80)])
    assert len(Detector(model=model, encoder=encoder).find(scene, "everything")) == 1
    model.related = False
    assert sorted(Detector(model=model, encoder=encoder).find(scene, "everything").class_name) == ["green", "red"]


def test_everything__hyponyms_of_a_sure_word_are_dropped() -> None:
    words = PromptFreeWords(
        names=("dog", "beagle", "cup"),
        shift=np.array([0, open_shift(), 0], np.float32),
        kind_of=np.array([[0, 0, 0], [1, 0, 0], [0, 0, 0]], bool),
        family=np.array([0, 0, 2]),
    )
    score = words.rescored(np.array([[0.31, 0.9, 0.2], [0.29, 0.9, 0.2]], np.float32))
    assert score[0].argmax() == 0 and score[0, 1] == 0
    assert score[1].argmax() == 1


def test_everything__level_shift_keeps_the_order() -> None:
    words = replace(PromptFreeWords.plain(["fox"]), shift=np.array([open_shift()], np.float32))
    given = np.linspace(0, 1, 101, dtype=np.float32)[:, None]
    moved = words.rescored(given)[:, 0]
    assert moved[int(OPEN_THRESHOLD * 100)] == pytest.approx(SHOWN_THRESHOLD, abs=1e-5)
    assert np.all(np.diff(moved) > 0) and 0 <= moved[0] < 1e-6 and moved[-1] > 1 - 1e-6
    odds = 0.8 / 0.2 * (SHOWN_THRESHOLD / (1 - SHOWN_THRESHOLD)) / (OPEN_THRESHOLD / (1 - OPEN_THRESHOLD))
    assert moved[80] == pytest.approx(odds / (1 + odds), abs=1e-5)


@pytest.mark.parametrize(
    ("classes", "expected"),
    [("everything", True), (" Everything\n", True), (["everything"], True), ("everything, dog", False),
     ("-everything", False), (None, False), (["everything", "dog"], False), ([], False)],
)  # fmt: skip
def test_everything__only_when_typed_alone(classes: Any, expected: bool) -> None:
    assert is_everything(classes) is expected


def test_everything__has_its_own_hash_and_threshold() -> None:
    detector = make_detector(threshold=0.1)
    query = detector.query("everything")
    typed = Query(Vocabulary.parse(list(query.names), templates=detector.templates))
    assert query.hash != typed.hash and query.names == typed.names
    assert (detector.threshold_for(query), detector.threshold_for(typed)) == (SHOWN_THRESHOLD, 0.1)
    assert make_detector(threshold=0.6).threshold_for(make_detector().query("everything")) == 0.6


@pytest.mark.parametrize(
    ("count", "level"), [(5, SHOWN_THRESHOLD), (MANY_WORDS, SHOWN_THRESHOLD), (MANY_WORDS + 1, MANY_THRESHOLD)]
)
def test_everything__many_words_raise_the_threshold(count: int, level: float) -> None:
    class Knowing(ColourModel):
        def prompt_free_words(self) -> PromptFreeWords:
            return PromptFreeWords.plain(["red", *(f"thing {i}" for i in range(count - 1))])

    encoder = WordEncoder()
    detector = Detector(model=Knowing(encoder), encoder=encoder)
    query = detector.query("everything")
    assert len(query.names) == count and detector.threshold_for(query) == level
    found = detector.find(picture(), "everything", threshold=0.01)
    assert len(found) and detector.find(picture(), "everything").confidence.min(initial=1) >= level
    assert detector.threshold_for(query, 0.2) == 0.2  # a person may ask for more


def test_everything__unsupported_combinations_are_refused(tmp_path: Path) -> None:
    class Dumb(ColourModel):
        def prompt_free_words(self) -> PromptFreeWords:
            return PromptFreeWords.plain(())

    encoder = WordEncoder()
    with pytest.raises(UserError, match="do not say which words they know"):
        Detector(model=Dumb(encoder), encoder=encoder).query("everything")
    with pytest.raises(UserError, match="leave the examples out"):
        make_detector().query("everything", [picture()])


def test_everything__categories_of_a_folder_are_the_detected_words(tmp_path: Path) -> None:
    Image.fromarray(picture()).save(tmp_path / "a.png")
    detector = make_detector()
    pictures = PictureFiles({"a.png": tmp_path / "a.png"})
    predict(detector=detector, pictures=pictures, vocabulary=detector.query("everything"), out=tmp_path / "out")
    images = json.loads((tmp_path / "out" / "images.json").read_text())
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [c["name"] for c in images["categories"]] == ["red", "blue"]
    assert {r["category_id"] for r in results} == {c["id"] for c in images["categories"]}


def test_everything__command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(picture()).save(tmp_path / "a.png")
    monkeypatch.setattr(Detector, "load", lambda *_, **__: make_detector())
    assert main([str(tmp_path / "a.png"), "--classes", "everything", "--out", str(tmp_path / "out")]) == 0
    assert "red × 1" in capsys.readouterr().out


def test_nearest_words__are_ranked_by_cosine() -> None:
    detector = make_detector()
    model = detector.model
    rows = [as_array(detector.text.encoder.word(word)) for word in ("sea", "red", "blue", "unicorn")]
    model.background_words = np.stack(rows)
    model.card = SimpleNamespace(background_words=("sea", "red", "blue", "unicorn"))  # type: ignore[assignment]
    regions = detector.embed(picture())
    colour = {tuple(box): i for i, box in enumerate(regions.regions.boxes.astype(int).tolist())}
    asked = [colour[10, 20, 50, 70], colour[80, 30, 150, 110]]
    near = nearest_words(model, regions.regions, asked, count=2)
    assert [line[0] for line in near] == ["red", "blue"]
    assert all("sea" not in line for line in near)  # which the detector cannot say
    assert nearest_words(model, regions.regions, []) == []
