from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from spiking_diffusion_reference import check_gradients, check_statistics, load
from torch import Tensor
from torch.nn import functional as F

from systems.networks.vq_svae import VQSVAE, Reconstruction, equilibrium_loss, postsynaptic_potential
from systems.spiking.neurons import membrane_output
from systems.spiking_diffusion import _rename

Reference = Callable[[str], dict[str, Tensor]]


@pytest.fixture(autouse=True)
def _uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("systems.ops.compiled.COMPILE_FROM", sys.maxsize)  # compilation takes longer than these tests


@pytest.fixture
def recorded(reference: Reference) -> dict[str, Tensor]:
    return reference("vqsvae_small.safetensors")


@pytest.fixture
def network(reference: Reference) -> VQSVAE:
    return load(reference).autoencoder


def small(**arguments: int) -> VQSVAE:
    return VQSVAE(**({"num_codes": 8, "code_channels": 4, "base_channels": 4, "num_steps": 3} | arguments))


def test_reproduces_the_released_network(network: VQSVAE, recorded: dict[str, Tensor]) -> None:
    found = network.eval()(recorded["input.image01"] - 0.5)
    assert torch.equal(found.encoder_spikes, recorded["eval.encoder_spikes"].float())
    assert torch.equal(found.indices, recorded["eval.indices"])
    assert torch.equal(found.generator_spikes, recorded["eval.generator_spikes"].float())
    torch.testing.assert_close(found.features, recorded["eval.x_memout"], rtol=0, atol=1e-5)
    torch.testing.assert_close(found.images, recorded["eval.reconstruction"], rtol=0, atol=1e-5)


def test_reproduces_the_decoding_of_indices(network: VQSVAE, recorded: dict[str, Tensor]) -> None:
    _, images = network.eval().decode(network.lookup(recorded["decode.indices"]))
    torch.testing.assert_close(images, recorded["decode.image"], rtol=0, atol=1e-5)
    truncated = ((images + 0.5).clamp(0, 1) * 255).to(torch.uint8)
    assert torch.equal(truncated, recorded["decode.image_u8"])


def test_reproduces_losses_gradients_and_statistics(network: VQSVAE, recorded: dict[str, Tensor]) -> None:
    network.train()
    images = (recorded["input.image01"] - 0.5).requires_grad_()
    found = network(images)
    assert torch.equal(found.indices, recorded["train.indices"])
    equilibrium = equilibrium_loss(found)
    error = F.mse_loss(found.images, images.detach()) / recorded["input.data_variance"]
    torch.testing.assert_close(equilibrium, recorded["train.loss_eq"].squeeze(), rtol=0, atol=1e-5)
    torch.testing.assert_close(error, recorded["train.loss_rec"], rtol=0, atol=1e-5)
    (equilibrium + error).sum().backward()
    prefix = "train.grad.param."
    theirs = {_rename(k.removeprefix(prefix)): v for k, v in recorded.items() if k.startswith(prefix)}
    assert theirs.keys() == dict(network.named_parameters()).keys()
    ours = {name: parameter.grad for name, parameter in network.named_parameters()}
    check_gradients(ours, theirs, floor=1e-2)
    check_gradients({"x": images.grad}, {"x": recorded["train.grad.input"].sum(0)}, floor=1e-3)
    prefix = "after_train."
    check_statistics(network, {_rename(k.removeprefix(prefix)): v for k, v in recorded.items() if k.startswith(prefix)})


def test_reproduces_the_synapse(recorded: dict[str, Tensor]) -> None:
    found = postsynaptic_potential(recorded["psp.input"])
    torch.testing.assert_close(found, recorded["psp.output"], rtol=0, atol=1e-6)


def test_published_size() -> None:
    network = VQSVAE()
    assert sum(p.numel() for p in network.parameters()) == 50_658
    assert sum(p.numel() for p in network.encoder.parameters()) == 20_080


def test_membrane_output_weighs_late_spikes_more() -> None:
    assert membrane_output(torch.ones(16, 1)).item() == pytest.approx(4.8593, abs=1e-4)
    spikes = torch.eye(3)  # neuron k spikes at step k
    torch.testing.assert_close(membrane_output(spikes), torch.tensor([0.64, 0.8, 1.0]))


def test_codes_get_gradients_only_from_the_quantiser_loss() -> None:
    torch.manual_seed(0)
    network = small()
    found = network(torch.rand(2, 1, 8, 8) - 0.5)
    found.images.sum().backward()
    assert network.codebook.weight.grad is None  # straight through
    assert network.alpha.grad is not None
    assert network.alpha.grad.abs() > 0
    equilibrium_loss(network(torch.rand(2, 1, 8, 8) - 0.5)).backward()
    assert network.codebook.weight.grad is not None


def test_equal_parts_have_no_equilibrium_loss() -> None:
    x, spikes = torch.rand(2, 4, 3, 3), torch.rand(5, 2, 4, 3, 3)
    assert equilibrium_loss(Reconstruction(spikes, x, x, x, spikes, x)) == 0


def test_nearest_code_and_the_first_of_equal_ones() -> None:
    network = small(num_codes=3, code_channels=2)
    network.codebook.weight.data = torch.tensor([[0.0, 0.0], [1.0, 1.0], [1.0, 1.0]])
    features = torch.tensor([[0.1, 0.9], [0.2, 0.7]]).view(1, 2, 1, 2)
    assert network.quantise(features).tolist() == [[[0, 1]]]


@pytest.mark.parametrize(("channels", "size"), [(1, 28), (3, 32), (3, 64)])
def test_other_sizes(channels: int, size: int) -> None:
    found = small(in_channels=channels).eval()(torch.zeros(1, channels, size, size))
    assert found.images.shape == (1, channels, size, size)
    assert found.indices.shape == (1, size // 4, size // 4)


@pytest.mark.parametrize("shape", [(2, 1, 30, 28), (2, 3, 28, 28), (1, 28, 28)])
def test_images_of_wrong_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="multiples of 4"):
        small()(torch.zeros(shape))


@pytest.mark.parametrize(("name", "value"), [("num_steps", 0), ("num_codes", 1), ("base_channels", 0)])
def test_bad_sizes_are_refused(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{name}={value}"):
        small(**{name: value})


def test_half_precision_does_not_change_codes() -> None:
    torch.manual_seed(0)
    network = VQSVAE(num_codes=512, code_channels=16, base_channels=8, num_steps=2)
    features = torch.randn(4, 16, 7, 7)
    indices = network.quantise(features)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(network.quantise(features), indices)


def test_readouts_stay_in_full_precision() -> None:
    spikes = (torch.rand(16, 5) < 0.3).bfloat16()
    for readout in (membrane_output, postsynaptic_potential):
        with torch.autocast("cpu", torch.bfloat16):
            half = readout(spikes)
        torch.testing.assert_close(half, readout(spikes.float()))
