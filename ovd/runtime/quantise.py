# SPDX-License-Identifier: Apache-2.0
"""INT8 for an export (needs the package onnx): convolutions of the image tower, and of a NanoDet and its branches, with
the ranges that their activations have on some photos.

Static quantisation of ONNX Runtime: weights in 8 bits for each output channel, activations in 8 bits for each tensor.
Of each graph the first convolution, which sees pixels, and those after which no other comes, whose outputs are the
answer, keep single precision; so do the region head, ConSE's network, the text tower, and networks with hard-swish
(`UNSUITED`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ovd.inference.arrays import Floats
from ovd.pictures import resized
from ovd.runtime.cells import pixels_for_cells
from ovd.runtime.files import PROPOSALS, TOWER, RuntimeCard, branch_graph
from ovd.runtime.halve import halve
from ovd.runtime.regions import pixels_for_tower
from pretrain.data.folder import list_images, read_image
from pretrain.engine.errors import BadImageError, UserError, warn

if TYPE_CHECKING:
    import onnx

    from ovd.modeling.export import FinetunedCard

MAX_PHOTOS = 64
"""Photos used; more change no range that matters, and take time."""
MIN_PHOTOS = 20
"""Fewer photos leave values out that occur."""
MAX_SIDE = 1024
"""Longest side, in pixels, of photos in memory; the networks take smaller ones."""
Ranges: TypeAlias = Mapping[str, tuple[float, float]]
"""Of a graph: the least and the greatest value of each tensor."""
UNSUITED = "HardSwish"
"""Operation of the networks that stay as they are. PicoDet's best scores move by .48 in 8 bits (mean of the 20 best
cells of 8 photos at two sizes, ranges of 24 others), and it is not faster: 70 ms a photo where it takes 64 in single
precision (one thread of an AMD EPYC, processor's time)."""
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
    write_quantised(folder, activation_ranges(folder, card, finetuned, photos))


def activation_ranges(
    folder: Path, card: RuntimeCard, finetuned: Sequence[FinetunedCard], photos: Sequence[NDArray[np.uint8]]
) -> dict[str, Ranges]:
    """The ranges of each graph of an export that is quantised; arguments and errors as of `quantise`."""

    def small(side: int) -> list[NDArray[np.uint8]]:
        return [resized(photo, side / max(photo.shape[:2])) for photo in photos]

    cells = [pixels_for_cells(photo, card) for side in card.proposal_sides for photo in small(side)]
    inputs = {PROPOSALS: cells, TOWER: [pixels_for_tower(photo, card) for photo in small(card.side)]}
    for branch in finetuned:
        inputs[branch_graph(branch)] = [pixels_for_cells(photo, card) for photo in small(branch.side)]
    return {name: _ranges(folder / name, pixels) for name, pixels in inputs.items() if is_suited(folder / name)}


def is_suited(file: Path) -> bool:
    """Whether a graph keeps its answers in 8 bits."""
    import onnx

    return all(node.op_type != UNSUITED for node in onnx.load(str(file)).graph.node)


def write_quantised(folder: Path, ranges: Mapping[str, Ranges]) -> None:
    """Replace graphs of an export by quantised ones.

    Args:
        folder: of the export.
        ranges: of each graph, by its file's name.

    Raises:
        UserError: ONNX Runtime cannot quantise a graph, or ranges are of another one.
    """
    import onnx

    for name, one in ranges.items():
        onnx.save(quantised(folder / name, one), str(folder / name))


def read_photos(folder: Path) -> list[NDArray[np.uint8]]:
    """Up to `MAX_PHOTOS` photos of a folder and those in it, evenly from all, none larger than `MAX_SIDE`.

    Those that cannot be read are left out, with a warning.

    Raises:
        UserError: no such folder, or no photo in it that can be read.
    """
    files = list_images(folder)
    step = max(1, len(files) / MAX_PHOTOS)
    photos, unread = [], []
    for number in range(min(len(files), MAX_PHOTOS)):
        try:
            photo = read_image(files[int(number * step)])
        except BadImageError as problem:
            unread.append(str(problem))
            continue
        photos.append(resized(photo, min(1, MAX_SIDE / max(photo.shape[:2]))))
    if not photos:
        raise UserError(f"{folder}: none of its photos can be read (first: {unread[0]})")
    if unread:
        warn(f"{folder}: {len(unread)} photos left out (first: {unread[0]})")
    return photos


def quantised(
    file: Path,
    ranges: Ranges,
    *,
    excluded: Callable[[onnx.GraphProto], list[str]] | None = None,
    per_channel: bool = True,
) -> onnx.ModelProto:
    """A graph with its convolutions in 8 bits.

    Args:
        file: of an export, in single precision.
        ranges: of its tensors.
        excluded: names the nodes that stay in single precision; None: `outermost`.
        per_channel: scales of weights for each output channel, else for each tensor.

    Raises:
        UserError: see `write_quantised`.
    """
    from onnxruntime.quantization import CalibrationMethod, QuantType
    from onnxruntime.quantization.calibrate import TensorData, TensorsData
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

    model = prepared(file)
    stay = (excluded or outermost)(model.graph)
    _fold(model.graph, stay)
    data = {name: TensorData(lowest=np.float32(low), highest=np.float32(high)) for name, (low, high) in ranges.items()}
    try:
        quantizer = QDQQuantizer(
            model,
            per_channel,
            False,  # weights in 8 bits, not 7
            QuantType.QInt8,
            QuantType.QUInt8,
            TensorsData(CalibrationMethod.MinMax, data),
            [],  # no list of nodes: all of these kinds
            [*stay, *size_arithmetic(model.graph)],
            list(QUANTISED),
            {},
        )
        quantizer.quantize_model()
    except Exception as problem:  # ONNX Runtime's own exceptions have no common base that it names
        raise UserError(f"{file.name}: ONNX Runtime cannot quantise it ({problem}); leave --int8 out") from problem
    result = quantizer.model.model
    halve(result.graph)
    return result


def prepared(file: Path) -> onnx.ModelProto:
    """A graph in single precision without what a runtime would remove before it runs; batch norms stay."""
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    with tempfile.TemporaryDirectory() as folder:
        target = str(Path(folder, file.name))
        options.optimized_model_filepath = target
        onnxruntime.InferenceSession(
            str(file), options, providers=["CPUExecutionProvider"], disabled_optimizers=["ConvBNFusion"]
        )
        model = onnx.load(target)
    for number, node in enumerate(model.graph.node):
        node.name = node.name or f"{node.op_type}_{number}"
    return model


def _ranges(file: Path, inputs: Sequence[Floats]) -> Ranges:
    """The least and the greatest value of each tensor that is quantised."""
    import onnx
    from onnxruntime.quantization import CalibrationMethod, create_calibrator

    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder, file.name)
        model = prepared(file)
        _fold(model.graph, outermost(model.graph))
        onnx.save(model, str(plain))
        try:
            calibrator = create_calibrator(
                plain,
                list(QUANTISED),
                augmented_model_path=str(Path(folder, "augmented.onnx")),
                calibrate_method=CalibrationMethod.MinMax,
            )
            calibrator.collect_data(_Photos(inputs))
            ranges = calibrator.compute_data()
        except Exception as problem:  # see `quantised`
            raise UserError(f"{file.name}: ONNX Runtime cannot quantise it ({problem}); leave --int8 out") from problem
    return {name: (data.lowest.item(), data.highest.item()) for name, data in ranges.items()}


def _fold(graph: onnx.GraphProto, excluded: Sequence[str]) -> None:
    """Put batch norms into the convolutions before them that are quantised.

    The others keep theirs, and so their weights as they are stored; the runtime folds them.
    """
    from onnx import numpy_helper

    tensors = {tensor.name: tensor for tensor in graph.initializer}
    norms = {node.input[0]: node for node in graph.node if node.op_type == "BatchNormalization"}
    for node in list(graph.node):
        norm = norms.get(node.output[0])
        if node.op_type != "Conv" or norm is None or node.name in excluded:
            continue
        weights = tensors[node.input[1]]
        scale, offset, mean, variance = (numpy_helper.to_array(tensors[name]) for name in norm.input[1:])
        (epsilon,) = (attribute.f for attribute in norm.attribute if attribute.name == "epsilon")
        factor = scale / np.sqrt(variance + np.float32(epsilon))
        before = numpy_helper.to_array(tensors[node.input[2]]) if len(node.input) > 2 else np.float32(0)
        folded = numpy_helper.to_array(weights) * factor[:, None, None, None]
        weights.CopyFrom(numpy_helper.from_array(folded, weights.name))
        bias = numpy_helper.from_array((before - mean) * factor + offset, f"{weights.name}.bias")
        graph.initializer.append(bias)
        node.input[:] = [node.input[0], weights.name, bias.name]
        node.output[:] = norm.output
        graph.node.remove(norm)
    used = {name for node in graph.node for name in node.input}
    unused = [tensor for tensor in graph.initializer if tensor.name not in used]
    for tensor in unused:
        graph.initializer.remove(tensor)


def outermost(graph: onnx.GraphProto) -> list[str]:
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


def size_arithmetic(graph: onnx.GraphProto) -> list[str]:
    """Names of the nodes that compute with the sizes of tensors, not with their values.

    Networks that TensorFlow trained pad by what their input's size asks for: in 8 bits that is a pixel too many or few.
    """
    values = {tensor.name for tensor in graph.input}  # that depend on the picture's pixels
    names = []
    for node in graph.node:
        if node.op_type != "Shape" and any(name in values for name in node.input):
            values.update(node.output)
        else:
            names.append(node.name)
    return names


class _Photos:
    """Inputs of a graph, one after the other, as `onnxruntime.quantization.CalibrationDataReader`."""

    def __init__(self, inputs: Sequence[Floats]) -> None:
        self._remaining: Iterator[Floats] = iter(inputs)

    def get_next(self) -> Mapping[str, Floats] | None:
        """The next inputs by name; None: that was all."""
        pixels = next(self._remaining, None)
        return None if pixels is None else {"pixels": pixels}
