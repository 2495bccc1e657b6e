# SPDX-License-Identifier: Apache-2.0
"""``wordbox export --format onnx --weights NAME``: a detector as files that run without torch.

    wordbox export --format onnx                                    the shipped default, into weights/vild-photo/onnx
    wordbox export --format onnx --weights runs/mine --output FOLDER

`ovd.runtime.files` says what is written. An export in the folder ``onnx`` of its weights is found there by every
command; one in another folder is given as ``--weights FOLDER``. Only detectors of photographs (``model.arch: fvlm``)
have an export. It needs torch; that of the shipped default is put together without (`ovd.runtime.assemble`).
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from ovd.runtime.files import BESIDE
from pretrain.engine.errors import UserError, run_cli
from pretrain.engine.flags import CommandParser


def parser() -> CommandParser:
    """Return the command line."""
    flags = CommandParser(
        "wordbox export",
        "Write a detector of photographs as ONNX files, for ONNX Runtime without torch.",
        details=__doc__,
    )
    flags.add_argument("--format", choices=("onnx",), default="onnx", help="the only one (default onnx)")
    flags.add_argument("--weights", default="default", help="name of shipped weights, or a folder written by ovd.train")
    flags.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help=f"is made, or replaced where it is an export (default: {BESIDE} in the folder of the weights)",
    )
    return flags


def main(argv: list[str]) -> int:
    """Run the command line; returns the exit status."""
    options = parser().parse_args(argv)
    folder = export(options.weights, options.output)
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{folder}: {size / 1e6:.1f} MB, runs with ONNX Runtime")
    return 0


def export(weights: str | Path, output: Path | None = None) -> Path:
    """Export a detector; returns the folder.

    Raises:
        UserError: a detector of another kind, or a folder that holds something else.
    """
    from ovd.modeling.export import read_card
    from ovd.runtime.files import CARD
    from ovd.weights import detector_folder

    source = detector_folder(weights)
    card = read_card(source)
    target = source / BESIDE if output is None else output
    if card.arch != "fvlm":
        raise UserError(
            f"{source.name} (model.arch {card.arch}) has no export to ONNX, only detectors of photographs (fvlm) have"
        )
    if not (source / "model.safetensors").is_file():
        raise UserError(f"{source}: is an export itself; give the weights that it was made of")
    if target.exists() and not (target.is_dir() and (not any(target.iterdir()) or (target / CARD).is_file())):
        raise UserError(f"--output {target}: holds something that is no export; give another folder")
    if importlib.util.find_spec("torch") is None:
        from ovd.runtime.assemble import assemble

        assemble(source, target)
        return target
    from ovd.inference.encoder import load_encoder_of
    from ovd.runtime.export import export_onnx

    export_onnx(source, load_encoder_of(source, card), target)
    return target


if __name__ == "__main__":
    run_cli(main)
