# SPDX-License-Identifier: Apache-2.0
"""A detection transformer as a task of the training loop."""

from __future__ import annotations

from ovd.modeling.detr.network import Detr
from ovd.modeling.task import DetectionTask


class DetrTask(DetectionTask):
    """Sums the transformer's losses; its backbone and region tower, which start pretrained, learn at another rate.

    Args:
        model: the transformer. A frozen backbone is not in the checkpoints: it is loaded when the model is built.
        pretrained_lr_scale: learning-rate factor of what started pretrained.
    """

    check_samples = 2  # pictures of two sizes, padded
    find_unused_parameters = True  # the condition encoder, for one, has no gradient without conditions

    def __init__(self, *, model: Detr, pretrained_lr_scale: float) -> None:
        super().__init__(
            model=model, pretrained_prefixes=("backbone.", "region_tower."), pretrained_lr_scale=pretrained_lr_scale
        )
        self.untracked = ("model.backbone.",) if model.frozen else ()

    @property
    def detr(self) -> Detr:
        """The transformer."""
        assert isinstance(self.model, Detr)
        return self.model
