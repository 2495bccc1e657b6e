# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning on few labelled photos: AP50 on the last fifth of a data set, by how many of the others were learned.

python benchmarks/own_photos.py IMAGES ANNOTATIONS.json --photos 29 73 --seeds 0 1 2

Every run is the product's own: `configs/photos/finetune.yaml` on photos that the seed draws from the first four fifths,
then the exported detector, asked for all classes by their names. Also: what it shows at its default threshold. Runs
that are finished are not repeated.

With ``--start imagenet`` boxes without names are learned from the same photos on ImageNet's frozen network, as
`configs/photos/lite_ovcoco_proposals.yaml` does, and AP50 is that of any class.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from _common import machine
from numpy.typing import NDArray

from ovd.data.finetune_photos import draw_photos
from ovd.data.splits import Split
from ovd.detections import CocoResult
from ovd.detector import Detector
from ovd.evaluation import coco
from ovd.evaluation.matching import match_table, shown_at
from ovd.evaluation.predictor import coco_result, predictor_for
from ovd.evaluation.run import run_images
from ovd.modeling.proposals.build import load_proposals
from ovd.train import main as train
from pretrain.data.coco import check_ground_truth
from pretrain.data.coco_entries import ImageId
from pretrain.engine.errors import run_cli
from pretrain.engine.files import read_json, write_atomically

MAX_DETECTIONS = 100  # per photo that are evaluated


def parts_of(gt: dict[str, Any], classes: list[str] | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """(first four fifths, last fifth) of a file's images with their annotations; only some classes where named."""
    categories = [one for one in gt["categories"] if classes is None or one["name"] in classes]
    ids = {one["id"] for one in categories}
    first = round(0.8 * len(gt["images"]))
    out = []
    for images in (gt["images"][:first], gt["images"][first:]):
        there = {image["id"] for image in images}
        boxes = [one for one in gt["annotations"] if one["image_id"] in there and one["category_id"] in ids]
        out.append({"images": images, "annotations": boxes, "categories": categories})
    return out[0], out[1]


def any_class_ap50(test: dict[str, Any], results: list[CocoResult]) -> float:
    """AP50 of boxes, whatever they are named."""
    return coco.evaluate(*coco.as_one_category(test, results), None, ["bbox"]).values["bbox/AP50"]


def measure(weights: Path, test: dict[str, Any], images: Path) -> dict[str, float]:
    """What a detector finds of the classes in photos that it never saw."""
    detector = Detector.load(weights)
    split = Split.everything(check_ground_truth(test).categories)
    results, _ = run_images(test, images, predictor_for(detector, split))
    assert results is not None
    figures = {"ap50": coco.evaluate(test, results, split, ["bbox"]).values["bbox/AP50"]}
    figures["ap50_any_class"] = any_class_ap50(test, results)
    shown = shown_at(match_table(test, results, split).values(), threshold=detector.threshold)
    figures["shown_right"], figures["objects_shown"] = shown
    return figures


def drawn_labels(labels: dict[str, Any], count: int, *, seed: int) -> dict[str, Any]:
    """The photos that fine-tuning draws with this seed, as a file of their own."""
    images = [labels["images"][index] for index in draw_photos(len(labels["images"]), limit=count, seed=seed)]
    there = {image["id"] for image in images}
    return {
        **labels,
        "images": images,
        "annotations": [one for one in labels["annotations"] if one["image_id"] in there],
    }


def measure_boxes(proposals: Path, test: dict[str, Any], images: Path) -> dict[str, float]:
    """AP50 of class-agnostic proposals, any class."""
    proposer = load_proposals(proposals)

    def propose(image: NDArray[np.uint8], image_id: ImageId) -> list[CocoResult]:
        boxes, scores = proposer.propose(image, top=MAX_DETECTIONS)
        rows = zip(boxes.tolist(), scores.tolist(), strict=True)
        return [coco_result(box, image_id, 1, score) for box, score in rows]

    _, results = run_images(test, images, None, propose=propose)
    assert results is not None
    return {"ap50_any_class": any_class_ap50(test, results)}


def train_and_measure(
    start: str, count: int, *, seed: int, out: Path, learned: Path, test: dict[str, Any], args: argparse.Namespace
) -> dict[str, float]:
    """One training, and the figures of its export."""
    shared = [f"out={out}", f"data.images={args.images}", f"loop.seed={seed}", *args.set, "--overwrite"]
    if start == "vild-photo":
        limits = [f"data.annotations={learned}", f"data.images_limit={count}"]
        train(["--config", "photos/finetune.yaml", *limits, *shared])
        return measure(out / "exported", test, args.images)
    labels = out.with_name(f"{out.name}_labels.json")
    write_atomically(labels, json.dumps(drawn_labels(read_json(learned), count, seed=seed)).encode())
    data = [f"data.annotations=[{labels}]", "data.part=null"]
    train(["--config", "photos/lite_ovcoco_proposals.yaml", *data, *shared])
    return measure_boxes(out / "exported", test, args.images)


def row_of(count: int, rows: list[dict[str, float]]) -> str:
    """One line of the table: mean and deviation of several seeds, in percent."""
    cells = []
    for name in ("ap50", "ap50_any_class", "shown_right", "objects_shown"):
        values = [100 * row[name] for row in rows if name in row]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        cells.append(f"{statistics.mean(values):>6.1f} ± {spread:<4.1f}" if values else f"{'':>13}")
    return f"{count:>6} {' '.join(cells)} {statistics.mean(row['minutes'] for row in rows):>8.1f}"


def main(argv: list[str]) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path)
    parser.add_argument("annotations", type=Path)
    parser.add_argument(
        "--photos", type=int, nargs="+", default=[29, 73], help="how many are learned, held-out included"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--start", choices=("vild-photo", "imagenet"), default="vild-photo")
    parser.add_argument("--classes", nargs="+", help="only these (default: all)")
    parser.add_argument("--out", type=Path, default=Path("runs/own_photos"))
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="of the configuration")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    learned, test = parts_of(read_json(args.annotations), args.classes)
    labels = args.out / "learned.json"
    write_atomically(labels, json.dumps(learned).encode())
    print(json.dumps(machine()))
    print(f"{'photos':>6} {'AP50':>13} {'any class':>13} {'right/shown':>13} {'shown/all':>13} {'minutes':>8}")
    prefix = "" if args.start == "vild-photo" else f"{args.start}_"
    for count in args.photos:
        rows = []
        for seed in args.seeds:
            out = args.out / f"{prefix}{count}_{seed}"
            record = args.out / f"{out.name}.json"
            if not record.is_file():
                begun = time.perf_counter()
                figures = train_and_measure(args.start, count, seed=seed, out=out, learned=labels, test=test, args=args)
                minutes = (time.perf_counter() - begun) / 60
                write_atomically(record, json.dumps(figures | {"minutes": minutes}, indent=1).encode())
            rows.append(read_json(record))
        print(row_of(count, rows), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
