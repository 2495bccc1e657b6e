# SPDX-License-Identifier: Apache-2.0
"""The two shipping stages of ``make weights``: put what was trained under ``weights/``, with cards that fit it.

python scripts/ship_weights.py clip EXPORTED NAME              as float16, with the card.md of what it replaces
python scripts/ship_weights.py detector EXPORTED NAME METRICS CALIBRATION
    with a card.json made of ovd.evaluate's metrics.json and of ovd.calibrate's report
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from ovd.weights import add_weights, weights_root
from pretrain.engine.errors import UserError, run_cli
from pretrain.engine.files import read_json, write_atomically

FIGURES = {
    "box AP50, base": "bbox/AP50_base",
    "box AP50, novel": "bbox/AP50_novel",
    "AR100 at IoU .5, novel": "bbox/AR100_novel@50",
}


def ship_clip(exported: Path, name: str) -> None:
    """Ship an encoder in half the size; its card, written by people, is taken over and has to be read again."""
    from pretrain.nets.encoders import load_encoder

    old = weights_root() / name / "card.md"
    with tempfile.TemporaryDirectory() as temporary:
        folder = load_encoder(exported).save(Path(temporary) / name, half=True)
        if old.is_file():
            shutil.copy(old, folder / "card.md")
            print(f"{old}: kept; its figures are of the old weights: measure (pretrain.evaluate), then correct them")
        added = add_weights(folder, name)
    print(f"{added.name}: {added.bytes / 1e6:.1f} MB, {added.sha256[:12]}")


def detector_card(
    name: str, model: dict[str, Any], measured: dict[str, Any], calibrated: dict[str, Any]
) -> dict[str, Any]:
    """What the page says of a detector.

    Args:
        name: of the weights.
        model: content of ``model.json``.
        measured: content of the ``metrics.json`` of an evaluation.
        calibrated: content of the report of its calibration.

    Raises:
        UserError: a figure is missing, or was measured on another detector.
    """
    run = measured.get("run", {})
    if run.get("config_hash") != model["config_hash"]:
        raise UserError(
            f"the metrics are of config {run.get('config_hash')}, the detector of {model['config_hash']}: "
            "evaluate this one"
        )
    refined, measured_with = (one.get("crop_refinement", one.get("second_look", 0)) for one in (model, run))
    if refined != measured_with:
        raise UserError(
            f"the metrics are with crop refinement of {measured_with} regions, the detector refines {refined}: "
            "evaluate this one"
        )
    missing = [key for key in FIGURES.values() if measured.get("metrics", {}).get(key) is None]
    if missing:
        raise UserError(f"the metrics have no {', '.join(missing)}: evaluate on Sticker Scenes with all words")
    if calibrated.get("calibration") != model["calibration"]:
        raise UserError("the calibration's report is of other values than stand in model.json: calibrate this one")
    typed = calibrated["other_scenes"]
    novel, classes = len(model["novel"]), len(model["classes"])
    return {
        "name": name,
        "purpose": "Demonstrations and tests: finds drawn stickers pasted on photos. "
        "It is no detector for photographs.",
        "data": f"Sticker Scenes with labels of {classes - novel} base nouns; regions named by {model['encoder']}. "
        f"{novel} nouns were never labelled.",
        "metrics": {label: round(measured["metrics"][key], 3) for label, key in FIGURES.items()},
        "protocol": f"{run['data']}, held-out style and photos, all {run['words']} names as vocabulary"
        + (f"; the image encoder embeds the crops of the best {refined} regions of a picture too" if refined else ""),
        "text": f"With few words typed, {typed['precision_at_threshold']:.0%} of the boxes shown at the default "
        f"threshold are right, and {typed['recall_at_threshold']:.0%} of the objects asked for are shown. Expected "
        f"calibration error {typed['ece']:.3f}; a word that is not in the picture stays below the threshold in "
        f"{typed['absent_words_quiet']:.1%} of cases.",
    }


def ship_detector(exported: Path, name: str, metrics: Path, calibration: Path) -> None:
    """Ship an exported detector with its card."""
    card = detector_card(name, read_json(exported / "model.json"), read_json(metrics), read_json(calibration))
    write_atomically(exported / "card.json", (json.dumps(card, indent=1, ensure_ascii=False) + "\n").encode())
    added = add_weights(exported, name)
    print(f"{added.name}: {added.bytes / 1e6:.1f} MB, {added.sha256[:12]}")


def main(argv: list[str]) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    for kind in ("clip", "detector"):
        one = kinds.add_parser(kind)
        one.add_argument("exported", type=Path)
        one.add_argument("name")
        if kind == "detector":
            one.add_argument("metrics", type=Path)
            one.add_argument("calibration", type=Path)
    args = parser.parse_args(argv)
    if args.kind == "clip":
        ship_clip(args.exported, args.name)
    else:
        ship_detector(args.exported, args.name, args.metrics, args.calibration)
    return 0


if __name__ == "__main__":
    run_cli(main)
