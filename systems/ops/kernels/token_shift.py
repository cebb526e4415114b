"""Triton kernels of RWKV's token shift, for one to three mixes of the same tokens in one launch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from systems.ops.kernels.common import accumulator_dtype


@triton.jit
def _tile(rows, channels, row_block: tl.constexpr, channel_block: tl.constexpr):
    """Row, channel, offset and mask of this program's elements, `(row_block, channel_block)` of `(rows, D)`."""
    row = tl.program_id(0) * row_block + tl.arange(0, row_block)[:, None]
    channel = tl.program_id(1) * channel_block + tl.arange(0, channel_block)[None, :]
    return row, channel, row.to(tl.int64) * channels + channel, (row < rows) & (channel < channels)


@triton.jit
def _add(a, b):
    return a + b


@triton.jit
def _shift_kernel(
    x, mixes, first, second, third, rows, channels, num_tokens: tl.constexpr, num_mixes: tl.constexpr,
    acc_dtype: tl.constexpr, row_block: tl.constexpr, channel_block: tl.constexpr,
):  # fmt: skip
    """`x`, `first`, `second`, `third` `(rows, D)` with rows `M * N`; `mixes` `(num_mixes, D)`."""
    row, channel, offset, mask = _tile(rows, channels, row_block, channel_block)
    token = tl.load(x + offset, mask, other=0).to(acc_dtype)
    before = tl.load(x + offset - channels, mask & (row % num_tokens != 0), other=0).to(acc_dtype)
    for i in tl.static_range(num_mixes):
        out = first if i == 0 else second if i == 1 else third
        mix = tl.load(mixes + i * channels + channel, channel < channels, other=0).to(acc_dtype)
        tl.store(out + offset, (before + mix * (token - before)).to(out.dtype.element_ty), mask)


@triton.jit
def _shift_gradients_kernel(
    x, mixes, first, second, third, grad_x, grad_mixes, rows, channels, num_tokens: tl.constexpr,
    num_mixes: tl.constexpr, acc_dtype: tl.constexpr, row_block: tl.constexpr, channel_block: tl.constexpr,
):  # fmt: skip
    """`x`, `first`, ..., `grad_x` `(rows, D)`; `mixes` `(num_mixes, D)`; `grad_mixes` `(row blocks, num_mixes, D)`."""
    row, channel, offset, mask = _tile(rows, channels, row_block, channel_block)
    token = tl.load(x + offset, mask, other=0).to(acc_dtype)
    before = tl.load(x + offset - channels, mask & (row % num_tokens != 0), other=0).to(acc_dtype)
    not_last = mask & (row % num_tokens != num_tokens - 1)
    total = tl.full(token.shape, 0, acc_dtype)
    for i in tl.static_range(num_mixes):
        grads = first if i == 0 else second if i == 1 else third
        mix = tl.load(mixes + i * channels + channel, channel < channels, other=0).to(acc_dtype)
        grad = tl.load(grads + offset, mask, other=0).to(acc_dtype)
        after = tl.load(grads + offset + channels, not_last, other=0).to(acc_dtype)
        total += after + mix * (grad - after)
        part = tl.reduce(grad * (token - before), 0, _add)[None, :]
        tl.store(grad_mixes + (tl.program_id(0) * num_mixes + i) * channels + channel, part, channel < channels)
    tl.store(grad_x + offset, total.to(grad_x.dtype.element_ty), mask)


def _tiles(x: Tensor) -> tuple[tuple[int, int], dict[str, Any]]:
    """Grid and sizes of both kernels."""
    num_tokens, channels = x.shape[-2:]
    rows, row_block, channel_block = x.numel() // channels, 32, 128
    sizes = dict(rows=rows, channels=channels, num_tokens=num_tokens, acc_dtype=accumulator_dtype(x))
    grid = triton.cdiv(rows, row_block), triton.cdiv(channels, channel_block)
    return grid, sizes | dict(row_block=row_block, channel_block=channel_block)


def _pad_to_three(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Repeats the last of one to three tensors until there are three."""
    return [tensors[min(i, len(tensors) - 1)] for i in range(3)]


def shift(x: Tensor, mixes: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Returns `mix * x[n] + (1 - mix) * x[n-1]` of contiguous tokens `(..., N, D)` for one to three mixes `(D,)`."""
    out = tuple(torch.empty_like(x) for _ in mixes)
    grid, sizes = _tiles(x)
    with torch.cuda.device_of(x):
        _shift_kernel[grid](x, torch.stack(tuple(mixes)), *_pad_to_three(out), num_mixes=len(mixes), **sizes)
    return out


def shift_gradients(x: Tensor, grads: Sequence[Tensor], mixes: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Returns the gradients of `x` and of each mix; `grads` are the contiguous gradients of the outputs of `shift`."""
    grid, sizes = _tiles(x)
    grad_x, parts = torch.empty_like(x), mixes[0].new_empty(grid[0], len(mixes), x.shape[-1])
    with torch.cuda.device_of(x):
        _shift_gradients_kernel[grid](
            x, torch.stack(tuple(mixes)), *_pad_to_three(grads), grad_x, parts, num_mixes=len(mixes), **sizes
        )
    return grad_x, *parts.sum(0).unbind()
