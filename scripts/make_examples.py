# SPDX-License-Identifier: Apache-2.0
"""Draw the page's example pictures: validation scenes of a seed that no table is computed on.

python scripts/make_examples.py --out ovd/demo/examples/stickers
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from PIL import Image

from pretrain.data.scenes import SceneSource
from pretrain.data.stickers import Stickers

SEED = 4242  # the tables use 0, calibration 1000 and 2000
SIZE = (384, 512)
# Scene number and words: nouns that detector training labelled, nouns it never did (joystick, glass of milk, tractor,
# snowman, palm tree, grapes), other words for them (wild boar, motorbike), and things that are not there. Chosen among
# the first 160 scenes because the shipped weights find something in them.
EXAMPLES = (
    (127, "wild boar, bow and arrow, cow, tumbler glass, giraffe"),
    (79, "tomato, tractor, snowman, dog"),
    (134, "noodle bowl, violin, glass of milk, unicorn"),
    (98, "octopus, joystick, headphone, piano"),
    (102, "motorbike, grapes, umbrella, kangaroo"),
    (63, "beer mug, hot dog, palm tree, sheep"),
)
NOTICE = """\
# Example pictures

Drawn by `scripts/make_examples.py` from the shipped Sticker Scenes (validation split): stickers of EmojiOne (CC-BY-4.0)
on the held-out photos. They are not a sample to judge the weights by: they were chosen because the shipped weights find
something in them. Authors and licences: `datasets/stickers/NOTICE.md`.
"""


def main(argv: list[str]) -> int:
    """Draw all examples; returns the exit status."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--out", type=Path, required=True, help="folder to write to")
    out: Path = flags.parse_args(argv).out
    out.mkdir(parents=True, exist_ok=True)
    source = SceneSource(Stickers.load(), split="val", seed=SEED, size=SIZE)
    rows = []
    for index, words in EXAMPLES:
        name = f"scene_{index:02d}.jpg"
        Image.fromarray(source.scene(index).image).save(out / name, "JPEG", quality=92, subsampling=0)
        rows.append({"picture": name, "classes": words})
    (out / "examples.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    (out / "NOTICE.md").write_text(NOTICE, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
