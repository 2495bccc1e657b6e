# SPDX-License-Identifier: Apache-2.0
"""CLIP images per second: training steps (as `pretrain.train` does them) and encoding, in fp32 and bf16."""

from __future__ import annotations

import statistics
from functools import partial

from _common import parser, ratio, report, set_threads, show_ratio, take_turns


def main() -> None:
    """Time one optimiser step of the shipped CLIP's shape, its data, and the forward pass alone."""
    flags = parser(__doc__ or "")
    flags.add_argument("--batch", type=int, default=128, help="pictures per step (default 128)")
    options = flags.parse_args()
    set_threads(options.threads)

    import torch

    from pretrain.config import CbowTower, EncoderConfig, ResNetTower
    from pretrain.data.pairs import PairSource
    from pretrain.data.stickers import Stickers
    from pretrain.methods.clip import Clip
    from pretrain.nets.towers import build_encoder

    torch.manual_seed(0)
    encoder = build_encoder(EncoderConfig(image=ResNetTower(), text=CbowTower()))
    task = Clip(encoder=encoder)
    source = PairSource(Stickers.load(), split="train", size=encoder.image_size, seed=0, length=10**6)
    batch = source.collate([source.sample(i, i) for i in range(options.batch)])
    pixels = encoder.prepare(batch["image"])
    optimiser = torch.optim.AdamW(task.parameters(), lr=1e-4)

    def step(precision: str) -> None:
        task.train()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss, _ = task(batch)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        task.after_step(0, 1)

    def encode(precision: str) -> None:
        encoder.eval()
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            encoder.encode_image(pixels)

    position = 0

    def data() -> None:
        nonlocal position
        for _ in range(options.batch):
            position += 1
            source.sample(position, position)

    seconds = take_turns(
        {
            "train fp32": partial(step, "fp32"),
            "train bf16": partial(step, "bf16"),
            "encode fp32": partial(encode, "fp32"),
            "encode bf16": partial(encode, "bf16"),
            "data": data,
        },
        rounds=options.rounds or 6,
    )
    rate = {name: options.batch / statistics.median(values) for name, values in seconds.items()}
    gain = ratio(seconds["train fp32"], seconds["train bf16"])
    rows = [(name, f"{value:,.0f} images/s", "") for name, value in rate.items()]
    rows.append(("bf16 over fp32 in training, speed", show_ratio(gain), "median (quartiles)"))
    report(
        f"CLIP, ResNet-18 at {encoder.image_size} px, batch {options.batch}",
        rows,
        {"images_per_second": rate, "bf16_gain": gain, "seconds": seconds},
        options.json,
    )


if __name__ == "__main__":
    main()
