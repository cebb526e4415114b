"""Effective operations are exact: equal to counts by hand, to the layer applied to ones, and to NeuroBench's."""

from __future__ import annotations

from typing import Any

import pytest
import snntorch as snn
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from leaderboard.evaluation.cost import CostMeter
from leaderboard.record.counts import OperationCounts
from systems.networks.spiking_transformer import ShiftedLinear
from systems.ops.quantise import QReLU
from systems.spiking.neurons import SpikingNeuron

NEUROBENCH = "2.3.0"
"""Version whose counts these equal; the Makefile installs it."""


def counts(network: nn.Module, x: Tensor, images: int = 1) -> OperationCounts:
    with torch.no_grad(), CostMeter(network) as meter:
        network(x)
    found = meter.take(images).cost(network, images, 1).counts
    assert found is not None
    return found


def sparse(*shape: int, rate: float = 0.4) -> Tensor:
    """Real numbers, most of them 0."""
    torch.manual_seed(1)
    return torch.randn(shape) * (torch.rand(shape) < rate)


def prune(layer: nn.Module) -> nn.Module:
    """Sets a third of the weights to 0."""
    with torch.no_grad():
        for p in layer.parameters():
            p *= torch.rand(p.shape, generator=torch.Generator().manual_seed(2)) > 1 / 3
    return layer


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(4, 6, 3, padding=2, dilation=2), (3, 4, 9)),
        (nn.Conv2d(4, 6, 3, padding=1), (3, 4, 7, 8)),
        (nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (3, 4, 7, 8)),
        (nn.Conv2d(4, 6, 3, padding="same", padding_mode="circular"), (3, 4, 7, 8)),
        (nn.Conv2d(4, 6, (3, 1), padding=(1, 0), bias=False), (4, 7, 8)),
        (nn.Conv3d(2, 3, 2, stride=(1, 2, 1)), (3, 2, 4, 5, 5)),
        (nn.ConvTranspose1d(4, 6, 3, stride=2, groups=2), (3, 4, 5)),
        (nn.ConvTranspose2d(4, 6, 4, stride=2, padding=1, output_padding=1), (3, 4, 5, 6)),
        (nn.ConvTranspose3d(2, 3, 2, dilation=2), (3, 2, 3, 3, 3)),
        (nn.Linear(5, 6), (3, 4, 5)),
        (nn.Linear(5, 6), (5,)),
    ],
)
@pytest.mark.parametrize("channels_last", [False, True])
def test_effective_operations_are_those_of_ones(layer: Any, shape: tuple[int, ...], channels_last: bool) -> None:
    """A layer of ones in place of nonzero weights counts, at each output, the nonzero products that it sums."""
    prune(layer)
    x = sparse(*shape)
    if channels_last and x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    (found,) = counts(layer, x).layers.values()
    bare = type(layer).forward
    with torch.no_grad():
        weight, bias = layer.weight.clone(), layer.bias
        layer.bias = None
        layer.weight.copy_(weight != 0)
        effective = bare(layer, (x != 0).float()).sum()
        layer.weight.fill_(1)
        unpadded = bare(layer, torch.ones_like(x)).sum()
        layer.weight.copy_(weight)
        layer.bias = bias
    assert (found.effective_macs, found.effective_acs) == (float(effective), 0)
    assert found.dense_unpadded == float(unpadded) <= found.dense
    assert effective < unpadded
    (of_spikes,) = counts(layer, (x != 0).float()).layers.values()
    assert (of_spikes.effective_macs, of_spikes.effective_acs) == (0, float(effective))
    assert of_spikes.effective_acs <= of_spikes.sops


def test_a_border_counted_by_hand() -> None:
    """One spike in a corner reaches 4 of 9 outputs of each channel, one in the middle all 9; a weight is 0."""
    layer = nn.Conv2d(1, 2, 3, padding=1)
    layer.weight.data.fill_(1)
    layer.weight.data[0, 0, 0, 0] = 0  # from upper left: not missed by the spike in that corner, by the other once
    x = torch.zeros(1, 1, 4, 4)
    x[0, 0, 0, 0] = x[0, 0, 1, 1] = 1
    (found,) = counts(layer, x).layers.values()
    assert found.effective_acs == (4 - 1) + 4 + (9 - 1) + 9
    assert found.sops == 2 / 16 * 2 * 16 * 9
    assert found.dense_unpadded == 2 * (4 * 4 + 8 * 6 + 4 * 9)
    assert (found.weights, found.nonzero_weights, found.biases, found.nonzero_biases) == (20, 19, 2, 2)


def test_effective_taps_of_a_token_shift_by_hand() -> None:
    """A spike of the last token has no next token; where the mix is 0, its own tap has only zeros."""
    layer = ShiftedLinear(3, 5)
    layer.mix.data = torch.tensor([0.0, 0.5, 1.0])
    layer.weight.data.fill_(1)
    s = torch.tensor([[[1.0, 1, 1], [0, 0, 0], [1, 1, 1]]])
    (found,) = counts(layer, s).layers.values()
    assert found.effective_acs == 5 * (1 + 2 + 1) + 5 * (0 + 1 + 1)
    assert (found.macs, found.sops) == (0, 2 * 5 * 6)  # strict: both taps of every spike
    assert found.dense_unpadded == 5 * 3 * (3 + 2)
    # not folded: each of 3 x 3 mixed values takes two products, and then passes the weights as a real number
    assert (found.unfolded_macs, found.unfolded_acs) == (3 * 3 * 2 + 3 * 3 * 5, 0)


def test_effective_products_of_two_activations() -> None:
    class Products(nn.Module):
        def forward(self, x: Tensor) -> None:
            a, b = x, x.mT
            a @ b
            torch.mv(a[0], b[0, :, 0])
            F.conv1d(a, b[..., :2], padding=1)

    x = sparse(2, 4, 4)
    nonzero = (x != 0).float()
    by_hand = {
        "Products [bmm]": (nonzero @ nonzero.mT).sum(),
        "Products [mv]": (nonzero[0] @ nonzero.mT[0, :, 0]).sum(),
        "Products [convolution]": F.conv1d(nonzero, nonzero.mT[..., :2], padding=1).sum(),
    }
    found = counts(Products(), x).layers
    assert {name: layer.effective_macs for name, layer in found.items()} == {k: float(v) for k, v in by_hand.items()}
    assert all(layer.weights == 0 for layer in found.values())


def test_bits_are_those_that_the_layer_before_states() -> None:
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3), QReLU(2), nn.Upsample(scale_factor=2), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)
    )
    found = counts(network, torch.rand(2, 1, 6, 6) - 0.5)
    assert {name: layer.input_bits for name, layer in found.layers.items()} == {"0": 32, "3": 2, "5": 32}
    x = torch.full((2, 3, 4), 2.0)
    assert counts(nn.Sequential(SpikingNeuron(), nn.Linear(4, 2)), x).layers["1"].input_bits == 1


def test_neuron_updates_and_calls_for_each_image() -> None:
    network = nn.Sequential(SpikingNeuron(threshold=2.0), nn.Linear(4, 2))
    with CostMeter(network) as meter:
        for _ in range(5):
            network(torch.full((3, 2, 4), 1.0))  # T = 3: fires in the second step
    found = meter.take(2).cost(network, 2, 5).counts
    assert found.neurons["0"].updates == 5 * 3 * 4
    assert found.neurons["0"].spikes == 5 * 4
    assert found.layers["1"].calls == 5
    assert (found.layers["1"].inputs, found.layers["1"].outputs) == (5 * 3 * 4, 5 * 3 * 2)
    once = found.per_evaluation(5)
    assert (once.layers["1"].calls, once.layers["1"].weights, once.neuron_updates) == (1, 10, 12)
    assert found.activation_sparsity == pytest.approx(2 / 3)
    assert found.footprint_bytes == 10 * 4


class Stepped(nn.Module):
    """A network as snnTorch's tutorials write it, one SNN time step in each call."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = prune(nn.Conv2d(2, 4, 3, padding=1))
        self.lif1 = snn.Leaky(0.9, threshold=0.3, init_hidden=True)
        self.linear = prune(nn.Linear(4 * 6 * 6, 5))
        self.lif2 = snn.Leaky(0.9, threshold=0.3, init_hidden=True, output=True)

    def forward(self, x: Tensor) -> Any:
        return self.lif2(self.linear(self.lif1(self.conv(x)).flatten(1)))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), prune(nn.Linear(8, 7, bias=False)), nn.Sigmoid(), nn.Linear(7, 3))


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        prune(nn.Conv2d(4, 6, 3, padding=1, groups=2)),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6 * 3 * 3, 5),
    )


@pytest.mark.parametrize(("make", "shape"), [(mlp, (3, 6)), (convolutional, (3, 2, 6, 6)), (Stepped, (3, 4, 2, 6, 6))])
def test_counts_equal_those_of_neurobench(make: Any, shape: tuple[int, ...]) -> None:
    """Dense, effective MACs and ACs, footprint and both sparsities, to the digit.

    NeuroBench's *Dense* leaves out zero padding, as `dense_unpadded` does; `dense`, by which the strict count goes,
    does not. It calls an input spikes if its values are -1, 0 or 1, whatever made them; here amplitudes of neurons
    count too, since they fold into the weights, and the zeros of an ANN are real values (no difference here). It sums
    in float32, so that counts above 2^24 are rounded, which these networks do not reach. It has no transposed
    convolution, no attention and no functional product, and rounds the connection sparsity to four digits.
    """
    neurobench = pytest.importorskip("neurobench", reason=f"neurobench {NEUROBENCH} is not installed (see Makefile)")
    if neurobench.__version__ != NEUROBENCH:
        pytest.skip(f"neurobench is {neurobench.__version__}, not {NEUROBENCH}")
    from neurobench.metrics.static import ConnectionSparsity, Footprint
    from neurobench.metrics.workload import ActivationSparsity, SynapticOperations
    from neurobench.models import SNNTorchModel, TorchModel

    torch.manual_seed(0)
    network = make().eval()
    x = sparse(*shape)
    model = (SNNTorchModel if make is Stepped else TorchModel)(network)
    assert Footprint()(model) == CostMeter(network).footprint_bytes
    model.register_hooks()
    with torch.no_grad():
        out = model(x)
    batch = (x, torch.zeros(len(x)))
    theirs = SynapticOperations()(model, out, batch)
    sparsity = ActivationSparsity()(model, out, batch)
    model.cleanup_hooks()

    snn.utils.reset(network)
    with torch.no_grad(), CostMeter(network) as meter:
        for step in x.unbind(1) if make is Stepped else (x,):
            network(step)
    ours = meter.take(len(x)).cost(network, len(x), 1).counts
    assert ours is not None
    totals = {"Effective_MACs": "effective_macs", "Effective_ACs": "effective_acs", "Dense": "dense_unpadded"}
    assert {name: ours.total(field) for name, field in totals.items()} == theirs
    assert theirs["Effective_ACs" if make is Stepped else "Effective_MACs"] > 0
    assert ours.activation_sparsity == pytest.approx(sparsity, rel=1e-12)
    assert round(ours.connection_sparsity or 0, 4) == ConnectionSparsity()(model) > 0
