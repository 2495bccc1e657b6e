# SPDX-License-Identifier: Apache-2.0
"""The table of ``wordbox``'s commands. Imports none of them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        name: as typed.
        module: whose ``main`` it is.
        does: one line for the help.
        config: ``module:NAME`` of its configuration; empty where it takes flags, which its module's ``parser`` has.
    """

    name: str
    module: str
    does: str
    config: str = ""


GROUPS: dict[str, tuple[Command, ...]] = {
    "detect": (
        Command("demo", "ovd.demo.command", "the web page"),
        Command("predict", "ovd.predict", "detect objects in pictures, folders and videos"),
        Command("label", "ovd.label", "label a folder of pictures as a data set"),
        Command("serve", "ovd.serve", "machine-learning backend for Label Studio"),
    ),
    "train and measure": (
        Command("train", "ovd.train", "train a detector", config="ovd.config_detr:TRAIN_CONFIGS"),
        Command(
            "embed", "ovd.embed", "compute proposals and their embeddings, for ViLD", config="ovd.embed:EmbedConfig"
        ),
        Command("evaluate", "ovd.evaluate", "AP and recall, of a detector or of a results file"),
        Command("calibrate", "ovd.calibrate", "calibrate a detector's scores and threshold"),
        Command(
            "pretrain",
            "pretrain.train",
            "train a backbone without labels, or CLIP",
            config="pretrain.config:PretrainConfig",
        ),
        Command("probe", "pretrain.probe", "evaluate a backbone's frozen features"),
    ),
    "files": (
        Command("export", "ovd.export", "export a detector to ONNX Runtime"),
        Command("convert", "ovd.convert", "convert labels to another format"),
        Command("weights", "ovd.weights", "list, verify and add weights"),
        Command("doctor", "ovd.doctor", "check the installation"),
        Command("completion", "ovd.completion", "shell completion for bash, zsh or fish"),
    ),
}
COMMANDS = {command.name: command for commands in GROUPS.values() for command in commands}
ELSEWHERE = {"annotate": "label", "detect": "predict", "eval": "evaluate", "infer": "predict", "track": "predict",
             "val": "evaluate"}  # fmt: skip
"""Commands of other detectors' tools → the one that does the same."""
