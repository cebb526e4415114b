"""Operations of a network by layer, for one generated image: the part of a record from which energy is computed."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar


@dataclass(frozen=True)
class LayerCounts:
    """Operations of one convolution, linear layer or other product, for one generated image over its whole chain.

    A call of a layer processes all SNN time steps. *Strict* is the rule of `leaderboard.evaluation.cost`: inputs of
    spikes cause accumulates where there is a spike, all others multiply-accumulates of every connection.

    Args:
        calls: Calls.
        weights: Weights and biases; 0 for a product of two activations.
        nonzero_weights: Those that are not 0.
        input_bits: Bits that represent the values of the input: 1 for spikes, `b` for up to `2^b` levels, 32 for real
            numbers.
        inputs: Elements read.
        outputs: Elements written.
        dense: Multiply-accumulates of all connections, zeros included.
        spike_dense: Those whose input is spikes.
        sops: Synaptic operations: accumulates caused by spikes.
        macs: Strict multiply-accumulates.
        acs: Strict accumulates: `sops` and biases.
        effective_macs: Multiply-accumulates with real-valued inputs, without zero inputs, zero weights and padding.
        effective_acs: Accumulates with spike inputs, without zero inputs, zero weights and padding.
        folded_macs: Strict multiply-accumulates if linear maps between spikes and the layer are folded into it.
        folded_acs: Strict accumulates with the same folding.
        unfolded_macs: Strict multiply-accumulates if nothing is folded, a token shift neither.
        unfolded_acs: Strict accumulates without folding.
        dense_unpadded: `dense` without the connections of zero padding (NeuroBench's *Dense*).
        biases: Those of `weights` that are biases.
        nonzero_biases: Those of `nonzero_weights` that are biases.
    """

    calls: float
    weights: int
    nonzero_weights: int
    input_bits: int
    inputs: float
    outputs: float
    dense: float
    spike_dense: float
    sops: float
    macs: float
    acs: float
    effective_macs: float
    effective_acs: float
    folded_macs: float
    folded_acs: float
    unfolded_macs: float
    unfolded_acs: float
    dense_unpadded: float
    biases: int
    nonzero_biases: int


@dataclass(frozen=True)
class ActivationCounts:
    """Output of one activation layer of an ANN for one generated image over its whole chain.

    Args:
        elements: Activations.
        nonzero: Those that are not 0.
    """

    elements: float
    nonzero: float


@dataclass(frozen=True)
class NeuronCounts:
    """Work of one spiking layer for one generated image over its whole chain.

    Args:
        updates: Neuron updates (charge, leak, comparison, reset): neurons times SNN time steps times calls.
        spikes: Spikes.
        leaks: Updates that multiply the membrane by a decay; 0 for integrate-and-fire neurons.
    """

    updates: float
    spikes: float
    leaks: float


@dataclass(frozen=True)
class OperationCounts:
    """Operations of a network for one generated image over its whole chain, from which every model of energy starts.

    Args:
        layers: Counts of each layer or product, by name.
        neurons: Counts of each spiking layer, by name.
        additions: Element-wise operations that cannot be folded into weights, by kind, such as sums of residuals.
        first_convolution: Name of the layer that SDDPM's formula charges as multiply-accumulates.
        footprint_bytes: Memory of parameters and buffers.
        activations: Output of each ReLU, sigmoid and quantised activation, by name.
    """

    layers: dict[str, LayerCounts]
    neurons: dict[str, NeuronCounts]
    additions: dict[str, float]
    first_convolution: str | None
    footprint_bytes: int
    activations: dict[str, ActivationCounts] | None = None

    def total(self, name: str) -> float:
        """Returns the sum over all layers of a field of `LayerCounts`, such as `"effective_macs"`."""
        return float(sum(getattr(layer, name) for layer in self.layers.values()))

    @property
    def neuron_updates(self) -> float:
        """Updates of all neurons."""
        return sum(neurons.updates for neurons in self.neurons.values())

    @property
    def leaks(self) -> float:
        """Updates that multiply a membrane by a decay."""
        return sum(neurons.leaks for neurons in self.neurons.values())

    @property
    def activation_sparsity(self) -> float | None:
        """Share of zeros in the output of all neurons and activations (NeuroBench); `None` without any."""
        activations = (self.activations or {}).values()
        elements = self.neuron_updates + sum(a.elements for a in activations)
        nonzero = sum(n.spikes for n in self.neurons.values()) + sum(a.nonzero for a in activations)
        return 1 - nonzero / elements if elements else None

    @property
    def connection_sparsity(self) -> float | None:
        """Share of zeros among the weights, biases excluded (NeuroBench); `None` without weights."""
        weights = self.total("weights") - self.total("biases")
        nonzero = self.total("nonzero_weights") - self.total("nonzero_biases")
        return 1 - nonzero / weights if weights else None

    def per_evaluation(self, nfe: int) -> OperationCounts:
        """Returns the counts of one network evaluation, the mean over `nfe` of them; memory is the same."""
        return replace(
            self,
            layers={name: _divided(layer, nfe) for name, layer in self.layers.items()},
            neurons={name: _divided(neurons, nfe) for name, neurons in self.neurons.items()},
            additions={kind: number / nfe for kind, number in self.additions.items()},
            activations={name: _divided(a, nfe) for name, a in (self.activations or {}).items()},
        )


_Countable = TypeVar("_Countable", LayerCounts, NeuronCounts, ActivationCounts)


def _divided(counts: _Countable, by: int) -> _Countable:
    """Divides what is counted per image; whole numbers describe the layer and remain."""
    per_call: dict[str, Any] = {name: v / by for name, v in asdict(counts).items() if isinstance(v, float)}
    return replace(counts, **per_call)
