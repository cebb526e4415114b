"""`python -m benchmark regress`: trains a small network of every method and compares its distance with a baseline."""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import time
import traceback
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import closing, contextmanager, redirect_stderr, redirect_stdout
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from benchmark.command_line import fill_in_newest_run, pass_through_parser
from benchmark.process import terminate_with_parent
from benchmark.runs import find_checkpoint, newest_run
from benchmark.stages import run_stage
from leaderboard.record.entries import headline
from leaderboard.record.records import Record, find_records, read_record
from leaderboard.regression import (
    BASELINES,
    FEWEST_SEEDS,
    FLOOR,
    SPREADS,
    Baseline,
    Verdict,
    read_baseline,
    write_baseline,
)
from leaderboard.reports.terminal import terminal

CONFIGS = Path(__file__).parents[2] / "configs" / "regress"

METHODS = {
    "sddpm": None,
    "sdm": "sddpm",
    "fsddim": None,
    "spiking_diffusion": None,
    "sdit": None,
    "spiking_rwkv": None,
    "ddpm": None,
    "ann_snn": "ddpm",
}
"""Methods, each with the method from whose network it is fine-tuned."""

BASELINE_SEEDS = (0, 1, 2, 3)


class Job(NamedTuple):
    """One network trained with one seed, and the methods that are fine-tuned from it."""

    base: str
    methods: tuple[str, ...]
    seed: int
    folder: Path
    options: tuple[str, ...]


class Outcome(NamedTuple):
    """Result of one method with one seed: a record, or an error message."""

    method: str
    seed: int
    record: Record | None
    error: str = ""


def regress(args: Sequence[str]) -> None:
    """Trains and tests every method and compares it with its baseline, or measures new baselines.

    Args:
        args: `--methods`, `--seeds`, `--update`, `--baselines`, `--output`, `--workers`, and any option of `fit`.

    Raises:
        SystemExit: With code 1 if a method is worse than its baseline, failed or cannot be compared.
        FileNotFoundError: If there is no baseline.
        ValueError: If a new baseline is requested with too few seeds.
    """
    options, rest = _parser().parse_known_args(args)
    seeds = options.seeds or (BASELINE_SEEDS if options.update else (0,))
    if options.update and len(set(seeds)) < FEWEST_SEEDS:
        raise ValueError(
            f"--update --seeds {' '.join(map(str, seeds))}: a standard deviation needs {FEWEST_SEEDS} seeds or more"
        )
    baselines = {} if options.update else {m: read_baseline(options.baselines / m) for m in options.methods}
    console, started = terminal(), time.perf_counter()
    folder = options.output / f"{datetime.now():%Y%m%d-%H%M%S}"
    outcomes = []
    with closing(_measure_all(list(_jobs(options.methods, seeds, folder, rest)), options.workers)) as measured:
        for outcome in measured:
            outcomes.append(outcome)
            result = outcome.error if outcome.record is None else "{} {:.2f}".format(*_value(outcome.record))
            console.print(f"{outcome.method}, seed {outcome.seed}: {result}", markup=False, highlight=False)
    by_method = {
        m: sorted((o for o in outcomes if o.method == m), key=lambda outcome: outcome.seed) for m in options.methods
    }
    if options.update:
        failed = _update(by_method, options.baselines, console)
    else:
        table, failed = compare(by_method, baselines)
        console.print(table)
    seconds = time.perf_counter() - started
    console.print(f"{seconds / 60:.1f} minutes; runs and logs: {folder}", soft_wrap=True, highlight=False)
    if failed:
        raise SystemExit(1)


def compare(outcomes: dict[str, list[Outcome]], baselines: dict[str, Baseline]) -> tuple[Table, bool]:
    """Compares the outcomes of each method with its baseline.

    Returns:
        A table, and whether the check failed.
    """
    table = Table(
        title="regression check",
        title_justify="left",
        caption=f"Worse: above the mean by more than {SPREADS:g} sd and by more than {FLOOR:.0%}. In brackets: "
        "difference to the baseline's record of the same seed.",
        caption_justify="left",
    )
    for column in ("method", "distance", "baseline", "limit", "seed", "measured", "verdict"):
        table.add_column(column, justify="left" if column in ("method", "verdict") else "right")
    failed = False
    for method, baseline in baselines.items():
        limit = f"{baseline.mean + baseline.tolerance:.2f}"
        cells = (method, headline(baseline.records[0])[0], f"{baseline.mean:.2f} (sd {baseline.spread:.2f})", limit)
        for outcome in outcomes[method]:
            measured, verdict, bad = _judge(outcome, baseline)
            failed |= bad
            style = "red" if bad else "green" if verdict == Verdict.OK.value else "yellow"
            table.add_row(*cells, str(outcome.seed), measured, f"[{style}]{verdict}")
    return table, failed


def _judge(outcome: Outcome, baseline: Baseline) -> tuple[str, str, bool]:
    """Returns the formatted distance, the verdict, and whether the check fails."""
    if outcome.record is None:
        return "-", outcome.error, True
    if differences := baseline.differences(outcome.record):
        return "-", f"not comparable: {'; '.join(differences)}; measure a new baseline with --update", True
    if miscounts := baseline.miscounts(outcome.record):
        return "-", f"the same network has another cost: {'; '.join(miscounts)}", True
    value, stored = _value(outcome.record)[1], baseline.same_seed(outcome.record)
    change = "" if stored is None else " (=)" if value == stored else f" ({value - stored:+.2f})"
    verdict = baseline.judge(value)
    return f"{value:.2f}{change}", verdict.value, verdict is Verdict.WORSE


def _update(outcomes: dict[str, list[Outcome]], baselines: Path, console: Console) -> bool:
    """Writes the baselines of methods for which all seeds succeeded; returns whether any failed."""
    table = Table(title="new baselines", title_justify="left")
    for column in ("method", "distance", "mean", "limit", "seeds"):
        table.add_column(column, justify="left" if column == "method" else "right")
    failed = False
    for method, results in outcomes.items():
        records = [outcome.record for outcome in results if outcome.record is not None]
        if len(records) < len(results):
            failed = True
            table.add_row(method, "-", "[red]a seed failed: the old baseline is kept", "-", "-")
            continue
        if any(record.code.git_dirty for record in records):
            console.print(f"{method}: measured with uncommitted changes", style="yellow")
        write_baseline(records, baselines / method)
        baseline = Baseline(records)
        values = ", ".join(f"{value:.2f}" for value in baseline.values)
        spread = f"{baseline.mean:.2f} (sd {baseline.spread:.2f})"
        table.add_row(method, _value(records[0])[0], spread, f"{baseline.mean + baseline.tolerance:.2f}", values)
    console.print(table)
    return failed


def _jobs(methods: Sequence[str], seeds: Sequence[int], folder: Path, options: Sequence[str]) -> Iterator[Job]:
    """Groups the methods that share a network, so that it is trained only once."""
    groups: dict[str, list[str]] = {}
    for method in METHODS:
        if method in methods:
            groups.setdefault(METHODS[method] or method, []).append(method)
    for seed in seeds:
        for base, members in groups.items():
            yield Job(base, tuple(members), seed, folder / f"{base}-seed{seed}", tuple(options))


def _measure_all(jobs: Sequence[Job], workers: int) -> Generator[Outcome]:
    """Runs all jobs, each in its own process, or with one worker one after the other in this process."""
    if workers == 1:
        for job in jobs:
            yield from _measure(job)
        return
    # spawn, since threads do not survive a fork; one task per process, so that jobs do not share compiled code
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        workers, mp_context=context, initializer=terminate_with_parent, initargs=(os.getpid(),), max_tasks_per_child=1
    ) as pool:
        try:
            for done in as_completed([pool.submit(_measure, job) for job in jobs]):
                yield from done.result()
        except BaseException:  # such as Ctrl+C: the pool would wait for its workers and start pending jobs
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in multiprocessing.active_children():
                worker.kill()
            raise


def _measure(job: Job) -> list[Outcome]:
    """Trains and tests the methods of a job; after an error the remaining methods count as failed."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    job.folder.mkdir(parents=True)
    outcomes: dict[str, Outcome] = {}
    base: Path | None = None
    with _one_thread(), (job.folder / "log.txt").open("w") as log, redirect_stdout(log), redirect_stderr(log):
        try:
            for method in dict.fromkeys((job.base, *job.methods)):
                checkpoint = _train(job, method, base)
                base = base or checkpoint
                if method in job.methods:
                    outcomes[method] = Outcome(method, job.seed, _test(job, checkpoint))
        except (Exception, SystemExit) as error:  # any error: finding broken methods is the purpose of this check
            traceback.print_exc()
            message = f"failed, see its log.txt: {type(error).__name__}: {error}"
            outcomes = {m: outcomes.get(m, Outcome(m, job.seed, None, message)) for m in job.methods}
    return list(outcomes.values())


def _train(job: Job, method: str, base: Path | None) -> Path:
    """Trains a method, starting from the checkpoint `base` if given, and returns its last checkpoint."""
    runs = job.folder / method
    start = [] if base is None else [f"--model.init_from={base}"]
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    quiet += ["--trainer.precision=32-true"]  # half precision is not faster at this size
    run = [f"--trainer.default_root_dir={runs}", f"--seed_everything={job.seed}"]
    run_stage(["fit", f"--config={CONFIGS / f'{method}.yaml'}", *quiet, *job.options, *start, *run])
    return find_checkpoint(newest_run(runs))


def _test(job: Job, checkpoint: Path) -> Record:
    """Tests a checkpoint and returns its record."""
    run_stage(fill_in_newest_run(["test", f"--ckpt_path={checkpoint}", f"--evaluation.variant=seed {job.seed}"]))
    return read_record(find_records([checkpoint.parents[1]])[-1])


@contextmanager
def _one_thread() -> Iterator[None]:
    """Computes on one thread: as fast at this size, and sums do not depend on the number of cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _value(record: Record) -> tuple[str, float]:
    key, metric = headline(record)
    return key, metric.value


def _parser() -> argparse.ArgumentParser:
    parser = pass_through_parser(
        "regress",
        "Trains a small network of every method on embedded digits and compares its distance with the stored "
        "baseline: exit code 1 if one is worse, failed or cannot be compared. All other options are passed on to "
        "`fit`.",
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument(
        "--seeds",
        nargs="+",
        type=int,
        help="seeds of training; default: the first of the baseline, all of them with --update",
    )
    parser.add_argument("--update", action="store_true", help="measure new baselines and replace the stored ones")
    parser.add_argument("--baselines", type=Path, default=BASELINES, help="folder of the baselines")
    parser.add_argument("--output", type=Path, default=Path("build/regress"), help="folder of the runs")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1), help="processes at a time")
    return parser
