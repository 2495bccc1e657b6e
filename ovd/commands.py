# SPDX-License-Identifier: Apache-2.0
"""The commands of ``wordbox``: a table, and what a name in it stands for. Imports none of them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
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
        Command(name="demo", module="ovd.demo.command", does="the web page"),
        Command(name="predict", module="ovd.predict", does="detect objects in pictures, folders and videos"),
        Command(name="label", module="ovd.label", does="label a folder of pictures as a data set"),
        Command(name="serve", module="ovd.serve", does="machine-learning backend for Label Studio"),
    ),
    "train and measure": (
        Command(name="train", module="ovd.train", does="train a detector", config="ovd.config_detr:TRAIN_CONFIGS"),
        Command(
            name="embed",
            module="ovd.embed",
            does="compute proposals and their embeddings, for ViLD",
            config="ovd.embed:EmbedConfig",
        ),
        Command(name="evaluate", module="ovd.evaluate", does="AP and recall, of a detector or of a results file"),
        Command(name="calibrate", module="ovd.calibrate", does="calibrate a detector's scores and threshold"),
        Command(
            name="pretrain",
            module="pretrain.train",
            does="train a backbone without labels, or CLIP",
            config="pretrain.config:PretrainConfig",
        ),
        Command(name="probe", module="pretrain.probe", does="evaluate a backbone's frozen features"),
    ),
    "files": (
        Command(name="export", module="ovd.export", does="export a detector to ONNX Runtime"),
        Command(name="convert", module="ovd.convert", does="convert labels to another format"),
        Command(name="weights", module="ovd.weights", does="list, verify and add weights"),
        Command(name="doctor", module="ovd.doctor", does="check the installation"),
        Command(name="completion", module="ovd.completion", does="shell completion for bash, zsh or fish"),
    ),
}
COMMANDS = {command.name: command for commands in GROUPS.values() for command in commands}
