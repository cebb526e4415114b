"""Norms fused into a neuron or a sum, against separate norms; `tests/test_cuda.py` tests their kernels."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from systems.ops.norms import add_normed, normalise, scaled
from systems.spiking.neurons import SpikingNeuron


def features(layout: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    x, y = torch.randn(2, 4, 3, 8, 6, 5).to(dtype)
    if layout == "channels_last":
        x = x.flatten(0, 1).contiguous(memory_format=torch.channels_last).view(x.shape)
    return x, y


def norms(training: bool) -> tuple[nn.BatchNorm2d, nn.BatchNorm2d]:
    norm = nn.BatchNorm2d(8).double().train(training)
    with torch.no_grad():
        for values in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            values.uniform_(0.5, 1.5)
    return norm, copy.deepcopy(norm)


def check(fast: Tensor, plain: Tensor, inputs: list[Tensor], *modules: tuple[nn.Module, nn.Module]) -> None:
    """Compares outputs, gradients of inputs and parameters, and running statistics."""
    torch.testing.assert_close(fast, plain, rtol=1e-12, atol=1e-12)
    weights = torch.linspace(-1, 1, fast.numel(), dtype=fast.dtype).view(fast.shape)
    for found, wanted in zip(
        torch.autograd.grad((fast * weights).sum(), inputs + list(modules[0][0].parameters())),
        torch.autograd.grad((plain * weights).sum(), inputs + list(modules[0][1].parameters())),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-10)
    for found, wanted in zip(modules[0][0].buffers(), modules[0][1].buffers(), strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_sum_with_a_residual(layout: str, training: bool) -> None:
    inputs = [x.requires_grad_() for x in features(layout)]
    norm, plain = norms(training)
    check(add_normed(norm, *inputs), normalise(plain, inputs[0]) + inputs[1], inputs, (norm, plain))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_time_embedding_after_the_norm_of_a_neuron(layout: str, training: bool) -> None:
    inputs = [features(layout)[0].requires_grad_(), torch.randn(3, 8, dtype=torch.float64, requires_grad=True)]
    norm, plain = norms(training)
    neuron = SpikingNeuron(beta=0.5)
    spikes = neuron(inputs[0], norm, inputs[1])
    assert 0.1 < spikes.mean() < 0.9
    assert not torch.equal(spikes, neuron(inputs[0], copy.deepcopy(plain))), "the time embedding matters"
    check(spikes, neuron.stepwise(inputs[0], plain, inputs[1]), inputs, (norm, plain))


def test_gain_scales_all_but_the_bias_of_the_norm() -> None:
    inputs = [x.requires_grad_() for x in features("contiguous")]
    norm, plain = norms(True)
    y = scaled(plain, normalise(plain, inputs[0]), 0.7) + inputs[1]
    check(add_normed(norm, *inputs, gain=0.7), y, inputs, (norm, plain))


def test_other_norms_are_called() -> None:
    x, y = features("contiguous", torch.float32)
    norm, temb = nn.GroupNorm(2, 8), torch.randn(3, 8)
    assert torch.equal(add_normed(norm, x, y), normalise(norm, x) + y)
    neuron = SpikingNeuron()
    assert torch.equal(neuron(x, norm, temb), neuron(normalise(norm, x) + temb[:, :, None, None]))


def test_residual_keeps_its_dtype_under_mixed_precision() -> None:
    x, residual = features("contiguous", torch.bfloat16)
    residual = residual.float().requires_grad_()
    total = add_normed(nn.BatchNorm2d(8), x, residual)
    assert total.dtype == torch.float32
    (grad,) = torch.autograd.grad(total.sum(), residual)
    assert torch.equal(grad, torch.ones_like(residual))
    assert add_normed(nn.BatchNorm2d(8), x, residual.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("training", [True, False])
def test_gradients_follow_the_mode_of_the_forward_pass(training: bool) -> None:
    x = features("contiguous")[0].requires_grad_()
    neuron, grads = SpikingNeuron(beta=0.5), []
    for layer, norm in zip((neuron, neuron.stepwise), norms(training), strict=True):
        spikes = layer(x, norm)
        norm.train(not training)
        grads.append(torch.autograd.grad((spikes * torch.linspace(-1, 1, 6)[:, None]).sum(), x)[0])
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-10)
