from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import pytest
import snntorch as snn
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from leaderboard.evaluation.cost import CostMeter, Counts
from leaderboard.evaluation.products import is_unknown_product
from leaderboard.evaluation.tally import COLUMNS
from systems import DDPM, SDDPM
from systems.networks.rate_transformer import SDiTNetwork
from systems.networks.spiking_transformer import ShiftedLinear, SpikingTransformer
from systems.ops.uncounted import uncounted
from systems.spiking.adapter import multistep
from systems.spiking.neurons import ConvertedNeuron, SpikingNeuron


def spikes(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(2, shape, generator=torch.Generator().manual_seed(seed)).float()


def measure(network: nn.Module, *inputs: Tensor, num_images: int = 1):  # noqa: ANN201
    with CostMeter(network) as meter:
        for x in inputs:
            network(x)
    return meter.take(num_images).cost(network, num_images=num_images, nfe=1)


def flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns the values of nested dictionaries by their paths."""
    found = {}
    for name, value in data.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def test_batch_of_two_counted_by_hand() -> None:
    """A hook that reads only the first sample would see one spike instead of four."""
    layer = nn.Linear(3, 5)
    x = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    cost = measure(layer, x, num_images=2)
    assert cost.sops == 4 * 5 / 2
    assert cost.acs == (4 * 5 + 2 * 5) / 2  # and a bias for each output
    assert cost.macs == 0


def test_firing_rate_of_a_batch_of_two_by_hand() -> None:
    network = nn.Sequential(nn.Linear(2, 2, bias=False), SpikingNeuron())
    network[0].weight.data = torch.eye(2)
    x = torch.tensor([[[1.0, 0.0], [1.0, 1.0]], [[0.0, 0.0], [1.0, 1.0]]])  # (T, B, 2), each 1 fires
    cost = measure(network, x, num_images=2)
    assert cost.firing_rates == {"1": 5 / 8}
    assert cost.firing_rate == 5 / 8


def test_mean_firing_rate_is_weighted_by_neurons() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.a, self.b = nn.Linear(4, 4), SpikingNeuron(), SpikingNeuron()

        def forward(self, x: Tensor) -> None:
            self.linear(x)
            self.a(torch.full((2, 3, 6), 5.0))  # 6 neurons, all firing
            self.b(torch.zeros(2, 3, 2))  # 2 neurons, twice as many calls
            self.b(torch.zeros(2, 3, 2))

    cost = measure(Two(), spikes(1, 4))
    assert cost.firing_rates == {"a": 1.0, "b": 0.0}
    assert cost.firing_rate == 6 / 8


@pytest.mark.parametrize(
    ("layer", "shape", "dense"),
    [
        (nn.Conv2d(4, 6, 3, padding=1), (2, 4, 8, 8), 2 * 6 * 8 * 8 * 4 * 9),
        (nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 8, 8), 2 * 6 * 4 * 4 * 4 * 9),
        (nn.Conv2d(4, 6, 3, padding=1, groups=2), (2, 4, 8, 8), 2 * 6 * 8 * 8 * 2 * 9),
        (nn.Conv1d(4, 6, 3), (2, 4, 8), 2 * 6 * 6 * 4 * 3),
        (nn.Conv3d(4, 6, (3, 1, 1)), (2, 4, 4, 5, 5), 2 * 6 * 2 * 25 * 4 * 3),
        (nn.ConvTranspose2d(4, 6, 4, stride=2, padding=1), (2, 4, 8, 8), 2 * 4 * 8 * 8 * 6 * 16),
        (nn.Linear(4, 6), (2, 5, 4), 2 * 5 * 6 * 4),
    ],
)
def test_dense_connections_and_spikes_of_each_layer(layer: nn.Module, shape: tuple[int, ...], dense: int) -> None:
    ones = measure(layer, torch.ones(shape))
    assert (ones.sops, ones.macs) == (dense, 0)
    x = spikes(*shape)
    assert measure(layer, x).sops == pytest.approx(dense * float(x.mean()), rel=1e-6)
    real = measure(layer, x + 0.5)
    assert (real.sops, real.acs, real.macs) == (0, 0, dense)
    assert real.energy_strict_mj == pytest.approx(4.6e-9 * dense)


def test_silent_input_counts_as_spikes() -> None:
    cost = measure(nn.Sequential(SpikingNeuron(), nn.Linear(3, 5)), torch.zeros(2, 1, 3))
    assert (cost.sops, cost.macs, cost.acs) == (0, 0, 10)


def test_one_real_value_anywhere_in_the_batch_makes_the_input_real() -> None:
    x = spikes(2, 3)
    x[1, 2] = 0.5
    assert measure(nn.Linear(3, 5, bias=False), x).macs == 2 * 3 * 5


def test_counts_do_not_depend_on_the_batch_split() -> None:
    class Folded(nn.Module):
        """A stem on the image once, then two spiking steps."""

        def __init__(self) -> None:
            super().__init__()
            self.stem, self.neuron, self.conv = nn.Conv2d(1, 4, 3), SpikingNeuron(threshold=0.3), nn.Conv2d(4, 3, 3)

        def forward(self, x: Tensor) -> None:
            h = self.stem(x)  # (B, 4, H, W)
            h = self.neuron(h.repeat(2, 1, 1, 1, 1))  # (2, B, 4, H, W)
            self.conv(h.flatten(0, 1))

    network = Folded()
    x = torch.randn(8, 1, 9, 9, generator=torch.Generator().manual_seed(0))
    whole = measure(network, x, num_images=8)
    assert whole.macs == 4 * 7 * 7 * 9  # the stem counts once by itself, not once for each step
    assert 0 < whole.sops < 2 * 3 * 5 * 5 * 4 * 9
    for size in (1, 3):
        total = Counts()
        with CostMeter(network) as meter:
            for part in x.split(size):
                network(part)
                total += meter.take(len(part))
        parts = flat(asdict(total.cost(network, 8, 1)))
        for key, value in flat(asdict(whole)).items():
            assert parts[key] == (value if isinstance(value, str | None) else pytest.approx(value, rel=1e-12)), key


def test_energy_by_both_formulas() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.spiking, self.analog = (nn.Conv2d(1, 1, 1, bias=False) for _ in range(3))
            self.neuron = SpikingNeuron()

        def forward(self, x: Tensor) -> None:
            self.stem(x)
            self.neuron(x[None])
            self.spiking(torch.tensor([1.0, 0, 0, 0]).view(1, 1, 2, 2))  # rate 1/4 over 4 connections
            self.analog(torch.full((1, 1, 4, 4), 0.3))  # 16 connections

    cost = measure(Net(), torch.full((1, 1, 3, 3), 0.5))
    assert (cost.sops, cost.macs) == (1, 9 + 16)
    assert cost.energy_strict_mj == pytest.approx((4.6 * 25 + 0.9 * 1) * 1e-9)
    assert cost.energy_paper_mj == pytest.approx((4.6 * 9 + 0.9 * (1 + 16 / 4)) * 1e-9)


def test_ann_costs_only_macs() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 3, bias=False), nn.ReLU(), nn.Conv2d(2, 1, 3))
    network[0].weight.data.fill_(-1)  # the ReLU returns only zeros, which do not count as spikes in an ANN
    cost = measure(network, torch.rand(1, 1, 5, 5))
    assert cost.firing_rate is None
    assert (cost.sops, cost.acs, cost.macs) == (0, 0, 2 * 9 * 9 + 2 * 9)
    assert cost.energy_strict_mj == cost.energy_paper_mj == pytest.approx(4.6 * (2 * 9 * 9 + 2 * 9) * 1e-9)


def test_neurons_that_feed_no_layer_have_no_paper_energy() -> None:
    assert measure(nn.Sequential(nn.Linear(2, 2), SpikingNeuron()), torch.rand(3, 1, 2)).energy_paper_mj is None


@pytest.mark.parametrize("signed", [False, True])
def test_spikes_of_another_amplitude_are_accumulates(signed: bool) -> None:
    class Net(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:  # (T, B, 2)
            return self[2](self[1](self[0](x)))

    neuron = ConvertedNeuron(signed=signed)
    neuron.act_alpha.fill_(0.7)
    network = Net(nn.Linear(2, 2, bias=False), neuron, nn.Linear(2, 5, bias=False))
    network[0].weight.data = torch.eye(2)
    x = torch.tensor([[[0.5, 0.5]], [[-0.9, 0.0]], [[0.0, 0.9]]])  # spikes 1 1, (-1) 0, 0 1
    cost = measure(network, x)
    count = 4 if signed else 3
    assert cost.firing_rate == count / 6
    assert (cost.sops, cost.macs) == (5 * count, 3 * 2 * 2)


def test_levels_of_a_quantised_activation_are_real_values() -> None:
    levels = torch.tensor([[0.0, 2.0, 4.0, 6.0], [0.0, 2.0, 2.0, 0.0], [6.0, 0.0, 0.0, 6.0]])
    neuron = ConvertedNeuron()  # spikes of amplitude 6
    network = nn.ModuleList([nn.Linear(4, 3, bias=False), neuron])
    with CostMeter(network) as meter:
        for x in levels:
            network[0](x)
        neuron(torch.zeros(3, 1, 1))
    cost = meter.take().cost(meter.parameters, 1, 1)
    assert (cost.macs, cost.sops) == (2 * 12, 12 * 2 / 4)


def test_token_shift_costs_accumulates_of_two_taps() -> None:
    """Each spike reaches 5 outputs of its own token and 5 of the next; the mixed values are neither 0 nor 1."""
    layer = ShiftedLinear(4, 5)
    layer.mix.data.fill_(0.3)
    s = torch.tensor([[[1.0, 0, 0, 1], [0, 1, 0, 0], [0, 0, 0, 0]], [[0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]])
    cost = measure(layer, s, num_images=2)
    assert (cost.sops, cost.macs) == (4 * 2 * 5 / 2, 0)
    assert cost.acs == (4 * 2 * 5 + 2 * 3 * 5) / 2  # and a bias for each output
    assert cost.energy_strict_mj == pytest.approx(0.9e-9 * cost.acs)
    assert measure(layer, 0.5 * s + 0.1).macs == 2 * 3 * 5 * 2 * 4


def test_a_layer_can_state_its_taps_per_weight() -> None:
    class TwoSided(nn.Linear):
        """Applies its weights to the features and to their mirror image."""

        taps_per_weight = 2

        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) + super().forward(input.flip(-1))

    x = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    one_tap, two_taps = (measure(layer(3, 5, bias=False), x) for layer in (nn.Linear, TwoSided))
    assert (one_tap.sops, two_taps.sops) == (4 * 5, 4 * 5 * 2)
    assert measure(TwoSided(3, 5), x + 0.5).macs == 2 * 3 * 5 * 2


def test_layers_of_a_block_count_the_spikes_and_not_their_shift() -> None:
    torch.manual_seed(0)
    network = SpikingTransformer(image_size=8, embed_dim=16, depth=3, num_steps=2)
    with CostMeter(network) as meter:
        network(torch.randn(2, 1, 8, 8), torch.tensor([3, 3]))
    of_blocks = {name: counts for name, counts in meter.take().connections.items() if "_block" in name}
    assert len(of_blocks) == 3 * 7 + 1
    for name, (spike_fed, sops, macs, _, dense, *_) in of_blocks.items():
        assert macs == 0, name
        assert sops < spike_fed == dense, name
    assert 0 < of_blocks["mid_block.spatial_r"][1] == of_blocks["mid_block.spatial_k"][1]  # of the same spikes


def test_parameters_and_measurements_of_the_caller() -> None:
    network = nn.Linear(3, 5)
    network.bias.requires_grad_(False)
    with CostMeter(network) as meter:
        network(input=spikes(2, 3))
    cost = meter.take().cost(network, 2, nfe=50, images_per_second=3.5, peak_memory_bytes=7)
    assert (cost.parameters, cost.trainable_parameters) == (20, 15)
    assert (cost.nfe, cost.images_per_second, cost.peak_memory_bytes) == (50, 3.5, 7)


def test_hooks_are_gone_and_nothing_large_is_kept() -> None:
    network = nn.Sequential(nn.Conv2d(1, 8, 3), SpikingNeuron())
    with CostMeter(network) as meter:
        network(torch.randn(2, 1, 64, 64))
    assert not any(module._forward_hooks for module in network.modules())
    assert all(layer.counts.numel() == len(COLUMNS) for layer in meter._connections.values())
    assert all(layer.counts.numel() == 3 for layer in meter._neurons.values())
    assert meter.take().neurons
    network(torch.randn(2, 1, 64, 64))
    assert not meter.take().neurons


def test_errors_say_what_to_do() -> None:
    with CostMeter(nn.Linear(2, 2)) as meter:
        pass
    with pytest.raises(ValueError, match=r"no convolution or linear layer ran .* sample inside its `with`"):
        meter.take().cost(meter.parameters, 1, 1)
    with pytest.raises(ValueError, match="num_images=0; give the number of images"):
        meter.take().cost(meter.parameters, 0, 1)


@pytest.mark.parametrize(("second", "macs"), [(spikes(1, 2, 4, 4), 0), (torch.full((1, 2, 4, 4), 0.5), 2 * 3 * 16)])
def test_concatenated_inputs_are_classified_separately(second: Tensor, macs: int) -> None:
    class Concatenating(nn.Conv2d):
        def forward(self, *parts: Tensor) -> Tensor:
            return super().forward(torch.cat(parts, dim=1))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = Concatenating(6, 3, 1)

        def forward(self, first: Tensor) -> None:
            self.conv(first, second)

    first = spikes(1, 4, 4, 4, seed=1)
    cost = measure(Net(), first)
    spiking = first.sum() + (0 if macs else second.sum())
    assert cost.sops == pytest.approx(float(spiking) * 3)
    assert cost.acs == pytest.approx(float(spiking) * 3 + 3 * 16)  # the bias once
    assert cost.macs == macs


def test_counts_of_batches_add_up_and_survive_a_file() -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 3), SpikingNeuron(threshold=0.3))
    x = torch.randn(6, 2, 1, 9, 9, generator=torch.Generator().manual_seed(0))
    total = Counts()
    with CostMeter(network) as meter:
        for batch in x:
            network(batch)
            total += Counts(**json.loads(json.dumps(asdict(meter.take()))))
        for batch in x:
            network(batch)
    at_once = meter.take()
    assert total.first_convolution == at_once.first_convolution == "0"
    assert total.cost(network, 12, 1) == at_once.cost(network, 12, 1)  # whole numbers here, so exactly
    assert (total + Counts()).cost(network, 12, 1) == (Counts() + total).cost(network, 12, 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "macs"), [({}, 4_045e6), ({"embed_dim": 512, "depth": 8}, 12_859e6)], ids=["mnist", "cifar10"]
)
def test_no_weight_of_sdit_receives_spikes(size: dict[str, int], macs: float) -> None:
    """Figures of the description of the released network, per image and network evaluation."""
    torch.manual_seed(0)
    network = SDiTNetwork(**size).eval()
    for name, parameter in network.named_parameters():
        if name.endswith(("final_layer.linear.weight", "att.output.weight", "ffn.value.weight")):
            torch.nn.init.normal_(parameter, std=0.5)  # zero, or so small that no neuron fires
    with torch.no_grad(), CostMeter(network) as meter:
        network(torch.randn(1, 3, 28, 28), torch.tensor([500]), torch.tensor([3]))
    cost = meter.take().cost(network, num_images=1, nfe=1)
    assert cost.firing_rate is not None
    assert cost.firing_rate > 0.01
    assert (cost.sops, cost.acs, cost.energy_paper_mj) == (0, 0, None)
    assert cost.macs == pytest.approx(macs, rel=2e-4)
    assert cost.energy_strict_mj == pytest.approx(4.6e-9 * macs, rel=2e-4)


def test_a_time_embedding_of_zeros_and_ones_is_not_spikes() -> None:
    """At diffusion step 0 all sines are 0 and all cosines 1."""
    sizes: dict[str, Any] = {"in_channels": 1, "base_channels": 8, "channel_mult": (1,), "num_res_blocks": 1}
    twin, spiking = ({"neuron": "relu", "num_steps": 1}, {"num_steps": 2})
    for system in (DDPM(**sizes, norm_groups=4), SDDPM(**sizes, **twin)):
        with torch.no_grad(), CostMeter(system.network) as meter:
            for t in (500, 0):
                system.network.eval()(torch.rand(1, 1, 8, 8), torch.tensor([t]))
        cost = meter.take().cost(system.network, num_images=1, nfe=2)
        assert cost.counts is not None
        assert cost.energy_paper_mj == pytest.approx(4.6e-9 * cost.counts.total("dense"))  # of an ANN
        assert cost.counts.total("dense") > cost.macs
    network = SDiTNetwork(image_size=8, embed_dim=16).eval()
    for name, parameter in network.named_parameters():
        if name.endswith(("final_layer.linear.weight", "restruction_token")):
            torch.nn.init.normal_(parameter)
    with torch.no_grad(), CostMeter(network) as meter:
        network(torch.randn(1, 3, 8, 8), torch.tensor([0]), torch.tensor([3]))
        network(torch.randn(1, 3, 8, 8), torch.tensor([500]), torch.tensor([3]))
    assert meter.take().cost(network, num_images=1, nfe=2).energy_paper_mj is None
    network = SDDPM(**sizes, **spiking).network.eval()
    with torch.no_grad(), CostMeter(network) as meter:
        network(torch.rand(1, 1, 8, 8), torch.tensor([0]))
    assert meter.take().cost(network, num_images=1, nfe=1).energy_paper_mj


@pytest.mark.parametrize("num_steps", [1, 4, 8])
def test_snn_steps_do_not_multiply_the_cost_of_sdit(num_steps: int) -> None:
    torch.manual_seed(0)
    network = SDiTNetwork(image_size=8, embed_dim=16, num_steps=num_steps).eval()
    for name, parameter in network.named_parameters():
        if name.endswith(("final_layer.linear.weight", "restruction_token")):
            torch.nn.init.normal_(parameter)  # inputs of zeros or ones would count as spikes
    with torch.no_grad(), CostMeter(network) as meter:
        network(torch.randn(1, 3, 8, 8), torch.tensor([500]), torch.tensor([3]))
    d, m, blocks, skips = 16, 17, 5, 2
    mixes, gates = (4 + 9) * d**2 * 2 * m, 2 * m**2 * d
    rest = 16 * 12 * d + 256 * d + d**2 + m * d * 24 + 64 * 9 * 6 * 6  # patches, step, final layers
    cost = meter.take().cost(network, num_images=1, nfe=1)
    assert (cost.macs, cost.acs) == (blocks * (mixes + gates) + skips * 2 * d**2 * m + rest, 0)


class Free(nn.Module):
    """The products of an attention block and of recurrent cells, none of them by a convolution or a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(5, 6)), nn.Parameter(torch.randn(5))
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.gru = nn.GRU(6, 3, batch_first=True)
        self.cell = nn.LSTMCell(6, 4)

    def forward(self, x: Tensor) -> None:  # (2, 7, 6)
        F.linear(x, self.weight, self.bias)
        torch.einsum("bnd,bmd->bnm", x, x) @ x
        self.attention(x, x, x)
        self.gru(x)
        self.cell(x[:, 0])
        F.conv1d(x.mT, torch.randn(4, 6, 3))


FREE_MACS = (
    2 * 7 * 6 * 5  # linear
    + 2 * (2 * 7 * 7 * 6)  # einsum and product
    + 4 * (2 * 7 * 6 * 6) + 2 * (2 * 7 * 7 * 6)  # attention: four projections, then two products
    + 2 * 7 * (3 * 3 * 6 + 3 * 3 * 3)  # GRU, three gates
    + 2 * (4 * 4 * 6 + 4 * 4 * 4)  # one step of an LSTM cell, four gates
    + 2 * 5 * 4 * 6 * 3  # convolution
)  # fmt: skip


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_products_outside_layers_are_counted(context: type) -> None:
    network, x = Free().eval(), torch.randn(2, 7, 6)
    with context():
        cost = measure(network, x)
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        with FlopCounterMode(display=False) as flops:
            network(x)
        torch.backends.mha.set_fastpath_enabled(fast)
    assert cost.macs == FREE_MACS == flops.get_total_flops() / 2
    assert (cost.sops, cost.incomplete) == (0, None)


def test_layers_and_products_agree_with_torch() -> None:
    """torch counts every connection, whether spikes pass it or not."""
    network = nn.Sequential(nn.Conv2d(1, 4, 3, stride=2), nn.ConvTranspose2d(4, 2, 2, groups=2), nn.Linear(4, 3))
    x = torch.randn(2, 1, 8, 8)
    with FlopCounterMode(display=False) as flops:
        network(x)
    assert measure(network, x).macs == flops.get_total_flops() / 2


def test_fused_attention_counts_both_products() -> None:
    class Attention(nn.Module):
        def forward(self, q: Tensor) -> None:  # (2, 3, 5, 4), 9 keys
            key, value = torch.randn(2, 3, 9, 4), torch.randn(2, 3, 9, 8)
            F.scaled_dot_product_attention(q, key, value)

    assert measure(Attention(), torch.randn(2, 3, 5, 4)).macs == 2 * 3 * 5 * 9 * (4 + 8)


def test_products_with_spikes_are_accumulates() -> None:
    class Spiking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.neuron, self.weight = SpikingNeuron(), nn.Parameter(torch.ones(5, 4))  # not spikes: they are weights

        def forward(self, x: Tensor) -> None:
            s = self.neuron(x)[0]  # (2, 4)
            F.linear(s, self.weight)
            s @ s.T

    x = torch.tensor([[[2.0, 0, 0, 2.0], [0, 2.0, 0, 0]]])
    cost = measure(Spiking(), x)
    assert (cost.sops, cost.macs) == (3 * 5 + 3 * 2, 0)
    assert measure(Spiking(), 0 * x).sops == 0
    real = measure(nn.ModuleList([Spiking()])[0], x)
    assert real.energy_strict_mj == pytest.approx(0.9e-9 * 21)


def test_a_layer_that_computes_more_than_its_weights_is_found() -> None:
    class Hidden(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input @ torch.randn(3, 3))

    assert measure(Hidden(3, 5), torch.randn(2, 3)).macs == 2 * 3 * 5 + 2 * 3 * 3


def test_products_that_cannot_be_counted_are_named() -> None:
    class Spectral(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(torch.fft.rfft(input).abs())

    network = nn.ModuleDict({"mixer": Spectral(3, 5)})
    with CostMeter(network) as meter:
        network["mixer"](torch.randn(2, 4))
    counts = meter.take()
    assert counts.cost(network, 1, 1).incomplete == {"mixer [_fft_r2c]": 1}
    assert (counts + counts).incomplete == {"mixer [_fft_r2c]": 2}


@pytest.mark.parametrize(
    ("name", "unknown"),
    [
        ("aten::_fft_r2c", True),
        ("aten::_transformer_encoder_layer_fwd", True),
        ("aten::_cdist_forward", True),
        ("aten::upsample_bilinear2d", False),
        ("aten::lgamma", False),
        ("aten::linalg_vector_norm", False),
        ("aten::mul", False),
        ("mylib::add", True),
    ],
)
def test_unknown_products_are_known_by_name(name: str, unknown: bool) -> None:
    assert is_unknown_product(*name.split("::")) == unknown


def test_marked_products_are_not_counted() -> None:
    class Merging(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            with uncounted("weights merged once"):
                torch.randn(9, 9) @ torch.randn(9, 9)
            return super().forward(input)

    assert measure(Merging(3, 5), torch.randn(2, 3)).macs == 2 * 3 * 5


class Method(nn.Module):
    """A method with layers outside of its network."""

    def __init__(self, product: bool = False) -> None:
        super().__init__()
        self.network, self.decoder, self.teacher = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(3, 100)
        self.product = product

    def generate(self, x: Tensor) -> Tensor:
        h = self.network(x)
        return self.decoder(h @ torch.randn(4, 4) if self.product else h)


@pytest.mark.parametrize("product", [False, True])
def test_layers_are_counted_wherever_they_are(product: bool) -> None:
    method, x = Method(product), torch.randn(2, 3)
    meter = CostMeter(method, home="network", watch=False).__enter__()
    meter.audit(lambda: method.generate(x[:1]))
    assert meter.watch == product
    meter.resume()
    assert torch._C._len_torch_dispatch_stack() == product
    method.generate(x)
    meter.pause()
    x @ x.T  # not part of the generation
    cost = meter.take().cost(meter.parameters, 2, 1)
    meter.__exit__(None, None, None)
    assert cost.macs == 3 * 4 + 4 * 2 + (4 * 4 if product else 0)
    assert cost.parameters == 4 * 3 + 4 + 2 * 4 + 2  # not the teacher, which does not generate
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in method.modules())


class ByHand(nn.Module):
    """A network of snnTorch as its tutorials write it, stepped by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.neuron, self.second = (
            nn.Linear(4, 3),
            snn.Leaky(0.5, graded_spikes_factor=0.7),
            nn.Linear(3, 2),
        )

    def forward(self, x: Tensor) -> None:
        mem = self.neuron.reset_mem()
        for x_k in x:
            spikes, mem = self.neuron(self.first(x_k), mem)
            self.second(spikes)


class Adapted(ByHand):
    """The same network through `multistep`."""

    def __init__(self) -> None:
        super().__init__()
        self.neuron = multistep(self.neuron)

    def forward(self, x: Tensor) -> None:
        self.second(self.neuron(self.first(x)))


@pytest.mark.parametrize("network", [ByHand, Adapted])
def test_a_snntorch_network_counted_by_hand(network: type[ByHand]) -> None:
    """Potentials are half the last one plus the current, minus 1 after a spike: 0.7, 1.05, 0.225, 0.8125, 1.10625."""
    layers = network()
    layers.first.weight.data.zero_()
    layers.first.bias.data.copy_(torch.tensor([0.7, 0.0, 3.0]))
    cost = measure(layers, torch.full((5, 2, 4), 0.3), num_images=2)
    per_image = 2 + 0 + 5  # spikes of the three neurons: in steps 2 and 5; never; always
    assert cost.firing_rates == {"neuron": per_image / 15}
    assert cost.firing_rate == pytest.approx(per_image / 15)
    assert (cost.macs, cost.sops) == (5 * 4 * 3, per_image * 2)
    assert cost.acs == per_image * 2 + 5 * 2


def test_a_silent_layer_costs_nothing_whoever_made_it() -> None:
    class Silent(nn.Module):
        def __init__(self, neuron: nn.Module) -> None:
            super().__init__()
            self.neuron, self.linear = neuron, nn.Linear(3, 5, bias=False)

        def forward(self, x: Tensor) -> None:
            self.linear(self.neuron(x))

    for neuron in (SpikingNeuron(), multistep(snn.Leaky(0.9)), snn.LeakyParallel(3, 3, bias=False)):
        cost = measure(Silent(neuron), torch.zeros(4, 2, 3))
        assert cost.firing_rates == {"neuron": 0}
        assert (cost.sops, cost.acs) == (0, 0)
        assert cost.macs == 0


def test_several_amplitudes_are_real_values() -> None:
    network = nn.Sequential(multistep(snn.Leaky(0.9, graded_spikes_factor=torch.tensor([0.5, 2.0]))), nn.Linear(2, 3))
    cost = measure(network, torch.full((2, 1, 2), 5.0))
    assert cost.firing_rate == 1
    assert (cost.sops, cost.macs) == (0, 2 * 2 * 3)
