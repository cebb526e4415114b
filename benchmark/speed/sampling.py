"""Speed of samplers, and how their time grows with B, T and NFE."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from matplotlib.figure import Figure

from benchmark.speed.timing import Rows, autocast, build_config, median_seconds
from systems.base import DiffusionSystem

SMALL = (
    "sddpm_mnist",
    "sdm_mnist",
    "fsddim_mnist",
    "sdit_mnist",
    "spiking_rwkv_mnist",
    "spiking_diffusion_mnist",
    "ddpm_mnist",
)
"""Configurations of the small track, for measurements that generate many images."""
SOLVERS = ("DDPMScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler")


def measure_sampling(precision: str, device: torch.device, repetitions: int, output: Path) -> dict[str, Rows]:
    """Times the small track's samplers: images/s of each method, of each solver, and growth with B, T and NFE.

    Growth, plotted in sampling.png, is linear if R² is 1. Batches have 2 to 16 images on CPUs, and 32 to 256 on GPUs,
    which smaller ones would not fill.
    """
    times = 1 if device.type == "cpu" else 16

    def seconds(name: str, batch: int, nfe: int, *options: str) -> float:
        cli = build_config(f"small/{name}", f"--model.num_inference_steps={nfe}", *options)
        system = cast(DiffusionSystem, cli.model).to(device).eval()
        sample = partial(system.sample, torch.arange(batch), cli.datamodule.image_shape)
        with autocast(precision, device):
            return median_seconds(sample, repetitions, device)

    sampling, growth = [], []
    for name in SMALL:
        sampling.append({"config": name, "solver": build_config(f"small/{name}").model.solver})
        sampling[-1] |= {"B": 16 * times, "NFE": 10, "images/s": 16 * times / seconds(name, 16 * times, 10)}
        axes = {"B": [(n * times, seconds(name, n * times, 4)) for n in (2, 4, 8, 16)]}
        if not name.startswith("ddpm"):
            axes["T"] = [(n, seconds(name, 4 * times, 4, f"--model.num_steps={n}")) for n in (2, 4, 8)]
        axes["NFE"] = [(n, seconds(name, 4 * times, n)) for n in (2, 4, 8, 16)]
        growth += [{"config": name, "with": axis} | _line(points) for axis, points in axes.items()]
    for solver in SOLVERS:
        sampling.append({"config": "sddpm_mnist", "solver": solver.removesuffix("Scheduler")})
        took = seconds("sddpm_mnist", 16 * times, 10, f"--model.scheduler={solver}")
        sampling[-1] |= {"B": 16 * times, "NFE": 10, "images/s": 16 * times / took}
    output.mkdir(parents=True, exist_ok=True)
    _plot(growth).savefig(output / "sampling.png", dpi=120)
    return {"sampling": sampling, "growth": growth}


def _line(points: list[tuple[int, float]]) -> dict[str, Any]:
    """Fits a straight line to pairs `(n, seconds)`: intercept and slope in milliseconds, and R²."""
    n, ms = (torch.tensor(values, dtype=torch.float64) for values in zip(*points, strict=True))
    ms = ms * 1e3
    slope = ((n - n.mean()) * (ms - ms.mean())).sum() / (n - n.mean()).square().sum()
    intercept = ms.mean() - slope * n.mean()
    misfit = (ms - intercept - slope * n).square().sum() / (ms - ms.mean()).square().sum()
    return {"ms at 0": float(intercept), "ms each": float(slope), "R²": f"{1 - float(misfit):.4f}", "points": points}


def _plot(growth: Rows) -> Figure:
    figure = Figure(figsize=(12, 4), layout="constrained")
    axes = dict(zip(("B", "T", "NFE"), figure.subplots(1, 3), strict=True))
    labels = {"B": "images in a batch", "T": "SNN time steps T", "NFE": "network evaluations"}
    for row in growth:
        n, seconds = zip(*row["points"], strict=True)
        (line,) = axes[row["with"]].plot(n, [1e3 * s for s in seconds], "o", label=row["config"].removesuffix("_mnist"))
        ends = (0, max(n))
        axes[row["with"]].plot(ends, [row["ms at 0"] + row["ms each"] * x for x in ends], color=line.get_color(), lw=1)
    for name, axis in axes.items():
        axis.set(xlabel=labels[name], ylabel="ms per batch", xlim=(0, None), ylim=(0, None))
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
    axes["B"].legend(fontsize=8, frameon=False)
    return figure
