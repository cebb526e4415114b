"""Uniform quantisation of activations with a learned clip value (QReLU), with straight-through gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from systems.ops.compiled import compiled, dense, laid_out_as, memory


@compiled
def _round(x: Tensor, scale: Tensor, levels: int) -> Tensor:
    ratio = x.to(torch.promote_types(x.dtype, torch.float32)).relu() / scale
    return (ratio.clamp(0, 1).mul(levels).round() * (scale / levels)).to(x.dtype)


@compiled
def _round_backward(x: Tensor, grad: Tensor, scale: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    ratio = x.to(torch.promote_types(x.dtype, torch.float32)).relu() / scale
    inside = (ratio > 0) & (ratio < 1)
    error = (ratio.clamp(0, 1) * levels).round() / levels - ratio
    above = (ratio >= 1).to(ratio.dtype)
    return grad * inside, (grad * torch.where(inside, error, above)).sum()


class Quantise(torch.autograd.Function):
    """`(s/n) round(n clamp(relu(x)/s, 0, 1))`, ties to even, with straight-through gradients of `x` and `s`.

    `x` has any shape, the clip value `s` is a scalar, `n` is the number of levels above 0.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, levels: int) -> Tensor:
        """Returns the quantised activations, in the dtype of `x`."""
        x = dense(x)
        ctx.save_for_backward(x, scale)
        ctx.levels = levels
        return _round(memory(x, 1, -1), scale, levels).as_strided(x.shape, x.stride())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        """Returns the gradients of the activations and of the clip value."""
        x, scale = ctx.saved_tensors
        grad = laid_out_as(x, grad)
        grad_x, grad_scale = _round_backward(memory(x, 1, -1), memory(grad, 1, -1), scale, ctx.levels)
        return grad_x.as_strided(x.shape, x.stride()), grad_scale.to(scale.dtype), None
