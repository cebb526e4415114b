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
from typing import Literal

import torch
from torch import Tensor, nn

from systems.ops.compiled import dense, memory
from systems.ops.norms import (
    fuses,
    normalise,
)
from systems.ops.precision import full_precision
from systems.spiking.multistep import (
    _carry,
    _converted,
    _converted_compiled,
    _derivative,
    _Dynamics,
    _fire,
    _MultiStep,
    _NormedMultiStep,
    _surrogate_of_kernels,
)
from systems.spiking.surrogates import SpikeGrad, get_surrogate

READOUT_DECAY = 0.8
"""Membrane decay per SNN step of a read-out (SpikingJelly's leaky integrator in the released codes)."""


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
