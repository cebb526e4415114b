"""Alternating timing, and the floor of a network's time: only its convolutions and matrix products."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmark.configs import find_config
from benchmark.stages import DryRun, run_stage

WARM_UP = 2
"""Untimed steps before the timed ones."""

Rows = list[dict[str, Any]]


def config_path(name: str) -> Path:
    """Returns the file of a configuration in configs/."""
    return find_config(f"configs/{name}.yaml")


def build_config(name: str, *options: str) -> DryRun:
    """Builds the system and data of a configuration; for Spiking-Diffusion with one epoch in each stage."""
    if "spiking_diffusion" in name:
        options += ("--model.autoencoder_epochs=1", "--model.denoiser_epochs=1", "--model.data_variance=0.1")
    args = ["fit", f"--config={config_path(name)}", "--trainer.logger=false", *options]
    return cast(DryRun, run_stage(args, DryRun))


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Returns bfloat16 autocast for `bf16-mixed`, else a disabled one."""
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
"""Operations of the floor; norms, neurons, sums, copies and the optimiser are left out."""


class _TensorSpec(NamedTuple):
    """The properties of a tensor that determine the time of a product, and its address."""

    address: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def make(self) -> Tensor:
        """Returns such a tensor with random values; a stride of 0 repeats them, as in an expanded tensor."""
        size = 1 + sum((n - 1) * stride for n, stride in zip(self.shape, self.stride, strict=True))
        return torch.randn(size, device=self.device).to(self.dtype).as_strided(self.shape, self.stride)


class Products(TorchDispatchMode):
    """Records the convolutions and matrix products that run within it, including the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Records the call and runs it."""
        if func in PRODUCTS:
            self.calls.append((func, tuple(map(_describe, args))))
        return func(*args, **(kwargs or {}))

    def work(self) -> Callable[[], None]:
        """Returns a function that runs all products in order, on random tensors.

        Calls that read the same memory share a tensor, so that it is in the same cache as in the original run.
        """
        tensors = {arg: arg.make() for _, args in self.calls for arg in args if isinstance(arg, _TensorSpec)}
        calls = [
            (func, [tensors[arg] if isinstance(arg, _TensorSpec) else arg for arg in args]) for func, args in self.calls
        ]

        def run() -> None:
            for func, args in calls:
                func(*args)

        return run


def _describe(arg: Any) -> Any:
    if isinstance(arg, Tensor):
        return _TensorSpec(arg.data_ptr(), tuple(arg.shape), arg.stride(), arg.dtype, arg.device)
    return arg


def queued(device: torch.device) -> int:
    """Returns the number of calls between synchronisations, so that a GPU does not idle between short calls."""
    return 1 if device.type == "cpu" else 5


def median_seconds(
    work: Callable[[], Any], repetitions: int, device: torch.device, warm_up: int = 1, calls: int = 1
) -> float:
    """Returns the median seconds of a function, as `medians`."""
    return medians({"": work}, repetitions, device, warm_up, calls)[""]


def medians(
    works: Mapping[str, Callable[[], Any]], repetitions: int, device: torch.device, warm_up: int = 1, calls: int = 1
) -> dict[str, float]:
    """Returns the median seconds of functions that alternate, so that a slowdown of the machine affects all of them.

    Args:
        works: Functions to time, by name.
        repetitions: Timed repetitions.
        device: Device that is synchronised before and after each repetition.
        warm_up: Untimed repetitions before.
        calls: Calls in each repetition, whose mean is its time.
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
    """Synchronises a device; on CPUs there is nothing to wait for."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)
