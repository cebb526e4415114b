"""What a network shows of its structure while it generates: what feeds its layers, and what cannot be folded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict

from torch import Tensor, nn

from leaderboard.evaluation.folding import CONSTANT, REAL, Origin, Origins, Term, Weights
from leaderboard.evaluation.tally import LAYERS, TRANSPOSED, taps_per_weight
from systems.ops.uncounted import is_uncounted
from systems.spiking.adapter import amplitude, spikes_of, spiking_layers
from systems.spiking.neurons import SpikingLayer


class Inputs(TypedDict):
    """What feeds a layer or product.

    Args:
        bits: Bits that represent its values, as the layer states that made them; 32 unless stated.
        real: Share of its elements that are not linear in spikes.
        spikes: Layers of neurons in whose spikes it is linear, each with the spikes that an output element depends on;
            None if nothing can be folded.
    """

    bits: int
    real: float
    spikes: list[tuple[str, float]] | None


UNKNOWN = Inputs(bits=32, real=1.0, spikes=None)
"""Inputs of a layer that has not run under a dispatch mode."""


class Structure:
    """Follows a network's tensors through modules and operators, while a dispatch mode reports the latter.

    Args:
        module: The module that generates.
        short: Returns the name of a layer in the counts from its name in the module.
    """

    def __init__(self, module: nn.Module, short: Callable[[str], str]) -> None:
        self.inputs: dict[str, Inputs] = {}
        """What feeds each convolution and linear layer; unfoldable where it differs from call to call."""
        self.additions: dict[str, dict[str, float]] = {}
        """Additions by kind, for each outermost module that ran."""
        self.calls: dict[str, dict[str, int]] = {}
        """Calls of each layer, for each outermost module that ran."""
        self._module = module
        self._spiking = {id(layer): short(name) for name, layer in spiking_layers(module)}
        self._origins = self._new_origins()
        self._running: list[str] = []
        self._entered: list[Origin] = []
        self._in_neuron = 0

    def _new_origins(self) -> Origins:
        return Origins((*self._module.parameters(), *self._module.buffers()))

    def restart(self) -> None:
        """Forgets the tensors of earlier images."""
        self._origins = self._new_origins()
        self._running, self._entered, self._in_neuron = [], [], 0

    def enter(self, name: str, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Follows the tensors into a module."""
        self._running.append(name)
        if isinstance(module, LAYERS):
            self._origins[module.weight] = CONSTANT  # one that was set since
            self._entered.append(self._origins.joined(_tensors(args, kwargs)))
        if id(module) in self._spiking:
            norm = kwargs.get("norm", args[1] if len(args) > 1 else None)
            if isinstance(module, SpikingLayer) and norm is not None and not self._in_neuron:
                self._normed(_tensors(args[:1], kwargs)[0])
            self._in_neuron += 1

    def _normed(self, currents: Tensor) -> None:
        """Counts the norm that a neuron computes, unless it folds into the layer before it."""
        if not self._origins[currents].current:
            additions = self._origins.additions
            additions["batch_norm"] = additions.get("batch_norm", 0.0) + currents.numel()

    def leave(self, name: str, module: nn.Module, out: Any) -> None:
        """Follows the tensors out of a module."""
        if isinstance(module, LAYERS):
            self._count_layer(name, module, self._entered.pop())
        elif id(module) in self._spiking:
            self._in_neuron -= 1
            if not self._in_neuron and isinstance(spikes_of(out), Tensor):
                spikes = Origin(bits=1, terms=(Term(self._spiking[id(module)]),), real=0.0)
                self._origins[spikes_of(out)] = REAL if amplitude(module) is None else spikes
        elif isinstance(bits := getattr(module, "bits", None), int) and isinstance(out, Tensor):
            self._origins[out] = Origin(bits=bits)
        for kind, number in self._origins.additions.items():
            of_outermost = self.additions.setdefault(self._running[0], {})
            of_outermost[kind] = of_outermost.get(kind, 0.0) + number
        self._origins.additions.clear()
        self._running.pop()

    def _count_layer(self, name: str, layer: Any, origin: Origin) -> None:
        calls = self.calls.setdefault(self._running[0], {})
        calls[name] = calls.get(name, 0) + 1
        if isinstance(layer, nn.Linear):
            weights = Weights.of(layer.weight)
        else:
            transposed = isinstance(layer, TRANSPOSED)
            weights = Weights.of(layer.weight, layer.stride, layer.dilation, transposed, layer.groups)
        spikes = None
        if any(term.folds for term in origin.terms):
            behind = [term.behind(weights) for term in origin.terms]
            if None not in behind:
                spikes = [(t.source, t.connections * taps_per_weight(layer)) for t in behind if t]
        found = Inputs(bits=origin.bits, real=origin.real if spikes else 1.0, spikes=spikes)
        if self.inputs.setdefault(name, found) != found:
            self.inputs[name] = Inputs(bits=max(found["bits"], self.inputs[name]["bits"]), real=1.0, spikes=None)

    def operator(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
        """Follows an operator; what neurons compute is part of their update."""
        if not self._in_neuron and not is_uncounted():
            self._origins.follow(func, args, kwargs, out, counts=bool(self._running))

    def additions_of(self, calls: Mapping[str, float]) -> dict[str, float]:
        """Returns the additions of another run, with these calls of each layer.

        An outermost module is assumed to have run as often as the layer in it that was called most.
        """
        total: dict[str, float] = {}
        for outermost, additions in self.additions.items():
            known = self.calls.get(outermost, {})
            most = max(known, key=lambda name: known[name], default=None)
            ratio = calls.get(most, 0.0) / known[most] if most else 0.0
            for kind, number in additions.items():
                total[kind] = total.get(kind, 0.0) + ratio * number
        return total


def _tensors(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Returns the inputs of a layer, which may be given by name."""
    return [x for x in args or (kwargs.get("input", kwargs.get("x")),) if isinstance(x, Tensor)]
