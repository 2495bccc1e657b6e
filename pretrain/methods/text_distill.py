# SPDX-License-Identifier: Apache-2.0
"""Text distillation: a small text tower learns a sentence encoder's embeddings of words and phrases.

The image data has a few hundred nouns, but users type any. So the text tower is distilled on all nouns of WordNet from
a sentence encoder, which was trained on far more text, and then frozen (as in LiT, arXiv:2111.07991, with the roles of
the towers exchanged). So "puppy" is near "dog" for pictures, too.

Particular to it: the loss compares each embedding (1 - cosine) and the similarities within a batch.
"""

from __future__ import annotations

from torch import Tensor

from pretrain.data.targets import PhraseBatch
from pretrain.engine.task import Task
from pretrain.losses import embedding_distillation
from pretrain.nets.towers import JointEncoder


class TextDistill(Task):
    """One step: phrases in, distance to the teacher out.

    Args:
        encoder: its text tower is trained; its embedding must be as long as the teacher's.
        similarity_weight: see `embedding_distillation`.
        similarity_temperature: likewise.
    """

    untracked = ("encoder.logit_scale",)

    def __init__(
        self, *, encoder: JointEncoder, similarity_weight: float = 1.0, similarity_temperature: float = 0.05
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.encoder.logit_scale.requires_grad_(False)  # there are no logits here
        self.similarity_weight = similarity_weight
        self.similarity_temperature = similarity_temperature

    def forward(self, batch: PhraseBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of one batch of phrases."""
        loss, cosine = embedding_distillation(
            self.encoder.encode_text(batch.tokens),
            batch.embeddings,
            similarity_weight=self.similarity_weight,
            temperature=self.similarity_temperature,
        )
        return loss, {"cosine": cosine}
