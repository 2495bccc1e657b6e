# SPDX-License-Identifier: Apache-2.0
"""What a person sees who types nothing: how much of what is shown is right, and how much is shown.

python benchmarks/everything.py --weights default --data coco:IMAGES:ANNOTATIONS.json

A box is right when it has an IoU of at least .5 with an object that no better box has taken, and its word means the
same as the object's category, or lies above or below it. It is wrong when its word is one of the categories, or when
it lies on an object (IoU .5) of something else. Any other box names what the annotations do not know: it is counted,
and nobody says whether it is right.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ovd.detections import Detections
from ovd.detector import Detector
from ovd.evaluation.options import DataSpec
from ovd.inference.known_words import WordList
from pretrain.data.lexicon import read_lexicon
from pretrain.engine.errors import UserError, run_cli
from pretrain.engine.files import read_json

IOU = 0.5


def overlaps(boxes_N4: NDArray[np.float32], others_M4: NDArray[np.float32]) -> NDArray[np.float32]:
    """(N, M) IoU of corners."""
    low = np.maximum(boxes_N4[:, None, :2], others_M4[None, :, :2])
    high = np.minimum(boxes_N4[:, None, 2:], others_M4[None, :, 2:])
    shared = np.clip(high - low, 0, None).prod(axis=2)
    area = [(b[:, 2:] - b[:, :2]).prod(axis=1) for b in (boxes_N4, others_M4)]
    return shared / np.maximum(area[0][:, None] + area[1][None] - shared, 1e-6)


class Judge:
    """Compares names by their meaning.

    Args:
        categories: of the annotations.
    """

    def __init__(self, categories: list[str]) -> None:
        self._words = WordList(words=tuple(categories), lexicon=read_lexicon())
        self._related: dict[str, NDArray[np.bool_]] = {}
        self.categories = frozenset(categories)

    def related(self, name: str) -> NDArray[np.bool_]:
        """Of each category whether the name means the same or something above or below it."""
        if name not in self._related:
            self._related[name] = self._words.relations([[name]]).related[0]
        return self._related[name]

    def outcomes(self, found: Detections, objects: list[tuple[int, list[float], bool]]) -> list[tuple[str, bool]]:
        """Of each box (outcome, whether it covers an object that counts), best first.

        Args:
            found: best first.
            objects: of the photo: category, x, y, width, height, whether a crowd.
        """
        corners = np.array([[x, y, x + w, y + h] for _, (x, y, w, h), _ in objects], dtype=np.float32).reshape(-1, 4)
        iou = overlaps(found.xyxy, corners)
        taken: set[int] = set()
        result = []
        for i, name in enumerate(found.class_name):
            on = [j for j in np.argsort(-iou[i]) if iou[i, j] >= IOU]
            right = [j for j in on if self.related(name)[objects[j][0]] and j not in taken]
            if right:
                crowd = objects[right[0]][2]
                if not crowd:
                    taken.add(right[0])
                result.append(("right", not crowd))
            else:
                result.append(("wrong" if on or name in self.categories else "not judged", False))
        return result


def main(argv: list[str]) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default="default", help="a name or a folder")
    parser.add_argument("--data", required=True, metavar="coco:IMAGES:ANNOTATIONS.json")
    parser.add_argument("--names", action="store_true", help="print what was found in each photo")
    args = parser.parse_args(argv)
    data = DataSpec.parse(args.data)
    if data.annotations is None or data.images is None:
        raise UserError(f"--data {args.data}: expected coco:IMAGES:ANNOTATIONS.json")
    truth: dict[str, Any] = read_json(data.annotations)
    number = {category["id"]: i for i, category in enumerate(truth["categories"])}
    judge = Judge([str(category["name"]) for category in truth["categories"]])
    objects: dict[int, list[tuple[int, list[float], bool]]] = {}
    for one in truth["annotations"]:
        objects.setdefault(one["image_id"], []).append(
            (number[one["category_id"]], one["bbox"], bool(one.get("iscrowd")))
        )
    detector = Detector.load(args.weights, cache_size=0)
    query = detector.query("everything")
    count: Counter[str] = Counter()
    for image in truth["images"]:
        found = detector.answer(Path(data.images) / image["file_name"], query)
        there = objects.get(image["id"], [])
        outcomes = judge.outcomes(found, there)
        count["shown"] += len(found)
        count["objects"] += sum(not crowd for _, _, crowd in there)
        count["found"] += sum(covers for _, covers in outcomes)
        count.update(outcome for outcome, _ in outcomes)
        others = [outcome for (outcome, _), name in zip(outcomes, found.class_name, strict=True)
                  if name not in judge.categories]  # fmt: skip
        count.update(f"other words, {outcome}" for outcome in others)
        if args.names:
            named = [f"{name} {outcome}" for name, (outcome, _) in zip(found.class_name, outcomes, strict=True)]
            print(f"{image['file_name']}: {', '.join(named)}")
    judged = max(1, count["right"] + count["wrong"])
    figures = {
        "shown boxes that are right": round(count["right"] / judged, 3),
        "objects that are shown": round(count["found"] / max(1, count["objects"]), 3),
        "boxes a photo": round(count["shown"] / max(1, len(truth["images"])), 2),
    }
    print(json.dumps(figures | dict(sorted(count.items())), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
