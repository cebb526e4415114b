"""Neurons over all SNN time steps at once: forward and backward passes, compiled or as Triton kernels."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.fx.experimental.proxy_tensor import make_fx

from systems.ops.compiled import compiled, dense, has_triton, laid_out_as, memory
from systems.ops.norms import (
    BatchNorm,
    BatchStatistics,
    batch_norm_backward,
    batch_statistics,
    by_channel,
    for_channels,
    pixels,
)
from systems.spiking.surrogates import SpikeGrad, get_surrogate

TAKE_BACK_BELOW = 1e-3
"""Minus the potential at which a signed `ConvertedNeuron` takes a spike back, in units of its current, as released."""


_Affine = tuple[Tensor, Tensor]
"""Factor and summand of a norm for each channel."""


class _Dynamics(NamedTuple):
    beta: float
    threshold: float
    input_scale: float
    reset_mechanism: str
    reset_delay: bool
    detach_reset: bool
    fire_at_threshold: bool


def _fire(u: Tensor, d: _Dynamics) -> Tensor:
    return (u >= d.threshold if d.fire_at_threshold else u > d.threshold).to(u.dtype)


def _carry(u: Tensor, s: Tensor, d: _Dynamics) -> Tensor:
    """The potential handed to the next step: reset and decay of `U[k]`."""
    if d.reset_mechanism == "zero":
        return d.beta * ((1 - s) * u)
    if d.reset_delay:
        return d.beta * u - s * d.threshold
    return d.beta * (u - s * d.threshold)


def _potentials(x: Tensor, d: _Dynamics, affine: _Affine | None = None) -> tuple[list[Tensor], list[Tensor]]:
    dtype = torch.promote_types(x.dtype, torch.float32)  # potentials stay in float32 under mixed precision
    potentials: list[Tensor] = []
    spikes: list[Tensor] = []
    for x_k in x.unbind(0):
        u = x_k.to(dtype)
        if affine is not None:
            u = torch.addcmul(affine[1], u, affine[0])  # rounded as in the norm itself
        u = u * d.input_scale
        if potentials:
            u = u + _carry(potentials[-1], spikes[-1], d)
        potentials.append(u)
        spikes.append(_fire(u, d))
    return potentials, spikes


@compiled
def _forward(x: Tensor, d: _Dynamics, dtype: torch.dtype, affine: _Affine | None = None) -> Tensor:
    spikes = _potentials(x, d, affine)[1]
    return torch.stack([s.to(dtype) for s in spikes])  # all in one kernel, if converted before


@compiled
def _backward(
    x: Tensor, grad: Tensor, d: _Dynamics, derivative: Callable[[Tensor], Tensor], affine: _Affine | None = None
) -> Tensor:
    """Backpropagation through time; the potentials are computed again, which is cheaper than keeping them."""
    potentials, spikes = _potentials(x, d, affine)
    grads: list[Tensor] = []
    carried: Tensor | None = None  # dL/dU[k+1]
    for u, s, g in zip(reversed(potentials), reversed(spikes), reversed(grad.unbind(0)), strict=True):
        ds_du = derivative(u - d.threshold)
        dl_du = g.to(u.dtype) * ds_du
        if carried is not None:
            attached = torch.zeros_like(ds_du) if d.detach_reset else ds_du
            if d.reset_mechanism == "zero":
                dv_du = d.beta * (1 - s - u * attached)
            elif d.reset_delay:
                dv_du = d.beta - d.threshold * attached
            else:
                dv_du = d.beta * (1 - d.threshold * attached)
            dl_du = dl_du + carried * dv_du
        carried = dl_du
        grads.append((dl_du * d.input_scale).to(x.dtype))
    return torch.stack(grads[::-1])


def _converted(x: Tensor, threshold: Tensor, height: Tensor, signed: bool) -> Tensor:
    """Spikes of `ConvertedNeuron`."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    threshold = threshold.to(dtype)
    v = threshold / 2
    count = torch.zeros_like(x[0], dtype=dtype)
    spikes: list[Tensor] = []
    for x_k in x.unbind(0):
        v = v + x_k.to(dtype)
        s = (v >= threshold).to(dtype)
        v = v - threshold * s
        if signed:
            count = count + s
            taken_back = ((v <= -TAKE_BACK_BELOW) & (count > 0)).to(dtype)
            v = v + threshold * taken_back
            count = count - taken_back
            s = s - taken_back
        spikes.append((s * height).to(x.dtype))
    return torch.stack(spikes)


_converted_compiled = compiled(_converted)


@lru_cache
def _derivative(spike_grad: SpikeGrad, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Traces the surrogate's derivative `dS/du` into a graph of plain operations that the compiler can fuse."""

    def derivative(u: Tensor) -> Tensor:
        u = u.detach().requires_grad_()
        with torch.enable_grad():
            return torch.autograd.grad(spike_grad(u), u, torch.ones_like(u))[0]

    return make_fx(derivative)(torch.zeros(4, dtype=dtype))


def _surrogate_of_kernels(x: Tensor, spike_grad: SpikeGrad) -> str | None:
    """Name of the surrogate where there are kernels for it and for the device of `x`, else nothing."""
    if not (x.is_cuda and has_triton()):
        return None
    from systems.ops.kernels import neurons as kernels

    return _named(spike_grad, kernels.SURROGATES)


@lru_cache
def _named(spike_grad: SpikeGrad, names: tuple[str, ...]) -> str | None:
    """Name of a surrogate, if it is one of these."""
    return next((name for name in names if get_surrogate(name) is spike_grad), None)


def _spikes(
    x: Tensor, d: _Dynamics, spike_grad: SpikeGrad, affine: _Affine | None = None, shift: Tensor | None = None
) -> Tensor:
    """Returns the spikes of dense currents `(T, ...)`, in the order of their memory.

    Args:
        x: Currents, or what a norm makes them of.
        d: Constants of the neuron.
        spike_grad: Its surrogate.
        affine: Factor and summand of that norm.
        shift: What is added after it, `(B, C)`; for kernels alone.
    """
    if _surrogate_of_kernels(x, spike_grad):
        from systems.ops.kernels import neurons as kernels

        return kernels.spikes(x, d, _spike_dtype(x), affine, pixels(x), shift)
    if affine is None:
        spikes = _forward(memory(x, len(x), -1), d, _spike_dtype(x))
    else:
        spikes = _forward(by_channel(x, x), d, _spike_dtype(x), for_channels(affine, x))
    return spikes.as_strided(x.shape, x.stride())


def _gradients(
    x: Tensor,
    grad: Tensor,
    d: _Dynamics,
    spike_grad: SpikeGrad,
    affine: _Affine | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """Returns the gradients of what `_spikes` charges the neurons with, in the order of the memory of `x`."""
    grad = laid_out_as(x, grad)
    if surrogate := _surrogate_of_kernels(x, spike_grad):
        from systems.ops.kernels import neurons as kernels

        return kernels.gradients(x, grad, d, surrogate, affine, pixels(x), shift)
    derivative = _derivative(spike_grad, torch.promote_types(x.dtype, torch.float32))
    if affine is None:
        found = _backward(memory(x, len(x), -1), memory(grad, len(x), -1), d, derivative)
    else:
        found = _backward(by_channel(x, x), by_channel(grad, x), d, derivative, for_channels(affine, x))
    return found.as_strided(x.shape, x.stride())


class _MultiStep(torch.autograd.Function):
    """Forward and backward over all `T` steps at once; keeps only its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, d: _Dynamics, spike_grad: SpikeGrad) -> Tensor:
        x = dense(x)
        ctx.save_for_backward(x)
        ctx.d, ctx.spike_grad = d, spike_grad
        return _spikes(x, d, spike_grad)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        return _gradients(x, grad, ctx.d, ctx.spike_grad), None, None


class _NormedMultiStep(torch.autograd.Function):
    """`_MultiStep` of a batch norm of its input and a shift, whose sum is neither written to memory nor kept."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        shift: Tensor | None,
        norm: BatchNorm,
        d: _Dynamics,
        spike_grad: SpikeGrad,
    ) -> Tensor:
        x = dense(x) if x.dim() == 5 else x.contiguous()  # the channels of tokens come last in memory
        shift = None if shift is None else shift.contiguous()
        statistics = batch_statistics(norm, x, weight, bias)
        ctx.save_for_backward(x, weight, shift, *statistics)
        ctx.norm, ctx.training, ctx.d, ctx.spike_grad = norm, norm.training, d, spike_grad
        return _spikes(x, d, spike_grad, (statistics.factor, statistics.summand), shift)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, shift, *rest = ctx.saved_tensors
        statistics = BatchStatistics(*rest)
        affine = statistics.factor, statistics.summand
        found = _gradients(x, grad, ctx.d, ctx.spike_grad, affine, shift)
        grads = batch_norm_backward(ctx.norm, ctx.training, x, found, weight, statistics)
        return *grads, None if shift is None else found.sum((0, 3, 4)).to(shift.dtype), None, None, None


def _spike_dtype(x: Tensor) -> torch.dtype:
    """Spikes are exact in any type, so under autocast they come in that of the products that take them."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
