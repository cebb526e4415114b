"""CUDA graphs: a network that a sampler asks again and again is launched as a whole, not operation by operation.

A spiking network is some thousand operations, most of them short; a CPU launches them more slowly than a GPU computes
them. See https://pytorch.org/docs/stable/notes/cuda.html#cuda-graphs.

What a graph has recorded is compared with the network itself before it is relied on, since it depends on the GPU, its
driver and what else the process does.
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
"""Attribute of a hook whose work is done on tensors alone, in place, so that a graph repeats it."""

APART = 0.05
"""Distance between what is replayed and what is computed, relative to the latter, from which a graph is refused.

Other algorithms for the same products may round differently, and a spike more or less follows from that.
"""

_compared: WeakSet[nn.Module] = WeakSet()
"""Networks whose graphs were found to be right in this process."""


class Replay:
    """A function of tensors for one chain of calls with inputs of one size: recorded in the second, then replayed.

    It is called as it is on CPUs, where gradients are wanted, where a hook of the network does more than a graph can
    repeat, and after a warning where a graph fails. Weights may not change in between, so it lives no longer than the
    chain.

    Args:
        function: Calls the network, on tensors of one device, without waiting for it.
        network: Its hooks are looked at.
    """

    def __init__(self, function: Callable[..., Any], network: nn.Module) -> None:
        self._function = function
        self._network = network
        self._replayable = not _watched(network)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: tuple[Tensor, ...] | None = None
        self._output: Any = None

    def __call__(self, *inputs: Tensor) -> Any:
        """Returns what the function returns: a tensor or a tuple of tensors."""
        in_mode = torch._C._len_torch_dispatch_stack() > 0
        if not (self._replayable and inputs[0].is_cuda) or torch.is_grad_enabled() or in_mode:
            return self._function(*inputs)
        if self._inputs is None:  # kernels are compiled and chosen in a call outside the graph
            self._inputs = tuple(x.clone() for x in inputs)
            return self._function(*inputs)
        for mine, given in zip(self._inputs, inputs, strict=True):
            mine.copy_(given)
        if self._graph is None:
            try:
                self._graph = self._record(self._inputs)
            except RuntimeError as error:
                return self._give_up(f"cannot be recorded ({error})", inputs)
        self._graph.replay()
        output = self._output.clone() if isinstance(self._output, Tensor) else tuple(x.clone() for x in self._output)
        if self._network not in _compared:
            with _unwatched(self._network):
                apart = distance(_listed(output), _listed(self._function(*inputs)))
            if not apart <= APART:
                return self._give_up(f"is wrong by {apart:.2g}", inputs)
            _compared.add(self._network)
        return output

    def _record(self, inputs: tuple[Tensor, ...]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with _uncached_autocast(), torch.cuda.graph(graph, capture_error_mode="thread_local"):  # loaders have threads
            self._output = self._function(*inputs)
        return graph

    def _give_up(self, reason: str, inputs: tuple[Tensor, ...]) -> Any:
        warnings.warn(f"a CUDA graph of the network {reason}; sampling goes on without, more slowly", stacklevel=3)
        self._replayable, self._graph, self._output = False, None, None
        return self._function(*inputs)


def _watched(network: nn.Module) -> bool:
    """Whether a hook does more in a forward pass than a graph can repeat."""
    return any(
        not hasattr(hook, REPLAYABLE)
        for module in network.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    )


@contextmanager
def _unwatched(network: nn.Module) -> Iterator[None]:
    """Calls the network without its forward hooks, which count each call."""
    hooks = [(module, module._forward_hooks) for module in network.modules()]
    for module, theirs in hooks:
        module._forward_hooks = type(theirs)()
    try:
        yield
    finally:
        for module, theirs in hooks:
            module._forward_hooks = theirs


def distance(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Largest distance between tensors, relative to the length of the latter ones; they are in pairs."""
    ratios = [
        torch.linalg.vector_norm(a.float() - b.float()) / torch.linalg.vector_norm(b.float()).clamp(min=1e-12)
        for a, b in zip(found, wanted, strict=True)
    ]
    return float(torch.stack(ratios).max())


def _listed(output: Any) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else list(output)


def _uncached_autocast() -> torch.autocast:
    """The autocast that is on, without its cache: casts of weights are recorded, and not left to the cache's life."""
    enabled = torch.is_autocast_enabled("cuda")
    return torch.autocast("cuda", torch.get_autocast_dtype("cuda"), enabled=enabled, cache_enabled=False)
