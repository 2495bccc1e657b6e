# SPDX-License-Identifier: Apache-2.0
"""What UP-DETR's pretraining is worth: AP50 against the number of labelled pictures, and against iterations.

    python benchmarks/claims/updetr.py                                             Sticker Scenes, base classes
    python benchmarks/claims/updetr.py --coco IMAGES ANNOTATIONS                   photos with COCO annotations
    python benchmarks/claims/updetr.py --cases grouped ungrouped no_mask single no_reconstruction unfrozen
                                                                                    ablations, at a tenth of the labels

Every run is the product's own: configs/updetr.yaml, then configs/detr.yaml from random weights or from the pretrained
ones, with the same seed, pictures and number of steps. Runs that are finished are not repeated. The pretext runs once
per case (seed 0), training once per seed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common import ROOT, draw, machine, mean_and_spread

from ovd.config_detr import DetrTrainConfig
from ovd.data.samples import LabelledSample
from ovd.modeling.detr.network import Detr
from ovd.modeling.detr.task import DetrTask
from ovd.training import detr as detr_training
from ovd.training.parts import TrainingParts
from pretrain.engine.config import load_config

CASES: dict[str, list[str]] = {  # of the pretext
    "grouped": [],  # configs/updetr.yaml as it is
    "random_patches": ["pretext.patches.sampler=log_uniform"],
    "no_denoising": ["model.denoising=0"],
    "as_in_paper": ["pretext.patches.sampler=log_uniform", "model.denoising=0"],
    "ungrouped": ["pretext.grouped=false"],
    "no_mask": ["pretext.attention_mask=false"],
    "single": ["pretext.patches.count=1"],
    "no_reconstruction": ["model.loss.reconstruction=0"],
    "unfrozen": ["model.backbone.frozen=false", "cache=null"],
}
MAIN_FRACTIONS = (0.05, 0.1, 0.25, 1.0)
ABLATION_FRACTION = 0.1
MAX_DETECTIONS = 100  # per picture that are evaluated


def pretrain_once(case: str, options: argparse.Namespace) -> Path:
    """The exported transformer of a case's pretext."""
    from ovd.train import main

    out = options.out / "pretext" / case
    if not (out / "exported" / "model.json").is_file():
        images = []
        if options.coco:
            images = [f"pretext.images={{kind: folder, root: {options.coco[0]}}}", "pretext.held_out_count=0"]
        main(
            [
                "--config", "updetr.yaml", f"out={out}", f"cache={options.out / 'features'}",
                f"loop.steps={options.pretext_steps}", "loop.threads=1", "loop.save_every=500", "--resume",
                *images, *CASES[case],
            ]
        )  # fmt: skip
    return out / "exported"


def fine_tune(name: str, start: Path | None, fraction: float, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """AP50 along one training, by steps."""
    record = options.out / "runs" / f"{name}_{fraction}_{seed}.json"
    if record.is_file():
        finished: dict[str, Any] = json.loads(record.read_text())
        return finished
    from pretrain.engine.loop import fit

    data = [f"data.length={options.pictures}"]
    if options.coco:
        data = [
            "data.kind=coco", f"data.images={options.coco[0]}", f"data.annotations={options.coco[1]}",
            "data.split=all", "data.labels=all",
        ]  # fmt: skip
    config = load_config(
        DetrTrainConfig,
        "detr.yaml",
        [
            f"out={options.out / 'unused'}", f"cache={options.out / 'features'}", f"loop.seed={seed}",
            f"loop.steps={options.steps}", "loop.threads=1", "loop.save_every=1000000000",
            f"loop.log_every={options.every}", *data, *([f"weights={start}"] if start else []),
        ],
    )  # fmt: skip
    train, held = pictures_of(config, options)
    config = config.model_copy(update={"images_limit": max(1, round(fraction * train))})
    parts = detr_training.build(config)
    batches = held_out(config, parts, held, options)
    task = EvaluatedTask(model=parts.model, pretrained_lr_scale=config.pretrained_lr_scale, batches=batches)
    begun = time.perf_counter()
    out = options.out / "runs" / f"{name}_{fraction}_{seed}"
    fit(
        task,
        parts.source,
        loop=config.loop,
        optim=config.optim,
        out=out,
        record={"seed": seed},
        overwrite=True,
    )
    run = {
        "curve": task.curve, "seconds": time.perf_counter() - begun, "pictures": config.images_limit
    }  # fmt: skip
    record.write_text(json.dumps(run, indent=1) + "\n")
    return run


def pictures_of(config: DetrTrainConfig, options: argparse.Namespace) -> tuple[int, list[int]]:
    """How many pictures may be trained on, and which of a COCO file are held out (the last fifth)."""
    if not options.coco:
        return int(options.pictures), []
    from ovd.training.inputs import labelled_images

    count = len(labelled_images(config.data))
    first = round(0.8 * count)
    return first, list(range(first, count))


def held_out(
    config: DetrTrainConfig, parts: TrainingParts[Detr], held: list[int], options: argparse.Namespace
) -> list[list[LabelledSample]]:
    """Batches of labelled pictures that no training sees, as cached features."""
    from ovd.data.catalog import LabelledImages, StickerImages
    from ovd.data.mapper import DetectionSource, TrainingTransform
    from ovd.training.feature_cache import LabelledSubset, cached_detection
    from pretrain.data.stickers import Stickers

    assert parts.labels is not None
    images: LabelledImages = parts.labels.images
    plain = config.model_copy(update={"data": config.data.model_copy(update={"flip": 0.0, "seed": 0})})
    if not options.coco:
        count = options.held_out
        images = StickerImages(
            stickers=Stickers.load(), split="val", seed=0, length=count, size=config.data.size, labels="base"
        )
        plain = plain.model_copy(update={"data": plain.data.model_copy(update={"length": count, "split": "val"})})
        held = list(range(count))
    transform = TrainingTransform(short_side=config.data.short_side, long_side=config.data.long_side, flip=0.0)
    whole = images.images if isinstance(images, LabelledSubset) else images
    cached = cached_detection(plain, parts.model, DetectionSource(images=whole, transform=transform, seed=0))
    samples = [cached.sample(index, 0) for index in held]
    return [samples[i : i + 32] for i in range(0, len(samples), 32)]


class EvaluatedTask(DetrTask):
    """Training on labels whose log lines carry AP50 of held-out pictures; ``curve`` fills with it.

    Args:
        model, pretrained_lr_scale: of `DetrTask`.
        batches: held-out pictures.
    """

    def __init__(self, *, model: Detr, pretrained_lr_scale: float, batches: list[list[LabelledSample]]) -> None:
        super().__init__(model=model, pretrained_lr_scale=pretrained_lr_scale)
        self.batches = batches
        self.steps = 0
        self.curve: list[dict[str, float]] = []

    def after_step(self, step: int, total: int) -> None:
        """Count steps."""
        self.steps = step + 1

    def report(self) -> tuple[dict[str, float], list[str]]:
        """AP50 at this step."""
        values = average_precision(self.detr, self.batches)
        self.curve.append({"step": self.steps, **values})
        return values, []


def average_precision(model: Detr, batches: Sequence[Sequence[LabelledSample]]) -> dict[str, float]:
    """AP50 over classes, and of boxes whatever their class by objectness alone, in network pixels."""
    import torch
    from torchvision.ops import box_convert

    from ovd.evaluation.coco import as_one_category, evaluate

    classifier, was_training = model.classifier, model.training
    assert classifier is not None
    model.eval()
    gt: dict[str, Any] = {"images": [], "annotations": [], "categories": []}
    results: list[dict[str, Any]] = []
    any_class: list[dict[str, Any]] = []
    trainable = classifier.trainable
    gt["categories"] = [{"id": i + 1, "name": str(i)} for i in range(len(trainable)) if bool(trainable[i])]
    number = 0
    for batch in batches:
        outputs = model.predict(model.memory(batch))
        logits = classifier(outputs.embeddings.flatten(0, 1))[:, :-1].masked_fill(~trainable, float("-inf"))
        probability = logits.softmax(-1).unflatten(0, outputs.logits.shape)
        score = (probability * outputs.logits.sigmoid()[..., None]).sqrt()
        for n, one in enumerate(batch):
            number += 1
            height, width = one["size"]
            gt["images"].append({"id": number, "height": height, "width": width})
            for box, label in zip(
                one["instances"].gt_boxes.tensor.tolist(), one["instances"].gt_classes.tolist(), strict=True
            ):
                size = box[2] - box[0], box[3] - box[1]
                gt["annotations"].append(
                    {
                        "id": len(gt["annotations"]) + 1, "image_id": number, "category_id": label + 1, "iscrowd": 0,
                        "bbox": [box[0], box[1], *size], "area": size[0] * size[1],
                    }
                )  # fmt: skip
            corners = box_convert(outputs.boxes[n], "cxcywh", "xyxy").clamp(0, 1) * torch.tensor(
                [width, height, width, height]
            )
            for box, value in zip(corners.tolist(), outputs.logits[n].sigmoid().tolist(), strict=True):
                any_class.append(_result(number, 1, box, value))
            best = score[n].flatten().topk(min(MAX_DETECTIONS, score[n].numel()))
            for value, pair in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                query, label = divmod(pair, len(trainable))
                if not trainable[label]:  # its score is zero: fewer pairs than are evaluated
                    continue
                results.append(_result(number, label + 1, corners[query].tolist(), value))
    model.train(was_training)
    named = evaluate(gt, results, None, ["bbox"]).values["bbox/AP50"]
    merged = evaluate(*as_one_category(gt, any_class), None, ["bbox"]).values["bbox/AP50"]
    return {"ap50": float(named), "ap50_any_class": float(merged)}


def _result(image: int, label: int, corners: Sequence[float], score: float) -> dict[str, Any]:
    x1, y1, x2, y2 = corners
    return {
        "image_id": image, "category_id": label, "bbox": [x1, y1, max(x2 - x1, 0.01), max(y2 - y1, 0.01)],
        "score": score,
    }  # fmt: skip


def steps_to(curve: Sequence[Mapping[str, float]], value: float, measure: str) -> float | None:
    """The first step at which a curve reaches a value."""
    return next((point["step"] for point in curve if point[measure] >= value), None)


def curves(axes: Any, results: Mapping[str, Any]) -> None:
    """AP50 of boxes whatever their class over the steps: mean over the seeds, and their spread."""
    for name, entry in results.items():
        steps = [point["step"] for point in entry["curves"][0]]
        points_at = [mean_and_spread(points, "ap50_any_class") for points in zip(*entry["curves"], strict=True)]
        means, spreads = ([100 * value for value in column] for column in zip(*points_at, strict=True))
        case, _, fraction = name.partition("/")
        start = {"grouped": "UP-DETR"}.get(case, case)
        axes.errorbar(
            steps, means, yerr=spreads, marker="o", capsize=3, linestyle="--" if case == "random" else "-",
            label=f"{start}, {float(fraction):.0%} of the labels",
        )  # fmt: skip
    axes.set_xlabel("steps of training on labels")
    axes.set_ylabel("AP50, any class")
    axes.legend(fontsize=8)


def main(argv: Sequence[str]) -> None:
    """Run what is not there yet; print the table; write ``updetr_main.json`` (or ``_ablation``) and the plot of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--coco", nargs=2, metavar=("IMAGES", "ANNOTATIONS"), help="photos instead of stickers")
    parser.add_argument("--cases", nargs="+", choices=sorted(CASES), default=["grouped"])
    parser.add_argument("--fractions", type=float, nargs="+", help="of the labelled pictures")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--pretext-steps", type=int, default=3000)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--every", type=int, default=250, help="steps between measurements")
    parser.add_argument("--pictures", type=int, default=4000, help="labelled scenes")
    parser.add_argument("--held-out", type=int, default=200, help="validation scenes")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "claims" / "updetr")
    options = parser.parse_args(argv)
    (options.out / "runs").mkdir(parents=True, exist_ok=True)
    main_only = options.cases == ["grouped"]
    fractions = options.fractions or (MAIN_FRACTIONS if main_only else (ABLATION_FRACTION,))
    starts: dict[str, Path | None] = {"random": None}
    starts |= {case: pretrain_once(case, options) for case in options.cases}
    results: dict[str, Any] = {}
    print(f"{'start':<18} {'labels':>7} {'AP50':>15} {'any class':>15} {'steps to random':>16}")
    for fraction in fractions:
        goal = 0.0
        for name, start in starts.items():
            runs = [fine_tune(name, start, fraction, seed, options) for seed in options.seeds]
            last = {m: [100 * run["curve"][-1][m] for run in runs] for m in ("ap50", "ap50_any_class")}
            ends = [run["curve"][-1] for run in runs]
            (named, named_spread), (any_class, any_class_spread) = (mean_and_spread(ends, m) for m in last)
            if name == "random":
                goal = any_class
            reached = [steps_to(run["curve"], goal, "ap50_any_class") for run in runs]
            known = [step for step in reached if step is not None]
            reached_at = f"{statistics.mean(known):.0f}" if len(known) == len(reached) else "not reached"
            print(
                f"{name:<18} {runs[0]['pictures']:>7} {100 * named:>8.2f} ± {100 * named_spread:<4.2f} "
                f"{100 * any_class:>8.2f} ± {100 * any_class_spread:<4.2f} {reached_at:>16}",
                flush=True,
            )
            results[f"{name}/{fraction}"] = {"last": last, "curves": [run["curve"] for run in runs], "steps": reached}
    settings = {k: str(v) for k, v in vars(options).items()}
    text = json.dumps({"machine": machine(), "settings": settings, "found": results}, indent=1)
    kind = f"updetr_{'main' if main_only else 'ablation'}"
    (options.out / f"{kind}.json").write_text(text + "\n")
    draw(options.out / f"{kind}.svg", results, curves)


if __name__ == "__main__":
    main(sys.argv[1:])
