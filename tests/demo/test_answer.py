# SPDX-License-Identifier: Apache-2.0
"""The one JSON that page and endpoint share, and the colours in it."""

from __future__ import annotations

import base64
import io
import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import ovd.demo.answer
from ovd.colours import DASHES, PALETTE, class_styles
from ovd.demo.answer import FLOOR, MAX_DECODED, PREVIEW_SIDE, SLICE, Answerer, data_url, decode_examples
from ovd.detector import Detector
from ovd.inference.region_model import ConditionedBoxes, PatchLocator
from ovd.inference.scoring import RegionSet
from ovd.vocabulary import Vocabulary
from pretrain.engine.errors import UserError
from tests.detector.fakes import COLOURS, ColourModel, WordEncoder, make_detector, picture


@pytest.fixture
def answerer() -> Answerer:
    return Answerer(detector=make_detector())


def test_answer__is_json_with_every_box_above_the_floor(answerer: Answerer, pictures: dict[str, Path]) -> None:
    answer = answerer.answer(pictures["good"], "red\nblue: azure\nunicorn\n-pink")
    assert json.loads(json.dumps(answer, allow_nan=False)) == answer
    assert answer["size"] == [160, 120]
    assert [c["name"] for c in answer["classes"]] == ["red", "blue", "unicorn"]
    assert answer["classes"][1]["synonyms"] == ["azure"] and answer["negatives"] == ["pink"]
    by_name = {answer["classes"][d["class"]]["name"]: d["box"] for d in answer["detections"] if d["score"] > 0.5}
    assert by_name == {"red": [10, 20, 50, 70], "blue": [80, 30, 150, 110]}
    assert all(d["score"] >= answer["floor"] == FLOOR for d in answer["detections"])
    assert answer["threshold"] == 0.3 and answer["classes"][2]["best"] < 0.3
    assert "preview" not in answer


def test_answer__threshold_filters_on_the_server(answerer: Answerer, pictures: dict[str, Path]) -> None:
    words = "red, blue sea far away from here"  # further from the blue region than "blue"
    low = answerer.answer(pictures["good"], words)["detections"]
    high = answerer.answer(pictures["good"], words, 0.9999)["detections"]
    assert len(low) == 2 and len(high) == 1
    assert high == [d for d in low if d["score"] >= 0.9999]


@pytest.mark.parametrize("name", ["moving.png", "moving.webp", "pages.tif"])
def test_answer__says_that_the_first_of_several_frames_was_searched(
    answerer: Answerer, name: str, tmp_path: Path
) -> None:
    one = Image.fromarray(picture())
    one.save(tmp_path / name, save_all=True, append_images=[one.rotate(180)])
    assert (
        "The file has 2 frames or pages; the first was searched" in answerer.answer(tmp_path / name, "red")["notices"]
    )


def test_answer__new_words_do_not_run_the_network(answerer: Answerer, pictures: dict[str, Path]) -> None:
    assert not answerer.answer(pictures["good"], "red")["cached"]
    copy = pictures["good"].with_name("copy.bmp")
    Image.open(pictures["good"]).save(copy)
    again = answerer.answer(copy, "blue", preview=True)
    assert again["cached"] and answerer.detector.runs == 1
    assert [again["classes"][d["class"]]["name"] for d in again["detections"]] == ["blue"]


def test_preview__is_upright_small_and_without_metadata(answerer: Answerer, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "secret camera"
    Image.new("RGB", (4000, 1000), (200, 10, 10)).save(tmp_path / "gps.jpg", exif=exif)
    answer = answerer.answer(tmp_path / "gps.jpg", "red", preview=True)
    assert answer["size"] == [1000, 4000]
    content = base64.b64decode(answer["preview"].removeprefix("data:image/jpeg;base64,"))
    preview = Image.open(io.BytesIO(content))
    assert preview.size == (400, PREVIEW_SIDE) and not preview.getexif() and b"secret" not in content
    assert Image.open(io.BytesIO(base64.b64decode(data_url(picture())[23:]))).size == (160, 120)


@pytest.mark.parametrize(
    ("name", "classes", "message"),
    [
        (None, "red", "Choose a picture first"),
        ("good", " ,", "Type at least one class name"),
        ("vector", "red", "cannot be read as JPEG, PNG, WEBP, BMP"),
        ("truncated", "red", "This picture cannot be used"),
        ("huge", "red", "at most 10 MB"),
        ("bomb", "red", "6000x6000 pixels"),
    ],
)
def test_answer__errors_name_no_paths(
    answerer: Answerer, pictures: dict[str, Path], name: str | None, classes: str, message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        answerer.answer(pictures[name] if name else None, classes)
    assert str(pictures["good"].parent) not in str(caught.value)
    assert answerer.answer(pictures["good"], "red")["detections"]  # the next request is not affected


def test_uploads__a_removed_picture_is_reported(answerer: Answerer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="upload it again"):
        answerer.answer(tmp_path / "gone.png", "red")


def test_colours__depend_on_names_not_order() -> None:
    names = ["dog", "cat", "traffic light", "mug", "zebra"]
    expected = dict(zip(names, class_styles(names), strict=True))
    for order in itertools.permutations(names):
        assert dict(zip(order, class_styles(order), strict=True)) == expected


def test_colours__ten_are_distinct_then_repeat() -> None:
    many = [f"class {i}" for i in range(35)]
    assert len({s.colour for s in class_styles(many[:10])}) == len(PALETTE) == 10
    styles = class_styles(many)
    assert len(styles) == 35 and {s.dash for s in styles} == set(DASHES)


def test_colours__ink_is_readable_on_each() -> None:
    def luminance(colour: str) -> float:
        channel = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        linear = np.where(channel <= 0.04045, channel / 12.92, ((channel + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    for style in class_styles([f"class {i}" for i in range(10)]):
        light, dark = sorted((luminance(style.colour), luminance(style.ink)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, style


# ---- search by example -------------------------------------------------------------------------------------------


def crop_row(colour: str, **more: object) -> dict[str, object]:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), COLOURS[colour]).save(buffer, "PNG")
    return {"image": "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode(), **more}


def test_query__examples_are_classes_beside_words(answerer: Answerer, pictures: dict[str, Path]) -> None:
    rows = [crop_row("blue", name="my thing"), crop_row("green"), crop_row("yellow", name="-sun")]
    answer = answerer.answer(pictures["good"], "red, -pink", examples=rows)
    assert json.loads(json.dumps(answer, allow_nan=False)) == answer
    assert [(c["name"], c["crops"]) for c in answer["classes"]] == [("red", 0), ("my thing", 1), ("example 2", 1)]
    assert answer["negatives"] == ["pink", "sun"]
    by_name = {answer["classes"][d["class"]]["name"]: d["box"] for d in answer["detections"] if d["score"] > 0.5}
    assert by_name == {"red": [10, 20, 50, 70], "my thing": [80, 30, 150, 110]}
    assert answer["vocabulary"] != answerer.answer(pictures["good"], "red, -pink")["vocabulary"]


def test_query__needs_words_or_examples(answerer: Answerer, pictures: dict[str, Path]) -> None:
    found = answerer.answer(pictures["good"], "", examples=[crop_row("red", box=[0, 0, 30, 30], name="r")])
    assert [c["name"] for c in found["classes"]] == ["r"] and len(found["detections"]) >= 1
    with pytest.raises(UserError, match="Type at least one class"):
        answerer.answer(pictures["good"], "", examples=[])


class LocatingModel(ColourModel, PatchLocator):
    """Finds two boxes, whatever the crops."""

    def locate(self, image: np.ndarray, rows_CD: np.ndarray) -> ConditionedBoxes:
        boxes = np.array([[10, 20, 50, 70], [80, 30, 150, 110]], np.float32)
        return ConditionedBoxes(boxes, np.array([0.9, 0.4], np.float32), np.arange(2) % len(rows_CD))

    def patch_rows(self, crops: object) -> np.ndarray:
        raise AssertionError("its patches are embedded by the image-text encoder")


def test_pretext_model__finds_examples_and_refuses_words(
    pictures: dict[str, Path],
) -> None:
    encoder = WordEncoder()
    answerer = Answerer(detector=Detector(model=LocatingModel(encoder), encoder=encoder))
    rows = [crop_row("red", name="mine"), crop_row("blue", name="yours")]
    answer = answerer.answer(pictures["good"], "", examples=rows, preview=True)
    assert json.loads(json.dumps(answer, allow_nan=False)) == answer
    assert [(d["class"], d["box"]) for d in answer["detections"]] == [(0, [10, 20, 50, 70]), (1, [80, 30, 150, 110])]
    assert not answer["cached"] and answer["preview"].startswith("data:image/")
    with pytest.raises(UserError, match="without words or negatives"):
        answerer.answer(pictures["good"], "red", examples=rows)


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ("red", "must be a list"),
        ([1], "must be a list"),
        ([{"name": "x"}], "'x': image must be a data URL"),
        ([{"image": "data:image/svg+xml;base64,AAAA"}], "'example 1': image must be a data URL"),
        ([{"image": "data:image/png;base64,%%%"}], "not base64"),
        ([{"image": "data:image/png;base64,AAAA"}], "'example 1' cannot be used"),
        ([{"image": "data:image/png;base64," + "A" * 3_000_000}], "more than 2 MB"),
        ([crop_row("red", box=[1, 2])], "box must be"),
        ([crop_row("red", box=[1, 2, 4, 30])], "3×28 pixels"),
        ([crop_row("red")] * 21, "at most 20"),
    ],
)
def test_examples__bad_ones_are_explained(
    answerer: Answerer, pictures: dict[str, Path], examples: object, message: str
) -> None:
    with pytest.raises(UserError) as caught:
        answerer.answer(pictures["good"], "red", examples=examples)
    assert message in str(caught.value) and answerer.detector.runs == 0


class Traffic:
    """Two people ask one answerer; what its two threads begin is written down."""

    def __init__(self, answerer: Answerer, pictures: dict[str, Path]) -> None:
        self.answerer, self.pictures = answerer, pictures
        self.begun: list[str] = []
        self.go = threading.Event()  # lets the model end
        text, network = answerer.detector.text, answerer.detector.model.regions
        embed = text.embed

        def embedded(words: Vocabulary) -> np.ndarray:
            self.begun.append(words.classes[0].name)
            self.between(words.classes[0].name)
            return embed(words)

        def regions(image: np.ndarray) -> RegionSet:
            self.begun.append("model")
            assert self.go.wait(60)
            return network(image)

        text.embed, answerer.detector.model.regions = embedded, regions  # type: ignore[method-assign]
        self.between: Callable[[str], object] = lambda first: None
        self.people = ThreadPoolExecutor(4)

    def ask(self, words: str, picture: str = "good") -> Future[dict[str, Any]]:
        return self.people.submit(self.answerer.answer, self.pictures[picture], words)

    def wait_for(self, *begun: str) -> None:
        end = time.monotonic() + 60
        while not set(begun) <= set(self.begun):
            assert time.monotonic() < end, self.begun
            time.sleep(0.005)


@pytest.fixture
def traffic(answerer: Answerer, pictures: dict[str, Path]) -> Iterator[Traffic]:
    traffic = Traffic(answerer, pictures)
    yield traffic
    traffic.go.set()
    traffic.people.shutdown()


def long_list(count: int) -> str:
    return ", ".join(f"thing{i}" for i in range(count))


def test_queue__long_word_lists_are_embedded_in_slices(traffic: Traffic) -> None:
    traffic.go.set()
    held = threading.Event()

    def second_slice(first: str) -> None:
        if first == f"thing{SLICE}":
            held.wait(60)

    traffic.between = second_slice
    long = traffic.ask(long_list(4 * SLICE))
    traffic.wait_for(f"thing{SLICE}")
    short = traffic.ask("red", "green")
    while traffic.answerer._words._work_queue.qsize() == 0:
        time.sleep(0.005)
    held.set()
    assert short.result(60)["classes"][0]["name"] == "red" and len(long.result(60)["classes"]) == 4 * SLICE
    order = [name for name in traffic.begun if name != "model"]
    assert order.index("red") < order.index(f"thing{3 * SLICE}")


def test_queue__words_are_embedded_while_the_model_is_busy(traffic: Traffic) -> None:
    first = traffic.ask("red")
    traffic.wait_for("model")
    long = traffic.ask(long_list(3 * SLICE), "green")
    mistake = traffic.ask(",;\n" * 10_000, "green")
    with pytest.raises(UserError, match="Type at least one class name"):
        mistake.result(60)
    traffic.wait_for(f"thing{2 * SLICE}")
    assert not first.done() and traffic.begun.count("model") == 1
    traffic.go.set()
    assert first.result(60)["detections"] and long.result(60)["classes"]


def test_queue__one_request_at_the_model_few_hold_pixels(traffic: Traffic, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(path: Path) -> np.ndarray:
        traffic.begun.append("pixels")
        return reads(path)

    reads = ovd.demo.answer._read
    monkeypatch.setattr("ovd.demo.answer._read", read)
    requests = [traffic.ask("red", name) for name in ("good", "green", "good", "green")]
    while traffic.begun.count("pixels") < MAX_DECODED or "model" not in traffic.begun:
        time.sleep(0.005)
    time.sleep(0.1)
    assert traffic.begun.count("model") == 1 and traffic.begun.count("pixels") == MAX_DECODED == 3
    traffic.go.set()
    answers = [one.result(60) for one in requests]
    assert traffic.begun.count("model") == 2 and sum(a["cached"] for a in answers) == 2


def test_queue__is_first_in_first_out(
    answerer: Answerer, pictures: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    at_the_model, may_end = list[str](), threading.Semaphore(0)
    run, words = answerer._run, [f"thing{number}" for number in range(8)]

    def one_at_a_time(*args: Any) -> Any:
        at_the_model.append(args[2].names[0])
        assert may_end.acquire(timeout=60)
        return run(*args)

    def until(reached: Callable[[], bool]) -> None:
        end = time.monotonic() + 60
        while not reached():
            assert time.monotonic() < end, at_the_model
            time.sleep(0.001)

    monkeypatch.setattr(answerer, "_run", one_at_a_time)
    model, slots = answerer._model._work_queue, answerer._decoded_slots
    with ThreadPoolExecutor(len(words)) as people:
        for number, word in enumerate(words, 1):
            people.submit(answerer.answer, pictures["good"], word)
            until(lambda: len(at_the_model) + model.qsize() + slots.waiting >= number)  # noqa: B023
        for answered in range(1, len(words) + 1):  # each step: one leaves, the next in the queue gets to the model
            may_end.release()
            until(lambda: len(at_the_model) + model.qsize() >= min(len(words), answered + MAX_DECODED))  # noqa: B023
    assert at_the_model == words


def test_queue__shutdown_is_reported_to_waiting_requests(traffic: Traffic) -> None:
    first = traffic.ask("red")
    traffic.wait_for("model")
    waiting = traffic.ask("blue", "green")
    while traffic.answerer._model._work_queue.qsize() == 0:
        time.sleep(0.005)
    closing = traffic.people.submit(traffic.answerer.close)
    with pytest.raises(UserError, match="shutting down"):
        waiting.result(60)
    traffic.go.set()
    closing.result(60)
    assert first.result(60)["detections"]
    with pytest.raises(UserError, match="shutting down"):
        traffic.answerer.answer(traffic.pictures["good"], "red")


def test_crops__pixel_limit_applies_before_decoding() -> None:
    def url(width: int, height: int) -> str:
        buffer = io.BytesIO()
        Image.new("1", (width, height)).save(buffer, "PNG")
        return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()

    with pytest.raises(UserError, match="'big' cannot be used: has 2001x2000 pixels, more than the limit of 4,000,000"):
        decode_examples([{"name": "big", "image": url(2001, 2000)}])
    fine = {"image": url(2000, 2000)}
    assert len(decode_examples([fine] * 6) or []) == 6
    with pytest.raises(UserError, match="25,000,000 pixels together"):
        decode_examples([fine] * 7)


@pytest.mark.parametrize("words", [["red"], 5, {"red": 1}])
def test_query__words_of_another_type_are_a_user_error(
    answerer: Answerer, pictures: dict[str, Path], words: object
) -> None:
    with pytest.raises(UserError, match="classes must be a string"):
        answerer.answer(pictures["good"], words)  # type: ignore[arg-type]


def test_examples__negatives_alone_are_refused(answerer: Answerer, pictures: dict[str, Path]) -> None:
    crop = {"name": "-red", "image": data_url(picture([("red", 0, 0, 40, 40)])[:40, :40])}
    with pytest.raises(UserError, match="Type at least one class name"):
        answerer.answer(pictures["good"], "", examples=[crop])
