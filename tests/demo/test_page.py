# SPDX-License-Identifier: Apache-2.0
"""The page in a real browser: what a person sees and can do, and that nothing leaves the machine."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from PIL import Image

from tests.demo.conftest import Server
from tests.detector.fakes import picture

pytestmark = pytest.mark.browser
EVIL = "<img src=x onerror=\"document.title='owned'\">"
FOUND = ".wordbox-detections:not([hidden])"


# Without smooth scrolling, which moves the page under the pointer while a test measures or points.
CONTEXT = {"viewport": {"width": 1280, "height": 900}, "reduced_motion": "reduce"}


class Tab:
    """A browser tab with the page open; remembers every request and every error."""

    def __init__(self, page: Any, url: str) -> None:
        self.page = page
        self.requests: list[str] = []
        self.errors: list[str] = []
        page.set_default_timeout(120_000)  # of a busy machine: only what fails takes so long
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.goto(url)
        page.wait_for_selector("#ovd-find")

    def find(self, image: Path | None, words: str, *, wait: str = FOUND) -> None:
        if image is not None:
            self.page.locator("#ovd-image input[type=file]").set_input_files(str(image))
            self.page.locator("#ovd-image img").first.wait_for()
        self.page.locator("#ovd-words textarea").fill(words)
        self.mark_answer()
        self.page.locator("#ovd-find").click()
        if wait == FOUND:
            self.wait_for_answer()
        else:
            self.page.locator(wait).wait_for()

    def mark_answer(self) -> None:
        """Mark the answer that is shown, for `wait_for_answer`: a new one is written over it."""
        self.page.locator(".wordbox-summary").evaluate("summary => summary.append(document.createElement('s'))")

    def wait_for_answer(self) -> None:
        """Until another answer than the marked one is shown, its picture is loaded and its boxes lie on it."""
        self.page.locator(FOUND).wait_for()
        self.page.locator(".wordbox-summary s").first.wait_for(state="detached")
        self.page.wait_for_function("""() => {
            const picture = document.querySelector(".wordbox-searched-picture");
            const { width } = document.querySelector(".wordbox-boxes").style;
            return picture.complete && picture.clientWidth > 0 && width === `${picture.clientWidth}px`;
        }""")

    def names(self) -> list[str]:
        return self.page.locator(".wordbox-detection-table tbody td:first-child").all_text_contents()

    def boxes(self) -> int:
        return self.page.locator(".wordbox-boxes .item").count()

    def query_count(self) -> int:
        return sum("/queue/join" in url for url in self.requests)

    def slide(self, level: float) -> None:
        self.page.locator(".wordbox-threshold").fill(str(level))


@pytest.fixture
def tab(browser: Any, server: Server, request: pytest.FixtureRequest) -> Iterator[Tab]:
    context = browser.new_context(**CONTEXT | getattr(request, "param", {}))
    tab = Tab(context.new_page(), server.url)
    yield tab
    outside = [u for u in tab.requests if urlsplit(u).scheme not in ("data", "blob") and
               urlsplit(u).hostname not in ("127.0.0.1", "localhost")]  # fmt: skip
    errors = tab.errors
    context.close()
    assert outside == [], "requests left the machine"
    assert errors == []


def test_page__words_give_boxes(tab: Tab, pictures: dict[str, Path]) -> None:
    assert tab.page.locator(".wordbox-placeholder").is_visible()
    tab.find(pictures["good"], "red, blue, unicorn")
    assert sorted(tab.names()) == ["blue", "red"] and tab.boxes() == 2
    assert "red × 1" in tab.page.locator(".wordbox-summary").inner_text()
    missing = tab.page.locator(".wordbox-not-found").inner_text()
    assert "unicorn not found at 0.30 or more; best score 0.0" in missing
    # The box lies where the rectangle is: 10, 20 to 50, 70 of 160 × 120.
    frame, red = tab.page.locator(".wordbox-searched-picture").bounding_box(), None
    for item in tab.page.locator(".wordbox-boxes .item").all():
        if item.get_attribute("aria-label").startswith("red"):
            red = item.locator(".edge").bounding_box()
    scale = frame["width"] / 160
    assert red["x"] - frame["x"] == pytest.approx(10 * scale, abs=3)
    assert red["y"] - frame["y"] == pytest.approx(20 * scale, abs=3)
    assert red["width"] == pytest.approx(40 * scale, abs=5)
    assert red["height"] == pytest.approx(50 * scale, abs=5)


def test_page__word_that_lost_its_box_to_another_is_not_called_missing(tab: Tab, pictures: dict[str, Path]) -> None:
    tab.find(pictures["good"], "red; crimson: red; unicorn")
    lines = tab.page.locator(".wordbox-not-found li").all_inner_texts()
    assert lines[0].startswith("crimson has no box of its own: where it scores best (1.00)")
    assert lines[1].startswith("unicorn not found at 0.30 or more")


def test_page__example_fills_in_and_runs(tab: Tab) -> None:
    tab.page.locator("#wordbox-examples tr.tr-body").first.click()
    tab.page.locator(".wordbox-boxes .item").first.wait_for()
    assert sorted(tab.names()) == ["blue", "red"]
    assert tab.page.locator("#ovd-words textarea").input_value() == "red, blue, unicorn"


def test_page__slider_and_toggles_send_no_request(tab: Tab, pictures: dict[str, Path]) -> None:
    tab.find(pictures["good"], "red, blue sea far away from here where nobody knows them yet")
    before = tab.query_count()
    total = tab.boxes()
    assert total == 2
    tab.slide(0.97)
    assert tab.boxes() == 1 and "not found at 0.97" in tab.page.locator(".wordbox-not-found").inner_text()
    tab.page.locator(".wordbox-show-best-guess").click()
    assert tab.boxes() == 2 and tab.page.locator(".wordbox-threshold-value").inner_text() == "0.92"
    tab.slide(0.05)
    assert tab.boxes() == 2 and tab.page.locator(".wordbox-threshold-value").inner_text() == "0.05"
    tab.page.locator(".wordbox-class-chip", has_text="blue").click()
    assert tab.names() == ["red"]
    assert tab.page.locator(".wordbox-class-chip", has_text="blue").get_attribute("aria-pressed") == "false"
    tab.page.locator(".wordbox-reset").click()
    assert len(tab.names()) == 2 and tab.page.locator(".wordbox-threshold-value").inner_text() == "0.30"
    assert tab.page.locator(".wordbox-boxes .mask").count() > 0
    tab.page.locator(".wordbox-show-masks").uncheck()
    assert tab.page.locator(".wordbox-boxes .mask").count() == 0
    tab.page.locator(".wordbox-show-labels").uncheck()
    assert tab.page.locator(".wordbox-boxes .tag").count() == 0
    assert tab.query_count() == before


def test_page__labels_are_at_their_boxes(tab: Tab, tmp_path: Path) -> None:
    """Such a picture does not fill its frame: it stands in the middle of it."""
    tall = picture([("red", 20, 150, 60, 190), ("blue", 60, 20, 110, 70)], size=(200, 120))
    Image.fromarray(tall).save(tmp_path / "tall.png")
    tab.find(tmp_path / "tall.png", "red, blue")
    gaps = tab.page.evaluate(
        """() => [...document.querySelectorAll(".wordbox-boxes .item")].map((item) => {
            const box = item.querySelector(".edge").getBoundingClientRect();
            const tag = item.querySelector(".tag").getBoundingClientRect();
            return [Math.max(box.top - tag.bottom, tag.top - box.bottom), tag.height];
        })"""
    )
    assert len(gaps) == 2 and all(gap <= 3 and 14 <= height <= 22 for gap, height in gaps)


def test_page__slider_keeps_its_position(tab: Tab, pictures: dict[str, Path]) -> None:
    tab.find(pictures["good"], "red")
    tab.slide(0.8)
    tab.find(None, "blue")
    assert tab.page.locator(".wordbox-threshold-value").inner_text() == "0.80"
    assert "picture remembered" in tab.page.locator(".wordbox-timing").inner_text()


def test_markup__in_a_class_name_is_text(tab: Tab, pictures: dict[str, Path]) -> None:
    tab.find(pictures["good"], f"red: {EVIL}\n{EVIL}: red\n-{EVIL} b\nblue, blue")
    assert EVIL in tab.page.locator(".wordbox-detections").inner_text()
    assert tab.page.locator(".wordbox-result-view img").count() == 1  # the picture
    assert tab.page.locator("img[src='x']").count() == 0
    assert tab.page.title() != "owned"
    assert not any(urlsplit(u).path.endswith("/x") for u in tab.requests)


def test_markup__in_an_error_is_text(tab: Tab, pictures: dict[str, Path]) -> None:
    tab.find(pictures["good"], EVIL * 3, wait=".wordbox-alert:not([hidden])")
    assert "<img src=x" in tab.page.locator(".wordbox-alert").inner_text()
    assert tab.page.locator("img[src='x']").count() == 0 and tab.page.title() != "owned"


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        (None, "red", "Choose a picture first"),
        ("good", "", "Type at least one class name, e.g. mug"),
        ("truncated", "red", "This picture cannot be used"),
        ("vector", "red", "This picture cannot be used"),
        ("bomb", "red", "6000x6000 pixels"),
        ("defect", "red", "The log has the details under"),
    ],
)
def test_page__error_then_success(
    tab: Tab, pictures: dict[str, Path], name: str | None, words: str, message: str
) -> None:
    tab.find(pictures[name] if name else None, words, wait=".wordbox-alert:not([hidden])")
    assert message in tab.page.locator(".wordbox-alert").inner_text()
    if name:
        tab.page.get_by_label("Remove Image").click()
    tab.find(pictures["good"], "red")
    assert tab.names() == ["red"] and tab.page.locator(".wordbox-alert").is_hidden()


def test_page__file_over_the_limit_is_refused(tab: Tab, pictures: dict[str, Path]) -> None:
    tab.page.locator("#ovd-image input[type=file]").set_input_files(str(pictures["huge"]))
    toast = tab.page.locator(".toast-body, [data-testid=toast-body]").first
    toast.wait_for()
    assert "10" in toast.inner_text()


def test_page__hovering_a_row_highlights_its_box(tab: Tab, pictures: dict[str, Path]) -> None:
    tab.find(pictures["good"], "red, blue")
    row = tab.page.locator(".wordbox-detection-table tbody tr").first
    index = row.get_attribute("data-i")
    row.hover()
    assert "on" in tab.page.locator(f".wordbox-boxes .item[data-i='{index}']").get_attribute("class").split()
    tab.page.locator(".wordbox-boxes .item .edge").last.hover()
    lit = tab.page.locator(".wordbox-boxes .item").last.get_attribute("data-i")
    assert "on" in tab.page.locator(f".wordbox-detection-table tr[data-i='{lit}']").get_attribute("class").split()


def test_keyboard__reaches_every_box(tab: Tab, pictures: dict[str, Path]) -> None:
    tab.find(pictures["good"], "red, blue")
    assert tab.page.locator(".wordbox-boxes .item[tabindex='0']").count() == 1
    tab.page.locator(".wordbox-boxes .item[tabindex='0']").focus()
    first = tab.page.evaluate("document.activeElement.getAttribute('aria-label')")
    tab.page.keyboard.press("ArrowRight")
    second = tab.page.evaluate("document.activeElement.getAttribute('aria-label')")
    assert {first.split(",")[0], second.split(",")[0]} == {"red", "blue"}
    assert "score" in first and any(word in first for word in ("left", "right", "centre"))
    tab.page.keyboard.press("Escape")
    assert tab.page.locator(".wordbox-boxes .item.on").count() == 0


def test_page__table_columns_sort(tab: Tab, pictures: dict[str, Path]) -> None:
    tab.find(pictures["good"], "red, blue")
    tab.page.locator("th button", has_text="Class").click()
    assert tab.names() == ["blue", "red"]
    tab.page.locator("th button", has_text="Class").click()
    assert tab.names() == ["red", "blue"]
    assert tab.page.locator("th", has_text="Class").get_attribute("aria-sort") == "descending"


def test_downloads__contain_what_is_shown(tab: Tab, pictures: dict[str, Path], tmp_path: Path) -> None:
    tab.find(pictures["good"], "red, blue, =danger: green")
    tab.page.locator(".wordbox-class-chip", has_text="blue").click()
    saved = {}
    for kind in ("png", "json", "csv"):
        with tab.page.expect_download() as download:
            tab.page.locator(f"[data-save={kind}]").click()
        saved[kind] = tmp_path / f"saved.{kind}"
        download.value.save_as(saved[kind])
    assert Image.open(saved["png"]).size == (160, 120)
    data = json.loads(saved["json"].read_text())
    names = {c["id"]: c["name"] for c in data["categories"]}
    shown = [names[a["category_id"]] for a in data["annotations"]]
    assert "red" in shown and "blue" not in shown
    red = data["annotations"][shown.index("red")]
    assert red["bbox"] == [10, 20, 40, 50] and red["segmentation"] and data["images"][0]["width"] == 160
    rows = list(csv.DictReader(saved["csv"].read_text(encoding="utf-8-sig").splitlines()))
    assert [r["class"].lstrip("'") for r in rows] == shown
    assert all(not r["class"].startswith("=") for r in rows)


def test_downloads__coco_loads_in_pycocotools(tab: Tab, pictures: dict[str, Path], tmp_path: Path) -> None:
    from pycocotools.coco import COCO

    tab.find(pictures["good"], "red, blue")
    with tab.page.expect_download() as download:
        tab.page.locator("[data-save=json]").click()
    download.value.save_as(tmp_path / "saved.json")
    coco = COCO(str(tmp_path / "saved.json"))
    red = next(a for a in coco.dataset["annotations"] if coco.cats[a["category_id"]]["name"] == "red")
    mask = coco.annToMask(red)
    assert mask.shape == (120, 160) and abs(int(mask.sum()) - 2000) < 150


def test_page__shows_the_model_card(tab: Tab) -> None:
    card = tab.page.locator("#wordbox-card")
    card.get_by_text("colour-fake").wait_for()
    assert "Tests only." in tab.page.locator("#wordbox-header").inner_text()
    assert "0" * 64 in card.inner_text() and "Flat rectangles only." in card.inner_text()


def drag(tab: Tab, x1: float, y1: float, x2: float, y2: float) -> None:
    """Drag a box, in pixels of the 160 × 120 picture."""
    tab.page.locator(".wordbox-drawing-layer").hover()  # which waits until it stands still
    at = tab.page.locator(".wordbox-drawing-layer").bounding_box()
    scale = at["width"] / 160
    tab.page.mouse.move(at["x"] + x1 * scale, at["y"] + y1 * scale)
    tab.page.mouse.down()
    tab.page.mouse.move(at["x"] + x2 * scale, at["y"] + y2 * scale, steps=4)
    tab.page.mouse.up()


def test_page__drawn_box_searches_this_and_the_next_picture(tab: Tab, pictures: dict[str, Path]) -> None:
    upload = tab.page.locator("#ovd-image input[type=file]")
    upload.set_input_files(str(pictures["good"]))
    drag(tab, 12, 22, 15, 60)
    assert "3×38 pixels" in tab.page.locator(".wordbox-example-search-status").inner_text()
    drag(tab, 83, 33, 147, 107)  # inside the blue rectangle
    tab.page.locator(".wordbox-crops li").wait_for()
    tab.find(None, "")
    assert tab.names() == ["example 1"] and tab.boxes() == 1
    tab.page.locator(".wordbox-crops input").fill("my thing")
    tab.find(None, "red, unicorn")
    assert sorted(tab.names()) == ["my thing", "red"]
    frame = tab.page.locator(".wordbox-searched-picture").bounding_box()
    item = next(
        i for i in tab.page.locator(".wordbox-boxes .item").all() if "my thing" in i.get_attribute("aria-label")
    )
    blue = item.locator(".edge").bounding_box()
    assert (blue["x"] - frame["x"]) * 160 / frame["width"] == pytest.approx(80, abs=2)
    # The crop is still there for another picture, and gone when it is removed.
    tab.page.get_by_label("Remove Image").click()
    tab.find(pictures["green"], "")
    assert "my thing" in tab.page.locator(".wordbox-not-found").inner_text()
    tab.page.get_by_label("Remove my thing").click()
    tab.page.locator("#ovd-find").click()
    tab.page.locator(".wordbox-alert", has_text="Type at least one class").wait_for()


def test_crops__upload_is_named_by_its_file(tab: Tab, pictures: dict[str, Path], tmp_path: Path) -> None:
    crop = tmp_path / "sky.png"
    Image.new("RGB", (40, 40), (40, 70, 220)).save(crop)
    chooser = tab.page.locator(".wordbox-crop-file")
    chooser.set_input_files([str(crop), str(pictures["vector"])])
    tab.page.locator(".wordbox-example-search-status", has_text="vector.svg cannot be read").wait_for()
    assert tab.page.locator(".wordbox-crops input").input_value() == "sky"
    tab.page.locator(".wordbox-crops input").fill(EVIL)
    tab.find(pictures["good"], "red")
    assert EVIL in tab.names() and tab.page.title() != "owned"
    # A click on one of the page's examples searches for its words alone.
    tab.page.locator("#wordbox-examples tr.tr-body").first.click()
    tab.page.locator(".wordbox-not-found", has_text="unicorn").wait_for()
    assert tab.page.locator(".wordbox-crops li").count() == 0 and sorted(tab.names()) == ["blue", "red"]


@pytest.mark.parametrize("tab", [{"reduced_motion": "no-preference"}, {"color_scheme": "dark"}], indirect=True)
def test_page__phone_needs_no_sideways_scrolling(tab: Tab, pictures: dict[str, Path]) -> None:
    tab.page.set_viewport_size({"width": 400, "height": 800})
    tab.find(pictures["good"], "red, blue, " + "w" * 100)
    assert tab.page.evaluate("document.documentElement.scrollWidth") <= 400
    tab.page.wait_for_function(
        "document.querySelector('.wordbox-viewport').getBoundingClientRect().top < 400"
    )  # scrolled to
