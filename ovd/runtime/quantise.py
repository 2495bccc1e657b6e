# SPDX-License-Identifier: Apache-2.0
"""INT8 for an export (needs the package onnx): convolutions of the proposal network, of its branches and of the image
tower, with the ranges that their activations have on some photos.

Static quantisation of ONNX Runtime: weights in 8 bits for each output channel, activations in 8 bits for each tensor.
Of each graph the first convolution, which sees pixels, and those after which no other comes, whose outputs are the
answer, keep single precision; so do the region head and the text tower.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ovd.inference.arrays import Floats
from ovd.pictures import resized
from ovd.runtime.cells import pixels_for_cells
from ovd.runtime.files import PROPOSALS, TOWER, RuntimeCard, branch_graph
from ovd.runtime.halve import halve
from ovd.runtime.regions import pixels_for_tower
from pretrain.data.folder import list_images, read_image
from pretrain.engine.errors import BadImageError, UserError

if TYPE_CHECKING:
    import onnx

    from ovd.modeling.export import FinetunedCard

MOST = 64
"""Photos that are looked at; more change no range that matters, and take time."""
FEW = 20
"""Fewer show too little of what occurs."""
SEEN = 1024
"""Longest side, in pixels, at which they are held in memory; the networks look at smaller ones."""
QUANTISED = ("Conv", "LeakyRelu", "Relu", "Clip", "Add", "Concat", "MaxPool", "Resize")


def quantise(
    folder: Path, card: RuntimeCard, finetuned: Sequence[FinetunedCard], photos: Sequence[NDArray[np.uint8]]
) -> None:
    """Replace graphs of an export by quantised ones.

    Args:
        folder: of the export.
        card: its card.
        finetuned: branches of fine-tuned classes on the detector's card.
        photos: (H, W, 3) RGB, like those that the detector is for.

    Raises:
        UserError: ONNX Runtime cannot quantise a graph.
    """

    def small(side: int) -> list[NDArray[np.uint8]]:
        return [resized(photo, side / max(photo.shape[:2])) for photo in photos]

    cells = [pixels_for_cells(photo, card) for side in card.proposal_sides for photo in small(side)]
    _quantise(folder / PROPOSALS, cells)
    _quantise(folder / TOWER, [pixels_for_tower(photo, card) for photo in small(card.side)])
    for branch in finetuned:
        _quantise(folder / branch_graph(branch), [pixels_for_cells(photo, card) for photo in small(branch.side)])


def read_photos(folder: Path) -> list[NDArray[np.uint8]]:
    """Up to `MOST` photos of a folder and those in it, evenly from all, none larger than `SEEN`.

    Those that cannot be read are left out, with a warning.

    Raises:
        UserError: no such folder, or no photo in it that can be read.
    """
    files = list_images(folder)
    step = max(1, len(files) / MOST)
    photos, unread = [], []
    for number in range(min(len(files), MOST)):
        try:
            photo = read_image(files[int(number * step)])
        except BadImageError as problem:
            unread.append(str(problem))
            continue
        photos.append(resized(photo, min(1, SEEN / max(photo.shape[:2]))))
    if not photos:
        raise UserError(f"{folder}: none of its photos can be read (first: {unread[0]})")
    if unread:
        print(f"warning: {folder}: {len(unread)} photos left out (first: {unread[0]})", file=sys.stderr)
    return photos


def _quantise(file: Path, inputs: Sequence[Floats]) -> None:
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder, file.name)
        model = _folded(file, plain)
        try:
            quantize_static(
                plain,
                file,
                _Photos(inputs),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=list(QUANTISED),
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                nodes_to_exclude=_kept(model.graph),
                calibrate_method=CalibrationMethod.MinMax,
            )
        except Exception as problem:  # ONNX Runtime's own exceptions have no common base that it names
            raise UserError(f"{file.name}: ONNX Runtime cannot quantise it ({problem}); leave --int8 out") from problem
    model = onnx.load(str(file))
    halve(model.graph)
    onnx.save(model, str(file))


def _folded(file: Path, target: Path) -> onnx.ModelProto:
    """Write the graph in single precision with batch norms inside their convolutions; returns it."""
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(target)
    onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    model = onnx.load(str(target))
    # What quantize_static asks for; else it warns that a graph was not prepared.
    onnx.helper.set_model_props(model, {"onnx.quant.pre_process": "onnxruntime.quant"})
    for number, node in enumerate(model.graph.node):
        node.name = node.name or f"{node.op_type}_{number}"
    onnx.save(model, str(target))
    return model


def _kept(graph: onnx.GraphProto) -> list[str]:
    """Names of the convolutions that stay in single precision: without another one before them, or after them."""
    first: list[str] = []
    following: set[str] = set()  # tensors that a convolution had a part in
    for node in graph.node:
        follows = any(name in following for name in node.input)
        if node.op_type == "Conv" and not follows:
            first.append(node.name)
        if node.op_type == "Conv" or follows:
            following.update(node.output)
    last: list[str] = []
    leading: set[str] = set()  # tensors from which a convolution is reached
    for node in reversed(graph.node):  # in the order of their computation, backwards
        reaches = any(name in leading for name in node.output)
        if node.op_type == "Conv" and not reaches:
            last.append(node.name)
        if node.op_type == "Conv" or reaches:
            leading.update(node.input)
    return [*first, *last]


class _Photos:
    """Inputs of a graph, one after the other, as `onnxruntime.quantization.CalibrationDataReader`."""

    def __init__(self, inputs: Sequence[Floats]) -> None:
        self._left: Iterator[Floats] = iter(inputs)

    def get_next(self) -> Mapping[str, Floats] | None:
        """The next inputs by name; None: that was all."""
        pixels = next(self._left, None)
        return None if pixels is None else {"pixels": pixels}
