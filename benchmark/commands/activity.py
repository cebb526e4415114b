"""`python -m benchmark activity`: plots where and when a trained network spikes while it samples."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn

from benchmark.runs import RUNS, checkpoint_in, find_checkpoint, load_run, newest_run, run_of
from datamodules import ImageDataModule
from leaderboard.files import free_path, refuse_existing
from systems import FSDDIM
from systems.base import DiffusionSystem
from systems.spiking.adapter import spikes_of, spiking_layers


def activity(
    ckpt_path: str | None = None,
    num_images: int = 16,
    num_inference_steps: int = 50,
    seed: int = 0,
    output: str | None = None,
) -> None:
    """Plots spikes per layer and diffusion step while sampling, and a denoising strip.

    For FSDDIM, which denoises synaptic currents, the strip shows the currents of every SNN step, their mean, which is
    the decoded image, and their standard deviation; for any other method it shows a few images.

    Args:
        ckpt_path: Checkpoint in a run folder, folder made by `export`, or zoo:NAME; null uses the last checkpoint of
            the newest run under runs/.
        num_images: Number of images to average the spikes over.
        num_inference_steps: Diffusion steps of the sampler, at most those of the run.
        seed: Seed of the first image, which the strip of currents shows.
        output: Folder of the plots; null writes to `activity/` in the run folder, under new names the next time.

    Raises:
        FileNotFoundError: If there is no such run or checkpoint.
        FileExistsError: If the given folder already contains the plots.
        ValueError: If the checkpoint is not in a run folder, or a number is too small.
    """
    for name, number in (("num_images", num_images), ("num_inference_steps", num_inference_steps)):
        if number < 1:
            raise ValueError(f"{name}={number}; give 1 or more")
    checkpoint = checkpoint_in(Path(ckpt_path)) if ckpt_path is not None else find_checkpoint(newest_run(RUNS))
    run = run_of(checkpoint) or RUNS / checkpoint.parent.name
    folder = Path(output) if output is not None else run / "activity"
    if output is not None:
        refuse_existing(folder / "spikes.png", folder / "denoising.png", option="--output")
    system, data = load_run(checkpoint)
    system.to("cuda" if torch.cuda.is_available() else "cpu")
    system.num_inference_steps = min(num_inference_steps, system.num_inference_steps)
    seeds = torch.arange(seed, seed + num_images)
    spikes = measure_spikes(system, seeds, data.image_shape)
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in (
        ("spikes", draw_spikes(spikes, f"{system.method}, {data.title}, {system.solver}, T={system.num_steps}")),
        ("denoising", draw_denoising(system, data, seeds[:6])),
    ):
        path = free_path(folder / f"{name}.png")
        figure.savefig(path, dpi=150)
        print(path)


@dataclass
class SpikeCounts:
    """Spikes of each neuron layer at each diffusion step, layers in the order of the forward pass.

    Args:
        spikes: Spikes per image at each diffusion step, by layer.
        neurons: Neurons times SNN steps per image and diffusion step, by layer.
    """

    spikes: dict[str, list[float]] = field(default_factory=dict)
    neurons: dict[str, float] = field(default_factory=dict)

    def rates(self) -> Tensor:
        """Firing rates `(layers, diffusion steps)`."""
        counts = torch.tensor(list(self.spikes.values()), dtype=torch.float64)
        return counts / torch.tensor(list(self.neurons.values()), dtype=torch.float64)[:, None]


@contextmanager
def _count_spikes(network: nn.Module) -> Iterator[dict[str, tuple[Tensor, int]]]:
    """Yields the sums of spikes and of elements of each neuron layer; the caller may clear them at any time."""
    sums: dict[str, tuple[Tensor, int]] = {}

    def hook_of(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            spikes = spikes_of(output)
            total, elements = sums.get(name, (spikes.new_zeros((), dtype=torch.float64), 0))
            sums[name] = (total + (spikes != 0).sum(dtype=torch.float64), elements + spikes.numel())

        return hook

    neurons = list(spiking_layers(network))
    if not neurons:
        raise ValueError(f"{type(network).__name__} has no spiking layer, but `activity` plots spikes")
    hooks = [module.register_forward_hook(hook_of(name)) for name, module in neurons]
    try:
        yield sums
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def measure_spikes(system: DiffusionSystem, seeds: Tensor, image_shape: tuple[int, int, int]) -> SpikeCounts:
    """Counts spikes of every layer at every diffusion step while a system generates the images of `seeds` `(B,)`.

    These are the layers of the network that runs in each step; the decoder of Spiking-Diffusion runs once per image.
    """
    counts = SpikeCounts()
    with _count_spikes(system.step_network) as sums:
        states = system.trajectory(seeds, image_shape)
        next(states)  # the state before the first step, for which a decoder may have fired
        sums.clear()
        for _ in states:
            for name, (total, elements) in sums.items():
                counts.spikes.setdefault(name, []).append(float(total) / len(seeds))
                counts.neurons[name] = elements / len(seeds)
            sums.clear()
    return counts


def draw_spikes(counts: SpikeCounts, title: str) -> Figure:
    """Plots firing rates as a heat map of layers and diffusion steps, next to the spikes per image of each layer."""
    rates, names = counts.rates(), list(counts.spikes)
    figure = Figure(figsize=(9, 1.6 + 0.17 * len(names)), layout="constrained")
    heat, bars = figure.subplots(1, 2, sharey=True, width_ratios=(3, 1))
    extent = (0.5, rates.shape[1] + 0.5, len(names), 0)
    image = heat.imshow(rates.numpy(), aspect="auto", interpolation="nearest", cmap="magma", vmin=0, extent=extent)
    middles = [row + 0.5 for row in range(len(names))]
    heat.set_yticks(middles, names, fontsize=7)
    heat.xaxis.set_major_locator(MaxNLocator(integer=True))
    heat.set_xlabel("diffusion step, from noise to image")
    heat.set_title("firing rate: spikes per neuron and SNN step", fontsize=9)
    figure.colorbar(image, ax=heat, pad=0.01, aspect=40)
    means = [sum(row) / len(row) for row in counts.spikes.values()]
    bars.barh(middles, means, height=0.7, color="tab:purple")
    bars.set_xscale("log")
    bars.set_xlim(left=0.5)
    bars.tick_params(axis="y", labelleft=False, left=False)
    bars.set_xlabel("spikes per image and step")
    bars.set_title("mean over the steps", fontsize=9)
    bars.grid(axis="x", alpha=0.3)
    figure.suptitle(title, fontsize=10)
    return figure


@torch.no_grad()
def draw_denoising(system: DiffusionSystem, data: ImageDataModule, seeds: Tensor, columns: int = 10) -> Figure:
    """Plots states from noise to image: the currents of the first of `seeds` `(B,)`, or the images of all."""
    if isinstance(system, FSDDIM):
        states = [x[:, 0] for x in system.currents(seeds[:1], data.image_shape)]  # (T, C, H, W)
        rows = [*(f"SNN step {k + 1}" for k in range(system.num_steps)), "mean"]
        title = f"{data.title}, seed {int(seeds[0])}: synaptic currents, and their mean, the decoded image"
    else:
        states = list(system.trajectory(seeds, data.image_shape))
        rows = [f"seed {seed}" for seed in seeds.tolist()]
        title = f"{data.title}: images"
    steps = _spread_out(list(range(len(states))), columns)
    pictures = [[*state, state.mean(0)] if isinstance(system, FSDDIM) else list(state) for state in states]
    figure = Figure(figsize=(0.9 * len(steps) + 1, 0.9 * len(rows) + 0.7), layout="constrained")
    axes = figure.subplots(len(rows), len(steps), squeeze=False)
    for column, step in enumerate(steps):
        axes[0, column].set_title("noise" if step == 0 else f"step {step}", fontsize=8)
        pixels = data.to_uint8(torch.stack(pictures[step])).cpu().movedim(1, -1).squeeze(-1).numpy()
        for row, axis in enumerate(axes[:, column]):
            axis.imshow(pixels[row], cmap="gray", vmin=0, vmax=255)
            axis.set_xticks([])
            axis.set_yticks([])
    for name, axis in zip(rows, axes[:, 0], strict=True):
        axis.set_ylabel(name, fontsize=8, rotation=0, ha="right", va="center")
    if isinstance(system, FSDDIM):
        spread = [float(state.std(0, unbiased=False).mean()) for state in states]
        for step, axis in zip(steps, axes[-1], strict=True):
            axis.set_xlabel(f"{spread[step]:.3f}", fontsize=8)
        figure.supxlabel("spread: standard deviation over the SNN steps, mean over the pixels", fontsize=8)
    figure.suptitle(title, fontsize=10)
    return figure


def _spread_out(items: list[Any], count: int) -> list[Any]:
    """Returns up to `count` evenly spaced items, including the first and the last."""
    if len(items) <= count:
        return items
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]
