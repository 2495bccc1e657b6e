# SPDX-License-Identifier: Apache-2.0
"""Pretraining and training steps of the transformer: cached features and one matching, against the plain way.

The plain way runs the frozen backbone over pictures and patches in each step and matches layer by layer, image by
image, as released code does. Both see the same samples (rendering is not timed) and must have the same losses.
"""

from __future__ import annotations

import resource
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from _common import milliseconds, parser, ratio, report, set_threads, show_ratio, take_turns

if TYPE_CHECKING:
    from torch import Tensor

    from ovd.modeling.detr.matcher import QueryAssignment


def plain_match(
    cost: Tensor, counts: Sequence[int], *, query_group_Q: Tensor | None = None, target_group_NT: Tensor | None = None
) -> QueryAssignment:
    """One transfer and one assignment per layer and image; groups by forbidding pairs."""
    import torch
    from scipy.optimize import linear_sum_assignment

    from ovd.modeling.detr.matcher import QueryAssignment

    rows = []
    for layer in range(cost.shape[0]):
        for image, count in enumerate(counts):
            block = cost[layer, image, :, :count]
            if query_group_Q is not None and target_group_NT is not None:
                block = block.masked_fill(query_group_Q[:, None] != target_group_NT[image, None, :count], 1e5)
            queries, targets = linear_sum_assignment(block.cpu().numpy())
            rows += sorted(((layer, image, q, t) for q, t in zip(queries, targets, strict=True)), key=lambda r: r[3])
    return QueryAssignment(*torch.tensor(rows, dtype=torch.int64).reshape(-1, 4).T.unbind(0))


def main() -> None:
    """Time both ways in turns."""
    flags = parser(__doc__ or "")
    flags.add_argument("--batch", type=int, default=8, help="pictures per step (default 8)")
    flags.add_argument("--forward-only", action="store_true", help="losses only, no backward pass")
    options = flags.parse_args()
    set_threads(options.threads)

    import torch

    import ovd.modeling.detr.criterion as criterion_module
    from ovd.config_detr import DetrTrainConfig
    from ovd.modeling.detr.matcher import hungarian_match
    from ovd.training.detr import build
    from pretrain.engine.config import load_config

    rows: list[tuple[str, str, str]] = []
    figures: dict[str, Any] = {}
    for name, file, changes in (
        # in the backbone's own space, so that both ways embed patches by the same network
        ("pretraining", "updetr.yaml", ["model.embed_space=ssl", "model.loss.contrast=0"]),
        ("training", "detr.yaml", []),
        ("training without the region tower", "detr.yaml", ["model.region_tower=false"]),
    ):
        small = ["cache=null", f"loop.batch_size={options.batch}", "loop.accumulate=1", "out=unused"]
        if name == "pretraining":
            small += ["pretext.held_out_count=0", f"pretext.images.length={options.batch}"]
        else:
            small += [f"data.length={options.batch}"]
        parts = build(load_config(DetrTrainConfig, file, small + changes))
        task, model, source = parts.task.train(), parts.model, parts.source
        pictures = [source.sample(index, 0) for index in range(options.batch)]
        cached = [cache_one(model, one) for one in pictures]
        trained = [p for p in task.parameters() if p.requires_grad]

        def step(batch: list[dict[str, Any]], matcher: Any, task: Any = task, trained: Any = trained) -> float:
            criterion_module.hungarian_match = matcher
            torch.manual_seed(0)  # both ways draw the same noise
            try:
                loss, _ = task(batch)
                if not options.forward_only:
                    for p in trained:
                        p.grad = None
                    loss.backward()
                return float(loss.detach())
            finally:
                criterion_module.hungarian_match = hungarian_match

        ways: dict[str, Callable[[], object]] = {
            "plain": partial(step, pictures, plain_match),
            "cached": partial(step, cached, hungarian_match),
        }
        difference = abs(step(pictures, plain_match) - step(cached, hungarian_match))
        seconds = take_turns(ways, rounds=options.rounds or 8)
        speedup = ratio(seconds["plain"], seconds["cached"])
        each = milliseconds(seconds["cached"])
        rows += [
            (f"{name}: plain / cached", show_ratio(speedup), "aim >= 2"),
            (f"{name}: pictures per second, cached", f"{1e3 * options.batch / each['p50_ms']:.1f}", ""),
            (f"{name}: difference of the loss", f"{difference:.1e}", "aim <= 1e-5"),
        ]
        figures[name] = {
            "ratio": speedup, "cached": each, "plain": milliseconds(seconds["plain"]), "loss_difference": difference
        }  # fmt: skip
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    rows.append(("peak memory of this process, MiB", f"{peak:.0f}", ""))
    figures["peak_mib"] = peak
    report("Transformer steps: cached features and batched matching", rows, figures, options.json)


def cache_one(model: Any, one: dict[str, Any]) -> dict[str, Any]:
    """A sample with features (and embeddings of its patches) in float32 in place of pixels."""
    import torch

    with torch.no_grad():
        maps = model.maps(model.normalised(one["image"][None]))
        out: dict[str, Any] = {"features": {k: v[0] for k, v in maps.items()}, "size": tuple(one["image"].shape[-2:])}
        if "patches" in one:
            out["embeddings"] = model.pooled(one["patches"][:, 0])
            out["boxes"] = one["boxes"]
        else:
            out["instances"] = one["instances"]
    return out


if __name__ == "__main__":
    main()
