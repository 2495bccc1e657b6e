# SPDX-License-Identifier: Apache-2.0
"""Ways to quantise an export, compared by the AP that each leaves.

    wordbox export --output FLOAT
    python benchmarks/int8.py FLOAT --calibrate-on photos/ --data coco:images:annotations.json --out FOLDER

Photos of ``--calibrate-on`` and of ``--data`` must be different ones, and none that is measured on later. A line for
each way is added to ``FOLDER/ways.jsonl``; ways that are there already are not measured again.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from _common import ROOT as ROOT

from ovd.inference.arrays import Floats
from ovd.pictures import resized
from ovd.runtime.cells import pixels_for_cells
from ovd.runtime.files import PROPOSALS, TOWER, read_runtime_card
from ovd.runtime.quantise import Ranges, activation_ranges, outermost, prepared, quantised
from ovd.runtime.regions import pixels_for_tower
from pretrain.data.folder import list_images, read_image

if TYPE_CHECKING:
    import onnx

    from ovd.runtime.files import RuntimeCard

HISTOGRAM_PHOTOS = 8
Kept = Callable[["onnx.GraphProto"], list[str]]


def main() -> None:
    """Measure what is missing, print all."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("export", type=Path, help="in single precision")
    flags.add_argument("--calibrate-on", type=Path, required=True, metavar="FOLDER")
    flags.add_argument("--data", required=True, metavar="SPEC", help="of wordbox evaluate")
    flags.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    options = flags.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    results = options.out / "ways.jsonl"
    done = {json.loads(line)["way"] for line in results.read_text().splitlines()} if results.exists() else set()
    of = partial(ranges_of, options.export, options.calibrate_on, options.out)
    no_first, no_last = (partial(outermost_but, first=first) for first in (True, False))
    ways: dict[str, Callable[[], Path]] = {
        "single precision": lambda: options.export,
        "MinMax, 64 photos": lambda: made(options, of("minmax", 64)),
        "a scale for each tensor": lambda: made(options, of("minmax", 64), per_channel=False),
        "percentile 99.99": lambda: made(options, of("99.99", HISTOGRAM_PHOTOS)),
        "entropy": lambda: made(options, of("entropy", HISTOGRAM_PHOTOS)),
        "MinMax, 8 photos": lambda: made(options, of("minmax", 8)),
        "last convolutions too": lambda: made(options, of("minmax", 64), excluded=no_last),
        "first convolutions too": lambda: made(options, of("minmax", 64), excluded=no_first),
    }
    for way, make in ways.items():
        if way not in done:
            line = {"way": way} | evaluated(make(), options.data)
            with results.open("a") as file:
                file.write(json.dumps(line) + "\n")
    print(results.read_text())


def evaluated(folder: Path, data: str) -> dict[str, float]:
    """AP of an export, in per cent."""
    from ovd.evaluation.coco import evaluate
    from ovd.evaluation.model import run_model
    from ovd.evaluation.options import EvaluationOptions

    run = run_model(EvaluationOptions.parse(["--weights", str(folder), "--data", data]), on_image=lambda done, of: None)
    values = evaluate(run.gt, run.results, run.split, ["bbox"]).values
    names = ("AP", "AP50", "APs", "APm", "APl")
    return {name: round(100 * values[f"bbox/{name}"], 2) for name in names}


def made(options: argparse.Namespace, ranges: Mapping[str, Ranges], *, excluded: Kept | None = None,
         per_channel: bool = True) -> Path:  # fmt: skip
    """A quantised export; replaced by the next one."""
    import onnx

    folder = options.out / "export"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(options.export, folder)
    for name, one in ranges.items():
        onnx.save(quantised(folder / name, one, excluded=excluded, per_channel=per_channel), str(folder / name))
    return folder


def outermost_but(graph: onnx.GraphProto, *, first: bool) -> list[str]:
    """`outermost` without the first convolutions, or without the last."""
    names = outermost(graph)
    convolutions = [node.name for node in graph.node if node.op_type == "Conv" and node.name in names]
    return [name for name in names if (name == convolutions[0]) != first]


def ranges_of(export: Path, photos: Path, out: Path, method: str, count: int) -> dict[str, Ranges]:
    """Ranges by a method, kept in a file."""
    file = out / f"{method}-{count}.json"
    if not file.exists():
        card = read_runtime_card(export)
        files = list_images(photos)[:: max(1, len(list_images(photos)) // count)][:count]
        seen = [resized(photo, min(1, 1024 / max(photo.shape[:2]))) for photo in map(read_image, files)]
        if method == "minmax":
            file.write_text(json.dumps(activation_ranges(export, card, (), seen)))
        else:
            by_method = histogram_ranges(export, card, seen)
            for name, ranges in by_method.items():
                (out / f"{name}-{count}.json").write_text(json.dumps(ranges))
    return {name: {tensor: (low, high) for tensor, (low, high) in one.items()}
            for name, one in json.loads(file.read_text()).items()}  # fmt: skip


def histogram_ranges(
    export: Path, card: RuntimeCard, photos: Sequence[np.ndarray]
) -> dict[str, dict[str, dict[str, tuple[float, float]]]]:
    """Ranges by method, file and tensor, of ONNX Runtime's histograms."""
    from onnxruntime.quantization.calibrate import HistogramCollector

    plain = activation_ranges(export, card, (), photos[:1])
    found: dict[str, dict[str, dict[str, tuple[float, float]]]] = {"99.99": {}, "99.999": {}, "entropy": {}}
    for name in (PROPOSALS, TOWER):
        collectors = {
            "percentile": HistogramCollector("percentile", False, 2048, 128, 99.99, "same"),
            "entropy": HistogramCollector("entropy", False, 128, 128, 99.99, "same"),
        }
        for values in activations(export / name, list(plain[name]), list(inputs_of(name, card, photos))):
            for collector in collectors.values():
                collector.collect_value(values)
        for method in ("99.99", "99.999"):
            collectors["percentile"].percentile = float(method)
            found[method][name] = dict(plain[name]) | limits(collectors["percentile"].compute_percentile())
        found["entropy"][name] = dict(plain[name]) | limits(collectors["entropy"].compute_entropy())
    return found


def limits(computed: Mapping[str, Sequence[np.ndarray]]) -> dict[str, tuple[float, float]]:
    """The first two values of what a collector computes of each tensor."""
    return {tensor: (float(values[0]), float(values[1])) for tensor, values in computed.items()}


def inputs_of(name: str, card: RuntimeCard, photos: Sequence[np.ndarray]) -> list[Floats]:
    """What a graph sees of photos."""
    if name == TOWER:
        return [pixels_for_tower(resized(p, card.side / max(p.shape[:2])), card) for p in photos]
    return [pixels_for_cells(resized(p, s / max(p.shape[:2])), card) for s in card.proposal_sides for p in photos]


def activations(file: Path, names: Sequence[str], inputs: Sequence[Floats]) -> Iterator[dict[str, Floats]]:
    """The tensors of a graph, one input after the other."""
    import onnx
    import onnxruntime

    model = prepared(file)
    there = {output.name for output in model.graph.output}
    ours = [name for name in names if any(name in node.output for node in model.graph.node)]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in ours if name not in there)
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    for pixels in inputs:
        yield dict(zip(ours, session.run(ours, {"pixels": pixels}), strict=True))


if __name__ == "__main__":
    main()
