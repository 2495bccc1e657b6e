# SPDX-License-Identifier: Apache-2.0
"""Graphs with their large tensors in half precision, as the weights that they were made of are stored."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx

HALF_FROM = 1024  # numbers: smaller tensors stay in single precision


def halve(graph: onnx.GraphProto) -> None:
    """Store large tensors in half precision where that loses nothing, each with a cast."""
    import onnx
    from onnx import numpy_helper

    casts = []
    for tensor in graph.initializer:
        if tensor.data_type != onnx.TensorProto.FLOAT:
            continue
        values = numpy_helper.to_array(tensor)
        with np.errstate(over="ignore"):
            half = values.astype(np.float16)
        if values.size < HALF_FROM or not np.array_equal(half.astype(np.float32), values):
            continue
        name = tensor.name
        tensor.CopyFrom(numpy_helper.from_array(half, name=f"{name}.half"))
        casts.append(onnx.helper.make_node("Cast", [f"{name}.half"], [name], to=onnx.TensorProto.FLOAT))
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
