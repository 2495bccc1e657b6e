# SPDX-License-Identifier: Apache-2.0
"""Write ``weights/vild-photo-graphs.zip``: the default's ONNX graphs without their weights.

    python scripts/build_graphs.py      # after new weights, or a change of ovd/runtime/export.py; needs torch

With it `make demo`, `make wheel` and the container export the default without torch (`ovd.runtime.assemble`).
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from safetensors import safe_open

from ovd.export import export
from ovd.modeling.export import read_card
from ovd.runtime.assemble import FORMS, Tensor, graphs_of, write_archive
from ovd.runtime.files import SOURCES
from ovd.weights import DEFAULT, detector_folder
from pretrain.engine.errors import run_cli

LEAST = 256  # bytes of a tensor that is cut out


def main(argv: list[str]) -> int:
    """Export, cut, write; returns the exit status."""
    argparse.ArgumentParser(description="Write the default's ONNX graphs without their weights.").parse_args(argv)
    folder = detector_folder(DEFAULT)
    root = folder.parent
    known: dict[bytes, Tensor] = {}
    for source in [*(f"{folder.name}/{name}" for name in SOURCES), f"{read_card(folder).encoder}/model.safetensors"]:
        with safe_open(root / source, framework="numpy") as tensors:
            for name in tensors.keys():
                for form, bytes_of in FORMS.items():
                    known.setdefault(bytes_of(tensors.get_tensor(name)), (source, name, form))
    with tempfile.TemporaryDirectory() as place:
        exported = export(DEFAULT, Path(place, folder.name))
        pieces = {
            file.name: {data: known[data] for data in stored(file) if len(data) >= LEAST and data in known}
            for file in exported.iterdir()
        }
        write_archive(exported, graphs_of(folder), pieces, root)
    print(f"{graphs_of(folder)}: {graphs_of(folder).stat().st_size / 1e6:.2f} MB")
    return 0


def stored(file: Path) -> Iterator[bytes]:
    """The bytes of all tensors in a file of an export."""
    if file.suffix == ".onnx":
        for tensor in onnx.load(file).graph.initializer:
            yield tensor.raw_data
    elif file.suffix == ".npy":
        yield np.load(file).tobytes()


if __name__ == "__main__":
    run_cli(main)
