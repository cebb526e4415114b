"""Counts of the calls of one layer, product or activation, accumulated on the device without storing activations.

Effective operations leave out zero operands, zero weights and padding. They are exact, and take one pass over the
input: `n[e]`, how many samples have a nonzero value at element `e` of the input, times `fan_out[e]`, the nonzero
weights that leave this element for an output, summed over `e`. The fan-out depends only on weights and sizes: it is the
gradient of the sum of all outputs with regard to the input, for weights that are 1 where the layer's are not 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from leaderboard.evaluation.products import Product
from systems.ops.compiled import compiled, dense, memory
from systems.ops.uncounted import uncounted

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)
LAYERS = (*CONVOLUTIONS, nn.Linear)

COLUMNS = (
    "spike_dense",
    "sops",
    "macs",
    "acs",
    "dense",
    "effective_macs",
    "effective_acs",
    "dense_unpadded",
    "inputs",
    "outputs",
    "calls",
)
"""Running counts of a layer or product, by the names of `LayerCounts`."""


def taps_per_weight(layer: nn.Module) -> int:
    """Returns how many connections each weight of a layer stands for: its `taps_per_weight` if it has one, else 1."""
    taps: int = getattr(layer, "taps_per_weight", 1)
    return taps


def dense_connections(layer: nn.Module, inputs: Sequence[Tensor], out: Tensor) -> int:
    """Returns the dense connections of a call of a layer, padding included."""
    assert isinstance(layer.weight, Tensor)
    # weight[0] contains the weights of one output element, or of one input element in a transposed convolution
    fan = taps_per_weight(layer) * math.prod(layer.weight.shape[1:])
    return fan * (sum(x.numel() for x in inputs) if isinstance(layer, TRANSPOSED) else out.numel())


def fan_out(layer: nn.Module, shape: Sequence[int], out_shape: Sequence[int], ones: bool = False) -> Tensor:
    """Returns the nonzero connections that leave each element of an input, in float64.

    Args:
        layer: Convolution, linear layer, or a layer with `taps` (see `CostMeter`).
        shape: Shape of one sample: `(C, *spatial)` of a convolution, `(..., F)` of a linear layer.
        out_shape: Shape of one output sample.
        ones: Whether to take all weights as nonzero.

    Returns:
        `(C, *spatial)` of a convolution, `(F,)` of a linear layer, `(N, F)` of a layer with taps over `N` tokens.
    """
    weight = layer.weight
    assert isinstance(weight, Tensor)

    def nonzero(w: Tensor) -> Tensor:
        return torch.ones_like(w, dtype=torch.float64) if ones else (w != 0).double()

    if isinstance(layer, nn.Linear):
        taps: Sequence[Tensor] | None = getattr(layer, "taps", None)
        if taps is None:
            return taps_per_weight(layer) * nonzero(weight).sum(0)
        of_taps = torch.stack([nonzero(tap).sum(0) for tap in taps])  # (taps, F)
        later = torch.arange(shape[-2], device=weight.device) < shape[-2] - torch.arange(len(taps)).to(weight)[:, None]
        return later.double().mT @ of_taps  # a tap reaches the token that comes so many tokens later, if there is one
    assert isinstance(layer, CONVOLUTIONS)
    if isinstance(layer, TRANSPOSED):
        filters = nonzero(weight).sum(1, keepdim=True)  # (C, 1, *kernel)
    else:
        filters = nonzero(weight).unflatten(0, (layer.groups, -1)).sum(1)  # (groups, C / groups, *kernel)
    with torch.enable_grad():
        x = torch.zeros(1, *shape, dtype=torch.float64, device=weight.device, requires_grad=True)
        if isinstance(layer, TRANSPOSED):
            y = _transposed(layer, x, filters, out_shape)
        else:
            y = layer._conv_forward(x, filters, None)  # pads in the layer's mode
        return taps_per_weight(layer) * torch.autograd.grad(y.sum(), x)[0][0]


def _transposed(layer: Any, x: Tensor, filters: Tensor, out_shape: Sequence[int]) -> Tensor:
    """Applies other weights of one output channel per group, with the output size of the call."""
    sizes = zip(x.shape[2:], out_shape[1:], layer.kernel_size, layer.stride, layer.padding, layer.dilation, strict=True)
    missing = [out - ((n - 1) * s - 2 * p + d * (k - 1) + 1) for n, out, k, s, p, d in sizes]
    operators = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
    return operators[len(missing) - 1](
        x, filters, None, layer.stride, layer.padding, missing, layer.groups, layer.dilation
    )


@compiled
def _column_stats(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the largest and the smallest nonzero `|x|`, and the nonzero elements of each column."""
    size = x.abs().to(torch.promote_types(x.dtype, torch.float32))
    nonzero = (size > 0).to(torch.float32)  # exact up to 2^24 rows
    return size.amax(0).amax(), torch.where(size > 0, size, torch.inf).amin(0).amin(), nonzero.sum(0)


def operand(x: Tensor, amplitudes: Tensor, sample_axes: int = 1) -> tuple[Tensor, Tensor]:
    """Counts an input, whose last `sample_axes` axes are those of a sample.

    Returns:
        Whether all values are 0 or `a`, or -a, 0 or `a`, where `a` is one of the amplitudes; and the number of samples
        with a nonzero value, for each element of a sample, in float64.
    """
    first = x.dim() - sample_axes
    if not x.numel():
        return torch.zeros((), dtype=torch.bool, device=x.device), x.new_zeros(x.shape[first:], dtype=torch.float64)
    x = dense(x) if first and sample_axes > 2 else x.contiguous()
    largest, smallest, nonzero = _column_stats(memory(x, math.prod(x.shape[:first]), -1))
    is_spikes = ((largest == smallest) | (largest == 0)) & torch.isin(largest, amplitudes.to(largest))
    return is_spikes, nonzero.as_strided(x.shape[first:], x.stride()[first:]).double()


class Facts(TypedDict):
    """What is known of a layer or product beside its counts (see `LayerCounts`), and its taps per weight."""

    weights: int
    nonzero_weights: int
    biases: int
    nonzero_biases: int
    taps: int


class _Call(NamedTuple):
    """What the counts of a call take from weights and shapes, valid for the same weights and shapes.

    For each input, `measures` are ones and the fan-out, `(2, elements of a sample)`, whose products with the nonzero
    samples of each element are the nonzero elements and the effective operations. An input adds the first row of
    `if_spikes`, or of `if_real`, and its other two rows times these two numbers.
    """

    weight: Tensor
    version: int
    axes: int
    measures: tuple[Tensor, ...]
    if_spikes: tuple[Tensor, ...]
    if_real: tuple[Tensor, ...]


def _tables(
    of_inputs: Sequence[tuple[float, float]], device: torch.device, **constants: float
) -> tuple[tuple[Tensor, ...], ...]:
    """Returns `if_spikes` and `if_real`.

    Args:
        of_inputs: Dense connections of each input, and those of each of its nonzero elements.
        device: Device of the counts.
        **constants: Numbers that count once in each call.
    """
    if_spikes: list[Tensor] = []
    if_real: list[Tensor] = []
    for i, (connections, each) in enumerate(of_inputs):
        once = dict(constants) if i == 0 else {}
        spikes = (once | {"spike_dense": connections}, {"sops": each, "acs": each}, {"effective_acs": 1})
        real: tuple[dict[str, float], ...] = (once | {"macs": connections}, {}, {"effective_macs": 1})
        for rows, found in ((spikes, if_spikes), (real, if_real)):
            table = [[float(row.get(column, 0)) for column in COLUMNS] for row in rows]
            found.append(torch.tensor(table, dtype=torch.float64, device=device))
    return tuple(if_spikes), tuple(if_real)


def _counted(is_spikes: Tensor, measured: Tensor, if_spikes: Tensor, if_real: Tensor) -> Tensor:
    table = torch.where(is_spikes, if_spikes, if_real)
    return table[0] + measured @ table[1:]


class LayerTally:
    """Running counts of one layer or product.

    Args:
        layer: The layer; None for a product outside of layers.
    """

    def __init__(self, layer: nn.Module | None = None) -> None:
        self.layer = layer
        self.counts: Tensor | None = None
        """Float64, one for each of `COLUMNS`."""
        self.weights: Sequence[Tensor] = ()
        """Parameters that a product outside of layers multiplies."""
        self._calls: dict[Any, _Call] = {}

    @uncounted("the count itself")
    @torch.no_grad()
    def add(self, inputs: Sequence[Tensor], out: Tensor, amplitudes: Tensor) -> None:
        """Counts a call of the layer, whose inputs are concatenated along their channels."""
        assert self.layer is not None
        call = self._call(inputs, out)
        counted = []
        for x, measures, if_spikes, if_real in zip(inputs, *call[3:], strict=True):
            is_spikes, nonzero = operand(x, amplitudes, call.axes)
            counted.append(_counted(is_spikes, measures @ nonzero.flatten(), if_spikes, if_real))
        total = counted[0] if len(counted) == 1 else torch.stack(counted).sum(0)
        if self.layer.bias is not None:
            total[_ACS] += out.numel() * (total[_SPIKE_DENSE] > 0)
        self._add(total)

    @uncounted("the count itself")
    @torch.no_grad()
    def add_product(self, product: Product, factors: Sequence[Tensor], amplitudes: Tensor) -> None:
        """Counts a product, whose `factors` are the operands that are no weights."""
        assert product.macs is not None
        device = amplitudes.device
        if_spikes, if_real = _tables(
            [(product.macs, product.macs)],
            device,
            dense=product.macs,
            dense_unpadded=product.macs,
            inputs=sum(x.numel() for x in factors),
            outputs=product.outputs,
            calls=1,
        )
        is_spikes = torch.zeros((), dtype=torch.bool, device=device)
        rate = torch.ones((), dtype=torch.float64, device=device)
        for x in factors:
            spiking, nonzero = operand(x, amplitudes, min(x.dim(), 1))
            rate = torch.where(spiking, torch.minimum(rate, nonzero.sum() / max(x.numel(), 1)), rate)
            is_spikes = is_spikes | spiking
        effective = product.effective()
        if effective is None:
            effective = torch.full((), product.macs, dtype=torch.float64, device=device)
        total = _counted(is_spikes, torch.stack([rate, effective]), if_spikes[0], if_real[0])
        total[_ACS] += product.biases * is_spikes
        self._add(total)

    def facts(self) -> Facts:
        """Returns what does not change from call to call."""
        weights = list(self.weights) if self.layer is None else [self.layer.weight, self.layer.bias]
        sizes = [(w.numel(), int(torch.count_nonzero(w))) for w in weights if isinstance(w, Tensor)]
        biases = sizes[1:] if self.layer is not None else []
        return Facts(
            weights=sum(size for size, _ in sizes),
            nonzero_weights=sum(nonzero for _, nonzero in sizes),
            biases=sum(size for size, _ in biases),
            nonzero_biases=sum(nonzero for _, nonzero in biases),
            taps=1 if self.layer is None else taps_per_weight(self.layer),
        )

    def _add(self, counts: Tensor) -> None:
        """Adds in place, so that every replay of a CUDA graph counts."""
        self.counts = counts if self.counts is None else self.counts.add_(counts)

    def _call(self, inputs: Sequence[Tensor], out: Tensor) -> _Call:
        layer = self.layer
        assert layer is not None
        weight = layer.weight
        assert isinstance(weight, Tensor)
        version = 0 if weight.is_inference() else weight._version
        shapes = (*(x.shape for x in inputs), out.shape)
        known = self._calls.get(shapes)
        if known is not None and known.weight is weight and known.version == version:
            return known
        with torch.inference_mode(False), torch.autocast(out.device.type, enabled=False):
            fans, possible = self._fans(inputs, out)
        connections, elements = dense_connections(layer, inputs, out), sum(x.numel() for x in inputs)
        tables = _tables(
            [(connections * x.numel() / max(elements, 1), connections / max(elements, 1)) for x in inputs],
            out.device,
            dense=connections,
            inputs=elements,
            outputs=out.numel(),
            calls=1,
        )
        for table in (tables[0][0], tables[1][0]):
            table[0, _UNPADDED] = possible
        measures = tuple(torch.stack([torch.ones_like(fan), fan]).flatten(1) for fan in fans)
        self._calls[shapes] = call = _Call(weight, version, fans[0].dim(), measures, *tables)
        return call

    def _fans(self, inputs: Sequence[Tensor], out: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """Returns the fan-out of each input, and the connections of all samples without zero weights or padding."""
        layer: Any = self.layer
        axes = layer.weight.dim() - 1  # of a sample
        channels = [x.shape[x.dim() - axes] for x in inputs]
        expected = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
        if sum(channels) != expected:  # a layer that transforms its input before it multiplies
            connections, elements = dense_connections(layer, inputs, out), sum(x.numel() for x in inputs)
            fan = torch.full((), connections / max(elements, 1), dtype=torch.float64, device=out.device)
            return tuple(fan.expand(x.shape[x.dim() - axes :]) for x in inputs), fan * elements
        sample = list(inputs[0].shape if axes == 1 else inputs[0].shape[inputs[0].dim() - axes :])
        sample[-1 if axes == 1 else 0] = expected
        axis = -1 if axes == 1 else 0
        out_sample = out.shape[out.dim() - axes :]
        fan = fan_out(layer, sample, out_sample)
        possible = fan_out(layer, sample, out_sample, ones=True)
        samples = sum(x.numel() for x in inputs) / max(fan.numel(), 1)
        return fan.split(channels, axis), possible.sum() * samples


_SPIKE_DENSE, _ACS, _UNPADDED = (COLUMNS.index(name) for name in ("spike_dense", "acs", "dense_unpadded"))


class ActivationTally:
    """Running counts of one neuron or activation layer, `(nonzero, elements, steps)` in float64."""

    def __init__(self) -> None:
        self.counts: Tensor | None = None

    @uncounted("the count itself")
    @torch.no_grad()
    def add(self, out: Tensor, steps: int) -> None:
        """Counts the output of a call, which contains so many samples and SNN time steps."""
        nonzero = _nonzero_in_rows(_as_rows(out)).sum(dtype=torch.float64).view(1)
        counts = F.pad(F.pad(nonzero, (0, 1), value=out.numel()), (0, 1), value=steps)
        self.counts = counts if self.counts is None else self.counts.add_(counts)


def _as_rows(x: Tensor) -> Tensor:
    """Reshapes `x` to rows that are short enough to be counted exactly in float32."""
    x = dense(x)
    return memory(x, math.prod(x.shape[: x.dim() // 2]), -1)


@compiled
def _nonzero_in_rows(x: Tensor) -> Tensor:
    """Returns the number of nonzero elements of each row."""
    return (x != 0).to(torch.float32).sum((1, 2))
