# SPDX-License-Identifier: Apache-2.0
"""``wordbox calibrate --encoder``: calibrate another encoder's scores on the boxes of a detector."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace

from ovd.detector import Detector
from ovd.evaluation.encoder_calibration import fit_encoder, prepare_encoder
from ovd.evaluation.photo_calibration import measure, photos_of, require_boxes
from ovd.evaluation.reliability import report_fit
from ovd.user_files import StoredCalibration, calibration_file, calibration_key, write_calibration
from ovd.weights import detector_folder
from pretrain.engine.errors import warn


def calibrate_encoder(args: argparse.Namespace) -> int:
    """Fit an encoder's scores on one half of the photos, measure on the other, keep the fit for the user."""
    folder = detector_folder(args.weights)
    photos = photos_of(args.data, labels=args.labels, part=args.part)
    for notice in photos.notices:
        warn(notice)
    require_boxes(photos, args.data)
    detector = Detector.load(args.weights, device=args.device, cache_size=0, masks=False, encoder=args.encoder)
    typed = prepare_encoder(detector, photos, limit=2 * args.scenes)
    fit, report = (replace(typed, scenes=typed.scenes[n::2], named=typed.named[n::2]) for n in (0, 1))
    fitted = fit_encoder(fit)
    figures, curve = measure(report, fitted)
    stored = StoredCalibration(
        weights=folder.resolve().name,
        encoder=args.encoder,
        key=calibration_key(folder, detector.text.encoder),
        data=args.data,
        scenes=len(fit.scenes),
        calibration=fitted.record(),
        figures=figures,
    )
    file = calibration_file(folder, args.encoder, detector.text.encoder)
    write_calibration(file, stored)
    report_fit(
        {"calibration": fitted.record(), "data": args.data, "other_half": figures},
        curve,
        title=f"Scores of {args.weights} + {args.encoder}",
        caption="typed words, photos not fitted on",
        plot=args.plot,
        file=args.report,
    )
    print(f"kept in {file}", file=sys.stderr)
    return 0
