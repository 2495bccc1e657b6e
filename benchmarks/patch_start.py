# SPDX-License-Identifier: Apache-2.0
"""Does a patch look like the place it was cut from, before anything is trained? By raw features, and by centred ones.

    python benchmarks/patch_start.py                                             the shipped encoder, both spaces
    python benchmarks/patch_start.py backbone_weights=runs/swav/exported         another backbone

Share of patches whose most similar token (cosine) lies within the patch, beside the share of the picture that the patch
covers, which is what chance would give. Half a minute that tells what a backbone is good for as UP-DETR's.
"""

from __future__ import annotations

import json
from typing import Any

from _common import parser, report, set_threads


def main() -> None:
    """One row per space and treatment."""
    flags = parser(__doc__ or "")
    flags.add_argument("--pictures", type=int, default=64, help="held-out pictures (default 64)")
    flags.add_argument("overrides", nargs="*", metavar="key=value", help="of configs/updetr.yaml")
    options = flags.parse_args()
    set_threads(options.threads)

    import torch
    from torch.nn import functional as F

    from ovd.config_detr import DetrTrainConfig
    from ovd.training.detr import build
    from ovd.training.updetr import patch_embedder, patch_source
    from pretrain.engine.config import load_config
    from pretrain.nets.towers import ResNetImage

    def share(tokens: torch.Tensor, patches: torch.Tensor, boxes: torch.Tensor, side: int) -> float:
        """Of patches whose best token lies inside; (N, C, h, w), (N, M, C), (N, M, 4)."""
        cells = tokens.shape[-1]
        alike = torch.einsum("nmc,ncs->nms", F.normalize(patches, dim=-1), F.normalize(tokens.flatten(2), dim=1))
        best = alike.argmax(-1)
        x, y = ((place + 0.5) * side / cells for place in (best % cells, best // cells))
        x1, y1, x2, y2 = boxes.unbind(-1)
        return float(((x1 <= x) & (x <= x2) & (y1 <= y) & (y <= y2)).float().mean())

    config: Any = load_config(
        DetrTrainConfig, "updetr.yaml",
        ["cache=null", "pretext.held_out_count=0", *options.overrides],
    )  # fmt: skip
    parts = build(config)
    model, encoder = parts.model.eval(), parts.encoder
    source = patch_source(config, config.pretext.held_out, seed=config.loop.seed + 1, count=options.pictures)
    samples = [source.variant(index, 0) for index in range(options.pictures)]
    boxes = torch.stack([one["boxes"] for one in samples])
    side = samples[0]["image"].shape[-1]
    with torch.no_grad():
        tokens = model.joined(model.maps_of(samples)[0])
        patches = torch.stack([one["patches"] for one in samples])
        count = patches.shape[:2]
        spaces = {"backbone's own": (tokens, model.pooled(patches[:, :, 0].flatten(0, 1)).unflatten(0, count))}
        if config.backbone_weights is None and isinstance(encoder.visual, ResNetImage):
            last = encoder.visual.proj.in_features
            joint = encoder.visual.proj(tokens[:, -last:].movedim(1, -1)).movedim(-1, 1)
            spaces["joint"] = joint, patch_embedder(config, model, encoder)(patches.flatten(0, 1)).unflatten(0, count)
    area = float(((boxes[..., 2:] - boxes[..., :2]).prod(-1) / side**2).mean())
    rows = [("share of the picture that a patch covers", f"{area:.3f}", "")]
    for name, (places, z) in spaces.items():
        centred = places - places.mean((0, 2, 3))[:, None, None], z - z.mean((0, 1))
        rows.append((f"{name}: look-alike within the patch, raw", f"{share(places, z, boxes, side):.3f}", ""))
        rows.append((f"{name}: the same, both centred", f"{share(*centred, boxes, side):.3f}", ""))
    figures = {what: float(figure) for what, figure, _ in rows}
    report(f"Patches before training, {json.dumps(options.overrides)}", rows, figures, options.json)


if __name__ == "__main__":
    main()
