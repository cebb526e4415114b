"""Where the tensors of a network come from: what can be folded into the weights of its layers, and what cannot.

While a network runs under a dispatch mode, every tensor has an `Origin`. One rule decides for every method: a tensor is
*linear in spikes* if it was made from the output of neurons only by

- copies: views, reshaping, concatenation, repetition, zero padding, nearest-neighbour upsampling;
- averages and sums over axes: average pooling, the mean over the SNN time steps;
- affine maps with constants: batch norm in eval mode, factors and offsets that depend on parameters only;
- convolutions and linear layers.

A layer that receives such a tensor could receive the spikes themselves: everything between them folds into its weights.
*Folded*, it then causes accumulates only. Each output element has as many connections as spike inputs reach it, which
is the receptive field of convolutional arithmetic (https://arxiv.org/abs/1603.07285), and each connection is used as
often as the neurons fire. Average pooling over 2x2 pixels before a 3x3 kernel makes a 6x6 kernel with stride 2, nearest
neighbours before it one of 2x2 for each position. The layers in between are charged as well, since their output may be
needed elsewhere; nothing folds through a dilated one, whose window has gaps. A layer whose inputs are spikes already,
or real values, costs the same folded and not.

Sums of two tensors are not folded, because a layer behind them would need the connections of both, behind a residual
stream those of all layers before it; nor are activation functions, norms whose statistics depend on the input, and
products of two activations.

What cannot be folded into any weight is counted as *additions*, one for each element, by kind:

- `sum`: a sum or difference of two activations of the same size, such as a residual. A smaller operand, such as a time
  embedding, folds into a bias, and a constant too.
- `layer_norm`, `group_norm`, `rms_norm`: statistics depend on the input.
- `batch_norm`: one that does not directly follow a convolution or linear layer, also if a neuron computes it.

Only operations in modules are counted, not those of the sampler, of neurons, and of blocks marked by
`systems.ops.uncounted`. They do not depend on values, so that one image shows them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

_COPIES = {
    *("clone", "contiguous", "constant_pad_nd", "copy", "index_select", "repeat", "slice"),
    *(
        "pixel_shuffle",
        "pixel_unshuffle",
        "roll",
        "flip",
        "_reshape_alias",
        "view",
        "_unsafe_view",
        "expand",
        "_to_copy",
    ),
    *("_reshape_copy", "repeat_interleave", "as_strided", "detach", "lift_fresh", "alias"),
}
_JOINS = {"cat", "stack"}
_CONSTANTS = {"zeros", "ones", "full", "arange", "scalar_tensor", "zeros_like", "ones_like", "full_like", "new_zeros"}
_AFFINE = {"mul", "div", "add", "sub", "rsub", "neg"}
_AVERAGES = {"mean", "sum"}
_NEAREST = {"upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "index", "_unsafe_index"}
"""Upsampling, which consists of indexing in some versions of torch."""
_POOLS = {"avg_pool1d", "avg_pool2d", "avg_pool3d"}
_CONVOLUTIONS = {"convolution", "convolution_overrideable"}
_MATRICES = {"mm": (0, 1), "addmm": (1, 2), "bmm": (0, 1), "linear": (0, 1)}
"""Positions of the factors of products of matrices."""
_BATCH_NORMS: dict[str, int | None] = {
    "native_batch_norm": 5,
    "cudnn_batch_norm": 5,
    "miopen_batch_norm": 5,
    "_native_batch_norm_legit_no_training": None,
}
"""Position of the flag that says whether statistics are those of the batch, by operator; None if they never are."""
_NORMS = {"native_layer_norm": "layer_norm", "native_group_norm": "group_norm", "_fused_rms_norm": "rms_norm"}


@dataclass(frozen=True)
class Term:
    """How an element of a tensor depends on the spikes of a layer of neurons, on average.

    Args:
        source: Name of the layer of neurons.
        share: Share of the tensor's elements that depend on them.
        channels: Channels of the spikes that an element depends on, once a layer has mixed them.
        all_channels: Channels of the spikes; None until a layer mixes them.
        window: Positions of the spikes that an element depends on, along each spatial axis; empty before any.
        stride: Positions of the spikes between neighbours, along each spatial axis.
        times: Further spikes for each of them, such as those of the SNN time steps in a mean.
        folds: Whether there is anything between the spikes and the tensor.
    """

    source: str
    share: float = 1.0
    channels: float = 1.0
    all_channels: float | None = None
    window: tuple[float, ...] = ()
    stride: tuple[float, ...] = ()
    times: float = 1.0
    folds: bool = False

    @property
    def connections(self) -> float:
        """Spikes that an element depends on."""
        return self.times * self.share * self.channels * math.prod(self.window)

    def along(self, kernel: Sequence[float], steps: Sequence[float], dilation: Sequence[float] = ()) -> Term | None:
        """Returns the term behind a window of these positions that moves by these steps; None for other axes.

        Windows of `w` positions whose neighbours are `s` apart cover `w + (k - 1) min(d s, w)` positions if there are
        `k` of them, dilated by `d`; `k` is below 1 where outputs of a transposed convolution have no input.
        """
        window = self.window or (1.0,) * len(kernel)
        stride = self.stride or (1.0,) * len(kernel)
        if len(window) != len(kernel):
            return None
        axes = zip(window, stride, kernel, dilation or (1.0,) * len(kernel), strict=True)
        grown = (w * k if k < 1 else w + (k - 1) * min(d * s, w) for w, s, k, d in axes)
        moved = (s * step for s, step in zip(stride, steps, strict=True))
        return replace(self, window=tuple(grown), stride=tuple(moved), folds=True)

    def mixed(self, fan: float, channels: float) -> Term:
        """Returns the term behind weights from `fan` of `channels` channels to each output channel."""
        if self.all_channels is None:
            return replace(self, channels=self.share * fan, all_channels=self.share * channels, share=1.0, folds=True)
        return replace(self, channels=min(self.channels * self.share * fan, self.all_channels), share=1.0, folds=True)

    def behind(self, weights: Weights) -> Term | None:
        """Returns the term behind a convolution or linear layer; None if their axes differ."""
        moved = self.along(weights.kernel, weights.steps, weights.dilation) if weights.kernel else self
        return moved and moved.mixed(weights.fan, weights.channels)


@dataclass(frozen=True)
class Origin:
    """Where the elements of a tensor come from.

    Args:
        constant: Whether they depend on parameters only.
        current: Whether they are the output of a convolution or linear layer, up to copies.
        bits: Bits that represent the values, as the layer states that made them.
        terms: Spikes in which they are linear.
        real: Share of elements that are not linear in spikes.
    """

    constant: bool = False
    current: bool = False
    bits: int = 32
    terms: tuple[Term, ...] = ()
    real: float = 1.0

    def through(self, change: Any) -> Origin:
        """Returns the origin after a linear map that changes each term; real-valued if it cannot."""
        terms = tuple(map(change, self.terms))
        return replace(self, terms=terms, bits=32) if terms and None not in terms else REAL

    def enlarged(self, shape: Sequence[int], new_shape: Sequence[int]) -> Origin:
        """Returns the origin of copies along the spatial axes of `(N, C, *spatial)`; unchanged if there are none."""
        if len(shape) != len(new_shape) or len(shape) < 3 or tuple(shape[2:]) == tuple(new_shape[2:]):
            return self
        scales = [old / new for old, new in zip(shape[2:], new_shape[2:], strict=True)]
        moved = self.through(lambda term: term.along([1.0] * len(scales), scales))
        return replace(moved, bits=self.bits, current=self.current)

    def through_layer(self, weights: Weights) -> Origin:
        """Returns the origin of the output of a convolution or linear layer."""
        dilated = any(d > 1 < k for d, k in zip(weights.dilation, weights.kernel, strict=True))  # a window with gaps
        linear = self.real == 0 and not dilated  # real values mix with spikes
        return replace(self.through(lambda term: term.behind(weights)) if linear else REAL, current=True)


REAL = Origin()
CONSTANT = Origin(constant=True)


@dataclass(frozen=True)
class Weights:
    """Geometry of the weights of a layer.

    Args:
        fan: Input channels of each output channel.
        channels: Input channels.
        kernel: Input positions of each output position, along each spatial axis; empty for a linear layer.
        steps: Input positions between neighbouring outputs.
        dilation: Input positions between those of an output.
    """

    fan: float
    channels: float
    kernel: tuple[float, ...] = ()
    steps: tuple[float, ...] = ()
    dilation: tuple[float, ...] = ()

    @classmethod
    def of(
        cls,
        weight: Tensor,
        stride: Sequence[int] = (),
        dilation: Sequence[int] = (),
        transposed: bool = False,
        groups: int = 1,
    ) -> Weights:
        """Returns the geometry of a convolution, or of a linear layer if no stride is given."""
        channels = weight.shape[0] if transposed else weight.shape[1] * groups
        kernel = tuple(float(k) for k in weight.shape[2:])
        steps = tuple(float(s) for s in stride)
        if transposed:
            kernel = tuple(k / s for k, s in zip(kernel, steps, strict=True))
            steps = tuple(1 / s for s in steps)
        return cls(channels / groups, channels, kernel, steps, tuple(map(float, dilation)))


def joined(parts: Sequence[tuple[Origin, int]]) -> Origin:
    """Returns the origin of concatenated tensors, with their numbers of elements."""
    total = max(sum(size for _, size in parts), 1)
    return Origin(
        all(origin.constant for origin, _ in parts),
        all(origin.current for origin, _ in parts),
        max(origin.bits for origin, _ in parts),
        tuple(replace(t, share=t.share * size / total) for origin, size in parts for t in origin.terms),
        sum(origin.real * size / total for origin, size in parts),
    )


class Origins:
    """Origins of the tensors of a network while it runs.

    Args:
        constants: Parameters and buffers.
    """

    def __init__(self, constants: Iterable[Tensor]) -> None:
        self._known: dict[int, tuple[StorageWeakRef, Origin]] = {}
        self._limit = 10_000
        self.additions: dict[str, float] = {}
        """Additions since this was last emptied, by kind."""
        for tensor in constants:
            self[tensor] = CONSTANT

    def __getitem__(self, tensor: Tensor) -> Origin:
        """Returns the origin of a tensor, real-valued unless known."""
        return self._known.get(tensor.untyped_storage()._cdata, (None, REAL))[1]

    def __setitem__(self, tensor: Tensor, origin: Origin) -> None:
        storage = tensor.untyped_storage()
        self._known[storage._cdata] = (
            StorageWeakRef(storage),
            origin,
        )  # as long as it is held, no other has this address
        if len(self._known) > self._limit:
            self._known = {key: entry for key, entry in self._known.items() if not entry[0].expired()}
            self._limit = 2 * len(self._known) + 10_000

    def joined(self, tensors: Sequence[Tensor]) -> Origin:
        """Returns the origin of the concatenation of tensors."""
        return joined([(self[x], x.numel()) for x in tensors])

    def follow(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any, counts: bool) -> None:
        """Follows an operator from its arguments to its output.

        Args:
            func: Operator.
            args: Its arguments.
            kwargs: Its further arguments.
            out: Its output.
            counts: Whether additions are counted.
        """
        tensors = [x for x in tree_leaves((args, dict(kwargs))) if isinstance(x, Tensor)]
        outputs = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        if not outputs or any(x.layout != torch.strided for x in (*tensors, *outputs)):
            return
        name = func._overloadpacket.__name__.rstrip("_")
        if counts and (kind := self._addition(name, args, tensors, outputs[0])):
            self.additions[kind] = self.additions.get(kind, 0.0) + outputs[0].numel()
        storages = {x.untyped_storage()._cdata for x in tensors}
        if name == "set" or (outputs[0].untyped_storage()._cdata in storages and not func._schema.is_mutable):
            return  # a view
        origin = self._origin(name, args, tensors, outputs[0])
        for x in outputs:
            self[x] = origin

    def _addition(self, name: str, args: Sequence[Any], tensors: Sequence[Tensor], out: Tensor) -> str | None:
        """Returns the kind of addition that an operator is; None if it is none."""
        if name in ("add", "sub", "rsub"):
            full = [x for x in tensors if x.numel() == out.numel() and not self[x].constant]
            return "sum" if len(full) == 2 else None
        if name in _BATCH_NORMS:
            return None if self[tensors[0]].current or self[tensors[0]].constant else "batch_norm"
        return _NORMS.get(name)

    def _origin(self, name: str, args: Sequence[Any], tensors: Sequence[Tensor], out: Tensor) -> Origin:
        """Returns the origin of an operator's output."""
        if not tensors:
            return CONSTANT if name in _CONSTANTS else REAL
        active = [x for x in tensors if not self[x].constant]
        if not active or name in _CONSTANTS:
            return CONSTANT
        first = self[active[0]]
        if name in _JOINS:
            return self.joined(tensors)
        if name in _COPIES:
            return self[tensors[1]] if name == "copy" else first
        if name in _CONVOLUTIONS and self[args[1]].constant:
            return first.through_layer(Weights.of(args[1], args[3], args[5], args[6], args[8]))
        if name in _MATRICES:
            factors = [args[i] for i in _MATRICES[name]]
            if self[factors[1]].constant or self[factors[0]].constant:
                inner = float(factors[0].shape[-1])
                return first.through_layer(Weights(inner, inner))
        if name in _NEAREST:
            return first.enlarged(active[0].shape, out.shape)
        if len(active) > 1:
            return REAL
        if name in _AFFINE:
            return replace(first.through(lambda term: replace(term, folds=True)), current=first.current)
        if name in _BATCH_NORMS and ((flag := _BATCH_NORMS[name]) is None or not args[flag]):
            return replace(first.through(lambda term: replace(term, folds=True)), current=first.current)
        if name in _AVERAGES:
            times = active[0].numel() / max(out.numel(), 1)
            return first.through(lambda term: replace(term, times=times * term.times, folds=True))
        if name in _POOLS:
            axes = active[0].dim() - 2
            kernel = _per_axis(args[1], axes)
            stride = _per_axis(args[2], axes) if len(args) > 2 and args[2] else kernel
            return first.through(lambda term: term.along(kernel, stride))
        return REAL


def _per_axis(value: Any, axes: int) -> list[float]:
    values = list(value) if isinstance(value, Sequence) else [value]
    return [float(v) for v in (values * axes if len(values) == 1 else values)]
