"""What is linear between spikes and a layer folds into its weights; the rest is counted as additions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from leaderboard.evaluation.cost import CostMeter
from leaderboard.record.counts import LayerCounts
from leaderboard.record.records import Cost
from systems.networks.fsddim_unet import FSDDIMUNet
from systems.networks.spiking_transformer import ShiftedLinear, SpikingTransformer
from systems.networks.spiking_unet import SpikingUNet
from systems.networks.unet import double_size
from systems.spiking.neurons import SpikingNeuron


def cost_of(network: nn.Module, *inputs: Tensor) -> Cost:
    with torch.no_grad(), CostMeter(network) as meter:
        network.eval()(*inputs)
    return meter.take().cost(network, 1, 1)


class Between(nn.Module):
    """Neurons, a linear map, and a 3x3 convolution."""

    def __init__(self, *between: nn.Module, channels: int = 4) -> None:
        super().__init__()
        self.neuron, self.between, self.conv = (
            SpikingNeuron(),
            nn.Sequential(*between),
            nn.Conv2d(channels, 5, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:  # (T, B, 4, H, W)
        return self.conv(self.between(self.neuron(x).flatten(0, 1)))

    def connections(self, size: int) -> float:
        """Spikes on which the outputs in the middle of the image depend, on average over the two phases of pixels."""
        spikes = torch.zeros(1, 4, size, size, requires_grad=True)
        out = self.conv(self.between(spikes))
        middle = out.shape[-1] // 2
        found = []
        for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
            (gradient,) = torch.autograd.grad(out[0, 0, middle + i, middle + j], spikes, retain_graph=True)
            found.append(int(torch.count_nonzero(gradient)))
        return sum(found) / 4


class Double(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return double_size(x)


MAPS: dict[str, tuple[list[nn.Module], int]] = {
    "average pooling": ([nn.AvgPool2d(2)], 4),
    "overlapping pooling": ([nn.AvgPool2d(3, stride=2)], 4),
    "nearest neighbour": ([Double()], 4),
    "batch norm": ([nn.BatchNorm2d(4)], 4),
    "1x1 convolution": ([nn.Conv2d(4, 6, 1)], 6),
    "depthwise convolution": ([nn.Conv2d(4, 4, 3, groups=4, padding=1)], 4),
    "strided convolution": ([nn.Conv2d(4, 2, 2, stride=2)], 2),
    "pooling and 1x1 convolution": ([nn.AvgPool2d(2), nn.Conv2d(4, 6, 1)], 6),
    "nearest neighbour and convolution": ([Double(), nn.Conv2d(4, 3, 3, padding=1), nn.BatchNorm2d(3)], 3),
    "pooling and back": ([nn.AvgPool2d(2), Double()], 4),
}


@pytest.mark.parametrize("name", MAPS)
def test_folded_connections_are_those_of_the_composed_map(name: str) -> None:
    """The derivative of an output with regard to the spikes has as many nonzero elements as folded connections."""
    torch.manual_seed(0)
    between, channels = MAPS[name]
    network = Between(*between, channels=channels)
    x = 2 * torch.rand(3, 2, 4, 16, 16)
    found = cost_of(network, x)
    assert found.counts is not None
    layer = found.counts.layers["conv"]
    rate = found.firing_rates["neuron"]
    assert layer.folded_macs == 0
    if name == "pooling and back":  # pairs of equal pixels depend on the same four spikes
        assert network.connections(16) == 4 * 16
    assert layer.folded_acs == pytest.approx(layer.outputs * (network.connections(16) * rate + 1))
    binary = name == "nearest neighbour"  # copies of spikes are spikes: no multiplication without folding either
    assert layer.unfolded_macs == layer.macs == (0 if binary else layer.dense)
    if binary:
        assert layer.folded_acs < layer.acs


class Net(nn.Module):
    """Neurons, a function, and a linear layer."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.neuron, self.function, self.linear = SpikingNeuron(), function, nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:  # (T, B, 6)
        return self.linear(self.function(self.neuron(x)))


def folded(function: Any) -> LayerCounts:
    torch.manual_seed(0)
    found = cost_of(Net(function), 2 * torch.rand(4, 3, 6))
    assert found.counts is not None
    return found.counts.layers["linear"]


def test_the_mean_over_the_steps_folds() -> None:
    found = folded(lambda s: s.mean(0))
    spikes = found.folded_acs - found.outputs  # without the bias
    assert (found.macs, found.folded_macs) == (3 * 6 * 5, 0)
    assert spikes == pytest.approx(folded(lambda s: s).sops)  # those of the four steps one by one


@pytest.mark.parametrize(
    "function",
    [
        lambda s: s + s.flip(0),
        lambda s: s + 0.5 * s.roll(1, 0),
        lambda s: torch.sigmoid(s),
        lambda s: s * s.mean(0),
        lambda s: F.layer_norm(s, (6,)),
        lambda s: 0.3 + torch.rand_like(s),
    ],
    ids=["sum", "residual", "sigmoid", "product", "layer norm", "no spikes"],
)
def test_what_does_not_fold_costs_the_same(function: Any) -> None:
    found = folded(function)
    assert (found.folded_macs, found.folded_acs) == (found.macs, found.acs)
    assert found.macs == 4 * 3 * 6 * 5


def test_a_dilated_convolution_folds_with_what_is_before_it_only() -> None:
    before = Between(nn.AvgPool2d(2))
    before.conv.dilation, before.conv.padding = (2, 2), (2, 2)
    behind = Between(nn.Conv2d(4, 2, 3, dilation=2, padding=2), channels=2)
    x = 2 * torch.rand(3, 2, 4, 16, 16)
    found = cost_of(before, x)
    assert found.counts is not None
    layer = found.counts.layers["conv"]
    rate = found.firing_rates["neuron"]
    assert layer.folded_acs == pytest.approx(layer.outputs * (before.connections(16) * rate + 1))
    other = cost_of(behind, x).counts
    assert other is not None
    assert other.layers["conv"].folded_macs == other.layers["conv"].macs > 0


def test_part_of_a_concatenation_folds() -> None:
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.neuron, self.conv = SpikingNeuron(), nn.Conv2d(6, 5, 1, bias=False)

        def forward(self, x: Tensor) -> None:
            s = self.neuron(x).flatten(0, 1)  # 4 channels
            self.conv(torch.cat([0.5 * s, x.flatten(0, 1)[:, :2]], dim=1))

    found = cost_of(Joined(), 2 * torch.rand(2, 1, 4, 3, 3))
    assert found.counts is not None
    layer = found.counts.layers["conv"]
    assert layer.macs == layer.dense == 2 * 9 * 6 * 5
    assert layer.folded_macs == pytest.approx(2 * 9 * 2 * 5)
    assert layer.folded_acs == pytest.approx(found.firing_rates["neuron"] * 2 * 9 * 4 * 5)


def test_spikes_and_a_token_shift_cost_the_same_folded() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.neuron, self.layer = SpikingNeuron(), ShiftedLinear(6, 5)

        def forward(self, x: Tensor) -> None:
            self.layer(self.neuron(x))

    found = cost_of(Shifted(), 2 * torch.rand(2, 1, 3, 6))
    assert found.counts is not None
    layer = found.counts.layers["layer"]
    assert (layer.folded_macs, layer.folded_acs) == (0, layer.acs)
    assert (layer.unfolded_macs, layer.unfolded_acs) == (2 * 3 * 6 * (2 + 5), 0)
    assert found.counts.additions == {}  # of the shift neither


def test_additions_by_hand() -> None:
    class Adding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn, self.other = nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2), nn.BatchNorm2d(2)
            self.neuron, self.group, self.position = (
                SpikingNeuron(),
                nn.GroupNorm(1, 2),
                nn.Parameter(torch.rand(2, 4, 4)),
            )

        def forward(self, x: Tensor) -> Tensor:  # (3, 2, 4, 4)
            h = self.bn(self.conv(x + self.position))  # a constant and a norm that fold
            h = h + h.mean((2, 3), keepdim=True)  # a smaller operand
            h = h + x  # 96
            h = self.group(h)
            s = self.neuron(self.conv(h)[None], self.bn)  # folds into the convolution
            s = self.neuron(h[None], self.other)[0] - s[0]  # a norm of no convolution, and a difference
            return self.other(s)

    found = cost_of(Adding(), torch.rand(3, 2, 4, 4))
    assert found.counts is not None
    assert found.counts.additions == {"sum": 2 * 96, "group_norm": 96, "batch_norm": 2 * 96}


def test_additions_of_an_audited_image_are_scaled_to_the_chain() -> None:
    class Method(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network, self.decoder = Residual(), Residual()

        def generate(self, x: Tensor, steps: int) -> Tensor:
            for _ in range(steps):
                x = x - self.network(x)  # of the sampler: not counted
            return self.decoder(x)

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.linear(x)

    method, x = Method(), torch.randn(5, 3)
    with CostMeter(method, home="network", watch=False) as meter:
        meter.audit(lambda: method.generate(x[:1], 2))
        method.generate(x, 7)
        counts = meter.take(5)
    found = counts.cost(meter.parameters, 5, 7).counts
    assert found is not None
    assert found.additions == {"sum": (7 + 1) * 3}
    assert (found.layers["linear"].calls, found.layers["decoder.linear"].calls) == (7, 1)


@pytest.mark.slow
def test_fsddim_folded_has_the_macs_of_the_released_counter() -> None:
    """The released counter finds 2.57 G MACs per network evaluation at the published size (T = 8, 32x32, one channel).

    They are those of the five layers that receive the real-valued current of the first convolution, or the image. The
    counter takes all inputs of the last one as real values, of which here three quarters and more are spikes.
    """
    torch.manual_seed(0)
    found = cost_of(FSDDIMUNet(in_channels=1), torch.randn(8, 1, 1, 32, 32), torch.tensor([500]))
    assert found.counts is not None
    layers, pixels = found.counts.layers, 8 * 32 * 32
    released = {
        "conv_in": pixels * 9 * 128,
        "downs.0.0.conv1": pixels * 9 * 128 * 128,
        "final_res_block.conv1": pixels * 9 * 128 * 128,
        "final_res_block.nin_shortcut": pixels * 128 * 128,
        "conv_out": pixels * 128,
        "temb.0": 128 * 512,
    }
    assert {name: layer.folded_macs for name, layer in layers.items() if layer.folded_macs} == released
    assert found.counts.total("folded_macs") == pytest.approx(2.57e9, rel=5e-3)
    all_of_last = found.counts.total("folded_macs") + layers["conv_out"].dense - released["conv_out"]
    assert all_of_last == pytest.approx(2.57e9, rel=2e-3)
    assert found.macs == found.counts.total("unfolded_macs") == pytest.approx(6.82e9, rel=1e-3)


def test_one_rule_for_all_methods() -> None:
    torch.manual_seed(0)
    x, t = torch.randn(1, 1, 8, 8), torch.tensor([5])
    sddpm = cost_of(SpikingUNet(1, 8, (1, 2), 1, num_steps=2), x, t)
    rwkv = cost_of(SpikingTransformer(image_size=8, embed_dim=16, depth=3, num_steps=2), x, t)
    for found in (sddpm, rwkv):
        counts = found.counts
        assert counts is not None
        assert counts.total("folded_macs") <= found.macs <= counts.total("unfolded_macs")
        assert counts.total("macs") == found.macs
    assert sddpm.counts is not None
    assert rwkv.counts is not None
    upsampled = sddpm.counts.layers["upblocks.2.conv"]
    assert (upsampled.input_bits, upsampled.macs) == (1, 0)
    assert upsampled.folded_acs - upsampled.outputs == pytest.approx((upsampled.acs - upsampled.outputs) * 4 / 9)
    shifted = [layer for name, layer in rwkv.counts.layers.items() if name.endswith(("_r", "_k", "_v"))]
    assert len(shifted) == 3 * 5
    assert all(layer.folded_acs == layer.acs and layer.unfolded_acs == 0 < layer.unfolded_macs for layer in shifted)
    assert sddpm.counts.additions["sum"] > 0
    assert rwkv.counts.additions["batch_norm"] > 0  # before the blocks' neurons, of sums
