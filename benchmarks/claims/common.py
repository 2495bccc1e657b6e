# SPDX-License-Identifier: Apache-2.0
"""What the claim experiments share: data, network, one run, kNN at its end, a table, a plot.

A run is the product's own: `pretrain.engine.loop.fit` on a `Monitored` task, so its log lines and alarms are what a
user would see. Small on purpose: 32-pixel pictures of single stickers, 60 classes, a network of four convolutions, one
core.

kNN: bank = the training pictures, queries = the same things in a drawing style, on photos and in light that no training
picture has; k = 20, temperature .1. (With the same drawings as queries an untrained network is hard to beat: it knows
them by their colours.)
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
for place in (ROOT, ROOT / "benchmarks"):
    if str(place) not in sys.path:
        sys.path.insert(0, str(place))

from _common import machine  # noqa: E402

from pretrain.augment import ViewAugment  # noqa: E402
from pretrain.config_views import InputSpec, ViewConfig  # noqa: E402
from pretrain.data.crops import ViewSource  # noqa: E402
from pretrain.data.pairs import StickerCrops  # noqa: E402
from pretrain.data.stickers import Stickers  # noqa: E402
from pretrain.engine import distributed  # noqa: E402
from pretrain.engine.config import LoopConfig, OptimConfig  # noqa: E402
from pretrain.engine.loop import fit  # noqa: E402
from pretrain.engine.task import Task  # noqa: E402
from pretrain.evaluation.features import features  # noqa: E402
from pretrain.evaluation.knn import accuracy  # noqa: E402
from pretrain.evaluation.knn import knn as knn_scores  # noqa: E402
from pretrain.health import Monitored  # noqa: E402

SIZE, CLASSES, WIDTH = 32, 60, 128
VIEW = ViewConfig(
    size=SIZE, crop_scale=(0.3, 1.0), jitter=(0.3, 0.3, 0.2, 0.03), blur_p=0.0, grey_p=0.0, solarise_p=0.0
)
NORMALISE = InputSpec(SIZE, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class Arrays:
    """Labelled pictures in memory."""

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def image(self, index: int) -> np.ndarray:
        return self.images[index]

    def label(self, index: int) -> int:
        return int(self.labels[index])


def stickers(folder: Path, *, views: int = 10) -> tuple[Arrays, Arrays]:
    """Training pictures and queries, drawn once and kept in `folder`."""
    path = folder / f"stickers_{SIZE}_{CLASSES}_{views}_held_out_style.npz"
    if not path.is_file():
        data = Stickers.load()
        found: dict[str, list[Any]] = {"train": [], "train_y": [], "test": [], "test_y": []}
        for half, photos, count in (("train", "train", views), ("test", "val", 2)):
            for style in data.styles[photos]:
                crops = StickerCrops(data, style=style, size=SIZE, views=count, photos=photos)  # type: ignore[arg-type]
                for i in np.flatnonzero(crops.class_ids % (len(data.nouns) // CLASSES) == 0):
                    label = int(crops.class_ids[i]) // (len(data.nouns) // CLASSES)
                    if label < CLASSES:
                        found[half].append(crops.sample(int(i))[0].transpose(1, 2, 0))
                        found[f"{half}_y"].append(label)
        folder.mkdir(parents=True, exist_ok=True)
        arrays: dict[str, Any] = {name: np.stack(rows) for name, rows in found.items()}
        np.savez(path, **arrays)
    with np.load(path) as file:
        return Arrays(file["train"], file["train_y"]), Arrays(file["test"], file["test_y"])


def network(conv: type[nn.Conv2d] = nn.Conv2d, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> nn.Sequential:
    """(N, 3, S, S) → (N, 128): four 3×3 convolutions, each of them halves the side."""
    layers: list[nn.Module] = []
    for inside, outside in ((3, 32), (32, 64), (64, 128), (128, WIDTH)):
        layers += [conv(inside, outside, 3, stride=2, padding=1, bias=False), norm(outside), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def augment(views: Sequence[ViewConfig]) -> list[Callable[[torch.Tensor], torch.Tensor]]:
    """The colour half of each view."""
    return [ViewAugment(view) for view in views for _ in range(view.count)]


def run(
    make: Callable[[], Task],
    *,
    folder: Path,
    data: tuple[Arrays, Arrays],
    seed: int,
    steps: int,
    batch: int = 128,
    views: Sequence[ViewConfig] = (VIEW, VIEW),
    optim: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Train one task and measure it.

    Returns:
        "knn" at the end and "knn_start", the panel's last values, the loss, the alarms, seconds per step.
    """
    distributed.seed_everything(seed)
    task = make()
    start = knn(task.backbone, data)  # type: ignore[arg-type]
    settings = {"name": "sgd", "lr": 0.1, "weight_decay": 1e-4, "warmup_steps": min(50, steps // 10), **(optim or {})}
    begun = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):  # the run's train.log has it
        report = fit(
            Monitored(task),
            ViewSource(data[0], views, seed),
            loop=LoopConfig(
                steps=steps,
                batch_size=batch,
                seed=seed,
                workers=0,
                threads=1,
                device="cpu",
                log_every=max(1, steps // 30),
                save_every=10**9,
            ),
            optim=OptimConfig(**settings),
            out=folder,
            record={"seed": seed},
            overwrite=True,
        )
    seconds = time.perf_counter() - begun
    events = folder / "events.jsonl"
    lines = [json.loads(line) for line in events.read_text().splitlines()] if events.is_file() else []
    ranks = [json.loads(line)["health/rank"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = {
        "knn": knn(task.backbone, data),  # type: ignore[arg-type]
        "knn_start": start,
        "loss": report.metrics["loss"],
        "highest_rank": max(ranks),
        "alarms": [line["text"].split(" is ")[0] for line in lines if line["event"] == "alarm"],
        "seconds": seconds,
        "seconds_per_step": seconds / steps,
        **{name: value for name, value in report.metrics.items() if name.startswith("health/")},
    }
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return found


def knn(backbone: nn.Module, data: tuple[Arrays, Arrays]) -> float:
    """Accuracy of the weighted vote, k = 20, temperature .1."""
    train, test = data
    with torch.random.fork_rng(devices=[]):
        bank = features(backbone, train, range(len(train)), NORMALISE)
        query = features(backbone, test, range(len(test)), NORMALISE)
    scores = knn_scores(query, bank, torch.from_numpy(train.labels), classes=CLASSES, k=20, temperature=0.1)
    return accuracy(scores, torch.from_numpy(test.labels))


def flags(doc: str | None) -> argparse.ArgumentParser:
    """The options of every claim."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="instead of the experiment's own number; for a quick look")
    parser.add_argument("--only", nargs="+", help="cases to run, by name")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "claims", help="folder for runs, JSON and plots")
    return parser


def experiment(
    name: str,
    doc: str | None,
    cases: Mapping[str, Callable[[int | None], dict[str, Any]]],
    *,
    plot: Callable[[Any, dict[str, list[dict[str, Any]]]], None],
    argv: Sequence[str] | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """Run every case with every seed; write JSON after each run (a stopped experiment goes on), then the plot.

    Args:
        name: Of the files.
        doc: The claim, for `--help`.
        cases: Name → function of the number of steps (None: its own) that returns `run`'s arguments.
        plot: Draws the results onto matplotlib axes.
        argv: Command line; None: the process's.
    """
    options = flags(doc).parse_args(argv)
    folder: Path = options.out
    path = folder / f"{name}.json"
    results: dict[str, list[dict[str, Any]]] = {}
    if path.is_file():
        results = json.loads(path.read_text())["results"]
    data = stickers(folder)
    for seed in options.seeds:
        for case, arguments in cases.items():
            if options.only and case not in options.only:
                continue
            given = arguments(options.steps)
            done = results.setdefault(case, [])
            if any(r["seed"] == seed and r["steps"] == given["steps"] for r in done):
                continue
            found = run(folder=folder / "runs" / name / f"{case}_{seed}", data=data, seed=seed, **given)
            results[case] = [r for r in done if r["seed"] != seed]
            results[case].append({"seed": seed, "steps": given["steps"], "batch": given.get("batch", 128), **found})
            content = {"experiment": name, "machine": machine(), "results": results}
            path.write_text(json.dumps(content, indent=1) + "\n")
            print(
                f"{name}: {case}, seed {seed}: kNN {found['knn']:.3f} (from {found['knn_start']:.3f}), rank "
                f"{found['health/rank']:.1f}, spread {found['health/spread']:.2f}, {found['seconds']:.0f} s, alarms: "
                f"{', '.join(found['alarms']) or 'none'}",
                flush=True,
            )
    draw(folder / f"{name}.svg", results, plot)
    return results


def draw(path: Path, results: Any, plot: Callable[[Any, Any], None]) -> None:
    """An SVG of what ``plot(axes, results)`` draws."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "claims"  # the same numbers make the same file
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.6), constrained_layout=True)
    plot(axes, results)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def mean_and_spread(rows: Sequence[Mapping[str, Any]], key: str = "knn") -> tuple[float, float]:
    """Mean and standard deviation over seeds."""
    values = [float(row[key]) for row in rows]
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def bars(axes: Any, results: Mapping[str, Sequence[Mapping[str, Any]]], key: str = "knn") -> None:
    """One bar per case with the spread over seeds, a dot per seed, and a line for the untrained network."""
    for place, rows in enumerate(results.values()):
        mean, spread = mean_and_spread(rows, key)
        axes.bar(place, mean, yerr=spread, color="#7aa6c2", capsize=3)
        axes.plot([place] * len(rows), [row[key] for row in rows], "k.", markersize=4)
    axes.set_xticks(range(len(results)), [name.replace("_", "\n") for name in results], fontsize=8)
    axes.set_ylabel({"knn": "kNN accuracy"}.get(key, key))
    if key == "knn":
        start = float(np.mean([row["knn_start"] for rows in results.values() for row in rows]))
        axes.axhline(start, color="grey", linestyle=":", label="untrained network")
        axes.legend(fontsize=8)


def lines(axes: Any, results: Mapping[str, Sequence[Mapping[str, Any]]], x: str) -> None:
    """Cases named METHOD_NUMBER: one line per method over the number, spread over seeds as error bars."""
    methods = dict.fromkeys(case.rpartition("_")[0] for case in results)
    for method in methods:
        points = sorted(
            (int(case.rpartition("_")[2]), *mean_and_spread(rows))
            for case, rows in results.items()
            if case.rpartition("_")[0] == method
        )
        axes.errorbar(
            *zip(*[p[:2] for p in points], strict=True), yerr=[p[2] for p in points], marker="o", label=method
        )
    axes.set_xscale("log", base=2)
    axes.set_xlabel(x)
    axes.set_ylabel("kNN accuracy")
    axes.legend(fontsize=8)
