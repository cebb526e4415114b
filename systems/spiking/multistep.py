"""Forward and backward passes of neurons over all `T` SNN time steps at once, as compiled functions or Triton kernels.

For input `x[k]`, potential `u[k]` and spikes `s[k]` of step `k`, with `carry(u[-1], s[-1]) = 0`,

    u[k] = input_scale * (scale * x[k] + shift + temb) + carry(u[k-1], s[k-1])
    s[k] = 1 if u[k] > threshold (or >=) else 0

`scale` and `shift` are a batch norm of each channel, `temb` the time embedding of each image and channel; without a
norm the parenthesis is `x[k]`. `reset_and_decay` defines `carry`. Its decay `beta` and the threshold are numbers, or
scalar tensors whose gradients the same backward pass computes.
"""

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
    Affine,
    BatchNorm,
    BatchStatistics,
    batch_norm_backward,
    batch_statistics,
    by_channel,
    channel_stride,
    for_channels,
)
from systems.spiking.surrogates import SpikeGrad, get_surrogate

TAKE_BACK_BELOW = 1e-3
"""A signed `ConvertedNeuron` emits a negative spike once its potential falls below minus this value (as released)."""


class Dynamics(NamedTuple):
    """Constants of a `SpikingNeuron`, by the names of its arguments; learned ones are scalar tensors."""

    beta: float | Tensor
    threshold: float | Tensor
    input_scale: float
    reset_mechanism: str
    reset_delay: bool
    detach_reset: bool
    fire_at_threshold: bool


def fire(u: Tensor, d: Dynamics) -> Tensor:
    """Returns the spikes of potentials, 0 or 1, in the dtype of `u`."""
    return (u >= d.threshold if d.fire_at_threshold else u > d.threshold).to(u.dtype)


def reset_and_decay(u: Tensor, s: Tensor, d: Dynamics) -> Tensor:
    """Returns the potential carried to the next step, given the potentials and spikes of this one."""
    if d.reset_mechanism == "zero":
        return d.beta * ((1 - s) * u)
    if d.reset_delay:
        return d.beta * u - s * d.threshold
    return d.beta * (u - s * d.threshold)


def potentials_and_spikes(x: Tensor, d: Dynamics, affine: Affine | None = None) -> tuple[list[Tensor], list[Tensor]]:
    """Returns potentials and spikes of each step, in float32 or more.

    Args:
        x: Input currents `(T, ...)`, before the norm if `affine` is given.
        d: Constants of the neuron.
        affine: Scale and shift of the norm, in shapes that broadcast with `x[k]`.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)  # potentials stay in float32 under mixed precision
    potentials: list[Tensor] = []
    spikes: list[Tensor] = []
    for x_k in x.unbind(0):
        u = x_k.to(dtype)
        if affine is not None:
            scale, shift = affine
            u = torch.addcmul(shift, u, scale)  # rounded as in the norm itself
        u = u * d.input_scale
        if potentials:
            u = u + reset_and_decay(potentials[-1], spikes[-1], d)
        potentials.append(u)
        spikes.append(fire(u, d))
    return potentials, spikes


@compiled
def _forward(x: Tensor, d: Dynamics, dtype: torch.dtype, affine: Affine | None = None) -> Tensor:
    spikes = potentials_and_spikes(x, d, affine)[1]
    return torch.stack([s.to(dtype) for s in spikes])  # convert before stacking, so that the compiler fuses both


@compiled
def _backward(
    x: Tensor, grad: Tensor, d: Dynamics, derivative: Callable[[Tensor], Tensor], affine: Affine | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Backpropagation through time; recomputes the potentials, which is cheaper than storing them.

    Returns:
        The gradients of the neuron's input, of `beta` and of the threshold, each of the latter None unless learned.
    """
    potentials, spikes = potentials_and_spikes(x, d, affine)
    grads: list[Tensor] = []
    dl_dbeta: Tensor | None = None
    dl_dthreshold: Tensor | None = None
    next_dl_du: Tensor | None = None  # dL/du[k+1]
    for u, s, g in zip(reversed(potentials), reversed(spikes), reversed(grad.unbind(0)), strict=True):
        ds_du = derivative(u - d.threshold)
        dl_du = g.to(u.dtype) * ds_du
        if next_dl_du is not None:
            reset_ds_du = torch.zeros_like(ds_du) if d.detach_reset else ds_du
            if isinstance(d.beta, Tensor):
                dl_dbeta = _plus(dl_dbeta, next_dl_du * _carry_by_beta(u, s, d))
            if isinstance(d.threshold, Tensor):
                dl_dthreshold = _plus(dl_dthreshold, next_dl_du * _carry_by_shift(s, d))
            if d.reset_mechanism == "zero":
                dcarry_du = d.beta * (1 - s - u * reset_ds_du)
            elif d.reset_delay:
                dcarry_du = d.beta - d.threshold * reset_ds_du
            else:
                dcarry_du = d.beta * (1 - d.threshold * reset_ds_du)
            dl_du = dl_du + next_dl_du * dcarry_du
        if isinstance(d.threshold, Tensor):
            dl_dthreshold = _plus(dl_dthreshold, -dl_du)
        next_dl_du = dl_du
        grads.append((dl_du * d.input_scale).to(x.dtype))
    if isinstance(d.beta, Tensor) and dl_dbeta is None:  # a single step carries nothing
        dl_dbeta = torch.zeros_like(potentials[0])
    return torch.stack(grads[::-1]), _sum(dl_dbeta), _sum(dl_dthreshold)


def _plus(total: Tensor | None, term: Tensor) -> Tensor:
    return term if total is None else total + term


def _sum(terms: Tensor | None) -> Tensor | None:
    return None if terms is None else terms.sum()


def _carry_by_beta(u: Tensor, s: Tensor, d: Dynamics) -> Tensor:
    """Returns `dcarry/dbeta` for given potentials and spikes."""
    if d.reset_mechanism == "zero":
        return (1 - s) * u
    return u if d.reset_delay else u - s * d.threshold


def _carry_by_shift(s: Tensor, d: Dynamics) -> Tensor | float:
    """Returns `dcarry/du + dcarry/dthreshold` for given spikes.

    Spikes depend on `u - threshold`, so that what passes through them cancels in `dL/du[k] + dL/dthreshold[k]`, the
    effect of shifting potential and threshold together: only this remains, times `dL/du[k+1]`.
    """
    if d.reset_mechanism == "zero":
        return d.beta * (1 - s)
    return d.beta - s if d.reset_delay else d.beta * (1 - s)


def converted_spikes(x: Tensor, threshold: Tensor, amplitude: Tensor, signed: bool) -> Tensor:
    """Returns the spikes of a `ConvertedNeuron`.

    Args:
        x: Input currents `(T, ...)`.
        threshold: Firing threshold, a scalar.
        amplitude: Amplitude of a spike, a scalar.
        signed: Whether a negative spike takes back an earlier one when the potential turns negative.
    """
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
        spikes.append((s * amplitude).to(x.dtype))
    return torch.stack(spikes)


converted_spikes_compiled = compiled(converted_spikes)


@lru_cache
def surrogate_derivative(spike_grad: SpikeGrad, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Traces the surrogate's derivative `ds/du` into a graph of plain operations that the compiler can fuse."""

    def derivative(u: Tensor) -> Tensor:
        u = u.detach().requires_grad_()
        with torch.enable_grad():
            return torch.autograd.grad(spike_grad(u), u, torch.ones_like(u))[0]

    return make_fx(derivative)(torch.zeros(4, dtype=dtype))


def is_learned(d: Dynamics) -> bool:
    """Whether the decay or the threshold is learned."""
    return isinstance(d.beta, Tensor) or isinstance(d.threshold, Tensor)


def kernel_surrogate(x: Tensor, d: Dynamics, spike_grad: SpikeGrad) -> str | None:
    """Name of the surrogate if a Triton kernel supports it on the device of `x`, else None.

    The kernels contain decay and threshold as constants: neurons that learn them use the compiled functions.
    """
    if is_learned(d) or not (x.is_cuda and has_triton()):
        return None
    from systems.ops.kernels import neurons as kernels

    return surrogate_name(spike_grad, kernels.SURROGATES)


@lru_cache
def surrogate_name(spike_grad: SpikeGrad, names: tuple[str, ...]) -> str | None:
    """Name of a surrogate if it is one of `names` in its default width, else None."""
    return next((name for name in names if get_surrogate(name) is spike_grad), None)


def compute_spikes(
    x: Tensor, d: Dynamics, spike_grad: SpikeGrad, affine: Affine | None = None, temb: Tensor | None = None
) -> Tensor:
    """Returns the spikes of dense currents `(T, ...)`, in the memory layout of `x`.

    Args:
        x: Input currents, before the norm if `affine` is given.
        d: Constants of the neuron.
        spike_grad: Surrogate gradient of the neuron.
        affine: Scale and shift of the norm, `(C,)` each.
        temb: Time embedding `(B, C)`, added after the norm; only where `kernel_surrogate` finds a kernel.
    """
    if kernel_surrogate(x, d, spike_grad):
        from systems.ops.kernels import neurons as kernels

        return kernels.spikes(x, d, spike_dtype(x), affine, channel_stride(x), temb)
    if affine is None:
        spikes = _forward(memory(x, len(x), -1), d, spike_dtype(x))
    else:
        spikes = _forward(by_channel(x, x), d, spike_dtype(x), for_channels(affine, x))
    return spikes.as_strided(x.shape, x.stride())


def compute_gradients(
    x: Tensor,
    grad: Tensor,
    d: Dynamics,
    spike_grad: SpikeGrad,
    affine: Affine | None = None,
    temb: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Returns the gradients of the neuron's input, `scale * x + shift + temb`, of its decay and of its threshold.

    The first has the memory layout of `x`; the others are None unless learned.

    Args:
        x: Input currents, before the norm if `affine` is given.
        grad: Gradients of the spikes, in the shape of `x`.
        d: Constants of the neuron.
        spike_grad: Surrogate gradient of the neuron.
        affine: Scale and shift of the norm, `(C,)` each.
        temb: Time embedding `(B, C)`, as in `compute_spikes`.
    """
    grad = laid_out_as(x, grad)
    if surrogate := kernel_surrogate(x, d, spike_grad):
        from systems.ops.kernels import neurons as kernels

        return kernels.gradients(x, grad, d, surrogate, affine, channel_stride(x), temb), None, None
    derivative = surrogate_derivative(spike_grad, torch.promote_types(x.dtype, torch.float32))
    if affine is None:
        dl_dx, *learned = _backward(memory(x, len(x), -1), memory(grad, len(x), -1), d, derivative)
    else:
        dl_dx, *learned = _backward(by_channel(x, x), by_channel(grad, x), d, derivative, for_channels(affine, x))
    dl_dbeta, dl_dthreshold = learned
    return dl_dx.as_strided(x.shape, x.stride()), dl_dbeta, dl_dthreshold


class MultiStep(torch.autograd.Function):
    """Spikes `(T, ...)` of currents `(T, ...)`; saves only its input for the backward pass.

    `beta` and `threshold` replace those of `d`: numbers, or scalar tensors, which then have gradients.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, beta: float | Tensor, threshold: float | Tensor, d: Dynamics, spike_grad: SpikeGrad
    ) -> Tensor:
        """Returns the spikes, in autocast's dtype where it is on."""
        x = dense(x)
        ctx.save_for_backward(x, *_tensors(beta, threshold))
        ctx.d, ctx.spike_grad = _constants(d, beta, threshold), spike_grad
        return compute_spikes(x, _with_learned(ctx.d, beta, threshold), spike_grad)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Returns the gradients of the currents, of `beta` and of the threshold."""
        x, *learned = ctx.saved_tensors
        return *compute_gradients(x, grad, _with_learned(ctx.d, *learned), ctx.spike_grad), None, None


class NormedMultiStep(torch.autograd.Function):
    """`MultiStep` of `scale * x + shift + temb`, batch norm and time embedding, without storing that sum.

    Features are `(T, B, C, H, W)`, tokens `(T, ..., C)`, `weight` and `bias` `(C,)`, `temb` `(B, C)`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        temb: Tensor | None,
        beta: float | Tensor,
        threshold: float | Tensor,
        norm: BatchNorm,
        d: Dynamics,
        spike_grad: SpikeGrad,
    ) -> Tensor:
        """Returns the spikes, and updates the running statistics of a norm in training mode."""
        x = dense(x) if x.dim() == 5 else x.contiguous()  # the channels of tokens come last in memory
        temb = None if temb is None else temb.contiguous()
        statistics = batch_statistics(norm, x, weight, bias)
        ctx.save_for_backward(x, weight, temb, *_tensors(beta, threshold), *statistics)
        ctx.norm, ctx.training = norm, norm.training
        ctx.d, ctx.spike_grad = _constants(d, beta, threshold), spike_grad
        affine = statistics.scale, statistics.shift
        return compute_spikes(x, _with_learned(ctx.d, beta, threshold), spike_grad, affine, temb)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Returns the gradients of features, weight, bias, time embedding, `beta` and threshold."""
        x, weight, temb, beta, threshold, *rest = ctx.saved_tensors
        statistics = BatchStatistics(*rest)
        affine = statistics.scale, statistics.shift
        d = _with_learned(ctx.d, beta, threshold)
        grad_input, *learned = compute_gradients(x, grad, d, ctx.spike_grad, affine, temb)
        grads = batch_norm_backward(ctx.norm, ctx.training, x, grad_input, weight, statistics)
        grad_temb = None if temb is None else grad_input.sum((0, 3, 4)).to(temb.dtype)
        return *grads, grad_temb, *learned, None, None, None


def _tensors(*values: float | Tensor) -> list[Tensor | None]:
    """Returns the values that are tensors, None in place of the others."""
    return [value if isinstance(value, Tensor) else None for value in values]


def _constants(d: Dynamics, beta: float | Tensor, threshold: float | Tensor) -> Dynamics:
    """Returns the constants without learned values, which are saved for the backward pass as tensors."""
    return d._replace(
        beta=0.0 if isinstance(beta, Tensor) else beta, threshold=0.0 if isinstance(threshold, Tensor) else threshold
    )


def _with_learned(d: Dynamics, beta: float | Tensor | None, threshold: float | Tensor | None) -> Dynamics:
    """Returns the constants with the learned values put back, detached."""
    if isinstance(beta, Tensor):
        d = d._replace(beta=beta.detach())
    if isinstance(threshold, Tensor):
        d = d._replace(threshold=threshold.detach())
    return d


def spike_dtype(x: Tensor) -> torch.dtype:
    """Autocast's dtype where it is on, else the dtype of `x`: spikes are exact in any, and a product follows them."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
