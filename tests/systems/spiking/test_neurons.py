from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import snntorch as snn
import torch
from snntorch import surrogate
from torch import Tensor, nn

from systems.spiking import multistep, neurons
from systems.spiking.neurons import (
    ConvertedNeuron,
    SpikingNeuron,
    integrate_and_fire,
    leaky_integrate_and_fire,
    scale_thresholds,
)
from systems.spiking.surrogates import rectangle, triangle


def gradient(f: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().clone().requires_grad_()
    y = f(x)
    weights = torch.arange(1, len(y) + 1, dtype=y.dtype).view(-1, *[1] * (y.dim() - 1))
    (y * weights).sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad


def by_hand(layer: snn.Leaky, scale: float = 1.0) -> Callable[[Tensor], Tensor]:
    def step(x: Tensor) -> Tensor:
        mem = torch.zeros_like(x[0])
        spikes = []
        for x_k in x:
            spike, mem = layer(x_k * scale, mem)
            spikes.append(spike)
        return torch.stack(spikes)

    return step


class DoubleATan(surrogate.ATan):
    """snnTorch's arctan surrogate without its cast to float32, which would round float64 gradients."""

    @staticmethod
    def forward(ctx: Any, input_: Tensor, alpha: float) -> Tensor:
        return surrogate.ATan.forward(ctx, input_, alpha).to(input_.dtype)


CASES = {
    "IF": dict(beta=1.0),
    "LIF": dict(beta=0.5, input_scale=0.5),
    "hard detached": dict(beta=0.8, detach_reset=True),
    "soft": dict(beta=0.9, reset_mechanism="subtract"),
    "soft detached": dict(beta=0.9, reset_mechanism="subtract", detach_reset=True),
    "soft delayed": dict(beta=0.9, reset_mechanism="subtract", reset_delay=True),
    "strict": dict(beta=0.8, fire_at_threshold=False),
    "threshold": dict(beta=1.0, threshold=0.7),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "spike_grad", ["atan", "fast_sigmoid", "triangle", "rectangle", "sigmoid", "straight_through_estimator"]
)
def test_fast_path_equals_stepping(case: str, spike_grad: str) -> None:
    torch.manual_seed(0)
    neuron = SpikingNeuron(**CASES[case], spike_grad=spike_grad)
    x = torch.randn(8, 3, 5, dtype=torch.float64)
    (fast, fast_grad), (plain, plain_grad) = gradient(neuron, x), gradient(neuron.stepwise, x)
    assert torch.equal(fast, plain)
    assert 0 < fast.mean() < 1
    torch.testing.assert_close(fast_grad, plain_grad, rtol=1e-14, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (dict(beta=1.0), dict(beta=1.0, reset_mechanism="zero", reset_delay=False)),
        (dict(beta=0.5, input_scale=0.5), dict(beta=0.5, reset_mechanism="zero", reset_delay=False)),
        (dict(beta=0.8, detach_reset=True), dict(beta=0.8, reset_mechanism="zero", reset_delay=True)),
        (
            dict(beta=0.9, reset_mechanism="subtract", reset_delay=True, detach_reset=True),
            dict(beta=0.9, reset_mechanism="subtract", reset_delay=True),
        ),
    ],
)
def test_equals_snntorch_stepped_by_hand(seed: int, ours: dict, theirs: dict) -> None:
    torch.manual_seed(seed)
    x = torch.randn(16, 7, 11, dtype=torch.float64)
    neuron = SpikingNeuron(**ours, fire_at_threshold=False)
    theirs = theirs | {"beta": torch.tensor(theirs["beta"], dtype=torch.float64)}
    leaky = snn.Leaky(**theirs, spike_grad=lambda u: DoubleATan.apply(u, 2.0)).double()
    for f in (neuron, neuron.stepwise):
        (spikes, grad), (expected, expected_grad) = gradient(f, x), gradient(by_hand(leaky, neuron.input_scale), x)
        assert torch.equal(spikes, expected)
        torch.testing.assert_close(grad, expected_grad, rtol=0, atol=1e-12)


def test_integrate_and_fire_check_values() -> None:
    x = torch.tensor([0.4, 0.6, 0.5, 1.5, -0.2, 1.2, 0.0], dtype=torch.float64).view(7, 1, 1)
    spikes, grad = gradient(integrate_and_fire(), x)
    assert spikes.flatten().tolist() == [0, 1, 0, 1, 0, 1, 0]
    expected = [1.794091, 1.726102, 0.273898, -0.690936, 5.755102, 5.356002, 0.643998]
    torch.testing.assert_close(grad.flatten(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-6)


def test_potential_at_the_threshold_fires_only_with_fire_at_threshold() -> None:
    x = torch.tensor([1.0, 0.5, 0.5]).view(3, 1, 1)
    assert integrate_and_fire()(x).flatten().tolist() == [1, 0, 1]
    assert SpikingNeuron(fire_at_threshold=False)(x).flatten().tolist() == [0, 1, 0]


def test_leaky_check_values() -> None:
    x = torch.tensor([0.8, 1.4, 1.0, 0.3], dtype=torch.float64).view(4, 1)
    potentials, _ = multistep.potentials_and_spikes(x, leaky_integrate_and_fire(tau=2.0)._dynamics)
    torch.testing.assert_close(torch.cat(potentials), torch.tensor([0.4, 0.9, 0.95, 0.625], dtype=torch.float64))


@pytest.mark.parametrize("reset", ["hard", "soft"])
def test_fsddim_neuron_reproduces_reference(reset: str, reference: Callable[[str], dict[str, Tensor]]) -> None:
    recorded = reference("fsddim_small.safetensors")
    neuron = SpikingNeuron(
        beta=0.8,
        reset_mechanism="zero" if reset == "hard" else "subtract",
        detach_reset=True,
        fire_at_threshold=False,
        spike_grad=triangle(),
    )
    spikes, grad = gradient(neuron, recorded["lif.input"].movedim(-1, 0))
    assert torch.equal(spikes.movedim(0, -1), recorded[f"lif.{reset}.output"])
    torch.testing.assert_close(grad.movedim(0, -1), recorded[f"lif.{reset}.grad"], rtol=0, atol=1e-6)


def test_surrogates_have_their_shape() -> None:
    u = torch.tensor([-0.6, -0.25, 0.0, 0.25, 0.6], dtype=torch.float64)
    for spike_grad, expected in ((triangle(0.5), [0, 0.5, 1, 0.5, 0]), (rectangle(0.5), [0, 1, 1, 1, 0])):
        derivative = multistep.surrogate_derivative(spike_grad, u.dtype)(u)
        torch.testing.assert_close(derivative, torch.tensor(expected, dtype=u.dtype))


@pytest.mark.parametrize("case", ["IF", "soft delayed"])
def test_compiled_kernel_equals_plain(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    neuron = SpikingNeuron(**CASES[case])
    x = torch.randn(4, 2, 3, 8, 8)
    plain, plain_grad = gradient(neuron, x)
    monkeypatch.setattr("systems.ops.compiled.COMPILE_FROM", 0)
    compiled, compiled_grad = gradient(neuron, x)
    assert torch.equal(compiled, plain)
    torch.testing.assert_close(compiled_grad, plain_grad, rtol=1e-5, atol=1e-6)


def test_neurons_of_a_network_share_one_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("systems.ops.compiled.COMPILE_FROM", 0)
    x = torch.randn(3, 2, 4, 8, 8)
    gradient(integrate_and_fire(), x)  # compiles the kernel
    inputs = [
        torch.randn(3, 5, 4, 6, 6),
        torch.randn(3, 7, 9),
        torch.randn(3, 2, 16, 4, 4).flatten(0, 1).to(memory_format=torch.channels_last).unflatten(0, (3, 2)),
        torch.randn(2, 3, 4, 8, 8).transpose(0, 1),
        torch.randn(4, 2, 4, 8, 8)[1:],
    ]
    with torch._dynamo.config.patch(error_on_recompile=True), warnings.catch_warnings():
        warnings.simplefilter("error")  # compiler errors surface as warnings
        for other in inputs:
            fresh = integrate_and_fire()
            assert torch.equal(fresh(other), fresh.stepwise(other))
            gradient(fresh, other)


def test_memory_layouts_agree() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 2, 3, 5, 6)
    last = x.flatten(0, 1).contiguous(memory_format=torch.channels_last).view_as(x)
    neuron = integrate_and_fire()
    expected = gradient(neuron, x)
    for other in (last, x.transpose(0, 1).contiguous().transpose(0, 1), x.expand(4, 2, 3, 5, 6)):
        spikes, grad = gradient(neuron, other)
        assert torch.equal(spikes, expected[0])
        torch.testing.assert_close(grad, expected[1])
    assert neuron(last).stride() == last.stride()


def test_half_precision_keeps_potentials_in_float32() -> None:
    x = torch.full((600, 1, 1), 2**-9, dtype=torch.bfloat16)  # bfloat16 sums would stop at 1/2
    spikes = integrate_and_fire()(x)
    assert spikes.dtype == torch.bfloat16
    assert spikes.nonzero()[:, 0].tolist() == [511]


def test_spikes_have_the_dtype_of_autocast() -> None:
    x = torch.randn(3, 4, 5)
    with torch.autocast("cpu", torch.bfloat16):
        spikes, grad = gradient(integrate_and_fire(), x)
    expected, expected_grad = gradient(integrate_and_fire(), x)
    assert (spikes.dtype, grad.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(spikes.float(), expected)
    torch.testing.assert_close(grad, expected_grad)


def passes(neuron: SpikingNeuron, norm: nn.Module, x: Tensor, through: Callable[..., Tensor]) -> list[Tensor]:
    """Spikes, gradients of input, weight and bias, and updated running statistics, for a copy of the norm."""
    norm = copy.deepcopy(norm)
    spikes, grad = gradient(lambda x: through(neuron, norm, x), x)
    return [spikes, grad, *(p.grad for p in norm.parameters()), *norm.buffers()]  # type: ignore[misc]


@pytest.mark.parametrize("layout", ["features", "channels last", "tokens", "strided tokens"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kernel", [False, True])
def test_norm_inside_the_neuron_equals_norm_then_neuron(
    layout: str, training: bool, kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 2, 6, 5, 7) * 2 + 0.3
    norm: nn.BatchNorm1d | nn.BatchNorm2d = nn.BatchNorm2d(6)
    if layout == "channels last":
        x = x.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, (4, 2))
    if layout == "tokens":
        x, norm = x.flatten(1, 2), nn.BatchNorm1d(7)
    if layout == "strided tokens":
        x, norm = x.flatten(1, 2).contiguous(memory_format=torch.channels_last), nn.BatchNorm1d(7)
    for values in (norm.weight, norm.bias, norm.running_var, norm.running_mean):
        nn.init.uniform_(values, 0.5, 1.5)
    norm.train(training)
    neuron = SpikingNeuron(beta=0.8, detach_reset=True, fire_at_threshold=False, spike_grad="triangle")
    expected = passes(neuron, norm, x, lambda neuron, norm, x: neuron.stepwise(x, norm))
    monkeypatch.setattr("systems.ops.compiled.COMPILE_FROM", 0 if kernel else 2**62)
    found = passes(neuron, norm, x, lambda neuron, norm, x: neuron(x, norm))
    assert 0.05 < found[0].mean() < 0.95
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", [False, True])
def test_norm_inside_the_neuron_computes_in_float32(kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr("systems.ops.compiled.COMPILE_FROM", 0 if kernel else 2**62)
    x, norm, neuron = torch.randn(4, 2, 6, 5, 5).bfloat16(), nn.BatchNorm2d(6).eval(), integrate_and_fire()
    nn.init.uniform_(norm.weight, 1, 2)
    spikes, grad = gradient(lambda x: neuron(x, norm), x)
    assert spikes.dtype == grad.dtype == torch.bfloat16
    assert torch.equal(spikes.float(), neuron(neurons.normalise(norm, x.float())))


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm2d(3, affine=False), nn.BatchNorm2d(3, momentum=None), nn.GroupNorm(1, 3), nn.Identity()]
)
def test_other_norms_are_called(norm: nn.Module) -> None:
    x = torch.randn(4, 2, 3, 5, 5)
    found = passes(integrate_and_fire(), norm, x, lambda neuron, norm, x: neuron(x, norm))
    expected = passes(integrate_and_fire(), norm, x, lambda neuron, norm, x: neuron(neurons.normalise(norm, x)))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_a_single_value_per_channel_has_no_statistics() -> None:
    norm = nn.BatchNorm2d(3)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        integrate_and_fire()(torch.randn(1, 1, 3, 1, 1), norm)
    assert norm.running_var is not None
    assert norm.running_var.isfinite().all()
    assert integrate_and_fire()(torch.randn(1, 1, 3, 1, 1), norm.eval()).shape == (1, 1, 3, 1, 1)


def test_second_derivatives_are_refused() -> None:
    """The hand-written backward pass has no derivative, so they would be wrong."""
    x = torch.randn(4, 2, 3, 5, 5, requires_grad=True)
    norm = nn.BatchNorm2d(3)
    for spikes in (integrate_and_fire()(x), integrate_and_fire()(x, norm)):
        (grad,) = torch.autograd.grad((spikes * x).sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.square().sum().backward()


def test_a_norm_inside_the_neuron_saves_only_its_input() -> None:
    kept: list[int] = []
    x = torch.randn(4, 2, 8, 16, 16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):  # type: ignore[func-returns-value]
        integrate_and_fire()(x, nn.BatchNorm2d(8))
    assert sum(n for n in kept if n >= x.numel()) == x.numel()


def test_has_no_state() -> None:
    neuron = integrate_and_fire()
    x = torch.full((3, 2, 1), 0.4)
    first, other = neuron(x), copy.deepcopy(neuron)(x)
    assert torch.equal(neuron(x), first)
    assert torch.equal(other, first)
    assert not neuron.state_dict()


def converted(alpha: float, **arguments: Any) -> ConvertedNeuron:
    neuron = ConvertedNeuron(**arguments).double()
    neuron.act_alpha.fill_(alpha)
    return neuron


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("threshold", [1.0, 0.997])
def test_converted_neuron_equals_snntorch_stepped_by_hand(seed: int, threshold: float) -> None:
    torch.manual_seed(seed)
    x = torch.randn(15, 7, 11, dtype=torch.float64) + 0.5
    reached = torch.tensor(1.7 * threshold, dtype=torch.float64)
    leaky = snn.Leaky(beta=1.0, threshold=reached, reset_mechanism="subtract", reset_delay=True).double()
    mem, expected = torch.full_like(x[0], float(reached) / 2), []
    for x_k in x:
        spike, mem = leaky(x_k, mem)
        expected.append(1.7 * spike.double())
    neuron = converted(1.7, threshold=threshold)
    assert torch.equal(neuron(x), torch.stack(expected))
    assert torch.equal(neuron.stepwise(x), torch.stack(expected))


def test_converted_neuron_counts_the_level_of_a_constant_current() -> None:
    x = torch.linspace(-1, 3, 201, dtype=torch.float64)
    levels = (x / 1.7).clamp(0, 1).mul(3).round()
    for signed in (False, True):
        spikes = converted(1.7, signed=signed)(x.expand(3, 1, -1))
        torch.testing.assert_close(spikes.sum(0)[0], 1.7 * levels)


def test_converted_neuron_takes_back_only_earlier_spikes() -> None:
    x = torch.tensor([[0.6, -0.9, -0.5, -2.0], [0.1, -2.0, 0.5, 2.4]], dtype=torch.float64).T[..., None]
    unsigned, signed = converted(1.0)(x), converted(1.0, signed=True)(x)
    assert unsigned[:, :, 0].T.tolist() == [[1, 0, 0, 0], [0, 0, 0, 1]]
    assert signed[:, :, 0].T.tolist() == [[1, -1, 0, 0], [0, 0, 0, 1]]


def test_converted_neuron_compiled_equals_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, 2, 3, 8, 8)
    neuron = ConvertedNeuron(signed=True)
    neuron.act_alpha.fill_(0.9)
    plain = neuron(x)
    assert plain.unique().tolist() == [-neuron.amplitude, 0, neuron.amplitude]
    monkeypatch.setattr("systems.ops.compiled.COMPILE_FROM", 0)
    assert torch.equal(neuron(x), plain)
    assert torch.equal(neuron(x[:, :1]), plain[:, :1])
    with pytest.raises(ValueError, match=r"takes \(T, B, \.\.\.\)"):
        neuron(torch.zeros(3))


def test_threshold_of_a_converted_neuron_is_relative() -> None:
    neuron = converted(2.0)
    x = torch.tensor([0.995], dtype=torch.float64).view(1, 1, 1)  # 1 + 0.995 lies between 0.997 * 2 and 2
    assert float(neuron(x)) == 0
    scale_thresholds(neuron, 0.99)
    assert float(neuron(x)) == 2
    assert float(neuron.act_alpha) == 2


def test_threshold_guidance_reaches_every_neuron() -> None:
    network = nn.Sequential(integrate_and_fire(), nn.Sequential(integrate_and_fire()))
    scale_thresholds(network, 0.997)
    assert [m._dynamics.threshold for m in network.modules() if isinstance(m, SpikingNeuron)] == [0.997, 0.997]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(threshold=0.0), "threshold=0.0 is not a firing threshold"),
        (dict(threshold=float("nan")), "threshold=nan"),
        (dict(beta=1.5), "beta=1.5 is not a membrane decay"),
        (dict(reset_mechanism="none"), "choose 'zero' or 'subtract'"),
        (dict(spike_grad="arctan"), "choose one of: .*atan"),
    ],
)
def test_bad_constants_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SpikingNeuron(**arguments)


def test_currents_without_a_time_axis_are_refused() -> None:
    with pytest.raises(ValueError, match=r"takes \(T, B, \.\.\.\)"):
        integrate_and_fire()(torch.zeros(3))
