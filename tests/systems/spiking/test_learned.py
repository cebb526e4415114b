"""Learned decay and threshold of the suite's neuron: the fused backward pass against autograd and snnTorch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import snntorch as snn
import torch
from snntorch_by_hand import atan64, step_by_hand
from torch import Tensor, nn

from systems.spiking.neurons import SpikingNeuron, integrate_and_fire, scale_thresholds

CASES = {
    "hard": dict(beta=0.8),
    "hard detached": dict(beta=0.8, detach_reset=True),
    "soft": dict(beta=0.9, reset_mechanism="subtract", input_scale=0.5),
    "soft detached": dict(beta=0.9, reset_mechanism="subtract", detach_reset=True),
    "soft delayed": dict(beta=0.9, reset_mechanism="subtract", reset_delay=True),
    "strict": dict(beta=0.7, threshold=0.6, fire_at_threshold=False),
}
LEARNED = {"beta": dict(learn_beta=True), "threshold": dict(learn_threshold=True)}
LEARNED["both"] = LEARNED["beta"] | LEARNED["threshold"]


def gradients(f: Callable[[Tensor], Tensor], layer: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    x = x.detach().clone().requires_grad_()
    y = f(x)
    weights = torch.arange(1, y.numel() + 1, dtype=y.dtype).view(y.shape).sin()
    names, parameters = zip(*layer.named_parameters(), strict=True)
    grads = torch.autograd.grad((y * weights).sum(), [x, *parameters])
    return y.detach(), dict(zip(["input", *names], grads, strict=True))


@pytest.mark.parametrize("learned", LEARNED)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("normed", [False, True])
def test_fused_gradients_equal_autograd(case: str, learned: str, normed: bool) -> None:
    torch.manual_seed(0)
    neuron = SpikingNeuron(**CASES[case], **LEARNED[learned]).double()
    norm = nn.BatchNorm2d(3).double().train(False) if normed else None
    x = torch.randn(6, 2, 3, 4, 4, dtype=torch.float64)
    spikes, grads = gradients(lambda x: neuron(x, norm), neuron, x)
    plain, expected = gradients(lambda x: neuron.stepwise(x, norm), neuron, x)
    assert torch.equal(spikes, plain)
    assert 0 < spikes.mean() < 1
    for name, grad in grads.items():
        assert expected[name].abs().max() > 1e-3, name
        torch.testing.assert_close(grad, expected[name], rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name} {m}")


def test_gradients_equal_snntorch_stepped_by_hand() -> None:
    torch.manual_seed(0)
    options = dict(beta=0.9, threshold=0.8, learn_beta=True, learn_threshold=True, reset_mechanism="subtract")
    leaky = snn.Leaky(**options, spike_grad=atan64).double()
    ours = SpikingNeuron(**options, reset_delay=True, detach_reset=True, fire_at_threshold=False).double()
    x = torch.randn(8, 2, 5, dtype=torch.float64)
    spikes, grads = gradients(ours, ours, x)
    expected, expected_grads = gradients(lambda x: step_by_hand(leaky, x), leaky, x)
    assert torch.equal(spikes, expected)
    for name in ("input", "beta", "threshold"):
        torch.testing.assert_close(grads[name], expected_grads[name], rtol=1e-12, atol=1e-12)


def test_compiled_gradients_equal_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    neuron = SpikingNeuron(beta=0.8, learn_beta=True, learn_threshold=True)
    x = torch.randn(4, 2, 3, 8, 8)
    spikes, plain = gradients(neuron, neuron, x)
    monkeypatch.setattr("systems.ops.compiled.COMPILE_FROM", 0)
    compiled_spikes, compiled = gradients(neuron, neuron, x)
    assert torch.equal(compiled_spikes, spikes)
    for name, grad in compiled.items():
        torch.testing.assert_close(grad, plain[name], rtol=1e-4, atol=1e-4)


def test_a_single_step_does_not_depend_on_the_decay() -> None:
    neuron = SpikingNeuron(beta=0.8, learn_beta=True)
    _, grads = gradients(neuron, neuron, torch.rand(1, 2, 3))
    assert float(grads["beta"]) == 0


def test_a_learned_decay_is_clamped() -> None:
    neuron = SpikingNeuron(beta=1.0, learn_beta=True)
    x = torch.rand(5, 2, 3)
    with torch.no_grad():
        neuron.beta += 3.0
    assert torch.equal(neuron(x), integrate_and_fire()(x))


def test_they_train_and_are_stored() -> None:
    torch.manual_seed(0)
    neuron = SpikingNeuron(beta=0.5, learn_beta=True, learn_threshold=True)
    optimizer, x = torch.optim.SGD(neuron.parameters(), lr=0.2), torch.rand(8, 4, 16)
    before = float(neuron(x).mean().detach())
    for _ in range(40):
        optimizer.zero_grad()
        (1 - neuron(x).mean()).square().backward()
        optimizer.step()
    assert float(neuron(x).mean().detach()) > before + 0.1
    assert neuron.beta > 0.5
    assert neuron.threshold < 1
    assert neuron.state_dict().keys() == {"beta", "threshold"}
    assert "(learned)" in repr(neuron)


def test_threshold_guidance_scales_a_learned_threshold() -> None:
    learned, constant = SpikingNeuron(threshold=0.8, learn_threshold=True), SpikingNeuron(threshold=0.8 * 0.5)
    scale_thresholds(learned, 0.5)
    x = torch.randn(6, 2, 3)
    assert torch.equal(learned(x), constant(x))
    assert gradients(learned, learned, x)[1]["threshold"] != 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(beta=nn.Parameter(torch.tensor(0.9))), "beta is a Parameter, .* learn_beta=True"),
        (dict(threshold=torch.tensor(0.9)), "threshold is a Tensor, .* learn_threshold=True"),
        (dict(input_scale=torch.tensor(0.9)), "input_scale is a Tensor, which would never train; give a number$"),
    ],
)
def test_tensors_that_would_never_train_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SpikingNeuron(**arguments)


def test_a_batch_without_time_steps_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(7, 5\); a spiking layer takes \(T, B, \.\.\.\).*unfold"):
        SpikingNeuron()(torch.rand(7, 5))
