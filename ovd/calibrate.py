# SPDX-License-Identifier: Apache-2.0
"""``wordbox calibrate --weights FOLDER``: calibrate a detector's scores, and report the calibration error.

Fits the temperature and the exponent of the objectness by average precision, then slope and offset by likelihood, then
the default threshold: the score that absent words stay below in 95 % of the pictures; then the threshold of
``everything``: the score from which seven in ten detections are right. The fit uses scenes of its own (seed 1000;
evaluation uses seed 0) and base words only. The result is measured on other scenes (seed 2000) with base and novel
words, and written to ``model.json``. Both have the held-out drawing style: scores fitted on the training styles would
be overconfident.

Scores of crops are then fitted likewise, with each word replaced by one crop in a training style.

With ``--data`` labelled pictures replace the scenes: half are for the fit, half for the report. Scores of crops stay as
they are.

With ``--encoder`` another image-text encoder classifies crops of the boxes. Its calibration is stored in the user's
folder (``ovd.user_files``) and used whenever the same encoder runs on the same boxes; the weights do not change. It
needs ``--data``, and takes ``--scenes`` pictures for the fit and as many for the report.

A detector of photographs (``model.arch: fvlm``) needs ``--data``, photos that it was not trained on, and also takes
photos of single objects (``--labels TABLE.json``). It is measured on half of them, then fitted on all. Then crops from
other photos replace the words, and the scores of crops are fitted.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ovd.query_flags import add_encoder_flag
from pretrain.engine.errors import UserError, run_cli, warn
from pretrain.engine.files import read_json, require_writable, require_writable_file, write_atomically
from pretrain.engine.flags import CommandParser, integer

if TYPE_CHECKING:
    from ovd.detector import Detector
    from ovd.evaluation.reliability import Reliability
    from ovd.inference.scoring import Calibration


def calibrate_on_scenes(args: argparse.Namespace) -> int:
    """Fit on some Sticker Scenes, words and examples; measure on others."""
    from ovd.evaluation.fitting import fit_calibration
    from ovd.evaluation.prompt_free import prompt_free_figures, with_fitted_prompt_free
    from ovd.evaluation.scene_calibration import (
        fit_examples,
        measure,
        near_synonyms,
        typed_scenes,
        uncalibrated_scorer,
    )
    from pretrain.data.stickers import Stickers

    detector, count, size = load(args), args.scenes, args.size
    stickers = Stickers.load()
    scorer = uncalibrated_scorer(detector, detector.resolve(list(stickers.nouns)))
    scenes = typed_scenes(detector, stickers, seed=1000, count=count, size=size, base_only=True)
    fitted = fit_calibration(scenes, scorer)
    if detector.examples is not None:
        fitted = fitted.with_examples(fit_examples(detector, stickers, scenes))
    fitted = with_fitted_prompt_free(detector, fitted, scenes, stickers.nouns)
    others = typed_scenes(detector, stickers, seed=2000, count=count, size=size, base_only=False)
    figures, curve = measure(others, replace(scorer, calibration=fitted), near_synonyms(stickers))
    figures |= prompt_free_figures(detector, fitted, others, stickers.nouns)
    write(args, detector, fitted, {"other_scenes": figures}, curve, caption="typed words, scenes not fitted on")
    return 0


def calibrate_on_labels(args: argparse.Namespace) -> int:
    """Fit the words' scores on half of the pictures of a data set; measure on the other half."""
    from ovd.evaluation.labelled_scenes import labels_of
    from ovd.evaluation.scene_calibration import fit_labels

    if args.labels or args.part:
        raise UserError(
            f"--labels and --part are for detectors of photographs (model.arch fvlm), and {args.weights} is not one; a "
            "part is named in --data: FILE:PART"
        )
    labels = labels_of(args.data)
    detector = load(args)
    fitted, figures, curve = fit_labels(detector, labels, count=args.scenes)
    write(args, detector, fitted, {"other_half": figures}, curve, caption="typed words, half of the pictures")
    return 0


def parser() -> CommandParser:
    """Return the command line."""
    flags = CommandParser(
        "wordbox calibrate", "Calibrate a detector's scores, and report the calibration error.", details=__doc__
    )
    add = flags.add_argument
    add("--weights", required=True, metavar="FOLDER",
        help="exported detector, whose model.json is rewritten; with --encoder also a name of shipped weights, which "
        "do not change")  # fmt: skip
    add_encoder_flag(add)
    add("--data", metavar="SPEC", help="labelled pictures to fit on: data.yaml, COCO .json or folder, optionally "
        ":PART (default: Sticker Scenes)")  # fmt: skip
    add("--labels", type=Path, metavar="TABLE.json",
        help="for a detector of photographs: JSON table of file name -> nouns, photos of single objects")  # fmt: skip
    add("--part", help="for a detector of photographs: pictures of this part of --data (default: as in SPEC, else val "
        "if there is one; all: every part)")  # fmt: skip
    add("--scenes", type=integer(10), default=150,
        help="scenes or pictures for the fit, and as many for the report (default 150); a detector of photographs "
        "takes all of --data")  # fmt: skip
    add("--size", type=integer(64, 2048), default=256, help="side of the scenes in pixels (default 256)")
    add("--crop-refinement", "--second-look", type=integer(0), metavar="N",
        help="regions per image whose crops the image encoder embeds as well, from now on (default: as in "
        "model.json)")  # fmt: skip
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default auto)")
    add("--report", type=Path, metavar="FILE.json", help="also write the figures to this file")
    add("--plot", type=Path, metavar="FILE.svg", help="write a reliability diagram")
    return flags


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the command line.

    Raises:
        UserError: a wrong flag, or no detector in the folder.
    """
    args = parser().parse_args(argv)
    for flag, file in (("--report", args.report), ("--plot", args.plot)):
        if file is not None:
            require_writable_file(file, flag=flag)
    if args.encoder:
        if not args.data or args.crop_refinement:
            raise UserError(
                "--encoder needs --data, labelled photos to fit on, and cannot be combined with --crop-refinement"
            )
        return args
    folder = Path(args.weights)
    if not (folder / "model.json").is_file():
        raise UserError(
            f"--weights {folder}: no folder with a model.json; give the exported/ folder of a training. Shipped "
            "weights stay as they are: calibrate a copy of their folder"
        )
    if (args.labels or args.part) and not args.data:
        raise UserError("--labels and --part need --data")
    require_writable(folder)
    return args


def main(argv: list[str]) -> int:
    """Entry point; returns the exit status."""
    args = parse(argv)
    if args.encoder:
        from ovd.calibrate_encoder import calibrate_encoder

        return calibrate_encoder(args)
    from ovd.modeling.export import read_card

    if read_card(Path(args.weights)).arch == "fvlm":
        return calibrate_on_photos(args)
    return calibrate_on_labels(args) if args.data else calibrate_on_scenes(args)


def calibrate_on_photos(args: argparse.Namespace) -> int:
    """Fit on one half of the photos, measure on the other, then fit on all of them."""
    from ovd.evaluation.photo_calibration import (
        MIN_PHOTOS,
        fit,
        measure,
        named_of_other_words,
        photos_of,
        prepare,
        require_boxes,
    )
    from ovd.evaluation.prompt_free import (
        prompt_free_figures,
        with_fitted_prompt_free,
        with_prompt_free_threshold,
    )
    from ovd.inference.fvlm_regions import WordScorer

    if not args.data:
        raise UserError(f"--weights {args.weights}: a detector of photographs is calibrated on photos: give --data")
    if calibrate_finetuned(args):
        return 0
    photos = photos_of(args.data, labels=args.labels, part=args.part)
    for notice in photos.notices:
        warn(notice)
    require_boxes(photos, args.data)
    detector = load(args)
    typed, names = prepare(detector, photos), photos.table.words
    first, second = typed.half(0), typed.half(1)
    fitted = with_prompt_free_threshold(detector, fit(first)[0], first.scenes, names)
    figures, curve = measure(second, fitted)
    figures |= prompt_free_figures(detector, fitted, second.scenes, names)
    fitted, crops_fitted = fit(typed)
    if isinstance(typed.scorer, WordScorer) and not named_of_other_words(typed):
        warn(
            f"--labels: fewer than {MIN_PHOTOS} photos of one thing that the proposal network has no word for; the "
            "calibration of such words is unchanged"
        )
    if not crops_fitted:
        warn("too few photos show the same words to fit the scores of crops; their calibration is unchanged")
    fitted = with_fitted_prompt_free(detector, fitted, typed.scenes, names)
    write(args, detector, fitted, {"other_half": figures}, curve, caption="typed words, half of the photos")
    return 0


def calibrate_finetuned(args: argparse.Namespace) -> bool:
    """Fit the fine-tuned classes, and nothing else, if the labels name any; returns whether they do."""
    from ovd.data.finetune_photos import FinetunePhotos
    from ovd.evaluation.finetuned import recalibrated
    from ovd.evaluation.labelled_scenes import labels_of
    from ovd.evaluation.reliability import report_fit
    from ovd.inference.fvlm_regions import FvlmRegionModel
    from ovd.inference.fvlm_torch import TorchNetwork
    from ovd.modeling.export import read_card, write_card
    from ovd.words import name_key

    folder = Path(args.weights)
    card = read_card(folder)
    if not card.finetuned:
        return False
    labels = labels_of(args.data, part=args.part)
    photos = FinetunePhotos(folder=labels.root, truth=labels.truth(), confident=0.3, doubtful=0.08)
    names = {name_key(name) for branch in card.finetuned for name in branch.names}
    if not names & {name_key(name) for name in photos.names}:
        return False
    for notice in photos.notices:
        warn(notice)
    others = [name for name in photos.names if name_key(name) not in names]
    if others:
        warn(f"{labels.where}: not classes of this detector, calibration unchanged: {', '.join(others)}")
    model = load(args).model
    assert isinstance(model, FvlmRegionModel) and isinstance(model.network, TorchNetwork)
    assert model.network.finetuned is not None
    fitted, figures, curve = recalibrated(card, model.network.finetuned, photos)
    write_card(folder, fitted)
    content = {"own": [asdict(branch) for branch in fitted.finetuned], "data": args.data, "other_half": figures}
    report_fit(
        content,
        curve,
        title=f"Scores of {args.weights}",
        caption="fine-tuned classes, half of the photos",
        plot=args.plot,
        file=args.report,
    )
    return True


def load(args: argparse.Namespace) -> Detector:
    """The detector that the command names."""
    from ovd.detector import Detector

    return Detector.load(
        Path(args.weights), device=args.device, cache_size=0, crop_refinement=args.crop_refinement, masks=False
    )


def write(
    args: argparse.Namespace,
    detector: Detector,
    fitted: Calibration,
    figures: dict[str, dict[str, float]],
    curve: Reliability,
    *,
    caption: str,
) -> None:
    """Write the calibration into the card, print the figures, and write what ``--plot`` and ``--report`` name."""
    from ovd.evaluation.reliability import report_fit

    path = Path(args.weights) / "model.json"
    values = {"crop_refinement": detector.crop_refinement, "calibration": fitted.record()}
    card = read_json(path)
    card.pop("second_look", None)  # crop_refinement's former name
    write_atomically(path, (json.dumps(card | values, indent=1, ensure_ascii=False) + "\n").encode())
    content = values | {"data": args.data or "stickers"} | figures
    report_fit(content, curve, title=f"Scores of {args.weights}", caption=caption, plot=args.plot, file=args.report)


if __name__ == "__main__":
    run_cli(main)
