# SPDX-License-Identifier: Apache-2.0
"""Layers against torch's own, position embeddings against a loop, anchors that start where they should."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from ovd.modeling.detr.position_embedding import (
    CONDITIONAL_TEMPERATURE,
    DETR_TEMPERATURE,
    sine_position_embedding,
    token_positions,
)
from ovd.modeling.detr.transformer import ConditionalDecoder, EncoderLayer, PlainDecoderLayer


@pytest.mark.parametrize("pre_norm", [False, True])
def test_plain_layers__equal_torchs_own_without_positions(pre_norm: bool) -> None:
    torch.manual_seed(0)
    tokens, queries = torch.randn(2, 7, 16), torch.randn(2, 5, 16)
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[1, 4:] = True
    mask = torch.zeros(5, 5, dtype=torch.bool)
    mask[:2, 2:] = True
    ours = EncoderLayer(width=16, heads=2, ffn=24, dropout=0.0, pre_norm=pre_norm)
    theirs = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True, norm_first=pre_norm)
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(
        ours(tokens, pos_embed=torch.zeros_like(tokens), padding=padding)[~padding],
        theirs(tokens, src_key_padding_mask=padding)[~padding],
    )
    decoder = PlainDecoderLayer(width=16, heads=2, ffn=24, dropout=0.0, pre_norm=pre_norm)
    reference = nn.TransformerDecoderLayer(16, 2, 24, dropout=0.0, batch_first=True, norm_first=pre_norm)
    reference.load_state_dict(decoder.state_dict())
    torch.testing.assert_close(
        decoder(
            queries,
            tokens,
            query_pos=torch.zeros_like(queries),
            pos_embed=torch.zeros_like(tokens),
            mask=mask,
            padding=padding,
        ),
        reference(queries, tokens, tgt_mask=mask, memory_key_padding_mask=padding),
    )


def test_plain_decoder_layer__positions_go_to_queries_and_keys_but_not_to_values() -> None:
    torch.manual_seed(0)
    layer = PlainDecoderLayer(width=16, heads=2, ffn=24, dropout=0.0, pre_norm=False)
    x, tokens, here, there = torch.randn(4, 1, 5, 16).unbind(0)
    same = tokens[:, :1].expand(-1, 5, -1)  # equal tokens have equal values: where one attends changes nothing
    first, second = (
        layer(x, same, query_pos=here, pos_embed=pos_embed, mask=None, padding=None)
        for pos_embed in (there, torch.zeros(1, 5, 16))
    )
    torch.testing.assert_close(first, second)
    other = layer(x, tokens, query_pos=here, pos_embed=there, mask=None, padding=None)
    assert not torch.allclose(other, layer(x, tokens, query_pos=here, pos_embed=here, mask=None, padding=None))


def test_sine_position_embedding__is_detrs() -> None:
    embedding = sine_position_embedding(torch.tensor([[0.3, 0.8]]), 6, temperature=DETR_TEMPERATURE)
    expected = []
    for position in (0.3, 0.8):
        for i in range(6):
            angle = position * 2 * math.pi / 10_000 ** (2 * (i // 2) / 6)
            expected.append(math.cos(angle) if i % 2 else math.sin(angle))
    torch.testing.assert_close(embedding[0], torch.tensor(expected))


def test_token_positions__count_the_valid_part_only() -> None:
    valid = torch.zeros(1, 4, 4, dtype=torch.bool)
    valid[:, :2] = True
    positions = token_positions(valid, centred=False)
    torch.testing.assert_close(positions[0, :2, 0, 0], torch.tensor([0.5, 1.0]))
    torch.testing.assert_close(positions[0, 0, :, 1], torch.tensor([0.25, 0.5, 0.75, 1.0]))
    torch.testing.assert_close(token_positions(valid, centred=True)[0, :2, 0, 0], torch.tensor([0.25, 0.75]))


@pytest.mark.parametrize("cell", [0, 100, 136, 255])
def test_conditional_decoder__first_attends_everywhere_then_around_its_anchor(cell: int) -> None:
    torch.manual_seed(0)
    width, heads, side = 128, 4, 16
    decoder = ConditionalDecoder(layers=2, width=width, heads=heads, ffn=8, dropout=0.0, pre_norm=True)
    positions = token_positions(torch.ones(1, side, side, dtype=torch.bool), centred=True).flatten(1, 2)
    pos_embed = sine_position_embedding(positions, width // 2, temperature=CONDITIONAL_TEMPERATURE)
    anchor = pos_embed[:, cell]
    square = (positions[0] - positions[0, cell]).square().mean(-1)
    spreads = []
    for layer in decoder.layers:
        query = layer.query_place(anchor).unflatten(-1, (heads, -1))
        logits = torch.einsum("nhd,nshd->nhs", query, layer.key_place(pos_embed).unflatten(-1, (heads, -1)))[0]
        assert int(logits.sum(0).argmax()) == cell
        # Content and position share the head's width, so that is what the logits are divided by the root of.
        attention = (logits / (2 * width / heads) ** 0.5).softmax(-1)
        spreads.append(float((attention @ square).sqrt().max()))
    even = float(square.mean().sqrt())
    assert spreads[0] > 0.75 * even and spreads[1] < 0.5 * even


def test_conditional_decoder__refines_anchors_without_gradient() -> None:
    torch.manual_seed(0)
    decoder = ConditionalDecoder(layers=3, width=16, heads=2, ffn=8, dropout=0.0, pre_norm=True)
    head = nn.Linear(16, 4)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    anchors = torch.logit(torch.rand(1, 5, 4) * 0.8 + 0.1).requires_grad_()
    given = {
        "content": torch.randn(1, 5, 16),
        "anchors": anchors,
        "pos_embed": torch.randn(1, 9, 16),
        "mask": None,
        "padding": None,
    }
    states, boxes = decoder(torch.randn(1, 9, 16), box_head=head, **given)
    assert states.shape == (3, 1, 5, 16)
    torch.testing.assert_close(boxes, anchors.sigmoid().expand(3, -1, -1, -1))
    nn.init.constant_(head.bias, 0.3)
    _, moved = decoder(torch.randn(1, 9, 16), box_head=head, **given)
    torch.testing.assert_close(torch.logit(moved[2]), anchors + 3 * 0.3, atol=1e-4, rtol=1e-4)
    gradient = torch.autograd.grad(moved[2].sum(), head.bias)[0]
    p = moved[2]
    torch.testing.assert_close(gradient, (p * (1 - p)).sum((0, 1)).detach(), atol=1e-4, rtol=1e-4)
