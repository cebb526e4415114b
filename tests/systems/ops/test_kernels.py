"""Triton kernels, interpreted on the CPU, against their definitions; `tests/test_cuda.py` compiles them."""

from __future__ import annotations

import importlib
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from systems.ops.norms import channel_stride
from systems.ops.token_shift import TokenShift
from systems.ops.wkv import wkv
from systems.spiking import multistep, surrogates
from systems.spiking.neurons import SpikingNeuron

pytestmark = pytest.mark.slow

pytest.importorskip("triton", reason="Triton is not installed")

NAMES = ("common", "norms", "neurons", "token_shift", "wkv")
CASES = {
    "IF": dict(beta=1.0),
    "LIF": dict(beta=0.5, input_scale=0.5, threshold=0.7),
    "detached, strict": dict(beta=0.8, detach_reset=True, fire_at_threshold=False, spike_grad="triangle"),
    "soft": dict(beta=0.9, reset_mechanism="subtract", spike_grad="rectangle"),
    "soft, delayed": dict(beta=0.9, reset_mechanism="subtract", reset_delay=True),
    "soft, delayed, detached": dict(beta=0.9, reset_mechanism="subtract", reset_delay=True, detach_reset=True),
}


@pytest.fixture(scope="module")
def kernels() -> SimpleNamespace:
    """The modules of `systems.ops.kernels`, imported again so that Triton's interpreter runs their functions."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        for name in [name for name in sys.modules if name.startswith("systems.ops.kernels")]:
            patch.delitem(sys.modules, name)
        modules = {name: importlib.import_module(f"systems.ops.kernels.{name}") for name in NAMES}
        for name in NAMES:  # later imports get the compiled kernels
            del sys.modules[f"systems.ops.kernels.{name}"]
    return SimpleNamespace(**modules)


def case(num_steps: int, name: str, dtype: torch.dtype) -> tuple[SpikingNeuron, Tensor, Tensor]:
    torch.manual_seed(0)
    x, grad = torch.randn(2, num_steps, 3, 6, 5, 7).to(dtype)
    return SpikingNeuron(**CASES[name]), x, grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("num_steps", [1, 4, 16])
@pytest.mark.parametrize("name", CASES)
def test_neurons(kernels: SimpleNamespace, name: str, num_steps: int, dtype: torch.dtype) -> None:
    neuron, x, grad = case(num_steps, name, dtype)
    assert torch.equal(
        kernels.neurons.spikes(x, neuron._dynamics, dtype),
        multistep.compute_spikes(x, neuron._dynamics, neuron.spike_grad),
    )
    surrogate = multistep.surrogate_name(neuron.spike_grad, kernels.neurons.SURROGATES)
    found = kernels.neurons.gradients(x, grad, neuron._dynamics, surrogate)
    wanted = multistep.compute_gradients(x, grad, neuron._dynamics, neuron.spike_grad)[0]
    torch.testing.assert_close(found, wanted)
    assert wanted.abs().max() > 0.1


def laid_out(channels_last: bool, *features: Tensor) -> list[Tensor]:
    if not channels_last:
        return list(features)
    return [x.flatten(0, 1).to(memory_format=torch.channels_last).view(x.shape) for x in features]


@pytest.mark.parametrize("has_temb", [True, False])
@pytest.mark.parametrize("channels_last", [True, False])
def test_neurons_of_norms(kernels: SimpleNamespace, channels_last: bool, has_temb: bool) -> None:
    neuron, *features = case(4, "LIF", torch.float64)
    x, grad = laid_out(channels_last, *features)
    affine, stride = (torch.rand(6).double() + 0.5, torch.rand(6).double()), channel_stride(x)
    temb = torch.randn(3, 6, dtype=torch.float64) if has_temb else None
    assert stride == (1 if channels_last else 35)
    spikes = kernels.neurons.spikes(x, neuron._dynamics, torch.bfloat16, affine, stride, temb)
    assert spikes.dtype == torch.bfloat16
    assert spikes.stride() == x.stride()
    scale, shift = (values[:, None, None] for values in affine)
    normed = x * scale + shift + (0 if temb is None else temb[:, :, None, None])
    assert torch.equal(spikes.double(), multistep.compute_spikes(normed, neuron._dynamics, neuron.spike_grad))
    found = kernels.neurons.gradients(x, grad, neuron._dynamics, "atan", affine, stride, temb)
    torch.testing.assert_close(found, multistep.compute_gradients(normed, grad, neuron._dynamics, neuron.spike_grad)[0])


@pytest.mark.parametrize("channels_last", [True, False])
def test_sum_of_a_norm_and_a_residual(kernels: SimpleNamespace, channels_last: bool) -> None:
    x, residual = laid_out(channels_last, *case(4, "IF", torch.float32)[1:])
    scale, shift = torch.rand(2, 6)
    found = kernels.norms.normed_sum(x, residual, scale, shift, channel_stride(x))
    assert found.stride() == x.stride()
    torch.testing.assert_close(found, x * scale[:, None, None] + shift[:, None, None] + residual)


@pytest.mark.parametrize("name", ["atan", "triangle", "rectangle", "sigmoid"])
def test_surrogates_are_known_by_name(name: str) -> None:
    known = ("atan", "triangle", "rectangle")
    assert multistep.surrogate_name(surrogates.get_surrogate(name), known) == (name if name in known else None)
    assert multistep.surrogate_name(surrogates.triangle(0.3), known) is None, "not in the default width"


def test_scale_and_shift_of_a_norm(kernels: SimpleNamespace) -> None:
    mean, var, weight, bias = torch.rand(4, 150) + 0.1
    inverse = (var.double() + 1e-3).rsqrt().float()
    found = kernels.norms.affine(mean, var, weight, bias, 1e-3)
    for a, b in zip(found, (inverse, weight * inverse, bias - mean * weight * inverse), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "num_mixes"), [(torch.float64, 1), (torch.float64, 2), (torch.float64, 3), (torch.bfloat16, 3)]
)
def test_token_shift(kernels: SimpleNamespace, dtype: torch.dtype, num_mixes: int) -> None:
    torch.manual_seed(0)
    x, *grads = torch.randn(1 + num_mixes, 2, 2, 11, 130).to(dtype).unbind()  # two blocks each of rows, channels
    mixes = torch.rand(num_mixes, 130, dtype=torch.promote_types(dtype, torch.float32)).unbind()
    leaves = [y.double().requires_grad_() for y in (x, *mixes)]
    wanted = TokenShift.apply(*leaves)
    tolerance = dict(rtol=1e-2, atol=1e-2) if dtype == torch.bfloat16 else dict(rtol=1e-12, atol=1e-12)
    for shifted, y in zip(kernels.token_shift.shift(x, mixes), wanted, strict=True):
        torch.testing.assert_close(shifted.double(), y, **tolerance)
    grad_x, *grad_mixes = kernels.token_shift.shift_gradients(x, grads, mixes)
    expected = torch.autograd.grad(wanted, leaves, [grad.double() for grad in grads])
    torch.testing.assert_close(grad_x.double(), expected[0], **tolerance)
    for grad, y in zip(grad_mixes, expected[1:], strict=True):
        torch.testing.assert_close(grad.double(), y, rtol=1e-4, atol=1e-4)  # sums are computed in float32 or more


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_wkv(kernels: SimpleNamespace, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    k, v, grad = torch.randn(3, 3, 23, 70).to(dtype)
    w, u = torch.rand(2, 70).to(torch.promote_types(dtype, torch.float32))
    leaves = [x.clone().requires_grad_() for x in (k, v, w, u)]
    wanted = wkv(*leaves)
    tolerance = dict(rtol=2e-2, atol=2e-2) if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(kernels.wkv.wkv(k, v, w, u), wanted, **tolerance)
    found, expected = kernels.wkv.wkv_gradients(k, v, w, u, grad), torch.autograd.grad(wanted, leaves, grad)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, **tolerance or dict(rtol=1e-5, atol=1e-5))
