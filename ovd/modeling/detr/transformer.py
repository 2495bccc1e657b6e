# SPDX-License-Identifier: Apache-2.0
"""Encoder and decoders of detection transformers, pure torch.

`PlainDecoderLayer` is DETR's (arXiv 2005.12872); names of parameters are those of its released checkpoints.
`ConditionalDecoderLayer` is Conditional DETR's (arXiv 2108.06152): content and place are kept apart in the
cross-attention, and the place is the sine code of the query's own anchor, scaled by what the query has seen.

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

START = 0.25  # side of the anchors before training; there the place is scaled by one
CONTENT_GAIN = (
    2.5  # of a query's and a token's content: look-alike tokens stand out before training, by about 3 in logits
)
DETR_TEMPERATURE = 10_000.0  # arXiv 2005.12872 §A.4; its finest sine still needs a whole picture for one turn
# Conditional DETR's place has to say *where*. With DETR's temperature and a gain of one a query's attention before
# training spreads over the picture as if it were even (standard deviation .28 of a side; even is .29). With these the
# first layer looks everywhere, where a patch is sought, and later ones around the anchor (.09, for a side of `START`).
PLACE_TEMPERATURE = 5.0
PLACE_GAINS = (1.0, 5.0)  # of the first layer, of the others


def sine_code(positions: Tensor, width: int, *, temperature: float) -> Tensor:
    """(…, k) coordinates in [0, 1] → (…, k · width) sines and cosines, DETR's with scale 2π.

    Their periods go from one turn per picture to one per ``temperature`` pictures.
    """
    step = torch.arange(width, device=positions.device, dtype=torch.float32)
    frequency = temperature ** (2 * torch.div(step, 2, rounding_mode="floor") / width)
    angle = positions.float()[..., None] * (2 * math.pi) / frequency
    code = torch.stack([angle[..., 0::2].sin(), angle[..., 1::2].cos()], dim=-1).flatten(-2)
    return code.flatten(-2)


def token_positions(valid_NHW: Tensor, *, centred: bool) -> Tensor:
    """(N, H, W, 2) y and x of each cell within the valid part, in [0, 1].

    Args:
        valid_NHW: bool, False for padding.
        centred: cell centres, which anchors can be compared with; else DETR's count, whose last valid cell is 1.
    """
    rows = valid_NHW.cumsum(1, dtype=torch.float32)
    columns = valid_NHW.cumsum(2, dtype=torch.float32)
    shift = 0.5 if centred else 0.0
    y = (rows - shift) / (rows[:, -1:] + 1e-6)
    x = (columns - shift) / (columns[:, :, -1:] + 1e-6)
    return torch.stack([y, x], dim=-1)


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


class _Residual(nn.Module):
    """x + part(norm(x)), or norm(x + part(x)) after the fact."""

    def __init__(self, *, dropout: float, pre_norm: bool) -> None:
        super().__init__()
        self.pre_norm, self.drop = pre_norm, nn.Dropout(dropout)

    def before(self, x: Tensor, norm: nn.Module) -> Tensor:
        return norm(x) if self.pre_norm else x

    def after(self, x: Tensor, change: Tensor, norm: nn.Module) -> Tensor:
        x = x + self.drop(change)
        return x if self.pre_norm else norm(x)


class EncoderLayer(_Residual):
    """Self-attention among tokens, then a feed-forward layer."""

    def __init__(self, *, width: int, heads: int, ffn: int, dropout: float, pre_norm: bool) -> None:
        super().__init__(dropout=dropout, pre_norm=pre_norm)
        self.self_attn = nn.MultiheadAttention(width, heads, dropout=dropout, batch_first=True)
        self.linear1, self.linear2 = nn.Linear(width, ffn), nn.Linear(ffn, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor, *, place: Tensor, padding: Tensor | None) -> Tensor:
        y = self.before(x, self.norm1)
        q = y + place
        y = self.self_attn(q, q, y, key_padding_mask=padding, need_weights=False)[0]
        x = self.after(x, y, self.norm1)
        y = self.linear2(self.drop(F.relu(self.linear1(self.before(x, self.norm2)))))
        return self.after(x, y, self.norm2)


class _DecoderLayer(_Residual):
    """What decoder layers have around their cross-attention: attention among the queries, and a feed-forward layer."""

    def __init__(self, *, width: int, heads: int, ffn: int, dropout: float, pre_norm: bool) -> None:
        super().__init__(dropout=dropout, pre_norm=pre_norm)
        self.self_attn = nn.MultiheadAttention(width, heads, dropout=dropout, batch_first=True)
        self.linear1, self.linear2 = nn.Linear(width, ffn), nn.Linear(ffn, width)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)

    def among_queries(self, x: Tensor, *, query_place: Tensor, mask: Tensor | None) -> Tensor:
        """Self-attention; places are added to q and k."""
        y = self.before(x, self.norm1)
        q = y + query_place
        y = self.self_attn(q, q, y, attn_mask=mask, need_weights=False)[0]
        return self.after(x, y, self.norm1)

    def feed_forward(self, x: Tensor) -> Tensor:
        """Each query for itself."""
        y = self.linear2(self.drop(F.relu(self.linear1(self.before(x, self.norm3)))))
        return self.after(x, y, self.norm3)


class PlainDecoderLayer(_DecoderLayer):
    """DETR's: self-attention of the queries, attention to the tokens, feed-forward; places are added to q and k."""

    def __init__(self, *, width: int, heads: int, ffn: int, dropout: float, pre_norm: bool) -> None:
        super().__init__(width=width, heads=heads, ffn=ffn, dropout=dropout, pre_norm=pre_norm)
        self.multihead_attn = nn.MultiheadAttention(width, heads, dropout=dropout, batch_first=True)

    def forward(
        self,
        x: Tensor,
        memory: Tensor,
        *,
        query_place: Tensor,
        place: Tensor,
        mask: Tensor | None,
        padding: Tensor | None,
    ) -> Tensor:
        x = self.among_queries(x, query_place=query_place, mask=mask)
        q = self.before(x, self.norm2) + query_place
        y = self.multihead_attn(q, memory + place, memory, key_padding_mask=padding, need_weights=False)[0]
        return self.feed_forward(self.after(x, y, self.norm2))


class ConditionalDecoderLayer(_DecoderLayer):
    """Conditional DETR's: the cross-attention's weight is a content term plus a place term, per head.

    Projections of queries and tokens start equal (an orthogonal matrix each for content and place), so that a query
    looks at its anchor, and at tokens like its content, from the first step. (With gains of one the logits hardly
    differ: the attention is even, and training never finds the content.) Values carry their place too, so that a query
    knows where it has looked; in the paper it can only guess that from the backbone's zero padding.
    """

    def __init__(self, *, width: int, heads: int, ffn: int, dropout: float, pre_norm: bool, place_gain: float) -> None:
        super().__init__(width=width, heads=heads, ffn=ffn, dropout=dropout, pre_norm=pre_norm)
        self.heads, self.dropout = heads, dropout
        self.query_content, self.query_place = nn.Linear(width, width), nn.Linear(width, width)
        self.key_content, self.key_place = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)
        for query, key, gain in (
            (self.query_content, self.key_content, CONTENT_GAIN),
            (self.query_place, self.key_place, place_gain),
        ):
            nn.init.orthogonal_(query.weight, gain=gain)
            nn.init.zeros_(query.bias)
            key.load_state_dict(query.state_dict())

    def forward(
        self,
        x: Tensor,
        memory: Tensor,
        *,
        query_place: Tensor,
        anchor_code: Tensor,
        place: Tensor,
        mask: Tensor | None,
        padding: Tensor | None,
    ) -> Tensor:
        x = self.among_queries(x, query_place=query_place, mask=mask)
        q = self.before(x, self.norm2)

        def per_head(*parts: Tensor) -> Tensor:
            return torch.cat([p.unflatten(-1, (self.heads, -1)) for p in parts], dim=-1).transpose(1, 2)

        query = per_head(self.query_content(q), self.query_place(anchor_code))
        key = per_head(self.key_content(memory), self.key_place(place))
        allowed = None if padding is None else ~padding[:, None, None]
        y = F.scaled_dot_product_attention(
            query,
            key,
            per_head(self.value(memory + place)),
            attn_mask=allowed,
            dropout_p=self.dropout if self.training else 0.0,
        )
        return self.feed_forward(self.after(x, self.out(y.transpose(1, 2).flatten(2)), self.norm2))


def start_as_identity(layers: Iterable[nn.Module]) -> None:
    """Let self-attention and feed-forward layers add nothing before training, so that tokens and queries keep their
    content (the zero gain of residual branches, Goyal et al., arXiv 1706.02677 §5.1)."""
    for layer in layers:
        assert isinstance(layer, EncoderLayer | _DecoderLayer)
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

    def forward(self, x: Tensor, *, place: Tensor, padding: Tensor | None) -> Tensor:
        for layer in self.layers:
            x = layer(x, place=place, padding=padding)
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
        self, memory: Tensor, *, query_place: Tensor, place: Tensor, mask: Tensor | None, padding: Tensor | None
    ) -> Tensor:
        x = torch.zeros_like(query_place)
        states = []
        for layer in self.layers:
            x = layer(x, memory, query_place=query_place, place=place, mask=mask, padding=padding)
            states.append(self.norm(x))
        return torch.stack(states)


class ConditionalDecoder(nn.Module):
    """Anchors are refined layer by layer; gives states (L, N, Q, d) and boxes (L, N, Q, 4) as centre boxes in [0, 1].

    Each layer's box is the anchor plus a change in logit space (Deformable DETR's refinement); the next layer starts
    from it without its gradient. The code of the place is scaled by the query's content (Conditional DETR), and by
    anchor size (DAB-DETR, arXiv 2201.12329), so that a large anchor looks around farther.
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
                place_gain=PLACE_GAINS[min(number, 1)],
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
        nn.init.constant_(self.size_head.last.bias, math.log(START / (1 - START)))

    def forward(
        self,
        memory: Tensor,
        *,
        content: Tensor,
        anchors: Tensor,
        place: Tensor,
        mask: Tensor | None,
        padding: Tensor | None,
        box_head: nn.Module,
    ) -> tuple[Tensor, Tensor]:
        x, logit = content, anchors
        states, boxes = [], []
        half = self.width // 2
        for number, layer in enumerate(self.layers):
            box = logit.sigmoid()
            # y, x, h, w: the order of the tokens' code
            code = sine_code(box[..., [1, 0, 3, 2]], half, temperature=PLACE_TEMPERATURE)
            query_place = self.anchor_head(code.to(x.dtype))
            anchor_code = code[..., : self.width].to(x.dtype)
            if number:
                anchor_code = anchor_code * self.place_scale(x)
            size = (self.size_head(x).sigmoid() / box[..., [3, 2]].to(x.dtype).clamp(min=0.05)).clamp(max=8.0)
            anchor_code = anchor_code * size.repeat_interleave(half, dim=-1)
            x = layer(
                x, memory, query_place=query_place, anchor_code=anchor_code, place=place, mask=mask, padding=padding
            )
            state = self.norm(x)
            refined = logit + box_head(state + query_place).float()  # a change is told from what it changes
            states.append(state)
            boxes.append(refined.sigmoid())
            logit = refined.detach()
        return torch.stack(states), torch.stack(boxes)
