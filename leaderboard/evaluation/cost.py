"""Inference cost of a method: firing rates, synaptic operations (SOPs) and energy.

Convolutions, linear layers and spiking layers are counted by forward hooks, wherever in the module they are; products
of matrices outside of them (`F.linear`, `@`, `einsum`, attention, recurrent cells) by a dispatch mode. Products that
cannot be counted are listed by name, and the cost is incomplete.

Rules, for each call of a convolution or linear layer with `D` dense connections (multiply-accumulates of the call):

- Spike input: every value is 0 or `a`, or every value is -a, 0 or `a`, where `a` is 1 or the amplitude of a neuron's
  spikes, which folds into the weights. `SOPs = D * spikes / numel(input)`; each is an accumulate (AC), plus one AC for
  each output element if the layer has a bias. Zero-padding is ignored: border elements count with all taps.
- Any other input: `D` multiply-accumulates (MAC). This includes quantised activations of several levels, and graded
  spikes of several amplitudes, such as one for each channel.
- A product of two operands, neither of them a layer's weight, follows the same rules with the operand that has fewer
  spikes; attention with a softmax counts as MACs of both products.
- A layer that applies each weight several times states so by a class attribute `taps_per_weight`, which multiplies `D`
  (`ShiftedLinear` has 2: it is a convolution over a token and the one before it). Layers without it count with 1.

A layer called with several inputs concatenates their channels; each input is classified separately, with its share of
`D`.

A stem convolution that runs once on the image, before it is repeated over the SNN time steps, is counted once.
Element-wise operations are not counted: neuron updates, RWKV's recurrence, and batch normalisation, which folds into
the weights. Nor are products marked by `systems.ops.uncounted`: the read-out of a membrane, which is a neuron update,
and constants that a trained network can store.

Energy at 45 nm (Horowitz, ISSCC 2014, https://doi.org/10.1109/ISSCC.2014.6757323): 4.6 pJ per MAC, 0.9 pJ per AC.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import snntorch as snn
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from leaderboard.evaluation.products import Product, ProductMode
from leaderboard.record.records import Cost
from systems.ops.compiled import compiled, dense, memory
from systems.ops.cuda_graphs import REPLAYABLE
from systems.ops.uncounted import is_uncounted
from systems.spiking.adapter import amplitude, spikes_of, spiking_layers
from systems.spiking.neurons import SpikingLayer

PICOJOULES_PER_MAC = 4.6
PICOJOULES_PER_AC = 0.9

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)
_HALF = (torch.bfloat16, torch.float16)
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


def _dense(layer: nn.Module, inputs: Sequence[Tensor], out: Tensor) -> int:
    """Returns the dense connections of a call of a layer."""
    assert isinstance(layer.weight, Tensor)
    # weight[0] contains the weights of one output element, or of one input element in a transposed convolution
    fan = _taps_per_weight(layer) * math.prod(layer.weight.shape[1:])
    return fan * (sum(x.numel() for x in inputs) if isinstance(layer, _TRANSPOSED) else out.numel())


def _spikes_in(x: Tensor, amplitudes: Tensor) -> tuple[Tensor, Tensor]:
    """Returns whether a tensor contains only spikes, and its share of nonzero elements if so, as scalars."""
    size, not_binary, row_sums = _abs_stats(_as_rows(x))
    is_spikes = (not_binary == 0) & torch.isin(size, amplitudes.to(size))
    return is_spikes, _count_spikes(row_sums, size + (size == 0)) / max(x.numel(), 1)


def _operations(is_spikes: Tensor, rate: Tensor, dense: float) -> Tensor:
    """Returns `(dense if spikes, SOPs, MACs, ACs)` of connections whose input has a rate of nonzero elements."""
    sops = dense * rate
    zero, all_dense = torch.zeros_like(sops), torch.full_like(sops, dense)
    spiking = torch.stack([all_dense, sops, zero, sops])
    return torch.where(is_spikes, spiking, torch.stack([zero, zero, all_dense, zero]))


@dataclass
class _Connections:
    """Running counts of one layer or product, `(dense if spikes, SOPs, MACs, ACs, dense)` in float64."""

    counts: Tensor | None = None

    def add(self, layer: nn.Module, inputs: Sequence[Tensor], out: Tensor, amplitudes: Tensor) -> None:
        dense, elements = _dense(layer, inputs, out), sum(x.numel() for x in inputs)
        counts = torch.zeros(4, dtype=torch.float64, device=out.device)
        for x in inputs:
            counts += _operations(*_spikes_in(x, amplitudes), dense * x.numel() / max(elements, 1))
        self._add(counts, dense, 0 if layer.bias is None else out.numel())

    def add_product(self, macs: int, operands: Sequence[Tensor], biases: int, amplitudes: Tensor) -> None:
        is_spikes = torch.zeros((), dtype=torch.bool, device=amplitudes.device)
        rate = torch.ones((), dtype=torch.float64, device=amplitudes.device)
        for x in operands:
            spiking, share = _spikes_in(x, amplitudes)
            rate = torch.where(spiking, torch.minimum(rate, share.to(rate)), rate)
            is_spikes = is_spikes | spiking
        self._add(_operations(is_spikes, rate, macs), macs, biases)

    def _add(self, counts: Tensor, dense: int, biases: int) -> None:
        counts[3] += biases * (counts[0] > 0)
        self.counts = _added(self.counts, F.pad(counts, (0, 1), value=dense))


@dataclass
class _Neurons:
    """Running counts of one neuron layer, `(spikes, elements, steps)` in float64."""

    counts: Tensor | None = None

    def add(self, spikes: Tensor, steps: int, amplitude: Tensor | float | None) -> None:
        if amplitude is None:  # several amplitudes
            total = (spikes != 0).sum(dtype=torch.float64).view(1)
        else:
            total = _count_spikes(_abs_row_sums(_as_rows(spikes)), amplitude).view(1)
        counts = F.pad(F.pad(total, (0, 1), value=spikes.numel()), (0, 1), value=steps)
        self.counts = _added(self.counts, counts)


def _added(total: Tensor | None, counts: Tensor) -> Tensor:
    """Adds in place on the device, so that every replay of a CUDA graph counts."""
    return counts if total is None else total.add_(counts)


@dataclass(frozen=True)
class Counts:
    """Counts of a `CostMeter` as plain numbers, which are written to files and add up over batches and processes.

    Args:
        connections: `[dense if spikes, SOPs, MACs, ACs, dense]` of each convolution or linear layer, and of each
            product outside of them.
        neurons: `[spikes, elements, steps]` of each spiking layer.
        first_convolution: Name of the convolution that ran first.
        incomplete: Calls of products that could not be counted, by name.
    """

    connections: dict[str, list[float]] = field(default_factory=dict)
    neurons: dict[str, list[float]] = field(default_factory=dict)
    first_convolution: str | None = None
    incomplete: dict[str, int] = field(default_factory=dict)

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            _add_by_name(self.connections, other.connections),
            _add_by_name(self.neurons, other.neurons),
            self.first_convolution or other.first_convolution,
            {n: self.incomplete.get(n, 0) + other.incomplete.get(n, 0) for n in self.incomplete | other.incomplete},
        )

    def cost(
        self,
        network: nn.Module | Iterable[nn.Parameter],
        num_images: int,
        nfe: int,
        images_per_second: float | None = None,
        peak_memory_bytes: int | None = None,
    ) -> Cost:
        """Returns the cost of one generated image over its whole denoising chain.

        Args:
            network: The network that ran, or only its parameters, which are counted.
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
        parameters = list(network.parameters() if isinstance(network, nn.Module) else network)
        return Cost(
            parameters=sum(p.numel() for p in parameters),
            trainable_parameters=sum(p.numel() for p in parameters if p.requires_grad),
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
            incomplete=self.incomplete or None,
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
    """Counts spikes and operations of everything that runs inside its `with` block.

    Counts are accumulated on the device without storing activations or synchronising; only `take` waits for them.

    The dispatch mode that finds products outside the layers runs uncompiled functions and no CUDA graphs. `audit`
    therefore looks for such products while a single image is generated: if there are none, the mode stays off.

    Args:
        module: Module that generates the images; the convolutions, linear layers and spiking layers in it are counted.
        home: Name of a submodule, such as a method's `network`, whose layers are named without it.
        watch: Whether the dispatch mode is on.

    Example:
        >>> with CostMeter(network) as meter:
        ...     images = sample(network, num_images=64)
        >>> meter.take().cost(network, num_images=64, nfe=50).energy_strict_mj
    """

    def __init__(self, module: nn.Module, home: str = "", watch: bool = True) -> None:
        self.module = module
        self.home = home
        self.watch = watch
        self._connections: dict[str, _Connections] = {}
        self._neurons: dict[str, _Neurons] = {}
        self._incomplete: dict[str, int] = {}
        self._first_convolution: str | None = None
        self._hooks: list[RemovableHandle] = []
        self._watching = ExitStack()
        self._running: list[str] = []  # names of the modules that run, outermost first, while the mode is on
        self._inside: list[int] = []  # MACs of products inside the counted layers that run, while the mode is on
        self._weights: set[int] = set()  # storages of parameters, which are never spikes
        self._audits = False
        self._storages: dict[int, list[nn.Parameter]] = {}  # parameters by storage, during an audit
        self._used: set[nn.Parameter] = set()

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Parameters of the module, or of its `home` and all others that the audited image needed."""
        if not self.home:
            return list(self.module.parameters())
        at_home = set(self.module.get_submodule(self.home).parameters())
        return [p for p in self.module.parameters() if p in at_home | self._used]

    def __enter__(self) -> Self:
        layers = list(spiking_layers(self.module))
        zero = [0.0] if layers else []  # in an ANN, an input of only zeros does not count as spikes
        sizes = [torch.as_tensor(size).abs().float() for _, layer in layers if (size := amplitude(layer)) is not None]
        sizes += [size.to(dtype).float() for size in sizes for dtype in _HALF]  # as spikes are rounded by autocast
        device = next((p.device for p in self.module.parameters()), None)
        self._amplitudes = torch.tensor([1.0, *zero, *map(float, sizes)], dtype=torch.float64, device=device)
        for name, module in self.module.named_modules():
            if isinstance(module, (*_CONVOLUTIONS, nn.Linear)):
                hook = self._connection_hook(self._short(name))
                self._hooks.append(module.register_forward_hook(hook, with_kwargs=True))
        for name, module in layers:
            self._hooks.append(module.register_forward_hook(self._neuron_hook(self._short(name))))
        if self.watch:
            self._watching.enter_context(self._watched())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.pause()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def audit(self, generate: Callable[[], Any]) -> None:
        """Generates once with the dispatch mode on, without counting, and finds out whether it is needed.

        Args:
            generate: Generates a single image.
        """
        self.pause()
        for p in self.module.parameters():
            self._storages.setdefault(p.untyped_storage().data_ptr(), []).append(p)
        self._audits = True
        try:
            with self._watched():
                generate()
        finally:
            self._audits = False
            self._storages.clear()
        counts = self.take()
        self.watch = bool(counts.connections or counts.incomplete)
        if counts.incomplete:
            warnings.warn(
                f"the cost is incomplete: {', '.join(counts.incomplete)} cannot be counted. Use torch's own "
                "convolutions, linear layers, products and attention, whose operations are known",
                stacklevel=2,
            )

    def resume(self) -> None:
        """Turns the dispatch mode on again if it is needed; call it before images are generated."""
        self.pause()
        if self.watch:
            self._watching.enter_context(self._watched())

    def pause(self) -> None:
        """Turns the dispatch mode off, so that what runs next is not counted unless it is a layer of the module."""
        self._watching.close()

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Finds products outside the layers, and names the module that they run in."""
        self._running, self._inside = [], []
        self._weights = {p.untyped_storage().data_ptr() for p in self.module.parameters()}
        hooks: list[RemovableHandle] = []
        for name, module in self.module.named_modules():
            counted = isinstance(module, (*_CONVOLUTIONS, nn.Linear))
            enter, leave = self._naming_hooks(self._short(name) or type(module).__name__, counted)
            hooks.append(module.register_forward_pre_hook(enter, prepend=True))
            hooks.append(module.register_forward_hook(leave, with_kwargs=True, always_call=True))
        fast_attention = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)  # a fused operator without a formula
        try:
            with ProductMode(self._on_product, self._on_tensor if self._audits else None):
                yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_attention)
            for hook in hooks:
                hook.remove()

    def _naming_hooks(self, name: str, counted: bool) -> tuple[Any, Any]:
        def enter(module: nn.Module, args: Any) -> None:
            self._running.append(name)
            if counted:
                self._inside.append(0)

        def leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            self._running.pop()
            if not counted:
                return
            macs = self._inside.pop()
            if isinstance(out, Tensor):
                own = _dense(module, args or (kwargs["input"],), out)
                if macs > own:  # a layer that computes more than the product of its weights
                    self._count(f"{name} [more than its weights]", Product("", macs - own))

        return enter, leave

    def _on_tensor(self, tensor: Tensor) -> None:
        self._used.update(self._storages.get(tensor.untyped_storage().data_ptr(), ()))

    @torch.no_grad()
    def _on_product(self, product: Product) -> None:
        if is_uncounted():
            return
        if self._inside and product.macs is not None:
            self._inside[-1] += product.macs
            return
        where = self._running[-1] if self._running else "outside of modules"
        name = f"{where} [{product.operator.removeprefix('aten.')}]"
        if product.macs is None:
            self._incomplete[name] = self._incomplete.get(name, 0) + 1
            return
        if self._first_convolution is None and "conv" in product.operator:
            self._first_convolution = name
        self._count(name, product)

    def _count(self, name: str, product: Product) -> None:
        assert product.macs is not None
        factors = [x for x in product.operands if x.untyped_storage().data_ptr() not in self._weights]
        connections = self._connections.setdefault(name, _Connections())
        connections.add_product(product.macs, factors, product.biases, self._amplitudes)

    def _short(self, name: str) -> str:
        return name.removeprefix(f"{self.home}.") if self.home else name

    def _connection_hook(self, name: str) -> Any:
        @torch.no_grad()
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
            if self._audits:
                return
            if self._first_convolution is None and isinstance(module, _CONVOLUTIONS):
                self._first_convolution = name
            inputs = args or (kwargs["input"],)
            self._connections.setdefault(name, _Connections()).add(module, inputs, out, self._amplitudes)

        setattr(hook, REPLAYABLE, True)
        return hook

    def _neuron_hook(self, name: str) -> Any:
        @torch.no_grad()
        def hook(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            if self._audits:
                return
            spikes = spikes_of(out)
            axes = 2 if isinstance(module, SpikingLayer | snn.LeakyParallel) else 1  # (T, B, ...) or (B, ...)
            steps = math.prod(spikes.shape[:axes])
            self._neurons.setdefault(name, _Neurons()).add(spikes, steps, amplitude(module))

        setattr(hook, REPLAYABLE, True)
        return hook

    def take(self) -> Counts:
        """Returns the counts since the meter was opened or last read, and resets them to zero."""
        counts = Counts(
            {name: layer.counts.tolist() for name, layer in self._connections.items() if layer.counts is not None},
            {name: layer.counts.tolist() for name, layer in self._neurons.items() if layer.counts is not None},
            self._first_convolution,
            self._incomplete,
        )
        self._connections, self._neurons, self._incomplete = {}, {}, {}
        return counts
