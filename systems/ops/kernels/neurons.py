"""Triton kernels of neurons over all SNN time steps."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from systems.ops.kernels.common import _countable, _wide
from systems.ops.kernels.norms import _norm_of

SURROGATES = ("atan", "triangle", "rectangle")
"""Surrogate gradients that kernels know, of the width that `systems.spiking.surrogates.get_surrogate` gives them."""

_WARPS = 4


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
