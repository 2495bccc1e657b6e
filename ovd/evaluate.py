# SPDX-License-Identifier: Apache-2.0
"""`python -m ovd.evaluate`: COCO metrics by base and novel categories, of a results file or of a model."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pretrain.engine.errors import UserError, run_cli
from pretrain.engine.files import read_json, sha256_of, write_atomically

if TYPE_CHECKING:
    from ovd.data.coco import ImageId
    from ovd.data.splits import Split
    from ovd.detector import Detector
    from ovd.evaluation.coco import Metrics, Predict
    from ovd.evaluation.compare import Difference
    from ovd.evaluation.examples import ExamplePredictor, LocatingPredictor
    from ovd.evaluation.predictor import ClosedPredictor, Predictor
    from ovd.examples import Crop
    from ovd.modeling.vild.build import RegionModel
    from pretrain.data.scenes import SceneSource

DEFAULT_COUNT = 500  # validation scenes
DEFAULT_SEED = 0  # of the validation scenes that the tables are computed on; ovd.calibrate uses 1000 and 2000
DEFAULT_SCALE = 100.0  # ViLD's inverse temperature
DEFAULT_SIZE = 256  # pixels, what the shipped configs train at

GROUPS = ("all", "known", "base", "novel")  # what --vocabulary may name beside a file

EPILOG = """\
examples:
  python -m ovd.evaluate --annotations gt.json --predictions results.json --split ovcoco --out runs/eval
  python -m ovd.evaluate --annotations gt.json --predictions results.json          (no split: every category counts)
  python -m ovd.evaluate --weights default --data stickers-val:500
  python -m ovd.evaluate --weights default --data stickers-val:500 --examples 1   (crops in place of words)
  python -m ovd.evaluate --weights default --data coco:images/:gt.json --split ovcoco

A split file is {"name": "mine", "base": [ids or names], "novel": [ids or names]}.
"""


def main(argv: list[str]) -> int:
    """Parse the arguments, evaluate, print the table, write the files; returns the exit status."""
    args = _parser().parse_args(argv)
    if bool(args.weights) == bool(args.predictions):
        raise UserError("give --weights (run a model) or --predictions (a results file), not both; see --help.")
    needs, unwanted = ("data", "annotations") if args.weights else ("annotations", "data")
    if not getattr(args, needs) or getattr(args, unwanted):
        given = "--weights" if args.weights else "--predictions"
        raise UserError(f"{given} needs --{needs}, and goes without --{unwanted}; see python -m ovd.evaluate --help.")
    if args.examples and not args.weights:
        raise UserError("--examples shows crops to a detector: give --weights and --data")
    if args.present and not args.examples:
        raise UserError("--present is a protocol of --examples; words are asked for in every picture")
    if args.present and args.queries == "words":
        raise UserError("--present goes without --queries words, which are told every class in every picture")
    if args.weights:
        evaluate_model(args, argv)
    else:
        evaluate_files(args, argv)
    return 0


def evaluate_files(args: argparse.Namespace, argv: Sequence[str]) -> Metrics:
    """For anybody's results: `--annotations`, `--predictions`, `--split`."""
    from ovd.data.lvis import split_of
    from ovd.evaluation import coco, report
    from ovd.evaluation.lvis import evaluate_lvis

    gt, results = read_json(args.annotations), read_json(args.predictions)
    proposals = read_json(args.proposals) if args.proposals else None
    where = (args.annotations, args.predictions)
    split = None
    if args.split:
        split = split_of(args.split, gt, where=where[0])
    if _federated(args, gt):
        metrics = evaluate_lvis(gt, results, split, args.iou_types, proposals=proposals, where=where)
    else:
        metrics = coco.evaluate(
            gt, results, split, args.iou_types, max_dets=args.max_dets, proposals=proposals, where=where
        )
    extra: dict[str, Any] = {}
    if args.compare:
        differences, kind = _differences(args, gt, results, metrics)
        print(f"AP50 ({kind}) against {args.compare}, with a 95 % interval over resampled images:")
        for group, d in differences.items():
            print(f"{group:8}" + report.difference_line(d))
        print()
        extra["compare"] = {"file": args.compare, "kind": kind} | {
            g: report.json_safe(asdict(d)) for g, d in differences.items()
        }
    return _finish(metrics, args, argv, dataset_sha256=sha256_of(args.annotations), **extra)


def _federated(args: argparse.Namespace, gt: Any) -> bool:
    """Whether LVIS's protocol is meant: said so, or the file says what was looked at in each image.

    Raises:
        UserError: options that mean nothing in it.
    """
    from ovd.data.lvis import is_lvis

    chosen = args.protocol == "lvis" or (args.protocol == "auto" and is_lvis(gt))
    if chosen and args.compare:
        raise UserError("--compare resamples COCO's matches; with LVIS's protocol it is not available.")
    if chosen:
        print("LVIS protocol: federated labels, 300 detections per image over all categories", file=sys.stderr)
    return chosen


def _differences(
    args: argparse.Namespace, gt: Any, results: Any, metrics: Metrics
) -> tuple[dict[str, Difference], str]:
    from ovd.evaluation.coco import match_table
    from ovd.evaluation.compare import bootstrap

    kind = "bbox" if any(key.startswith("bbox/") for key in metrics.values) else "segm"
    first, second = (
        match_table(gt, content, metrics.split, iou_type=kind, max_dets=args.max_dets, where=(args.annotations, name))
        for name, content in ((args.compare, read_json(args.compare)), (args.predictions, results))
    )
    return bootstrap(first, second, metrics.split.groups), kind


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """What `--data` names: generated scenes (`count`, `seed`) or a COCO file (`images`, `annotations`)."""

    count: int = 0
    seed: int = 0
    images: Path | None = None
    annotations: Path | None = None

    @classmethod
    def parse(cls, text: str) -> DataSpec:
        """`stickers-val[:count][:seed]` or `coco:IMAGES:ANNOTATIONS`.

        Raises:
            UserError: anything else.
        """
        kind, *parts = text.split(":")
        if kind == "coco" and len(parts) == 2 and all(parts):
            return cls(images=Path(parts[0]), annotations=Path(parts[1]))
        if kind == "stickers-val" and len(parts) <= 2 and all(p.isascii() and p.isdigit() for p in parts):
            count, seed = [*map(int, parts), *(DEFAULT_COUNT, DEFAULT_SEED)[len(parts) :]]
            if count > 0:
                return cls(count=count, seed=seed)
        raise UserError(f"--data {text!r}: expected stickers-val[:COUNT[:SEED]] or coco:IMAGES:ANNOTATIONS.json.")


def evaluate_model(args: argparse.Namespace, argv: Sequence[str]) -> Metrics:
    """Run the detector of `--weights` over `--data`, keep its results, evaluate them."""
    from ovd.data.coco import check_ground_truth
    from ovd.data.lvis import is_lvis, split_of
    from ovd.data.splits import Split
    from ovd.evaluation import coco
    from ovd.evaluation.examples import coco_crops
    from ovd.evaluation.lvis import evaluate_lvis
    from ovd.evaluation.predictor import proposal_predictor, proposals_of
    from ovd.weights import detector_folder
    from pretrain.engine.distributed import pick_device

    data = DataSpec.parse(args.data)
    gt: dict[str, Any] | None = None
    shown: dict[int, list[Crop]] | None = None
    if data.annotations is not None:
        gt = read_json(data.annotations)
        categories = check_ground_truth(gt, where=str(data.annotations)).categories
        split = Split.everything(categories)
        if args.split:
            split = split_of(args.split, gt, where=str(data.annotations))
        elif is_lvis(gt):
            split = split_of("lvis", gt, where=str(data.annotations))
        if args.examples:
            shown, gt = coco_crops(gt, Path(str(data.images)), count=args.examples, asked=_asked(args, split))
    else:
        shipped = Split.load("stickers")
        split = Split.load(args.split, categories=shipped.names) if args.split else shipped
    started = time.process_time()
    run: dict[str, Any] = {"weights": str(args.weights), "data": args.data, "regions": args.regions}
    folder = detector_folder(args.weights)
    predict: Predict | None = None
    device = str(pick_device(args.device))
    model = _model_of(folder)
    variant = model.get("variant")
    if args.examples and (variant == "closed" or (variant == "agnostic" and "patches" not in model.get("head", {}))):
        raise UserError(
            f"--examples: {args.weights} (model.variant={variant}) compares nothing with crops; "
            "leave it out, or evaluate a detector of model.variant=text or a pretext's transformer"
        )
    source = None if data.annotations is not None else _scenes(data, args.size)
    present = _present(gt, source) if args.present else None
    propose: Predict | None
    if variant == "agnostic":
        if args.examples:
            told = _shown(args, split, run, shown, present)
            predict, propose = told, proposals_of(cast("RegionModel", told.detector.model), top=args.regions)
            run |= {"protocol": "transformer of the pretext: queries are told the crops", "scores": "certainty"}
        else:
            propose = proposal_predictor(folder, top=args.regions, device=device)
            run["protocol"] = "class-agnostic detector: recall only"
    elif variant == "closed":
        closed = _closed(folder, split, args.limit, device)
        predict, propose = closed, proposals_of(closed.model, top=args.regions)
        run["protocol"] = "detector of a closed list of classes"
    elif args.examples:
        asked = cast("Predictor", _shown(args, split, run, shown, present))  # only a pretext's has another
        if args.queries == "words":
            _tell(asked, run)
        predict, propose = asked, asked.propose if args.agnostic == "proposals" else None
    else:
        predictor = _named(args, split, run)
        if args.queries == "words":
            _tell(predictor, run)
        predict, propose = predictor, predictor.propose if args.agnostic == "proposals" else None
    progress = _Progress()
    if args.present:
        run["asked"] = "of each picture only what is in it"
    if data.annotations is not None and gt is not None:
        results, proposals = coco.run_images(gt, Path(str(data.images)), predict, propose=propose, on_image=progress)
        sha = coco.content_sha256(gt) if args.examples else sha256_of(data.annotations)
    else:
        assert source is not None
        gt, results, proposals = coco.run_source(source, predict, propose=propose, on_image=progress)
        sha = coco.content_sha256(gt)
    if args.out:
        generated = gt if data.annotations is None else None
        for name, content in (("results", results), ("proposals", proposals), ("annotations", generated)):
            if content is not None:
                _write_json(Path(args.out) / f"{name}.json", content)
    if _federated(args, gt):
        metrics = evaluate_lvis(gt, results, split, args.iou_types, proposals=proposals)
    else:
        metrics = coco.evaluate(gt, results, split, args.iou_types, max_dets=args.max_dets, proposals=proposals)
    run["cpu_seconds"] = round(time.process_time() - started, 1)
    return _finish(metrics, args, argv, dataset_sha256=sha, **run)


def _scenes(data: DataSpec, size: int) -> SceneSource:
    from pretrain.data.scenes import SceneSource
    from pretrain.data.stickers import Stickers

    return SceneSource(Stickers.load(), split="val", seed=data.seed, size=size, length=data.count)


def _present(gt: Mapping[str, Any] | None, source: SceneSource | None) -> dict[ImageId, frozenset[int]]:
    """Image id → COCO ids of what is in it."""
    from pretrain.data.scenes import coco_objects

    found: dict[ImageId, set[int]] = {}
    if source is not None:  # as run_source numbers them
        for index in range(len(source)):
            _, objects = coco_objects(source.scene(index), image_id=index + 1, first_annotation_id=1)
            found[index + 1] = {one["category_id"] for one in objects}
    elif gt is not None:
        found = {entry["id"]: set() for entry in gt["images"]}
        for one in gt["annotations"]:
            if not one.get("iscrowd"):
                found[one["image_id"]].add(one["category_id"])
    return {image: frozenset(ids) for image, ids in found.items()}


def _detector(args: argparse.Namespace, run: dict[str, Any]) -> Detector:
    """The detector of `--weights`; notes in `run` what it is."""
    from ovd.detector import Detector

    detector = Detector.load(
        args.weights,
        device=args.device,
        second_look=0 if args.embeddings == "crops" else args.second_look,
        masks=args.iou_types != ["bbox"],
    )
    card = getattr(detector.model, "card", None)
    run |= {
        "weights_sha256": detector.card.get("sha256"),
        "config_hash": getattr(card, "config_hash", None),
        "second_look": detector.second_look,
    }
    if card is not None:
        setattr(detector.model, "top", args.regions)  # noqa: B010  # of the network, which the protocol does not show
    return detector


def _asked(args: argparse.Namespace, split: Split) -> dict[int, str]:
    """COCO id → name of the categories that `--vocabulary` names; known: those left out of the means as well."""
    group = {"all": split.ids, "base": split.base, "novel": split.novel}.get(args.vocabulary, split.names)
    return {i: split.names[i] for i in group}


def _shown(
    args: argparse.Namespace,
    split: Split,
    run: dict[str, Any],
    shown: Mapping[int, Sequence[Crop]] | None,
    present: Mapping[ImageId, frozenset[int]] | None,
) -> ExamplePredictor | LocatingPredictor:
    """The detector with crops in place of words; `shown` are those of photos, None: of Sticker Scenes."""
    from ovd.evaluation.examples import example_predictor, shown_stickers
    from pretrain.data.stickers import Stickers

    if args.embeddings == "crops" or args.vocabulary not in GROUPS:
        raise UserError("--examples goes without a vocabulary file and without --embeddings crops")
    detector = _detector(args, run)
    if shown is None:
        shown = shown_stickers(Stickers.load(), _asked(args, split), count=args.examples)
    run |= {"examples": args.examples, "scores": "calibrated"}
    return example_predictor(detector, shown, present=present, limit=args.limit)


def _named(args: argparse.Namespace, split: Split, run: dict[str, Any]) -> Predictor:
    """The detector with its words; notes in `run` what a reader of the figures must know."""
    from ovd.evaluation.predictor import CropModel, predictor_for
    from ovd.vocabulary import Vocabulary

    crops = args.embeddings == "crops"
    if crops and args.second_look:
        raise UserError("--embeddings crops sees the crops of all regions; leave --second-look out")
    detector = _detector(args, run)
    words, vocabulary = None, None
    if args.vocabulary in GROUPS:
        words = _asked(args, split)
    else:
        vocabulary = Vocabulary.load(args.vocabulary, templates=detector.templates)
    card = getattr(detector.model, "card", None)
    if crops:
        from pretrain.nets.towers import JointEncoder

        encoder = detector.text.encoder
        if not isinstance(encoder, JointEncoder):
            raise UserError(f"--embeddings crops: the encoder of {args.weights} has no image tower")
        detector.model = CropModel(model=detector.model, encoder=encoder)
        args.scale = args.scale or float(encoder.logit_scale.exp())  # the encoder's own temperature
    scale = args.scale or (float(card.model["head"]["scale"]) if card is not None else DEFAULT_SCALE)
    predictor = predictor_for(
        detector,
        split,
        vocabulary=vocabulary,
        categories=words,
        ensemble=args.ensemble,
        scores=args.scores,
        scale=scale,
        limit=args.limit,
    )
    run |= {
        "vocabulary": args.vocabulary,
        "words": len(predictor.category_ids),
        "scores": args.scores,
        "scale": scale if args.scores == "published" else None,
        "ensemble": args.ensemble,
        "agnostic": args.agnostic,
    }
    return predictor


def _tell(predictor: Predictor, run: dict[str, Any]) -> None:
    """Let the predictor's transformer be told its words as queries.

    Raises:
        UserError: its queries were not trained for that.
    """
    from ovd.evaluation.predictor import ToldModel
    from ovd.modeling.detr.build import DetrRegions

    model = predictor.detector.model
    conditioned = int(model.card.model.get("conditioned", 0)) if isinstance(model, DetrRegions) else 0
    if not isinstance(model, DetrRegions) or not conditioned:
        raise UserError(
            "--queries words: this detector's queries were not trained to take words; train configs/ov_detr.yaml"
        )
    run["queries"], run["words_at_once"] = "words", conditioned
    predictor.detector.model = ToldModel(model=model, rows=predictor.rows, at_once=conditioned)


def _closed(folder: Path, split: Split, limit: int, device: str) -> ClosedPredictor:
    from ovd.evaluation.predictor import ClosedPredictor
    from ovd.modeling.detr.build import load_detr_regions

    return ClosedPredictor.of(load_detr_regions(folder, top=limit, device=device), split, limit=limit)


def _model_of(folder: Path) -> dict[str, Any]:
    """The model section of an exported detector's card; empty where there is none, which the loader explains."""
    card = read_json(folder / "model.json") if (folder / "model.json").is_file() else {}
    model = card.get("model", {}) if isinstance(card, dict) else {}
    return model if isinstance(model, dict) else {}


class _Progress:
    """One line that is rewritten on a terminal; every tenth of the way otherwise."""

    def __call__(self, done: int, total: int) -> None:
        text = f"{done} of {total} images"
        if sys.stderr.isatty():
            print(f"\r{text}", end="\n" if done == total else "", file=sys.stderr, flush=True)
        elif done * 10 // total > (done - 1) * 10 // total:
            print(text, file=sys.stderr, flush=True)


def _write_json(path: Path, content: Any) -> None:
    write_atomically(path, json.dumps(content, ensure_ascii=False, allow_nan=False).encode())


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


def _count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError("must be 0 or more")
    return number


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
    add("--weights", metavar="FOLDER|NAME", help="run this detector: 'default' or a folder exported by ovd.train")
    add("--device", default="auto", help="where it runs: auto, cpu, cuda or cuda:N (default auto)")
    add("--data", metavar="SPEC", help="what to run it on: stickers-val[:COUNT[:SEED]] or coco:IMAGES:ANNOTATIONS.json")
    add("--vocabulary", metavar="all|base|novel|known|FILE", default="all",
        help="words the detector is asked for: all of the split (default), one group only (another, easier protocol), "
        "also the known categories left out of the means, or a vocabulary file with synonyms")  # fmt: skip
    add("--ensemble", choices=("fixed", "base-novel"), default="fixed", help="weights of two heads (ViLD-ensemble)")
    add("--scores", choices=("published", "calibrated"), default="published",
        help="published: softmax over the vocabulary; calibrated: as the page shows them")  # fmt: skip
    add("--embeddings", choices=("own", "crops"), default="own",
        help="own: of the detector; crops: the image encoder's, of the regions' crops (slow)")  # fmt: skip
    add("--second-look", type=_count, metavar="N",
        help="regions per image that the image encoder sees as crops too; 0: the region head alone (default: as the "
        "detector was calibrated)")  # fmt: skip
    add("--queries", choices=("free", "words"), default="free",
        help="of an open-vocabulary transformer: free (as the page), or told the words, some at a time")  # fmt: skip
    add("--agnostic", choices=("proposals", "results"), default="proposals",
        help="what AR is computed from: the regions by objectness (default), or the named results")  # fmt: skip
    add("--examples", type=_positive, metavar="N",
        help="show every class by N crops instead of naming it: stickers in another drawing style; with coco: boxes "
        "of the first pictures, which are then not evaluated")  # fmt: skip
    add("--present", action="store_true",
        help="with --examples: ask of each picture only for what is in it (the one-shot papers' protocol, an easier "
        "one)")  # fmt: skip
    add("--scale", type=float, metavar="S", help="inverse temperature of the published softmax (default: as trained)")
    add("--regions", type=_positive, default=300, help="regions per image that are named, best objectness first")
    add("--limit", type=_positive, default=300, help="detections per image (default 300)")
    add("--size", type=_positive, default=DEFAULT_SIZE, help=f"side of the generated scenes (default {DEFAULT_SIZE})")
    add("--annotations", metavar="GT.json", help="ground truth in COCO format")
    add("--predictions", metavar="RESULTS.json", help="detections in COCO's results format")
    add("--proposals", metavar="FILE.json", help="class-agnostic boxes with scores: AR is computed from these")
    add("--compare", metavar="OTHER.json", help="other results on the same annotations: is the AP50 difference clear?")
    add("--split", metavar="FILE|ovcoco|lvis|stickers",
        help="base and novel categories; lvis: novel = rare, the default for its files; else all are base")  # fmt: skip
    add("--protocol", choices=("auto", "coco", "lvis"), default="auto",
        help="auto: LVIS's for files whose images have neg_category_ids, else COCO's")  # fmt: skip
    add("--iou-types", nargs="+", choices=("bbox", "segm"), help="default: boxes, and masks if both files have them")
    add("--max-dets", type=_positive, default=100, help="detections per image and category for AP (default 100)")
    add("--out", metavar="DIR", help="write metrics.json and per_class.csv here")
    return parser


if __name__ == "__main__":
    run_cli(main)
