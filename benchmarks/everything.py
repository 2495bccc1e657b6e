# SPDX-License-Identifier: Apache-2.0
"""What a person sees who types nothing: how much of what is shown is right, and how much is shown.

python benchmarks/everything.py --weights default --data coco:IMAGES:ANNOTATIONS.json

Which boxes are right and which wrong: `ovd.evaluation.prompt_free`. Any other box names what the annotations do not
know: it is counted, and nobody says whether it is right.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from ovd.detector import Detector
from ovd.evaluation.options import DataSpec
from ovd.evaluation.prompt_free import Judge
from pretrain.engine.errors import UserError, run_cli
from pretrain.engine.files import read_json

OUTCOMES = {True: "right", False: "wrong", None: "not judged"}


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
    objects: dict[int, list[dict[str, Any]]] = {}
    for one in truth["annotations"]:
        objects.setdefault(one["image_id"], []).append(one)
    detector = Detector.load(args.weights, cache_size=0)
    query = detector.query("everything")
    count: Counter[str] = Counter()
    for image in truth["images"]:
        found = detector.answer(Path(data.images) / image["file_name"], query)
        there = objects.get(image["id"], [])
        boxes = np.array([one["bbox"] for one in there], dtype=np.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        crowd = np.array([bool(one.get("iscrowd")) for one in there], dtype=bool)
        classes = np.array([number[one["category_id"]] for one in there], dtype=np.int64)
        verdicts = judge.verdicts(found, boxes, classes, crowd_M=crowd)
        outcomes = [OUTCOMES[verdict.right] for verdict in verdicts]
        count["shown"] += len(found)
        count["objects"] += int((~crowd).sum())
        count["found"] += sum(verdict.right is True and not crowd[verdict.label] for verdict in verdicts)
        count.update(outcomes)
        others = [outcome for outcome, name in zip(outcomes, found.class_name, strict=True)
                  if name not in judge.always_labelled]  # fmt: skip
        count.update(f"other words, {outcome}" for outcome in others)
        if args.names:
            named = [f"{name} {outcome}" for name, outcome in zip(found.class_name, outcomes, strict=True)]
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
