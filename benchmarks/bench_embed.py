# SPDX-License-Identifier: Apache-2.0
"""Crops and their embeddings: what a region store costs, part by part, with the shape of the shipped encoder."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

from _common import parser, percentile, report, set_threads, take_turns


def main() -> None:
    """Time cropping, encoding in both precisions, writing and reading."""
    flags = parser(__doc__ or "")
    flags.add_argument("--boxes", type=int, default=48, help="proposals per picture (default 48)")
    flags.add_argument("--side", type=int, default=256, help="side of the pictures in pixels (default 256)")
    options = flags.parse_args()
    set_threads(options.threads)

    import numpy as np
    import torch

    from ovd.regions.crops import crop_regions, embed_crops
    from ovd.regions.layout import Identity, StoreSettings
    from ovd.regions.store import RegionStore
    from ovd.regions.writer import write_regions
    from pretrain.config import EncoderConfig, ResNetTower
    from pretrain.nets.towers import build_encoder

    torch.manual_seed(0)
    encoder = build_encoder(EncoderConfig(image=ResNetTower())).eval()
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (options.side, options.side, 3), dtype=np.uint8)
    low = rng.uniform(0, 0.7, (options.boxes, 2)) * options.side
    boxes = np.concatenate([low, low + rng.uniform(0.08, 0.3, (options.boxes, 2)) * options.side], axis=1)
    crops = crop_regions(picture, boxes, size=encoder.image_size)
    count = crops.shape[0] * crops.shape[1]
    seconds = take_turns(
        {
            "crop": lambda: crop_regions(picture, boxes, size=encoder.image_size),
            "fp32": lambda: embed_crops(encoder, crops),
            "bf16": lambda: embed_crops(encoder, crops, precision="bf16"),
        },
        rounds=options.rounds or 10,
    )
    rate = {name: count / statistics.median(values) for name, values in seconds.items()}
    share = statistics.median(a / b for a, b in zip(seconds["crop"], seconds["fp32"], strict=True))

    class Pictures:
        ids: Sequence[int | str] = range(256)

        def __len__(self) -> int:
            return len(self.ids)

        def image(self, index: int) -> np.ndarray:
            return picture

        def fingerprint(self) -> str:
            return "benchmark"

    class Boxes:
        def propose(self, image: np.ndarray, *, top: int) -> tuple[np.ndarray, np.ndarray]:
            return boxes, np.ones(len(boxes))

    class Free:
        """An encoder that costs nothing, so that only the store is timed."""

        embed_dim, image_size, image_mean = encoder.embed_dim, 8, (0.5, 0.5, 0.5)

        def prepare(self, images: torch.Tensor) -> torch.Tensor:
            return images.float()

        def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
            return torch.ones(len(pixels), self.embed_dim)

    with tempfile.TemporaryDirectory() as folder:
        settings = StoreSettings(proposals_per_image=options.boxes, crop_size=8, images_per_shard=64)
        identity = Identity(
            encoder="free", dim=encoder.embed_dim, proposals="fixed", source="benchmark", settings=settings
        )
        out = Path(folder) / "store"
        write_regions(out, source=Pictures(), proposer=Boxes(), encoder=Free(), identity=identity)
        store = RegionStore.open(out)
        order = rng.permutation(256).tolist()
        reads = take_turns({"read": lambda: [store[i] for i in order]}, rounds=5)["read"]
    read_ms = 1e3 * percentile(reads, 0.5) / 256

    fastest = max(rate["fp32"], rate["bf16"])
    report(
        "Region embeddings",
        [
            (f"crops cut, {encoder.image_size} px", f"{rate['crop']:,.0f}/s", ""),
            ("crops embedded, fp32, ResNet-18", f"{rate['fp32']:,.0f}/s", ""),
            ("crops embedded, bf16", f"{rate['bf16']:,.0f}/s", ""),
            ("cutting / embedding, time", f"{share:.3f}", "aim: below 1"),
            ("200,000 crops with this process", f"{200_000 / fastest / 60 + 200_000 / rate['crop'] / 60:.1f} min", ""),
            (f"one picture read from a store ({options.boxes} regions)", f"{read_ms:.2f} ms", ""),
        ],
        {"crops_per_second": rate, "crop_share": share, "read_ms": read_ms, "seconds": seconds},
        options.json,
    )


if __name__ == "__main__":
    main()
