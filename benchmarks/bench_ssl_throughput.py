# SPDX-License-Identifier: Apache-2.0
"""Self-supervised training in samples per second, beside lightly's (`pip install wordbox[benchmark]`; else ours alone).

Both libraries train the same backbone with heads of the same sizes on the same JPEG files, batch, views and optimiser,
in fp32, with the pictures prepared in the training process. "data" is decoding to network input; "whole" is that and
the optimiser step. Memory is what two whole steps need beyond the imports, network included.

`--curves STEPS` compares what is learnt instead: both libraries train from the same backbone with each of three seeds,
each on its own views, and the loss of the last quarter is shown in the same terms.
"""

from __future__ import annotations

import copy
import importlib
import multiprocessing
import resource
import statistics
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _common import parser, ratio, report, set_threads, show_ratio, take_turns

if TYPE_CHECKING:
    import torch
    from torch import nn

    from pretrain.config_views import ViewConfig

METHODS = ("simclr", "moco_v2", "byol", "swav", "simsiam", "barlow_twins")
HIDDEN, DIM, QUEUE, PROTOTYPES = 512, 128, 4096, 16  # of both libraries, for every method
SEEDS = (0, 1, 2)  # of the curves
CURVE_PICTURES = 256
Data = Callable[[], list["torch.Tensor"]]
Step = Callable[[list["torch.Tensor"]], "torch.Tensor"]  # one optimiser step on prepared views; returns the loss


def write_pictures(folder: Path, *, count: int, height: int, width: int) -> None:
    """Sticker scenes as JPEG files of quality 90."""
    from PIL import Image

    from pretrain.data.scenes import SceneSource
    from pretrain.data.stickers import Stickers

    source = SceneSource(Stickers.load(), split="train", seed=0, size=(height, width), length=count)
    for index in range(count):
        Image.fromarray(source.scene(index).image).save(folder / f"{index}.jpg", quality=90)


def views_of(method: str, size: int) -> list[ViewConfig]:
    """The views of a method's paper, at another size (SwAV's small crops in the paper's proportion)."""
    from pretrain.config_views import ViewConfig

    strong, mild = (0.8, 0.8, 0.8, 0.2), (0.4, 0.4, 0.4, 0.1)
    if method == "simclr":
        return [ViewConfig(size=size, crop_scale=(0.08, 1), jitter=strong, count=2)]
    if method in ("moco_v2", "simsiam"):
        return [ViewConfig(size=size, crop_scale=(0.2, 1), jitter=mild, count=2)]
    if method == "swav":
        return [
            ViewConfig(size=size, crop_scale=(0.14, 1), jitter=strong, count=2),
            ViewConfig(size=small_size(size), crop_scale=(0.05, 0.14), jitter=strong, count=6),
        ]
    first = ViewConfig(size=size, crop_scale=(0.08, 1), jitter=(0.4, 0.4, 0.2, 0.1), blur_p=1.0)
    return [first, first.model_copy(update={"blur_p": 0.1, "solarise_p": 0.2})]


def small_size(size: int) -> int:
    """Side of SwAV's small crops: 96 for 224, a multiple of 8."""
    return max(16, round(size * 96 / 224 / 8) * 8)


def backbone(seed: int = 0) -> nn.Module:
    """The network that both train."""
    import torch

    from pretrain.config_ssl import BackboneConfig
    from pretrain.nets.backbones import build_backbone

    torch.manual_seed(seed)
    return build_backbone(BackboneConfig(name="resnet18", stem="small"))


# --- ours ------------------------------------------------------------------------------------------------------------


def our_data(folder: Path, method: str, size: int, batch: int, seed: int = 0) -> Data:
    """Files to network input, as the trainer does it."""
    from pretrain.augment import ViewAugment
    from pretrain.config_views import FolderData, expand_views
    from pretrain.data.crops import ViewSource
    from pretrain.data.images import build_images

    source = ViewSource(build_images(FolderData(root=folder)), views_of(method, size), seed=seed)
    augment = [ViewAugment(view) for view in expand_views(views_of(method, size))]
    draw = 0

    def make() -> list[torch.Tensor]:
        nonlocal draw
        samples = [source.sample((draw + k) % len(source), draw + k) for k in range(batch)]
        draw += batch
        crops = source.collate(samples)["views"]
        return [change(crop) for change, crop in zip(augment, crops, strict=True)]

    return make


def our_step(method: str, seed: int = 0) -> Step:
    """One optimiser step on prepared views."""
    import torch

    from pretrain.methods.barlow_twins import BarlowTwins
    from pretrain.methods.byol import BYOL
    from pretrain.methods.moco import MoCo
    from pretrain.methods.simclr import SimCLR
    from pretrain.methods.simsiam import SimSiam
    from pretrain.methods.swav import SwAV
    from pretrain.nets.heads import mlp

    net = backbone(seed)
    width = int(net.width)  # type: ignore[arg-type]

    def same(view: torch.Tensor) -> torch.Tensor:  # "data" has augmented already
        return view

    pair = [same, same]
    two = mlp([width, HIDDEN, DIM])
    task: nn.Module
    if method == "simclr":
        task = SimCLR(backbone=net, projector=mlp([width, HIDDEN, DIM], last_norm="scale"), augment=pair)
    elif method == "moco_v2":
        head = mlp([width, HIDDEN, DIM], norm="none", bias=True, last_bias=True)
        task = MoCo(backbone=net, projector=head, augment=pair, dim=DIM, queue=QUEUE, momentum=0.99, temperature=0.2)
    elif method == "byol":
        task = BYOL(backbone=net, projector=two, predictor=mlp([DIM, HIDDEN, DIM]), augment=pair)
    elif method == "simsiam":
        projector = mlp([width, HIDDEN, HIDDEN, DIM], last_norm="plain")
        task = SimSiam(backbone=net, projector=projector, predictor=mlp([DIM, HIDDEN, DIM]), augment=pair)
    elif method == "barlow_twins":
        task = BarlowTwins(backbone=net, projector=mlp([width, HIDDEN, HIDDEN, DIM]), augment=pair)
    else:
        task = SwAV(backbone=net, projector=two, augment=[same] * 8, dim=DIM, prototypes=PROTOTYPES)
    optimiser = torch.optim.SGD([p for p in task.parameters() if p.requires_grad], lr=0.01, momentum=0.9)
    task.train()
    after_step: Any = getattr(task, "after_step", None)
    count = 0

    def step(views: list[torch.Tensor]) -> torch.Tensor:
        nonlocal count
        loss, _ = task({"views": views})
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if after_step is not None:
            after_step(count, 10**6)
        count += 1
        return loss.detach()

    return step


# --- lightly's -------------------------------------------------------------------------------------------------------


def their_data(folder: Path, method: str, size: int, batch: int, seed: int = 0) -> Data:
    """Files to network input through lightly's transform of the method and torch's collate."""
    import random

    import numpy as np
    import torch
    from lightly import transforms as T
    from lightly.transforms.byol_transform import BYOLView1Transform, BYOLView2Transform
    from PIL import Image
    from torch.utils.data import default_collate

    random.seed(seed)  # its views draw from all three generators
    np.random.seed(seed)
    torch.manual_seed(seed)
    if method == "simclr":
        transform: Any = T.SimCLRTransform(input_size=size)
    elif method in ("moco_v2", "simsiam"):
        transform = T.MoCoV2Transform(input_size=size)
    elif method == "swav":
        transform = T.SwaVTransform(crop_sizes=(size, small_size(size)))
    else:
        transform = T.BYOLTransform(BYOLView1Transform(input_size=size), BYOLView2Transform(input_size=size))
    paths = sorted(folder.glob("*.jpg"))
    draw = 0

    def make() -> list[torch.Tensor]:
        nonlocal draw
        samples = []
        for k in range(batch):
            with Image.open(paths[(draw + k) % len(paths)]) as image:
                samples.append(transform(image.convert("RGB")))
        draw += batch
        return default_collate(samples)

    return make


def their_step(method: str, seed: int = 0) -> Step:
    """One optimiser step with lightly's heads, losses and momentum update, put together as its examples do.

    The loss it returns is in our terms: BYOL's is the sum of 2 - 2cos over both directions, lightly's the mean of -cos.
    """
    import torch
    from lightly import loss as losses
    from lightly.models import modules as M
    from lightly.models.utils import deactivate_requires_grad, update_momentum
    from torch.nn import functional as F

    net = backbone(seed)
    width = int(net.width)  # type: ignore[arg-type]
    cosine = losses.NegativeCosineSimilarity()
    slow: list[tuple[nn.Module, nn.Module]] = []

    def follow(module: nn.Module) -> nn.Module:
        other = copy.deepcopy(module)
        deactivate_requires_grad(other)
        slow.append((module, other))
        return other

    parts: list[nn.Module] = [net]
    if method == "simclr":
        head, criterion = M.SimCLRProjectionHead(width, HIDDEN, DIM), losses.NTXentLoss(temperature=0.1)
        parts.append(head)

        def compute(views: Sequence[torch.Tensor]) -> torch.Tensor:
            return criterion(head(net(views[0])), head(net(views[1])))

    elif method == "moco_v2":
        head = M.MoCoProjectionHead(width, HIDDEN, DIM)
        parts.append(head)
        slow_net, slow_head = follow(net), follow(head)
        criterion = losses.NTXentLoss(temperature=0.2, memory_bank_size=(QUEUE, DIM))

        def compute(views: Sequence[torch.Tensor]) -> torch.Tensor:
            with torch.no_grad():
                key = slow_head(slow_net(views[1]))
            return criterion(head(net(views[0])), key)

    elif method == "byol":
        head, predictor = M.BYOLProjectionHead(width, HIDDEN, DIM), M.BYOLPredictionHead(DIM, HIDDEN, DIM)
        parts += [head, predictor]
        slow_net, slow_head = follow(net), follow(head)

        def compute(views: Sequence[torch.Tensor]) -> torch.Tensor:
            a, b = (predictor(head(net(view))) for view in views)
            with torch.no_grad():
                target_a, target_b = (slow_head(slow_net(view)) for view in views)
            return 0.5 * (cosine(a, target_b) + cosine(b, target_a))

    elif method == "simsiam":
        head, predictor = M.SimSiamProjectionHead(width, HIDDEN, DIM), M.SimSiamPredictionHead(DIM, HIDDEN, DIM)
        parts += [head, predictor]

        def compute(views: Sequence[torch.Tensor]) -> torch.Tensor:
            a, b = (head(net(view)) for view in views)
            return 0.5 * (cosine(predictor(a), b.detach()) + cosine(predictor(b), a.detach()))

    elif method == "barlow_twins":
        head, criterion = M.BarlowTwinsProjectionHead(width, HIDDEN, DIM), losses.BarlowTwinsLoss(lambda_param=0.0051)
        parts.append(head)

        def compute(views: Sequence[torch.Tensor]) -> torch.Tensor:
            return criterion(head(net(views[0])), head(net(views[1])))

    else:
        head, prototypes = M.SwaVProjectionHead(width, HIDDEN, DIM), M.SwaVPrototypes(DIM, PROTOTYPES)
        parts += [head, prototypes]
        criterion = losses.SwaVLoss()

        def compute(views: Sequence[torch.Tensor]) -> torch.Tensor:
            prototypes.normalize()
            scores = [prototypes(F.normalize(head(net(view)), dim=1)) for view in views]
            return criterion(scores[:2], scores[2:])

    optimiser = torch.optim.SGD([p for part in parts for p in part.parameters()], lr=0.01, momentum=0.9)

    def step(views: list[torch.Tensor]) -> torch.Tensor:
        for module, other in slow:
            update_momentum(module, other, m=0.99)
        loss = compute(views)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        return 4 + 4 * loss.detach() if method == "byol" else loss.detach()

    return step


# --- measuring -------------------------------------------------------------------------------------------------------

LIBRARIES: dict[str, tuple[Callable[..., Data], Callable[..., Step]]] = {
    "ours": (our_data, our_step),
    "lightly": (their_data, their_step),
}


def whole(data: Data, step: Step) -> None:
    """Prepare a batch and learn from it."""
    step(data())


def import_all(libraries: Sequence[str]) -> None:
    """What both need, so that imports count for neither."""
    names = ["pretrain.data.crops", "pretrain.augment", "pretrain.nets.backbones"]
    names += [f"pretrain.methods.{name}" for name in ("barlow_twins", "byol", "moco", "simclr", "simsiam", "swav")]
    if "lightly" in libraries:
        names += ["lightly.transforms", "lightly.loss", "lightly.models.modules"]
    for name in names:
        importlib.import_module(name)


def memory(library: str, folder: Path, method: str, size: int, batch: int) -> float:
    """Megabytes that two whole steps add, in a process of their own."""
    context = multiprocessing.get_context("fork")  # forked before any operator ran in parallel
    results = context.SimpleQueue()

    def child() -> None:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        data, step = LIBRARIES[library][0](folder, method, size, batch), LIBRARIES[library][1](method)
        for _ in range(2):
            whole(data, step)
        results.put((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)

    process = context.Process(target=child)
    process.start()
    process.join()
    if process.exitcode != 0:
        raise RuntimeError(f"measuring {method} of {library} ended with status {process.exitcode}")
    return results.get()


def augmentations(size: int, batch: int, rounds: int, *, compiled: bool) -> dict[str, float]:
    """Views per second of the colour changes alone: OpenCV, torch, and torch compiled."""
    import torch

    from pretrain.augment import apply_opencv, apply_torch, draw_parameters

    view = views_of("byol", size)[1].model_copy(update={"blur_p": 0.5})
    crops = torch.randint(0, 256, (batch, size, size, 3), dtype=torch.uint8).permute(0, 3, 1, 2)

    def run(function: Callable[..., torch.Tensor]) -> None:
        function(crops, draw_parameters(view, batch, crops.device), view)

    alternatives = {"OpenCV": partial(run, apply_opencv), "torch": partial(run, apply_torch)}
    if compiled:
        alternatives["torch compiled"] = partial(run, torch.compile(apply_torch, fullgraph=True))
    seconds = take_turns(alternatives, rounds=rounds)
    return {name: batch / statistics.median(values) for name, values in seconds.items()}


def compiled_steps(size: int, batch: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of a forward and backward pass of the backbone, plain and compiled (``method.compile``), in turns."""
    import torch

    from pretrain.config_ssl import BackboneConfig
    from pretrain.nets.backbones import build_backbone

    pixels = torch.randn(batch, 3, size, size)

    def step(network: torch.nn.Module) -> None:
        network.zero_grad()
        network(pixels).square().mean().backward()

    plain, quick = (build_backbone(BackboneConfig(name="resnet18", stem="small")) for _ in range(2))
    quick.compile()
    return take_turns({"plain": partial(step, plain), "compiled": partial(step, quick)}, rounds=rounds, warmup=2)


def curves(methods: Sequence[str], libraries: Sequence[str], size: int, batch: int, steps: int) -> dict[str, Any]:
    """Loss of every step, by method, library and seed."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_pictures(folder, count=CURVE_PICTURES, height=2 * size, width=2 * size)
        for method in methods:
            found[method] = {library: {} for library in libraries}
            for seed in SEEDS:
                for library in libraries:
                    build_data, build_step = LIBRARIES[library]
                    data, step = build_data(folder, method, size, batch, seed), build_step(method, seed)
                    found[method][library][seed] = [float(step(data())) for _ in range(steps)]
            print(f"{method}: done", flush=True)
    return found


def curve_rows(found: dict[str, Any]) -> list[tuple[str, str, str]]:
    """First step's and last quarter's loss of each library, mean and spread over the seeds."""
    rows = []
    for method, by_library in found.items():
        for library, by_seed in by_library.items():
            first = [losses[0] for losses in by_seed.values()]
            last = [statistics.mean(losses[-max(1, len(losses) // 4) :]) for losses in by_seed.values()]
            shown = " to ".join(f"{statistics.mean(v):.3f} ± {statistics.stdev(v):.3f}" for v in (first, last))
            rows.append((f"{method}, {library}, loss of the first step to the last quarter", shown, ""))
    return rows


def main() -> None:
    """Per method: memory, then data and whole step of both libraries in turns."""
    flags = parser(__doc__ or "")
    flags.add_argument("--methods", default=",".join(METHODS), help="which, with commas between")
    flags.add_argument("--size", type=int, default=64, help="side of a view (default 64)")
    flags.add_argument("--picture", default="160x160", help="height x width of the JPEG files (default 160x160)")
    flags.add_argument("--batch", type=int, default=32, help="samples per step (default 32)")
    flags.add_argument("--data-only", action="store_true", help="leave out the whole step and memory")
    flags.add_argument(
        "--compile", action="store_true", help="measure compiled colour changes and backbone too (takes minutes)"
    )
    flags.add_argument("--curves", type=int, metavar="STEPS", help="compare what is learnt in so many steps, not speed")
    options = flags.parse_args()
    set_threads(options.threads)
    methods = options.methods.split(",")
    if unknown := set(methods) - set(METHODS):
        flags.error(f"--methods: {', '.join(sorted(unknown))} unknown; choose from {', '.join(METHODS)}")
    height, width = (int(side) for side in options.picture.split("x"))
    rounds = options.rounds or 4
    try:
        import lightly

        libraries, version = ["ours", "lightly"], lightly.__version__
    except ImportError:
        libraries, version = ["ours"], None
        print("lightly is not installed: only ours is measured; pip install 'wordbox[benchmark]' adds it")

    title = f"Self-supervised training, ResNet-18 at {options.size} px, batch {options.batch}"
    beside = f", lightly {version}" if version else ""
    if options.curves:
        found = curves(methods, libraries, options.size, options.batch, options.curves)
        title = f"{title}, {options.curves} steps, seeds {', '.join(map(str, SEEDS))}{beside}"
        report(title, curve_rows(found), {"loss": found}, options.json)
        return
    rows: list[tuple[str, str, str]] = []
    figures: dict[str, Any] = {"lightly": version}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_pictures(folder, count=options.batch, height=height, width=width)
        shape = (options.size, options.batch)
        used: dict[str, dict[str, float]] = {}
        if not options.data_only:
            import_all(libraries)
            used = {m: {lib: memory(lib, folder, m, *shape) for lib in libraries} for m in methods}
        for method in methods:
            alternatives: dict[str, Callable[[], object]] = {}
            for library in libraries:
                build_data, build_step = LIBRARIES[library]
                data = build_data(folder, method, *shape)
                alternatives[f"data {library}"] = data
                if not options.data_only:
                    alternatives[f"whole {library}"] = partial(whole, data, build_step(method))
            seconds = take_turns(alternatives, rounds=rounds)
            rate = {name: options.batch / statistics.median(values) for name, values in seconds.items()}
            figures[method] = {"samples_per_second": rate, "seconds": seconds, "megabytes": used.get(method)}
            for part, aim in (("data", "at least 5"), ("whole", "at least 1.3")):
                if f"{part} ours" not in rate:
                    continue
                shown = " / ".join(f"{rate[f'{part} {library}']:,.0f}" for library in libraries)
                rows.append((f"{method}, {part}, samples/s, {' / '.join(libraries)}", shown, ""))
                if len(libraries) == 2:
                    gain = ratio(seconds[f"{part} lightly"], seconds[f"{part} ours"])
                    figures[method][f"{part}_gain"] = gain
                    rows.append((f"{method}, {part}, ours over lightly, speed", show_ratio(gain), aim))
            if method in used:
                shown = " / ".join(f"{used[method][library]:,.0f} MB" for library in libraries)
                rows.append((f"{method}, memory, {' / '.join(libraries)}", shown, ""))
    figures["views_per_second"] = augmentations(options.size, options.batch, rounds, compiled=options.compile)
    rows += [
        (f"colours alone, {name}", f"{rate:,.0f} views/s", "") for name, rate in figures["views_per_second"].items()
    ]
    if options.compile:
        seconds = compiled_steps(options.size, options.batch, 2 * rounds)
        figures["compiled"] = {"seconds": seconds, "gain": ratio(seconds["plain"], seconds["compiled"])}
        rows.append(("backbone step, compiled over plain, speed", show_ratio(figures["compiled"]["gain"]), ""))
    report(f"{title}, JPEGs of {options.picture}{beside}", rows, figures, options.json)


if __name__ == "__main__":
    main()
