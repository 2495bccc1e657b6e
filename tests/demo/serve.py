# SPDX-License-Identifier: Apache-2.0
"""Serve the page with the colour detector: ``python -m tests.demo.serve FOLDER`` prints the URL and stays."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

from ovd.demo import request_queue
from ovd.demo.address import listen
from ovd.demo.gradio_environment import prepare_environment
from ovd.demo.page import PageExample, build_page, launch_page

SLOW = 68  # height of pictures that keep the model until FOLDER/go exists
ASKERS = 24  # whose messages are kept; the page keeps more


def main(folder: Path) -> None:
    request_queue.KEPT_SESSIONS = ASKERS
    request_queue.MAX_WAIT = 0.0  # the queue is as short as it gets
    prepare_environment(folder / "uploads")
    from PIL import Image

    from ovd.demo.answer import Answerer
    from ovd.demo.model_manager import ModelManager, Offer
    from tests.detector.fakes import make_detector, picture

    Image.fromarray(picture()).save(folder / "example.png")
    detector = make_detector()
    detector.card["text"] = "Flat rectangles only."
    network = detector.model.regions

    def regions(image):  # type: ignore[no-untyped-def]
        while image.shape[0] == SLOW and not (folder / "go").exists():  # as long as a test wants
            time.sleep(0.02)
        if image.shape[0] == 66:  # how a defect of the network looks to the page
            raise RuntimeError("secret detail")
        return network(image)

    detector.model.regions = regions
    strict = make_detector(threshold=0.5)
    strict.card = {"name": "strict-fake", "purpose": "Answers from .5.", "text": "Stricter."}
    offers = [Offer(name=d.card["name"], kind=kind, card=d.card, load=lambda d=d: d)  # type: ignore[misc]
              for d, kind in ((detector, "photos"), (strict, "stickers"))]  # fmt: skip
    manager = ModelManager(detector, {offer.name: offer for offer in offers})
    page = build_page(Answerer(manager=manager), examples=[PageExample(folder / "example.png", "red, blue, unicorn")])
    print(launch_page(page, listener=listen("127.0.0.1", 0)).url, flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
