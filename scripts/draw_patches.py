# SPDX-License-Identifier: Apache-2.0
"""Draw where UP-DETR's queries look and what they box, before, during and after the pretext.

python scripts/draw_patches.py --run runs/updetr --during runs/updetr/checkpoints/step_500 --out docs/images

Each row is a held-out picture with one patch of it (white). Per column: the attention of the most certain query of
that patch in the last decoder layer, mean over heads (bright), and the box it answers with (orange; IoU beside it).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from draw_samples import label
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.ops import box_convert

from ovd.config_detr import DetrTrainConfig
from ovd.data.samples import PatchSample
from ovd.modeling.boxes import box_iou_and_giou
from ovd.modeling.detr.transformer import ConditionalDecoderLayer
from ovd.modeling.detr.updetr import PatchPretext
from ovd.training.detr import build
from ovd.training.updetr import patch_source
from pretrain.engine.checkpoint import load_model, load_state, newest, verify
from pretrain.engine.config import load_config
from pretrain.engine.errors import UserError, run_cli, warn

PATCH, ANSWER = "#FFFFFF", "#FF9F1C"
GAP, COLOURS = 4, 256


@contextmanager
def attention_of(layer: ConditionalDecoderLayer) -> Iterator[dict[str, Tensor]]:
    """Collects the layer's projections; `weights` turns them into its cross-attention."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda module, given, out: seen.__setitem__(name, out.detach())

    parts = ("query_content", "query_place", "key_content", "key_place")
    hooks = [getattr(layer, name).register_forward_hook(keep(name)) for name in parts]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def weights(seen: Mapping[str, Tensor], heads: int) -> Tensor:
    """(N, Q, S) cross-attention, mean over the heads: content and place stand side by side in each head."""

    def per_head(*names: str) -> Tensor:
        return torch.cat([seen[name].unflatten(-1, (heads, -1)) for name in names], dim=-1).transpose(1, 2)

    query, key = per_head("query_content", "query_place"), per_head("key_content", "key_place")
    return (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(-1).mean(1)


@torch.no_grad()
def answers(task: PatchPretext, batch: list[PatchSample]) -> tuple[Tensor, Tensor, Tensor]:
    """(N, M, 4) boxes in pixels, (N, M) IoU with the patch, (N, M, h, w) attention of each patch's best query."""
    task.eval()
    model = task.detr
    layer = cast(ConditionalDecoderLayer, model.transformer["decoder"].layers[-1])  # type: ignore[index]
    with attention_of(layer) as seen:
        out, targets, group = task.predict(batch)
    best = task.best_queries(out, group, targets.boxes.shape[1])
    boxes = box_convert(out.boxes[-1].gather(1, best[..., None].expand(-1, -1, 4)), "cxcywh", "xyxy")
    iou = box_iou_and_giou(boxes, box_convert(targets.boxes, "cxcywh", "xyxy"))[0]
    look = weights(seen, layer.heads)
    look = look.gather(1, best[..., None].expand(-1, -1, look.shape[-1]))
    height, width = batch[0]["image"].shape[-2:]
    stride = model.features[0].stride
    look = look.unflatten(-1, (-(-height // stride), -(-width // stride)))
    return boxes * boxes.new_tensor([width, height, width, height]), iou, look


def panel(image: np.ndarray, patch: list[float], box: list[float], iou: float, look: np.ndarray) -> Image.Image:
    """The picture, darkened where the query does not look, with both boxes."""
    height, width = image.shape[:2]
    bright = np.asarray(Image.fromarray((255 * look / look.max()).astype(np.uint8)).resize((width, height)), np.float32)
    picture = Image.fromarray((image * (0.35 + 0.65 * bright[..., None] / 255)).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    draw.rectangle(patch, outline=PATCH, width=2)
    draw.rectangle(box, outline=ANSWER, width=2)
    label(draw, (4, height - 16), f"IoU {iou:.2f}")
    return picture


def load_task(task: PatchPretext, checkpoint: Path | None) -> int:
    """Load a checkpoint of the run into the task; None leaves it as it started. Returns its step."""
    if checkpoint is None:
        return 0
    found = verify(checkpoint)
    state, _ = load_state(found)
    load_model(task, state, untracked=task.untracked, where=checkpoint)
    return found.step


def sheet(task: PatchPretext, stages: list[Path | None], batch: list[PatchSample], patches: list[int]) -> Image.Image:
    """A row per picture: the picture with its patch, then a column per stage."""
    height, width = batch[0]["image"].shape[-2:]
    picture = Image.new("RGB", ((1 + len(stages)) * (width + GAP) - GAP, len(batch) * (height + GAP) + 16), "black")
    draw = ImageDraw.Draw(picture)
    label(draw, (4, 2), "picture and patch")
    for column, stage in enumerate(stages):
        step = load_task(task, stage)
        boxes, iou, look = answers(task, batch)
        left = (1 + column) * (width + GAP)
        label(draw, (left + 4, 2), f"step {step}: mean IoU of all patches here {float(iou.mean()):.2f}")
        for row, (one, chosen) in enumerate(zip(batch, patches, strict=True)):
            image = one["image"].permute(1, 2, 0).numpy()
            patch = one["boxes"][chosen].tolist()
            top = 16 + row * (height + GAP)
            if column == 0:
                plain = Image.fromarray(image)
                ImageDraw.Draw(plain).rectangle(patch, outline=PATCH, width=2)
                picture.paste(plain, (0, top))
            shown = panel(image, patch, boxes[row, chosen].tolist(), float(iou[row, chosen]), look[row, chosen].numpy())
            picture.paste(shown, (left, top))
    return picture


def main(argv: list[str]) -> int:
    """Write ``patches.png``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder of a pretext run (its out=)")
    parser.add_argument("--during", type=Path, nargs="*", default=[], help="checkpoints in between")
    parser.add_argument("--pictures", type=int, default=4)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    args = parser.parse_args(argv)
    config = load_config(DetrTrainConfig, args.run / "config.yaml", ["cache=null", "pretext.held_out_count=0"])
    last = newest(args.run / "checkpoints", warn=warn)
    if config.pretext is None or config.model.arch != "conditional" or last is None:
        raise UserError(f"{args.run}: not a run of the pretext with arch conditional and a checkpoint")
    parts = build(config)
    task = parts.task
    assert isinstance(task, PatchPretext)
    source = patch_source(config, config.pretext.held_out, seed=config.loop.seed + 1, count=args.pictures)
    batch = [source.sample(index, 0) for index in range(args.pictures)]
    stages: list[Path | None] = [None, *args.during, last.folder]
    picture = sheet(task, stages, batch, [index % source.config.count for index in range(args.pictures)])
    args.out.mkdir(parents=True, exist_ok=True)
    small = picture.quantize(COLOURS)
    small.save(args.out / "patches.png", optimize=True)
    print(args.out / "patches.png")
    return 0


if __name__ == "__main__":
    run_cli(main)
