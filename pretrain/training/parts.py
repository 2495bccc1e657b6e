# SPDX-License-Identifier: Apache-2.0
"""Parts of a pretraining, whatever the method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pretrain.engine.config import LoopConfig, OptimConfig
from pretrain.engine.errors import UserError
from pretrain.engine.sampling import Source
from pretrain.engine.task import Task


@dataclass(frozen=True, kw_only=True)
class PretrainingParts:
    """What the training loop takes, and what is exported afterwards.

    Attributes:
        task: the method, with its monitor where it has one.
        source: the samples.
        optim: the optimiser, with the method's learning-rate rule applied.
        save: writes the trained network into a folder; returns what it is, for the last line of the command.
    """

    task: Task
    source: Source
    optim: OptimConfig
    save: Callable[[Path], str]


def require_distinct(loop: LoopConfig, source: Source) -> None:
    """Refuse a pass that is larger than the data set and would hold a picture twice.

    Raises:
        UserError: there are more samples to compare with each other than pictures.
    """
    if len(source) < loop.batch_size // loop.accumulate:
        raise UserError(
            f"loop.batch_size: {loop.batch_size} is more than the {len(source)} pictures of data, so that a picture "
            "would be its own negative; take a smaller batch, or more pictures"
        )
