# SPDX-License-Identifier: Apache-2.0
"""YOLO-World-S v2 for `bench_photo.py`, in an interpreter of its own: file names in, times out, one a line.

Run by the interpreter of an environment that has `ultralytics` (AGPL-3.0; a comparison, never a dependency). Weights
are random: nothing is fetched, and the text tower is left out, whose embeddings of the words are computed once anyway.
"""

from __future__ import annotations

import importlib
import json
import sys
import time

import torch


def main() -> None:
    """Answer until the input ends."""
    words, threads = int(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = importlib.import_module("ultralytics").YOLO("yolov8s-worldv2.yaml", task="detect", verbose=False)
    network = model.model
    network.txt_feats = torch.nn.functional.normalize(torch.randn(1, words, 512), dim=-1)
    network.model[-1].nc = words
    network.names = {number: f"word {number}" for number in range(words)}
    print(json.dumps({"parameters": sum(p.numel() for p in network.parameters())}), flush=True)
    for line in sys.stdin:
        file = line.strip()
        torch.set_num_threads(threads)  # its first prediction sets another number
        start = time.perf_counter()
        found = model.predict(file, imgsz=(480, 640), device="cpu", verbose=False, save=False)
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "boxes": len(found[0].boxes)}), flush=True)


if __name__ == "__main__":
    main()
