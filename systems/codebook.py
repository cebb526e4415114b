"""How a vector-quantised autoencoder uses its codes, and what it makes of images, as numbers and plots."""

from __future__ import annotations

import torch
from matplotlib.figure import Figure
from torch import Tensor


def perplexity(counts: Tensor) -> float:
    """Number of codes in use, weighted: exponential of the entropy of their counts `(num_codes,)`."""
    shares = counts.double() / counts.sum().clamp(min=1)
    return float(torch.special.entr(shares).sum().exp())


def plot_usage(counts: Tensor) -> Figure:
    """Draws the share of each code among all tokens, most frequent first."""
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
    """Draws images `(B, C, H, W)` in [-1, 1] above their reconstructions."""
    figure = Figure(figsize=(1.2 * len(images), 2.8), layout="constrained")
    grid = figure.subplots(2, len(images), squeeze=False)
    for row, name, pictures in zip(grid, ("image", "reconstruction"), (images, reconstructions), strict=True):
        row[0].set_title(name, loc="left", fontsize=8)
        for axes, picture in zip(row, pictures, strict=True):
            axes.imshow(((picture + 1) / 2).movedim(0, -1).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1)
            axes.axis("off")
    return figure
