# SPDX-License-Identifier: Apache-2.0
"""`python -m ovd.evaluate`: COCO metrics by base and novel categories, of a results file or of a model.

The flags are in `ovd.evaluation.options`, running a model in `ovd.evaluation.model`.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ovd.evaluation.options import EvaluationOptions
from pretrain.engine.errors import UserError, run_cli, warn
from pretrain.engine.files import read_json, require_writable, sha256_of, write_atomically

if TYPE_CHECKING:
    from ovd.evaluation.coco import Metrics
    from ovd.evaluation.compare import Difference
    from pretrain.data.coco_entries import CocoJson


def main(argv: list[str]) -> int:
    """Parse the arguments, evaluate, print the table, write the files; returns the exit status."""
    options = EvaluationOptions.parse(argv)
    if options.out:
        require_writable(Path(options.out))  # now, not after the last picture
    if options.plots:
        require_writable(Path(options.plots))
    (evaluate_model if options.weights else evaluate_files)(options, argv)
    return 0


def evaluate_files(options: EvaluationOptions, argv: Sequence[str]) -> Metrics:
    """Evaluate anybody's results: `--annotations`, `--predictions`, `--split`."""
    from ovd.data.lvis import split_of
    from ovd.evaluation import coco, report
    from ovd.evaluation.lvis import evaluate_lvis
    from ovd.evaluation.reliability import json_safe

    assert options.annotations is not None and options.predictions is not None
    gt, results = _ground_truth(options.annotations), read_json(options.predictions)
    proposals = read_json(options.proposals) if options.proposals else None
    compared: Any = read_json(options.compare) if options.compare else None
    where = (options.annotations, options.predictions)
    split = split_of(options.split, gt, where=where[0]) if options.split else None
    if _federated(options, gt):
        metrics = evaluate_lvis(gt, results, split, options.iou_types, proposals=proposals, where=where)
    else:
        metrics = coco.evaluate(
            gt, results, split, options.iou_types, max_dets=options.max_dets, proposals=proposals, where=where
        )
    record: dict[str, object] = {}
    if options.compare:
        differences, kind = _differences(options, gt, results, compared, metrics)
        print(f"AP50 ({kind}) against {options.compare}, with a 95 % interval over resampled images:")
        for group, d in differences.items():
            print(f"{group:8}" + report.difference_line(d))
        print()
        record["compare"] = {"file": options.compare, "kind": kind} | {
            g: json_safe(asdict(d)) for g, d in differences.items()
        }
    path = Path(options.annotations)
    metrics.dataset_sha256 = sha256_of(path) if path.is_file() else coco.content_sha256(gt)
    _report(metrics, options, argv, record)
    _draw(metrics, options, gt, results, options.predictions)
    return metrics


def evaluate_model(options: EvaluationOptions, argv: Sequence[str]) -> Metrics:
    """Run the detector of `--weights` over `--data`, write its results, evaluate them."""
    from ovd.evaluation import coco
    from ovd.evaluation.lvis import evaluate_lvis
    from ovd.evaluation.model import run_model

    started = time.process_time()
    run = run_model(options, on_image=_show_progress)
    written: list[Path] = []
    if options.out:
        annotations = run.gt if run.generated else None
        for name, content in (
            ("results", run.results), ("proposals", run.proposals), ("annotations", annotations)
        ):  # fmt: skip
            if content is not None:
                text = json.dumps(content, ensure_ascii=False, allow_nan=False)
                written.append(Path(options.out) / f"{name}.json")
                write_atomically(written[-1], text.encode())
    if _federated(options, run.gt):
        metrics = evaluate_lvis(run.gt, run.results, run.split, options.iou_types, proposals=run.proposals)
    else:
        metrics = coco.evaluate(
            run.gt, run.results, run.split, options.iou_types, max_dets=options.max_dets, proposals=run.proposals
        )
    metrics.dataset_sha256 = run.dataset_sha256
    record = run.record | {"cpu_seconds": round(time.process_time() - started, 1)}
    _report(metrics, options, argv, record, written=written)
    if run.results is not None:
        name = f"{options.weights} + {options.encoder}" if options.encoder else str(options.weights)
        _draw(metrics, options, run.gt, run.results, name)
    return metrics


def _ground_truth(spec: str) -> CocoJson:
    """Annotations in COCO's form; of other formats the part that is evaluated, with its pictures numbered as read."""
    from ovd.evaluation.model import EVALUATED_PARTS
    from ovd.formats.read import read_spec, recognise
    from ovd.formats.spec import LabelSpec

    named = LabelSpec.parse(spec)
    if (named.part is None and named.path.is_file() and recognise(named.path) == "coco") or not named.path.exists():
        return read_json(spec)
    return read_spec(named, prefer=EVALUATED_PARTS).content


def _federated(options: EvaluationOptions, gt: CocoJson) -> bool:
    """Whether LVIS's protocol applies: by `--protocol`, or as the file has LVIS's fields.

    Raises:
        UserError: options that mean nothing in it.
    """
    from ovd.data.lvis import is_lvis

    chosen = options.protocol == "lvis" or (options.protocol == "auto" and is_lvis(gt))
    if chosen and options.compare:
        raise UserError("--compare resamples COCO's matches; with LVIS's protocol it is not available.")
    if chosen:
        print("LVIS protocol: federated labels, 300 detections per image over all categories", file=sys.stderr)
    return chosen


def _differences(
    options: EvaluationOptions,
    gt: CocoJson,
    results: Sequence[CocoJson],
    compared: Sequence[CocoJson],
    metrics: Metrics,
) -> tuple[dict[str, Difference], str]:
    """The differences to the results of `--compare`, by group, and of what: boxes or masks."""
    from ovd.evaluation.compare import bootstrap
    from ovd.evaluation.matching import match_table

    assert options.annotations is not None and options.predictions is not None and options.compare is not None
    kind = "bbox" if any(key.startswith("bbox/") for key in metrics.values) else "segm"
    first, second = (
        match_table(
            gt, content, metrics.split, iou_type=kind, max_dets=options.max_dets, where=(options.annotations, name)
        )
        for name, content in ((options.compare, compared), (options.predictions, results))
    )
    return bootstrap(first, second, metrics.split.groups), kind


def _draw(metrics: Metrics, options: EvaluationOptions, gt: CocoJson, results: Sequence[CocoJson], name: str) -> None:
    """The pictures of ``--plots``."""
    if options.plots is None:
        return
    from ovd.evaluation.plots import write_plots

    kind = "bbox" if any(key.startswith("bbox/") for key in metrics.values) else "segm"
    paths = write_plots(gt, results, metrics.split, Path(options.plots), title=name, kind=kind)
    print("drawn: " + ", ".join(shlex.quote(str(path)) for path in paths))


def _show_progress(done: int, total: int) -> None:
    """One line that is rewritten on a terminal; every tenth of the way otherwise."""
    text = f"{done} of {total} images"
    if sys.stderr.isatty():
        print(f"\r{text}", end="\n" if done == total else "", file=sys.stderr, flush=True)
    elif done * 10 // total > (done - 1) * 10 // total:
        print(text, file=sys.stderr, flush=True)


def _report(
    metrics: Metrics,
    options: EvaluationOptions,
    argv: Sequence[str],
    record: Mapping[str, object],
    *,
    written: Sequence[Path] = (),
) -> None:
    """Print warnings and table; write the files of `--out`, and name them behind those that are written already."""
    from ovd.evaluation import report

    for warning in metrics.warnings:
        warn(warning)
    print(report.table(metrics))
    if options.out:
        command = ["python", "-m", "ovd.evaluate", *argv]
        try:
            paths = report.write(metrics, Path(options.out), command=command, extra=record)
        except OSError as err:
            raise UserError(f"cannot write to {options.out}: {err.strerror}.") from err
        print("written: " + ", ".join(shlex.quote(str(p)) for p in (*written, *paths)))


if __name__ == "__main__":
    run_cli(main)
