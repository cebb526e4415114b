"""`python -m benchmark speed`: speed of the suite as ratios within one run, on the GPU if there is one."""

from __future__ import annotations

import datetime
import json
import logging
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, cast

import torch
from rich.table import Table

from benchmark.runs import RUNS
from benchmark.speed.neurons import measure_neurons
from benchmark.speed.sampling import measure_sampling
from benchmark.speed.steps import measure_steps, train_on_random_images
from benchmark.speed.timing import WARM_UP, Rows, config_path, median_seconds
from benchmark.stages import fastest_precision, run_stage
from leaderboard.files import free_path, write_atomic
from leaderboard.record.records import find_records, read_record
from leaderboard.reports.terminal import terminal

Part = Literal["neuron", "step", "sampling", "data", "start"]
PARTS: tuple[Part, ...] = ("neuron", "step", "sampling", "data", "start")
PAPER_SIZE = (
    "sddpm_cifar10",
    "sdm_cifar10",
    "fsddim_cifar10",
    "sdit_mnist",
    "spiking_rwkv_mnist",
    "spiking_diffusion_mnist",
    "ddpm_cifar10",
)
"""Configurations with networks and images of the size in the paper."""
QUICKSTART = ("--config=configs/quickstart.yaml", "--monitor.every_n_epochs=0", "--trainer.enable_model_summary=false")


def speed(
    parts: Sequence[Part] = PARTS,
    configs: Sequence[str] = PAPER_SIZE,
    batch_size: int | None = None,
    precision: Literal["auto", "32-true", "bf16-mixed"] = "auto",
    repetitions: int = 5,
    output: Path = RUNS / "speed",
) -> None:
    """Measures neurons, training and denoising steps, sampling, data loading and start-up, each against a reference.

    Every number is the median of several repetitions after a warm-up. OMP_NUM_THREADS sets the number of threads.

    Args:
        parts: Parts to measure: neuron, step, sampling, data, start.
        configs: Configurations in configs/ whose steps are measured, at their full size.
        batch_size: Images of a training or denoising step; the default is 4 on CPUs and 128 on GPUs.
        precision: Precision of steps and sampling; auto uses bfloat16 if the hardware supports it natively.
        repetitions: Timed repetitions.
        output: Folder for speed.json and sampling.png.

    Raises:
        ValueError: If a number is below 1, or a part or configuration is unknown.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch_size = {"cpu": 4, "cuda": 128}[device.type] if batch_size is None else batch_size
    if min(batch_size, repetitions) < 1:
        raise ValueError(f"batch_size={batch_size}, repetitions={repetitions}; use 1 or more")
    if unknown := [*set(parts) - set(PARTS), *(name for name in configs if not config_path(name).is_file())]:
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
    if any((output / name).exists() for name in ("speed.json", "sampling.png")):
        output = free_path(output)
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


def _table(title: str, rows: Rows) -> Table:
    table = Table(title=title, title_justify="left")
    columns = [column for column in rows[0] if column != "points"]  # plotted
    for column in columns:
        table.add_column(column, justify="right" if isinstance(rows[0][column], float | int) else "left")
    for row in rows:
        table.add_row(*(f"{row[c]:.3g}" if isinstance(row[c], float) else str(row[c]) for c in columns))
    return table


def measure_data(repetitions: int) -> Rows:
    """Times the loader as a share of a training step, and the metrics as a share of a test, of the quickstart.

    Its network is the smallest; both shares shrink with larger ones. The metrics are timed in a second test, which
    finds the statistics of the real images in the cache.
    """
    with TemporaryDirectory() as folder, redirect_stdout(StringIO()):
        run_options = (f"--trainer.default_root_dir={folder}", "--trainer.enable_progress_bar=false")
        cli = run_stage(["fit", *QUICKSTART, *run_options, "--trainer.max_steps=1"])
        data = cli.datamodule
        clock = train_on_random_images(
            cli.model, data.image_shape, data.batch_size, WARM_UP + repetitions, "32-true", None
        )
        step, _ = clock.median()
        loader = data.train_dataloader()
        batch = median_seconds(lambda: deque(loader, maxlen=0), repetitions, torch.device("cpu")) / len(loader)
        for _ in range(2):
            run_stage(["test", *run_options, "--draft", "--data.num_samples=1000"])
        record = read_record(find_records([Path(folder)])[-1])
    whole, sampling = record.wall_time_seconds, 1000 / cast(float, record.counted_cost.images_per_second)
    shares = {
        "batch of the loader, of a training step": (batch, step),
        "metrics, of a test of 1,000 images": (whole - sampling, whole),
    }
    return [
        {"what": name, "ms": 1e3 * part, "of ms": 1e3 * total, "share": part / total}
        for name, (part, total) in shares.items()
    ]


def measure_start(repetitions: int) -> Rows:
    """Times whole commands, including the start of Python: the help, and a training of one step."""
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
