"""Triton kernels of RWKV's token shift."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from systems.ops.kernels.common import _wide


@triton.jit
def _tile(rows, channels, row_block: tl.constexpr, channel_block: tl.constexpr):
    row = tl.program_id(0) * row_block + tl.arange(0, row_block)[:, None]
    channel = tl.program_id(1) * channel_block + tl.arange(0, channel_block)[None, :]
    return row, channel, row.to(tl.int64) * channels + channel, (row < rows) & (channel < channels)


@triton.jit
def _plus(a, b):
    return a + b


@triton.jit
def _shift(
    x, mixes, first, second, third, rows, channels, num_tokens: tl.constexpr, num_mixes: tl.constexpr,
    wide: tl.constexpr, row_block: tl.constexpr, channel_block: tl.constexpr,
):  # fmt: skip
    row, channel, place, mask = _tile(rows, channels, row_block, channel_block)
    token = tl.load(x + place, mask, other=0).to(wide)
    before = tl.load(x + place - channels, mask & (row % num_tokens != 0), other=0).to(wide)
    for i in tl.static_range(num_mixes):
        out = first if i == 0 else second if i == 1 else third
        share = tl.load(mixes + i * channels + channel, channel < channels, other=0).to(wide)
        tl.store(out + place, (before + share * (token - before)).to(out.dtype.element_ty), mask)


@triton.jit
def _shift_gradients(
    x, mixes, first, second, third, grad_x, grad_mixes, rows, channels, num_tokens: tl.constexpr,
    num_mixes: tl.constexpr, wide: tl.constexpr, row_block: tl.constexpr, channel_block: tl.constexpr,
):  # fmt: skip
    row, channel, place, mask = _tile(rows, channels, row_block, channel_block)
    token = tl.load(x + place, mask, other=0).to(wide)
    before = tl.load(x + place - channels, mask & (row % num_tokens != 0), other=0).to(wide)
    not_last = mask & (row % num_tokens != num_tokens - 1)
    total = tl.full(token.shape, 0, wide)
    for i in tl.static_range(num_mixes):
        grads = first if i == 0 else second if i == 1 else third
        share = tl.load(mixes + i * channels + channel, channel < channels, other=0).to(wide)
        grad = tl.load(grads + place, mask, other=0).to(wide)
        after = tl.load(grads + place + channels, not_last, other=0).to(wide)
        total += after + share * (grad - after)
        part = tl.reduce(grad * (token - before), 0, _plus)[None, :]
        tl.store(grad_mixes + (tl.program_id(0) * num_mixes + i) * channels + channel, part, channel < channels)
    tl.store(grad_x + place, total.to(grad_x.dtype.element_ty), mask)


def _tiles(x: Tensor) -> tuple[tuple[int, int], dict[str, Any]]:
    num_tokens, channels = x.shape[-2:]
    rows, row_block, channel_block = x.numel() // channels, 32, 128
    sizes = dict(rows=rows, channels=channels, num_tokens=num_tokens, wide=_wide(x))
    grid = triton.cdiv(rows, row_block), triton.cdiv(channels, channel_block)
    return grid, sizes | dict(row_block=row_block, channel_block=channel_block)


def _three(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Returns up to three tensors as three, the last of them as those that are missing."""
    return [tensors[min(i, len(tensors) - 1)] for i in range(3)]


def shift(x: Tensor, mixes: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Returns `mix * x[n] + (1 - mix) * x[n-1]` of contiguous tokens `(..., N, D)` for one to three mixes `(D,)`."""
    out = tuple(torch.empty_like(x) for _ in mixes)
    grid, sizes = _tiles(x)
    with torch.cuda.device_of(x):
        _shift[grid](x, torch.stack(tuple(mixes)), *_three(out), num_mixes=len(mixes), **sizes)
    return out


def shift_gradients(x: Tensor, grads: Sequence[Tensor], mixes: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Returns the gradients of `x` and of the mixes from those of what `shift` returns, contiguous."""
    grid, sizes = _tiles(x)
    grad_x, parts = torch.empty_like(x), mixes[0].new_empty(grid[0], len(mixes), x.shape[-1])
    with torch.cuda.device_of(x):
        _shift_gradients[grid](
            x, torch.stack(tuple(mixes)), *_three(grads), grad_x, parts, num_mixes=len(mixes), **sizes
        )
    return grad_x, *parts.sum(0).unbind()
