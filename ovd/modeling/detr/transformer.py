# SPDX-License-Identifier: Apache-2.0
"""Encoder and decoders of detection transformers, pure torch.

`PlainDecoderLayer` is DETR's (arXiv 2005.12872); names of parameters are those of its released checkpoints.
`ConditionalDecoderLayer` is Conditional DETR's (arXiv 2108.06152): content and position are kept apart in the
cross-attention, and a query's position is the sine embedding of its own anchor, scaled by the query's state.

Shapes: ``N`` images, ``S`` tokens of a feature map, ``Q`` queries, ``d`` width, ``L`` layers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ovd.modeling.detr.position_embedding import CONDITIONAL_TEMPERATURE, sine_position_embedding

INITIAL_SIDE = 0.25  # of the anchors before training; there the position embedding is scaled by one
CONTENT_GAIN = 2.5  # of query and key content: look-alike tokens stand out before training, by about 3 in logits
POSITION_GAINS = (1.0, 5.0)  # of the first layer, of the others; see position_embedding.CONDITIONAL_TEMPERATURE


class MLP(nn.Module):
    """Linear layers with ReLU between them; names as in DETR (``layers.0`` …)."""

    def __init__(self, *dims: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(dims))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)

    @property
    def last(self) -> nn.Linear:
        """The output layer."""
        return cast(nn.Linear, self.layers[-1])


class _Layer(nn.Module):
    """The self-attention and feed-forward parts of all layers: x + part(norm(x)), or norm(x + part(x))."""

    def __init__(self, *, width: int, heads: int, ffn: int, dropout: float, pre_norm: bool) -> None:
        super().__init__()
        self.pre_norm, self.drop = pre_norm, nn.Dropout(dropout)
        self.self_attn = nn.MultiheadAttention(width, heads, dropout=dropout, batch_first=True)
        self.linear1, self.linear2 = nn.Linear(width, ffn), nn.Linear(ffn, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def before(self, x: Tensor, norm: nn.Module) -> Tensor:
        return norm(x) if self.pre_norm else x

    def after(self, x: Tensor, change: Tensor, norm: nn.Module) -> Tensor:
        x = x + self.drop(change)
        return x if self.pre_norm else norm(x)

    def attend(
        self, x: Tensor, pos_embed: Tensor, *, mask: Tensor | None = None, padding: Tensor | None = None
    ) -> Tensor:
        """Self-attention; position embeddings are added to q and k."""
        y = self.before(x, self.norm1)
        q = y + pos_embed
        y = self.self_attn(q, q, y, attn_mask=mask, key_padding_mask=padding, need_weights=False)[0]
        return self.after(x, y, self.norm1)

    def feed_forward(self, x: Tensor, norm: nn.Module) -> Tensor:
        """Each token or query for itself."""
        return self.after(x, self.linear2(self.drop(F.relu(self.linear1(self.before(x, norm))))), norm)


class EncoderLayer(_Layer):
    """Self-attention among tokens, then a feed-forward layer."""

    def forward(self, x: Tensor, *, pos_embed: Tensor, padding: Tensor | None) -> Tensor:
        return self.feed_forward(self.attend(x, pos_embed, padding=padding), self.norm2)


class PlainDecoderLayer(_Layer):
    """DETR's: self-attention, cross-attention, feed-forward; position embeddings are added to q and k."""

    def __init__(self, *, width: int, heads: int, ffn: int, dropout: float, pre_norm: bool) -> None:
        super().__init__(width=width, heads=heads, ffn=ffn, dropout=dropout, pre_norm=pre_norm)
        self.norm3 = nn.LayerNorm(width)
        self.multihead_attn = nn.MultiheadAttention(width, heads, dropout=dropout, batch_first=True)

    def forward(
        self,
        x: Tensor,
        memory: Tensor,
        *,
        query_pos: Tensor,
        pos_embed: Tensor,
        mask: Tensor | None,
        padding: Tensor | None,
    ) -> Tensor:
        x = self.attend(x, query_pos, mask=mask)
        q = self.before(x, self.norm2) + query_pos
        y = self.multihead_attn(q, memory + pos_embed, memory, key_padding_mask=padding, need_weights=False)[0]
        return self.feed_forward(self.after(x, y, self.norm2), self.norm3)


class ConditionalDecoderLayer(_Layer):
    """Conditional DETR's: the cross-attention's weight is a content term plus a position term, per head.

    Projections of queries and keys start equal (an orthogonal matrix each for content and position), so that a query
    attends to its anchor, and to tokens like its content, from the first step. (With gains of one the logits hardly
    differ: attention is uniform, and training never finds the content.) Values carry their position too, so that a
    query knows where it attended; in the paper it can only guess that from the backbone's zero padding.
    """

    def __init__(
        self, *, width: int, heads: int, ffn: int, dropout: float, pre_norm: bool, position_gain: float
    ) -> None:
        super().__init__(width=width, heads=heads, ffn=ffn, dropout=dropout, pre_norm=pre_norm)
        self.norm3 = nn.LayerNorm(width)
        self.heads, self.dropout = heads, dropout
        # "place" is position in the names that checkpoints have
        self.query_content, self.query_place = nn.Linear(width, width), nn.Linear(width, width)
        self.key_content, self.key_place = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)
        for query, key, gain in (
            (self.query_content, self.key_content, CONTENT_GAIN),
            (self.query_place, self.key_place, position_gain),
        ):
            nn.init.orthogonal_(query.weight, gain=gain)
            nn.init.zeros_(query.bias)
            key.load_state_dict(query.state_dict())

    def forward(
        self,
        x: Tensor,
        memory: Tensor,
        *,
        query_pos: Tensor,
        anchor_embed: Tensor,
        pos_embed: Tensor,
        mask: Tensor | None,
        padding: Tensor | None,
    ) -> Tensor:
        x = self.attend(x, query_pos, mask=mask)
        q = self.before(x, self.norm2)

        def per_head(*parts: Tensor) -> Tensor:
            return torch.cat([p.unflatten(-1, (self.heads, -1)) for p in parts], dim=-1).transpose(1, 2)

        query = per_head(self.query_content(q), self.query_place(anchor_embed))
        key = per_head(self.key_content(memory), self.key_place(pos_embed))
        allowed = None if padding is None else ~padding[:, None, None]
        y = F.scaled_dot_product_attention(
            query,
            key,
            per_head(self.value(memory + pos_embed)),
            attn_mask=allowed,
            dropout_p=self.dropout if self.training else 0.0,
        )
        return self.feed_forward(self.after(x, self.out(y.transpose(1, 2).flatten(2)), self.norm2), self.norm3)


def zero_init_residual_branches(layers: Iterable[nn.Module]) -> None:
    """Let self-attention and feed-forward layers add nothing before training, so that tokens and queries keep their
    content (the zero gain of residual branches, Goyal et al., arXiv 1706.02677 §5.1)."""
    for layer in layers:
        assert isinstance(layer, _Layer)
        for last in (layer.self_attn.out_proj, layer.linear2):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)


class Encoder(nn.Module):
    """Layers, and a last norm where norms come first."""

    def __init__(self, *, layers: int, width: int, heads: int, ffn: int, dropout: float, pre_norm: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            EncoderLayer(width=width, heads=heads, ffn=ffn, dropout=dropout, pre_norm=pre_norm) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width) if pre_norm else nn.Identity()

    def forward(self, x: Tensor, *, pos_embed: Tensor, padding: Tensor | None) -> Tensor:
        for layer in self.layers:
            x = layer(x, pos_embed=pos_embed, padding=padding)
        return self.norm(x)


class PlainDecoder(nn.Module):
    """DETR's decoder; gives the normed state after each layer (L, N, Q, d)."""

    def __init__(self, *, layers: int, width: int, heads: int, ffn: int, dropout: float, pre_norm: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            PlainDecoderLayer(width=width, heads=heads, ffn=ffn, dropout=dropout, pre_norm=pre_norm)
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)

    def forward(
        self, memory: Tensor, *, query_pos: Tensor, pos_embed: Tensor, mask: Tensor | None, padding: Tensor | None
    ) -> Tensor:
        x = torch.zeros_like(query_pos)
        states = []
        for layer in self.layers:
            x = layer(x, memory, query_pos=query_pos, pos_embed=pos_embed, mask=mask, padding=padding)
            states.append(self.norm(x))
        return torch.stack(states)


class ConditionalDecoder(nn.Module):
    """Anchors are refined layer by layer; gives states (L, N, Q, d) and boxes (L, N, Q, 4) as centre boxes in [0, 1].

    Each layer's box is the anchor plus a change in logit space (Deformable DETR's refinement); the next layer starts
    from it without its gradient. The position embedding is scaled by the query's content (Conditional DETR), and by
    anchor size (DAB-DETR, arXiv 2201.12329), so that a large anchor attends farther around.
    """

    def __init__(self, *, layers: int, width: int, heads: int, ffn: int, dropout: float, pre_norm: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            ConditionalDecoderLayer(
                width=width,
                heads=heads,
                ffn=ffn,
                dropout=dropout,
                pre_norm=pre_norm,
                position_gain=POSITION_GAINS[min(number, 1)],
            )
            for number in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.anchor_head = MLP(2 * width, width, width)
        self.place_scale = MLP(width, width, width)
        self.size_head = MLP(width, width, 2)
        self.width = width
        nn.init.zeros_(self.place_scale.last.weight)  # the scale starts as one
        nn.init.ones_(self.place_scale.last.bias)
        nn.init.zeros_(self.size_head.last.weight)
        nn.init.constant_(self.size_head.last.bias, math.log(INITIAL_SIDE / (1 - INITIAL_SIDE)))

    def forward(
        self,
        memory: Tensor,
        *,
        content: Tensor,
        anchors: Tensor,
        pos_embed: Tensor,
        mask: Tensor | None,
        padding: Tensor | None,
        box_head: nn.Module,
    ) -> tuple[Tensor, Tensor]:
        x, logit = content, anchors
        states, boxes = [], []
        half = self.width // 2
        for number, layer in enumerate(self.layers):
            box = logit.sigmoid()
            # y, x, h, w: the order of the tokens' embedding
            sine = sine_position_embedding(box[..., [1, 0, 3, 2]], half, temperature=CONDITIONAL_TEMPERATURE)
            query_pos = self.anchor_head(sine.to(x.dtype))
            anchor_embed = sine[..., : self.width].to(x.dtype)
            if number:
                anchor_embed = anchor_embed * self.place_scale(x)
            size = (self.size_head(x).sigmoid() / box[..., [3, 2]].to(x.dtype).clamp(min=0.05)).clamp(max=8.0)
            anchor_embed = anchor_embed * size.repeat_interleave(half, dim=-1)
            x = layer(
                x,
                memory,
                query_pos=query_pos,
                anchor_embed=anchor_embed,
                pos_embed=pos_embed,
                mask=mask,
                padding=padding,
            )
            state = self.norm(x)
            refined = logit + box_head(state + query_pos).float()  # the box head sees the anchor it refines
            states.append(state)
            boxes.append(refined.sigmoid())
            logit = refined.detach()
        return torch.stack(states), torch.stack(boxes)
