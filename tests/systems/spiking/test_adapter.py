"""snnTorch's neurons through `multistep`, against snnTorch stepped by hand in float64."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import snntorch as snn
import torch
from snntorch_by_hand import atan64, step_by_hand
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from systems.spiking.adapter import leaks, multistep, spiking_layer, spiking_layers
from systems.spiking.neurons import SpikingNeuron, integrate_and_fire, norm_and_embed, scale_thresholds

GRADED = dict(graded_spikes_factor=0.7, learn_graded_spikes_factor=True)
STEPPED: dict[str, Any] = {
    "Leaky": partial(snn.Leaky, beta=0.9, learn_beta=True, learn_threshold=True, **GRADED),
    "Leaky to zero": partial(snn.Leaky, beta=0.9, reset_mechanism="zero", reset_delay=False),
    "Leaky without reset": partial(snn.Leaky, beta=0.5, reset_mechanism="none"),
    "Synaptic": partial(snn.Synaptic, alpha=0.7, beta=0.8, learn_alpha=True, learn_beta=True),
    "Alpha": partial(snn.Alpha, alpha=0.9, beta=0.8, learn_threshold=True, threshold=0.3),
    "Lapicque": partial(snn.Lapicque, beta=0.6, threshold=0.3),
    "RLeaky": partial(snn.RLeaky, beta=0.9, conv2d_channels="channels", kernel_size=3, learn_beta=True),
    "RLeaky one to one": partial(snn.RLeaky, beta=0.9, V=0.4, all_to_all=False),
    "RSynaptic": partial(snn.RSynaptic, alpha=0.7, beta=0.8, conv2d_channels="channels", kernel_size=3),
}
SHAPE = (6, 2, 3, 4, 5)  # (T, B, C, H, W)


def made(name: str) -> tuple[nn.Module, nn.Module]:
    """Returns the adapted layer and the same neuron as snnTorch made it."""
    torch.manual_seed(0)
    layer = spiking_layer(partial(STEPPED[name], spike_grad=atan64), 3).double()
    torch.manual_seed(0)
    keywords = {k: 3 if v == "channels" else v for k, v in STEPPED[name].keywords.items()}
    return layer, STEPPED[name].func(**keywords, spike_grad=atan64).double()


def gradients(y: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    weights = torch.arange(1, y.numel() + 1, dtype=y.dtype).view(y.shape).sin()
    return torch.autograd.grad((y * weights).sum(), inputs, allow_unused=True)


@pytest.mark.parametrize("name", STEPPED)
def test_equals_stepping_by_hand(name: str) -> None:
    layer, neuron = made(name)
    x = (2 * torch.randn(SHAPE, dtype=torch.float64)).requires_grad_()
    spikes, expected = layer(x), step_by_hand(neuron, x)
    assert torch.equal(spikes, expected)
    assert 0 < (spikes != 0).double().mean() < 1
    assert torch.equal(layer(x), spikes)  # nothing is left from the call before
    pairs = list(zip(layer.parameters(), neuron.parameters(), strict=True))
    found, wanted = gradients(spikes, [x, *(a for a, _ in pairs)]), gradients(expected, [x, *(b for _, b in pairs)])
    for a, b in zip(found, wanted, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert torch.equal(a, b)


def test_recurrent_features_are_the_channels_of_each_pixel() -> None:
    torch.manual_seed(0)
    layer = multistep(snn.RLeaky(beta=0.9, linear_features=3, spike_grad=atan64)).double()
    x = 2 * torch.randn(SHAPE, dtype=torch.float64)
    for pixel in ((0, 0), (2, 3)):
        assert torch.equal(layer(x)[..., *pixel], layer(x[..., *pixel]))


def test_parallel_neurons_see_all_steps_at_once() -> None:
    torch.manual_seed(0)
    neuron = snn.LeakyParallel(3, 3, beta=0.9, learn_beta=True, spike_grad=atan64).double()
    layer = multistep(copy.deepcopy(neuron))
    x = (3 * torch.randn(SHAPE, dtype=torch.float64)).requires_grad_()
    tokens = x.movedim(2, -1).reshape(6, -1, 3)  # (T, pixels, C)
    spikes, expected = layer(x), neuron(tokens).view(6, 2, 4, 5, 3).movedim(-1, 2)
    assert torch.equal(spikes, expected)
    assert 0 < spikes.mean() < 1
    torch.testing.assert_close(gradients(spikes, [x])[0], gradients(expected, [x])[0], rtol=1e-12, atol=1e-12)


def test_norm_and_time_embedding_come_first() -> None:
    layer, neuron = made("Leaky")
    norm, temb = nn.BatchNorm2d(3).double(), torch.randn(2, 3, dtype=torch.float64)
    x = torch.randn(SHAPE, dtype=torch.float64)
    assert torch.equal(layer(x, norm, temb), step_by_hand(neuron, norm_and_embed(x, norm, temb)))


def test_guidance_scales_thresholds() -> None:
    layer, neuron = made("Leaky")
    scale_thresholds(nn.Sequential(layer), 0.6)
    x = torch.randn(SHAPE, dtype=torch.float64)
    with torch.no_grad():
        expected = neuron(x[0], torch.zeros_like(x[0]))[0]
        neuron.threshold *= 0.6
        assert torch.equal(layer(x), step_by_hand(neuron, x))
    assert not torch.equal(layer(x)[0], expected)


@pytest.mark.parametrize("name", STEPPED)
def test_averaged_weights_copies_and_files_contain_no_state(name: str) -> None:
    """snnTorch's own layer fails in both: its buffers change their shapes, and cannot be copied."""
    torch.manual_seed(0)
    layer = spiking_layer(STEPPED[name], 3)
    averaged = AveragedModel(layer, use_buffers=True, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    x = torch.randn(SHAPE)
    for batch in (x, x[:, :1], x):
        layer(batch).sum()
        averaged.update_parameters(layer)
    assert torch.equal(averaged.module(x), layer(x))  # 0-, 1- and 2-valued constants among them
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    state = layer.state_dict()
    assert not {key.split(".")[-1] for key in state} & {"mem", "syn", "spk", "syn_exc", "syn_inh"}
    other = spiking_layer(STEPPED[name], 3)
    other.load_state_dict(state)
    assert torch.equal(other(x), layer(x))


def test_snntorch_itself_cannot_be_averaged() -> None:
    neuron = snn.Leaky(0.9)
    averaged = AveragedModel(neuron, use_buffers=True, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    averaged.update_parameters(neuron)
    neuron(torch.rand(2, 3), torch.zeros(2, 3))
    with pytest.raises(RuntimeError, match="must match the size"):
        averaged.update_parameters(neuron)


def test_layers_are_not_kept_alive_by_snntorch() -> None:
    before = len(snn.SpikingNeuron.instances)
    multistep(snn.Leaky(0.9))
    assert len(snn.SpikingNeuron.instances) == before


def test_a_checkpoint_that_replaces_an_option_is_reported() -> None:
    state = multistep(snn.Leaky(0.9, threshold=1.0)).state_dict()
    with pytest.warns(UserWarning, match="neuron.threshold is 1 as in the checkpoint, not 0.8"):
        multistep(snn.Leaky(0.9, threshold=0.8)).load_state_dict(state)


def test_dtypes_follow_autocast_and_potentials_stay_in_float32() -> None:
    layer, x = multistep(snn.Leaky(beta=1.0)), torch.full((600, 1, 1), 2**-9, dtype=torch.bfloat16)
    assert layer(x).dtype == torch.bfloat16
    assert layer(x).nonzero()[:, 0].tolist() == [512]  # strictly above 1
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.rand(2, 1, 3)).dtype == torch.bfloat16


def test_every_layer_has_neurons_of_its_own_size() -> None:
    class Neuron(SpikingNeuron):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(channels))

    assert spiking_layer(Neuron, 5).scale.shape == (5,)
    assert spiking_layer(lambda channels: snn.Leaky(torch.rand(channels)), 4).neuron.beta.shape == (4,)
    assert isinstance(spiking_layer(integrate_and_fire, 5), SpikingNeuron)
    first, second = (spiking_layer(STEPPED["RLeaky"], n).neuron.recurrent for n in (3, 7))
    assert (first.in_channels, second.in_channels) == (3, 7)


def test_spiking_layers_are_found_whoever_made_them() -> None:
    network = nn.ModuleDict({"own": SpikingNeuron(), "adapted": multistep(snn.Leaky(0.9)), "raw": snn.Alpha(0.9, 0.8)})
    assert [name for name, _ in spiking_layers(network)] == ["own", "adapted", "raw"]


@pytest.mark.parametrize(
    ("create", "error", "message"),
    [
        (nn.ReLU, TypeError, "ReLU is not a spiking neuron: it has no threshold"),
        (snn.Leaky(0.9), TypeError, "every layer needs its own; give a class or a function"),
        (partial(snn.Leaky, 0.9, init_hidden=True), ValueError, "init_hidden=True.* leave the option out"),
        (partial(snn.Lapicque, 0.9, learn_beta=True), ValueError, "never trains in snnTorch.* use Leaky"),
        (partial(snn.Leaky, 0.9, spike_grad="arctan"), ValueError, "choose one of: .*atan"),
    ],
)
def test_what_cannot_work_is_refused(create: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        spiking_layer(create, 3)


def test_currents_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"RLeaky with conv2d_channels takes features .* use linear_features"):
        spiking_layer(STEPPED["RLeaky"], 3)(torch.rand(4, 2, 6, 3))
    with pytest.warns(UserWarning, match="Inhibition is an unstable"):
        inhibited = multistep(snn.Leaky(0.9, inhibition=True))
    assert inhibited(torch.rand(3, 2, 4)).shape == (3, 2, 4)
    with pytest.raises(ValueError, match="takes dense layers"):
        inhibited(torch.rand(3, 2, 4, 4, 4))
    with pytest.raises(ValueError, match=r"takes \(T, B, \.\.\.\)"):
        multistep(snn.Leaky(0.9))(torch.rand(3, 4))


@pytest.mark.parametrize(
    ("layer", "leaky"),
    [
        (SpikingNeuron(), False),
        (SpikingNeuron(beta=0.5), True),
        (SpikingNeuron(learn_beta=True), True),
        (snn.Leaky(beta=1.0), False),
        (multistep(snn.Leaky(beta=0.9)), True),
        (snn.Leaky(beta=1.0, learn_beta=True), True),
    ],
)
def test_integrate_and_fire_neurons_do_not_leak(layer: nn.Module, leaky: bool) -> None:
    assert leaks(layer) is leaky
