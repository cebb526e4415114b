"""Multi-step spiking neurons: snnTorch's `Leaky` semantics and surrogates over a leading time axis.

One layer covers the neurons of all methods of the suite. With input `X[k]`, carried potential `V[-1] = 0`, membrane
decay `beta` and threshold `th`, each step `k` of the `T` SNN time steps computes

    U[k] = beta * V[k-1] + input_scale * X[k]       charge
    S[k] = 1 if U[k] > th (or >=) else 0            fire
    V[k] = (1 - S[k]) * U[k]   or   U[k] - S[k]*th  reset to zero, or by subtraction

snnTorch (Eshraghian et al., Proc. IEEE 2023, arXiv 2109.12894, https://github.com/jeshraghian/snntorch) is the
reference: spikes and gradients equal those of its `Leaky` stepped by hand. It is not subclassed because its layers keep
the potential in a buffer between calls. Here the potential exists only during the forward pass, so there is nothing to
reset, and deep copies, weight averaging and data-parallel replicas cannot share state. snnTorch's own neurons work as
well, more slowly, through `systems.spiking.adapter`; both are a `SpikingLayer`.

`SpikingNeuron.stepwise` defines the result; `systems.spiking.multistep` computes all steps at once.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from systems.ops.compiled import dense, memory
from systems.ops.norms import fuses, normalise
from systems.ops.precision import full_precision
from systems.ops.uncounted import uncounted
from systems.spiking.multistep import (
    Dynamics,
    MultiStep,
    NormedMultiStep,
    converted_spikes,
    converted_spikes_compiled,
    fire,
    kernel_surrogate,
    reset_and_decay,
    surrogate_derivative,
)
from systems.spiking.surrogates import SpikeGrad, get_surrogate


class SpikingLayer(nn.Module):
    """Base of all spiking layers: currents of all SNN time steps in, spikes out, and no state between calls.

    Firing rates, warnings of silent layers and cost find the spiking layers of a network by this class.
    """

    threshold_scale: float = 1.0
    """Factor on the layer's threshold (see `scale_thresholds`)."""

    @property
    def amplitude(self) -> Tensor | float | None:
        """Amplitude of a spike; None if the spikes of the layer have several."""
        return 1.0

    @abstractmethod
    def forward(self, x: Tensor, norm: nn.Module | None = None, temb: Tensor | None = None) -> Tensor:
        """Returns the spikes `(T, B, ...)` of the currents `norm(x) + temb`, from a potential of zero.

        Args:
            x: Currents `(T, B, ...)`; features `(T, B, C, H, W)` or tokens `(T, ..., C)` if there is a norm.
            norm: Norm by channel, on `(T*B, C, H, W)` or `(M, C)`; None for the currents themselves.
            temb: Time embedding `(B, C)`, added to the normed features of each image in every step and pixel.
        """


class SpikingNeuron(SpikingLayer):
    """A layer of leaky integrate-and-fire neurons over all SNN time steps of one forward pass.

    A learned decay is clamped to [0, 1] in the forward pass, as in snnTorch.

    Args:
        beta: Membrane decay per step, 1 for integrate-and-fire. A paper's `tau` maps to `1 - 1/tau`.
        threshold: Firing threshold.
        input_scale: Factor on the input current, `1/tau` if a paper's input decays too.
        reset_mechanism: `"zero"` (hard) or `"subtract"` (soft).
        reset_delay: With `"subtract"`, subtract after the next step's decay (snnTorch's default), not before it.
        detach_reset: Whether the backward pass treats the reset as a constant.
        fire_at_threshold: Whether a potential equal to the threshold fires (`>=`, SpikingJelly) or not (`>`, snnTorch).
        spike_grad: Surrogate gradient: a snnTorch surrogate, or its name (see `get_surrogate`).
        learn_beta: Whether the layer trains its decay, one number, from `beta` on.
        learn_threshold: Whether the layer trains its threshold, one number, from `threshold` on.

    Shapes:
        `(T, B, ...)` currents to `(T, B, ...)` spikes, 0 or 1, in the input's dtype, or in autocast's if it is on.

    Raises:
        ValueError: If a constant is out of range or not a number, or a name is unknown.
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
        learn_beta: bool = False,
        learn_threshold: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (("beta", beta), ("threshold", threshold), ("input_scale", input_scale)):
            if isinstance(value, Tensor):
                learned = {"beta": "learn_beta", "threshold": "learn_threshold"}.get(name)
                remedy = f", and {learned}=True to train it from there" if learned else ""
                raise ValueError(f"{name} is a {type(value).__name__}, which would never train; give a number{remedy}")
        if not 0 <= beta <= 1:
            raise ValueError(f"beta={beta} is not a membrane decay; use a number from 0 to 1")
        if not threshold > 0:
            raise ValueError(f"threshold={threshold} is not a firing threshold; use a number above 0")
        if reset_mechanism not in ("zero", "subtract"):
            raise ValueError(f"reset_mechanism={reset_mechanism!r} is unknown; choose 'zero' or 'subtract'")
        self.beta = nn.Parameter(torch.tensor(float(beta))) if learn_beta else float(beta)
        self.threshold = nn.Parameter(torch.tensor(float(threshold))) if learn_threshold else float(threshold)
        self.input_scale = input_scale
        self.reset_mechanism = reset_mechanism
        self.reset_delay = reset_delay
        self.detach_reset = detach_reset
        self.fire_at_threshold = fire_at_threshold
        self.spike_grad = get_surrogate(spike_grad) if isinstance(spike_grad, str) else spike_grad

    @property
    def _dynamics(self) -> Dynamics:
        scaled = self.threshold if self.threshold_scale == 1 else self.threshold * self.threshold_scale
        return Dynamics(
            self.beta.clamp(0, 1) if isinstance(self.beta, Tensor) else self.beta,
            scaled,
            self.input_scale,
            self.reset_mechanism,
            self.reset_delay,
            self.detach_reset,
            self.fire_at_threshold,
        )

    def forward(self, x: Tensor, norm: nn.Module | None = None, temb: Tensor | None = None) -> Tensor:
        """Returns the spikes `(T, B, ...)` of currents, from a potential of zero.

        Args:
            x: Currents `(T, B, ...)`; features `(T, B, C, H, W)` or tokens `(T, ..., C)` if there is a norm.
            norm: Norm by channel, on `(T*B, C, H, W)` or `(M, C)`; then `X[k] = norm(x[k]) + temb`. A plain
                batch norm, `X[k] = scale * x[k] + shift + temb` with scale and shift of each channel, is computed
                inside the neuron, so that its output is never stored; the module itself is then not called.
            temb: Time embedding `(B, C)`, added to the normed features of each image in every step and pixel.

        Raises:
            ValueError: If the currents have no axes beside `(T, B)`.
        """
        check_currents(x)
        d = self._dynamics
        learned = d.beta, d.threshold
        if norm is None:
            return MultiStep.apply(x, *learned, d, self.spike_grad)
        embeds = temb is None or kernel_surrogate(x, d, self.spike_grad)  # only Triton kernels add a time embedding
        if not (embeds and fuses(norm, x)):
            return MultiStep.apply(norm_and_embed(x, norm, temb), *learned, d, self.spike_grad)
        return NormedMultiStep.apply(x, norm.weight, norm.bias, temb, *learned, norm, d, self.spike_grad)

    def stepwise(self, x: Tensor, norm: nn.Module | None = None, temb: Tensor | None = None) -> Tensor:
        """Same as `forward`, step by step under plain autograd: the definition that `forward` must equal."""
        if norm is not None:
            x = norm_and_embed(x, norm, temb)
        d = self._dynamics
        spikes: list[Tensor] = []
        u: Tensor | None = None
        for x_k in x.unbind(0):
            current = x_k * d.input_scale
            if u is None:
                u = current
            else:
                s = spikes[-1].detach() if d.detach_reset else spikes[-1]
                u = current + reset_and_decay(u, s, d)
            above = u - d.threshold
            slope = surrogate_derivative(self.spike_grad, u.dtype)(above.detach())
            spikes.append(fire(u, d) + slope * (above - above.detach()))
        return torch.stack(spikes)

    def extra_repr(self) -> str:
        """Shows the constants in `print(network)`, learned ones as their present value."""
        return ", ".join(
            f"{name}={f'{value.item():.4g} (learned)' if isinstance(value, Tensor) else value}"
            for name, value in self._dynamics._asdict().items()
        )


class ConvertedNeuron(SpikingNeuron):
    """Integrate-and-fire neuron that counts out the levels of a quantised activation (Fast-SNN; SDM, arXiv 2408.16467).

    The potential starts at half the threshold, a spike subtracts the threshold, and each step has at most one spike:
    for a constant current, `T = 2^b - 1` steps count exactly the level that `b` bits round it to. It equals snnTorch's
    `Leaky(beta=1, reset_mechanism="subtract", reset_delay=True)` from that start. Both threshold and amplitude of the
    spikes are `act_alpha`, the clip value of the activation. There is no backward pass: autograd sees a constant.

    Args:
        threshold: Firing threshold as a multiple of `act_alpha`; values other than 1 are threshold guidance, which does
            not change the amplitude.
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
        """Amplitude of a spike, `act_alpha`."""
        return self.act_alpha

    @torch.no_grad()
    def forward(self, x: Tensor, norm: nn.Module | None = None, temb: Tensor | None = None) -> Tensor:
        """Returns the spikes `(T, B, ...)` of currents `(T, B, ...)`, times `act_alpha` (see `SpikingNeuron`)."""
        check_currents(x)
        x = dense(x if norm is None else norm_and_embed(x, norm, temb))
        spikes = converted_spikes_compiled(memory(x, len(x), -1), self._reached, self.act_alpha, self.signed)
        return spikes.as_strided(x.shape, x.stride())

    @torch.no_grad()
    def stepwise(self, x: Tensor, norm: nn.Module | None = None, temb: Tensor | None = None) -> Tensor:
        """Same as `forward`, but never compiled."""
        x = x if norm is None else norm_and_embed(x, norm, temb)
        return converted_spikes(x, self._reached, self.act_alpha, self.signed)

    @property
    def _reached(self) -> Tensor:
        """Potential from which the layer fires."""
        return self.threshold * self.threshold_scale * self.act_alpha

    def extra_repr(self) -> str:
        """Shows the constants in `print(network)`."""
        return f"threshold={self.threshold} * act_alpha, signed={self.signed}"


NeuronFactory = Callable[[], nn.Module]
"""Creates the neurons of one layer: a `SpikingLayer` or a neuron of snnTorch (see `systems.spiking.adapter`)."""


def integrate_and_fire(threshold: float = 1.0, spike_grad: SpikeGrad | str = "atan") -> SpikingNeuron:
    """SpikingJelly's `IFNode`: no leak, hard reset, fires at the threshold, reset not detached (SDDPM, SDM)."""
    return SpikingNeuron(threshold=threshold, spike_grad=spike_grad)


def leaky_integrate_and_fire(
    tau: float = 2.0, threshold: float = 1.0, spike_grad: SpikeGrad | str = "atan"
) -> SpikingNeuron:
    """SpikingJelly's `LIFNode` with decaying input: `U = V + (X - V) / tau` (Spiking-Diffusion; SDDPM's option)."""
    return SpikingNeuron(beta=1 - 1 / tau, threshold=threshold, input_scale=1 / tau, spike_grad=spike_grad)


def check_currents(x: Tensor) -> None:
    """Checks that currents have a time axis, a batch axis and at least one axis of features.

    Raises:
        ValueError: If they do not: a batch `(B, F)` without time steps, say.
    """
    if x.dim() < 3:
        raise ValueError(
            f"currents have shape {tuple(x.shape)}; a spiking layer takes (T, B, ...), with the SNN time steps first "
            "and at least one axis of features: unfold(x, num_steps) adds them to (T*B, ...)"
        )


def norm_and_embed(x: Tensor, norm: nn.Module, temb: Tensor | None) -> Tensor:
    """Returns `norm(x) + temb`: features `(T, B, C, H, W)` or tokens `(T, ..., C)`, time embedding `(B, C)` or None."""
    y = normalise(norm, x)
    return y if temb is None else y + temb[:, :, None, None]


READOUT_DECAY = 0.8
"""Membrane decay per SNN step of a read-out (SpikingJelly's leaky integrator in the released codes)."""


@uncounted("neuron update")
def membrane_output(x: Tensor) -> Tensor:
    """Final potential of a leaky integrator without threshold, `sum_k 0.8^(T-1-k) x[k]`: `(T, ...)` to `(...)`.

    The read-out of SDDPM and Spiking-Diffusion, computed in float32 or more.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    powers = torch.arange(len(x) - 1, -1, -1, dtype=torch.float32, device=x.device)
    weights = (READOUT_DECAY**powers).to(x.dtype)  # float32 numbers even in float64, as released
    with full_precision(x.device.type):
        return torch.tensordot(weights, x, dims=1)


def scale_thresholds(network: nn.Module, factor: float) -> None:
    """Multiplies the thresholds of all spiking layers by a factor, whatever they are: numbers or learned.

    With thresholds of 1 it is the threshold guidance of SDM (arXiv 2408.16467, section 4.3).

    Raises:
        ValueError: If the factor is not positive.
    """
    if not factor > 0:
        raise ValueError(f"threshold={factor} cannot scale firing thresholds; use a number above 0")
    for module in network.modules():
        if isinstance(module, SpikingLayer):
            module.threshold_scale = factor
