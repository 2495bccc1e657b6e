# SPDX-License-Identifier: Apache-2.0
"""Evaluate detections in COCO's results format by base and novel categories.

    python examples/evaluate_results.py
    python examples/evaluate_results.py gt.json results.json "dog, cat" "zebra"

The last two arguments name the base and the novel categories. Without arguments, two small pictures are evaluated.
"""

from __future__ import annotations

from typing import Any

from ovd.data.splits import Split
from ovd.evaluation.coco import evaluate
from ovd.evaluation.report import table
from pretrain.engine.errors import UserError, run_cli
from pretrain.engine.files import read_json


def toy() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """One dog and one zebra; the dog is boxed exactly, the zebra by half of its height (IoU .5)."""
    categories = [{"id": 1, "name": "dog"}, {"id": 2, "name": "zebra"}]
    images = [{"id": n, "width": 100, "height": 100, "file_name": f"{n}.jpg"} for n in (1, 2)]
    objects = [
        {"id": n, "image_id": n, "category_id": n, "bbox": [10, 10, 40, 40], "area": 1600, "iscrowd": 0} for n in (1, 2)
    ]
    results = [
        {"image_id": 1, "category_id": 1, "bbox": [10, 10, 40, 40], "score": 0.9},
        {"image_id": 2, "category_id": 2, "bbox": [10, 10, 40, 20], "score": 0.8},
    ]
    return {"images": images, "annotations": objects, "categories": categories}, results


def main(argv: list[str]) -> int:
    """Print the table of `python -m ovd.evaluate`, then one value by its key."""
    if len(argv) == 4:
        truth, results = (read_json(path) for path in argv[:2])
        base, novel = ([name.strip() for name in names.split(",")] for names in argv[2:])
    elif argv:
        raise UserError("give annotations, results, and the base and the novel names; or nothing, for the example")
    else:
        (truth, results), base, novel = toy(), ["dog"], ["zebra"]
    names = {category["id"]: category["name"] for category in truth["categories"]}
    split = Split.from_dict({"name": "mine", "base": base, "novel": novel}, categories=names)
    metrics = evaluate(truth, results, split)
    print(table(metrics))
    print(f"AP on novel categories: {metrics.values['bbox/AP_novel']:.3f}")
    return 0


if __name__ == "__main__":
    run_cli(main)
