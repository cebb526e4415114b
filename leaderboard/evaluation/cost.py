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
Products marked by `systems.ops.uncounted` are not counted: the read-out of a membrane, which is a neuron update, and
constants that a trained network can store.

These rules are the *strict* count, `macs`, `acs` and `energy_strict_mj` of a record, which fold a token shift into its
layer and nothing else. Beside them, `Cost.counts` contains for each layer

- *effective* operations, as NeuroBench defines them (https://arxiv.org/abs/2304.04640): zero inputs, zero weights and
  padding are left out, for real-valued inputs too, and biases (`leaderboard.evaluation.tally`). A layer with `taps`, a
  list of weights of which one applies to the token itself, the next to the token before it and so on, is counted tap by
  tap; any other layer with `taps_per_weight` counts all of them for each nonzero weight. Attention and recurrent layers
  of torch count in full;
- the strict count *folded* and *unfolded*: with everything folded into the weights that is linear between spikes and
  the layer, and with nothing, not even a token shift, each of whose elements then takes a multiply-accumulate per tap
  (`leaderboard.evaluation.folding`). Products outside of layers are the same in both;
- neuron updates, additions that cannot be folded, and memory. Element-wise operations such as activation functions, and
  RWKV's recurrence apart from its sums, are not counted.

The energies of a record are those of `leaderboard.energy` for the arithmetic and for SDDPM's formula.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Self

import snntorch as snn
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from leaderboard.energy import PAPER_SDDPM, read_model, strict_energy_mj
from leaderboard.evaluation.products import Product, ProductMode
from leaderboard.evaluation.structure import UNKNOWN, Inputs, Structure
from leaderboard.evaluation.tally import (
    COLUMNS,
    CONVOLUTIONS,
    LAYERS,
    ActivationTally,
    Facts,
    LayerTally,
    dense_connections,
)
from leaderboard.record.counts import ActivationCounts, LayerCounts, NeuronCounts, OperationCounts
from leaderboard.record.records import Cost
from systems.ops.cuda_graphs import REPLAYABLE
from systems.ops.uncounted import is_uncounted
from systems.spiking.adapter import amplitude, leaks, spikes_of, spiking_layers
from systems.spiking.neurons import SpikingLayer

_HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Counts:
    """Counts of a `CostMeter` as plain numbers, which are written to files and add up over batches and processes.

    Args:
        connections: The counts named in `tally.COLUMNS` of each convolution or linear layer, and of each product
            outside of them.
        neurons: `[spikes, elements, steps, elements that leak]` of each spiking layer.
        first_convolution: Name of the convolution that ran first.
        incomplete: Calls of products that could not be counted, by name.
        activations: `[nonzero, elements, steps]` of each ReLU, sigmoid and quantised activation.
        additions: Element-wise operations that cannot be folded into weights, by kind.
        facts: What is known of each layer or product beside its counts.
        inputs: What feeds each layer or product.
        footprint_bytes: Memory of parameters and buffers.
    """

    connections: dict[str, list[float]] = field(default_factory=dict)
    neurons: dict[str, list[float]] = field(default_factory=dict)
    first_convolution: str | None = None
    incomplete: dict[str, int] = field(default_factory=dict)
    activations: dict[str, list[float]] = field(default_factory=dict)
    additions: dict[str, float] = field(default_factory=dict)
    facts: dict[str, Facts] = field(default_factory=dict)
    footprint_bytes: int = 0
    inputs: dict[str, Inputs] = field(default_factory=dict)

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            _add_by_name(self.connections, other.connections),
            _add_by_name(self.neurons, other.neurons),
            self.first_convolution or other.first_convolution,
            {n: self.incomplete.get(n, 0) + other.incomplete.get(n, 0) for n in self.incomplete | other.incomplete},
            _add_by_name(self.activations, other.activations),
            {n: self.additions.get(n, 0) + other.additions.get(n, 0) for n in self.additions | other.additions},
            self.facts | other.facts,
            max(self.footprint_bytes, other.footprint_bytes),
            self.inputs | other.inputs,
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
        columns = zip(*self.connections.values(), strict=True)
        total = dict(zip(COLUMNS, map(sum, columns), strict=True))
        sops, macs, acs = total["sops"], total["macs"], total["acs"]
        rates, mean_rate = self._firing_rates()
        parameters = list(network.parameters() if isinstance(network, nn.Module) else network)
        cost = Cost(
            parameters=sum(p.numel() for p in parameters),
            trainable_parameters=sum(p.numel() for p in parameters if p.requires_grad),
            nfe=nfe,
            firing_rate=mean_rate,
            firing_rates=rates,
            sops=sops / num_images,
            macs=macs / num_images,
            acs=acs / num_images,
            energy_strict_mj=strict_energy_mj(macs, acs) / num_images,
            energy_paper_mj=None,
            images_per_second=images_per_second,
            peak_memory_bytes=peak_memory_bytes,
            incomplete=self.incomplete or None,
            counts=OperationCounts(
                layers={name: self._layer(name, num_images) for name in self.connections},
                neurons={
                    name: NeuronCounts(elements / num_images, spikes / num_images, leaks / num_images)
                    for name, (spikes, elements, _, leaks) in self.neurons.items()
                },
                additions={kind: number / num_images for kind, number in self.additions.items()},
                first_convolution=self.first_convolution,
                footprint_bytes=self.footprint_bytes,
                activations={
                    name: ActivationCounts(elements=elements / num_images, nonzero=nonzero / num_images)
                    for name, (nonzero, elements, _) in self.activations.items()
                },
            ),
        )
        by_formula = read_model(PAPER_SDDPM).energy(cost)
        return replace(cost, energy_paper_mj=None if by_formula is None else by_formula.low)

    def _layer(self, name: str, num_images: int) -> LayerCounts:
        """Returns the counts of one layer or product for one image."""
        facts, inputs = self.facts[name], self.inputs.get(name, UNKNOWN)
        counts = {column: number / num_images for column, number in zip(COLUMNS, self.connections[name], strict=True)}
        macs, acs, dense, outputs = (counts[column] for column in ("macs", "acs", "dense", "outputs"))
        folded, unfolded = (macs, acs), (macs, acs)
        spikes = inputs["spikes"] or ()
        if spikes and all(source in self.neurons for source, _ in spikes):
            rates, _ = self._firing_rates()
            used = sum(connections * rates[source] for source, connections in spikes)
            folded = min(macs, dense * inputs["real"]), outputs * used + (outputs if facts["biases"] else 0)
        if facts["taps"] > 1:  # each tap is applied to all inputs, and their sum, a real value, is multiplied
            unfolded = dense / facts["taps"] + facts["taps"] * counts["inputs"], 0.0
        return LayerCounts(
            **counts,
            weights=facts["weights"],
            nonzero_weights=facts["nonzero_weights"],
            biases=facts["biases"],
            nonzero_biases=facts["nonzero_biases"],
            input_bits=1 if counts["spike_dense"] == dense else inputs["bits"],
            folded_macs=folded[0],
            folded_acs=folded[1],
            unfolded_macs=unfolded[0],
            unfolded_acs=unfolded[1],
        )

    def _firing_rates(self) -> tuple[dict[str, float], float | None]:
        """Returns the firing rate of each layer over all calls, and the mean over neurons (`None` without neurons)."""
        rates = {name: spikes / elements for name, (spikes, elements, *_) in self.neurons.items()}
        neurons = {name: elements / steps for name, (_, elements, steps, _) in self.neurons.items()}
        if not rates:
            return {}, None
        return rates, sum(rates[name] * neurons[name] for name in rates) / sum(neurons.values())


def undeclared(counts: Counts, num_images: int, num_steps: int, nfe: int) -> list[str]:
    """Returns a sentence for each declaration of a method that the counts of its neurons contradict.

    Args:
        counts: Counts of a test.
        num_images: Number of images that were generated.
        num_steps: T, as declared.
        nfe: Network evaluations per image, as declared.
    """
    if not counts.neurons:
        if num_steps == 1:
            return []
        return [
            f"num_steps is {num_steps}, but no spiking layer ran: firing rate and neuron updates are missing; use "
            "`multistep(NEURON)`, or derive the layer from `benchmark.SpikingLayer`"
        ]
    steps = max(number for _, _, number, _ in counts.neurons.values()) / num_images
    if steps <= 1.001 * num_steps * nfe:
        return []
    return [
        f"neurons ran {steps:g} steps per image, more than num_steps x nfe = {num_steps} x {nfe}: set `num_steps` and "
        "`num_inference_steps` of the method, which tables show as T and NFE"
    ]


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
        >>> meter.take(64).cost(network, num_images=64, nfe=50).energy_strict_mj
    """

    def __init__(self, module: nn.Module, home: str = "", watch: bool = True) -> None:
        self.module = module
        self.home = home
        self.watch = watch
        self._connections: dict[str, LayerTally] = {}
        self._neurons: dict[str, ActivationTally] = {}
        self._activations: dict[str, ActivationTally] = {}
        self._incomplete: dict[str, int] = {}
        self._first_convolution: str | None = None
        self._hooks: list[RemovableHandle] = []
        self._watching = ExitStack()
        self._structure = Structure(module, self._short)
        self._audited = False
        self._running: list[str] = []  # names of the modules that run, outermost first, while the mode is on
        self._inside: list[int] = []  # MACs of products inside the counted layers that run, while the mode is on
        self._weights: set[int] = set()  # storages of parameters, which are never spikes
        self._audits = False
        self._has_run = False  # a counted layer, during an audit
        self._storages: dict[int, list[Tensor]] = {}  # parameters and buffers by storage, during an audit
        self._used: set[Tensor] = set()

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Parameters of the module, or of its `home` and all others that the audited image needed."""
        if not self.home:
            return list(self.module.parameters())
        at_home = set(self.module.get_submodule(self.home).parameters())
        return [p for p in self.module.parameters() if p in at_home | self._used]

    @property
    def footprint_bytes(self) -> int:
        """Memory of these parameters, and of the buffers of the same modules."""
        buffers = self.module.buffers() if not self.home else self._used_buffers()
        return sum(x.numel() * x.element_size() for x in (*self.parameters, *buffers))

    def _used_buffers(self) -> list[Tensor]:
        at_home = {id(b) for b in self.module.get_submodule(self.home).buffers()}
        return [b for b in self.module.buffers() if id(b) in at_home or b in self._used]

    def __enter__(self) -> Self:
        layers = list(spiking_layers(self.module))
        zero = [0.0] if layers else []  # in an ANN, an input of only zeros does not count as spikes
        sizes = [torch.as_tensor(size).abs().float() for _, layer in layers if (size := amplitude(layer)) is not None]
        sizes += [size.to(dtype).float() for size in sizes for dtype in _HALF]  # as spikes are rounded by autocast
        device = next((p.device for p in self.module.parameters()), None)
        self._amplitudes = torch.tensor([1.0, *zero, *map(float, sizes)], dtype=torch.float64, device=device)
        for name, module in self.module.named_modules():
            if isinstance(module, LAYERS):
                hook = self._connection_hook(self._short(name))
                self._hooks.append(module.register_forward_hook(hook, with_kwargs=True))
            elif isinstance(module, (nn.ReLU, nn.Sigmoid)) or hasattr(module, "bits"):
                self._hooks.append(module.register_forward_hook(self._activation_hook(self._short(name))))
        self._leaking = {self._short(name) for name, layer in layers if leaks(layer)}
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

    def audit(self, generate: Callable[[], Any]) -> bool:
        """Generates once with the dispatch mode on, without counting, and finds out whether it is needed.

        What feeds the layers, and the additions in a call of the network, are known afterwards.

        Args:
            generate: Generates a single image.

        Returns:
            Whether anything that can be counted ran: a convolution, a linear layer or a known product.
        """
        self.pause()
        for p in (*self.module.parameters(), *self.module.buffers()):
            self._storages.setdefault(p.untyped_storage().data_ptr(), []).append(p)
        self._audits = True
        try:
            with self._watched():
                generate()
        finally:
            self._audits = False
            self._storages.clear()
        self._audited = True
        counts = self.take()
        self.watch = bool(counts.connections or counts.incomplete)
        if counts.incomplete:
            warnings.warn(
                f"the cost is incomplete: {', '.join(counts.incomplete)} cannot be counted. Use torch's own "
                "convolutions, linear layers, products and attention, whose operations are known",
                stacklevel=2,
            )
        return self._has_run or bool(counts.connections)

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
        self._structure.restart()
        self._weights = {p.untyped_storage().data_ptr() for p in self.module.parameters()}
        hooks: list[RemovableHandle] = []
        for name, module in self.module.named_modules():
            counted = isinstance(module, LAYERS)
            enter, leave = self._naming_hooks(self._short(name) or type(module).__name__, counted)
            hooks.append(module.register_forward_pre_hook(enter, prepend=True, with_kwargs=True))
            hooks.append(module.register_forward_hook(leave, with_kwargs=True, always_call=True))
        fast_attention = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)  # a fused operator without a formula
        try:
            with ProductMode(self._on_product, None if self._audited else self._on_operator):
                yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_attention)
            for hook in hooks:
                hook.remove()

    def _naming_hooks(self, name: str, counted: bool) -> tuple[Any, Any]:
        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._running.append(name)
            if not self._audited:
                self._structure.enter(name, module, args, kwargs)
            if counted:
                self._inside.append(0)

        def leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            self._running.pop()
            if not self._audited:
                self._structure.leave(name, module, out)
            if not counted:
                return
            macs = self._inside.pop()
            if isinstance(out, Tensor):
                own = dense_connections(module, args or (kwargs["input"],), out)
                if macs > own:  # a layer that computes more than the product of its weights
                    self._count(f"{name} [more than its weights]", Product("", macs - own))

        return enter, leave

    def _on_operator(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
        self._structure.operator(func, args, kwargs, out)
        if self._audits:
            for x in tree_leaves((args, dict(kwargs))):
                if isinstance(x, Tensor):
                    self._used.update(self._storages.get(x.untyped_storage().data_ptr(), ()))

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
        weights = [x for x in product.operands if x.untyped_storage().data_ptr() in self._weights]
        factors = [x for x in product.operands if not any(x is w for w in weights)]
        tally = self._connections.setdefault(name, LayerTally())
        tally.weights = weights
        tally.add_product(product, factors, self._amplitudes)

    def _short(self, name: str) -> str:
        return name.removeprefix(f"{self.home}.") if self.home else name

    def _connection_hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
            if self._audits:
                self._has_run = True
                return
            if self._first_convolution is None and isinstance(module, CONVOLUTIONS):
                self._first_convolution = name
            tally = self._connections.setdefault(name, LayerTally(module))
            tally.add(args or (kwargs["input"],), out, self._amplitudes)

        setattr(hook, REPLAYABLE, True)
        return hook

    def _neuron_hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            if self._audits:
                return
            spikes = spikes_of(out)
            axes = 2 if isinstance(module, SpikingLayer | snn.LeakyParallel) else 1  # (T, B, ...) or (B, ...)
            self._neurons.setdefault(name, ActivationTally()).add(spikes, math.prod(spikes.shape[:axes]))

        setattr(hook, REPLAYABLE, True)
        return hook

    def _activation_hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
            if not self._audits:
                self._activations.setdefault(name, ActivationTally()).add(out, len(out))

        setattr(hook, REPLAYABLE, True)
        return hook

    def take(self, images: int = 1) -> Counts:
        """Returns the counts since the meter was opened or last read, and resets them to zero.

        Args:
            images: Images that were generated together; each call counts once for each of them.
        """
        connections = {}
        for name, tally in self._connections.items():
            if tally.counts is not None:
                connections[name] = [*tally.counts[:-1].tolist(), images * float(tally.counts[-1])]
        neurons = {name: tally.counts.tolist() for name, tally in self._neurons.items() if tally.counts is not None}
        counts = Counts(
            connections,
            {name: [*counts, counts[1] * (name in self._leaking)] for name, counts in neurons.items()},
            self._first_convolution,
            self._incomplete,
            {name: tally.counts.tolist() for name, tally in self._activations.items() if tally.counts is not None},
            self._take_additions(connections),
            {name: self._connections[name].facts() for name in connections},
            self.footprint_bytes,
            {name: inputs for name, inputs in self._structure.inputs.items() if name in connections},
        )
        for layer in self._connections.values():
            layer.counts = None
        self._neurons, self._activations = {}, {}
        self._incomplete = {}
        return counts

    def _take_additions(self, connections: Mapping[str, Sequence[float]]) -> dict[str, float]:
        """Returns the additions since the last call: as they ran, or as in the audited image if there was one."""
        if self._audited:
            return self._structure.additions_of({name: counts[-1] for name, counts in connections.items()})
        total: dict[str, float] = {}
        for additions in self._structure.additions.values():
            for kind, number in additions.items():
                total[kind] = total.get(kind, 0.0) + number
        self._structure.additions.clear()
        return total
