"""Inference cost of a network: firing rates, synaptic operations (SOPs) and energy, counted by forward hooks.

Rules, for each call of a convolution or linear layer with `D` dense connections (multiply-accumulates of the call):

- Spike input: every value is 0 or `a`, or every value is -a, 0 or `a`, where `a` is 1 or the amplitude of a neuron's
  spikes, which folds into the weights. `SOPs = D * spikes / numel(input)`; each is an accumulate (AC), plus one AC for
  each output element if the layer has a bias. Zero-padding is ignored: border elements count with all taps.
- Any other input: `D` multiply-accumulates (MAC). This includes quantised activations of several levels.
- A layer that applies each weight several times states so by a class attribute `taps_per_weight`, which multiplies `D`
  (`ShiftedLinear` has 2: it is a convolution over a token and the one before it). Layers without it count with 1.

A layer called with several inputs concatenates their channels; each input is classified separately, with its share of
`D`.

A stem convolution that runs once on the image, before it is repeated over the SNN time steps, is counted once. Neuron
updates and attention products are not counted, nor is batch normalisation, which folds into the weights.

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
from systems.ops.compiled import compiled, dense, memory
from systems.ops.cuda_graphs import REPLAYABLE
from systems.spiking.neurons import SpikingNeuron

PICOJOULES_PER_MAC = 4.6
PICOJOULES_PER_AC = 0.9

_TRANSPOSED = (nn.ConvTranspose2d,)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)
_MILLIJOULES = 1e-9  # of a picojoule


def _as_rows(x: Tensor) -> Tensor:
    """Reshapes `x` to rows that are short enough for spikes to be counted exactly in float32."""
    x = dense(x)
    return memory(x, math.prod(x.shape[: x.dim() // 2]), -1)


@compiled
def _abs_row_sums(x: Tensor) -> Tensor:
    """Returns the sum of absolute values of each row."""
    return x.abs().sum((1, 2), dtype=torch.promote_types(x.dtype, torch.float32))


@compiled
def _abs_stats(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the amplitude `a = max |x|`, a number that is 0 only if `|x|` is 0 or `a` everywhere, and the row sums.

    The number is the maximum of `(a - s) s` with `s = |x|`:

    s = |x|      0  .7   .7  0   a = .7        0  .7   1.4  0   a = 1.4
    (a - s) s    0   0    0  0   maximum 0     0  .49   0   0   maximum .49, not binary
    """
    size = x.abs().to(torch.promote_types(x.dtype, torch.float32))
    amplitude = size.amax()
    not_binary = ((amplitude - size) * size).amax()
    return amplitude, not_binary, size.sum((1, 2))


def _count_spikes(row_sums: Tensor, amplitude: Tensor | float) -> Tensor:
    """Returns the exact number of nonzero elements, in float64, from the row sums of `|x|` in {0, `amplitude`}.

    On a CPU, sums are ten times as fast as comparisons in bfloat16.
    """
    return (row_sums / amplitude).round().sum(dtype=torch.float64)


def _taps_per_weight(layer: nn.Module) -> int:
    """Returns how many connections each weight of a layer stands for: its `taps_per_weight` if it has one, else 1."""
    taps: int = getattr(layer, "taps_per_weight", 1)
    return taps


@dataclass
class _Connections:
    """Running counts of one convolution or linear layer, `(dense if spikes, SOPs, MACs, ACs, dense)` in float64."""

    counts: Tensor | None = None

    def add(self, layer: nn.Module, inputs: Sequence[Tensor], out: Tensor, amplitudes: Tensor) -> None:
        weight, bias = layer.weight, layer.bias
        assert isinstance(weight, Tensor)
        elements = sum(x.numel() for x in inputs)
        # weight[0] contains the weights of one output element, or of one input element in a transposed convolution
        fan = _taps_per_weight(layer) * math.prod(weight.shape[1:])
        dense = fan * (elements if isinstance(layer, _TRANSPOSED) else out.numel())
        counts = torch.zeros(4, dtype=torch.float64, device=out.device)
        for x in inputs:
            share = dense * x.numel() / max(elements, 1)
            amplitude, not_binary, row_sums = _abs_stats(_as_rows(x))
            is_spikes = (not_binary == 0) & torch.isin(amplitude, amplitudes.to(amplitude))
            sops = share * _count_spikes(row_sums, amplitude + (amplitude == 0)) / max(x.numel(), 1)
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

    def add(self, spikes: Tensor, amplitude: Tensor | float) -> None:
        total = _count_spikes(_abs_row_sums(_as_rows(spikes)), amplitude).view(1)
        steps = spikes.shape[0] * spikes.shape[1]  # (T, B, ...)
        counts = F.pad(F.pad(total, (0, 1), value=spikes.numel()), (0, 1), value=steps)
        self.counts = _added(self.counts, counts)


def _added(total: Tensor | None, counts: Tensor) -> Tensor:
    """Adds in place on the device, so that every replay of a CUDA graph counts."""
    return counts if total is None else total.add_(counts)


@dataclass(frozen=True)
class Counts:
    """Counts of a `CostMeter` as plain numbers, which are written to files and add up over batches and processes.

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
            network: The network that ran; its parameters are counted.
            num_images: Number of images that were generated for these counts.
            nfe: Network evaluations per image, stored with the counts.
            images_per_second: Throughput of one device, if the caller measured it.
            peak_memory_bytes: Peak memory of the device, if the caller measured it.

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
        """Returns the firing rate of each layer over all calls, and the mean over neurons (`None` without neurons)."""
        rates = {name: spikes / elements for name, (spikes, elements, _) in self.neurons.items()}
        neurons = {name: elements / steps for name, (_, elements, steps) in self.neurons.items()}
        if not rates:
            return {}, None
        return rates, sum(rates[name] * neurons[name] for name in rates) / sum(neurons.values())

    def _paper_energy(self, spike_fed: float, sops: float, macs: float, num_images: int) -> float | None:
        """Returns the energy in mJ by SDDPM's formula (arXiv 2306.17046): all layers but the first convolution use ACs.

        Layers whose input is not spikes are assigned the mean input rate of the others, weighted by connections. An ANN
        has only MACs (arXiv 2408.16467, Table 4).
        """
        if not spike_fed:
            # with neurons but without any layer fed by spikes, there is no rate to assume
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
    """Returns the energy in millijoules at 45 nm (4.6 pJ per MAC, 0.9 pJ per AC)."""
    return (PICOJOULES_PER_MAC * macs + PICOJOULES_PER_AC * acs) * _MILLIJOULES


def _add_by_name(first: dict[str, list[float]], second: dict[str, list[float]]) -> dict[str, list[float]]:
    total = dict(first)
    for name, numbers in second.items():
        total[name] = [a + b for a, b in zip(total[name], numbers, strict=True)] if name in total else numbers
    return total


class CostMeter:
    """Counts spikes and operations of every forward pass of a network inside its `with` block.

    Counts are accumulated on the device without storing activations or synchronising; only `take` waits for them.

    Args:
        network: Network whose convolutions, linear layers and `SpikingNeuron` layers are counted.

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
        zero = [0.0] if neurons else []  # in an ANN, an input of only zeros does not count as spikes
        amplitudes = [1.0, *zero, *(float(neuron.amplitude) for neuron in neurons)]
        device = next((p.device for p in self.network.parameters()), None)
        self._amplitudes = torch.tensor(amplitudes, dtype=torch.float64, device=device)
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
            self._connections.setdefault(name, _Connections()).add(module, inputs, out, self._amplitudes)

        setattr(hook, REPLAYABLE, True)
        return hook

    def _neuron_hook(self, name: str) -> Any:
        @torch.no_grad()
        def hook(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
            self._neurons.setdefault(name, _Neurons()).add(out, cast(SpikingNeuron, module).amplitude)

        setattr(hook, REPLAYABLE, True)
        return hook

    def take(self) -> Counts:
        """Returns the counts since the meter was opened or last read, and resets them to zero."""
        counts = Counts(
            {name: layer.counts.tolist() for name, layer in self._connections.items() if layer.counts is not None},
            {name: layer.counts.tolist() for name, layer in self._neurons.items() if layer.counts is not None},
            self._first_convolution,
        )
        self._connections, self._neurons = {}, {}
        return counts
