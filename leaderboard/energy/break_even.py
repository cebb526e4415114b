"""Break-even: the firing rate below which a spiking network costs less than a network without spikes.

Every model of energy is linear in the spikes of a record: what a spike causes (its synaptic operations, their memory
accesses, the reset) is proportional to the firing rate, the rest (multiply-accumulates, leaks, comparisons, weights and
inputs that are read in any case) does not depend on it. If the rates of all layers change by the same factor, energy
follows the line through the energy of the silent network, `E(0)`, and that of the measured one, `E(r)`, so that it
equals the energy `E*` of the other network at the rate `r (E* - E(0)) / (E(r) - E(0))`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from leaderboard.energy import Band, EnergyModel
from leaderboard.record.counts import LayerCounts
from leaderboard.record.records import Cost

NEVER, ALWAYS = -math.inf, math.inf
"""Break-even rates of networks that cost more even when silent, and less even when every neuron always fires."""


@dataclass(frozen=True)
class BreakEven:
    """Energy per image of a spiking network at any firing rate, against that of another network, by one model.

    Bounds are compared with bounds of the same kind: the lower one of both networks, the upper one of both.

    Args:
        model: The model of energy.
        rate: Measured firing rate, the mean over neurons.
        silent: Energy of the spiking network without any spike, in mJ.
        spiking: Its energy at the measured rate, in mJ.
        twin: Energy of the other network, in mJ.
    """

    model: EnergyModel
    rate: float
    silent: Band
    spiking: Band
    twin: Band

    def energy(self, rate: float) -> Band:
        """Returns the energy of the spiking network at a mean rate, in mJ."""
        lines = zip(self.silent, self.spiking, strict=True)
        return Band(*(silent + (spiking - silent) * rate / self.rate for silent, spiking in lines))

    @property
    def rates(self) -> Band:
        """Rates below which the spiking network costs less, by the lower and by the upper bounds of energy.

        `NEVER` and `ALWAYS` if the lines do not cross between the rates 0 and 1.
        """
        bounds = zip(self.silent, self.spiking, self.twin, strict=True)
        return Band(*(self._crossing(*energies) for energies in bounds))

    def _crossing(self, silent: float, spiking: float, twin: float) -> float:
        if silent >= twin:
            return NEVER
        at_one = silent + (spiking - silent) / self.rate
        return ALWAYS if at_one < twin else self.rate * (twin - silent) / (spiking - silent)


def break_even(model: EnergyModel, spiking: Cost, twin: Cost) -> BreakEven | None:
    """Compares two costs by one model.

    Args:
        model: Model of energy.
        spiking: Cost of a network with neurons and operations by layer.
        twin: Cost of a network without neurons and with operations by layer.

    Returns:
        The comparison; None if the model has no energy for one of them.

    Raises:
        ValueError: If a network is of the wrong kind, or one has no operations by layer.
    """
    if spiking.counts is None or twin.counts is None:
        raise ValueError("a cost has no operations by layer; test again with this version")
    if not spiking.firing_rate or twin.counts.neurons:
        raise ValueError("break-even needs a network that fires and one without neurons")
    energies = [model.energy(cost) for cost in (without_spikes(spiking), spiking, twin)]
    silent, measured, other = energies
    if silent is None or measured is None or other is None:
        return None
    return BreakEven(model, spiking.firing_rate, silent, measured, other)


def without_spikes(cost: Cost) -> Cost:
    """Returns the cost of a network whose neurons never fire, as far as models of energy read it.

    Biases remain, and so do multiply-accumulates of pooled spikes, which are real values unless they are folded.
    """
    assert cost.counts is not None
    layers, neurons = cost.counts.layers, cost.counts.neurons
    counts = replace(
        cost.counts,
        layers={
            name: replace(
                layer,
                sops=0.0,
                acs=layer.acs - layer.sops,
                effective_acs=0.0,
                folded_acs=_folded_biases(layer),
                unfolded_acs=max(0.0, layer.unfolded_acs - layer.sops),
            )
            for name, layer in layers.items()
        },
        neurons={name: replace(neuron, spikes=0.0) for name, neuron in neurons.items()},
    )
    return replace(cost, acs=cost.acs - cost.sops, counts=counts)


def _folded_biases(layer: LayerCounts) -> float:
    """Returns the accumulates of biases in the folded count of a layer."""
    if layer.spike_dense:
        return layer.acs - layer.sops
    return layer.outputs if layer.biases and layer.folded_acs else 0.0
