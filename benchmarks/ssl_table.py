# SPDX-License-Identifier: Apache-2.0
"""Every self-supervised method at equal views and at equal CPU time: kNN, linear probe, transfer to detection.

    OMP_NUM_THREADS=1 python benchmarks/ssl_table.py            # hours; interrupted, it goes on where it was

The configurations are configs/pretrain/*.yaml with views of half the side (32 pixels), so that a run takes minutes on
one core. "Equal views": the same number of steps and pictures. "Equal time": as many steps as the CPU time of the
quickest method at equal views allows, counted from each method's own CPU time per step. Transfer: the class-agnostic
Mask R-CNN of configs/mask_rcnn.yaml from that backbone, every layer trained, on a short schedule, the same for all.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
for place in (ROOT, ROOT / "benchmarks"):
    if str(place) not in sys.path:
        sys.path.insert(0, str(place))

from _common import machine  # noqa: E402

from pretrain.config import PretrainConfig  # noqa: E402
from pretrain.engine.config import config_hash, dump_config, load_config, plain  # noqa: E402
from pretrain.engine.files import write_atomically  # noqa: E402

METHODS = ("simclr", "moco_v1", "moco_v2", "byol", "byol_gn", "swav", "simsiam", "barlow_twins", "clip")
SCRATCH = "random"  # the row of an untrained network
VIEWS, TIME = "views", "time"
SIZE = 32
BATCH = 128


def recipe(method: str, *, steps: int, seed: int, out: Path) -> PretrainConfig:
    """The method's configuration with small views and that many steps; warm-up and milestones keep their shares."""
    raw: dict[str, Any] = plain(load_config(PretrainConfig, f"pretrain/{method}.yaml"))
    share = steps / raw["loop"]["steps"]
    if method == "clip":
        encoder = raw["method"]["encoder"]
        encoder["image"]["image_size"] = SIZE
        raw["method"] |= {"text_weights": str(ROOT / "weights" / "clip-sticker"), "image_weights": None}
    else:
        half = SIZE / 64
        raw["method"]["views"] = [{**view, "size": round(view["size"] * half)} for view in raw["method"]["views"]]
    raw["out"] = str(out)
    raw["watch"]["probe_every"] = 0  # the CPU time is the method's
    raw["loop"] |= {"steps": steps, "batch_size": BATCH, "seed": seed, "workers": 0, "threads": 1, "device": "cpu"}
    raw["loop"] |= {"save_every": 10**9, "log_every": 20}
    raw["optim"]["warmup_steps"] = round(share * raw["optim"]["warmup_steps"])
    raw["optim"]["milestones"] = [max(1, round(share * step)) for step in raw["optim"]["milestones"]]
    return PretrainConfig.model_validate(raw)


def command(*words: str) -> float:
    """Run ``python -m WORDS`` to its end; returns its CPU seconds, of all its threads."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", *words], cwd=ROOT, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime)


def remember(path: Path, make: Any) -> dict[str, Any]:
    """What a finished part wrote, or what ``make`` finds now."""
    if not path.is_file():
        write_atomically(path, (json.dumps(make(), indent=1) + "\n").encode())
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def pretrain(method: str, folder: Path, *, steps: int, seed: int) -> dict[str, Any]:
    """Train by the product's own command; returns steps, CPU seconds and the configuration's hash."""
    config = recipe(method, steps=steps, seed=seed, out=folder / "run")

    def train() -> dict[str, Any]:
        write_atomically(folder / "config.yaml", dump_config(config).encode())
        seconds = command("pretrain.train", "--config", str(folder / "config.yaml"), "--overwrite")
        return {"steps": steps, "cpu_seconds": seconds, "config_hash": config_hash(config)}

    return remember(folder / "pretrain.json", train)


def probed(folder: Path, backbone: Path | None, *, seed: int, views: int) -> dict[str, Any]:
    """kNN and linear probe of the frozen backbone; None: random weights."""

    def measure() -> dict[str, Any]:
        import torch

        from pretrain.config_ssl import BackboneConfig
        from pretrain.config_views import InputSpec
        from pretrain.evaluation.data import open_data
        from pretrain.evaluation.linear import SMALL
        from pretrain.evaluation.probe import ProbeOptions, evaluate
        from pretrain.export import read_source
        from pretrain.nets.backbones import build_backbone

        torch.set_num_threads(1)
        torch.manual_seed(seed)
        mean: Sequence[float] = (0.485, 0.456, 0.406)  # ImageNet's, as the configurations have it
        std: Sequence[float] = (0.229, 0.224, 0.225)
        if backbone is None:
            network = build_backbone(BackboneConfig(name="resnet18", stem="small")).eval()
        else:
            source = read_source(str(backbone))
            network, mean, std = source.network, source.mean, source.std
        train, test, side = open_data("sticker_singles", size=SIZE, views=views)
        return evaluate(
            network,
            train,
            test,
            InputSpec(side, mean, std),
            ProbeOptions(measures=["knn", "linear_cached"], k=20, protocol=SMALL, seed=seed),
            log=print,
        )

    return remember(folder / "probe.json", measure)


def transferred(method: str, folder: Path, backbone: Path | None, options: argparse.Namespace) -> dict[str, Any]:
    """AP of any thing's box and mask by the sticker Mask R-CNN after a short training from that backbone."""

    def measure() -> dict[str, Any]:
        run = folder / "detector"
        start = "backbone_start=scratch" if backbone is None else f"backbone_weights={backbone}"
        norm = "GN16" if method == "byol_gn" else "BN"
        seconds = command(
            "ovd.train", "--config", "mask_rcnn.yaml", f"out={run}", start, f"model.backbone.norm={norm}",
            "model.backbone.freeze_at=0", "pretrained_lr_scale=1.0",
            f"loop.steps={options.detector_steps}", f"loop.batch_size={options.detector_batch}", "loop.threads=1",
            f"loop.seed={options.seed}", "loop.workers=0", "loop.device=cpu", "loop.save_every=1000000000",
            f"optim.warmup_steps={options.detector_steps // 8}", "--overwrite",
        )  # fmt: skip
        return {"steps": options.detector_steps, "cpu_seconds": seconds, **judged(run / "exported", options.scenes)}

    return remember(folder / "transfer.json", measure)


def judged(weights: Path, scenes: int) -> dict[str, float]:
    """Class-agnostic box AP of a detector on validation scenes: every thing is one category."""
    from ovd.evaluation import coco
    from ovd.evaluation.predictor import proposals_of
    from ovd.evaluation.run import run_source
    from ovd.modeling.load import load_detector_model
    from pretrain.data.scenes import SceneSource
    from pretrain.data.stickers import Stickers

    source = SceneSource(Stickers.load(), split="val", seed=0, size=256, length=scenes)
    gt, _, proposals = run_source(source, None, propose=proposals_of(load_detector_model(weights), top=100))
    things, found = coco.as_one_category(gt, proposals or [])
    values = coco.evaluate(things, found, None, ["bbox"], proposals=proposals).values
    return {key: float(values[f"bbox/{key}"]) for key in ("AP", "AP50", "AP75", "AR100", "AR100@50")}


def one(method: str, column: str, options: argparse.Namespace, *, steps: int, transfer: bool) -> dict[str, Any]:
    """Everything about one run."""
    folder = options.out / f"{method}_{column}_{options.seed}"
    folder.mkdir(parents=True, exist_ok=True)
    backbone = None
    found: dict[str, Any] = {}
    if method != SCRATCH:
        found = pretrain(method, folder, steps=steps, seed=options.seed)
        backbone = folder / "run" / "exported"
    found["probe"] = probed(folder, backbone, seed=options.seed, views=options.probe_views)
    if transfer:
        found["transfer"] = transferred(method, folder, backbone, options)
    return found


def everything(options: argparse.Namespace) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(method, column, figures) of every run, in the order in which they are wanted."""
    yield SCRATCH, VIEWS, one(SCRATCH, VIEWS, options, steps=0, transfer=bool(options.transfer))  # beside both columns
    cost = {}
    for method in METHODS:
        found = one(method, VIEWS, options, steps=options.steps, transfer=VIEWS in options.transfer)
        cost[method] = found["cpu_seconds"] / found["steps"]
        yield method, VIEWS, found
    budget = min(cost.values()) * options.steps
    for method in options.methods:
        steps = max(1, round(budget / cost[method]))
        column = VIEWS if steps == options.steps else TIME  # the quickest one's run stands in both tables
        yield method, TIME, one(method, column, options, steps=steps, transfer=TIME in options.transfer)


def row(method: str, found: dict[str, Any]) -> str:
    """A line of the table."""
    probe, transfer = found["probe"], found.get("transfer")
    seen = f"{found['steps']} | {found['cpu_seconds']:.0f}" if "steps" in found else "0 | 0"
    moved = f"{100 * transfer['AP']:.1f} | {100 * transfer['AP50']:.1f}" if transfer else "– | –"
    scores = f"{100 * probe['knn']['top1']:.1f} | {100 * probe['linear_cached']['top1']:.1f}"
    return f"| {method} | {seen} | {scores} | {moved} | {found.get('config_hash', '')} |"


def main(argv: Sequence[str]) -> None:
    """Run what is not there yet; print a line per run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400, help="of every method at equal views")
    parser.add_argument("--detector-steps", type=int, default=150, help="of the Mask R-CNN")
    parser.add_argument("--detector-batch", type=int, default=4)
    parser.add_argument("--scenes", type=int, default=100, help="validation scenes for AP")
    parser.add_argument("--probe-views", type=int, default=4, help="pictures of each sticker in the probe's bank")
    parser.add_argument("--transfer", nargs="*", choices=[VIEWS, TIME], default=[VIEWS])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="of the rows at equal time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "ssl_table")
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    table: dict[str, Any] = {}
    for method, column, found in everything(options):
        table[f"{method}/{column}"] = found
        print(f"{column}: {row(method, found)}", flush=True)
        settings = {name: str(value) for name, value in vars(options).items() if name != "out"}
        text = json.dumps({"machine": machine(), "settings": settings, "found": table}, indent=1)
        write_atomically(options.out / f"ssl_table_{options.seed}.json", (text + "\n").encode())


if __name__ == "__main__":
    main(sys.argv[1:])
