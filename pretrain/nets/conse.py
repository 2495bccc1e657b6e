# SPDX-License-Identifier: Apache-2.0
"""Zero-shot words out of an ImageNet classifier: ConSE (Norouzi et al., arXiv:1312.5650).

A picture's embedding is the mean of the classes' words, weighted by their probabilities.

Shapes: `N` pictures, `V` words, `K` classes of ImageNet, `F` pooled features, `D` joint embedding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import skip_init

from pretrain.config_photos import ConseShare
from pretrain.data.lexicon import Lexicon

if TYPE_CHECKING:
    from pretrain.nets.towers import JointEncoder

PROMPT = "a photo of a {}"


@torch.no_grad()
def embed_words(encoder: JointEncoder, words: list[str]) -> Tensor:
    """(V, D) unit rows, of the words in a prompt."""
    tokens = encoder.tokenize([PROMPT.format(word) for word in words])
    return F.normalize(encoder.encode_text(tokens.to(encoder.logit_scale.device)).float(), dim=1)


def conse_targets(lexicon: Lexicon, encoder: JointEncoder, *, levels: int, decay: float) -> Tensor:
    """(K, D) unit rows: the word of each class of ImageNet plus those above it, each level with `decay` of the last."""
    rows = [[key, *lexicon.above(key)[:levels]] for key in lexicon.imagenet]
    keys = sorted({key for row in rows for key in row})
    number = {key: i for i, key in enumerate(keys)}
    word_VD = embed_words(encoder, [lexicon.meanings[key].names[0] for key in keys])
    weight_KV = torch.zeros(len(rows), len(keys), device=word_VD.device)
    for k, row in enumerate(rows):
        for level, key in enumerate(row):
            weight_KV[k, number[key]] += decay**level
    return F.normalize(weight_KV @ word_VD, dim=1)


class ConseProjection(nn.Module):
    """A trained projection, ensembled with what ImageNet's classifier says of the same features.

    The projection prefers the words that it was trained on. ConSE (arXiv:1312.5650) knows words by the classes of
    ImageNet that are near them: the mean of the classes' words, weighted by their probabilities. The embedding is
    ``(1 - share) · unit(learned) + share · unit(ConSE)``; nothing but the projection is trained.

    Args:
        learned: the projection, `F` to `D`.
        conse: share, and number of classes.
    """

    words_KD: Tensor

    def __init__(self, learned: nn.Linear, *, conse: ConseShare) -> None:
        super().__init__()
        self.learned = learned
        # Without a draw of random numbers: what is trained starts as it does without ConSE.
        self.classifier = skip_init(nn.Linear, learned.in_features, conse.classes).requires_grad_(False)
        nn.init.zeros_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)
        self.register_buffer("words_KD", torch.zeros(conse.classes, learned.out_features))
        self.share, self.top = conse.share, conse.top

    def forward(self, features_NF: Tensor) -> Tensor:
        # Probabilities need more digits than bfloat16 has.
        with torch.autocast(features_NF.device.type, enabled=False):
            features_NF = features_NF.float()
            conse_ND = conse_embedding(self.classifier(features_NF), self.words_KD, top=self.top)
            return torch.lerp(F.normalize(self.learned(features_NF), dim=1), conse_ND, self.share)


def conse_embedding(logits_NK: Tensor, words_KD: Tensor, *, top: int) -> Tensor:
    """(N, D) unit rows: the words of the `top` most probable classes, weighted by their probabilities (ConSE)."""
    value, index = logits_NK.float().softmax(1).topk(min(top, logits_NK.shape[1]), dim=1)
    return F.normalize((value[..., None] * words_KD[index]).sum(1), dim=1)
