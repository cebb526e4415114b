"""`python -m benchmark neuron-speed`: the multi-step neuron against snnTorch stepped by hand, as ratios in one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import snntorch as snn
import torch
from rich.console import Console
from rich.table import Table
from snntorch import surrogate
from torch import Tensor

from systems.neurons import integrate_and_fire


def neuron_speed(
    shape: Sequence[int] = (16, 128, 32, 32), num_steps: int = 4, repetitions: int = 11, device: str = "cpu"
) -> None:
    """Measures integrate-and-fire layers against snnTorch's Leaky stepped by hand.

    Args:
        shape: Currents of one SNN step, `B C H W`.
        num_steps: SNN time steps T.
        repetitions: Timed repetitions; the median counts.
        device: Device to run on.
    """
    leaky = snn.Leaky(beta=1.0, reset_mechanism="zero", reset_delay=False, spike_grad=surrogate.atan(2.0)).to(device)

    def by_hand(x: Tensor) -> Tensor:
        mem = torch.zeros_like(x[0])
        spikes = []
        for x_k in x:
            spike, mem = leaky(x_k, mem)
            spikes.append(spike)
        return torch.stack(spikes)

    neuron = integrate_and_fire()
    paths: dict[str, Callable[[Tensor], Tensor]] = {
        "snnTorch by hand": by_hand,
        "stepwise autograd": neuron.stepwise,
        "suite": neuron,
    }
    x = torch.randn(num_steps, *shape, device=device, requires_grad=True)
    grad = torch.randn(x.shape, device=device)
    table = Table(title=f"IF, T={num_steps}, {tuple(shape)}, float32, {device}, {torch.get_num_threads()} threads")
    for column in ("layer", "forward ms", "ratio", "forward+backward ms", "ratio"):
        table.add_column(column, justify="left" if column == "layer" else "right")
    times = {name: [_median(path, x, g, repetitions) for g in (None, grad)] for name, path in paths.items()}
    for name, row in times.items():
        cells = [
            text for i, t in enumerate(row) for text in (f"{t * 1e3:.1f}", f"{times['snnTorch by hand'][i] / t:.1f}x")
        ]
        table.add_row(name, *cells)
    Console().print(table)


def _median(path: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor | None, repetitions: int) -> float:
    times = []
    for i in range(repetitions + 2):  # two to warm up
        start = time.perf_counter()
        with torch.set_grad_enabled(grad is not None):
            spikes = path(x)
        if grad is not None:
            torch.autograd.grad(spikes, x, grad)
        if x.is_cuda:
            torch.cuda.synchronize()
        if i >= 2:
            times.append(time.perf_counter() - start)
    return statistics.median(times)
