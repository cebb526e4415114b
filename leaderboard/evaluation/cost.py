"""What a network costs to run: firing rates, synaptic operations and energy, counted by forward hooks.

Rules, for each call of a convolution or linear layer with `D` dense connections (multiply-accumulates of the call):

- Input of spikes: all 0 or `a`, or all -a, 0 or `a`, with `a` 1 or the height of a neuron's spikes, which folds into
  the weights: `SOPs = D * spikes / numel(input)`; these are accumulates (AC), plus one AC for each output element if
  the layer has a bias. Border taps count as if every input element reached all of them.
- Spikes of a token and of the one before it, mixed by a `ShiftedLinear`: accumulates as of a convolution of two taps.
- Any other input: `D` multiply-accumulates (MAC), also that of quantised activations of several levels.

A layer called with several inputs concatenates their channels; each is then judged by itself, with its share of `D`.

A static image that a stem convolution sees once, before it is repeated over the SNN time steps, is counted once.
Neuron updates and attention products are not counted, nor is batch normalisation, which folds into the weights.

Energy at 45 nm (Horowitz, ISSCC 2014, https://doi.org/10.1109/ISSCC.2014.6757323): 4.6 pJ per MAC, 0.9 pJ per AC.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from leaderboard.record.records import Cost
from systems.networks.spiking_transformer import ShiftedLinear
from systems.ops.compiled import compiled, dense, memory
from systems.ops.cuda_graphs import REPLAYABLE
from systems.spiking.neurons import SpikingNeuron

PICOJOULES_PER_MAC = 4.6
PICOJOULES_PER_AC = 0.9

_TRANSPOSED = (nn.ConvTranspose2d,)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)
_MILLIJOULES = 1e-9  # of a picojoule


def _as_rows(x: Tensor) -> Tensor:
    """Returns the elements of `x` in rows that are short enough for exact sums of spikes in float32."""
    x = dense(x)
    return memory(x, math.prod(x.shape[: x.dim() // 2]), -1)


@compiled
def _sizes(x: Tensor) -> Tensor:
    """Sums of absolute values in each row."""
    return x.abs().sum((1, 2), dtype=torch.promote_types(x.dtype, torch.float32))


@compiled
def _survey(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Largest absolute value, 0 if there is no other but 0, and the sums of each row."""
    size = x.abs().to(torch.promote_types(x.dtype, torch.float32))
    height = size.amax()
    return height, ((height - size) * size).amax(), size.sum((1, 2))


def _count(sizes: Tensor, height: Tensor | float) -> Tensor:
    """Returns how many elements of 0 or ±`height` are not 0, exactly, in float64, from the sums of their rows.

    Sums are ten times as fast as comparisons of bfloat16 on a CPU.
    """
    return (sizes / height).round().sum(dtype=torch.float64)


@dataclass
class _Connections:
    """Running counts of one convolution or linear layer, `(dense if spikes, SOPs, MACs, ACs, dense)` in float64."""

    counts: Tensor | None = None

    def add(self, layer: nn.Module, inputs: Sequence[Tensor], out: Tensor, heights: Tensor) -> None:
        weight, bias = layer.weight, layer.bias
        assert isinstance(weight, Tensor)
        elements = sum(x.numel() for x in inputs)
        # weight[0] holds the taps of an output element, or of an input element where the convolution is transposed
        taps = 2 if isinstance(layer, ShiftedLinear) else 1
        dense = taps * math.prod(weight.shape[1:]) * (elements if isinstance(layer, _TRANSPOSED) else out.numel())
        counts = torch.zeros(4, dtype=torch.float64, device=out.device)
        for x in inputs:
            share = dense * x.numel() / max(elements, 1)
            height, others, sizes = _survey(_as_rows(x))
            is_spikes = (others == 0) & torch.isin(height, heights.to(height))
            sops = share * _count(sizes, height + (height == 0)) / max(x.numel(), 1)
            zero, all_dense = torch.zeros_like(sops), torch.full_like(sops, share)
            spiking = torch.stack([all_dense, sops, zero, sops])
            real = torch.stack([zero, zero, all_dense, zero])
            counts += torch.where(is_spikes, spiking, real)
        if bias is not None:
            counts[3] += out.numel() * (counts[0] > 0)
        self.counts = _added(self.counts, F.pad(counts, (0, 1), value=dense))


@dataclass
class _Neurons:
    """Running counts of one neuron layer, `(spikes, elements, steps)` in float64."""

    counts: Tensor | None = None

    def add(self, spikes: Tensor, height: Tensor | float) -> None:
        total = _count(_sizes(_as_rows(spikes)), height).view(1)
        steps = spikes.shape[0] * spikes.shape[1]  # (T, B, ...)
        counts = F.pad(F.pad(total, (0, 1), value=spikes.numel()), (0, 1), value=steps)
        self.counts = _added(self.counts, counts)


def _added(total: Tensor | None, counts: Tensor) -> Tensor:
    """Adds in place, on the device, so that a CUDA graph of a network counts each time that it is replayed."""
    return counts if total is None else total.add_(counts)


@dataclass(frozen=True)
class Counts:
    """What a `CostMeter` counted: plain numbers that go into a file, and add up over batches and processes.

    Args:
        connections: `[dense if spikes, SOPs, MACs, ACs, dense]` of each convolution or linear layer.
        neurons: `[spikes, elements, steps]` of each neuron layer.
        first_convolution: Name of the convolution that ran first.
    """

    connections: dict[str, list[float]] = field(default_factory=dict)
    neurons: dict[str, list[float]] = field(default_factory=dict)
    first_convolution: str | None = None

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            _add_by_name(self.connections, other.connections),
            _add_by_name(self.neurons, other.neurons),
            self.first_convolution or other.first_convolution,
        )

    def cost(
        self,
        network: nn.Module,
        num_images: int,
        nfe: int,
        images_per_second: float | None = None,
        peak_memory_bytes: int | None = None,
    ) -> Cost:
        """Returns the cost of one generated image over its whole denoising chain.

        Args:
            network: The network that ran, for its parameters.
            num_images: Images behind the counts.
            nfe: Network evaluations of each image's chain, kept beside the counts.
            images_per_second: Measured throughput of one device, if timed by the caller.
            peak_memory_bytes: Measured peak memory of the device, if read by the caller.

        Raises:
            ValueError: If `num_images` is not positive, or no counted layer ran.
        """
        if num_images < 1:
            raise ValueError(f"num_images={num_images}; give the number of images generated while the meter was open")
        if not self.connections:
            raise ValueError("no convolution or linear layer ran while the meter was open; sample inside its `with`")
        spike_fed, sops, macs, acs, _ = (sum(column) for column in zip(*self.connections.values(), strict=True))
        rates, mean_rate = self._firing_rates()
        return Cost(
            parameters=sum(p.numel() for p in network.parameters()),
            trainable_parameters=sum(p.numel() for p in network.parameters() if p.requires_grad),
            nfe=nfe,
            firing_rate=mean_rate,
            firing_rates=rates,
            sops=sops / num_images,
            macs=macs / num_images,
            acs=acs / num_images,
            energy_strict_mj=strict_energy_mj(macs, acs) / num_images,
            energy_paper_mj=self._paper_energy(spike_fed, sops, macs, num_images),
            images_per_second=images_per_second,
            peak_memory_bytes=peak_memory_bytes,
        )

    def _firing_rates(self) -> tuple[dict[str, float], float | None]:
        """Rate of each layer over all calls, and their mean weighted by neurons (`None` without neurons)."""
        rates = {name: spikes / elements for name, (spikes, elements, _) in self.neurons.items()}
        neurons = {name: elements / steps for name, (_, elements, steps) in self.neurons.items()}
        if not rates:
            return {}, None
        return rates, sum(rates[name] * neurons[name] for name in rates) / sum(neurons.values())

    def _paper_energy(self, spike_fed: float, sops: float, macs: float, num_images: int) -> float | None:
        """SDDPM's formula (arXiv 2306.17046): every layer but the first convolution is taken as fed by spikes.

        Layers that in truth see real values get the mean input rate of the spike-fed ones, weighted by connections.
        An ANN has MACs alone (arXiv 2408.16467, Table 4).
        """
        if not spike_fed:
            # neurons, but no layer fed by spikes: no rate to assume
            return None if self.neurons else PICOJOULES_PER_MAC * macs * _MILLIJOULES / num_images
        rate = sops / spike_fed
        energy = 0.0
        for name, (_, layer_sops, layer_macs, _, all_dense) in self.connections.items():
            if name == self.first_convolution:
                energy += PICOJOULES_PER_MAC * all_dense
            else:
                energy += PICOJOULES_PER_AC * (layer_sops + rate * layer_macs)
        return energy * _MILLIJOULES / num_images


def strict_energy_mj(macs: float, acs: float) -> float:
    """Energy at 45 nm in millijoules."""
    return (PICOJOULES_PER_MAC * macs + PICOJOULES_PER_AC * acs) * _MILLIJOULES


def _add_by_name(first: dict[str, list[float]], second: dict[str, list[float]]) -> dict[str, list[float]]:
    total = dict(first)
    for name, numbers in second.items():
        total[name] = [a + b for a, b in zip(total[name], numbers, strict=True)] if name in total else numbers
    return total


class CostMeter:
    """Counts spikes, operations and energy of every forward pass made while it is open.

    Counts stay on the device, with no synchronisation and no activation kept; only `take` waits for them.

    Args:
        network: Network to watch; its convolutions, linear layers and `SpikingNeuron` layers are counted.

    Example:
        >>> with CostMeter(network) as meter:
        ...     images = sample(network, num_images=64)
        >>> meter.take().cost(network, num_images=64, nfe=50).energy_strict_mj
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self._connections: dict[str, _Connections] = {}
        self._neurons: dict[str, _Neurons] = {}
        self._first_convolution: str | None = None
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        neurons = [module for module in self.network.modules() if isinstance(module, SpikingNeuron)]
        heights = [1.0, *([0.0] if neurons else []), *(float(neuron.amplitude) for neuron in neurons)]
        device = next((p.device for p in self.network.parameters()), None)
        self._heights = torch.tensor(heights, dtype=torch.float64, device=device)  # without neurons zeros are no spikes
        for name, module in self.network.named_modules():
            if isinstance(module, (*_CONVOLUTIONS, nn.Linear)):
                self._hooks.append(module.register_forward_hook(self._connection_hook(name), with_kwargs=True))
            elif isinstance(module, SpikingNeuron):
                self._hooks.append(module.register_forward_hook(self._neuron_hook(name)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _connection_hook(self, name: str) -> Any:
        @torch.no_grad()
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
            if self._first_convolution is None and isinstance(module, _CONVOLUTIONS):
                self._first_convolution = name
            inputs = args or (kwargs["input"],)
            self._connections.setdefault(name, _Connections()).add(module, inputs, out, self._heights)

        setattr(hook, REPLAYABLE, True)
        return hook

    def _neuron_hook(self, name: str) -> Any:
        @torch.no_grad()
        def hook(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
            self._neurons.setdefault(name, _Neurons()).add(out, cast(SpikingNeuron, module).amplitude)

        setattr(hook, REPLAYABLE, True)
        return hook

    def take(self) -> Counts:
        """Returns what was counted since the meter was opened or last asked, and counts from zero again."""
        counts = Counts(
            {name: layer.counts.tolist() for name, layer in self._connections.items() if layer.counts is not None},
            {name: layer.counts.tolist() for name, layer in self._neurons.items() if layer.counts is not None},
            self._first_convolution,
        )
        self._connections, self._neurons = {}, {}
        return counts
