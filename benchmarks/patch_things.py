# SPDX-License-Identifier: Apache-2.0
"""How many of the pretext's patches are things? By each sampler, on labelled pictures that it sees without labels.

    python benchmarks/patch_things.py                                             100 held-out sticker scenes
    python benchmarks/patch_things.py --coco IMAGES ANNOTATIONS                   photos with COCO annotations

A patch is a thing if it overlaps a labelled box by an IoU of .5; a thing is covered if some patch of its picture does.
Sizes and number of the patches are those of configs/updetr.yaml.
"""

from __future__ import annotations

from typing import Any, get_args

from _common import parser, report


def main() -> None:
    """Two rows per sampler."""
    flags = parser(__doc__ or "")
    flags.add_argument("--pictures", type=int, default=100, help="how many (default 100)")
    flags.add_argument("--coco", nargs=2, metavar=("IMAGES", "ANNOTATIONS"), help="photos instead of stickers")
    options = flags.parse_args()

    import numpy as np
    import torch
    from torchvision.ops import box_iou

    from ovd.config_detr import DetrTrainConfig, Sampler
    from ovd.data.catalog import LabelledImages, StickerImages
    from ovd.training.inputs import labelled_images
    from ovd.training.updetr import patch_source
    from pretrain.data.stickers import Stickers
    from pretrain.engine.config import load_config

    labelled: LabelledImages = StickerImages(
        stickers=Stickers.load(), split="val", seed=0, length=options.pictures, size=256, labels="all"
    )
    if options.coco:
        images, annotations = options.coco
        data = ["data.kind=coco", f"data.images={images}", f"data.annotations={annotations}", "data.split=all"]
        labelled = labelled_images(load_config(DetrTrainConfig, "detr.yaml", [*data, "data.labels=all"]).data)
    pictures = [labelled.load(index) for index in range(min(options.pictures, len(labelled)))]
    pictures = [one for one in pictures if len(one.boxes)]
    rows = []
    for sampler in get_args(Sampler):
        config: Any = load_config(DetrTrainConfig, "updetr.yaml", [f"pretext.patches.sampler={sampler}"])
        source = patch_source(config, config.pretext.held_out, seed=0, count=1)
        best_patch, best_thing = [], []
        for number, one in enumerate(pictures):
            patches = source.boxes(one.image, np.random.default_rng([0, number]))
            overlap = box_iou(torch.from_numpy(patches), torch.as_tensor(np.asarray(one.boxes), dtype=torch.float32))
            best_patch.append(overlap.amax(1))
            best_thing.append(overlap.amax(0))
        things = float((torch.cat(best_patch) >= 0.5).float().mean())
        covered = float((torch.cat(best_thing) >= 0.5).float().mean())
        rows.append((f"{sampler}: share of the patches that are things", f"{things:.3f}", ""))
        rows.append((f"{sampler}: share of the things that are covered", f"{covered:.3f}", ""))
    figures = {what: float(figure) for what, figure, _ in rows}
    report(f"Patches of {len(pictures)} pictures", rows, figures, options.json)


if __name__ == "__main__":
    main()
