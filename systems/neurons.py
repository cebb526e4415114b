"""Multi-step spiking neurons: snnTorch's `Leaky` semantics and surrogates over a leading time axis.

One layer covers the neurons of all methods of the suite. With input `X[k]`, carried potential `V[-1] =
0`, membrane decay `beta` and threshold `th`, each step `k` of the `T` SNN time steps computes

    U[k] = beta * V[k-1] + input_scale * X[k]       charge
    S[k] = 1 if U[k] > th (or >=) else 0            fire
    V[k] = (1 - S[k]) * U[k]   or   U[k] - S[k]*th  reset to zero, or by subtraction

snnTorch (Eshraghian et al., Proc. IEEE 2023, arXiv 2109.12894, https://github.com/jeshraghian/snntorch) is the
reference: spikes and gradients equal its `Leaky` stepped by hand. It is not subclassed because its layers keep the
potential in a buffer between calls. Here the potential lives in the forward pass alone, so there is nothing to reset,
and deep copies, weight averaging and data-parallel replicas cannot leak state into one another.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from snntorch import surrogate
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.fx.experimental.proxy_tensor import make_fx

from systems.compiled import compiled, dense, has_triton, laid_out_as, memory
from systems.norms import (
    BatchNorm,
    BatchStatistics,
    batch_norm_backward,
    batch_statistics,
    by_channel,
    for_channels,
    fuses,
    normalise,
    pixels,
)
from systems.precision import full_precision

SpikeGrad = Callable[[Tensor], Tensor]

READOUT_DECAY = 0.8
"""Membrane decay per SNN step of a read-out (SpikingJelly's leaky integrator in the released codes)."""


def triangle(width: float = 0.5) -> SpikeGrad:
    """Triangular surrogate of FSDDIM (arXiv 2312.01742).

    Its derivative is `max(0, 1 - |u| / width) / (2 * width)`, with `u` the potential minus the threshold.
    """
    return surrogate.custom_surrogate(lambda u, grad, spikes: grad * (1 - u.abs() / width).clamp(min=0) / (2 * width))


def rectangle(width: float = 0.5) -> SpikeGrad:
    """Rectangular surrogate `[|u| < width] / (2 * width)` (Wu et al., 2018), named by the SDDPM paper."""
    return surrogate.custom_surrogate(lambda u, grad, spikes: grad * (u.abs() < width) / (2 * width))


@lru_cache
def get_surrogate(name: str) -> SpikeGrad:
    """Returns a surrogate with its default width: `triangle`, `rectangle`, or any of `snntorch.surrogate`.

    It is the same object for the same name, so that all neurons of a network share one compiled kernel.

    Raises:
        ValueError: If there is no surrogate of that name.
    """
    own = {"triangle": triangle, "rectangle": rectangle}
    theirs = {
        key: value
        for key, value in vars(surrogate).items()
        if callable(value) and value.__module__ == surrogate.__name__ and not isinstance(value, type)
    }
    theirs.pop("custom_surrogate")  # takes a function, not a number
    known = theirs | own
    if name not in known:
        raise ValueError(f"spike_grad={name!r} is not a surrogate gradient; choose one of: {', '.join(sorted(known))}")
    return known[name]()


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
    from systems import kernels

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
        from systems import kernels

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
        from systems import kernels

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


def _normed(x: Tensor, norm: nn.Module, shift: Tensor | None) -> Tensor:
    y = normalise(norm, x)
    return y if shift is None else y + shift[:, :, None, None]


class SpikingNeuron(nn.Module):
    """A layer of leaky integrate-and-fire neurons over all SNN time steps of one forward pass.

    Args:
        beta: Membrane decay per step, 1 for integrate-and-fire. A paper's `tau` maps to `1 - 1/tau`.
        threshold: Firing threshold; may be set after construction (see `set_threshold`).
        input_scale: Factor on the input current, `1/tau` where a paper's input decays too.
        reset_mechanism: `"zero"` (hard) or `"subtract"` (soft).
        reset_delay: With `"subtract"`, subtract after the next step's decay (snnTorch's default), not before it.
        detach_reset: Whether the reset is a constant for the backward pass.
        fire_at_threshold: Whether a potential equal to the threshold fires (`>=`, SpikingJelly) or not (`>`, snnTorch).
        spike_grad: Surrogate gradient: a snnTorch surrogate, or its name (see `get_surrogate`).

    Shapes:
        `(T, B, ...)` currents to `(T, B, ...)` spikes, 0 or 1, in the input's dtype, or in autocast's where it is on.

    Raises:
        ValueError: If a constant is out of range or a name is unknown.
    """

    def __init__(
        self,
        beta: float = 1.0,
        threshold: float = 1.0,
        input_scale: float = 1.0,
        reset_mechanism: Literal["zero", "subtract"] = "zero",
        reset_delay: bool = False,
        detach_reset: bool = False,
        fire_at_threshold: bool = True,
        spike_grad: SpikeGrad | str = "atan",
    ) -> None:
        super().__init__()
        if not 0 <= beta <= 1:
            raise ValueError(f"beta={beta} is not a membrane decay; give a number from 0 to 1")
        if reset_mechanism not in ("zero", "subtract"):
            raise ValueError(f"reset_mechanism={reset_mechanism!r} is unknown; choose 'zero' or 'subtract'")
        self.beta = beta
        self.threshold = threshold
        self.input_scale = input_scale
        self.reset_mechanism = reset_mechanism
        self.reset_delay = reset_delay
        self.detach_reset = detach_reset
        self.fire_at_threshold = fire_at_threshold
        self.spike_grad = get_surrogate(spike_grad) if isinstance(spike_grad, str) else spike_grad

    @property
    def threshold(self) -> float:
        """Firing threshold of the layer."""
        return self._threshold

    @threshold.setter
    def threshold(self, value: float) -> None:
        if not value > 0:
            raise ValueError(f"threshold={value} is not a firing threshold; give a number above 0")
        self._threshold = float(value)

    @property
    def amplitude(self) -> Tensor | float:
        """Height of a spike."""
        return 1.0

    @property
    def _dynamics(self) -> _Dynamics:
        return _Dynamics(
            self.beta,
            self.threshold,
            self.input_scale,
            self.reset_mechanism,
            self.reset_delay,
            self.detach_reset,
            self.fire_at_threshold,
        )

    def forward(self, x: Tensor, norm: nn.Module | None = None, shift: Tensor | None = None) -> Tensor:
        """Returns the spikes `(T, B, ...)` of currents, from a potential of zero.

        Args:
            x: Currents `(T, B, ...)`; features `(T, B, C, H, W)` or tokens `(T, ..., C)` if there is a norm.
            norm: Norm of the currents, by channel, on `(T*B, C, H, W)` or `(M, C)`. A plain batch norm is computed
                inside the neuron, so that its result takes no memory; the module itself is then not called.
            shift: Currents `(B, C)` that are added to the normed features of each image, in every step and pixel.

        Raises:
            ValueError: If the currents have no axis of images.
        """
        if x.dim() < 2:
            raise ValueError(f"currents have shape {tuple(x.shape)}; a spiking layer takes (T, B, ...)")
        if norm is None:
            return _MultiStep.apply(x, self._dynamics, self.spike_grad)
        shiftable = shift is None or _surrogate_of_kernels(x, self.spike_grad)
        if not (shiftable and fuses(norm, x)):
            return _MultiStep.apply(_normed(x, norm, shift), self._dynamics, self.spike_grad)
        return _NormedMultiStep.apply(x, norm.weight, norm.bias, shift, norm, self._dynamics, self.spike_grad)

    def stepwise(self, x: Tensor, norm: nn.Module | None = None, shift: Tensor | None = None) -> Tensor:
        """Same as `forward`, one step after the other under plain autograd: the definition `forward` must equal."""
        if norm is not None:
            x = _normed(x, norm, shift)
        d = self._dynamics
        spikes: list[Tensor] = []
        u: Tensor | None = None
        for x_k in x.unbind(0):
            current = x_k * d.input_scale
            if u is None:
                u = current
            else:
                s = spikes[-1].detach() if d.detach_reset else spikes[-1]
                u = current + _carry(u, s, d)
            slope = _derivative(self.spike_grad, u.dtype)((u - d.threshold).detach())
            spikes.append(_fire(u, d) + slope * (u - u.detach()))
        return torch.stack(spikes)

    def extra_repr(self) -> str:
        """Names the constants in `print(network)`."""
        return ", ".join(f"{name}={value}" for name, value in self._dynamics._asdict().items())


class ConvertedNeuron(SpikingNeuron):
    """Integrate-and-fire neuron that counts out the levels of a quantised activation (Fast-SNN; SDM, arXiv 2408.16467).

    The potential starts at half the threshold, a spike subtracts the threshold and keeps the remainder, and there is at
    most one spike per step: of a constant current, `T = 2^b - 1` steps count the very level that `b` bits round it to.
    It equals snnTorch's `Leaky(beta=1, reset_mechanism="subtract", reset_delay=True)` from that start. Spikes have the
    height `act_alpha`, the clip value of the activation, which is the threshold too. There is no backward pass: the
    output is a constant to autograd.

    Args:
        threshold: Firing threshold as a multiple of `act_alpha`; other than 1 it is threshold guidance, and the height
            of the spikes stays.
        signed: Whether a negative potential takes back an earlier spike by a negative one (as released) or not (as
            published).

    Shapes:
        `(T, B, ...)` currents to `(T, B, ...)` spikes, 0 or `act_alpha`, signed also `-act_alpha`.
    """

    def __init__(self, threshold: float = 1.0, signed: bool = False) -> None:
        super().__init__(threshold=threshold, reset_mechanism="subtract", reset_delay=True, detach_reset=True)
        self.act_alpha = nn.Parameter(torch.tensor(6.0), requires_grad=False)
        self.signed = signed

    @property
    def amplitude(self) -> Tensor:
        """Height of a spike, `act_alpha`."""
        return self.act_alpha

    @torch.no_grad()
    def forward(self, x: Tensor, norm: nn.Module | None = None, shift: Tensor | None = None) -> Tensor:
        """Returns the spikes `(T, B, ...)` of the currents `x` `(T, B, ...)`, times `act_alpha`."""
        if x.dim() < 2:
            raise ValueError(f"currents have shape {tuple(x.shape)}; a spiking layer takes (T, B, ...)")
        x = dense(x if norm is None else _normed(x, norm, shift))
        spikes = _converted_compiled(
            memory(x, len(x), -1), self.threshold * self.act_alpha, self.act_alpha, self.signed
        )
        return spikes.as_strided(x.shape, x.stride())

    @torch.no_grad()
    def stepwise(self, x: Tensor, norm: nn.Module | None = None, shift: Tensor | None = None) -> Tensor:
        """Same as `forward`, never compiled."""
        x = x if norm is None else _normed(x, norm, shift)
        return _converted(x, self.threshold * self.act_alpha, self.act_alpha, self.signed)

    def extra_repr(self) -> str:
        """Names the constants in `print(network)`."""
        return f"threshold={self.threshold} * act_alpha, signed={self.signed}"


NeuronFactory = Callable[[], SpikingNeuron]
"""Makes one spiking layer."""


def integrate_and_fire(threshold: float = 1.0, spike_grad: SpikeGrad | str = "atan") -> SpikingNeuron:
    """SpikingJelly's `IFNode`: no leak, hard reset, fires at the threshold, reset not detached (SDDPM, SDM)."""
    return SpikingNeuron(threshold=threshold, spike_grad=spike_grad)


def leaky_integrate_and_fire(
    tau: float = 2.0, threshold: float = 1.0, spike_grad: SpikeGrad | str = "atan"
) -> SpikingNeuron:
    """SpikingJelly's `LIFNode` with decaying input: `U = V + (X - V) / tau` (Spiking-Diffusion; SDDPM's option)."""
    return SpikingNeuron(beta=1 - 1 / tau, threshold=threshold, input_scale=1 / tau, spike_grad=spike_grad)


def membrane_output(x: Tensor) -> Tensor:
    """Final potential of a leaky integrator without threshold, `sum_k 0.8^(T-1-k) x[k]`: `(T, ...)` to `(...)`.

    It is the read-out of SDDPM and of Spiking-Diffusion, and never in less than float32.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    powers = torch.arange(len(x) - 1, -1, -1, dtype=torch.float32, device=x.device)
    weights = (READOUT_DECAY**powers).to(x.dtype)  # float32 numbers even in float64, as released
    with full_precision(x.device.type):
        return torch.tensordot(weights, x, dims=1)


def set_threshold(network: nn.Module, threshold: float) -> None:
    """Sets the threshold of every neuron of a network: threshold guidance of SDM (arXiv 2408.16467, section 4.3).

    That of a `ConvertedNeuron` is a multiple of its own.
    """
    for module in network.modules():
        if isinstance(module, SpikingNeuron):
            module.threshold = threshold
