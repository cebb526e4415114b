"""Timing of work in turns, and the floor under a network's time: its convolutions and matrix products alone."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmark.stages import DryRun, run_stage

WARM_UP = 2
"""Steps before the timed ones."""

Rows = list[dict[str, Any]]


def _config(name: str) -> Path:
    return Path("configs") / f"{name}.yaml"


def _build(name: str, *options: str) -> DryRun:
    """Builds what a configuration describes; of Spiking-Diffusion both stages with an epoch each."""
    if "spiking_diffusion" in name:
        options += ("--model.autoencoder_epochs=1", "--model.denoiser_epochs=1", "--model.data_variance=0.1")
    args = ["fit", f"--config={_config(name)}", "--trainer.logger=false", *options]
    return cast(DryRun, run_stage(args, DryRun))


def _autocast(precision: str, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16-mixed")


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
    """A tensor, as far as the time of a product depends on it, and where its memory lies."""

    place: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def make(self) -> Tensor:
        """Returns such a tensor with random content; a stride of 0 repeats it, as an expanded tensor does."""
        reach = 1 + sum((n - 1) * stride for n, stride in zip(self.shape, self.stride, strict=True))
        return torch.randn(reach, device=self.device).to(self.dtype).as_strided(self.shape, self.stride)


class Products(TorchDispatchMode):
    """Notes, while it is entered, each convolution and matrix product that runs, of the backward pass too."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Notes the call and lets it run."""
        if func in PRODUCTS:
            self.calls.append((func, tuple(map(_describe, args))))
        return func(*args, **(kwargs or {}))

    def work(self) -> Callable[[], None]:
        """Returns what runs all products one after the other, on random numbers of its own.

        Calls share a tensor where they shared memory, so that weights come from as far as they did and what a product
        has just read is as near.
        """
        tensors = {arg: arg.make() for _, args in self.calls for arg in args if isinstance(arg, _Like)}
        calls = [(func, [tensors[arg] if isinstance(arg, _Like) else arg for arg in args]) for func, args in self.calls]

        def run() -> None:
            for func, args in calls:
                func(*args)

        return run


def _describe(arg: Any) -> Any:
    if isinstance(arg, Tensor):
        return _Like(arg.data_ptr(), tuple(arg.shape), arg.stride(), arg.dtype, arg.device)
    return arg


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
