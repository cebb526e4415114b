"""CUDA graphs: a network that a sampler asks again and again is launched as a whole, not operation by operation.

A spiking network is some thousand operations, most of them short; a CPU launches them more slowly than a GPU computes
them. See https://pytorch.org/docs/stable/notes/cuda.html#cuda-graphs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

REPLAYABLE = "replayable"
"""Attribute of a hook whose work is done on tensors alone, in place, so that a graph repeats it."""


class Replay:
    """A function of tensors for one chain of calls with inputs of one size: recorded in the second, then replayed.

    It is called as it is on CPUs, where gradients are wanted, and where a hook of the network does more than a graph
    can repeat. Weights may not change in between, so it lives no longer than the chain.

    Args:
        function: Calls the network, on tensors of one device, without waiting for it.
        network: Its hooks are looked at.
    """

    def __init__(self, function: Callable[..., Any], network: nn.Module) -> None:
        self._function = function
        hooks = [
            hook for m in network.modules() for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())
        ]
        self._replayable = all(hasattr(hook, REPLAYABLE) for hook in hooks)
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
            self._graph = self._record(self._inputs)
        self._graph.replay()
        return self._output.clone() if isinstance(self._output, Tensor) else tuple(x.clone() for x in self._output)

    def _record(self, inputs: tuple[Tensor, ...]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        autocast = torch.autocast(
            "cuda",
            torch.get_autocast_dtype("cuda"),
            torch.is_autocast_enabled("cuda"),
            cache_enabled=False,  # casts of weights that outlive the graph or not
        )
        with autocast, torch.cuda.graph(graph, capture_error_mode="thread_local"):  # loaders have threads of their own
            self._output = self._function(*inputs)
        return graph
