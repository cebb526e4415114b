"""Operations by layer made by hand, with a cost to match."""

from __future__ import annotations

from dataclasses import replace

from leaderboard.record.counts import LayerCounts, NeuronCounts, OperationCounts
from leaderboard.record.records import Cost

PICOJOULE = 1e-9  # in mJ
STEM = LayerCounts(
    calls=10,
    weights=20,
    nonzero_weights=18,
    input_bits=32,
    inputs=100,
    outputs=200,
    dense=1000,
    spike_dense=0,
    sops=0,
    macs=1000,
    acs=0,
    effective_macs=800,
    effective_acs=0,
    folded_macs=1000,
    folded_acs=0,
    unfolded_macs=1000,
    unfolded_acs=0,
    dense_unpadded=900,
    biases=2,
    nonzero_biases=2,
)
SPIKING = LayerCounts(
    calls=10,
    weights=50,
    nonzero_weights=50,
    input_bits=1,
    inputs=400,
    outputs=300,
    dense=4000,
    spike_dense=4000,
    sops=1000,
    macs=0,
    acs=1100,
    effective_macs=0,
    effective_acs=900,
    folded_macs=0,
    folded_acs=1100,
    unfolded_macs=0,
    unfolded_acs=1100,
    dense_unpadded=3900,
    biases=1,
    nonzero_biases=1,
)
QUANTISED = replace(
    STEM, input_bits=2, macs=500, dense=500, effective_macs=300, folded_macs=500, unfolded_macs=500, dense_unpadded=450
)
COUNTS = OperationCounts(
    layers={"stem": STEM, "spiking": SPIKING, "quantised": QUANTISED},
    neurons={"neuron": NeuronCounts(updates=40, spikes=8, leaks=40)},
    additions={"residual": 60},
    first_convolution="stem",
    footprint_bytes=1000,
)


def costing(counts: OperationCounts | None = COUNTS) -> Cost:
    layers = list(COUNTS.layers.values())
    macs, acs = sum(layer.macs for layer in layers), sum(layer.acs for layer in layers)
    return Cost(
        parameters=90,
        trainable_parameters=90,
        nfe=10,
        firing_rate=0.2,
        firing_rates={"neuron": 0.2},
        sops=1000,
        macs=macs,
        acs=acs,
        energy_strict_mj=(4.6 * macs + 0.9 * acs) * PICOJOULE,
        energy_paper_mj=0.5,
        counts=counts,
    )
