# SPDX-License-Identifier: Apache-2.0
"""The interpreter that proves a conversion, and what it refuses."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from pretrain.engine.errors import UserError
from scripts.convert_nanodet import convert, read_graph, resize, walk


@pytest.mark.parametrize(("height", "width"), [(26, 14), (4, 7), (13, 13)])
def test_resize__is_bilinear_with_half_pixel_centres(height: int, width: int) -> None:
    picture = torch.randn(1, 8, 9, 3, generator=torch.Generator().manual_seed(0))
    torchs = F.interpolate(picture.permute(0, 3, 1, 2), (height, width), mode="bilinear", align_corners=False)
    assert torch.allclose(resize(picture, height, width), torchs.permute(0, 2, 3, 1), atol=1e-5)


def graph(tmp_path: Path, **convolution: Any) -> Path:
    """A picture, padded, through one convolution and a leaky rectifier: weight 2 in the middle of the first channel."""
    weight = np.zeros((3, 3, 3, 1), dtype=np.float16)
    weight[1, 1, 0, 0] = -2
    pads = np.array([[0, 0], [1, 1], [1, 1], [0, 0]], dtype=np.int32)
    attributes = {
        "padding": {"s": base64.b64encode(b"VALID").decode()},
        "data_format": {"s": base64.b64encode(b"NHWC").decode()},
        "strides": {"list": {"i": ["1", "2", "2", "1"]}},
        **convolution,
    }
    nodes = [
        {"name": "w", "op": "Const"},
        {"name": "pads", "op": "Const"},
        {"name": "x", "op": "Placeholder"},
        {"name": "padded", "op": "Pad", "input": ["x", "pads"]},
        {"name": "convolution", "op": "Conv2D", "input": ["padded", "w"], "attr": attributes},
        {"name": "out", "op": "LeakyRelu", "input": ["convolution"], "attr": {"alpha": {"f": 0.1}}},
    ]
    half = {"dtype": "float16", "original_dtype": "float32"}
    weights = [
        {"name": "w", "shape": [3, 3, 3, 1], "dtype": "float32", "quantization": half},
        {"name": "pads", "shape": [4, 2], "dtype": "int32"},
    ]
    manifest = [{"paths": ["g.bin"], "weights": weights}]
    (tmp_path / "g.json").write_text(json.dumps({"modelTopology": {"node": nodes}, "weightsManifest": manifest}))
    (tmp_path / "g.bin").write_bytes(weight.tobytes() + pads.tobytes())
    return tmp_path / "g.json"


def test_onnx_graph__is_read_and_walked(tmp_path: Path) -> None:
    nodes, constants = read_graph(graph(tmp_path))
    picture = torch.arange(48.0).reshape(1, 4, 4, 3) - 20
    (out,) = walk(nodes, constants, picture, ["out"])
    wanted = -2 * picture[:, ::2, ::2, :1]
    assert torch.equal(out, torch.where(wanted > 0, wanted, 0.1 * wanted))


def test_onnx_graph__an_unexpected_one_is_refused(tmp_path: Path) -> None:
    nodes, constants = read_graph(graph(tmp_path))
    with pytest.raises(UserError, match="the graph has 1 convolutions, the modules have 34"):
        convert(nodes, constants)
    nodes, constants = read_graph(graph(tmp_path, padding={"s": base64.b64encode(b"SAME").decode()}))
    with pytest.raises(UserError, match="VALID and NHWC"):
        walk(nodes, constants, torch.zeros(1, 4, 4, 3), ["out"])
    (tmp_path / "g.bin").write_bytes((tmp_path / "g.bin").read_bytes() + b"more")
    with pytest.raises(UserError, match="the files beside it have"):
        read_graph(tmp_path / "g.json")
