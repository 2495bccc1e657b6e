# SPDX-License-Identifier: Apache-2.0
"""Draw the sample sheets of `docs/guide/data.md`: scenes with their boxes, and image-caption pairs.

python scripts/draw_samples.py --out docs/images
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from pretrain.data.pairs import PairSource
from pretrain.data.scenes import SceneSource
from pretrain.data.stickers import Stickers

BASE, NOVEL, DISTRACTOR = "#7CFF6B", "#FF5A5A", "#7FB2FF"
COLOURS = 256  # a palette keeps a sheet below 300 kB


def label(draw: ImageDraw.ImageDraw, xy: tuple[float, float], text: str, size: int = 11) -> None:
    """White text with a dark rim."""
    font = ImageFont.load_default(size)
    draw.text(xy, text, fill="white", stroke_width=1, stroke_fill="black", font=font)


def scene_sheet(source: SceneSource, columns: int, rows: int) -> Image.Image:
    """Scenes with boxes: base green, novel red, unlabelled distractors blue."""
    height, width = source.size
    sheet = Image.new("RGB", (columns * (width + 4) - 4, rows * (height + 4) - 4), "white")
    for index in range(columns * rows):
        scene = source.scene(index)
        picture = Image.fromarray(scene.image)
        draw = ImageDraw.Draw(picture)
        for x0, y0, x1, y1 in scene.distractors.tolist():
            draw.rectangle((x0, y0, x1 - 1, y1 - 1), outline=DISTRACTOR)
        for (x0, y0, x1, y1), name in zip(scene.boxes.tolist(), scene.classes.tolist(), strict=True):
            draw.rectangle((x0, y0, x1 - 1, y1 - 1), outline=BASE if name in source.stickers.base else NOVEL, width=2)
        for (x0, y0, _, _), name in zip(scene.boxes.tolist(), scene.classes.tolist(), strict=True):
            label(draw, (x0 + 3, y0 + 1), source.stickers.nouns[name])
        sheet.paste(picture, (index % columns * (width + 4), index // columns * (height + 4)))
    return sheet


def pair_sheet(source: PairSource, columns: int, rows: int) -> Image.Image:
    """Pairs: the picture, and its caption below in at most three lines."""
    side, text = 104, 40
    sheet = Image.new("RGB", (columns * (side + 6), rows * (side + text)), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(10)
    for index in range(columns * rows):
        image, caption, _ = source.sample(index, 1)
        x, y = index % columns * (side + 6), index // columns * (side + text)
        sheet.paste(Image.fromarray(image.transpose(1, 2, 0)).resize((side, side), Image.Resampling.BILINEAR), (x, y))
        lines = [""]
        for word in caption.split():
            if draw.textlength(f"{lines[-1]} {word}", font=font) > side:
                lines.append("")
            lines[-1] = f"{lines[-1]} {word}".strip()
        draw.multiline_text((x, y + side + 1), "\n".join(lines[:3]), fill="black", font=font, spacing=1)
    return sheet


def main(argv: list[str]) -> int:
    """Write the three sheets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    stickers = Stickers.load()
    sheets = {
        "scenes_train.png": scene_sheet(SceneSource(stickers, split="train", seed=7, size=240), 4, 2),
        "scenes_val.png": scene_sheet(SceneSource(stickers, split="val", seed=7, size=240), 4, 2),
        "pairs.png": pair_sheet(PairSource(Stickers.load(extra_styles=True), split="train", seed=10), 10, 3),
    }
    for name, sheet in sheets.items():
        palette = sheet.quantize(COLOURS, method=Image.Quantize.MEDIANCUT, kmeans=3)
        quantised = sheet.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG)
        quantised.save(args.out / name, optimize=True)
        print(f"{args.out / name}: {(args.out / name).stat().st_size // 1024} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
