"""`python -m benchmark sweep-threshold` and `sweep-solvers`: test one checkpoint with a range of settings."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter
from rich.table import Table

from benchmark.command_line import fill_in_newest_run, pass_through_parser
from benchmark.stages import run_stage
from leaderboard.evaluation.callback import Evaluation
from leaderboard.files import free_path, refuse_existing
from leaderboard.record.entries import headline
from leaderboard.record.records import Record
from leaderboard.reports.cells import evaluation_cell
from leaderboard.reports.statistics import OF_AN_EVALUATION
from leaderboard.reports.terminal import terminal
from systems.checkpoints import load_checkpoint

PAPER_THRESHOLDS = (0.997, 0.998, 0.999, 1.0, 1.001, 1.002, 1.003)
"""Values of SDM's Table 3 (arXiv 2408.16467)."""


class Solver(NamedTuple):
    """Options of `test` that select a solver, and its network evaluations in addition to `num_inference_steps`."""

    options: tuple[str, ...]
    extra: int = 0


SOLVERS = {
    "ddpm": Solver(("--model.scheduler=DDPMScheduler", "--model.scheduler.timestep_spacing=trailing")),
    "ddim": Solver(("--model.scheduler=StridedDDIMScheduler",)),
    "dpm-solver": Solver(("--model.scheduler=DPMSolverScheduler",)),
    "dpm-solver++": Solver(("--model.scheduler=DPMSolverMultistepScheduler",)),
    "analytic-ddpm": Solver(("--model.scheduler=AnalyticDPMScheduler", "--model.scheduler.form=ddpm"), extra=1),
    "analytic-ddim": Solver(("--model.scheduler=AnalyticDPMScheduler", "--model.scheduler.form=ddim"), extra=1),
}


def sweep_threshold(args: Sequence[str]) -> None:
    """Tests one checkpoint at several firing thresholds; prints and plots metric, firing rate and energy.

    Args:
        args: `--thresholds`, `--output`, and any option of `test`.
    """
    parser = _parser(
        "sweep-threshold", "Tests one checkpoint at several firing thresholds (threshold guidance of SDM)."
    )
    parser.add_argument("--thresholds", type=_positive(float), nargs="+", default=PAPER_THRESHOLDS)
    options, rest = _parse(parser, args)
    run = _Run(rest)
    records = [
        run.test(f"--model.threshold={threshold}", f"--evaluation.variant=threshold {threshold:g}")
        for threshold in options.thresholds
    ]
    key = headline(records[0])[0]
    table = Table(
        "threshold", key, "firing rate", "G SOPs", "arithmetic mJ", title="threshold guidance", title_justify="left"
    )
    for threshold, record in zip(options.thresholds, records, strict=True):
        cost = record.counted_cost
        rate = "-" if cost.firing_rate is None else f"{cost.firing_rate:.4f}"
        sops, energy = f"{cost.sops / 1e9:.4g}", f"{cost.energy_strict_mj:.4g}"
        table.add_row(f"{threshold:g}", _distance(record), rate, sops, energy)
    _finish(
        table, _plot_thresholds(options.thresholds, records), options.output or free_path(run.folder / "threshold.png")
    )


def sweep_solvers(args: Sequence[str]) -> None:
    """Tests one checkpoint with several solvers and numbers of network evaluations; prints and plots the metric.

    Args:
        args: `--solvers`, `--nfe`, `--output`, and any option of `test`.
    """
    parser = _parser("sweep-solvers", "Tests one checkpoint with several solvers at equal network evaluations (NFE).")
    parser.add_argument("--solvers", nargs="+", choices=SOLVERS, default=list(SOLVERS))
    parser.add_argument("--nfe", type=_positive(int), nargs="+", default=[10, 20, 50, 100], help="network evaluations")
    options, rest = _parse(parser, args)
    run = _Run(rest)
    if any("analytic" in name for name in options.solvers):
        _require_gamma(run.args)
    results: dict[str, list[Record]] = {}
    for name in options.solvers:
        solver = SOLVERS[name]
        for nfe in options.nfe:
            steps = f"--model.num_inference_steps={nfe - solver.extra}"
            results.setdefault(name, []).append(
                run.test(*solver.options, "--model.eta=0", steps, f"--evaluation.variant={name}, {nfe} NFE")
            )
    key = headline(results[options.solvers[0]][0])[0]
    table = Table("solver", *(f"NFE {nfe}" for nfe in options.nfe), title=key, title_justify="left")
    for name, records in results.items():
        table.add_row(name, *map(_distance, records))
    _finish(table, _plot_solvers(results), options.output or free_path(run.folder / "solvers.png"))


class _Run:
    """Tests one checkpoint with different options."""

    def __init__(self, rest: list[str]) -> None:
        self.args = fill_in_newest_run(["test", *rest])
        self.folder = Path()
        logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # the same messages at each point

    def test(self, *options: str) -> Record:
        cli = run_stage([*self.args, *options])
        self.folder = Path(str(cli.trainer.log_dir)) / "plots"
        (record,) = (callback.record for callback in _evaluations(cli.trainer.callbacks))  # type: ignore[attr-defined]
        assert record is not None, "a test without a record"
        return record


def _require_gamma(args: Sequence[str]) -> None:
    """Checks that Gamma of Analytic-DPM is available, before the other solvers run.

    Raises:
        ValueError: If neither the checkpoint nor the options contain it.
    """
    checkpoint = args[args.index("--ckpt_path") + 1] if "--ckpt_path" in args else None
    given = any(arg.startswith("--model.scheduler.gamma") for arg in args)
    if checkpoint is not None and not given and "gamma" not in load_checkpoint(checkpoint):
        raise ValueError(
            f"{checkpoint} contains no Gamma for Analytic-DPM; add it with `python -m benchmark estimate-gamma`, or "
            "choose other solvers: --solvers ddpm ddim dpm-solver++"
        )


def _evaluations(callbacks: Iterable[Any]) -> list[Evaluation]:
    return [callback for callback in callbacks if isinstance(callback, Evaluation)]


def _parser(command: str, description: str) -> argparse.ArgumentParser:
    parser = pass_through_parser(
        command,
        f"{description} The newest run is tested unless --ckpt_path names another; all other options are passed on to "
        "`test`. Each point of the sweep writes a record. Fewer images than the protocol requires need --draft.",
    )
    parser.add_argument("--output", type=Path, help="file of the plot (.png); by default in plots/ of the run folder")
    return parser


def _parse(parser: argparse.ArgumentParser, args: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Returns the options of a sweep and of `test`.

    Raises:
        FileExistsError: If the file of the plot exists, before the first test.
    """
    options, rest = parser.parse_known_args(args)
    if options.output is not None:
        refuse_existing(options.output, option="--output")
    return options, rest


def _positive(kind: type) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        if not (value := kind(text)) > 0:
            raise argparse.ArgumentTypeError(f"{text} is not above 0")
        return value

    parse.__name__ = kind.__name__
    return parse


def _distance(record: Record) -> str:
    return str(evaluation_cell(*headline(record))._replace(note=""))


def _finish(table: Table, figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    console = terminal()
    console.print(table)
    console.print(f"plot: {path}", soft_wrap=True, highlight=False)


def _plot_thresholds(thresholds: Sequence[float], records: Sequence[Record]) -> Figure:
    order = sorted(range(len(records)), key=lambda i: thresholds[i])
    x, records = [thresholds[i] for i in order], [records[i] for i in order]
    key, values = headline(records[0])[0], [headline(record)[1] for record in records]
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    quality, rate = figure.subplots(1, 2)
    quality.errorbar(
        x, [v.value for v in values], [OF_AN_EVALUATION * v.uncertainty for v in values], marker="o", capsize=3
    )
    quality.set(xlabel="firing threshold", ylabel=f"{key} (lower is better)")
    rate.plot(x, [record.counted_cost.firing_rate or 0.0 for record in records], marker="o", color="tab:green")
    rate.set(xlabel="firing threshold", ylabel="firing rate")
    for axes in (quality, rate):
        axes.axvline(1, color="grey", linewidth=0.8, linestyle=":")
        axes.ticklabel_format(useOffset=False)
        axes.locator_params(axis="x", nbins=6)
    return figure


def _plot_solvers(results: dict[str, list[Record]]) -> Figure:
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    for name, records in results.items():
        values = [headline(record)[1] for record in records]
        nfe = [record.counted_cost.nfe for record in records]
        axes.errorbar(
            nfe,
            [v.value for v in values],
            [OF_AN_EVALUATION * v.uncertainty for v in values],
            marker="o",
            capsize=3,
            label=name,
        )
    ticks = sorted({record.counted_cost.nfe for records in results.values() for record in records})
    axes.set_xscale("log")
    axes.set_xticks(ticks, [str(nfe) for nfe in ticks])
    axes.minorticks_off()
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
    key = headline(next(iter(results.values()))[0])[0]
    axes.set(xlabel="network evaluations per image (NFE)", ylabel=f"{key} (lower is better)")
    axes.legend(frameon=False)
    return figure
