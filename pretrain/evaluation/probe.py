# SPDX-License-Identifier: Apache-2.0
"""A backbone and where it comes from, and the measures of its frozen features as one report.

Shapes: `N` queries, `M` bank, `D` features, `C` classes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from pretrain.config_views import InputSpec
from pretrain.data.images import ImageSet
from pretrain.engine.errors import UserError, warn
from pretrain.engine.files import EXPORTED, read_json
from pretrain.evaluation.features import features, labels
from pretrain.evaluation.knn import accuracy, knn
from pretrain.evaluation.linear import PROTOCOLS, SMALL, few_labels, linear_classifier
from pretrain.nets.backbones import build_backbone, load_backbone

DRAWS = 5  # of the labels of "few"


class BackboneOrigin(NamedTuple):
    """Where a backbone comes from: its method, what it expects, and the step of its checkpoint (None: exported)."""

    method: str
    inputs: InputSpec
    step: int | None = None


def open_backbone(run: Path | None, folder: Path | None) -> tuple[nn.Module, BackboneOrigin]:
    """The online backbone of a run (exported, or of its newest checkpoint), or an exported one.

    Returns:
        it, and where it comes from.

    Raises:
        UserError: there is none.
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

    latest = newest(run / "checkpoints", warn=warn)
    if latest is None:
        raise UserError(f"{run}: no exported backbone and no checkpoint; give the folder of a run (its out=)")
    method = load_config(PretrainConfig, run / "config.yaml").method
    if isinstance(method, ClipMethod | TextDistillMethod):
        raise UserError(f"{run}: an unfinished run of {method.name}; it can be probed when it has an exported/ folder")
    state, prefix = load_state(latest)[0], "task.backbone."
    backbone = build_backbone(method.backbone, sizes=[view.size for view in method.views])
    backbone_state = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    load_model(backbone, backbone_state, untracked=(), where=latest.folder)
    return backbone, BackboneOrigin(method.name, method.inputs(), latest.step)


def _exported(folder: Path) -> tuple[nn.Module, BackboneOrigin]:
    """A backbone folder, or the image tower of an encoder folder: a ResNet without the projection into words' space."""
    from pretrain.nets.encoders import load_encoder
    from pretrain.nets.towers import FORMAT, image_features

    config = read_json(folder / "config.json", hint="give the folder of a run (its out=), or its exported/")
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        backbone, info = load_backbone(folder)
        return backbone, BackboneOrigin(str(info["method"]), InputSpec(info["size"], info["mean"], info["std"]))
    encoder = load_encoder(folder)
    tower = image_features(encoder)
    return tower.eval(), BackboneOrigin("clip", InputSpec(encoder.image_size, encoder.image_mean, encoder.image_std))


@dataclass(frozen=True, kw_only=True)
class ProbeOptions:
    """What is measured, and how.

    Attributes:
        measures: "knn", "linear", "linear_cached", "few".
        k, temperature: of kNN.
        protocol: of the linear layer, a key of `PROTOCOLS`.
        epochs: of the linear layer; None: the protocol's.
        shots: labels per class of "few", one measure for each number.
        seed: of the linear layer and of the labels drawn.
    """

    measures: Sequence[str]
    k: int = 200
    temperature: float = 0.1
    protocol: str = SMALL
    epochs: int | None = None
    shots: Sequence[int] = (1, 5)
    seed: int = 0


def evaluate(
    backbone: nn.Module,
    train: ImageSet,
    test: ImageSet,
    inputs: InputSpec,
    options: ProbeOptions,
    *,
    log: Callable[[str], None],
) -> dict[str, object]:
    """The chosen measures as one report.

    Raises:
        UserError: the training pictures are of one class.
    """
    x_test = features(backbone, test, range(len(test)), inputs)
    y_test, y_train = labels(test, range(len(test))), labels(train, range(len(train)))
    classes = int(max(y_train.max(), y_test.max())) + 1
    counts = torch.bincount(y_train, minlength=classes)
    if int((counts > 0).sum()) < 2:
        raise UserError(
            f"the {len(train)} training pictures are of one class; a probe needs two classes at least, and a larger "
            "--limit if you set one"
        )
    measures, shots = options.measures, options.shots
    if "few" in measures and (least := int(counts.min())) < max(shots):
        log(f"warning: --shots {max(shots)}: a class has {least} training pictures only, and learns from these")
    report: dict[str, object] = {"train": len(train), "test": len(test), "classes": classes, "width": x_test.shape[1]}
    x_train = features(backbone, train, range(len(train)), inputs) if {"knn", "few"} & set(measures) else None
    if x_train is not None and "knn" in measures:
        scores = knn(x_test, x_train, y_train, classes=classes, k=options.k, temperature=options.temperature)
        top1 = accuracy(scores, y_test)
        report["knn"] = {"top1": top1, "k": min(options.k, len(train)), "temperature": options.temperature}
    for name in ("linear", "linear_cached"):
        if name in measures:
            begun = time.perf_counter()
            head = linear_classifier(
                backbone,
                train,
                inputs,
                classes=classes,
                protocol=PROTOCOLS[options.protocol],
                epochs=options.epochs,
                augment=name == "linear",
                seed=options.seed,
                log=log,
            )
            with torch.no_grad():
                top1 = accuracy(head(x_test), y_test)
            epochs = options.epochs or PROTOCOLS[options.protocol].epochs
            seconds = time.perf_counter() - begun
            report[name] = {"top1": top1, "protocol": options.protocol, "epochs": epochs, "seconds": seconds}
    if x_train is not None and "few" in measures:
        report["few"] = [
            few_shot_accuracy(x_train, y_train, x_test, y_test, classes=classes, shots=count, seed=options.seed)
            for count in shots
        ]
    return report


def few_shot_accuracy(
    x_train: Tensor, y_train: Tensor, x_test: Tensor, y_test: Tensor, *, classes: int, shots: int, seed: int
) -> dict[str, float]:
    """Mean and spread of logistic regression from ``shots`` labels per class, over `DRAWS` draws of them."""
    accuracies = [
        accuracy(few_labels(x_train, y_train, x_test, classes=classes, shots=shots, seed=seed + i), y_test)
        for i in range(DRAWS)
    ]
    return {"shots": shots, "top1": float(np.mean(accuracies)), "std": float(np.std(accuracies)), "draws": DRAWS}
