# SPDX-License-Identifier: Apache-2.0
"""``wordbox export --format onnx --weights NAME``: a detector as files that run without torch.

    wordbox export --format onnx                                    the shipped default, into weights/vild-photo/onnx
    wordbox export --format onnx --weights runs/mine --output FOLDER
    wordbox export --format onnx --int8                             convolutions in 8 bits, into …/onnx-int8
    wordbox export --format onnx --int8 --calibrate-on photos/      the same for photos of yours

`ovd.runtime.files` says what is written. An export in the folder ``onnx`` of its weights is found there by every
command; one in another folder is given as ``--weights FOLDER``. Only detectors of photographs (``model.arch: fvlm``)
have an export. It needs torch; those of the shipped default are put together without (`ovd.runtime.assemble`).
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from ovd.picture_files import PACKAGED_PHOTOS
from ovd.runtime.files import EXPORT_FOLDER, INT8_FOLDER
from pretrain.engine.errors import NEEDS_TORCH, UserError, run_cli, warn
from pretrain.engine.flags import CommandParser


def parser() -> CommandParser:
    """Return the command line."""
    flags = CommandParser(
        "wordbox export",
        "Write a detector of photographs as ONNX files, for ONNX Runtime without torch.",
        details=__doc__,
    )
    add = flags.add_argument
    add("--format", choices=("onnx",), default="onnx", help="the only one (default onnx)")
    add("--weights", default="default", help="name of shipped weights, or a folder written by ovd.train")
    add("--output", type=Path, metavar="FOLDER",
        help=f"is made, or replaced where it is an export (default: {EXPORT_FOLDER}, or {INT8_FOLDER}, in the "
        "folder of the weights)")  # fmt: skip
    add("--int8", action="store_true", help="convolutions in 8 bits: a smaller and less exact export")
    add("--calibrate-on", type=Path, metavar="FOLDER",
        help="with --int8: photos that show which values occur, 20 or more like yours (default: the ranges that came "
        "with the weights, else the page's examples)")  # fmt: skip
    return flags


def main(argv: list[str]) -> int:
    """Run the command line; returns the exit status."""
    options = parser().parse_args(argv)
    if options.calibrate_on is not None and not options.int8:
        raise UserError("--calibrate-on is for --int8: an export in single precision needs no photos")
    folder = export(options.weights, options.output, int8=options.int8, photos=options.calibrate_on)
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{folder}: {size / 1e6:.1f} MB, runs with ONNX Runtime")
    return 0


def export(weights: str | Path, output: Path | None = None, *, int8: bool = False, photos: Path | None = None) -> Path:
    """Export a detector; returns the folder.

    Args:
        weights: name, or folder.
        output: of the export; None: in the folder of the weights.
        int8: whether convolutions are quantised.
        photos: folder with photos for which they are; None: ranges that came with the weights, or
            `PACKAGED_PHOTOS`.

    Raises:
        UserError: a detector of another kind, a folder that holds something else, or photos that cannot be read.
    """
    from ovd.modeling.export import read_card
    from ovd.runtime.assemble import assemble, has_export
    from ovd.runtime.files import CARD, graphs_of
    from ovd.weights import detector_folder

    source = detector_folder(weights)
    card = read_card(source)
    target = source / (INT8_FOLDER if int8 else EXPORT_FOLDER) if output is None else output
    if card.arch != "fvlm":
        raise UserError(
            f"{source.name} (model.arch {card.arch}) has no export to ONNX, only detectors of photographs (fvlm) have"
        )
    if not (source / "model.safetensors").is_file():
        raise UserError(f"{source}: is an export itself; give the weights that it was made of")
    if target.exists() and not (target.is_dir() and (not any(target.iterdir()) or (target / CARD).is_file())):
        raise UserError(f"--output {target}: is not an export; give another folder")
    without_torch = importlib.util.find_spec("torch") is None
    if without_torch and photos is not None:
        raise UserError(f"--calibrate-on needs torch: {NEEDS_TORCH}")
    if without_torch or (int8 and photos is None and not card.finetuned and has_export(graphs_of(source), int8=True)):
        assemble(source, target, int8=int8)
        return target
    from ovd.inference.encoder import load_encoder_of
    from ovd.runtime.export import export_onnx
    from ovd.runtime.quantise import MIN_PHOTOS, read_photos

    images = read_photos(photos or PACKAGED_PHOTOS) if int8 else []
    if photos is not None and len(images) < MIN_PHOTOS:
        text = (
            f"{len(images)} photo{'s' if len(images) != 1 else ''}, where {MIN_PHOTOS} or more show which values occur"
        )
        warn(f"--calibrate-on {photos}: {text}")
    which = f"{len(images)} photos of {'the page' if photos is None else photos.name}"
    export_onnx(source, load_encoder_of(source, card), target, photos=images, photos_are=which)
    return target


if __name__ == "__main__":
    run_cli(main)
