"""Triton kernels of GPUs: neurons over all SNN time steps, norms in what follows them, token shift, and WKV.

A compiler that is given the same arithmetic makes of it a kernel or two for each few steps; here it is one launch each
way, and no more than inputs and outputs go through memory. `systems.neurons`, `norms`, `spiking_transformer` and `wkv`
define what is computed, and do it themselves where there are no kernels. Shapes, sizes and layouts are theirs to check.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

SURROGATES = ("atan", "triangle", "rectangle")
"""Surrogate gradients that kernels know, of the width that `systems.neurons.get_surrogate` gives them."""

_WARPS = 4
_CHANNELS = 64
"""Channels of a program of WKV."""


@triton.jit
def _charge(
    x, place, mask, v, factor, summand, shift, input_scale: tl.constexpr, normed: tl.constexpr, wide: tl.constexpr
):
    u = tl.load(x + place, mask, other=0).to(wide)
    if normed:
        u = u * factor + summand + shift
    return u * input_scale + v


@triton.jit
def _fire(u, threshold: tl.constexpr, at_threshold: tl.constexpr):
    if at_threshold:
        s = u >= threshold
    else:
        s = u > threshold
    return s


@triton.jit
def _carry(u, s, beta: tl.constexpr, threshold: tl.constexpr, hard: tl.constexpr, delayed: tl.constexpr):
    if hard:
        v = tl.where(s, 0.0, u) * beta
    elif delayed:
        v = u * beta - tl.where(s, threshold, 0.0)
    else:
        v = (u - tl.where(s, threshold, 0.0)) * beta
    return v


@triton.jit
def _slope(u, surrogate: tl.constexpr):
    if surrogate == "atan":
        scaled = u * 3.141592653589793
        slope = 1 / (1 + scaled * scaled)
    elif surrogate == "triangle":
        slope = tl.maximum(1 - tl.abs(u) / 0.5, 0.0)
    else:
        slope = tl.where(tl.abs(u) < 0.5, 1.0, 0.0) + u * 0
    return slope


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
def _spikes(
    x, out, factors, summands, shifts, n, channels, pixels, image,
    num_steps: tl.constexpr, beta: tl.constexpr, threshold: tl.constexpr, input_scale: tl.constexpr,
    hard: tl.constexpr, delayed: tl.constexpr, at_threshold: tl.constexpr,
    normed: tl.constexpr, shifted: tl.constexpr, wide: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0) * block + tl.arange(0, block)
    place, mask = index.to(tl.int64), index < n
    factor, summand, shift = _norm_of(
        index, mask, factors, summands, shifts, channels, pixels, image, normed, shifted, wide
    )
    v = tl.full(place.shape, 0, wide)
    for k in tl.static_range(num_steps):
        u = _charge(x + k * n, place, mask, v, factor, summand, shift, input_scale, normed, wide)
        s = _fire(u, threshold, at_threshold)
        tl.store(out + k * n + place, tl.where(s, 1.0, 0.0).to(out.dtype.element_ty), mask)
        v = _carry(u, s, beta, threshold, hard, delayed)


@triton.jit
def _gradients(
    x, grads, out, factors, summands, shifts, n, channels, pixels, image,
    num_steps: tl.constexpr, beta: tl.constexpr, threshold: tl.constexpr, input_scale: tl.constexpr,
    hard: tl.constexpr, delayed: tl.constexpr, at_threshold: tl.constexpr, detached: tl.constexpr,
    surrogate: tl.constexpr, normed: tl.constexpr, shifted: tl.constexpr, wide: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0) * block + tl.arange(0, block)
    place, mask = index.to(tl.int64), index < n
    factor, summand, shift = _norm_of(
        index, mask, factors, summands, shifts, channels, pixels, image, normed, shifted, wide
    )
    v = tl.full(place.shape, 0, wide)
    potentials = ()
    for k in tl.static_range(num_steps):
        u = _charge(x + k * n, place, mask, v, factor, summand, shift, input_scale, normed, wide)
        potentials = potentials + (u,)  # type: ignore[assignment]  # noqa: RUF005
        v = _carry(u, _fire(u, threshold, at_threshold), beta, threshold, hard, delayed)
    carried = tl.full(place.shape, 0, wide)  # gradient of the next potential
    for k in tl.static_range(num_steps - 1, -1, -1):
        u = potentials[k]
        slope = _slope(u - threshold, surrogate)
        grad = tl.load(grads + k * n + place, mask, other=0).to(wide) * slope
        if k < num_steps - 1:
            attached = slope
            if detached:
                attached = slope * 0
            if hard:
                decayed = beta * (tl.where(_fire(u, threshold, at_threshold), 0.0, 1.0) - u * attached)
            elif delayed:
                decayed = beta - threshold * attached
            else:
                decayed = beta * (1 - threshold * attached)
            grad += carried * decayed
        carried = grad
        tl.store(out + k * n + place, (grad * input_scale).to(out.dtype.element_ty), mask)


def _options(
    x: Tensor, d: Any, affine: tuple[Tensor, Tensor] | None, pixels: int, shift: Tensor | None
) -> dict[str, Any]:
    num_steps = len(x)
    factors, summands = (x, x) if affine is None else affine
    n = x.numel() // num_steps
    return dict(
        factors=factors,
        summands=summands,
        shifts=x if shift is None else shift,
        n=_countable(n),
        channels=factors.numel(),
        pixels=pixels,
        image=n if shift is None else n // len(shift),
        num_steps=num_steps,
        beta=d.beta,
        threshold=d.threshold,
        input_scale=d.input_scale,
        hard=d.reset_mechanism == "zero",
        delayed=d.reset_delay,
        at_threshold=d.fire_at_threshold,
        normed=affine is not None,
        shifted=shift is not None,
        wide=_wide(x),
        block=1024 if num_steps <= 4 else 512 if num_steps <= 8 else 256,
        num_warps=_WARPS,
    )


def _countable(n: int) -> int:
    """Returns a number of elements that 32 bits can count.

    Raises:
        ValueError: If they cannot.
    """
    if n >= 2**31:
        raise ValueError(f"{n} features at once are more than the GPU's kernels count; give a smaller batch")
    return n


def _wide(x: Tensor) -> Any:
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def spikes(
    x: Tensor,
    d: Any,
    dtype: torch.dtype,
    affine: tuple[Tensor, Tensor] | None = None,
    pixels: int = 1,
    shift: Tensor | None = None,
) -> Tensor:
    """Returns the spikes of currents `(T, ...)`, both in the order of the memory of `x`.

    Args:
        x: Dense currents.
        d: Constants of the neuron.
        dtype: Type of the spikes.
        affine: Factor and summand of a norm for each channel, `(C,)`.
        pixels: Elements of a channel that lie side by side; 1 with channels last.
        shift: What is added after the norm, `(B, C)`.
    """
    out = torch.empty_like(x, dtype=dtype)
    options = _options(x, d, affine, pixels, shift)
    with torch.cuda.device_of(x):
        _spikes[(triton.cdiv(options["n"], options["block"]),)](x, out, **options)
    return out


def gradients(
    x: Tensor,
    grad: Tensor,
    d: Any,
    surrogate: str,
    affine: tuple[Tensor, Tensor] | None = None,
    pixels: int = 1,
    shift: Tensor | None = None,
) -> Tensor:
    """Returns the gradients of what `spikes` charges the neurons with; other arguments are its.

    Args:
        x: Dense currents.
        grad: Gradients of the spikes, in the memory order of `x`.
        d: Constants of the neuron.
        surrogate: One of `SURROGATES`.
        affine: Factor and summand of a norm for each channel, `(C,)`.
        pixels: Elements of a channel that lie side by side.
        shift: What is added after the norm, `(B, C)`.
    """
    out = torch.empty_like(x)
    options = _options(x, d, affine, pixels, shift) | {"detached": d.detach_reset, "surrogate": surrogate}
    with torch.cuda.device_of(x):
        _gradients[(triton.cdiv(options["n"], options["block"]),)](x, grad, out, **options)
    return out


# Norms


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


# Token shift


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


# WKV


@triton.jit
def _join(k, v, w, s, lost, y):
    """One token of `systems.wkv._means`: the share of `y` in the mean after it, and the state after it."""
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
