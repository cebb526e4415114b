"""Speed of neurons, against snnTorch stepped by hand and SpikingJelly."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import snntorch as snn
import torch
from snntorch import surrogate
from torch import Tensor, nn

from benchmark.speed.timing import Rows, medians, queued
from systems.spiking.neurons import SpikingNeuron, integrate_and_fire, leaky_integrate_and_fire
from systems.spiking.surrogates import triangle


def measure_neurons(device: torch.device, repetitions: int) -> Rows:
    """Times forward and backward passes of layers against snnTorch stepped by hand and SpikingJelly's layers.

    Features are `(T, 4, 128, 32, 32)`, or `(T, 128, 128, 32, 32)` on GPUs, to exceed their caches. The bandwidth bound
    is the time to copy as much memory as both passes must read and write. "learned takes" is the time with a learned
    decay and threshold, in turns with the others.
    """
    shape = (4 if device.type == "cpu" else 128, 128, 32, 32)
    rows = []
    for name, ours, by_hand, jelly in _neurons():
        for num_steps in (4, 8, 16):
            x, grad = (torch.randn(num_steps, *shape, device=device, requires_grad=on) for on in (True, False))
            layers = {"suite": ours, "learned": _learned(ours), "snnTorch": by_hand, "SpikingJelly": jelly}
            works = {kind: _passes(layer, x, grad) for kind, layer in layers.items() if layer is not None}
            seconds = medians(works | {"copy": grad.clone}, repetitions, device, warm_up=2, calls=queued(device))
            row: dict[str, Any] = {"neuron": name, "T": num_steps, "suite ms": 1e3 * seconds["suite"]}
            row["learned takes"] = f"{seconds['learned'] / seconds['suite']:.2f}x"
            for kind in ("snnTorch", "SpikingJelly"):
                times = f"{seconds[kind] / seconds['suite']:.1f}x" if kind in seconds else "not installed"
                row[f"{kind} takes"] = times
            rows.append(row | {"of bandwidth bound": 2.5 * seconds["copy"] / seconds["suite"]})
    return rows


def _passes(layer: Any, x: Tensor, grad: Tensor) -> Callable[[], Any]:
    """Returns a function that runs a forward and a backward pass, also to the layer's parameters."""
    parameters = list(layer.parameters()) if isinstance(layer, nn.Module) else []
    return lambda: torch.autograd.grad(layer(x), [x, *parameters], grad)


def _learned(neuron: SpikingNeuron) -> SpikingNeuron:
    """Returns a neuron with the same constants that learns its decay and threshold."""
    options = {name: getattr(neuron, name) for name in neuron._dynamics._fields}
    return SpikingNeuron(**options, spike_grad=neuron.spike_grad, learn_beta=True, learn_threshold=True)


def _neurons() -> Iterator[tuple[str, SpikingNeuron, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor] | None]]:
    """Yields name and layers of each published neuron: ours, snnTorch's, and SpikingJelly's if installed, else None."""
    fsddim = SpikingNeuron(beta=0.8, detach_reset=True, fire_at_threshold=False, spike_grad="triangle")
    hard = {"reset_mechanism": "zero", "reset_delay": False}
    yield (
        "IF",
        integrate_and_fire(),
        _step_by_hand(snn.Leaky(1.0, spike_grad=surrogate.atan(2.0), **hard)),
        _spikingjelly("IFNode"),
    )
    yield (
        "LIF",
        leaky_integrate_and_fire(),
        _step_by_hand(snn.Leaky(0.5, spike_grad=surrogate.atan(2.0), **hard), input_scale=0.5),
        _spikingjelly("LIFNode", tau=2.0),
    )
    yield (
        "FSDDIM's LIF",
        fsddim,
        _step_by_hand(snn.Leaky(0.8, spike_grad=triangle(), **hard)),
        _spikingjelly("LIFNode", tau=5.0, decay_input=False, detach_reset=True),
    )


def _step_by_hand(leaky: nn.Module, input_scale: float = 1.0) -> Callable[[Tensor], Tensor]:
    def layer(x: Tensor) -> Tensor:
        mem = torch.zeros_like(x[0])
        spikes = []
        for x_k in x:
            spike, mem = leaky(x_k * input_scale if input_scale != 1 else x_k, mem)
            spikes.append(spike)
        return torch.stack(spikes)

    return layer


def _spikingjelly(kind: str, **options: Any) -> Callable[[Tensor], Tensor] | None:
    try:
        from spikingjelly.activation_based import functional, neuron
        from spikingjelly.activation_based import surrogate as theirs
    except ImportError:
        return None
    node = getattr(neuron, kind)(surrogate_function=theirs.ATan(), step_mode="m", **options)

    def layer(x: Tensor) -> Tensor:
        functional.reset_net(node)
        return cast(Tensor, node(x))

    return layer
