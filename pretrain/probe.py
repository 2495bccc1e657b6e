# SPDX-License-Identifier: Apache-2.0
"""`python -m pretrain.probe --run DIR | --backbone FOLDER --data DATA`: how good are frozen features?

Three measures, all on the *online* backbone in eval mode: a weighted k-nearest-neighbour vote, a linear classifier
trained by the paper's protocol, and a classifier from a few labels per class. `torchrun` shares the work among
processes; the figures do not depend on their number.

Shapes: `N` queries, `M` bank, `D` features, `C` classes.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from pretrain.config_views import InputSpec
from pretrain.data.images import ImageSet
from pretrain.engine import distributed
from pretrain.engine.errors import UserError, run_cli
from pretrain.engine.files import EXPORTED, read_json, write_atomically
from pretrain.evaluation.data import Subset, open_data
from pretrain.evaluation.features import features, labels
from pretrain.evaluation.knn import accuracy, knn
from pretrain.evaluation.linear import LARGE, PROTOCOL_OF, PROTOCOLS, SMALL, few_labels, linear_classifier
from pretrain.nets.backbones import build_backbone, load_backbone, problem_with


class Origin(NamedTuple):
    """Where a backbone comes from: its method, what it expects, and the step of its checkpoint (None: exported)."""

    method: str
    inputs: InputSpec
    step: int | None = None


def open_backbone(run: Path | None, folder: Path | None) -> tuple[nn.Module, Origin]:
    """The online backbone of a run (exported, or of its newest checkpoint), or an exported one.

    Returns:
        It, and where it comes from.

    Raises:
        UserError: There is none.
    """
    if folder is not None:
        return _exported(folder)
    if run is None:
        raise ValueError("a run or a folder is needed")
    if (run / EXPORTED).is_dir():
        return _exported(run / EXPORTED)
    from pretrain.config import ClipMethod, PretrainConfig, TextDistillMethod
    from pretrain.engine.checkpoint import load_model, load_state, newest
    from pretrain.engine.config import load_config

    latest = newest(run / "checkpoints", warn=lambda text: print(f"warning: {text}", file=sys.stderr))
    if latest is None:
        raise UserError(f"{run}: no exported backbone and no checkpoint; give the folder of a run (its out=)")
    method = load_config(PretrainConfig, run / "config.yaml").method
    if isinstance(method, ClipMethod | TextDistillMethod):
        raise UserError(f"{run}: an unfinished run of {method.name}; it can be probed when it has an exported/ folder")
    state, prefix = load_state(latest)[0], "task.backbone."
    backbone = build_backbone(method.backbone, sizes=[view.size for view in method.views])
    backbone_state = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    load_model(backbone, backbone_state, untracked=(), where=latest.folder)
    return backbone, Origin(method.name, method.inputs(), latest.step)


def _exported(folder: Path) -> tuple[nn.Module, Origin]:
    """A backbone folder, or the image tower of an encoder folder: a ResNet without the projection into words' space."""
    from pretrain.nets.encoders import load_encoder
    from pretrain.nets.towers import FORMAT, image_features

    config = read_json(folder / "config.json", hint="give the folder of a run (its out=), or its exported/")
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        backbone, info = load_backbone(folder)
        return backbone, Origin(str(info["method"]), InputSpec(info["size"], info["mean"], info["std"]))
    encoder = load_encoder(folder)
    tower = image_features(encoder)
    return tower.eval(), Origin("clip", InputSpec(encoder.image_size, encoder.image_mean, encoder.image_std))


def evaluate(
    backbone: nn.Module,
    train: ImageSet,
    test: ImageSet,
    inputs: InputSpec,
    *,
    measures: Sequence[str],
    k: int,
    temperature: float,
    recipe: str,
    epochs: int | None,
    shots: Sequence[int],
    seed: int,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """The chosen measures as one report."""
    x_test = features(backbone, test, range(len(test)), inputs)
    y_test, y_train = labels(test, range(len(test))), labels(train, range(len(train)))
    classes = int(max(y_train.max(), y_test.max())) + 1
    report: dict[str, Any] = {"train": len(train), "test": len(test), "classes": classes, "width": x_test.shape[1]}
    x_train = features(backbone, train, range(len(train)), inputs) if {"knn", "few"} & set(measures) else None
    if x_train is not None and "knn" in measures:
        scores = knn(x_test, x_train, y_train, classes=classes, k=k, temperature=temperature)
        report["knn"] = {"top1": accuracy(scores, y_test), "k": min(k, len(train)), "temperature": temperature}
    for name in ("linear", "linear_cached"):
        if name in measures:
            begun = time.perf_counter()
            head = linear_classifier(
                backbone, train, inputs, classes=classes, protocol=PROTOCOLS[recipe], epochs=epochs,
                augment=name == "linear", seed=seed, say=say,
            )  # fmt: skip
            with torch.no_grad():
                top1 = accuracy(head(x_test), y_test)
            report[name] = {
                "top1": top1, "protocol": recipe, "epochs": epochs or PROTOCOLS[recipe].epochs,
                "seconds": time.perf_counter() - begun,
            }  # fmt: skip
    if x_train is not None and "few" in measures:
        report["few"] = []
        for count in shots:
            accuracies = [
                accuracy(few_labels(x_train, y_train, x_test, classes=classes, shots=count, seed=seed + i), y_test)
                for i in range(5)
            ]
            mean, std = float(np.mean(accuracies)), float(np.std(accuracies))
            report["few"].append({"shots": count, "top1": mean, "std": std, "draws": len(accuracies)})
    return report


def main(argv: list[str]) -> int:
    """Probe one backbone and print, or write, one JSON report."""
    parser = argparse.ArgumentParser(
        prog="python -m pretrain.probe", description="How good are a backbone's frozen features?"
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--run", type=Path, help="folder of a run of pretrain.train")
    which.add_argument("--backbone", type=Path, help="backbone folder (a run's exported/), or an encoder folder (CLIP)")
    parser.add_argument(
        "--data", default="sticker_singles", help="sticker_singles, cifar:ROOT, or a folder with train/ and val/"
    )
    parser.add_argument(
        "--measures",
        nargs="+",
        choices=["knn", "linear", "linear_cached", "few"],
        default=["knn", "linear_cached"],
        help="linear: fresh crops every epoch, as in the papers; linear_cached: features computed once",
    )
    parser.add_argument("--k", type=int, default=200, help="neighbours (default 200)")
    parser.add_argument("--temperature", type=float, default=0.1, help="of the neighbours' vote (default .1)")
    parser.add_argument(
        "--protocol",
        choices=sorted(PROTOCOLS),
        help=f"linear protocol; default: the method's, {SMALL} below {LARGE:,} pictures",
    )
    parser.add_argument("--epochs", type=int, help="of the linear classifier, instead of the protocol's")
    parser.add_argument("--shots", type=int, nargs="+", default=[1, 5], help="labels per class (default 1 5)")
    parser.add_argument("--size", type=int, help="side of a picture; default: what it was trained on")
    parser.add_argument("--limit", type=int, help="at most that many training and test pictures each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, help="write the report here as JSON")
    args = parser.parse_args(argv)
    for name in ("k", "epochs", "size", "limit", "threads"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name} must be at least 1")
    if args.temperature <= 0 or min(args.shots) < 1:
        raise UserError("--temperature and --shots must be above 0")
    if args.threads:
        torch.set_num_threads(args.threads)
    joined = distributed.setup()
    try:
        backbone, origin = open_backbone(args.run, args.backbone)
        backbone = backbone.to(distributed.pick_device(args.device))
        train, test, side = open_data(args.data, size=args.size or origin.inputs.size)
        reason = problem_with(backbone, side)
        if reason is not None:
            raise UserError(
                f"--size {side}: the backbone of {args.run or args.backbone} cannot take such pictures ({reason}); it "
                f"was trained on {origin.inputs.size} pixels"
            )
        if args.limit:
            train, test = Subset(train, args.limit, args.seed), Subset(test, args.limit, args.seed)
        recipe = args.protocol or (PROTOCOL_OF.get(origin.method, SMALL) if len(train) >= LARGE else SMALL)
        report = {
            "backbone": str(args.run or args.backbone),
            "method": origin.method,
            "step": origin.step,
            "data": args.data,
            "size": side,
            **evaluate(
                backbone, train, test, origin.inputs._replace(size=side), measures=args.measures, k=args.k,
                temperature=args.temperature, recipe=recipe, epochs=args.epochs, shots=args.shots, seed=args.seed,
                say=lambda text: print(text, file=sys.stderr),
            ),
        }  # fmt: skip
    finally:
        if joined:
            distributed.teardown()
    if distributed.is_main():
        text = json.dumps(report, indent=2)
        print(text)
        if args.out:
            write_atomically(args.out, (text + "\n").encode())
    return 0


if __name__ == "__main__":
    run_cli(main)
