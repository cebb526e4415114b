"""Checks of a network against recordings of a released one, for any method."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from systems.spiking.neurons import SpikingNeuron


def check_gradients_and_statistics(network: nn.Module, recorded: dict[str, Tensor]) -> None:
    """Compares the gradients of `sum(output^2)` in training mode, and the running statistics after that forward."""
    network.train()
    x = recorded["input.x"].clone().requires_grad_()
    network(x, recorded["input.t"]).square().sum().backward()
    ours = {f"grad.param_train.{name}": p.grad for name, p in network.named_parameters()} | {"grad.input_train": x.grad}
    expected = {key: value for key, value in recorded.items() if key.startswith("grad.")}
    assert len(expected) > 1
    for key, grad in expected.items():
        found = ours[key]
        assert found is not None, key
        assert (found.view_as(grad) - grad).norm() < 1e-4 * grad.norm().clamp(min=1e-3), key
    statistics = {k.removeprefix("after_train."): v for k, v in recorded.items() if k.startswith("after_train.")}
    assert statistics
    for name, value in statistics.items():
        torch.testing.assert_close(network.get_buffer(name), value, rtol=1e-5, atol=1e-6, msg=name)


def check_firing_rates(network: nn.Module, recorded: dict[str, Tensor]) -> None:
    """Compares the firing rates of all neuron layers in evaluation mode."""
    network.eval()
    rates: list[Tensor] = []
    for module in network.modules():
        if isinstance(module, SpikingNeuron):
            module.register_forward_hook(lambda m, i, spikes: rates.append(spikes.mean()))
    network(recorded["input.x"], recorded["input.t"])
    expected = torch.stack([v for k, v in recorded.items() if k.startswith("rate.eval.")]).flatten()
    assert len(rates) == len(expected) == 19
    torch.testing.assert_close(torch.stack(rates).sort().values, expected.sort().values, rtol=0, atol=1e-6)
