# SPDX-License-Identifier: Apache-2.0
"""Write ``weights/vild-photo-graphs.zip``: the default's ONNX graphs, also in 8 bits, without their weights.

    python scripts/build_graphs.py                    # after a change of ovd/runtime/export.py; needs torch
    python scripts/build_graphs.py --photos FOLDER    # after new weights, too: ranges for 8 bits from these photos

With it the default is exported without torch and without photos (`ovd.runtime.assemble`).
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
from safetensors import safe_open

from ovd.export import export
from ovd.modeling.export import read_card
from ovd.runtime.assemble import COPIED, FORMS, INT8, LISTING, RANGES, Tensor, patches_of, write_archive
from ovd.runtime.files import SOURCES, graphs_of, read_runtime_card, write_runtime_card
from ovd.runtime.quantise import Ranges, activation_ranges, read_photos, write_quantised
from ovd.weights import DEFAULT, detector_folder
from pretrain.engine.errors import UserError, run_cli
from pretrain.engine.files import sha256_of

LEAST = 256  # bytes of a tensor that is cut out
TENSORS = [name for name in SOURCES if name.endswith(".safetensors")]
ALIKE = 0.05  # share of a tensor's bytes that may be patched
RANGES_OF = "64 scenes of the validation part of the photographs that the weights were chosen on"


def main(argv: list[str]) -> int:
    """Export, quantise, cut, write; returns the exit status."""
    flags = argparse.ArgumentParser(description="Write the default's ONNX graphs without their weights.")
    flags.add_argument("--photos", type=Path, metavar="FOLDER", help="to measure ranges on (default: keep the ranges)")
    options = flags.parse_args(argv)
    folder = detector_folder(DEFAULT)
    archive, root = graphs_of(folder), folder.parent
    stored = [*(f"{folder.name}/{name}" for name in TENSORS), f"{read_card(folder).encoder}/model.safetensors"]
    sources = tensors_of(root, stored)
    with tempfile.TemporaryDirectory() as temporary:
        exported = export(DEFAULT, Path(temporary, folder.name))
        card = read_runtime_card(exported)
        if options.photos is None:
            ranges = ranges_in(archive, folder)
        else:
            ranges = activation_ranges(exported, card, (), read_photos(options.photos))
        small = Path(shutil.copytree(exported, Path(temporary, "int8")))
        write_quantised(small, ranges)
        write_runtime_card(small, replace(card, precision="int8", ranges=RANGES_OF))
        files = {file.name: file.read_bytes() for file in exported.iterdir() if file.name not in COPIED}
        for file in small.iterdir():
            if file.name not in COPIED and file.read_bytes() != files[file.name]:
                files[INT8 + file.name] = file.read_bytes()
    tensors = {name: match_tensors(name, data, sources) for name, data in files.items()}
    extra = {RANGES: json.dumps(ranges).encode()}
    write_archive(files, archive, tensors, root, extra=extra)
    print(f"{archive}: {archive.stat().st_size / 1e6:.2f} MB")
    return 0


def ranges_in(archive: Path, folder: Path) -> dict[str, Ranges]:
    """The ranges that an archive holds. New heads have no say in them: these are never in 8 bits.

    Raises:
        UserError: none, or those of another proposal network or encoder.
    """
    if archive.is_file():
        with zipfile.ZipFile(archive) as packed:
            sources = json.loads(packed.read(LISTING))["sources"]
            networks = [name for name in sources if name != f"{folder.name}/{SOURCES[0]}"]
            same = all(sha256_of(folder.parent / name) == sources[name] for name in networks)
            if RANGES in packed.namelist() and same:
                return dict(json.loads(packed.read(RANGES)))
    raise UserError(f"{archive}: has no ranges of these weights; give --photos FOLDER")


def tensors_of(root: Path, files: list[str]) -> dict[bytes, Tensor]:
    """Bytes of each stored tensor in each form."""
    sources: dict[bytes, Tensor] = {}
    for file in files:
        with safe_open(root / file, framework="numpy") as tensors:
            for name in tensors.keys():
                values = tensors.get_tensor(name)
                for form, bytes_of in FORMS.items():
                    if form != "int8" or values.ndim == 4:
                        sources.setdefault(bytes_of(values), Tensor(file, name, form))
    return sources


def match_tensors(name: str, data: bytes, sources: Mapping[bytes, Tensor]) -> dict[bytes, Tensor]:
    """The stored tensors in a file of an export, by their bytes there; those in 8 bits may differ in a few channels."""
    matches: dict[bytes, Tensor] = {}
    for values, int8 in tensors_in(name, data):
        if len(values) < LEAST:
            continue
        if values in sources:
            matches[values] = sources[values]
        elif int8:
            nearest = [(_differing(values, other), other) for other, t in sources.items() if t.form == "int8"]
            share, other = min(nearest)
            if share <= ALIKE:
                matches[values] = sources[other]._replace(patches=patches_of(values, other))
    return matches


def _differing(one: bytes, other: bytes) -> float:
    """Share of bytes that are others."""
    if len(one) != len(other):
        return 1.0
    return float((np.frombuffer(one, np.uint8) != np.frombuffer(other, np.uint8)).mean())


def tensors_in(name: str, data: bytes) -> Iterator[tuple[bytes, bool]]:
    """The bytes of all tensors in a file of an export, and whether they are numbers of 8 bits."""
    if name.endswith(".onnx"):
        for tensor in onnx.load_from_string(data).graph.initializer:
            yield tensor.raw_data, tensor.data_type == onnx.TensorProto.INT8
    elif name.endswith(".npy"):
        yield np.load(io.BytesIO(data)).tobytes(), False


if __name__ == "__main__":
    run_cli(main)
