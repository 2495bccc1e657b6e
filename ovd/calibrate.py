# SPDX-License-Identifier: Apache-2.0
"""``python -m ovd.calibrate --weights FOLDER``: make a detector's scores mean something, and report how well they do.

Fits, on scenes of their own (seed 1000; evaluation uses seed 0) and base words only, the temperature and the objectness
exponent by average precision, then slope and offset by likelihood, then the default threshold: the score an absent word
stays below in 95 % of the pictures. No novel label is looked at. Everything is measured once more on other scenes (seed
2000) with base and novel words, and written to ``model.json``. The drawing style is the held-out one in both: scores
fitted on the training styles would promise too much.

Then the same is done once more with every word replaced by one crop in a training style: what a crop's score means.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.engine.errors import UserError, run_cli
from pretrain.engine.files import read_json, write_atomically

if TYPE_CHECKING:
    from torch import Tensor

    from ovd.detector import Detector
    from ovd.evaluation.reliability import Reliability
    from ovd.evaluation.typed import Outcome, TypedScene
    from ovd.inference.scoring import Calibration
    from pretrain.data.stickers import Stickers

ABSENT_WORDS = 10
FLOOR = 0.02


def near_synonyms(stickers: Stickers) -> dict[int, frozenset[int]]:
    """For each noun the nouns that a person could mean by it."""
    near: dict[int, frozenset[int]] = {}
    for group in stickers.near_synonyms:
        for member in group:
            near[member] = near.get(member, frozenset()) | frozenset(group) - {member}
    return near


def typed_scenes(
    detector: Detector, stickers: Stickers, *, seed: int, count: int, size: int, base_only: bool
) -> list[TypedScene]:
    """Regions and words of ``count`` validation-style scenes; with ``base_only`` neither words nor labels are novel."""
    import numpy as np
    import torch

    from ovd.evaluation.typed import TypedScene, draw_words
    from pretrain.data.scenes import SceneSource

    source = SceneSource(stickers, split="val", seed=seed, size=size, length=count)
    near = near_synonyms(stickers)
    scenes = []
    for index in range(count):
        scene = source.scene(index)
        known = np.isin(scene.classes, sorted(stickers.base)) if base_only else np.ones(len(scene.classes), dtype=bool)
        if not known.any():
            continue
        rng = np.random.default_rng([seed, index])
        present, absent = draw_words(
            scene.classes[known].tolist(),
            words=sorted(stickers.base) if base_only else range(len(stickers.nouns)),
            others=scene.classes.tolist(),
            near=near,
            absent=ABSENT_WORDS,
            rng=rng,
        )
        scenes.append(
            TypedScene(
                regions=detector.embed(scene.image).regions,
                boxes=torch.from_numpy(scene.boxes[known]),
                classes=torch.from_numpy(scene.classes[known]),
                present=present,
                absent=absent,
            )
        )
    return scenes


def measure(
    scenes: list[TypedScene],
    rows: Tensor,
    bank: Tensor,
    background: Tensor | None,
    calibration: Calibration,
    near: dict[int, frozenset[int]],
) -> tuple[dict[str, float], Reliability]:
    """Figures of a calibration on some scenes (ECE, absent words, precision and recall), and its reliability."""
    import numpy as np

    from ovd.evaluation.reliability import reliability, score_drift
    from ovd.evaluation.typed import average_precision, distractor_scores, draw_words, run_typed

    outcome = run_typed(
        scenes, rows_CD=rows, bank_BD=bank, background_D=background, calibration=calibration, floor=FLOOR
    )
    shown = outcome.score >= calibration.threshold
    distractors = [
        draw_words(
            scene.present, words=range(len(rows)), others=[], near=near, absent=80, rng=np.random.default_rng([7, i])
        )[1]
        for i, scene in enumerate(scenes)
    ]
    drift = score_drift(
        *distractor_scores(
            scenes, distractors, rows_CD=rows, bank_BD=bank, background_D=background, calibration=calibration
        )
    )
    curve = reliability(outcome.score, outcome.correct)
    return {
        "scenes": float(len(scenes)),
        "average_precision": average_precision(outcome),
        "ece": curve.ece,
        "absent_words_quiet": float(np.mean(outcome.best_absent < calibration.threshold)),
        "precision_at_threshold": float(outcome.correct[shown].mean()) if shown.any() else float("nan"),
        "drift_80_words_within_0.05": drift.within,
        "drift_80_words_mean": drift.mean,
        "recall_at_threshold": float(outcome.correct[shown].sum() / max(outcome.labels, 1)),
    }, curve


def quiet_threshold(outcome: Outcome) -> float:
    """The score that absent classes stay below in 95 % of cases, rounded up to two digits so that the promise holds."""
    import torch

    from ovd.inference.calibration import absent_class_threshold

    quantile = absent_class_threshold(torch.from_numpy(outcome.best_absent))
    return min(0.99, float(torch.tensor(quantile * 100).ceil()) / 100)


def fit_examples(detector: Detector, stickers: Stickers, scenes: list[TypedScene]) -> Calibration:
    """What turns an example's cosines into scores: the words' fit with one crop, of another style, for each word.

    Returns:
        The values in the plain fields, for `Calibration.with_examples`.
    """
    import torch

    from ovd.evaluation.examples import example_rows, sticker_crops
    from ovd.evaluation.typed import choose_ranking, run_typed
    from ovd.inference.calibration import with_fit
    from ovd.inference.scoring import Calibration, centred_on_picture, centred_texts

    asked = frozenset(c for scene in scenes for c in (*scene.present, *scene.absent))
    crops = sticker_crops(stickers, count=1, classes=asked)
    rows = torch.zeros(len(stickers.nouns), detector.model.bank.shape[1])
    rows[list(crops)] = example_rows(detector, crops)
    shown = []
    for scene in scenes:
        regions, (moved,) = centred_on_picture(scene.regions, rows)
        shown.append(
            replace(
                scene,
                regions=regions,
                rows=moved,
                present=tuple(c for c in scene.present if c in crops),
                absent=tuple(c for c in scene.absent if c in crops),
            )
        )
    data: dict[str, Any] = {"rows_CD": rows, "bank_BD": centred_texts(detector.model.bank), "background_D": None}
    chosen = choose_ranking(shown, start=Calibration(), **data)
    outcome = run_typed(shown, calibration=chosen, floor=1e-4, **data)
    fitted = with_fit(chosen, torch.from_numpy(outcome.score), torch.from_numpy(outcome.correct))
    return replace(fitted, threshold=quiet_threshold(run_typed(shown, calibration=fitted, floor=0.0, **data)))


def main(argv: list[str]) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m ovd.calibrate", description=__doc__)
    parser.add_argument(
        "--weights", required=True, metavar="FOLDER", help="exported detector; its model.json is rewritten"
    )
    parser.add_argument("--scenes", type=int, default=150, help="scenes for the fit, and again for the report")
    parser.add_argument("--size", type=int, default=256, help="side of the scenes in pixels")
    parser.add_argument(
        "--second-look",
        type=int,
        metavar="N",
        help="regions of a picture that the image encoder sees as crops too, from now on (default: as in model.json)",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default auto)")
    parser.add_argument("--report", type=Path, metavar="FILE.json", help="write the figures there too")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="draw score against share correct")
    args = parser.parse_args(argv)
    folder = Path(args.weights)
    if not (folder / "model.json").is_file():
        raise UserError(f"--weights {folder}: no model.json there; give the exported/ folder of a training")
    if args.scenes < 10:
        raise UserError(f"--scenes {args.scenes}: at least 10 are needed to fit anything")

    import torch

    from ovd.detector import Detector
    from ovd.evaluation.reliability import reliability_svg
    from ovd.evaluation.typed import choose_ranking, run_typed
    from ovd.inference.calibration import with_fit
    from ovd.inference.scoring import Calibration
    from pretrain.data.stickers import Stickers

    detector = Detector.load(folder, device=args.device, cache_size=0, second_look=args.second_look, masks=False)
    stickers = Stickers.load()
    rows = detector.text.embed(detector.resolve(list(stickers.nouns)))
    bank, background = detector.model.bank, detector.model.background
    scenes = typed_scenes(detector, stickers, seed=1000, count=args.scenes, size=args.size, base_only=True)
    chosen = choose_ranking(scenes, rows_CD=rows, bank_BD=bank, background_D=background, start=Calibration())

    def outcome_of(calibration: Calibration, floor: float) -> Outcome:
        return run_typed(
            scenes, rows_CD=rows, bank_BD=bank, background_D=background, calibration=calibration, floor=floor
        )

    outcome = outcome_of(chosen, 1e-4)
    fitted = with_fit(chosen, torch.from_numpy(outcome.score), torch.from_numpy(outcome.correct))
    outcome = outcome_of(fitted, 0.0)
    fitted = replace(fitted, threshold=quiet_threshold(outcome))
    if detector.examples is not None:
        fitted = fitted.with_examples(fit_examples(detector, stickers, scenes))
    report, curve = measure(
        typed_scenes(detector, stickers, seed=2000, count=args.scenes, size=args.size, base_only=False),
        rows,
        bank,
        background,
        fitted,
        near_synonyms(stickers),
    )
    path = folder / "model.json"
    card = read_json(path)
    card |= {"calibration": asdict(fitted), "second_look": detector.second_look}
    write_atomically(path, (json.dumps(card, indent=1, ensure_ascii=False) + "\n").encode())
    found = {"second_look": detector.second_look, "calibration": asdict(fitted), "other_scenes": report}
    text = json.dumps(found, indent=1)
    print(text)
    if args.plot:
        caption = "typed words, scenes that were not fitted on"
        write_atomically(args.plot, reliability_svg(curve, title=f"Scores of {folder}", caption=caption).encode())
    if args.report:
        args.report.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    run_cli(main)
