"""Triton kernels of batch norms in what follows them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from systems.ops.kernels.common import _countable, _wide


@triton.jit
def _norm_of(
    index, mask, factors, summands, shifts, channels, pixels, image,
    normed: tl.constexpr, shifted: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    if normed:
        channel = index // pixels % channels
        factor = tl.load(factors + channel, mask, other=0).to(wide)
        summand = tl.load(summands + channel, mask, other=0).to(wide)
    else:
        factor = tl.full(index.shape, 0, wide)
        summand = factor
    if shifted:
        shift = tl.load(shifts + index // image * channels + channel, mask, other=0).to(wide)
    else:
        shift = tl.full(index.shape, 0, wide)
    return factor, summand, shift


@triton.jit
def _normed_sum(x, residual, out, factors, summands, n, channels, pixels, wide: tl.constexpr, block: tl.constexpr):
    index = tl.program_id(0) * block + tl.arange(0, block)
    mask = index < n
    factor, summand, _ = _norm_of(index, mask, factors, summands, x, channels, pixels, n, True, False, wide)
    place = index.to(tl.int64)
    normed = tl.load(x + place, mask, other=0).to(wide) * factor + summand
    total = normed + tl.load(residual + place, mask, other=0).to(wide)
    tl.store(out + place, total.to(out.dtype.element_ty), mask)


def normed_sum(x: Tensor, residual: Tensor, factor: Tensor, summand: Tensor, pixels: int) -> Tensor:
    """Returns `factor * x + summand + residual`, all in the order of the memory of `x`; factors are `(C,)`."""
    out, block = torch.empty_like(residual), 1024
    sizes = dict(n=_countable(x.numel()), channels=factor.numel(), pixels=pixels, wide=_wide(x), block=block)
    with torch.cuda.device_of(x):
        _normed_sum[(triton.cdiv(x.numel(), block),)](x, residual, out, factor, summand, **sizes)
    return out


@triton.jit
def _affine(mean, var, weight, bias, deviations, factors, summands, channels, eps: tl.constexpr, block: tl.constexpr):
    channel = tl.program_id(0) * block + tl.arange(0, block)
    mask = channel < channels
    inverse = 1 / tl.sqrt(tl.load(var + channel, mask, other=1).to(tl.float64) + eps)
    deviation = inverse.to(deviations.dtype.element_ty)
    factor = tl.load(weight + channel, mask, other=0) * deviation
    tl.store(deviations + channel, deviation, mask)
    tl.store(factors + channel, factor, mask)
    tl.store(summands + channel, tl.load(bias + channel, mask, other=0) - tl.load(mean + channel, mask) * factor, mask)


def affine(mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Returns inverse deviation, factor and summand of a batch norm from the statistics of channels, `(C,)` each."""
    found = torch.empty_like(var), torch.empty_like(var), torch.empty_like(var)
    block = 128
    with torch.cuda.device_of(var):
        _affine[(triton.cdiv(len(var), block),)](mean, var, weight, bias, *found, len(var), eps=eps, block=block)
    return found
