"""`python -m benchmark ablate-sdit`: trains and tests SDiT or SpikingRWKV and its ablations with several seeds."""

from __future__ import annotations

import logging
import shlex
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from rich.table import Table

from benchmark.command_line import fill_in_newest_run, pass_through_parser
from benchmark.configs import find_config
from benchmark.runs import RUNS
from benchmark.stages import DryRun, run_stage
from leaderboard.files import free_path, write_atomic
from leaderboard.record.entries import headline
from leaderboard.record.records import Record, find_records, read_record
from leaderboard.reports.cells import plus_minus
from leaderboard.reports.methods import method_name
from leaderboard.reports.statistics import half_width
from leaderboard.reports.terminal import terminal

VARIANTS = {
    "full": (),
    "no reconstruction": ("--model.reconstruction=false",),
    "softmax attention": ("--model.attention=softmax",),
    "spiking embedding": ("--model.embedding=spiking",),
}
"""Variants, and the options of `fit` that define each, the same for SDiT and SpikingRWKV."""
TRAINING_TIME = "training_seconds.txt"
"""File in the folder of each run with the seconds that its training took."""


def ablate_sdit(args: Sequence[str]) -> None:
    """Trains and tests every variant with every seed; prints and plots the metric with its 95 % interval.

    Args:
        args: `--seeds`, `--variants`, `--config`, `--output`, `--draft`, and any option of `fit`.

    Raises:
        ValueError: If the folder contains runs made with other options, or the test would deviate from its protocol.
    """
    parser = pass_through_parser(
        "ablate-sdit",
        "Trains and tests SDiT, or the suite's fully spiking design, and its ablations, with several seeds; each is a "
        "variant on the leaderboard. All other options are passed on to `fit`. Started again, it skips finished runs.",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of training")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="VARIANT")
    parser.add_argument(
        "--config", type=Path, default=Path("configs/sdit_digits.yaml"), help="config of the full SDiT or SpikingRWKV"
    )
    parser.add_argument(
        "--output", type=Path, help=f"folder of the runs and the plot; {RUNS}/ablate-sdit/CONFIG if not given"
    )
    parser.add_argument("--draft", action="store_true", help="allow fewer images than the protocol's; never ranked")
    options, rest = parser.parse_known_args(args)
    options.config = find_config(options.config)
    options.output = options.output or RUNS / "ablate-sdit" / options.config.stem
    draft = ["--draft"] * options.draft
    run_stage(["test", f"--config={options.config}", *rest, *draft], DryRun)  # fails now, not after training
    _check_same_options(
        options.output, f"# with {shlex.join([*rest, *draft]) or 'no other option'}\n{options.config.read_text()}"
    )
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # the same messages in each run

    console = terminal()
    records: dict[str, list[Record]] = {name: [] for name in options.variants}
    seconds: dict[str, list[float]] = {name: [] for name in options.variants}
    for seed in options.seeds:  # outer loop over seeds: a stopped ablation still has comparable runs
        for name in options.variants:
            folder = options.output / f"{name.replace(' ', '-')}-seed{seed}"
            if not find_records([folder]):
                console.print(f"{name}, seed {seed}", style="bold")
                in_folder = f"--trainer.default_root_dir={folder}"
                fit = [f"--config={options.config}", *rest, *VARIANTS[name], f"--seed_everything={seed}", in_folder]
                if not (folder / TRAINING_TIME).is_file():  # else only the test is missing
                    started = time.perf_counter()
                    run_stage(["fit", *fit])
                    write_atomic(folder / TRAINING_TIME, f"{time.perf_counter() - started:.1f}\n")
                run_stage(fill_in_newest_run(["test", in_folder, f"--evaluation.variant={name}, seed {seed}", *draft]))
            records[name].append(read_record(find_records([folder])[-1]))
            seconds[name].append(float((folder / TRAINING_TIME).read_text()))
    plot = free_path(options.output / "ablations.png")
    _plot(records).savefig(plot, dpi=150)
    console.print(_table(records, seconds))
    console.print(f"plot: {plot}", soft_wrap=True, highlight=False)


def _check_same_options(folder: Path, made_with: str) -> None:
    """Writes the options of the runs into their folder; refuses other options than those already there."""
    path = folder / "made_with.yaml"
    if path.is_file() and path.read_text() != made_with:
        raise ValueError(
            f"{folder} contains runs made with other options or another config (see {path.name} there); give the "
            "same options, or another --output"
        )
    write_atomic(path, made_with)


def _values(records: Sequence[Record]) -> list[float]:
    return [headline(record)[1].value for record in records]


def _spread(values: Sequence[float]) -> str:
    """Formats the mean and half of its 95 % interval over the seeds."""
    return plus_minus(statistics.mean(values), half_width(values))


def _table(records: Mapping[str, Sequence[Record]], seconds: Mapping[str, Sequence[float]]) -> Table:
    key, first = headline(next(iter(records.values()))[0])[0], next(iter(records))
    seeds, method = len(records[first]), method_name(records[first][0])
    table = Table(title=f"{method}, mean ± half of its 95 % interval over {seeds} seeds", title_justify="left")
    for column in (
        "variant",
        key,
        f"against\n{first}",
        "firing\nrate",
        "arithmetic\nmJ",
        "training\ns",
        "images\n/s",
        "M\nparams",
    ):
        table.add_column(column, justify="left" if column == "variant" else "right", no_wrap=column == "variant")
    for name, runs in records.items():
        pairs = zip(_values(runs), _values(records[first]), strict=True)
        cost = [run.counted_cost for run in runs]
        table.add_row(
            name,
            _spread(_values(runs)),
            "-" if name == first else _spread([value - full for value, full in pairs]),
            f"{statistics.mean(c.firing_rate or 0.0 for c in cost):.3f}",
            f"{statistics.mean(c.energy_strict_mj for c in cost):.3g}",
            f"{statistics.mean(seconds[name]):.3g}",
            f"{statistics.mean(c.images_per_second or 0.0 for c in cost):.3g}",
            f"{cost[0].parameters / 1e6:.3g}",
        )
    return table


def _plot(records: Mapping[str, Sequence[Record]]) -> Figure:
    """Plots every run as a dot next to the mean of its variant and its 95 % interval."""
    figure = Figure(figsize=(1.2 + 1.5 * len(records), 3.8), layout="constrained")
    axes = figure.subplots()
    for i, runs in enumerate(records.values()):
        values = _values(runs)
        spread = half_width(values) or 0.0
        axes.plot([i - 0.12] * len(values), values, "o", color="tab:grey", alpha=0.7, label=None if i else "one seed")
        axes.errorbar(
            i + 0.12,
            statistics.mean(values),
            spread,
            fmt="o",
            color="tab:blue",
            capsize=4,
            label=None if i else "mean and 95 % interval",
        )
    axes.set_xticks(range(len(records)), [name.replace(" ", "\n") for name in records])
    axes.set_xlim(-0.6, len(records) - 0.4)
    key = headline(next(iter(records.values()))[0])[0]
    axes.set(ylabel=f"{key} (lower is better)", ylim=(0, 1.1 * axes.get_ylim()[1]))
    axes.legend(frameon=False, loc="lower right")
    return figure
