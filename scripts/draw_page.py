# SPDX-License-Identifier: Apache-2.0
"""Photograph the page with the shipped weights, light and dark: the README's picture.

python scripts/draw_page.py --out docs/images          (needs playwright and a Chromium, as the browser tests do)
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Literal

from ovd.doctor import find_chromium

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "ovd" / "demo" / "examples" / "photos"
SCHEMES: tuple[tuple[str, Literal["light", "dark"]], ...] = (("page.png", "light"), ("page-dark.png", "dark"))
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


def photograph(url: str, out: Path, number: int) -> None:
    """Ask for an example's words on its picture in a real browser, and write page.png and page-dark.png."""
    from playwright.sync_api import sync_playwright

    example = json.loads((EXAMPLES / "examples.json").read_text(encoding="utf-8"))[number]
    chromium = find_chromium()
    if chromium is None:
        sys.exit("error: no Chromium on this machine (Debian: apt-get install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        for name, scheme in SCHEMES:
            page = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme=scheme)
            page.goto(url)
            page.locator("#ovd-image input[type=file]").set_input_files(str(EXAMPLES / example["picture"]))
            page.locator("#ovd-image img").first.wait_for()
            page.locator("#ovd-words textarea").fill(example["classes"])
            page.locator("#ovd-find").click()
            page.locator(".wordbox-detections:not([hidden])").wait_for(timeout=60_000)
            page.wait_for_timeout(500)  # until the boxes have faded in
            page.screenshot(path=str(out / name))
        browser.close()


def main(argv: list[str]) -> int:
    """Serve the page, photograph it, stop it; returns the exit status."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--out", type=Path, required=True, help="folder to write to")
    flags.add_argument("--example", type=int, default=0, help="number of the example in examples.json")
    args = flags.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(ROOT / "app.py"), "--port", "0"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            url = next((line for line in server.stdout if "http://" in line), "")
            if not url:
                sys.exit("error: the page did not start; try python app.py")
            photograph("http://" + url.split("http://")[1].split()[0], args.out, args.example)
        finally:
            server.terminate()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
