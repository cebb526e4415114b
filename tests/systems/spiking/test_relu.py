from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from systems.ops.quantise import QReLU, bits_of_steps
from systems.spiking.adapter import spiking_layer, spiking_layers
from systems.spiking.neurons import SpikingLayer
from systems.spiking.relu import ReLULayer


def test_equals_norm_embedding_and_relu_with_its_gradients() -> None:
    torch.manual_seed(0)
    layer, norm, same = ReLULayer(), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    nn.init.normal_(norm.weight)
    same.load_state_dict(norm.state_dict())
    x, temb = torch.randn(1, 2, 3, 4, 4, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    y, other = x.detach().clone().requires_grad_(), temb.detach().clone().requires_grad_()
    out = layer(x, norm, temb)
    expected = F.relu(same(y[0]) + other[:, :, None, None])[None]
    torch.testing.assert_close(out, expected)
    weight = torch.randn_like(out)
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(temb.grad, other.grad)
    torch.testing.assert_close(norm.weight.grad, same.weight.grad)
    torch.testing.assert_close(norm.running_var, same.running_var)


def test_is_no_spiking_layer() -> None:
    layer = spiking_layer(ReLULayer, 3)
    assert isinstance(layer, ReLULayer)
    assert not isinstance(layer, SpikingLayer)
    assert not list(spiking_layers(nn.Sequential(layer)))


def test_few_bits_round_to_levels() -> None:
    layer = ReLULayer(3)
    assert isinstance(layer.activation, QReLU)
    assert layer.activation.bits == 3
    x = torch.linspace(-2, 8, 101).view(1, 1, -1).requires_grad_()
    out = layer(x)
    step = 6 / 7  # clip value before training, levels above 0
    torch.testing.assert_close(out.unique(), torch.arange(8) * step)
    torch.testing.assert_close(out, ((x.clamp(0, 6) / step).round() * step))
    out.sum().backward()
    assert torch.equal(x.grad, ((x > 0) & (x < 6)).float())
    assert layer.activation.act_alpha.grad != 0


@pytest.mark.parametrize(("num_steps", "bits"), [(1, 1), (2, 2), (3, 2), (4, 3), (7, 3), (8, 4), (15, 4), (16, 5)])
def test_bits_of_steps(num_steps: int, bits: int) -> None:
    assert bits_of_steps(num_steps) == bits
    assert 2 ** (bits - 1) < num_steps + 1 <= 2**bits


def test_several_steps_are_refused() -> None:
    with pytest.raises(ValueError, match=r"2 time steps, shape \(2, 3, 4\)"):
        ReLULayer()(torch.zeros(2, 3, 4))
