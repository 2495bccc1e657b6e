# SPDX-License-Identifier: Apache-2.0
"""open_clip's text tower without the padding: the same embeddings in a part of the time.

A prompt has some ten tokens, CLIP's tower reads 77. Where a token sees only those before it and the text is read off at
its end, what follows the end changes nothing. open_clip computes it all the same.

Shapes: `N` texts, `T` tokens, `D` joint embedding.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pretrain.nets.towers import JointEncoder


class ShortTextEncoder(JointEncoder):
    """A joint encoder of open_clip's towers that leaves padding out where that changes nothing."""

    def encode_text(self, tokens: Tensor) -> Tensor:
        """See `JointEncoder.encode_text`."""
        if self.text is None or torch.is_grad_enabled() or not padding_is_idle(self.text) or not len(tokens):
            return super().encode_text(tokens)
        return encode_without_padding(self.text, tokens)


def padding_is_idle(tower: nn.Module) -> bool:
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


def encode_without_padding(tower: nn.Module, tokens: Tensor) -> Tensor:
    """(N, T) tokens of a tower with `padding_is_idle` -> (N, D); the end of the text is its largest token."""
    parts = dict(tower.named_children()) | dict(tower.named_parameters(recurse=False))
    end = tokens.argmax(dim=1)
    length = int(end.max()) + 1
    mask = dict(tower.named_buffers(recurse=False))["attn_mask"][:length, :length]
    x = parts["token_embedding"](tokens[:, :length]) + parts["positional_embedding"][:length]
    x = parts["ln_final"](parts["transformer"](x, attn_mask=mask))
    pooled = x[torch.arange(len(x), device=x.device), end.to(x.device)]
    projection = parts.get("text_projection")
    if projection is None:
        return pooled
    return projection(pooled) if isinstance(projection, nn.Linear) else pooled @ projection
