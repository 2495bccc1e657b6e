# SPDX-License-Identifier: Apache-2.0
"""``make weights-photo PHOTOS=FOLDER``: weights like clip-photo and vild-photo from photos of your own, stage by stage.

The folder holds ``images/``, ``labels.json`` (file name -> nouns, photos of one thing) and COCO files
``instances*.json`` or ``.json.gz``, first the one whose categories are labelled in every photo; images have a
``split`` of train or val. The nouns of ``not_things.json``, where there is one (*kitchen*), give no boxes. PicoDet
comes from PyPI's ``paddlelabel-ml``, whose files two commands put into ``picodet/`` (``scripts/convert_picodet.py``
has them; ``--picodet``, make's ``PICODET=``, names another place). A stage whose result exists is skipped; a training
that was stopped goes on. The CPU time of every stage stands in ``runs/photos/weights.json``. The result lies in
``runs/photos/weights``; ``OVD_WEIGHTS`` makes it the default.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from make_weights import ROOT, Stage, run_stages

RUNS = Path("runs/photos")
PICODET = Path("picodet/model.pdmodel")
CONVERTED = RUNS / "picodet/exported/model.json"


def stages(photos: Path, picodet: Path) -> list[Stage]:
    """All stages in order."""
    files = sorted(photos.glob("instances*.json*"))
    labels, not_things = photos / "labels.json", photos / "not_things.json"
    data = [
        f"data.images={photos / 'images'}",
        f"data.annotations={json.dumps([str(file) for file in files])}",
        f"data.labels={labels}",
    ]
    clip, vild = RUNS / "lite_clip", RUNS / "vild"
    shipped = RUNS / "weights"

    def training(name: str, module: str, config: str, run: Path, *more: str) -> Stage:
        result = run / "exported" / ("config.json" if module.startswith("pretrain") else "model.json")
        command = ["-m", module, "--config", config, f"out={run}", *data, *more]
        return Stage(name=name, result=result, commands=[command], run=run)

    return [
        Stage(
            name="picodet",
            result=CONVERTED,
            commands=[["scripts/convert_picodet.py", str(picodet), "--out", str(RUNS / "picodet")]],
        ),
        training("clip-start", "pretrain.train", "photos/lite_clip_start.yaml", RUNS / "lite_clip_start"),
        training("clip", "pretrain.train", "photos/lite_clip.yaml", clip),
        Stage(
            name="ship-clip",
            result=shipped / "clip-photo/model.safetensors",
            commands=[["scripts/ship_weights.py", "clip", str(clip / "exported"), "clip-photo"]],
        ),
        Stage(
            name="regions",
            result=RUNS / "regions/done",
            commands=[
                [
                    "-m",
                    "ovd.embed",
                    "--config",
                    "photos/lite_embed.yaml",
                    f"out={RUNS / 'regions'}",
                    f"proposer={RUNS / 'picodet/exported'}",
                    f"pictures.images={photos / 'images'}",
                    f"pictures.annotations={files[0] if files else ''}",
                ]
            ],
        ),
        training(
            "vild",
            "ovd.train",
            "photos/lite_vild.yaml",
            vild,
            "encoder=clip-photo",
            f"proposals={RUNS / 'picodet/exported'}",
            "model.variant=ensemble",
            "model.conse={}",
            "model.quality={}",
            f"regions={RUNS / 'regions'}",
            *([f"data.not_things={not_things}"] if not_things.is_file() else []),
        ),
        Stage(
            name="calibrate",
            result=vild / "calibration.json",
            commands=[
                [
                    "-m",
                    "ovd.calibrate",
                    "--weights",
                    str(vild / "exported"),
                    "--data",
                    f"coco:{photos / 'images'}:{files[0] if files else ''}",
                    "--labels",
                    str(labels),
                    "--part",
                    "val",
                    "--report",
                    str(vild / "calibration.json"),
                ]
            ],
        ),
        Stage(
            name="ship-vild",
            result=shipped / "vild-photo/model.safetensors",
            commands=[["-m", "ovd.weights", "add", str(vild / "exported"), "vild-photo"]],
        ),
    ]


def main(argv: list[str]) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, help="folder of photos and labels")
    parser.add_argument("--picodet", type=Path, default=PICODET, help=f"of the package's wheel (default {PICODET})")
    parser.add_argument("--list", action="store_true", help="print the commands and run nothing")
    args = parser.parse_args(argv)
    photos, picodet = args.photos.resolve(), args.picodet.resolve()
    needed = [photos / "images", photos / "labels.json"]
    missing = [path for path in needed if not path.exists()]
    if not list(photos.glob("instances*.json*")):
        missing.append(photos / "instances*.json")
    if missing:
        print(
            f"error: {missing[0]} is not there: the folder of photos holds images/, labels.json and instances*.json "
            "(python scripts/make_photo_weights.py --help)",
            file=sys.stderr,
        )
        return 2
    if not picodet.exists() and not (ROOT / CONVERTED).exists():
        print(
            f"error: {picodet} is not there: PicoDet comes from a Python package; the commands that put it there are "
            "in scripts/convert_picodet.py (PICODET=FILE, or --picodet, names another place)",
            file=sys.stderr,
        )
        return 2
    os.chdir(ROOT)
    os.environ["OVD_WEIGHTS"] = str(ROOT / RUNS / "weights")  # the shipped weights stay as they are
    chosen = stages(photos, picodet)
    if args.list:
        for stage in chosen:
            for command in stage.commands:
                print(f"{stage.name}: python {' '.join(command)}")
        return 0
    return run_stages(chosen, RUNS / "weights.json")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
