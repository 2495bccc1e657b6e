# SPDX-License-Identifier: Apache-2.0
"""`python -m ovd.evaluate`: COCO metrics by base and novel categories, of a results file or of a model."""

from __future__ import annotations

import argparse
import hashlib
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.engine.errors import UserError, run_cli

if TYPE_CHECKING:
    from ovd.evaluation.coco import Metrics

EPILOG = """\
examples:
  python -m ovd.evaluate --annotations gt.json --predictions results.json --split ovcoco --out runs/eval
  python -m ovd.evaluate --annotations gt.json --predictions results.json          (no split: every category counts)
  python -m ovd.evaluate --weights default --data stickers-val:500
  python -m ovd.evaluate --weights default --data coco:images/:gt.json --split ovcoco

A split file is {"name": "mine", "base": [ids or names], "novel": [ids or names]}.
"""


def main(argv: list[str]) -> int:
    """Parse the arguments, evaluate, print the table, write the files; returns the exit status."""
    args = _parser().parse_args(argv)
    if args.predictions or args.annotations:
        if not (args.predictions and args.annotations):
            raise UserError("--annotations and --predictions belong together; give both.")
        evaluate_files(args, argv)
    else:
        raise UserError("give --annotations and --predictions; see python -m ovd.evaluate --help.")
    return 0


def evaluate_files(args: argparse.Namespace, argv: Sequence[str]) -> Metrics:
    """Part for anybody's results: `--annotations`, `--predictions`, `--split`."""
    from ovd.data.coco import check_ground_truth, read_json
    from ovd.data.splits import Split
    from ovd.evaluation import coco

    gt, results = read_json(args.annotations), read_json(args.predictions)
    where = (args.annotations, args.predictions)
    truth = check_ground_truth(gt, where=where[0])
    split = Split.load(args.split, categories=truth.categories) if args.split else None
    proposals = read_json(args.proposals) if args.proposals else None
    metrics = coco.evaluate(
        gt, results, split, args.iou_types, max_dets=args.max_dets, proposals=proposals, where=where
    )
    return _finish(metrics, args, argv, dataset_sha256=_file_sha256(args.annotations))


def _finish(
    metrics: Metrics, args: argparse.Namespace, argv: Sequence[str], *, dataset_sha256: str | None = None, **extra: Any
) -> Metrics:
    from ovd.evaluation import report

    if dataset_sha256:
        metrics.dataset_sha256 = dataset_sha256
    for warning in metrics.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    print(report.table(metrics))
    if args.out:
        command = ["python", "-m", "ovd.evaluate", *argv]
        try:
            paths = report.write(metrics, Path(args.out), command=command, extra=extra)
        except OSError as err:
            raise UserError(f"cannot write to {args.out}: {err.strerror}.") from err
        print("written: " + ", ".join(shlex.quote(str(p)) for p in paths))
    return metrics


def _file_sha256(path: str) -> str:
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise UserError(f"{message}; see python -m ovd.evaluate --help.")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m ovd.evaluate",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--annotations", metavar="GT.json", help="ground truth in COCO format")
    add("--predictions", metavar="RESULTS.json", help="detections in COCO's results format")
    add("--proposals", metavar="FILE.json", help="class-agnostic boxes with scores: AR is computed from these")
    add("--split", metavar="FILE|ovcoco|stickers", help="base and novel categories; default: all are base")
    add("--iou-types", nargs="+", choices=("bbox", "segm"), help="default: boxes, and masks if both files have them")
    add("--max-dets", type=_positive, default=100, help="detections per image and category for AP (default 100)")
    add("--out", metavar="DIR", help="write metrics.json and per_class.csv here")
    return parser


if __name__ == "__main__":
    run_cli(main)
