"""Triton kernels of neurons over all SNN time steps, with the batch norm and time embedding before them.

    u[k] = input_scale * (scale * x[k] + shift + temb) + carry(u[k-1], s[k-1])
    s[k] = 1 if u[k] > threshold (or >=) else 0

Each program computes all `T` steps of `block` elements, so that potentials stay in registers.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from systems.ops.kernels.common import accumulator_dtype, check_int32_range
from systems.ops.kernels.norms import load_norm

SURROGATES = ("atan", "triangle", "rectangle")
"""Surrogate gradients that the kernels support, in the default width of `systems.spiking.surrogates.get_surrogate`."""

_WARPS = 4


@triton.jit
def _charge(
    x, offset, mask, v, scale, shift, temb, input_scale: tl.constexpr, has_norm: tl.constexpr, acc_dtype: tl.constexpr
):
    """Potential `(block,)` of a step, from its currents and the potential `v` carried from the step before."""
    u = tl.load(x + offset, mask, other=0).to(acc_dtype)
    if has_norm:
        u = u * scale + shift + temb
    return u * input_scale + v


@triton.jit
def _fire(u, threshold: tl.constexpr, fires_at_threshold: tl.constexpr):
    """Whether each potential `(block,)` fires."""
    if fires_at_threshold:
        s = u >= threshold
    else:
        s = u > threshold
    return s


@triton.jit
def _reset_and_decay(
    u, s, beta: tl.constexpr, threshold: tl.constexpr, hard_reset: tl.constexpr, reset_after_decay: tl.constexpr
):
    """Potential `(block,)` carried to the next step."""
    if hard_reset:
        v = tl.where(s, 0.0, u) * beta
    elif reset_after_decay:
        v = u * beta - tl.where(s, threshold, 0.0)
    else:
        v = (u - tl.where(s, threshold, 0.0)) * beta
    return v


@triton.jit
def _surrogate_derivative(u, surrogate: tl.constexpr):
    """Derivative `ds/du` `(block,)`; `u` is the potential minus the threshold."""
    if surrogate == "atan":
        scaled = u * 3.141592653589793
        ds_du = 1 / (1 + scaled * scaled)
    elif surrogate == "triangle":
        ds_du = tl.maximum(1 - tl.abs(u) / 0.5, 0.0)
    else:
        ds_du = tl.where(tl.abs(u) < 0.5, 1.0, 0.0) + u * 0
    return ds_du


@triton.jit
def _spikes_kernel(
    x, out, scales, shifts, tembs, n, channels, channel_stride, image_size,
    num_steps: tl.constexpr, beta: tl.constexpr, threshold: tl.constexpr, input_scale: tl.constexpr,
    hard_reset: tl.constexpr, reset_after_decay: tl.constexpr, fires_at_threshold: tl.constexpr,
    has_norm: tl.constexpr, has_temb: tl.constexpr, acc_dtype: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """`x`, `out` `(T, n)` with `n` the size of `(B, C, H, W)`; `scales`, `shifts` `(C,)`; `tembs` `(B, C)`."""
    index = tl.program_id(0) * block + tl.arange(0, block)
    offset, mask = index.to(tl.int64), index < n
    scale, shift, temb = load_norm(
        index, mask, scales, shifts, tembs, channels, channel_stride, image_size, has_norm, has_temb, acc_dtype
    )
    v = tl.full(offset.shape, 0, acc_dtype)
    for k in tl.static_range(num_steps):
        u = _charge(x + k * n, offset, mask, v, scale, shift, temb, input_scale, has_norm, acc_dtype)
        s = _fire(u, threshold, fires_at_threshold)
        tl.store(out + k * n + offset, tl.where(s, 1.0, 0.0).to(out.dtype.element_ty), mask)
        v = _reset_and_decay(u, s, beta, threshold, hard_reset, reset_after_decay)


@triton.jit
def _gradients_kernel(
    x, grads, out, scales, shifts, tembs, n, channels, channel_stride, image_size,
    num_steps: tl.constexpr, beta: tl.constexpr, threshold: tl.constexpr, input_scale: tl.constexpr,
    hard_reset: tl.constexpr, reset_after_decay: tl.constexpr, fires_at_threshold: tl.constexpr,
    detach_reset: tl.constexpr, surrogate: tl.constexpr,
    has_norm: tl.constexpr, has_temb: tl.constexpr, acc_dtype: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """`x`, `grads`, `out` `(T, n)` with `n` the size of `(B, C, H, W)`; `scales`, `shifts` `(C,)`; `tembs` `(B, C)`."""
    index = tl.program_id(0) * block + tl.arange(0, block)
    offset, mask = index.to(tl.int64), index < n
    scale, shift, temb = load_norm(
        index, mask, scales, shifts, tembs, channels, channel_stride, image_size, has_norm, has_temb, acc_dtype
    )
    v = tl.full(offset.shape, 0, acc_dtype)
    potentials = ()
    for k in tl.static_range(num_steps):
        u = _charge(x + k * n, offset, mask, v, scale, shift, temb, input_scale, has_norm, acc_dtype)
        potentials = potentials + (u,)  # type: ignore[assignment]  # noqa: RUF005
        v = _reset_and_decay(u, _fire(u, threshold, fires_at_threshold), beta, threshold, hard_reset, reset_after_decay)
    next_dl_du = tl.full(offset.shape, 0, acc_dtype)  # dL/du[k+1]
    for k in tl.static_range(num_steps - 1, -1, -1):
        u = potentials[k]
        ds_du = _surrogate_derivative(u - threshold, surrogate)
        dl_du = tl.load(grads + k * n + offset, mask, other=0).to(acc_dtype) * ds_du
        if k < num_steps - 1:
            reset_ds_du = ds_du
            if detach_reset:
                reset_ds_du = ds_du * 0
            if hard_reset:
                dcarry_du = beta * (tl.where(_fire(u, threshold, fires_at_threshold), 0.0, 1.0) - u * reset_ds_du)
            elif reset_after_decay:
                dcarry_du = beta - threshold * reset_ds_du
            else:
                dcarry_du = beta * (1 - threshold * reset_ds_du)
            dl_du += next_dl_du * dcarry_du
        next_dl_du = dl_du
        tl.store(out + k * n + offset, (dl_du * input_scale).to(out.dtype.element_ty), mask)


def _options(
    x: Tensor, d: Any, affine: tuple[Tensor, Tensor] | None, channel_stride: int, temb: Tensor | None
) -> dict[str, Any]:
    """Arguments shared by both kernels; a missing norm or time embedding is replaced by `x`, which is not read."""
    num_steps = len(x)
    scales, shifts = (x, x) if affine is None else affine
    n = x.numel() // num_steps
    return dict(
        scales=scales,
        shifts=shifts,
        tembs=x if temb is None else temb,
        n=check_int32_range(n),
        channels=scales.numel(),
        channel_stride=channel_stride,
        image_size=n if temb is None else n // len(temb),
        num_steps=num_steps,
        beta=d.beta,
        threshold=d.threshold,
        input_scale=d.input_scale,
        hard_reset=d.reset_mechanism == "zero",
        reset_after_decay=d.reset_delay,
        fires_at_threshold=d.fire_at_threshold,
        has_norm=affine is not None,
        has_temb=temb is not None,
        acc_dtype=accumulator_dtype(x),
        block=1024 if num_steps <= 4 else 512 if num_steps <= 8 else 256,
        num_warps=_WARPS,
    )


def spikes(
    x: Tensor,
    d: Any,
    dtype: torch.dtype,
    affine: tuple[Tensor, Tensor] | None = None,
    channel_stride: int = 1,
    temb: Tensor | None = None,
) -> Tensor:
    """Returns the spikes of currents `(T, ...)` in the memory layout of `x`.

    Args:
        x: Dense currents, before the norm if `affine` is given.
        d: Constants of the neuron (`systems.spiking.multistep.Dynamics`).
        dtype: Dtype of the spikes.
        affine: Scale and shift of the norm, `(C,)` each.
        channel_stride: Stride of the channels in memory (see `systems.ops.norms.channel_stride`).
        temb: Time embedding `(B, C)`, added after the norm.
    """
    out = torch.empty_like(x, dtype=dtype)
    options = _options(x, d, affine, channel_stride, temb)
    with torch.cuda.device_of(x):
        _spikes_kernel[(triton.cdiv(options["n"], options["block"]),)](x, out, **options)
    return out


def gradients(
    x: Tensor,
    grad: Tensor,
    d: Any,
    surrogate: str,
    affine: tuple[Tensor, Tensor] | None = None,
    channel_stride: int = 1,
    temb: Tensor | None = None,
) -> Tensor:
    """Returns the gradients of the neuron's input, `scale * x + shift + temb`, in the memory layout of `x`.

    Args:
        x: Dense currents `(T, ...)`, before the norm if `affine` is given.
        grad: Gradients of the spikes, in the memory layout of `x`.
        d: Constants of the neuron.
        surrogate: One of `SURROGATES`.
        affine: Scale and shift of the norm, `(C,)` each.
        channel_stride: Stride of the channels in memory.
        temb: Time embedding `(B, C)`, added after the norm.
    """
    out = torch.empty_like(x)
    options = _options(x, d, affine, channel_stride, temb)
    options |= {"detach_reset": d.detach_reset, "surrogate": surrogate}
    with torch.cuda.device_of(x):
        _gradients_kernel[(triton.cdiv(options["n"], options["block"]),)](x, grad, out, **options)
    return out
