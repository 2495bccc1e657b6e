# SPDX-License-Identifier: Apache-2.0
"""Photos of one thing, searched for words of different kinds: how often they are shown.

python benchmarks/photos_of_one_thing.py --weights default --data coco:IMAGES:BOXES.json --labels LABELS.json

A photo of a beagle is searched for *dog*, which the proposal network knows, for *animal*, which is above what it knows,
for *beagle* and *hound*, which it does not know, and for ten absent words of each kind. Once as the weights are, once
without hyponyms and fallback (`open_fallback` 0).

Then words typed beside one above them (*flute*, *instrument*): how often a word that is in the photo names the box, how
often one that is not, and both where the best score alone decides and the word above is typed first.

*Words above them* include kinds that are searched as the general word (*musician* as *person*): such a word counts as
absent, and so as not silent, wherever a person is boxed.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ovd.data.photo_words import WordTable
from ovd.detector import Detector
from ovd.evaluation.photo_calibration import photos_of
from ovd.inference.arrays import Floats
from ovd.inference.fvlm_regions import FvlmRegionModel, WordScorer
from ovd.inference.postprocess import best_class_per_region, narrowest
from ovd.vocabulary import Vocabulary
from pretrain.engine.errors import UserError, run_cli

ABSENT = 10
SIBLINGS = 6
"""Absent kinds of each word above."""


def kinds_of(table: WordTable, is_closed: NDArray[np.bool_]) -> dict[str, set[int]]:
    """Numbers of the words, by what the proposal network knows of them."""
    labelled, every = set(range(table.always_labelled)), range(len(table.words))
    closed = {word for word in every if is_closed[word]}
    general = {word for word in every if table.below[word]} - closed
    return {
        "the proposal network's words": labelled,
        "words above them": closed - labelled,
        "other words": set(every) - closed - general,
        "other words that are above some": general,
    }


def name_of(score_C: Floats, kind_of_CC: NDArray[np.bool_], *, threshold: float) -> int:
    """The class that names a region."""
    score_RC = score_C[None]
    candidates = best_class_per_region(score_RC, threshold=threshold)
    return int(narrowest(candidates, score_RC, kind_of_CC, threshold=threshold).class_id[0])


def named_beside_hypernyms(
    score_RC: Floats, noun: int, table: WordTable, model: FvlmRegionModel, *, threshold: float, rng: np.random.Generator
) -> list[tuple[bool, bool, bool]]:
    """(in the photo, names the box, would by its score) of words, each typed with a word above that is shown."""
    implied, out = set(table.implied[noun]), []
    for above in sorted(implied):
        region = score_RC[:, above].argmax()
        if score_RC[region, above] < threshold:
            continue
        present = [word for word in implied if word != above and above in table.implied[word]]
        siblings = [
            word
            for word in table.below[above]
            if word not in implied and word not in table.below[noun] and noun not in table.implied[word]
        ]
        for word in (*present, *rng.permutation(siblings)[:SIBLINGS].tolist()):
            kind_of_CC = model.kind_of([[table.words[above]], [table.words[word]]])
            if kind_of_CC[1, 0]:
                score_C = score_RC[region, [above, word]]
                named = name_of(score_C, kind_of_CC, threshold=threshold)
                out.append((word in implied, named == 1, bool(score_C.argmax() == 1)))
    return out


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
    vocabulary = Vocabulary.of(table.words, templates=detector.templates)
    rows = detector.text.embed(vocabulary)
    scorer = model.scorer(rows, [c.phrases for c in vocabulary.classes], model.background_words)
    assert isinstance(scorer, WordScorer)
    scorers = {
        "as it is": scorer,
        "without": replace(scorer, calibration=replace(scorer.calibration, open_fallback=0.0)),
    }
    kinds = kinds_of(table, np.asarray(scorer.hyponyms.any(axis=1)))
    shown: dict[tuple[str, str], list[bool]] = {}
    absent_shown: dict[tuple[str, str], list[bool]] = {}
    beside: list[tuple[bool, bool, bool]] = []
    for index, photo in enumerate(photos.photos):
        if photo.noun is None:
            continue
        regions = detector.embed(photos.image(index)).regions
        scores = {name: one(regions) for name, one in scorers.items()}
        best = {name: score_RC.max(axis=0, initial=0) >= detector.threshold for name, score_RC in scores.items()}
        beside += named_beside_hypernyms(
            scores["as it is"],
            photo.noun,
            table,
            model,
            threshold=detector.threshold,
            rng=np.random.default_rng(index),
        )
        labelled = {above for word in photo.words.tolist() for above in table.implied[word]}
        for kind, words in kinds.items():
            present = [word for word in table.implied[photo.noun] if word in words]
            free = sorted(words - labelled - set(table.implied[photo.noun]) - set(table.below[photo.noun]))
            absent = np.random.default_rng(index).permutation(free)[:ABSENT]
            for name, is_shown in best.items():
                shown.setdefault((kind, name), []).extend(is_shown[present].tolist())
                absent_shown.setdefault((kind, name), []).extend(is_shown[absent].tolist())
    if not shown:
        raise UserError(f"--labels {args.labels}: no photo of one thing")
    print(f"{'':44} {'words':>6} {'shown':>6} {'absent and silent':>18}")
    for (kind, name), values in shown.items():
        silent = 1 - np.mean(absent_shown[kind, name])
        print(f"{kind + ', ' + name:44} {len(values):>6} {np.mean(values):>6.3f} {silent:>18.3f}")
    for what, chosen in (("in the photo", True), ("not in it", False)):
        named = np.array([row[1:] for row in beside if row[0] == chosen]).reshape(-1, 2)
        print(
            f"typed after a word above, {what}: {len(named)} words, "
            f"{named[:, 0].mean():.3f} name the box, by their score alone {named[:, 1].mean():.3f}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
