"""`python -m benchmark attention-speed`: time and memory of RWKV's token mixing against softmax attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from benchmark.speed.timing import median_seconds, wait
from leaderboard.files import free_path
from leaderboard.reports.terminal import terminal
from systems.networks.spiking_transformer import RWKVMix, SoftmaxMix

Mix = Callable[[Tensor, Tensor, Tensor], Tensor]
QUANTITIES = (("time, ms", 1e3), ("peak memory, MiB", 2**-20))
"""Labels of the measured quantities, and factors from seconds and bytes."""


def attention_speed(
    tokens: Sequence[int] = (64, 128, 256, 512, 1024, 2048, 4096),
    sequences: int = 4,
    embed_dim: int = 64,
    num_heads: int = 1,
    repetitions: int = 5,
    device: str = "cpu",
    output: Path = Path("attention_speed.png"),
) -> None:
    """Measures a forward and backward pass of both mixes of SpikingRWKV's blocks at several numbers of tokens.

    Softmax attention is measured twice: with the fused kernel that SpikingRWKV calls, which never stores the attention
    matrix, and with plain products, which store it. Memory is the peak allocated in a pass, excluding its inputs.

    Args:
        tokens: Numbers of tokens N.
        sequences: Number of sequences T x B.
        embed_dim: Number of channels D.
        num_heads: Heads of softmax attention; divides embed_dim.
        repetitions: Timed repetitions, whose median is reported.
        device: Device to run on.
        output: Plot (.png).

    Raises:
        ValueError: If a number is below 1.
    """
    if min(*tokens, sequences, embed_dim, repetitions, len(tokens)) < 1:
        raise ValueError(
            f"tokens={list(tokens)}, sequences={sequences}, embed_dim={embed_dim}, repetitions={repetitions}; use "
            "numbers above 0"
        )
    softmax = SoftmaxMix(embed_dim, num_heads)
    mixes: dict[str, Mix] = {
        "RWKV": RWKVMix(embed_dim).to(device),
        "softmax, fused": softmax,
        "softmax, plain": partial(_plain, softmax),
    }
    results = {
        name: [_measure(mix, torch.randn(3, sequences, n, embed_dim, device=device), repetitions) for n in tokens]
        for name, mix in mixes.items()
    }
    title = f"forward + backward, ({sequences}, N, {embed_dim}), float32, {device}, {torch.get_num_threads()} threads"
    console = terminal()
    console.print(title)
    for quantity in range(len(QUANTITIES)):
        console.print(_table(results, tokens, quantity))
    output = free_path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    _plot(results, tokens).savefig(output, dpi=150)
    console.print(f"plot: {output}", soft_wrap=True, highlight=False)


def _plain(mix: Mix, r: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return mix(r, k, v)


def _measure(mix: Mix, rkv: Tensor, repetitions: int) -> tuple[float, int]:
    """Returns the median seconds and the peak bytes of a forward and backward pass."""
    r, k, v = (x.clone().requires_grad_() for x in rkv)
    grad = torch.randn_like(r)

    def run() -> None:
        torch.autograd.grad(mix(r, k, v), (r, k, v), grad)

    return median_seconds(run, repetitions, r.device), _peak_bytes(run, r.device)


def _peak_bytes(run: Callable[[], None], device: torch.device) -> int:
    """Peak memory allocated by a function: from CUDA's counter, else from the allocations that the profiler records."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        wait(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    assert profiler.profiler is not None
    events = profiler.profiler.kineto_results.events()
    now = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def _table(results: dict[str, list[tuple[float, int]]], tokens: Sequence[int], quantity: int) -> Table:
    label, scale = QUANTITIES[quantity]
    table = Table(title=label, title_justify="left")
    table.add_column("N", justify="right")
    for name in results:
        table.add_column(name, justify="right")
        if name != "RWKV":
            table.add_column("over RWKV", justify="right")
    for i, n in enumerate(tokens):
        row = [str(n)]
        for name, measured in results.items():
            row.append(f"{measured[i][quantity] * scale:.1f}")
            if name != "RWKV":
                row.append(f"{measured[i][quantity] / results['RWKV'][i][quantity]:.1f}x")
        table.add_row(*row)
    return table


def _plot(results: dict[str, list[tuple[float, int]]], tokens: Sequence[int]) -> Figure:
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    panels = figure.subplots(1, 2)
    for pick, (axes, (label, scale)) in enumerate(zip(panels, QUANTITIES, strict=True)):
        for (name, measured), marker in zip(results.items(), "os^", strict=True):
            axes.plot(tokens, [m[pick] * scale for m in measured], marker=marker, label=name)
        start = results["RWKV"][0][pick] * scale
        for power, style in ((1, ":"), (2, "--")):
            slope = [start * (n / tokens[0]) ** power for n in tokens]
            axes.plot(tokens, slope, style, color="grey", linewidth=0.8, label=f"slope of N{'²' if power == 2 else ''}")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(tokens, [str(n) for n in tokens])
        axes.minorticks_off()
        axes.set(xlabel="tokens N", ylabel=label)
    panels[0].legend(frameon=False)
    return figure
