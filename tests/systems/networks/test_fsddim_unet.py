from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from fsddim_reference import PREFIXES, recorded_system, tiny
from torch import Tensor, nn

from systems import FSDDIM
from systems.networks.fsddim_unet import scaled_norm, sinusoids
from systems.spiking.neurons import SpikingNeuron
from systems.spiking.steps import fold, unfold

Reference = Callable[[str], dict[str, Tensor]]


@pytest.fixture
def recorded(reference: Reference) -> dict[str, Tensor]:
    return reference("fsddim_small.safetensors")


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm().clamp(min=1e-3))


@pytest.mark.parametrize("norm", PREFIXES)
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_reproduces_released_network(recorded: dict[str, Tensor], norm: str, mode: str) -> None:
    network = recorded_system(recorded, norm).network.train(mode == "train")
    with torch.no_grad():
        output = network(recorded["input.x"].movedim(-1, 0), recorded["input.t"])
    torch.testing.assert_close(output.movedim(0, -1), recorded[f"{PREFIXES[norm]}output.{mode}"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("norm", PREFIXES)
def test_reproduces_gradients_and_statistics(recorded: dict[str, Tensor], norm: str) -> None:
    network = recorded_system(recorded, norm).network.train()
    x = recorded["input.x"].movedim(-1, 0).clone().requires_grad_()
    network(x, recorded["input.t"]).square().sum().backward()
    assert x.grad is not None
    assert relative(x.grad.movedim(0, -1), recorded[f"{PREFIXES[norm]}grad.input_train"]) < 1e-4

    def named(prefix: str) -> dict[str, Tensor]:
        prefix = PREFIXES[norm] + prefix
        found = {key.removeprefix(prefix): value for key, value in recorded.items() if key.startswith(prefix)}
        assert found
        return found

    for name, expected in named("grad.param_train.").items():
        grad = network.get_parameter(name).grad
        assert grad is not None
        assert relative(grad.view(expected.shape), expected) < 1e-4, name
    for name, expected in named("after_train.").items():
        torch.testing.assert_close(network.get_buffer(name), expected, rtol=1e-5, atol=1e-6, msg=name)


def test_reproduces_hidden_states(recorded: dict[str, Tensor]) -> None:
    network = recorded_system(recorded, "tdbn").network
    seen: dict[str, Tensor] = {}
    keys = [key.removeprefix("hidden.eval.") for key in recorded if key.startswith("hidden.eval.")]
    for name in keys:
        module = network.temb[1] if name == "temb" else network.get_submodule(name)
        module.register_forward_hook(lambda m, i, out, name=name: seen.__setitem__(name, out))
    with torch.no_grad():
        network(recorded["input.x"].movedim(-1, 0), recorded["input.t"])
    assert len(keys) == 8
    for name in keys:
        ours = unfold(seen[name], 4) if name == "conv_in" else seen[name]
        expected = recorded[f"hidden.eval.{name}"]
        torch.testing.assert_close(ours[:, :1].movedim(0, -1), expected, rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize(("channels", "count"), [(1, 52_536_705), (3, 52_540_547)])
def test_full_size_counts(channels: int, count: int) -> None:
    with torch.device("meta"):
        network = FSDDIM(in_channels=channels).network
    assert sum(p.numel() for p in network.parameters()) == count
    assert len(network.state_dict()) == 452


def test_time_table(recorded: dict[str, Tensor]) -> None:
    torch.testing.assert_close(sinusoids(1000, 32), recorded["state.pe"], rtol=0, atol=1e-4)


def test_synchronised_norm_keeps_the_factor_of_tdbn() -> None:
    """Converting the released layer drops its factor; here the factor is outside the converted norm."""
    network = tiny(norm="tdbn").network
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(tiny(norm="tdbn").network)
    assert any(isinstance(m, nn.SyncBatchNorm) for m in converted.modules())
    x, t = torch.randn(3, 2, 1, 8, 8), torch.tensor([3, 700])
    assert torch.equal(converted(x, t), network(x, t))
    assert not torch.allclose(network(x, t), tiny(norm="plain").network(x, t))


def test_scaled_norm_scales_all_but_the_bias() -> None:
    bn = nn.BatchNorm2d(2)
    nn.init.constant_(bn.bias, 3.0)
    x = torch.randn(4, 2, 5, 5)
    torch.testing.assert_close(scaled_norm(bn, x, 0.5) - 3, (bn(x) - 3) / 2)


def test_all_transmitted_features_are_spikes_only_with_the_first_activation() -> None:
    x, t = torch.randn(3, 2, 1, 8, 8), torch.tensor([3, 700])

    def spiking(activate: bool) -> list[bool]:
        network = tiny(activate_first_conv=activate, num_res_blocks=2).network
        parts = network.features(unfold(network.conv_in(fold(x)), 3), t)
        assert sum(part.shape[2] for part in parts) == network.conv_out.in_channels
        return [bool(((part == 0) | (part == 1)).all()) for part in parts]

    assert spiking(False) == [True, False, True, True, True, True]
    assert spiking(True) == [True] * 6


def test_calls_are_independent() -> None:
    network = tiny().network
    x, t = torch.randn(3, 2, 1, 8, 8), torch.tensor([1, 900])
    first = network(x, t)
    network(torch.randn(3, 5, 1, 16, 16), torch.zeros(5, dtype=torch.long))
    assert torch.equal(network(x, t), first)


def test_neurons_match_the_paper() -> None:
    neurons = [m for m in tiny().network.modules() if isinstance(m, SpikingNeuron)]
    assert {(n.beta, n.threshold, n.reset_mechanism, n.detach_reset, n.fire_at_threshold) for n in neurons} == {
        (0.8, 1.0, "zero", True, False)
    }
    assert len({n.spike_grad for n in neurons}) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_channels": 7}, "base_channels=7.* a multiple of 2 and at least 4"),
        ({"channel_mult": ()}, "describe a U-Net"),
        ({"norm": "tdBN"}, "norm='tdBN' is unknown; choose 'plain'"),
    ],
)
def test_bad_sizes_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**options)


@pytest.mark.parametrize("shape", [(3, 2, 1, 9, 8), (3, 2, 3, 8, 8), (2, 1, 8, 8)])
def test_currents_of_wrong_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"takes \(T, B, 1, H, W\) with H and W multiples of 2"):
        tiny().network(torch.zeros(shape), torch.zeros(2, dtype=torch.long))
