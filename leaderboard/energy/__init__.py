"""Models of energy: named, immutable rules that turn the operations of a record into millijoules, one YAML file each.

Records contain counts, so energy is computed when a table is rendered: a new model needs no new run.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from leaderboard.locked import Locked, read_locked
from leaderboard.record.counts import LayerCounts, OperationCounts
from leaderboard.record.records import Cost

ARITHMETIC = "arithmetic-45nm"
"""Name of the model that needs no operations by layer, so that every record with a cost has its energy."""

PAPER_SDDPM = "paper-sddpm"
"""Name of the model of SDDPM's formula."""

FOLDER = Path(__file__).parent
"""Folder of the files, `<name>.yaml`."""

LOCKED = {
    "arithmetic-45nm": "b34eeaf604edfc5300b7f0a18ed326fb8a77b410de5bcef4d985562ac918224a",
    "folded-45nm": "98f76f9108e1afc71a8c26f7a595943894a030449fa4ad130ebb61dd2b4ee835",
    "unfolded-45nm": "5be8742166ac051c7d84fe5f738b8895207dfa0942280a53fd4524d9547da776",
    "neurobench-45nm": "26e7ffaa6a4911bb20ff83eddb483dfd3ed1f5a193a13bbfb5c57466b4da446e",
    "quantised-45nm": "d029c1dc690f3220637869ba3287f91ee8d010b60aec7f4f0677351dc3c0bad2",
    "memory-45nm": "d4f14379601be36c45651f8ac878ae9f827e5fba0e23c0e3d8d1d9b0f690a5ec",
    "paper-sddpm": "d9d584de0f6334369814cd233b60c7da602afd50850b5484109e2ab8bbd45397",
}
"""Hash of each shipped model, in the order of tables. Models never change: a changed one needs a new name."""

_MILLIJOULES = 1e-9  # of a picojoule


class Band(NamedTuple):
    """Energy in mJ per generated image over its whole chain, between two bounds.

    Args:
        low: Lower bound.
        high: Upper bound; equal to `low` where a model has one value.
    """

    low: float
    high: float


@dataclass(frozen=True)
class Float32:
    """Energy of operations of 32-bit floating-point numbers.

    Args:
        mac_pj: Energy of a multiply-accumulate in pJ.
        ac_pj: Energy of an accumulate in pJ.
    """

    mac_pj: float
    ac_pj: float

    def energy_pj(self, macs: float, acs: float) -> float:
        """Returns the energy of operations in pJ."""
        return self.mac_pj * macs + self.ac_pj * acs


@dataclass(frozen=True)
class Integer:
    """Energy of operations of integers, by bit width.

    Energy between and below the published widths follows a power law through both, `E(n) = E_8 (n / 8)^p` with
    `p = log4(E_32 / E_8)`; `n` is the geometric mean of the widths of two factors.

    Args:
        weight_bits: Width of weights and of the constant by which a membrane leaks.
        activation_bits: Width of real values; values of `2^b` levels have `b` bits if that is fewer.
        accumulator_bits: Width of accumulators, membranes, sums and norms.
        add_pj: Energy of an addition in pJ of 8 and 32 bits.
        multiply_pj: Energy of a multiplication in pJ of 8 and 32 bits.
    """

    weight_bits: int
    activation_bits: int
    accumulator_bits: int
    add_pj: dict[str, float]
    multiply_pj: dict[str, float]

    def bits(self, layer: LayerCounts) -> int:
        """Returns the width of the real values that a layer reads."""
        return min(layer.input_bits, self.activation_bits)

    def mac(self, layer: LayerCounts) -> float:
        """Returns the energy of a multiply-accumulate of a layer in pJ."""
        return _power_law(self.multiply_pj, math.sqrt(self.weight_bits * self.bits(layer))) + self.ac

    @property
    def ac(self) -> float:
        """Energy of an accumulate, or of an element of a sum or norm, in pJ."""
        return _power_law(self.add_pj, self.accumulator_bits)

    @property
    def leak(self) -> float:
        """Energy of multiplying a membrane by a constant in pJ."""
        return _power_law(self.multiply_pj, math.sqrt(self.weight_bits * self.accumulator_bits))

    def energy_pj(self, counts: OperationCounts) -> float:
        """Returns the energy of effective operations, neuron updates, sums and norms in pJ.

        An update is two additions (charge, comparison), and one more for each spike (reset). A leak multiplies.
        """
        layers = sum(n.effective_macs * self.mac(n) + n.effective_acs * self.ac for n in counts.layers.values())
        updates = counts.neuron_updates * 2 * self.ac + counts.leaks * self.leak
        sums = sum(n.spikes for n in counts.neurons.values()) + sum(counts.additions.values())
        return layers + updates + sums * self.ac


@dataclass(frozen=True)
class Traffic:
    """Energy of memory accesses, per bit that is read or written.

    Args:
        membrane_bits: Width of membranes, and of partial sums where each accumulate reads and writes one.
        weights_pj_per_bit: Weights, each read once per call of its layer, which processes all SNN time steps.
        inputs_pj_per_bit: Elements of inputs, each written once and read once; spikes have 1 bit.
        membranes_pj_per_bit: Membranes, read and written at each neuron update.
        weight_of_an_operation_pj_per_bit: Weight of each effective operation; 0 if weights stay beside the arithmetic.
        operand_of_an_operation_pj_per_bit: Input of each effective multiply-accumulate, and partial sum of each
            effective accumulate, read and written; 0 if these stay beside the arithmetic.
    """

    membrane_bits: int
    weights_pj_per_bit: float
    inputs_pj_per_bit: float
    membranes_pj_per_bit: float
    weight_of_an_operation_pj_per_bit: float
    operand_of_an_operation_pj_per_bit: float

    def energy_pj(self, counts: OperationCounts, integer: Integer) -> float:
        """Returns the energy of all accesses in pJ."""
        membranes = 2 * self.membrane_bits * self.membranes_pj_per_bit * counts.neuron_updates
        return membranes + sum(self._layer_pj(layer, integer) for layer in counts.layers.values())

    def _layer_pj(self, layer: LayerCounts, integer: Integer) -> float:
        share = layer.spike_dense / layer.dense if layer.dense else 0.0  # of spikes in the input
        input_bits = share + (1 - share) * integer.bits(layer)
        operations = layer.effective_macs + layer.effective_acs
        operands = layer.effective_macs * integer.bits(layer) + layer.effective_acs * 2 * self.membrane_bits
        return (
            self.weights_pj_per_bit * integer.weight_bits * layer.weights * layer.calls
            + self.inputs_pj_per_bit * 2 * input_bits * layer.inputs
            + self.weight_of_an_operation_pj_per_bit * integer.weight_bits * operations
            + self.operand_of_an_operation_pj_per_bit * operands
        )


@dataclass(frozen=True)
class Memory:
    """Two bounds of the energy of memory accesses."""

    lower: Traffic
    upper: Traffic


@dataclass(frozen=True)
class EnergyModel(Locked):
    """Rule that computes energy from the operations of a record.

    Args:
        name: Name with a version or process; a changed model needs a new name.
        title: Header of its column.
        about: Description in one paragraph.
        sources: Where its constants come from.
        operations: Which operations it charges: `"strict"` those of `leaderboard.evaluation.cost`, `"folded"` and
            `"unfolded"` those of `leaderboard.evaluation.folding`, `"effective"` those without zero operands, `"sddpm"`
            those of SDDPM's formula.
        float32: Energy of floating-point operations; None for a model of integers.
        integer: Energy of integer operations, neuron updates and sums; None for a model of floating-point numbers.
        memory: Memory accesses of a model of integers; None if they are free.
    """

    title: str
    about: str
    sources: tuple[str, ...]
    operations: Literal["strict", "folded", "unfolded", "effective", "sddpm"]
    float32: Float32 | None = None
    integer: Integer | None = None
    memory: Memory | None = None

    def energy(self, cost: Cost | None) -> Band | None:
        """Returns the energy per image in mJ; None where the record lacks what it follows from (`missing`)."""
        if cost is None or self.missing(cost):
            return None
        if self.integer is not None:
            assert cost.counts is not None
            arithmetic = self.integer.energy_pj(cost.counts)
            bounds = (self.memory.lower, self.memory.upper) if self.memory else ()
            traffic = [bound.energy_pj(cost.counts, self.integer) for bound in bounds] or [0.0, 0.0]
            return Band(*((arithmetic + accesses) * _MILLIJOULES for accesses in traffic))
        if self.operations == "sddpm" and cost.counts is None:
            assert cost.energy_paper_mj is not None
            return Band(cost.energy_paper_mj, cost.energy_paper_mj)
        assert self.float32 is not None
        energy = self.float32.energy_pj(*_OPERATIONS[self.operations](cost)) * _MILLIJOULES
        return Band(energy, energy)

    def missing(self, cost: Cost | None) -> str:
        """Returns in words why a cost has no energy by this model; empty if it has."""
        if cost is None:
            return "no cost is stated"
        if self.operations == "sddpm":
            if cost.counts is None:
                return "" if cost.energy_paper_mj is not None else "SDDPM's formula is not defined or was not stored"
            defined = not cost.counts.neurons or _rate(cost.counts) is not None
            return "" if defined else "no layer is fed by spikes, so the formula has no rate"
        if self.operations != "strict" and cost.counts is None:
            return "the record has no operations by layer; test again with this version"
        return ""


def _strict(cost: Cost) -> tuple[float, float]:
    """Returns multiply-accumulates and accumulates by the strict count; without counts by layer, the totals."""
    if cost.counts is None:
        return cost.macs, cost.acs
    return cost.counts.total("macs"), cost.counts.total("acs")


def _totals(kind: str) -> Callable[[Cost], tuple[float, float]]:
    """Returns a function of the multiply-accumulates and accumulates of a kind in the counts by layer."""

    def totals(cost: Cost) -> tuple[float, float]:
        assert cost.counts is not None
        return cost.counts.total(f"{kind}_macs"), cost.counts.total(f"{kind}_acs")

    return totals


def _rate(counts: OperationCounts) -> float | None:
    """Returns the mean input rate of the layers that receive only spikes, by connections; None if there are none.

    A layer of real values counts as spikes in a call in which all of them happen to be 0 or 1, such as a time embedding
    at step 0; it is not one of these.
    """
    fed = [layer for layer in counts.layers.values() if layer.dense and layer.spike_dense == layer.dense]
    return sum(layer.sops for layer in fed) / sum(layer.dense for layer in fed) if fed else None


def _sddpm(cost: Cost) -> tuple[float, float]:
    """Returns multiply-accumulates and accumulates of SDDPM's formula (arXiv 2306.17046).

    All layers but the first convolution use accumulates. Layers whose input is not spikes are assigned the mean input
    rate of the others, weighted by connections. An ANN has only multiply-accumulates, whatever the values of its inputs
    (arXiv 2408.16467, Table 4); `missing` refuses a spiking network without layers that spikes feed.
    """
    assert cost.counts is not None
    layers, rate = cost.counts.layers, _rate(cost.counts)
    if not cost.counts.neurons or rate is None:
        return cost.counts.total("dense"), 0.0
    first = [layer for name, layer in layers.items() if name == cost.counts.first_convolution]
    others = [layer for name, layer in layers.items() if name != cost.counts.first_convolution]
    return sum(layer.dense for layer in first), sum(layer.sops + rate * layer.macs for layer in others)


_OPERATIONS: dict[str, Callable[[Cost], tuple[float, float]]] = {
    "strict": _strict,
    "folded": _totals("folded"),
    "unfolded": _totals("unfolded"),
    "effective": _totals("effective"),
    "sddpm": _sddpm,
}


def _power_law(published: dict[str, float], bits: float) -> float:
    """Returns the energy of an operation of a bit width; exact at the published widths, 8 and 32."""
    low, high = published["8"], published["32"]
    return published.get(f"{bits:g}", low * (bits / 8) ** math.log(high / low, 4))


def _read(path: Path) -> EnergyModel:
    model = read_locked(EnergyModel, path, LOCKED, "an energy model")
    numbers = sum(part is not None for part in (model.float32, model.integer))
    if numbers != 1 or (model.integer is None and model.memory is not None):
        raise ValueError(
            f"{path} is not an energy model: it needs either float32 or integer, and memory with the latter"
        )
    return model


_MODELS = {name: _read(FOLDER / f"{name}.yaml") for name in LOCKED}


def read_models() -> dict[str, EnergyModel]:
    """Returns all models by name, in the order of tables."""
    return dict(_MODELS)


def read_model(name: str) -> EnergyModel:
    """Returns a model by name.

    Raises:
        ValueError: If there is no such model.
    """
    if name not in _MODELS:
        raise ValueError(f"{name!r} is not an energy model; expected one of: {', '.join(_MODELS)}")
    return _MODELS[name]


def strict_energy_mj(macs: float, acs: float) -> float:
    """Returns the energy in millijoules of operations by the strict count (4.6 pJ per MAC, 0.9 pJ per AC)."""
    model = _MODELS[ARITHMETIC].float32
    assert model is not None
    return model.energy_pj(macs, acs) * _MILLIJOULES
