"""`python -m benchmark speed`: how fast the suite is, as ratios within one run, on whatever device there is."""

from __future__ import annotations

import copy
import datetime
import json
import logging
import statistics
import subprocess
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, cast

import snntorch as snn
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from matplotlib.figure import Figure
from rich.table import Table
from snntorch import surrogate
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.data import DataLoader

from benchmark.floor import Products, median_seconds, medians, queued, wait
from benchmark.graphs import TrainingGraphs
from benchmark.runs import RUNS
from benchmark.stages import Rehearsal, fastest_precision, run_stage
from leaderboard.files import write_atomic
from leaderboard.record.records import find_records, read_record
from leaderboard.reports.terminal import terminal
from systems.base import DiffusionSystem
from systems.ops.cuda_graphs import TrainingReplay
from systems.spiking.neurons import SpikingNeuron, integrate_and_fire, leaky_integrate_and_fire
from systems.spiking.surrogates import triangle

Part = Literal["neuron", "step", "sampling", "data", "start"]
PARTS: tuple[Part, ...] = ("neuron", "step", "sampling", "data", "start")
PAPER_SIZE = ("sddpm_cifar10", "sdm_cifar10", "fsddim_cifar10", "sdit_mnist", "spiking_diffusion_mnist", "ddpm_cifar10")
"""Configurations whose networks have the size of the paper, the images that of its dataset."""
SMALL = ("sddpm_mnist", "sdm_mnist", "fsddim_mnist", "sdit_mnist", "spiking_diffusion_mnist", "ddpm_mnist")
"""Configurations of the small track, for what takes many images."""
SOLVERS = ("DDPMScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler")
WARM_UP = 2
"""Steps before the timed ones."""
QUICKSTART = ("--config=configs/quickstart.yaml", "--monitor.every_n_epochs=0", "--trainer.enable_model_summary=false")

Rows = list[dict[str, Any]]


def speed(
    parts: Sequence[Part] = PARTS,
    configs: Sequence[str] = PAPER_SIZE,
    batch_size: int | None = None,
    precision: Literal["auto", "32-true", "bf16-mixed"] = "auto",
    repetitions: int = 5,
    output: Path = RUNS / "speed",
) -> None:
    """Measures neurons, training and denoising steps, sampling, data and start, each against what it should not exceed.

    Every number is the median of several repetitions after a warm-up. Threads are those of torch (OMP_NUM_THREADS).

    Args:
        parts: What to measure: neuron, step, sampling, data, start.
        configs: Configurations in configs/ whose steps are measured, at their full size.
        batch_size: Images of a training or denoising step; as a default 4 on CPUs and 128 on GPUs.
        precision: That of steps and sampling; auto takes bfloat16 where the hardware computes in it.
        repetitions: Timed repetitions.
        output: Folder of speed.json and sampling.png.

    Raises:
        ValueError: If a number is below 1, or a part or configuration is unknown.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch_size = {"cpu": 4, "cuda": 128}[device.type] if batch_size is None else batch_size
    if min(batch_size, repetitions) < 1:
        raise ValueError(f"batch_size={batch_size}, repetitions={repetitions}; give 1 or more")
    if unknown := [*set(parts) - set(PARTS), *(name for name in configs if not _config(name).is_file())]:
        known = f"parts are {', '.join(PARTS)}; configurations are files below configs/, without .yaml"
        raise ValueError(f"{', '.join(map(str, unknown))} is unknown; {known}")
    chosen = fastest_precision("auto") if precision == "auto" else precision
    about = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "precision": chosen,
        "batch_size": batch_size,
        "repetitions": repetitions,
    }
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    console = terminal()
    console.print(", ".join(f"{key} {value}" for key, value in about.items()), highlight=False)
    results: dict[str, Any] = {"about": about}
    measures: dict[Part, Callable[[], dict[str, Rows]]] = {
        "neuron": lambda: {"neuron": measure_neurons(device, repetitions)},
        "step": lambda: {"step": measure_steps(configs, batch_size, chosen, device, repetitions)},
        "sampling": lambda: measure_sampling(chosen, device, repetitions, output),
        "data": lambda: {"data": measure_data(repetitions)},
        "start": lambda: {"start": measure_start(repetitions)},
    }
    for part in parts:
        for title, rows in measures[part]().items():
            results[title] = rows
            console.print(_table(title, rows))
            write_atomic(output / "speed.json", json.dumps(results, indent=1) + "\n")
    console.print(f"written: {output}", soft_wrap=True, highlight=False)


def _config(name: str) -> Path:
    return Path("configs") / f"{name}.yaml"


def _table(title: str, rows: Rows) -> Table:
    table = Table(title=title, title_justify="left")
    columns = [column for column in rows[0] if column != "points"]  # those are drawn
    for column in columns:
        table.add_column(column, justify="right" if isinstance(rows[0][column], float | int) else "left")
    for row in rows:
        table.add_row(*(f"{row[c]:.3g}" if isinstance(row[c], float) else str(row[c]) for c in columns))
    return table


# Neuron


def measure_neurons(device: torch.device, repetitions: int) -> Rows:
    """Times forward and backward passes of layers against snnTorch by hand and SpikingJelly's layers.

    Features are `(T, 4, 128, 32, 32)`, and on GPUs, whose caches would hold those, `(T, 128, 128, 32, 32)`. The bound
    is the time of copying as much memory as the two passes have to read and write.
    """
    shape = (4 if device.type == "cpu" else 128, 128, 32, 32)
    rows = []
    for name, ours, by_hand, jelly in _neurons():
        for num_steps in (4, 8, 16):
            x, grad = (torch.randn(num_steps, *shape, device=device, requires_grad=on) for on in (True, False))
            layers = {"suite": ours, "snnTorch": by_hand, "SpikingJelly": jelly}
            works = {kind: _passes(layer, x, grad) for kind, layer in layers.items() if layer is not None}
            seconds = medians(works | {"copy": grad.clone}, repetitions, device, warm_up=2, calls=queued(device))
            row: dict[str, Any] = {"neuron": name, "T": num_steps, "suite ms": 1e3 * seconds["suite"]}
            for kind in ("snnTorch", "SpikingJelly"):
                times = f"{seconds[kind] / seconds['suite']:.1f}x" if kind in seconds else "not installed"
                row[f"{kind} takes"] = times
            rows.append(row | {"of bandwidth bound": 2.5 * seconds["copy"] / seconds["suite"]})
    return rows


def _passes(layer: Any, x: Tensor, grad: Tensor) -> Callable[[], Any]:
    """Returns a forward and a backward pass."""
    return lambda: torch.autograd.grad(layer(x), x, grad)


def _neurons() -> Iterator[tuple[str, nn.Module, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor] | None]]:
    """Yields the published neurons: the suite's, snnTorch's stepped by hand, SpikingJelly's if it is installed."""
    fsddim = SpikingNeuron(beta=0.8, detach_reset=True, fire_at_threshold=False, spike_grad="triangle")
    hard = {"reset_mechanism": "zero", "reset_delay": False}
    yield "IF", integrate_and_fire(), _step(snn.Leaky(1.0, spike_grad=surrogate.atan(2.0), **hard)), _jelly("IFNode")
    yield (
        "LIF",
        leaky_integrate_and_fire(),
        _step(snn.Leaky(0.5, spike_grad=surrogate.atan(2.0), **hard), input_scale=0.5),
        _jelly("LIFNode", tau=2.0),
    )
    yield (
        "FSDDIM's LIF",
        fsddim,
        _step(snn.Leaky(0.8, spike_grad=triangle(), **hard)),
        _jelly("LIFNode", tau=5.0, decay_input=False, detach_reset=True),
    )


def _step(leaky: nn.Module, input_scale: float = 1.0) -> Callable[[Tensor], Tensor]:
    def layer(x: Tensor) -> Tensor:
        mem = torch.zeros_like(x[0])
        spikes = []
        for x_k in x:
            spike, mem = leaky(x_k * input_scale if input_scale != 1 else x_k, mem)
            spikes.append(spike)
        return torch.stack(spikes)

    return layer


def _jelly(kind: str, **options: Any) -> Callable[[Tensor], Tensor] | None:
    try:
        from spikingjelly.activation_based import functional, neuron
        from spikingjelly.activation_based import surrogate as theirs
    except ImportError:
        return None
    node = getattr(neuron, kind)(surrogate_function=theirs.ATan(), step_mode="m", **options)

    def layer(x: Tensor) -> Tensor:
        functional.reset_net(node)
        return cast(Tensor, node(x))

    return layer


# Training and denoising steps


class _Clock(Callback):
    """Times training steps without their loader, in turn with their floor, and counts the memory that one step saves.

    The first step is there to note the products, the last one for the memory.
    """

    def __init__(self, timed: int) -> None:
        self.seconds: dict[int, list[float]] = {}
        self.floors: dict[int, list[float]] = {}
        self.saved: dict[int, _Saved] = {}
        self._timed = timed
        self._watching = ExitStack()
        self._products = Products()
        self._floor: Callable[[], None] | None = None
        self._start = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Starts the clock, or what else this step is for."""
        if batch_idx == 0:
            self._products, self._floor = self._watching.enter_context(Products()), None
        elif batch_idx > self._timed:
            saved = self.saved[trainer.current_epoch] = _Saved(pl_module)
            self._watching.enter_context(saved_tensors_hooks(saved.keep, lambda tensor: tensor))
        wait(pl_module.device)
        self._start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stops the clock, and times the floor."""
        device = pl_module.device
        wait(device)
        seconds = time.perf_counter() - self._start
        self._watching.close()
        if 0 < batch_idx <= self._timed:
            self._floor = self._floor or self._products.work()
            floor = median_seconds(self._floor, 1, device, warm_up=0, calls=queued(device))
            self.seconds.setdefault(trainer.current_epoch, []).append(seconds)
            self.floors.setdefault(trainer.current_epoch, []).append(floor)

    def median(self, epoch: int = 0, warm_up: int = WARM_UP) -> tuple[float, float]:
        """Returns the median times of the steps of an epoch, and of their floor, after a warm-up."""
        seconds, floor = (statistics.median(times[epoch][warm_up:]) for times in (self.seconds, self.floors))
        return seconds, floor


class _Saved:
    """Bytes that the forward pass keeps for the backward pass, without the parameters.

    `with_small_spikes` counts a byte for each element of what is 0 or 1 throughout.
    """

    def __init__(self, network: nn.Module) -> None:
        self._seen = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
        self.bytes = self.with_small_spikes = 0

    def keep(self, tensor: Tensor) -> Tensor:
        """Counts the memory of a tensor once."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            binary = bool(((tensor == 0) | (tensor == 1)).all())
            self.bytes += storage.nbytes()
            self.with_small_spikes += storage.nbytes() // tensor.element_size() if binary else storage.nbytes()
        return tensor


def measure_steps(
    configs: Sequence[str], batch_size: int, precision: str, device: torch.device, repetitions: int
) -> Rows:
    """Times the training and the denoising step of configurations, and the floor of each step.

    The floor is the time of the step's convolutions and matrix products alone, of the same shapes, dtypes and layouts.
    Steps and floors take turns, so that what slows the machine slows them alike.
    What a training step saves is compared with plain autograd of neurons stepped by hand, whose spikes take a byte.
    """
    rows = []
    for name in configs:
        cli = _build(name)
        system, image_shape = cast(DiffusionSystem, cli.model), cli.datamodule.image_shape
        stepped = copy.deepcopy(system)
        for module in stepped.modules():
            if isinstance(module, SpikingNeuron):
                module.forward = module.stepwise  # type: ignore[method-assign]
        clip = cli.trainer.gradient_clip_val
        clock = _train(system, image_shape, batch_size, WARM_UP + repetitions, precision, clip)
        plain = _train(stepped, image_shape, batch_size, 0, precision, clip)
        for stage in clock.seconds:
            step = f"training, stage {stage + 1}" if len(clock.seconds) > 1 else "training"
            saved, most = clock.saved[stage].bytes, plain.saved[stage].with_small_spikes
            memory = {"saved MiB": saved / 2**20, "of plain autograd": f"{saved / most:.2f}"}
            rows.append(_row(name, step, *clock.median(stage)) | memory)
        dropout = any(isinstance(module, nn.Dropout) and module.p > 0 for module in system.modules())
        if device.type == "cuda" and system.automatic_optimization and not dropout:
            warm_up = TrainingReplay.WARM_UP + 2
            clock = _train(system, image_shape, batch_size, warm_up + repetitions, precision, clip, True)
            times = clock.median(warm_up=warm_up)
            rows.append(_row(name, "training, in graphs", *times) | {"saved MiB": "", "of plain autograd": ""})
        times = _denoising(system.to(device).eval(), image_shape, batch_size, precision, repetitions)
        rows.append(_row(name, "denoising", *times) | {"saved MiB": "", "of plain autograd": ""})
    return rows


def _denoising(
    system: DiffusionSystem, image_shape: tuple[int, int, int], batch_size: int, precision: str, repetitions: int
) -> tuple[float, float]:
    """Returns the time of one step of the sampler and its floor."""

    def endless() -> Iterator[Tensor]:
        while True:
            chain = system.trajectory(torch.arange(batch_size), image_shape)
            next(chain)  # noise
            yield from chain

    chain = endless()
    with torch.no_grad(), _autocast(precision, system.device):
        next(chain)  # to warm up
        with Products() as products:
            next(chain)
        works = {"step": lambda: next(chain), "floor": products.work()}
        seconds = medians(works, repetitions, system.device, WARM_UP, calls=queued(system.device))
    return seconds["step"], seconds["floor"]


def _row(name: str, step: str, seconds: float, floor: float) -> dict[str, Any]:
    return {"config": name, "step": step, "ms": 1e3 * seconds, "floor ms": 1e3 * floor, "over floor": seconds / floor}


def _build(name: str, *options: str) -> Rehearsal:
    """Builds what a configuration describes; of Spiking-Diffusion both stages with an epoch each."""
    if "spiking_diffusion" in name:
        options += ("--model.autoencoder_epochs=1", "--model.denoiser_epochs=1", "--model.data_variance=0.1")
    args = ["fit", f"--config={_config(name)}", "--trainer.logger=false", *options]
    return cast(Rehearsal, run_stage(args, Rehearsal))


def _train(
    system: DiffusionSystem,
    image_shape: tuple[int, int, int],
    batch_size: int,
    timed: int,
    precision: Any,
    clip: float | None,
    replayed: bool = False,
) -> _Clock:
    """Trains on random images, in CUDA graphs if wanted."""
    clock = _Clock(timed)
    images = list(torch.rand((timed + 2) * batch_size, *image_shape) * 2 - 1)
    trainer = Trainer(
        max_epochs=2 if system.trains_in_parts else 1,
        devices=1,
        precision=precision,
        gradient_clip_val=clip,
        callbacks=[clock, TrainingGraphs(replayed)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # random images collapse a codebook
        trainer.fit(system, DataLoader(images, batch_size))  # type: ignore[arg-type]
    return clock


def _autocast(precision: str, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16-mixed")


# Sampling


def measure_sampling(precision: str, device: torch.device, repetitions: int, output: Path) -> dict[str, Rows]:
    """Times the small track's samplers: images/s of each method, of each solver, and growth with B, T and NFE.

    Growth is a straight line where its R² is 1; it is drawn in sampling.png. Batches are of 2 to 16 images, and on
    GPUs, which these would not fill, of 32 to 256.
    """
    times = 1 if device.type == "cpu" else 16

    def seconds(name: str, batch: int, nfe: int, *options: str) -> float:
        cli = _build(f"small/{name}", f"--model.num_inference_steps={nfe}", *options)
        system = cast(DiffusionSystem, cli.model).to(device).eval()
        sample = partial(system.sample, torch.arange(batch), cli.datamodule.image_shape)
        with _autocast(precision, device):
            return median_seconds(sample, repetitions, device)

    sampling, growth = [], []
    for name in SMALL:
        sampling.append({"config": name, "solver": _build(f"small/{name}").model.solver})
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
    """Fits a straight line: its intercept and slope in milliseconds, and how well it fits."""
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


# Data, metrics and the start


def measure_data(repetitions: int) -> Rows:
    """Times the loader against the training step, and the metrics against the sampling, of the quickstart's network.

    It is the smallest there is; with a larger one either share is smaller. The metrics are those of the second test,
    which finds the statistics of the real images in the cache.
    """
    with TemporaryDirectory() as folder, redirect_stdout(StringIO()):
        place = (f"--trainer.default_root_dir={folder}", "--trainer.enable_progress_bar=false")
        cli = run_stage(["fit", *QUICKSTART, *place, "--trainer.max_steps=1"])
        data = cli.datamodule
        clock = _train(cli.model, data.image_shape, data.batch_size, WARM_UP + repetitions, "32-true", None)
        step, _ = clock.median()
        loader = data.train_dataloader()
        batch = median_seconds(lambda: deque(loader, maxlen=0), repetitions, torch.device("cpu")) / len(loader)
        for _ in range(2):
            run_stage(["test", *place, "--draft", "--data.num_samples=1000"])
        record = read_record(find_records([Path(folder)])[-1])
    whole, sampling = record.wall_time_seconds, 1000 / cast(float, record.cost.images_per_second)
    shares = {
        "batch of the loader, of a training step": (batch, step),
        "metrics, of a test of 1,000 images": (whole - sampling, whole),
    }
    return [{"what": k, "ms": 1e3 * part, "of ms": 1e3 * all, "share": part / all} for k, (part, all) in shares.items()]


def measure_start(repetitions: int) -> Rows:
    """Times commands as a whole, Python's start included: the help, and a training that ends after its first step."""
    with TemporaryDirectory() as folder:
        commands = {
            "--help": ("--help",),
            "fit, one step": ("fit", *QUICKSTART, f"--trainer.default_root_dir={folder}", "--trainer.max_steps=1"),
        }
        rows = []
        for name, words in commands.items():
            command = [sys.executable, "-m", "benchmark", *words]
            run = partial(subprocess.run, command, check=True, capture_output=True)
            seconds = median_seconds(run, min(repetitions, 3), torch.device("cpu"), warm_up=0)
            rows.append({"command": name, "s": seconds})
    return rows
