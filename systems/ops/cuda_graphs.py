"""CUDA graphs: record a network once, then replay it with a single launch.

A spiking network is about a thousand mostly short operations, which a CPU launches more slowly than a GPU computes
them. See https://pytorch.org/docs/stable/notes/cuda.html#cuda-graphs.

The first replay is compared with eager execution, since recording depends on GPU, driver and the rest of the process.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

REPLAYABLE = "replayable"
"""Attribute that marks hooks which only update tensors in place, so that a graph repeats their work."""

MAX_RELATIVE_ERROR = 0.05
"""A replay that deviates more than this from eager execution is rejected.

Different algorithms for the same products may round differently, which can add or remove a few spikes.
"""

_verified: WeakSet[nn.Module] = WeakSet()
"""Networks whose replay has agreed with eager execution in this process."""


class Replay:
    """Runs a function eagerly at its first call, records it at the second, and replays the recording from then on.

    It always runs eagerly on CPUs, when gradients are enabled, or if the network has hooks that a graph cannot repeat;
    if a graph fails, it warns and runs eagerly. All inputs must have the same shapes and the weights must not change,
    so make a new one for each sampling chain.

    Args:
        function: Function of tensors on one device that calls the network without synchronising.
        network: The network called, whose hooks are checked.
    """

    def __init__(self, function: Callable[..., Any], network: nn.Module) -> None:
        self._function = function
        self._network = network
        self._replayable = not _has_unreplayable_hooks(network)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: tuple[Tensor, ...] | None = None
        self._output: Any = None

    def __call__(self, *inputs: Tensor) -> Any:
        """Returns the function's output, a tensor or a tuple of tensors."""
        in_mode = torch._C._len_torch_dispatch_stack() > 0
        if not (self._replayable and inputs[0].is_cuda) or torch.is_grad_enabled() or in_mode:
            return self._function(*inputs)
        if self._inputs is None:  # kernels must be compiled and selected before recording
            self._inputs = tuple(x.clone() for x in inputs)
            return self._function(*inputs)
        for mine, given in zip(self._inputs, inputs, strict=True):
            mine.copy_(given)
        if self._graph is None:
            try:
                self._graph = self._record(self._inputs)
            except RuntimeError as error:
                return self._fall_back(f"recording failed: {error}", inputs)
        self._graph.replay()
        output = self._output.clone() if isinstance(self._output, Tensor) else tuple(x.clone() for x in self._output)
        if self._network not in _verified:
            with _without_hooks(self._network):
                deviation = relative_error(_as_list(output), _as_list(self._function(*inputs)))
            if not deviation <= MAX_RELATIVE_ERROR:
                return self._fall_back(f"relative error {deviation:.2g} against eager", inputs)
            _verified.add(self._network)
        return output

    def _record(self, inputs: tuple[Tensor, ...]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with _autocast_without_cache(), torch.cuda.graph(graph, capture_error_mode="thread_local"):  # loaders: threads
            self._output = self._function(*inputs)
        return graph

    def _fall_back(self, reason: str, inputs: tuple[Tensor, ...]) -> Any:
        warnings.warn(f"CUDA graph disabled ({reason}); sampling continues, but slower", stacklevel=3)
        self._replayable, self._graph, self._output = False, None, None
        return self._function(*inputs)


def relative_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest `|found - expected| / |expected|` over pairs of tensors, in the Euclidean norm."""
    ratios = [
        torch.linalg.vector_norm(a.float() - b.float()) / torch.linalg.vector_norm(b.float()).clamp(min=1e-12)
        for a, b in zip(found, expected, strict=True)
    ]
    return float(torch.stack(ratios).max())


def _has_unreplayable_hooks(network: nn.Module) -> bool:
    """Whether a forward hook does work that a graph would not repeat."""
    return any(
        not hasattr(hook, REPLAYABLE)
        for module in network.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    )


@contextmanager
def _without_hooks(network: nn.Module) -> Iterator[None]:
    """Disables forward hooks, which would count the comparison as a further call."""
    hooks = [(module, module._forward_hooks) for module in network.modules()]
    for module, theirs in hooks:
        module._forward_hooks = type(theirs)()
    try:
        yield
    finally:
        for module, theirs in hooks:
            module._forward_hooks = theirs


def _as_list(output: Any) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else list(output)


def _autocast_without_cache() -> torch.autocast:
    """The current autocast state without its cache, so that the graph records the casts of weights."""
    enabled = torch.is_autocast_enabled("cuda")
    return torch.autocast("cuda", torch.get_autocast_dtype("cuda"), enabled=enabled, cache_enabled=False)
