"""Plots of learned quantities: use of a codebook, reconstructions, and SDM's temporal factors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from matplotlib.figure import Figure as Figure  # re-exported, so that no method imports matplotlib
from torch import Tensor


def perplexity(counts: Tensor) -> float:
    """Effective number of codes: exponential of the entropy of their relative counts `(num_codes,)`."""
    shares = counts.double() / counts.sum().clamp(min=1)
    return float(torch.special.entr(shares).sum().exp())


def plot_usage(counts: Tensor) -> Figure:
    """Plots the share of each code among all tokens, from `counts` `(num_codes,)`, most frequent first."""
    shares = (counts / counts.sum()).sort(descending=True).values
    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    axes.bar(range(len(shares)), shares.numpy(), width=1.0, color="tab:blue")
    axes.axhline(1 / len(shares), color="grey", linewidth=0.8, linestyle=":")
    axes.set(
        xlabel="code, most frequent first",
        yscale="log",
        ylabel="share of tokens",
        title=f"perplexity {perplexity(counts):.1f} of {len(counts)}, {int((counts == 0).sum())} dead codes",
    )
    return figure


def plot_reconstructions(images: Tensor, reconstructions: Tensor) -> Figure:
    """Plots images `(B, C, H, W)` in [-1, 1] above their reconstructions."""
    figure = Figure(figsize=(1.2 * len(images), 2.8), layout="constrained")
    grid = figure.subplots(2, len(images), squeeze=False)
    for row, name, pictures in zip(grid, ("image", "reconstruction"), (images, reconstructions), strict=True):
        row[0].set_title(name, loc="left", fontsize=8)
        for axes, picture in zip(row, pictures, strict=True):
            axes.imshow(((picture + 1) / 2).movedim(0, -1).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1)
            axes.axis("off")
    return figure


def plot_factors(factors: Mapping[str, Tensor]) -> Figure:
    """Plots factors `(T,)` by layer as a heat map, and their mean and standard deviation over the layers."""
    values = torch.stack(list(factors.values()))  # (layers, T)
    num_layers, num_steps = values.shape
    figure = Figure(figsize=(3.2 + 0.7 * num_steps + 3.6, max(3.6, 1.2 + 0.16 * num_layers)), layout="constrained")
    heat, line = figure.subplots(1, 2, width_ratios=[0.7 * num_steps, 3.6])
    limit = max(float((values - 1).abs().max()), 1e-3)
    image = heat.imshow(
        values.numpy(), cmap="RdBu_r", vmin=1 - limit, vmax=1 + limit, aspect="auto", interpolation="nearest"
    )
    heat.set_xticks(range(num_steps), [str(k) for k in range(num_steps)])
    heat.set_yticks(range(num_layers), list(factors), fontsize=7)
    heat.set(xlabel="SNN step k", title="factor p[k] by layer")
    figure.colorbar(image, ax=heat)
    mean, deviation = values.mean(0), values.std(0) if num_layers > 1 else torch.zeros(num_steps)
    line.errorbar(range(num_steps), mean.numpy(), deviation.numpy(), marker="o", capsize=4, color="tab:blue")
    line.axhline(1, color="grey", linewidth=0.8, linestyle=":")
    line.set_xticks(range(num_steps))
    line.set(xlabel="SNN step k", ylabel="p[k]", title="mean and standard deviation over layers")
    return figure
