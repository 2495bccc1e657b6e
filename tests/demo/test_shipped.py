# SPDX-License-Identifier: Apache-2.0
"""The page as a person starts it: ``python app.py`` with the shipped weights and the shipped examples."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from ovd.weights import read_manifest
from pretrain.engine.errors import UserError
from tests.demo.conftest import start
from tests.demo.test_page import Tab


def _shipped() -> bool:
    try:
        return "vild-photo" in read_manifest()
    except UserError:
        return False


pytestmark = [pytest.mark.browser, pytest.mark.skipif(not _shipped(), reason="no shipped detector in weights/")]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log = tmp_path_factory.mktemp("app") / "log.txt"
    process, url = start([sys.executable, "app.py", "--port", "0"], log)
    yield url
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    assert "Traceback" not in log.read_text()


def test_shipped__example_shows_boxes_of_typed_words(browser: Any, url: str) -> None:
    tab = Tab(browser.new_page(), url)
    tab.page.locator("#wordbox-examples tr.tr-body:visible").first.click()
    tab.page.locator(".wordbox-detections:not([hidden])").wait_for()
    tab.slide(float(tab.page.locator(".wordbox-threshold").get_attribute("min")))
    assert tab.boxes() >= 1
    assert "vild-photo" in tab.page.locator("#wordbox-header").inner_text()
    assert tab.page.locator(".wordbox-alert").is_hidden() and tab.errors == []
    # The other weights are loaded when they are first asked, and have examples of their own.
    tab.page.locator("#wordbox-header label", has_text="Drawings").click()
    assert "drawn stickers" in tab.page.locator("#wordbox-header").inner_text()
    tab.page.locator("#wordbox-examples tr.tr-body:visible").first.click()
    tab.page.locator(".wordbox-history li").nth(1).wait_for()
    tab.page.locator(".wordbox-masks-toggle").wait_for()  # which photographs' weights have not
    tab.page.close()


@pytest.mark.parametrize(("weights", "kind"), [("default", "photos"), ("vild-sticker", "stickers")])
def test_shipped__detector_finds_its_examples_objects(weights: str, kind: str) -> None:
    from ovd import Detector
    from ovd.demo.model_manager import kind_of
    from ovd.demo.page import EXAMPLES, shipped_examples

    detector = Detector.load(weights)
    assert kind_of(detector) == kind
    found = [len(detector.embed(e.picture).classify(e.classes)) for e in shipped_examples(EXAMPLES / kind)]
    assert sum(count > 0 for count in found) >= len(found) - 1, found
