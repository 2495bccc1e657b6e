# SPDX-License-Identifier: Apache-2.0
"""A process whose pictures show nothing does what the others do: a synchronised norm that it skips waits for ever.

``python -m tests.modeling.test_empty_pictures both FOLDER`` is the body of one of two processes.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from detectron2.structures import BitMasks, Boxes, Instances
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ovd.modeling.detr.task import DetrTask
from ovd.modeling.proposals.architecture import ARCHITECTURES
from ovd.modeling.proposals.classes import ClassBranch
from ovd.modeling.proposals.network import build_proposal_detector
from ovd.modeling.task import DetectionTask
from ovd.modeling.vild.meta_arch import OpenVocabularyRCNN
from pretrain.engine import distributed
from pretrain.engine.distributed import rank
from pretrain.engine.task import Task
from tests.engine.processes import launch
from tests.modeling.test_rcnn import C4, DETAIL, FPN, SIDE, batch, make
from tests.updetr import small

NORMS = (nn.GroupNorm, nn.BatchNorm2d)
NORMED_FPN = {**FPN, "head": {**FPN["head"], "norm": "GN", "mask_norm": "GN", "mask_dims": (32, 32)}}
KINDS = {"c4": C4, "detail": DETAIL, "fpn": NORMED_FPN}
RCNNS = [("agnostic", "fpn"), ("text", "c4"), ("image", "detail"), ("vild", "fpn"), ("ensemble", "detail")]


def nothing(height: int, width: int) -> Instances:
    instances = Instances((height, width))
    instances.gt_boxes = Boxes(torch.zeros(0, 4))
    instances.gt_classes = torch.zeros(0, dtype=torch.long)
    instances.gt_masks = BitMasks(torch.zeros(0, height, width, dtype=torch.bool))
    return instances


def without_objects(samples: list[Any]) -> list[Any]:
    """The same pictures, of which nothing was labelled and nothing proposed."""
    empty = []
    for sample in samples:
        height, width = sample["image"].shape[-2:]
        if "boxes" in sample:
            empty.append({**sample, "boxes": sample["boxes"][:0], "classes": sample["classes"][:0]})
            continue
        one = {**sample, "instances": nothing(height, width)}
        if "regions" in sample:
            one["regions"] = sample["regions"][:0]
        empty.append(one)
    return empty


def rcnn(variant: str, kind: str) -> tuple[Task, list[Any]]:
    model = make(variant, KINDS[kind])
    task = DetectionTask(model=model, pretrained_prefixes=(), pretrained_lr_scale=1.0)
    return task, batch(label=0 if variant in ("agnostic", "image") else 1)


def proposals() -> tuple[Task, list[Any]]:
    torch.manual_seed(0)
    model = build_proposal_detector(ranking="objectness", nms=0.6, pre_nms=1000, post_nms=100)
    return DetectionTask(model=model, pretrained_prefixes=(), pretrained_lr_scale=1.0), batch(label=0, regions=False)


def own_classes() -> tuple[Task, list[Any]]:
    torch.manual_seed(0)
    canvas = {"image": torch.zeros(3, 64, 64), "boxes": torch.tensor([[4.0, 4.0, 40.0, 40.0]])}
    task = DetectionTask(
        model=ClassBranch(ARCHITECTURES["nanodet"], classes=2), pretrained_prefixes=(), pretrained_lr_scale=1.0
    )
    return task, [{**canvas, "classes": torch.tensor([n])} for n in range(2)]


def transformer(arch: str, **options: Any) -> tuple[Task, list[Any]]:
    if options.get("variant") == "text":
        tower = small.conv_fc_head(
            in_channels=small.CHANNELS, resolution=4, embed_dim=small.D, norm="BN", conv_dims=(8,), fc_dims=(16,)
        )
        options["region_tower"] = tower
    task = DetrTask(model=small.make(arch, frozen=False, **options), pretrained_lr_scale=1.0)
    return task, [small.picture(64, 64, [[4.0, 4.0, 30.0, 40.0]], [0], seed=n) for n in range(2)]


CASES: dict[str, Callable[[], tuple[Task, list[Any]]]] = {
    **{f"{variant}, {kind}": lambda v=variant, k=kind: rcnn(v, k) for variant, kind in RCNNS},  # type: ignore[misc]
    "proposals": proposals,
    "own classes": own_classes,
    "detr": lambda: transformer("detr", variant="closed"),
    "conditional detr": lambda: transformer("conditional", variant="text", denoising=1),
    "ov-detr": lambda: transformer("conditional", variant="text", denoising=1, conditioned=3),
}


def passes(task: Task, samples: list[Any]) -> tuple[Counter[str], set[str]]:
    """How often each norm is run, and the parameters that get a gradient."""
    runs: Counter[str] = Counter()
    hooks = [
        module.register_forward_hook(lambda *_, name=name: runs.update([name]))
        for name, module in task.named_modules()
        if isinstance(module, NORMS)
    ]
    task.zero_grad(set_to_none=True)
    loss, _ = task.train()(samples)
    loss.backward()
    for hook in hooks:
        hook.remove()
    assert torch.isfinite(loss)
    return runs, {name for name, p in task.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("case", CASES)
def test_norms__run_and_learn_as_often_without_objects_as_with_some(case: str) -> None:
    task, samples = CASES[case]()
    runs, learned = passes(task, samples)
    empty_runs, empty_learned = passes(task, without_objects(samples))
    assert empty_runs == runs
    if not task.find_unused_parameters:  # DistributedDataParallel waits for each of them, too
        assert empty_learned == learned


class SumOverProcesses(torch.autograd.Function):
    """What a synchronised norm does: a collective on the way there, another on the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = torch.tensor([float(x.numel())])
        dist.all_reduce(total)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        dist.all_reduce(torch.tensor([float(grads[0].numel())]))
        return grads[0]


class Synchronised(nn.Module):
    """A norm that meets the other processes."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = SumOverProcesses.apply(self.norm(x))
        return y


def synchronise(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, NORMS):
            setattr(module, name, Synchronised(child))
        else:
            synchronise(child)


def both(folder: Path) -> None:
    """Train two steps, in which one process sees no object; a collective that is missed fails after 30 s."""
    for variant in ("agnostic", "ensemble"):
        task, samples = rcnn(variant, "detail")
        assert isinstance(task.model, OpenVocabularyRCNN) and SIDE == samples[0]["image"].shape[-1]
        synchronise(task)
        model = DistributedDataParallel(task, find_unused_parameters=task.find_unused_parameters)
        for turn in range(2):
            loss, _ = model(without_objects(samples) if rank() == turn else samples)
            loss.backward()
    (folder / f"done_{rank()}").touch()


def test_empty_pictures__one_of_two_processes_without_objects(tmp_path: Path) -> None:
    launch("both", tmp_path, world=2, module="tests.modeling.test_empty_pictures")
    assert {path.name for path in tmp_path.iterdir()} == {"done_0", "done_1"}


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=200))
    globals()[sys.argv[1]](Path(sys.argv[2]))
    distributed.teardown()
