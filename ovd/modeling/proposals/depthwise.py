# SPDX-License-Identifier: Apache-2.0
"""Depthwise convolutions whose gradients are fast on a CPU.

oneDNN's kernels are slow for two of them: a 5 × 5 weight's gradient in bfloat16 (three times as slow as in float32,
channels last) and the input's at stride 2 (fifteen times). Here both are computed in float32, channels last.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class _DepthwiseConv(torch.autograd.Function):
    """The output of ``F.conv2d`` with one group per channel; gradients in float32, channels last."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding, ctx.has_bias = stride, padding, bias is not None
        return F.conv2d(x, weight, bias, stride, padding, groups=len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors

        def gradients(dtype: torch.dtype, wanted: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
            of = (value.to(dtype, memory_format=torch.channels_last) for value in (grad, x, weight))
            stride, padding = [ctx.stride] * 2, [ctx.padding] * 2
            return torch.ops.aten.convolution_backward(
                *of, [len(weight)], stride, padding, [1, 1], False, [0, 0], len(weight), wanted
            )

        _, of_weight, of_bias = gradients(torch.float32, [False, True, ctx.has_bias])
        of_x = None
        if ctx.needs_input_grad[0]:
            dtype = torch.float32 if ctx.stride > 1 else grad.dtype
            of_x = gradients(dtype, [True, False, False])[0].to(x.dtype)
        return of_x, of_weight.to(weight.dtype), of_bias, None, None


def depthwise(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """What ``conv``, a square depthwise convolution, makes of x (N, C, H, W)."""
    if torch.is_grad_enabled() and conv.weight.requires_grad and x.device.type == "cpu":
        stride, padding = conv.stride[0], cast(tuple[int, int], conv.padding)[0]
        return cast(Tensor, _DepthwiseConv.apply(x, conv.weight, conv.bias, stride, padding))
    return cast(Tensor, conv(x))
