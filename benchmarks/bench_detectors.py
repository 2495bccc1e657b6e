# SPDX-License-Identifier: Apache-2.0
"""ViLD and the transformer beside each other: one picture to boxes and embeddings, same pictures at the same size.

ViLD is the shipped detector. The transformer is configs/ov_detr.yaml with random weights (they change no time), or an
exported one (--transformer FOLDER). Memory is the peak of a process of its own that loads one of them and runs it.
"""

from __future__ import annotations

import resource
import subprocess
import sys
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

from _common import milliseconds, parser, pictures, ratio, report, set_threads, show_ratio, take_turns

if TYPE_CHECKING:
    from ovd.inference.detr_regions import DetrRegionModel
    from ovd.inference.rcnn_regions import RCNNRegionModel

NAMES = ("ViLD", "transformer")


def load(name: str, weights: str, transformer: Path | None) -> RCNNRegionModel | DetrRegionModel:
    """One of the two detectors, for inference."""
    import numpy as np
    import torch

    from ovd.config_detr import DetrTrainConfig
    from ovd.inference.detr_regions import DetrRegionModel, OpenVocabularyDetr
    from ovd.inference.rcnn_regions import RCNNRegionModel
    from ovd.modeling.detr.build import build_detr
    from ovd.modeling.export import architecture_record, read_card
    from ovd.modeling.load import load_detector_model
    from ovd.weights import detector_folder
    from pretrain.engine.config import load_config

    if name == "ViLD":
        loaded = load_detector_model(detector_folder(weights))
        assert isinstance(loaded, RCNNRegionModel)
        return loaded
    if transformer is not None:
        loaded = load_detector_model(transformer)
        assert isinstance(loaded, DetrRegionModel)
        return loaded
    shipped = read_card(detector_folder(weights))
    config = load_config(DetrTrainConfig, "ov_detr.yaml")
    model = build_detr(
        config.model,
        embed_dim=shipped.embed_dim,
        rows=torch.randn(len(shipped.classes), shipped.embed_dim),
        trainable=torch.ones(len(shipped.classes), dtype=torch.bool),
        classes=len(shipped.classes),
        pixel_mean=shipped.pixel_mean,
        pixel_std=shipped.pixel_std,
    )
    card = replace(shipped, model=architecture_record(config.model.model_dump(mode="json")))
    return OpenVocabularyDetr(
        model=model.eval(), card=card, background_words=np.zeros((0, shipped.embed_dim), np.float32)
    )


def peak(name: str) -> float:
    """Peak memory in MiB of this command run again for one detector alone."""
    command = [sys.executable, *sys.argv, "--alone", name]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def main() -> None:
    """Weigh each, then time both in turns at each size."""
    flags = parser(__doc__ or "", weights=True)
    flags.add_argument("--transformer", type=Path, default=None, metavar="FOLDER", help="an exported transformer")
    flags.add_argument("--sizes", type=int, nargs="+", default=[256, 512], help="sides of the pictures (256 512)")
    flags.add_argument("--alone", choices=NAMES, default=None, help="run one, print its peak memory in MiB")
    options = flags.parse_args()
    set_threads(options.threads)
    if options.alone is not None:
        model = load(options.alone, options.weights, options.transformer)
        for image in pictures(max(options.sizes), 3):
            model.regions(image)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return

    # before anything large is loaded here: a child's peak begins at the size its parent had when it was forked
    memory = {name: peak(name) for name in NAMES}
    from ovd.inference.rcnn_regions import InputSize

    models = {name: load(name, options.weights, options.transformer) for name in NAMES}
    rows: list[tuple[str, str, str]] = []
    figures: dict[str, object] = {}
    for side in options.sizes:
        for model in models.values():  # the size itself, not the size that each was trained at
            model.to_input = InputSize(side, side)
        turns = {}
        for name, model in models.items():
            images = cycle(pictures(side, 8))
            turns[name] = lambda model=model, images=images: model.regions(next(images))
        seconds = take_turns(turns, rounds=options.rounds or 20, warmup=3)
        for name in NAMES:
            value = milliseconds(seconds[name])
            rows.append((f"{side} px, {name}, p50 / p95", f"{value['p50_ms']:.0f} / {value['p95_ms']:.0f} ms", ""))
            figures[f"{name}_{side}"] = value
        share = ratio(seconds["transformer"], seconds["ViLD"])
        rows.append((f"{side} px, transformer / ViLD", show_ratio(share), ""))
        figures[f"ratio_{side}"] = share
    for name in NAMES:
        figures[f"{name}_mib"] = memory[name]
        rows.append((f"{name}, peak memory of its process", f"{memory[name]:,.0f} MiB", ""))
    report("ViLD and the transformer, one picture", rows, figures, options.json)


if __name__ == "__main__":
    main()
