# SPDX-License-Identifier: Apache-2.0
"""What a person sees who types words for photos: how much is right, how much is found, how quiet absent words are.

python benchmarks/typed_photos.py --weights default --data coco:IMAGES:ANNOTATIONS.json

For each photo the words that are boxed in it and absent ones, ten in all; half of the absent words are those most
easily taken for a present one. Then AP50 of superordinate words (animal, vehicle, …), whose boxes are those of all
their kinds. Nothing is fitted here.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from ovd.data.photo_words import PhotoLabels
from ovd.data.splits import Split
from ovd.detector import Detector
from ovd.evaluation import coco
from ovd.evaluation.matching import match_table, shown_at
from ovd.evaluation.options import DataSpec
from ovd.evaluation.photo_calibration import measure, prepare
from ovd.evaluation.predictor import predictor_for
from ovd.evaluation.run import run_images
from ovd.inference.known_words import WordList
from pretrain.data.coco import check_ground_truth
from pretrain.data.lexicon import read_lexicon
from pretrain.engine.errors import UserError, run_cli
from pretrain.engine.files import read_json

SUPERORDINATE = (
    "animal", "mammal", "bird", "vehicle", "aircraft", "furniture", "seat", "food", "fruit", "vegetable", "tableware",
    "cutlery", "appliance", "electronics", "bag", "container", "sports equipment", "toy", "pet", "livestock",
)  # fmt: skip


def superordinate_truth(gt: dict[str, Any]) -> dict[str, Any]:
    """The annotations under superordinate words, each box under every word that it is a kind of."""
    names = [str(category["name"]) for category in gt["categories"]]
    words = WordList(words=tuple(names), lexicon=read_lexicon())
    kinds = words.relations([[word] for word in SUPERORDINATE]).same_or_below
    ids = [category["id"] for category in gt["categories"]]
    above: dict[int, list[int]] = {one: [] for one in ids}
    for number, row in enumerate(kinds.tolist(), 1):
        for one, is_kind in zip(ids, row, strict=True):
            if is_kind:
                above[one].append(number)
    annotations = [one | {"category_id": number} for one in gt["annotations"] for number in above[one["category_id"]]]
    return {
        "images": gt["images"],
        "annotations": [one | {"id": number} for number, one in enumerate(annotations, 1)],
        "categories": [{"id": number, "name": word} for number, word in enumerate(SUPERORDINATE, 1)],
    }


def main(argv: list[str]) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default="default", help="detector of photographs: a name or a folder")
    parser.add_argument("--data", required=True, metavar="coco:IMAGES:ANNOTATIONS.json")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    args = parser.parse_args(argv)
    data = DataSpec.parse(args.data)
    if data.annotations is None or data.images is None:
        raise UserError(f"--data {args.data}: expected coco:IMAGES:ANNOTATIONS.json")
    detector = Detector.load(args.weights, cache_size=1000)
    photos = PhotoLabels(
        folder=data.images,
        annotations=[data.annotations],
        labels=None,
        lexicon=read_lexicon(),
        part=None,
        min_score=0.0,
    )
    figures, _ = measure(prepare(detector, photos), detector.model.calibration)
    gt = superordinate_truth(read_json(data.annotations))
    split = Split.everything(check_ground_truth(gt).categories)
    results, _ = run_images(gt, data.images, predictor_for(detector, split))
    assert results is not None
    figures["superordinate_ap50"] = coco.evaluate(gt, results, split, ["bbox"]).values["bbox/AP50"]
    shown = shown_at(match_table(gt, results, split).values(), threshold=detector.threshold)
    figures["superordinate_precision_at_threshold"], figures["superordinate_recall_at_threshold"] = shown
    text = json.dumps(figures, indent=1)
    print(text)
    if args.json:
        args.json.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
