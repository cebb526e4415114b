"""The floor under a network's time: its convolutions and matrix products alone, same shapes, dtype and layout."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

PRODUCTS = frozenset(
    {
        torch.ops.aten.convolution.default,
        torch.ops.aten.convolution_backward.default,
        torch.ops.aten.mm.default,
        torch.ops.aten.addmm.default,
        torch.ops.aten.bmm.default,
        torch.ops.aten.baddbmm.default,
    }
)
"""What is left of a network without norms, neurons, sums, copies and the optimiser."""


class _Like(NamedTuple):
    """A tensor, as far as the time of a product depends on it."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def make(self) -> Tensor:
        """Returns such a tensor with random content; a stride of 0 repeats it, as an expanded tensor does."""
        reach = 1 + sum((n - 1) * stride for n, stride in zip(self.shape, self.stride, strict=True))
        return torch.randn(reach, device=self.device).to(self.dtype).as_strided(self.shape, self.stride)


class Products(TorchDispatchMode):
    """Counts, while it is entered, each convolution and matrix product that runs, of the backward pass too."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[tuple[Any, tuple[Any, ...]]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Notes the call and lets it run."""
        if func in PRODUCTS:
            self.calls[func, tuple(map(_describe, args))] += 1
        return func(*args, **(kwargs or {}))

    def seconds(self, repetitions: int) -> float:
        """Returns the time of all counted products, each alone, the median of its repetitions."""
        total = 0.0
        for (func, described), count in self.calls.items():
            args = [_make(arg) for arg in described]
            device = next(arg.device for arg in args if isinstance(arg, Tensor))
            work = partial(func, *args)
            total += count * median_seconds(work, repetitions, device, calls=queued(device))
        return total


def _describe(arg: Any) -> Any:
    if isinstance(arg, Tensor):
        return _Like(tuple(arg.shape), arg.stride(), arg.dtype, arg.device)
    return ("list", *arg) if isinstance(arg, list) else arg


def _make(arg: Any) -> Any:
    if isinstance(arg, _Like):
        return arg.make()
    return list(arg[1:]) if isinstance(arg, tuple) else arg


def queued(device: torch.device) -> int:
    """Returns how often short work is called before a device is waited for, which else would idle between."""
    return 1 if device.type == "cpu" else 5


def median_seconds(
    work: Callable[[], Any], repetitions: int, device: torch.device, warm_up: int = 1, calls: int = 1
) -> float:
    """Returns the median time of some work, after a warm-up, with the device waited for."""
    return medians({"": work}, repetitions, device, warm_up, calls)[""]


def medians(
    works: Mapping[str, Callable[[], Any]], repetitions: int, device: torch.device, warm_up: int = 1, calls: int = 1
) -> dict[str, float]:
    """Returns the median times of works that take turns, so that what slows the machine slows them alike.

    Args:
        works: What is timed, by name.
        repetitions: Times of which the median is taken.
        device: Waited for before and after.
        warm_up: Repetitions before the timed ones.
        calls: Calls of a repetition, whose mean is its time.
    """
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for i in range(warm_up + repetitions):
        for name, work in works.items():
            wait(device)
            start = time.perf_counter()
            for _ in range(calls):
                work()
            wait(device)
            if i >= warm_up:
                seconds[name].append((time.perf_counter() - start) / calls)
    return {name: statistics.median(times) for name, times in seconds.items()}


def wait(device: torch.device) -> None:
    """Waits until a device has done all that it was given; a CPU always has."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)
