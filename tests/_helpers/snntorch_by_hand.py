"""snnTorch's neurons stepped by hand, as its tutorials do."""

from __future__ import annotations

from typing import Any

import torch
from snntorch import surrogate
from torch import Tensor, nn


class _ATan64(surrogate.ATan):
    """snnTorch's arctan surrogate without its cast to float32, which would round float64 gradients."""

    @staticmethod
    def forward(ctx: Any, input_: Tensor, alpha: float) -> Tensor:
        return surrogate.ATan.forward(ctx, input_, alpha).to(input_.dtype)


def atan64(u: Tensor) -> Tensor:
    return _ATan64.apply(u, 2.0)


def step_by_hand(layer: nn.Module, x: Tensor) -> Tensor:
    """Returns the spikes of a neuron of snnTorch for currents `(T, B, ...)`, from snnTorch's own initial state."""
    states = layer.reset_mem()
    states = states if isinstance(states, tuple) else (states,)
    states = tuple(torch.zeros_like(x[0]) for _ in states)
    spikes = []
    for x_k in x:
        spike, *rest = layer(x_k, *states)
        states = tuple(rest) if len(rest) == len(states) else (spike, *rest)
        spikes.append(spike)
    return torch.stack(spikes)
