from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from recordings import check_firing_rates, check_gradients_and_statistics
from torch import Tensor
from torch.nn import functional as F

from systems.networks.spiking_unet import SpikingUNet
from systems.networks.unet import TimeEmbedding, double_size
from systems.sddpm import read_official
from systems.spiking.neurons import SpikingNeuron, scale_thresholds
from systems.spiking.steps import concatenate

pytestmark = pytest.mark.slow

Reference = Callable[[str], dict[str, Tensor]]


@pytest.fixture
def recorded(reference: Reference) -> dict[str, Tensor]:
    return reference("sddpm_small.safetensors")


@pytest.fixture
def network(recorded: dict[str, Tensor]) -> SpikingUNet:
    network = SpikingUNet(in_channels=1, base_channels=32, channel_mult=(1, 2), num_res_blocks=1, num_steps=4)
    state = {key.removeprefix("state."): value for key, value in recorded.items() if key.startswith("state.")}
    network.load_state_dict(read_official(state)[0])
    return network


def small(**arguments: object) -> SpikingUNet:
    return SpikingUNet(
        **({"in_channels": 1, "base_channels": 8, "channel_mult": (1, 2), "num_res_blocks": 1} | arguments)
    )


@pytest.mark.parametrize(("mode", "key"), [(False, "output.eval"), (True, "output.train")])
def test_reproduces_released_network(network: SpikingUNet, recorded: dict[str, Tensor], mode: bool, key: str) -> None:
    network.train(mode)
    output = network(recorded["input.x"], recorded["input.t"])
    torch.testing.assert_close(output, recorded[key], rtol=0, atol=1e-5)


def test_reproduces_threshold_guidance(network: SpikingUNet, recorded: dict[str, Tensor]) -> None:
    network.eval()
    scale_thresholds(network, 0.997)
    output = network(recorded["input.x"], recorded["input.t"])
    torch.testing.assert_close(output, recorded["output.eval_threshold_0.997"], rtol=0, atol=1e-5)


def test_reproduces_gradients_and_statistics(network: SpikingUNet, recorded: dict[str, Tensor]) -> None:
    assert any(key.startswith("grad.param_train.") for key in recorded)
    check_gradients_and_statistics(network, recorded)


def test_reproduces_firing_rates(network: SpikingUNet, recorded: dict[str, Tensor]) -> None:
    assert any(key.startswith("rate.eval.") for key in recorded)
    check_firing_rates(network, recorded)


@pytest.mark.parametrize(("channels", "count"), [(3, 66_696_413), (1, 66_691_725)])
def test_full_size_counts(channels: int, count: int) -> None:
    with torch.device("meta"):
        network = SpikingUNet(in_channels=channels)
    parameters = list(network.parameters())
    assert sum(p.numel() for p in parameters) == count
    assert sum(p.numel() for p in parameters if p.requires_grad) == count - 128_000
    assert sum(isinstance(m, SpikingNeuron) for m in network.modules()) == 51
    assert sum(isinstance(m, torch.nn.BatchNorm2d) for m in network.modules()) == 54
    assert len(network.state_dict()) == 455


def test_untrained_network_predicts_almost_nothing() -> None:
    torch.manual_seed(0)
    output = small().train()(torch.randn(2, 1, 8, 8), torch.tensor([0, 999]))
    assert output.abs().max() < 0.05


def test_time_embedding_table_and_real_valued_steps() -> None:
    embedding = TimeEmbedding(128, 1000)
    row = embedding.timembedding[0].weight[1, :4]
    torch.testing.assert_close(row, torch.tensor([0.8415, 0.5403, 0.7617, 0.6479]), rtol=0, atol=1e-4)
    t = torch.tensor([0, 7, 999])
    torch.testing.assert_close(embedding(t), embedding(t.float()), rtol=1e-4, atol=1e-4)
    assert not torch.equal(embedding(t.float()), embedding(t.float() + 0.5))


def test_calls_are_independent() -> None:
    torch.manual_seed(0)
    network = small().eval()
    x, t = torch.randn(3, 1, 8, 8), torch.tensor([1, 500, 900])
    first = network(x, t)
    network(torch.randn(5, 1, 16, 16), torch.zeros(5, dtype=torch.long))
    assert torch.equal(network(x, t), first)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_steps": 0}, "num_steps=0"),
        ({"base_channels": 7}, "base_channels must be a multiple of 2"),
        ({"channel_mult": ()}, "channel_mult not empty"),
        ({"attention_levels": (1,)}, "no attention"),
    ],
)
def test_bad_sizes_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**arguments)


def test_attention_at_a_missing_level_is_ignored() -> None:
    assert small(attention_levels=(8,)).state_dict().keys() == small().state_dict().keys()


def test_dropout_warns() -> None:
    with pytest.warns(UserWarning, match="no dropout layer"):
        small(dropout=0.1)


@pytest.mark.parametrize("shape", [(2, 1, 9, 8), (2, 3, 8, 8), (1, 8, 8)])
def test_images_of_wrong_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="multiples of 2"):
        small()(torch.zeros(shape), torch.zeros(shape[0], dtype=torch.long))


def test_joining_features_keeps_their_layout() -> None:
    first, second = (torch.randn(4, 3, 8, 8, c).movedim(-1, 2) for c in (2, 5))  # channels-last
    joined = concatenate(first, second)
    assert torch.equal(joined, torch.cat([first, second], dim=2))
    assert joined.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)


def test_doubling_is_exact_in_any_precision() -> None:
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(double_size(x), F.interpolate(x, scale_factor=2, mode="nearest"))
    with torch.autocast("cpu", torch.bfloat16):
        half = double_size(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, double_size(x).bfloat16())
