"""Activations of few bits: uniform quantisation with a learned clip value (QReLU), with straight-through gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from systems.ops.compiled import compiled, dense, laid_out_as, memory

PLAIN_BITS = 32
"""Value of `activation_bits` that means a plain ReLU."""


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


class QReLU(nn.Module):
    """ReLU clipped at a learned value and rounded to `2^bits` levels.

    With `n = 2^bits - 1` and the clip value `s` (`act_alpha`, 6.0 before training) it is
    `(s/n) round(n clamp(relu(x)/s, 0, 1))`, half rounded to even. Gradients are straight-through: `dy/dx = 1` for
    `0 < x < s`, else 0; `dy/ds` is the rounding error over `s` inside, 1 above and 0 below.

    Args:
        bits: Bits of the activation.

    Shapes:
        Any shape in and out.
    """

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.levels = 2**bits - 1
        self.act_alpha = nn.Parameter(torch.tensor(6.0))

    def forward(self, x: Tensor) -> Tensor:
        """Returns `x` clipped and rounded."""
        return Quantise.apply(x, self.act_alpha, self.levels)


def quantised_relu(bits: int) -> nn.Module:
    """Returns a `QReLU`, or a plain ReLU for 32 bits.

    Raises:
        ValueError: If `bits` is neither 1 to 8 nor 32.
    """
    if bits == PLAIN_BITS:
        return nn.ReLU()
    if not 1 <= bits <= 8:
        raise ValueError(f"activation_bits={bits}; give 1 to 8, or {PLAIN_BITS} for a plain ReLU")
    return QReLU(bits)


def bits_of_steps(num_steps: int) -> int:
    """Returns the bits of an activation with at least as many levels as a neuron has spike counts in `T` steps.

    `T` steps transmit 0 to `T` spikes, `T + 1` levels: `ceil(log2(T + 1))` bits, 3 for `T = 4` (Yan et al., arXiv
    2409.08290, who compare spiking with quantised networks on this basis).
    """
    return num_steps.bit_length()  # ceil(log2(T + 1)) in whole numbers
