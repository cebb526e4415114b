"""Triton kernels of batch norms fused into the following operation: `y = scale * x + shift` for each channel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from systems.ops.kernels.common import accumulator_dtype, check_int32_range


@triton.jit
def load_norm(  # noqa: ANN201
    index, mask, scales, shifts, tembs, channels, channel_stride, image_size,
    has_norm: tl.constexpr, has_temb: tl.constexpr, acc_dtype: tl.constexpr,
):  # fmt: skip
    """Loads `scales`, `shifts` `(C,)`, `tembs` `(B, C)` for elements `index` `(block,)` of `(B, C, H, W)`."""
    if has_norm:
        channel = index // channel_stride % channels
        scale = tl.load(scales + channel, mask, other=0).to(acc_dtype)
        shift = tl.load(shifts + channel, mask, other=0).to(acc_dtype)
    else:
        scale = tl.full(index.shape, 0, acc_dtype)
        shift = scale
    if has_temb:
        temb = tl.load(tembs + index // image_size * channels + channel, mask, other=0).to(acc_dtype)
    else:
        temb = tl.full(index.shape, 0, acc_dtype)
    return scale, shift, temb


@triton.jit
def _normed_sum_kernel(
    x, residual, out, scales, shifts, n, channels, channel_stride, acc_dtype: tl.constexpr, block: tl.constexpr
):
    """`x`, `residual`, `out` `(n,)` in one layout of `(T, B, C, H, W)`; `scales`, `shifts` `(C,)`."""
    index = tl.program_id(0) * block + tl.arange(0, block)
    mask = index < n
    scale, shift, _ = load_norm(index, mask, scales, shifts, x, channels, channel_stride, n, True, False, acc_dtype)
    offset = index.to(tl.int64)
    normed = tl.load(x + offset, mask, other=0).to(acc_dtype) * scale + shift
    total = normed + tl.load(residual + offset, mask, other=0).to(acc_dtype)
    tl.store(out + offset, total.to(out.dtype.element_ty), mask)


def normed_sum(x: Tensor, residual: Tensor, scale: Tensor, shift: Tensor, channel_stride: int) -> Tensor:
    """Returns `scale * x + shift + residual` in the memory layout of `x`.

    Args:
        x: Dense features `(T, B, C, H, W)`.
        residual: Residual of the same shape and layout.
        scale: Scale of each channel, `(C,)`.
        shift: Shift of each channel, `(C,)`.
        channel_stride: Stride of the channels in memory (see `systems.ops.norms.channel_stride`).
    """
    out, block = torch.empty_like(residual), 1024
    sizes = dict(
        n=check_int32_range(x.numel()),
        channels=scale.numel(),
        channel_stride=channel_stride,
        acc_dtype=accumulator_dtype(x),
        block=block,
    )
    with torch.cuda.device_of(x):
        _normed_sum_kernel[(triton.cdiv(x.numel(), block),)](x, residual, out, scale, shift, **sizes)
    return out


@triton.jit
def _affine_kernel(mean, var, weight, bias, inv_stds, scales, shifts, channels, eps: tl.constexpr, block: tl.constexpr):
    """All tensors are `(C,)`: statistics and parameters in, inverse standard deviation, scale and shift out."""
    channel = tl.program_id(0) * block + tl.arange(0, block)
    mask = channel < channels
    inverse = 1 / tl.sqrt(tl.load(var + channel, mask, other=1).to(tl.float64) + eps)
    inv_std = inverse.to(inv_stds.dtype.element_ty)
    scale = tl.load(weight + channel, mask, other=0) * inv_std
    tl.store(inv_stds + channel, inv_std, mask)
    tl.store(scales + channel, scale, mask)
    tl.store(shifts + channel, tl.load(bias + channel, mask, other=0) - tl.load(mean + channel, mask) * scale, mask)


def affine(mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Returns `inv_std = 1 / sqrt(var + eps)`, `scale = weight * inv_std`, `shift = bias - mean * scale`: `(C,)`."""
    results = torch.empty_like(var), torch.empty_like(var), torch.empty_like(var)
    block = 128
    with torch.cuda.device_of(var):
        _affine_kernel[(triton.cdiv(len(var), block),)](
            mean, var, weight, bias, *results, len(var), eps=eps, block=block
        )
    return results
