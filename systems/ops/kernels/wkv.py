"""Triton kernels of WKV, all tokens in one launch."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from systems.ops.kernels.common import _wide

_CHANNELS = 64
"""Channels of a program of WKV."""


@triton.jit
def _join(k, v, w, s, lost, y):
    """One token of `systems.ops.wkv._means`: the share of `y` in the mean after it, and the state after it."""
    past = s - w
    lost = lost + (s - past - w)
    x = past - k + lost
    ratio = tl.exp(-tl.abs(x))
    rest = tl.log(1 + ratio) + tl.where(x > 0, lost, 0.0)
    kept = tl.where(x > 0, 1.0, ratio) / (1 + ratio)
    larger = tl.where(x > 0, past, k)
    s = larger + rest
    return kept, s, rest - (s - larger), v + kept * (y - v)


@triton.jit
def _share(s, k, u):
    """Share of the past in the output, the sigmoid of `s - (u + k)`, which overflows nowhere."""
    x = s - (u + k)
    small = tl.exp(-tl.abs(x))
    return tl.where(x > 0, 1.0, small) / (1 + small)


@triton.jit
def _wkv(
    keys, values, decays, bonuses, out, num_tokens: tl.constexpr, channels, wide: tl.constexpr, block: tl.constexpr
):
    channel = tl.program_id(1) * block + tl.arange(0, block)
    mask = channel < channels
    w = tl.load(decays + channel, mask, other=0).to(wide)
    u = tl.load(bonuses + channel, mask, other=0).to(wide)
    place = tl.program_id(0).to(tl.int64) * num_tokens * channels + channel
    s = tl.full(channel.shape, -1e30, wide)
    lost = tl.full(channel.shape, 0, wide)
    y = tl.full(channel.shape, 0, wide)
    k, v = tl.load(keys + place, mask, other=0), tl.load(values + place, mask, other=0)
    for n in range(num_tokens):
        k_n, v_n = k.to(wide), v.to(wide)
        following = mask & (n + 1 < num_tokens)  # on its way while this one is computed
        k = tl.load(keys + place + channels, following, other=0)
        v = tl.load(values + place + channels, following, other=0)
        result = v_n + _share(s, k_n, u) * (y - v_n)
        tl.store(out + place, result.to(out.dtype.element_ty), mask)
        _, s, lost, y = _join(k_n, v_n, w, s, lost, y)
        place += channels


@triton.jit
def _wkv_gradients(
    keys, values, decays, bonuses, grads, levels, means, shares, grad_k, grad_v, grad_w, grad_u,
    num_tokens: tl.constexpr, channels, wide: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(1) * block + tl.arange(0, block)
    mask = channel < channels
    w = tl.load(decays + channel, mask, other=0).to(wide)
    u = tl.load(bonuses + channel, mask, other=0).to(wide)
    place = tl.program_id(0).to(tl.int64) * num_tokens * channels + channel
    s = tl.full(channel.shape, -1e30, wide)
    lost = tl.full(channel.shape, 0, wide)
    y = tl.full(channel.shape, 0, wide)
    for _ in range(num_tokens):
        k_n = tl.load(keys + place, mask, other=0).to(wide)
        v_n = tl.load(values + place, mask, other=0).to(wide)
        tl.store(levels + place, s, mask)
        tl.store(means + place, y, mask)
        kept, s, lost, y = _join(k_n, v_n, w, s, lost, y)
        tl.store(shares + place, kept, mask)
        place += channels
    dy = tl.full(channel.shape, 0, wide)
    ds = tl.full(channel.shape, 0, wide)
    dw = tl.full(channel.shape, 0, wide)
    du = tl.full(channel.shape, 0, wide)
    for _ in range(num_tokens):
        place -= channels
        k_n = tl.load(keys + place, mask, other=0).to(wide)
        v_n = tl.load(values + place, mask, other=0).to(wide)
        grad = tl.load(grads + place, mask, other=0).to(wide)
        s = tl.load(levels + place, mask, other=0)
        y = tl.load(means + place, mask, other=0)
        kept = tl.load(shares + place, mask, other=0)
        seen = _share(s, k_n, u)
        shift = dy * (y - v_n) * kept * (1 - kept)
        bonus = grad * (y - v_n) * seen * (1 - seen)
        new_v = (1 - kept) * dy + (1 - seen) * grad
        new_k = (1 - kept) * ds - shift - bonus
        tl.store(grad_v + place, new_v.to(grad_v.dtype.element_ty), mask)
        tl.store(grad_k + place, new_k.to(grad_k.dtype.element_ty), mask)
        past = kept * ds + shift
        dw -= past
        du -= bonus
        dy = kept * dy + seen * grad
        ds = past + bonus
    sequence = tl.program_id(0).to(tl.int64) * channels + channel
    tl.store(grad_w + sequence, dw, mask)
    tl.store(grad_u + sequence, du, mask)


def _grid(k: Tensor) -> tuple[tuple[int, int], dict[str, Any]]:
    sequences, num_tokens, channels = k.shape
    sizes = dict(num_tokens=num_tokens, channels=channels, wide=_wide(k), block=_CHANNELS, num_warps=_CHANNELS // 32)
    return (sequences, triton.cdiv(channels, _CHANNELS)), sizes


def wkv(k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> Tensor:
    """Returns WKV `(M, N, D)` of contiguous keys and values `(M, N, D)`, decay and bonus `(D,)`."""
    out = torch.empty_like(v)
    grid, sizes = _grid(k)
    with torch.cuda.device_of(k):
        _wkv[grid](k, v, w, u, out, **sizes)
    return out


def wkv_gradients(k: Tensor, v: Tensor, w: Tensor, u: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of keys, values, decay and bonus; the state before each token is computed again."""
    grad_k, grad_v = torch.empty_like(k), torch.empty_like(v)
    wide = torch.promote_types(k.dtype, torch.float32)
    levels, means, shares = (torch.empty_like(k, dtype=wide) for _ in range(3))
    grad_w, grad_u = (k.new_empty(k.shape[0], k.shape[2], dtype=wide) for _ in range(2))
    grid, sizes = _grid(k)
    with torch.cuda.device_of(k):
        _wkv_gradients[grid](k, v, w, u, grad, levels, means, shares, grad_k, grad_v, grad_w, grad_u, **sizes)
    return grad_k, grad_v, grad_w.sum(0).to(w.dtype), grad_u.sum(0).to(u.dtype)
