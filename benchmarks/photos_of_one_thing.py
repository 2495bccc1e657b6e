# SPDX-License-Identifier: Apache-2.0
"""Photos of one thing that is, or is a kind of, a word of the proposal network: how often that word is shown.

python benchmarks/photos_of_one_thing.py --weights default --data coco:IMAGES:BOXES.json --labels LABELS.json

A photo of a beagle is searched for *dog*, and for ten words that no box of it has. Once as the weights are, and once
with the proposal network alone (`open_fallback` 0).
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from ovd.detector import Detector
from ovd.evaluation.photo_calibration import photos_of
from ovd.inference.fvlm_regions import FvlmRegionModel, WordScorer
from ovd.vocabulary import Vocabulary
from pretrain.engine.errors import UserError, run_cli

ABSENT = 10


def main(argv: list[str]) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default="default", help="detector of photographs: a name or a folder")
    parser.add_argument("--data", required=True, metavar="coco:IMAGES:BOXES.json")
    parser.add_argument("--labels", required=True, type=Path, help="JSON table, file name -> nouns")
    parser.add_argument("--part", default="val")
    args = parser.parse_args(argv)
    detector = Detector.load(args.weights)
    model = detector.model
    if not isinstance(model, FvlmRegionModel) or not model.proposal_words.words:
        raise UserError(f"--weights {args.weights}: not a detector whose proposal network knows words")
    photos = photos_of(args.data, labels=args.labels, part=args.part)
    table = photos.table
    words = table.words[: table.always_labelled]
    vocabulary = Vocabulary.of(words, templates=detector.templates)
    rows = detector.text.embed(vocabulary)
    calibrations = {
        "as_it_is": model.calibration,
        "proposal_network_alone": replace(model.calibration, open_fallback=0.0),
    }
    shown: dict[str, list[bool]] = {name: [] for name in calibrations}
    absent_shown: dict[str, list[bool]] = {name: [] for name in calibrations}
    scorer = model.scorer(rows, [c.phrases for c in vocabulary.classes], model.background_words)
    assert isinstance(scorer, WordScorer)
    for index, photo in enumerate(photos.photos):
        known = [] if photo.noun is None else [w for w in table.implied[photo.noun] if w < len(words)]
        if not known:
            continue
        regions = detector.embed(photos.image(index)).regions
        free = np.setdiff1d(np.arange(len(words)), [*known, *photo.words])
        absent = np.random.default_rng(index).permutation(free)[:ABSENT]
        for name, calibration in calibrations.items():
            best = replace(scorer, calibration=calibration)(regions).max(axis=0)
            shown[name].append(bool(best[known].max() >= detector.threshold))
            absent_shown[name] += (best[absent] >= detector.threshold).tolist()
    if not shown["as_it_is"]:
        raise UserError(f"--labels {args.labels}: no photo of one thing that the proposal network has a word for")
    figures = {
        name: {"shown": float(np.mean(shown[name])), "absent_words_quiet": 1 - float(np.mean(absent_shown[name]))}
        for name in calibrations
    }
    print(json.dumps({"photos": len(shown["as_it_is"]), "threshold": detector.threshold, **figures}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
