"""Triton kernels of WKV, all tokens in one launch; `systems.ops.wkv` has the equations."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from systems.ops.kernels.common import accumulator_dtype

_CHANNELS = 64
"""Channels per program."""


@triton.jit
def _next_state(k, v, w, s, error, y):
    """A step of `systems.ops.wkv._means`: the share of `y` in the mean after token `k, v`, and the state after it."""
    past = s - w
    error = error + (s - past - w)
    x = past - k + error
    ratio = tl.exp(-tl.abs(x))
    rest = tl.log(1 + ratio) + tl.where(x > 0, error, 0.0)
    kept = tl.where(x > 0, 1.0, ratio) / (1 + ratio)
    larger = tl.where(x > 0, past, k)
    s = larger + rest
    return kept, s, rest - (s - larger), v + kept * (y - v)


@triton.jit
def _share_of_past(s, k, u):
    """Share of the past in the output: `sigmoid(s - (u + k))` without overflow."""
    x = s - (u + k)
    small = tl.exp(-tl.abs(x))
    return tl.where(x > 0, 1.0, small) / (1 + small)


@triton.jit
def _wkv_kernel(
    keys, values, decays, bonuses, out, num_tokens: tl.constexpr, channels, acc_dtype: tl.constexpr, block: tl.constexpr
):
    """`keys`, `values`, `out` `(M, N, D)`; `decays`, `bonuses` `(D,)`; a program runs over the tokens of a sequence."""
    channel = tl.program_id(1) * block + tl.arange(0, block)
    mask = channel < channels
    w = tl.load(decays + channel, mask, other=0).to(acc_dtype)
    u = tl.load(bonuses + channel, mask, other=0).to(acc_dtype)
    offset = tl.program_id(0).to(tl.int64) * num_tokens * channels + channel
    s = tl.full(channel.shape, -1e30, acc_dtype)
    error = tl.full(channel.shape, 0, acc_dtype)
    y = tl.full(channel.shape, 0, acc_dtype)
    k, v = tl.load(keys + offset, mask, other=0), tl.load(values + offset, mask, other=0)
    for n in range(num_tokens):
        k_n, v_n = k.to(acc_dtype), v.to(acc_dtype)
        following = mask & (n + 1 < num_tokens)  # prefetched during the computation of this token
        k = tl.load(keys + offset + channels, following, other=0)
        v = tl.load(values + offset + channels, following, other=0)
        result = v_n + _share_of_past(s, k_n, u) * (y - v_n)
        tl.store(out + offset, result.to(out.dtype.element_ty), mask)
        _, s, error, y = _next_state(k_n, v_n, w, s, error, y)
        offset += channels


@triton.jit
def _wkv_gradients_kernel(
    keys, values, decays, bonuses, grads, log_weights, means, shares, grad_k, grad_v, grad_w, grad_u,
    num_tokens: tl.constexpr, channels, acc_dtype: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """`decays`, `bonuses` `(D,)`; `grad_w`, `grad_u` `(M, D)`, to be summed over `M`; all others `(M, N, D)`."""
    channel = tl.program_id(1) * block + tl.arange(0, block)
    mask = channel < channels
    w = tl.load(decays + channel, mask, other=0).to(acc_dtype)
    u = tl.load(bonuses + channel, mask, other=0).to(acc_dtype)
    offset = tl.program_id(0).to(tl.int64) * num_tokens * channels + channel
    s = tl.full(channel.shape, -1e30, acc_dtype)
    error = tl.full(channel.shape, 0, acc_dtype)
    y = tl.full(channel.shape, 0, acc_dtype)
    for _ in range(num_tokens):
        k_n = tl.load(keys + offset, mask, other=0).to(acc_dtype)
        v_n = tl.load(values + offset, mask, other=0).to(acc_dtype)
        tl.store(log_weights + offset, s, mask)
        tl.store(means + offset, y, mask)
        kept, s, error, y = _next_state(k_n, v_n, w, s, error, y)
        tl.store(shares + offset, kept, mask)
        offset += channels
    dy = tl.full(channel.shape, 0, acc_dtype)
    ds = tl.full(channel.shape, 0, acc_dtype)
    dw = tl.full(channel.shape, 0, acc_dtype)
    du = tl.full(channel.shape, 0, acc_dtype)
    for _ in range(num_tokens):
        offset -= channels
        k_n = tl.load(keys + offset, mask, other=0).to(acc_dtype)
        v_n = tl.load(values + offset, mask, other=0).to(acc_dtype)
        grad = tl.load(grads + offset, mask, other=0).to(acc_dtype)
        s = tl.load(log_weights + offset, mask, other=0)
        y = tl.load(means + offset, mask, other=0)
        kept = tl.load(shares + offset, mask, other=0)
        seen = _share_of_past(s, k_n, u)
        grad_x = dy * (y - v_n) * kept * (1 - kept)
        grad_logit = grad * (y - v_n) * seen * (1 - seen)
        new_v = (1 - kept) * dy + (1 - seen) * grad
        new_k = (1 - kept) * ds - grad_x - grad_logit
        tl.store(grad_v + offset, new_v.to(grad_v.dtype.element_ty), mask)
        tl.store(grad_k + offset, new_k.to(grad_k.dtype.element_ty), mask)
        grad_past = kept * ds + grad_x
        dw -= grad_past
        du -= grad_logit
        dy = kept * dy + seen * grad
        ds = grad_past + grad_logit
    sequence = tl.program_id(0).to(tl.int64) * channels + channel
    tl.store(grad_w + sequence, dw, mask)
    tl.store(grad_u + sequence, du, mask)


def _grid(k: Tensor) -> tuple[tuple[int, int], dict[str, Any]]:
    """Grid and sizes of both kernels."""
    sequences, num_tokens, channels = k.shape
    sizes = dict(
        num_tokens=num_tokens,
        channels=channels,
        acc_dtype=accumulator_dtype(k),
        block=_CHANNELS,
        num_warps=_CHANNELS // 32,
    )
    return (sequences, triton.cdiv(channels, _CHANNELS)), sizes


def wkv(k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> Tensor:
    """Returns WKV `(M, N, D)` of contiguous keys and values `(M, N, D)`, decay and bonus `(D,)`."""
    out = torch.empty_like(v)
    grid, sizes = _grid(k)
    with torch.cuda.device_of(k):
        _wkv_kernel[grid](k, v, w, u, out, **sizes)
    return out


def wkv_gradients(k: Tensor, v: Tensor, w: Tensor, u: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of keys, values, decay and bonus; recomputes the state before each token."""
    grad_k, grad_v = torch.empty_like(k), torch.empty_like(v)
    dtype = torch.promote_types(k.dtype, torch.float32)
    log_weights, means, shares = (torch.empty_like(k, dtype=dtype) for _ in range(3))
    grad_w, grad_u = (k.new_empty(k.shape[0], k.shape[2], dtype=dtype) for _ in range(2))
    grid, sizes = _grid(k)
    with torch.cuda.device_of(k):
        _wkv_gradients_kernel[grid](
            k, v, w, u, grad, log_weights, means, shares, grad_k, grad_v, grad_w, grad_u, **sizes
        )
    return grad_k, grad_v, grad_w.sum(0).to(w.dtype), grad_u.sum(0).to(u.dtype)
