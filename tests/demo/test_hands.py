# SPDX-License-Identifier: Apache-2.0
"""The page in people's hands: everything, history, links, keys, zoom, why, other weights, many pictures, axe-core."""

from __future__ import annotations

import importlib.util
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.demo.conftest import Server
from tests.demo.test_page import CONTEXT, EVIL, Tab

pytestmark = pytest.mark.browser


@pytest.fixture
def tab(browser: Any, server: Server, request: pytest.FixtureRequest) -> Iterator[Tab]:
    context = browser.new_context(**CONTEXT | getattr(request, "param", {}))
    tab = Tab(context.new_page(), server.url)
    yield tab
    errors = tab.errors
    context.close()
    assert errors == []


def past(tab: Tab, count: int) -> list[str]:
    """Words of the history, once it has this many entries; the last one first."""
    tab.page.locator(".wordbox-history li").nth(count - 1).wait_for()
    return [text.strip() for text in tab.page.locator(".wordbox-history .words").all_inner_texts()]


def test_everything__button_needs_no_words(tab: Tab, pictures: dict[str, Path]) -> None:
    tab.page.locator("#ovd-image input[type=file]").set_input_files(str(pictures["good"]))
    tab.page.locator("#ovd-image img").first.wait_for()
    tab.page.locator("#wordbox-everything").click()
    tab.page.locator(".wordbox-detections:not([hidden])").wait_for()
    assert sorted(tab.names()) == ["blue", "red"]
    assert tab.page.locator(".wordbox-not-found li").count() == 0  # "unicorn" is among its words, but was not typed


def test_history__restores_words_and_picture(tab: Tab, pictures: dict[str, Path]) -> None:
    tab.find(pictures["good"], "red\nblue")
    assert tab.page.locator(".wordbox-history").is_hidden()
    tab.page.get_by_label("Remove Image").click()
    tab.find(pictures["green"], f"green, {EVIL}")
    assert past(tab, 2) == [f"green, {EVIL}", "red, blue"]
    before = tab.query_count()
    tab.page.locator(".wordbox-history button").nth(1).click()
    tab.page.locator(".wordbox-class-chip", has_text="red").wait_for()
    assert tab.page.locator("#ovd-words textarea").input_value() == "red\nblue" and tab.query_count() == before
    assert tab.page.locator(".wordbox-history [aria-current]").inner_text().startswith("red, blue")
    tab.page.wait_for_function("document.querySelector('#ovd-image img')?.src.includes('good.png')")
    tab.page.locator(".wordbox-copy-link").click()
    tab.page.wait_for_function("location.hash.includes('words')")
    assert "words=red%0Ablue" in tab.page.url
    tab.find(None, "blue")
    assert past(tab, 3) == ["blue", f"green, {EVIL}", "red, blue"] and tab.page.title() != "owned"


def test_link__repeats_the_query_on_an_example(tab: Tab, server: Server) -> None:
    tab.page.locator("#wordbox-examples tr.tr-body:visible").first.click()
    tab.page.locator(".wordbox-boxes .item").first.wait_for()
    tab.find(None, "blue: sky; red")
    tab.slide(0.4)
    tab.page.locator(".wordbox-copy-link").click()
    tab.page.wait_for_function("location.hash.includes('words')")
    link = tab.page.url
    assert (
        "example=example.png" in link
        and "from=0.40" in link
        and "Your picture" not in tab.page.locator(".wordbox-action-status").inner_text()
    )
    again = tab.page.context.new_page()
    again.goto(link)
    again.locator(".wordbox-class-chip", has_text="red").wait_for()
    assert again.locator("#ovd-words textarea").input_value() == "blue: sky; red"
    assert again.locator(".wordbox-threshold-value").inner_text() == "0.40"


def test_link__contains_no_uploaded_picture(tab: Tab, pictures: dict[str, Path]) -> None:
    tab.find(pictures["green"], "red, <b>x</b>")
    tab.page.locator(".wordbox-copy-link").click()
    tab.page.locator(".wordbox-action-status", has_text="does not contain your picture").wait_for()
    link = tab.page.url
    assert "green" not in link and "example" not in link
    again = tab.page.context.new_page()
    again.goto(link)
    again.locator(".wordbox-placeholder", has_text="but no picture").wait_for()
    assert again.locator("#ovd-words textarea").input_value() == "red, <b>x</b>"


def test_keyboard__enter_finds_and_shift_enter_breaks_the_line(tab: Tab, pictures: dict[str, Path]) -> None:
    tab.page.locator("#ovd-image input[type=file]").set_input_files(str(pictures["good"]))
    tab.page.locator("#ovd-image img").first.wait_for()
    words = tab.page.locator("#ovd-words textarea")
    words.click()
    tab.page.keyboard.type("red")
    tab.page.keyboard.press("Shift+Enter")
    tab.page.keyboard.type("blue")
    assert words.input_value() == "red\nblue" and tab.query_count() == 0
    tab.page.keyboard.press("Enter")
    tab.page.locator(".wordbox-detections:not([hidden])").wait_for()
    assert sorted(tab.names()) == ["blue", "red"] and tab.query_count() == 1


def test_keyboard__arrows_follow_the_table_and_show_nearest_words(tab: Tab, pictures: dict[str, Path]) -> None:
    tab.find(pictures["good"], "red, blue")
    tab.page.locator("th button", has_text="Class").click()
    tab.page.locator(".wordbox-boxes .item[tabindex='0']").focus()
    names = []
    for _ in range(3):
        names.append(tab.page.locator(".wordbox-explanation b").inner_text())
        tab.page.keyboard.press("ArrowRight")
    assert names[1] != names[0] == names[2]
    assert tab.page.locator(".wordbox-explanation").inner_text().startswith(f"{names[1]} ")
    tab.page.keyboard.press("Escape")
    assert tab.page.locator(".wordbox-explanation b").count() == 0
    # A click keeps a box, and a second one lets it go.
    box = tab.page.locator(".wordbox-boxes .item .edge").last
    box.click()
    assert tab.page.locator(".wordbox-boxes .item.on").count() == 1
    box.click()
    tab.page.mouse.move(0, 0)
    assert tab.page.locator(".wordbox-boxes .item.on").count() == 0


@pytest.mark.parametrize("width", [1280, 360])
def test_zoom__enlarges_boxes_too_and_mouse_pans(
    tab: Tab, pictures: dict[str, Path], tmp_path: Path, width: int
) -> None:
    tab.page.set_viewport_size({"width": width, "height": 900})
    with Image.open(pictures["good"]) as small:  # as wide as the page, at both widths
        small.resize((1280, 960)).save(tmp_path / "large.png")
    tab.find(tmp_path / "large.png", "red, blue")
    stage = tab.page.locator(".wordbox-viewport")

    def place(name: str) -> dict[str, float]:
        """Of a part within the stage: a narrow page scrolls to its result meanwhile."""
        script = """([part, stage]) => {
            const one = document.querySelector(part).getBoundingClientRect(), all = stage.getBoundingClientRect();
            return { x: one.x - all.x, y: one.y - all.y, width: one.width, height: all.height };
        }"""
        return tab.page.evaluate(script, [name, stage.element_handle()])

    picture = ".wordbox-searched-picture"
    before = place(picture)
    tab.page.locator("[data-zoom=in]").click()
    tab.page.locator("[data-zoom=in]").click()
    after = place(picture)
    assert after["width"] == pytest.approx(before["width"] * 2.25, abs=2)
    assert after["height"] == pytest.approx(before["height"], abs=2)  # the stage's: nothing below it moves
    boxes = place(".wordbox-boxes")
    assert (boxes["width"], boxes["x"]) == (pytest.approx(after["width"], abs=1), pytest.approx(after["x"], abs=1))
    frame = stage.bounding_box()
    x, y = frame["x"] + frame["width"] / 2, frame["y"] + frame["height"] / 2
    tab.page.mouse.move(x, y)
    tab.page.mouse.down()
    tab.page.mouse.move(x - 60, y - 30, steps=4)
    tab.page.mouse.up()
    moved = place(picture)
    assert (moved["x"] - after["x"], moved["y"] - after["y"]) == (pytest.approx(-60, abs=2), pytest.approx(-30, abs=2))
    at_once = """(button, [part, stage]) => {
        button.click();
        return document.querySelector(part).getBoundingClientRect().x - stage.getBoundingClientRect().x;
    }"""
    fit = tab.page.locator("[data-zoom=fit]")
    assert fit.evaluate(at_once, [picture, stage.element_handle()]) == before["x"]  # before the boxes follow
    assert place(picture) == before and fit.is_disabled()


def test_weights__choice_switches_the_detector(tab: Tab, pictures: dict[str, Path]) -> None:
    tab.page.locator("#wordbox-header label", has_text="Drawings").click()
    assert "Answers from .5." in tab.page.locator("#wordbox-header").inner_text()
    assert "Stricter." in tab.page.locator("#wordbox-card").inner_text()
    assert not tab.page.locator("#wordbox-examples tr").first.is_visible()  # they have none
    tab.find(pictures["good"], "red")
    assert tab.page.locator(".wordbox-threshold-value").inner_text() == "0.50"
    tab.page.locator("#wordbox-header label", has_text="Photographs").click()
    tab.page.locator("#ovd-find").click()
    past(tab, 2)
    assert tab.page.locator(".wordbox-threshold-value").inner_text() == "0.30"
    tab.page.locator(".wordbox-history button").nth(1).click()
    assert tab.page.locator("#wordbox-header input:checked").get_attribute("value") == "strict-fake"


def test_many_pictures__become_one_zip(tab: Tab, pictures: dict[str, Path], tmp_path: Path) -> None:
    tab.page.get_by_role("button", name="Many pictures at once").click()
    tab.page.locator("#ovd-words textarea").fill("red, blue, green")
    files = [str(pictures[name]) for name in ("good", "green", "huge", "truncated")]
    tab.page.locator(".wordbox-batch-file").set_input_files(files)
    tab.page.locator(".wordbox-batch-start").click()
    tab.page.locator(".wordbox-batch-results:not([hidden])").wait_for()
    rows = tab.page.locator(".wordbox-batch-pictures li").all_inner_texts()
    assert ["red × 1" in rows[0], "green × 1" in rows[1], "10 MB" in rows[2], "cannot be used" in rows[3]] == [True] * 4
    assert "3 boxes in 2 pictures. 2 could not be used." in tab.page.locator(".wordbox-batch-status").inner_text()
    tab.page.locator(".wordbox-batch-format").select_option("coco")
    with tab.page.expect_download() as download:
        tab.page.locator(".wordbox-batch-download").click()
    download.value.save_as(tmp_path / "labels.zip")
    archive = zipfile.ZipFile(tmp_path / "labels.zip")
    content = json.loads(archive.read(archive.namelist()[0]))
    assert [image["file_name"].split("/")[-1] for image in content["images"]] == ["good.png", "green.png"]
    assert [10, 20, 40, 50] in [a["bbox"] for a in content["annotations"]]


@pytest.mark.parametrize("tab", [{"color_scheme": "light"}, {"color_scheme": "dark"}], indirect=True)
@pytest.mark.parametrize("width", [1280, 360])
def test_accessibility__axe_finds_nothing_serious(tab: Tab, pictures: dict[str, Path], width: int) -> None:
    package = importlib.util.find_spec("axe_playwright_python")
    if package is None or not package.submodule_search_locations:
        pytest.skip("axe-core is not installed (pip install axe-playwright-python)")
    script = Path(package.submodule_search_locations[0], "axe.min.js").read_text(encoding="utf-8")

    def serious(state: str) -> list[str]:
        tab.page.evaluate(script)
        found: list[str] = []
        for _ in range(20):  # Gradio pales a part while its answer is on the way: only what stays is a finding
            violations = tab.page.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
            found = [
                f"{state}: {v['id']} {v['nodes'][0]['html']}"
                for v in violations
                if v["impact"] in ("serious", "critical")
            ]
            if not found:
                break
            tab.page.wait_for_timeout(1000)
        return found

    tab.page.set_viewport_size({"width": width, "height": 800})
    problems = serious("empty")
    tab.find(None, "red", wait=".wordbox-alert:not([hidden])")
    problems += serious("error")
    tab.find(pictures["good"], "red, blue, unicorn, " + "w" * 90)
    tab.find(None, "everything")
    past(tab, 2)
    tab.page.locator(".wordbox-boxes .item .edge").last.click()
    tab.page.locator("[data-zoom=in]").click()
    tab.page.get_by_role("button", name="Many pictures at once").click()
    tab.page.locator(".wordbox-batch-file").set_input_files([str(pictures["good"])] * 1)
    tab.page.locator(".wordbox-batch-pictures li").wait_for()
    problems += serious("result")
    assert problems == []
    assert tab.page.evaluate("document.documentElement.scrollWidth") <= width
