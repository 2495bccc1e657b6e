# SPDX-License-Identifier: Apache-2.0
"""The command line of ``python -m ovd.evaluate``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from ovd.formats.spec import LabelSpec
from ovd.inference.postprocess import SOFT_NMS_SIGMA
from ovd.query_flags import add_encoder_flag, add_sides_flag
from pretrain.engine.errors import UserError
from pretrain.engine.flags import CommandParser, above_zero, integer

DEFAULT_COUNT = 500  # validation scenes
DEFAULT_SEED = 0  # of the validation scenes that the tables are computed on; ovd.calibrate uses 1000 and 2000
DEFAULT_SIZE = 256  # pixels, what the shipped configs train at

VILD_REGIONS = 1000  # ViLD's release: proposals of an image at test time, and boxes of each class before NMS

GROUPS = ("all", "known", "base", "novel")  # what --vocabulary may name beside a file

DESCRIPTION = "COCO metrics for base and novel categories, of a results file or of a detector."
EPILOG = """\
examples:
  wordbox evaluate --annotations gt.json --predictions results.json --split ovcoco --out runs/eval
  wordbox evaluate --annotations gt.json --predictions results.json          (no split: every category counts)
  wordbox evaluate --weights vild-sticker --data stickers-val:500
  wordbox evaluate --weights vild-sticker --data stickers-val:500 --examples 1   (crops in place of words)
  wordbox evaluate --weights default --data coco:images/:gt.json --split ovcoco

A split file is {"name": "mine", "base": [ids or names], "novel": [ids or names]}.
"""


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """Value of `--data`: generated scenes (`count`, `seed`), a COCO file (`images`, `annotations`), or `labels`."""

    count: int = 0
    seed: int = 0
    images: Path | None = None
    annotations: Path | None = None
    labels: LabelSpec | None = None

    @classmethod
    def parse(cls, text: str) -> DataSpec:
        """`stickers-val[:count][:seed]`, `coco:IMAGES:ANNOTATIONS`, or what `LabelSpec` reads.

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
        labels = LabelSpec.parse(text)
        if text and kind != "stickers-val" and labels.path.exists():
            return cls(labels=labels)
        raise UserError(
            f"--data {text!r}: expected stickers-val[:COUNT[:SEED]], coco:IMAGES:ANNOTATIONS.json, or "
            "[KIND:]PATH[:PART] of a data.yaml, a COCO file or the folder of a data set."
        )


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """The flags, as ``--help`` explains them; dashes are underscores."""

    weights: str | None
    encoder: str | None
    sides: list[int] | None
    device: str
    data: str | None
    vocabulary: str
    ensemble: Literal["fixed", "base-novel"]
    scores: Literal["published", "calibrated"]
    embeddings: Literal["own", "crops"]
    crop_refinement: int | None
    queries: Literal["free", "words"]
    agnostic: Literal["proposals", "results"]
    examples: int | None
    present: bool
    scale: float | None
    regions: int
    vild: bool
    limit: int
    soft_nms: float | None
    size: int
    annotations: str | None
    predictions: str | None
    proposals: str | None
    compare: str | None
    split: str | None
    protocol: Literal["auto", "coco", "lvis"]
    iou_types: list[str] | None
    max_dets: int
    out: str | None
    plots: str | None

    @classmethod
    def parse(cls, argv: Sequence[str]) -> EvaluationOptions:
        """Read the command line.

        Raises:
            UserError: a flag that is unknown, or flags that do not go together.
        """
        options = cls(**vars(parser().parse_args(argv)))
        if options.vild:
            options = replace(options, regions=VILD_REGIONS, crop_refinement=0)
        if problem := _wrong_combination(options):
            raise UserError(problem)
        return options

    @property
    def by_category(self) -> bool:
        """Whether the classes are categories of the split, not the words of a file."""
        return self.vocabulary in GROUPS


def _wrong_combination(o: EvaluationOptions) -> str | None:
    """What is wrong with flags that do not go together; the first thing counts."""
    if bool(o.weights) == bool(o.predictions):
        return "give --weights (run a model) or --predictions (a results file), not both; see --help."
    source, needed, excluded = "--predictions", "--annotations", "--data"
    if o.weights:
        source, needed, excluded = "--weights", "--data", "--annotations"
    given = {"--data": o.data, "--annotations": o.annotations}
    if not given[needed] or given[excluded]:
        return f"{source} needs {needed}, and cannot be combined with {excluded}; see wordbox evaluate --help."
    if o.examples and not o.weights:
        return "--examples describes classes by crops: give --weights and --data"
    if o.present and not o.examples:
        return "--present is a protocol of --examples; words are looked for in every picture"
    if o.present and o.queries == "words":
        return (
            "--present cannot be combined with --queries words, which are conditioned on every class in every picture"
        )
    if o.examples and (o.embeddings == "crops" or not o.by_category):
        return "--examples cannot be combined with a vocabulary file or --embeddings crops"
    if o.vild and (o.scores != "published" or not o.by_category or o.examples):
        return (
            "--vild uses the published scores of a split's categories: it cannot be combined with --scores, a "
            "vocabulary or --examples"
        )
    if o.encoder and (not o.weights or o.crop_refinement or o.queries == "words" or o.vild):
        return (
            "--encoder names the boxes of --weights; it cannot be combined with --crop-refinement, --queries words or "
            "--vild"
        )
    if o.soft_nms is not None and (not o.weights or o.vild or o.queries == "words"):
        return "--soft-nms needs --weights, and cannot be combined with --vild or --queries words"
    if o.embeddings == "crops" and o.crop_refinement:
        return "--embeddings crops embeds the crops of all regions; remove --crop-refinement"
    return None


def parser() -> CommandParser:
    """Return the command line."""
    flags = CommandParser(
        "wordbox evaluate",
        DESCRIPTION,
        usage="wordbox evaluate (--weights NAME --data SPEC | --predictions FILE --annotations FILE) [options]",
        epilog=EPILOG,
    )
    _add_model_flags(flags.add_argument_group("running a model").add_argument)
    _add_class_flags(flags.add_argument_group("classes and scores of a model").add_argument)
    _add_file_flags(flags.add_argument_group("evaluating a results file").add_argument)
    _add_metric_flags(flags.add_argument_group("metrics").add_argument)
    flags.hide(
        "encoder", "sides", "device", "size", "regions", "limit", "ensemble", "scores", "scale", "embeddings",
        "crop_refinement", "queries", "agnostic", "examples", "present", "proposals", "compare", "protocol", "max_dets",
        "vild", "soft_nms", "plots",
    )  # fmt: skip
    return flags


Add = Callable[..., argparse.Action]


def _add_model_flags(add: Add) -> None:
    add("--weights", metavar="FOLDER|NAME", help="run this detector: 'default' or a folder exported by ovd.train")
    add_encoder_flag(add)
    add_sides_flag(add)
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default auto)")
    add("--data", metavar="SPEC",
        help="pictures to run it on: stickers-val[:COUNT[:SEED]], coco:IMAGES:ANNOTATIONS.json, or labels in COCO, "
        "YOLO or VOC format: data.yaml:test, FOLDER")  # fmt: skip
    add("--size", type=integer(1), default=DEFAULT_SIZE,
        help=f"side of the generated scenes (default {DEFAULT_SIZE})")  # fmt: skip
    add("--regions", type=integer(1), default=300, help="regions per image, best objectness first (default 300)")
    add("--vild", action="store_true",
        help=f"evaluate exactly as ViLD's release does: {VILD_REGIONS} regions, the {VILD_REGIONS} best of each class "
        "before NMS, embeddings averaged over the synonyms of an LVIS file, no crop refinement (slow)")  # fmt: skip
    add("--limit", type=integer(1), default=300, help="detections per image (default 300)")
    add("--soft-nms", type=above_zero, nargs="?", const=SOFT_NMS_SIGMA, metavar="SIGMA",
        help=f"Soft-NMS in place of NMS at IoU .5 (default sigma {SOFT_NMS_SIGMA}, the paper's)")  # fmt: skip


def _add_class_flags(add: Add) -> None:
    add("--vocabulary", metavar="all|base|novel|known|FILE", default="all",
        help="classes to compete: all of the split (default), base or novel alone (an easier protocol), known (with "
        "the categories that the means leave out), or a vocabulary file with synonyms")  # fmt: skip
    add("--ensemble", choices=("fixed", "base-novel"), default="fixed",
        help="exponents of ViLD-ensemble's heads: one for all classes (default), or the paper's two")  # fmt: skip
    add("--scores", choices=("published", "calibrated"), default="published",
        help="published: softmax over the vocabulary (default); calibrated: those the page shows")  # fmt: skip
    add(
        "--scale",
        type=above_zero,
        metavar="S",
        help="inverse temperature of the published softmax (default: as trained)",
    )
    add("--embeddings", choices=("own", "crops"), default="own",
        help="of the detector (own), or the image encoder's of the regions' crops (slow; with --encoder: published "
        "softmax, without the proposal network's word scores)")  # fmt: skip
    add("--crop-refinement", "--second-look", type=integer(0), metavar="N",
        help="regions per image whose crops the image encoder embeds as well; 0: the region head alone (default: as "
        "calibrated)")  # fmt: skip
    add("--queries", choices=("free", "words"), default="free",
        help="queries of an open-vocabulary transformer: free (default), or conditioned on the words")  # fmt: skip
    add("--agnostic", choices=("proposals", "results"), default="proposals",
        help="compute AR from the regions by objectness (default), or from the classified results")  # fmt: skip
    add("--examples", type=integer(1), metavar="N",
        help="describe each class by N crops instead of its name: stickers in another drawing style; of a COCO file: "
        "boxes of the first pictures, which are then not evaluated")  # fmt: skip
    add("--present", action="store_true",
        help="with --examples: search each picture only for the classes in it (one-shot protocol; easier)")  # fmt: skip


def _add_file_flags(add: Add) -> None:
    add("--annotations", metavar="GT", help="ground truth: COCO .json, or labels as for --data")
    add("--predictions", metavar="RESULTS.json", help="detections in COCO's results format")
    add("--proposals", metavar="FILE.json", help="class-agnostic boxes with scores, for AR")
    add("--compare", metavar="OTHER.json", help="compare AP50 with that of other results, with a confidence interval")


def _add_metric_flags(add: Add) -> None:
    add("--split", metavar="FILE|ovcoco|lvis|stickers",
        help="base and novel categories (default: lvis for its files, rare ones are novel; else all base)")  # fmt: skip
    add("--protocol", choices=("auto", "coco", "lvis"), default="auto",
        help="auto: lvis if the images have neg_category_ids, else coco")  # fmt: skip
    add("--iou-types", nargs="+", choices=("bbox", "segm"), help="default: bbox, and segm if both files have masks")
    add("--max-dets", type=integer(1), default=100, help="detections per image and category for AP (default 100)")
    add("--out", metavar="DIR", help="write metrics.json and per_class.csv here")
    add("--plots", metavar="DIR",
        help="write precision-recall curves and reliability diagrams (SVG) to this folder")  # fmt: skip
