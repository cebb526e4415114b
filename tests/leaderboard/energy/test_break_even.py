"""Crossing points computed by hand."""

from __future__ import annotations

from dataclasses import replace

import counts_by_hand
import pytest
from counts_by_hand import PICOJOULE

from leaderboard.energy import Band, read_model, read_models
from leaderboard.energy.break_even import ALWAYS, NEVER, BreakEven, break_even, without_spikes
from leaderboard.record.counts import LayerCounts, NeuronCounts, OperationCounts
from leaderboard.record.records import Cost

STEM = replace(
    counts_by_hand.STEM,
    calls=1,
    weights=10,
    nonzero_weights=10,
    effective_macs=1000,
    dense_unpadded=1000,
    biases=0,
    nonzero_biases=0,
)
SPIKING = replace(
    counts_by_hand.SPIKING,
    calls=1,
    dense=40_000,
    spike_dense=40_000,
    sops=8_000,
    acs=8_300,  # and one for each bias
    effective_acs=7_000,  # without padding
    folded_acs=8_300,
    unfolded_acs=8_300,
    dense_unpadded=36_000,
    biases=3,
    nonzero_biases=3,
)
DENSE = replace(
    STEM,
    weights=50,
    nonzero_weights=50,
    input_bits=3,
    inputs=100,
    outputs=75,
    dense=10_000,
    macs=10_000,
    effective_macs=6_000,
    folded_macs=10_000,
    unfolded_macs=10_000,
)


def cost(layers: dict[str, LayerCounts], neurons: dict[str, NeuronCounts], rate: float | None) -> Cost:
    return Cost(
        parameters=60,
        trainable_parameters=60,
        nfe=1,
        firing_rate=rate,
        firing_rates={} if rate is None else {"neuron": rate},
        sops=sum(layer.sops for layer in layers.values()),
        macs=sum(layer.macs for layer in layers.values()),
        acs=sum(layer.acs for layer in layers.values()),
        energy_strict_mj=0.0,
        energy_paper_mj=None,
        counts=OperationCounts(layers, neurons, {"residual": 5}, "stem", 240),
    )


SNN = cost({"stem": STEM, "body": SPIKING}, {"neuron": NeuronCounts(updates=400, spikes=80, leaks=400)}, 0.2)
ANN = cost({"stem": STEM, "body": DENSE}, {}, None)


def test_arithmetic_by_hand() -> None:
    """Spiking: 1,000 MACs, 300 biases and 40,000 rate accumulates; twin: 11,000 MACs."""
    found = break_even(read_model("arithmetic-45nm"), SNN, ANN)
    assert found is not None
    assert found.silent.low == pytest.approx((4.6 * 1000 + 0.9 * 300) * PICOJOULE)
    assert found.spiking.low == pytest.approx((4.6 * 1000 + 0.9 * 8300) * PICOJOULE)
    assert found.twin.low == pytest.approx(4.6 * 11_000 * PICOJOULE)
    assert found.rates == (ALWAYS, ALWAYS)  # at rate 1: 4.6 * 1,000 + 0.9 * 40,300 < 50,600


def test_effective_operations_by_hand() -> None:
    """4.6 * 1,000 + 0.9 * 35,000 rate = 4.6 * 7,000 where rate = 27,600 / 31,500."""
    found = break_even(read_model("neurobench-45nm"), SNN, ANN)
    assert found is not None
    assert found.rates == pytest.approx((27_600 / 31_500,) * 2)
    crossing = found.rates.low
    assert found.energy(crossing).low == pytest.approx(found.twin.low)
    assert found.energy(crossing - 0.01).low < found.twin.low < found.energy(crossing + 0.01).low


def test_sddpm_formula_by_hand() -> None:
    """First convolution 4.6 * 1,000; the rest 0.9 * 40,000 rate, against 4.6 * 11,000."""
    found = break_even(read_model("paper-sddpm"), SNN, ANN)
    assert found is not None
    assert found.silent.low == pytest.approx(4600 * PICOJOULE)
    assert found.energy(0.5).low == pytest.approx((4600 + 0.9 * 20_000) * PICOJOULE)


@pytest.mark.parametrize("name", read_models())
@pytest.mark.parametrize("factor", [0.0, 0.5, 2.0])
def test_the_line_is_the_energy_of_a_network_with_other_rates(name: str, factor: float) -> None:
    """The models are linear in the spikes, which the crossing relies on."""
    model = read_model(name)
    found = break_even(model, SNN, ANN)
    assert found is not None
    acs = 300 + factor * 8_000
    layer = replace(
        SPIKING, sops=factor * 8_000, effective_acs=factor * 7_000, acs=acs, folded_acs=acs, unfolded_acs=acs
    )
    neurons = {"neuron": NeuronCounts(updates=400, spikes=factor * 80, leaks=400)}
    changed = cost({"stem": STEM, "body": layer}, neurons, 0.2 * factor)
    assert found.energy(0.2 * factor) == pytest.approx(model.energy(changed))
    if factor == 0:
        assert without_spikes(SNN).acs == changed.acs


def test_bounds_of_memory_cross_at_their_own_rates() -> None:
    found = break_even(read_model("memory-45nm"), SNN, ANN)
    assert found is not None
    assert found.twin.low < found.twin.high
    for bound, rate in enumerate(found.rates):
        if 0 < rate < 1:
            assert found.energy(rate)[bound] == pytest.approx(found.twin[bound])
        else:
            assert (found.silent[bound] >= found.twin[bound]) == (rate == NEVER)
            assert (found.energy(1.0)[bound] < found.twin[bound]) == (rate == ALWAYS)


@pytest.mark.parametrize(
    ("silent", "spiking", "twin", "rate"),
    [
        (2.0, 4.0, 3.0, 0.1),
        (2.0, 4.0, 7.0, 0.5),
        (2.0, 4.0, 2.0, NEVER),
        (2.0, 4.0, 1.0, NEVER),
        (2.0, 4.0, 12.0, 1.0),
        (2.0, 4.0, 12.1, ALWAYS),
        (2.0, 2.0, 3.0, ALWAYS),  # no layer is fed by spikes
        (2.0, 2.0, 1.0, NEVER),
    ],
)
def test_crossings(silent: float, spiking: float, twin: float, rate: float) -> None:
    bands = [Band(energy, energy) for energy in (silent, spiking, twin)]
    assert BreakEven(read_model("arithmetic-45nm"), 0.2, *bands).rates == pytest.approx((rate, rate))


@pytest.mark.parametrize(
    ("spiking", "twin", "message"),
    [
        (SNN, replace(ANN, counts=None), "no operations by layer"),
        (SNN, SNN, "one without neurons"),
        (ANN, ANN, "a network that fires"),
        (replace(SNN, firing_rate=0.0), ANN, "a network that fires"),
    ],
)
def test_costs_of_the_wrong_kind_are_refused(spiking: Cost, twin: Cost, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        break_even(read_model("arithmetic-45nm"), spiking, twin)


def test_a_silent_network_has_only_biases_behind_folded_layers() -> None:
    pooled = replace(STEM, biases=2, folded_macs=0.0, folded_acs=500.0)  # 200 outputs
    silent = without_spikes(cost({"pooled": pooled, "body": SPIKING}, {}, 0.2)).counts
    assert silent is not None
    assert silent.total("folded_acs") == 200 + 300
    assert silent.total("unfolded_acs") == 300
