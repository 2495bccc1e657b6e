# SPDX-License-Identifier: Apache-2.0
"""open_clip's text tower without the padding: the same embeddings in a part of the time.

A prompt has some ten tokens, but CLIP's tower reads 77. With causal attention and the embedding taken at the end token,
padding after it changes nothing, yet open_clip computes it.

Shapes: `N` texts, `T` tokens, `D` joint embedding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor, nn

from pretrain.nets.towers import JointEncoder

if TYPE_CHECKING:
    from open_clip.transformer import TextTransformer


class ShortTextEncoder(JointEncoder):
    """A joint encoder of open_clip's towers that leaves padding out where that changes nothing."""

    def encode_text(self, tokens: Tensor) -> Tensor:
        """See `JointEncoder.encode_text`."""
        if self.text is None or torch.is_grad_enabled() or not padding_is_idle(self.text) or not len(tokens):
            return super().encode_text(tokens)
        return encode_without_padding(self.text, tokens)


def padding_is_idle(tower: nn.Module) -> TypeGuard[TextTransformer]:
    """Whether a text tower is causal and read off at the end of the text, as CLIP's is and SigLIP's is not."""
    from open_clip.transformer import TextTransformer  # slow, and imported already where such a tower was built

    return (
        isinstance(tower, TextTransformer)
        and tower.pool_type == "argmax"
        and tower.attn_mask is not None
        and tower.cls_emb is None
        and not tower.use_pad_mask
        and not tower.output_tokens
    )


def encode_without_padding(tower: TextTransformer, tokens: Tensor) -> Tensor:
    """(N, T) tokens of a tower with `padding_is_idle` -> (N, D); the end of the text is its largest token."""
    end = tokens.argmax(dim=1)
    length = int(end.max()) + 1
    mask = tower.attn_mask[:length, :length]
    x = tower.token_embedding(tokens[:, :length]) + tower.positional_embedding[:length]
    x = tower.ln_final(tower.transformer(x, attn_mask=mask))
    pooled = x[torch.arange(len(x), device=x.device), end.to(x.device)]
    projection = tower.text_projection
    if projection is None:
        return pooled
    return projection(pooled) if isinstance(projection, nn.Linear) else pooled @ projection
