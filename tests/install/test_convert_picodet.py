# SPDX-License-Identifier: Apache-2.0
"""The reader and the interpreter that prove a conversion, and what they refuse; programs are written by the tests."""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ovd.modeling.proposals.build import load_proposals
from ovd.modeling.proposals.cells import cell_centres, decode
from ovd.modeling.proposals.picodet import STRIDES, PicoDet
from pretrain.engine.checkpoint import load_weights
from pretrain.engine.errors import UserError
from pretrain.engine.files import sha256_of
from scripts import convert_picodet
from scripts.convert_picodet import (
    Operation,
    Program,
    check,
    convert,
    fold,
    main,
    read_program,
    run,
    verify,
    walk,
    with_whole_bins,
)

CONVOLUTION = {
    "data_format": "NCHW", "dilations": [1, 1], "groups": 1, "paddings": [1, 1], "padding_algorithm": "EXPLICIT",
    "strides": [2, 2], "fuse_relu": False, "op_device": "", "workspace_size_MB": 512,
}  # fmt: skip


def varint(number: int) -> bytes:
    number %= 2**64
    low = [number >> shift & 127 for shift in range(0, max(number.bit_length(), 1), 7)]
    return bytes([byte | 128 for byte in low[:-1]] + low[-1:])


def message(*fields: tuple[int, Any]) -> bytes:
    """A protobuf message of (number, value)."""
    out = b""
    for number, value in fields:
        if isinstance(value, int):
            out += varint(number << 3) + varint(value)
        elif isinstance(value, float):
            out += varint(number << 3 | 5) + struct.pack("<f", value)
        else:
            data = value if isinstance(value, bytes) else value.encode()
            out += varint(number << 3 | 2) + varint(len(data)) + data
    return out


def attribute(name: str, value: Any) -> bytes:
    kinds = {int: (0, 3), float: (1, 4), str: (2, 5), bool: (6, 10)}
    lists = {int: (3, 6), float: (4, 7)}
    kind, field = lists[type(value[0])] if isinstance(value, list) else kinds[type(value)]
    return message((1, name), (2, kind), *[(field, v) for v in (value if isinstance(value, list) else [value])])


def operation(kind: str, inputs: Mapping[str, str], outputs: Mapping[str, str], **attributes: Any) -> bytes:
    def slots(field: int, names: Mapping[str, str]) -> list[tuple[int, bytes]]:
        return [(field, message((1, slot), *[(2, name) for name in of.split()])) for slot, of in names.items()]

    written = [(4, attribute(name, value)) for name, value in attributes.items()]
    return message(*slots(1, inputs), *slots(2, outputs), (3, kind), *written)


def tensor_type(shape: Sequence[int]) -> bytes:
    return message((1, 5), *[(2, length) for length in shape])


def write(folder: Path, operations: Sequence[bytes], parameters: Mapping[str, Tensor]) -> Path:
    variables = [
        message((1, name), (2, message((1, 7), (3, message((1, tensor_type(tensor.shape)))))), (3, 1))
        for name, tensor in parameters.items()
    ]
    block = message((1, 0), (2, -1), *[(3, v) for v in variables], *[(4, o) for o in operations])
    (folder / "model.pdmodel").write_bytes(message((1, block), (4, message((1, 2002000)))))
    with open(folder / "model.pdiparams", "wb") as file:
        for name in sorted(parameters):
            about = tensor_type(parameters[name].shape)
            file.write(struct.pack("<IQIi", 0, 0, 0, len(about)) + about + parameters[name].numpy().tobytes())
    return folder / "model.pdmodel"


class Network(nn.Module):
    """What the program computes, in torch's words."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 2, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(2)
        self.output = nn.Conv2d(2, 4, 1)
        for tensor in (self.norm.weight, self.norm.bias, self.norm.running_mean, self.norm.running_var):
            assert tensor is not None
            nn.init.uniform_(tensor, 0.5, 2)
        self.eval()

    def forward(self, picture: Tensor) -> tuple[Tensor, Tensor]:
        x = self.output(F.hardswish(self.norm(self.conv(picture))))
        return x.sigmoid().flatten(2), x.flatten(2).transpose(1, 2)


@torch.no_grad()
def program(folder: Path, *extra: bytes, bias: str = "conv2d_1.b_0", **convolution: Any) -> Path:
    """`Network`, a convolution with these attributes, up to the NMS of a detector; the extra operations come first."""
    network = Network()
    norm = network.norm
    assert norm.running_mean is not None and norm.running_var is not None and network.output.bias is not None
    parameters = {
        "conv2d_0.w_0": network.conv.weight, "bn.w_0": norm.weight, "bn.b_0": norm.bias,
        "bn.w_1": norm.running_mean, "bn.w_2": norm.running_var,
        "conv2d_1.w_0": network.output.weight, "conv2d_1.b_0": network.output.bias,
    }  # fmt: skip
    normed = {"X": "a", "Scale": "bn.w_0", "Bias": "bn.b_0", "Mean": "bn.w_1", "Variance": "bn.w_2"}
    operations = [
        operation("feed", {"X": "feed"}, {"Out": "scale_factor"}, col=1),
        operation("feed", {"X": "feed"}, {"Out": "image"}, col=0),
        *extra,
        operation(
            "conv2d", {"Input": "image", "Filter": "conv2d_0.w_0", "Bias": ""}, {"Output": "a"},
            **{**CONVOLUTION, **convolution},
        ),
        operation("batch_norm", normed, {"Y": "b", "MeanOut": "bn.w_1"}, epsilon=1e-5, is_test=True),
        operation("hard_swish", {"X": "b"}, {"Out": "c"}, offset=3.0, threshold=6.0, scale=6.0),
        operation(
            "conv2d", {"Input": "c", "Filter": "conv2d_1.w_0"}, {"Output": "d"},
            **{**CONVOLUTION, "strides": [1, 1], "paddings": [0, 0]},
        ),
        operation("elementwise_add", {"X": "d", "Y": bias}, {"Out": "e"}, axis=1),
        operation("sigmoid", {"X": "e"}, {"Out": "f"}),
        operation("reshape2", {"X": "f"}, {"Out": "scores", "XShape": "g"}, shape=[-1, 4, 16]),
        operation("transpose2", {"X": "e"}, {"Out": "h", "XShape": "i"}, axis=[0, 2, 3, 1]),
        operation("reshape2", {"X": "h"}, {"Out": "boxes", "XShape": "j"}, shape=[0, -1, 4]),
        operation("elementwise_div", {"X": "boxes", "Y": "scale_factor"}, {"Out": "scaled"}, axis=-1),
        operation("multiclass_nms3", {"BBoxes": "scaled", "Scores": "scores"}, {"Out": "kept"}, keep_top_k=100),
    ]  # fmt: skip
    return write(folder, operations, parameters)


def test_program__is_read_and_walked(tmp_path: Path) -> None:
    picture = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    found = read_program(program(tmp_path))
    assert (found.picture, found.scores, found.boxes) == ("image", "scores", "boxes")
    assert [o.type for o in found.operations][-1] == "reshape2"  # neither the scale nor NMS is computed
    with torch.no_grad():
        for ours, torchs in zip(walk(found, picture), Network()(picture), strict=True):
            assert torch.allclose(ours, torchs, atol=1e-6)
        assert walk(found, picture.double())[0].dtype == torch.float64


def test_fold__a_convolution_takes_its_batch_norm_and_its_bias(tmp_path: Path) -> None:
    folded = fold(read_program(program(tmp_path)))
    network, x = Network(), torch.randn(1, 3, 8, 8)
    first, second = folded["conv2d_0.w_0"], folded["conv2d_1.w_0"]
    ours = F.conv2d(x, first.weight.float(), first.bias.float(), stride=2, padding=1)
    assert torch.allclose(ours, network.norm(network.conv(x)), atol=1e-6)
    assert second.bias.tolist() == pytest.approx(network.output.bias.tolist())


X = torch.randn(2, 6, 4, 4, generator=torch.Generator().manual_seed(2))
Y = torch.randn(6, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    ("kind", "attributes", "torchs"),
    [
        ("hard_swish", {"offset": 3.0, "threshold": 6.0, "scale": 6.0}, F.hardswish),
        ("hard_sigmoid", {"slope": 1 / 6, "offset": 0.5}, F.hardsigmoid),
        ("relu", {}, F.relu),
        ("sigmoid", {}, torch.sigmoid),
        ("softmax", {"axis": 1}, lambda x: x.softmax(1)),
        ("scale", {"scale": -1.0, "bias": 0.5}, lambda x: 0.5 - x),
        ("pool2d", {}, lambda x: F.adaptive_avg_pool2d(x, 1)),
        ("nearest_interp_v2", {"scale": [2.0, 3.0]}, lambda x: F.interpolate(x, size=(8, 12), mode="nearest")),
        ("concat", {"axis": -1}, lambda x: x),
        ("split", {"num": 2, "axis": 1}, lambda x: x[:, :3]),
        ("elementwise_add", {"axis": 1}, lambda x: x + Y[:, None, None]),
        ("elementwise_mul", {"axis": 1}, lambda x: x * Y[:, None, None]),
        ("elementwise_div", {"axis": 1}, lambda x: x / Y[:, None, None]),
    ],
)
def test_operation__computes_what_torchs_does(
    kind: str, attributes: dict[str, Any], torchs: Callable[[Tensor], Tensor]
) -> None:
    inputs = {"X": [X], "Y": [Y]} if kind.startswith("elementwise") else {"X": [X]}
    one = Operation(type=kind, inputs={key: ["x"] for key in inputs}, outputs={"Out": ["out"]}, attributes=attributes)
    check(one)
    assert torch.allclose(run(one, inputs)[0], torchs(X), atol=1e-6)


def test_operation__depthwise_convolution_and_product_are_torchs() -> None:
    weight = torch.randn(6, 1, 3, 3)
    attributes = {**CONVOLUTION, "groups": 6}
    depthwise = Operation(type="depthwise_conv2d", inputs={}, outputs={}, attributes=attributes)
    theirs = F.conv2d(X, weight, stride=2, padding=1, groups=6)
    assert torch.allclose(run(depthwise, {"Input": [X], "Filter": [weight]})[0], theirs)
    product = Operation(type="matmul_v2", inputs={}, outputs={}, attributes={})
    assert torch.allclose(run(product, {"X": [X], "Y": [Y[:4]]})[0], torch.einsum("nchw,w->nch", X, Y[:4]), atol=1e-6)


@pytest.mark.parametrize(
    ("attributes", "problem"),
    [
        ({"groups": 3}, "groups 3"),
        ({"paddings": [0, 1, 0, 1]}, r"paddings \[0, 1, 0, 1\]"),
        ({"padding_algorithm": "SAME"}, "padding_algorithm is 'SAME'; 'EXPLICIT' is expected"),
        ({"data_format": "NHWC"}, "data_format is 'NHWC'"),
        ({"dilations": [2, 2]}, "dilations"),
        ({"fuse_relu": True}, "fuse_relu is True"),
        ({"align_corners": True}, "align_corners is True"),
        ({"rounding": 1}, r"attribute rounding \(1\) is not expected"),
        ({"paddings": [0, 0]}, "reshape2 of scores: cannot be computed"),
    ],
)
def test_attribute__unexpected_value_is_named(tmp_path: Path, attributes: dict[str, Any], problem: str) -> None:
    found = read_program(program(tmp_path, **attributes))
    with pytest.raises(UserError, match=problem):
        walk(found, torch.zeros(1, 3, 8, 8))


def test_operation__unexpected_one_is_named(tmp_path: Path) -> None:
    used = operation("gaussian_random", {}, {"Out": "noise"})
    found = read_program(program(tmp_path, used, bias="noise"))
    with pytest.raises(UserError, match="gaussian_random of noise: this operation is not expected"):
        walk(found, torch.zeros(1, 3, 8, 8))
    with pytest.raises(UserError, match="conv2d of d: neither a batch norm nor a bias of its own follows"):
        fold(found)
    idle = read_program(program(tmp_path, used))
    assert "gaussian_random" not in [o.type for o in idle.operations]


def test_parameter__of_two_operations_is_refused(tmp_path: Path) -> None:
    found = read_program(program(tmp_path))
    for name in ("conv2d_1.w_0", "conv2d_1.b_0", "bn.w_1"):
        again = Operation(type="relu", inputs={"X": [name]}, outputs={"Out": ["k"]}, attributes={})
        with pytest.raises(UserError, match=f"{name}: used by several operations"):
            fold(replace(found, operations=[*found.operations, again]))


def test_program__of_another_network_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the program has 2 convolutions, the modules have 98"):
        convert(read_program(program(tmp_path)))
    path = write(tmp_path, [operation("relu", {"X": "w"}, {"Out": "y"})], {"w": Y})
    with pytest.raises(UserError, match=r"model\.pdmodel: does not end in multiclass_nms3"):
        read_program(path)


def test_program__cut_short_or_foreign_is_named(tmp_path: Path) -> None:
    path = program(tmp_path)
    beside = path.with_suffix(".pdiparams")
    for file in (path, beside):
        whole = file.read_bytes()
        foreign = [b"", b"\0" * 400, b'{"modelTopology": {}}' * 20, b"\xff" * 400, b"\x89PNG\r\n\x1a\n" * 40]
        damaged = [*foreign, *[whole[:length] for length in range(0, len(whole) - 8, 13)]]
        if file == beside:
            damaged += [whole[:-1], whole + b"\0", whole[:4] + b"\1" + whole[5:]]
        for data in damaged:
            file.write_bytes(data)
            with pytest.raises(UserError, match=re.escape(f"{file}: damaged, or not of a PaddlePaddle program")):
                read_program(path)
        file.write_bytes(whole)
    beside.unlink()
    with pytest.raises(UserError, match=r"model\.pdiparams: No such file"):
        read_program(path)


def test_program__changed_bytes_are_read_or_refused(tmp_path: Path) -> None:
    path = program(tmp_path)
    generator = np.random.default_rng(0)
    for file in (path, path.with_suffix(".pdiparams")):
        whole = file.read_bytes()
        for _ in range(200):
            data = bytearray(whole)
            data[generator.integers(len(data))] = generator.integers(256)
            file.write_bytes(data)
            try:
                found = read_program(path)
                fold(found)
                walk(found, torch.zeros(1, 3, 8, 8))
            except UserError:
                continue
        file.write_bytes(whole)


def bins(values: Sequence[float]) -> Program:
    product = Operation(type="matmul_v2", inputs={"X": ["x"], "Y": ["bins"]}, outputs={"Out": ["y"]}, attributes={})
    parameters = {"bins": torch.tensor(values)}
    return Program(operations=[product], parameters=parameters, picture="x", scores="y", boxes="y")


def test_bins__are_rounded_and_no_others_taken() -> None:
    assert with_whole_bins(bins([0, 1, 2, 3.0003])).parameters["bins"].tolist() == [0, 1, 2, 3]
    for values in ([0.0, 1.0, 2.1], [0.0, math.nan], [1.0, 2.0]):
        with pytest.raises(UserError, match="bins: the bins are"):
            with_whole_bins(bins(values))


@pytest.mark.parametrize(("name", "off"), [("scores", 1e-3), ("boxes", 0.1), ("boxes", math.nan)])
def test_verify__a_difference_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, off: float) -> None:
    torch.manual_seed(0)
    model = PicoDet().eval()
    wrong = dict.fromkeys(("scores", "boxes"), 0.0)

    def walked(_: Program, picture: Tensor) -> tuple[Tensor, Tensor]:
        cells = model(picture)
        scores, boxes = cells.words.sigmoid().transpose(1, 2), decode(cells.sides, *cell_centres(416, 416, STRIDES))
        return scores + wrong["scores"], boxes + wrong["boxes"]

    monkeypatch.setattr(convert_picodet, "walk", walked)
    assert verify(model, bins([0.0, 1.0])) == {"scores": 0, "boxes": 0}
    wrong[name] = off
    with pytest.raises(UserError, match=f"the modules' {name} differ by"):
        verify(model, bins([0.0, 1.0]))


def test_command__writes_a_file_and_a_folder_that_proposes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = PicoDet().eval()
    monkeypatch.setattr(convert_picodet, "convert", lambda _: model)
    monkeypatch.setattr(convert_picodet, "verify", lambda *_: {"scores": 1e-6, "boxes": 1e-3})
    path = program(tmp_path)
    assert main([str(path), "--out", str(tmp_path / "out"), "--sides", "64"]) == 0
    tensors, facts = load_weights(tmp_path / "out" / "picodet.safetensors")
    assert facts["format"] == "picodet/1"
    assert all(sha256_of(file) in facts["source"] for file in (path, path.with_suffix(".pdiparams")))
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    proposer = load_proposals(tmp_path / "out" / "exported")
    assert proposer.sides == (64,)
    proposer.regions(np.zeros((64, 48, 3), dtype=np.uint8))
