"""`python -m benchmark matrix --design FILE`: runs a study whose design was fixed beforehand.

A study has three stages. The *search* chooses learning rate and averaging of weights for each method, by validation
loss. The *trainings* use the choice. The *measurements* test their checkpoints. What has been found is written to the
folder of results, which belongs into the repository; files of runs do not. A search, training or measurement whose
results are there is not repeated, on any machine.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import traceback
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import get_args

from filelock import FileLock, Timeout
from rich.table import Table

from benchmark.command_line import pass_through_parser
from benchmark.commands.matrix import State, last_error, parse_pairs
from benchmark.commands.study_jobs import Job, MeasureJob, SearchJob, Stage, TrainJob, append_line
from benchmark.configs import find_config
from benchmark.runs import RUNS
from benchmark.studies import Place, Study, check_unchanged, read_study
from leaderboard.record.entries import RECORDS
from leaderboard.reports.terminal import terminal


def track(args: Sequence[str]) -> None:
    """Runs a study, or prints a command for each pending part of it.

    Several processes may run the same study side by side: each skips what another one is running.

    Args:
        args: Arguments after `matrix`.

    Raises:
        SystemExit: With code 1 if something failed, 130 or 143 if a signal ended it.
        ValueError: If an option or the design is malformed, or the design was changed after its first result.
        FileNotFoundError: If the design, or a configuration that it names, does not exist.
    """
    options = _parser().parse_args(args)
    path = find_config(options.design)
    study = read_study(path)
    _check_names(study, options)
    place = Place(path, study, parse_pairs("--roots", options.roots), options.output, options.results)
    check_unchanged(place)
    jobs = [job for job in _jobs(place) if _is_selected(job, options)]
    pending = [job for job in jobs if not job.is_done]
    if options.print:
        for command in dict.fromkeys(_command(job, options) for job in pending):
            print(command)
        return
    states: dict[str, State] = {job.name: "not begun" if job in pending else "done before" for job in jobs}
    reasons: dict[str, str] = {}
    console = terminal()
    stopped = 0
    for number, job in enumerate(pending, start=1):
        job.lock.parent.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(job.lock, timeout=0):
                if job.is_done:  # by another process
                    states[job.name] = "done before"
                    continue
                if failed := next((needed.name for needed in job.needs if states.get(needed.name) == "failed"), None):
                    states[job.name], reasons[job.name] = "failed", f"needs: {failed}"
                    continue
                console.print(f"{number}/{len(pending)} {job.name}: log in {job.log}", soft_wrap=True, highlight=False)
                code = _run(job)
        except Timeout:
            states[job.name] = "runs elsewhere"
            continue
        states[job.name] = "done" if code == 0 else "stopped" if code in (130, 143) else "failed"
        if states[job.name] == "failed":
            reasons[job.name] = last_error(job.log)  # which the next part may overwrite
        if states[job.name] == "stopped":
            stopped = code
            break
    table = Table(title=study.name, title_justify="left")
    for column in ("part", "state", "why"):
        table.add_column(column)
    for job in jobs:
        table.add_row(job.name, states[job.name], reasons.get(job.name, ""))
    console.print(table)
    if stopped or "failed" in states.values():
        sys.exit(stopped or 1)


def _run(job: Job) -> int:
    """Runs a part; returns its exit code, 130 or 143 for a signal, and 1 for an error, which is written to its log."""
    try:
        return job.run()
    except SystemExit as stop:  # of Lightning in this process: 1 after Ctrl-C, no code after SIGTERM
        return 143 if stop.code is None else 130 if stop.code == 1 else 1
    except Exception as error:  # a part that fails does not stop the others
        append_line(job.log, f"{traceback.format_exc()}error: {type(error).__name__}: {error}")
        return 1


def _jobs(place: Place) -> Iterator[Job]:
    """Yields all parts of a study in the order in which they are run: seeds outside, so that methods compare early."""
    study = place.study
    yield from (SearchJob(place, method) for method, member in study.methods.items() if not member.config)
    trainings = [
        TrainJob(place, method, dataset, seed)
        for dataset, seeds in study.datasets.items()
        for seed in seeds
        for method, member in study.methods.items()
        if dataset in (member.datasets or study.datasets)
    ]
    yield from trainings
    for name, measurement in study.measurements.items():
        for training in trainings:
            if training.seed in measurement.seeds and name not in study.methods[training.method].without:
                yield from (MeasureJob(training, name, steps) for steps in measurement.steps)


def _check_names(study: Study, options: argparse.Namespace) -> None:
    """Checks that the study has what the options name.

    Raises:
        ValueError: If it has not; names what there is.
    """
    known: dict[str, tuple[Iterable[object], Iterable[object]]] = {
        "--roots": (parse_pairs("--roots", options.roots), study.datasets),
        "--only": (options.only, study.methods),
        "--datasets": (options.datasets, study.datasets),
        "--seeds": (options.seeds, dict.fromkeys(seed for seeds in study.datasets.values() for seed in seeds)),
        "--measurements": (options.measurements, study.measurements),
    }
    for option, (given, names) in known.items():
        if unknown := [name for name in given if name not in names]:
            raise ValueError(f"{option} {unknown[0]}: the study has {', '.join(map(str, names))}")


def _is_selected(job: Job, options: argparse.Namespace) -> bool:
    training = job.training if isinstance(job, MeasureJob) else job
    chosen = not options.only or training.method in options.only
    chosen = chosen and (not options.stage or job.stage in options.stage)
    if isinstance(job, MeasureJob):
        chosen = chosen and (not options.measurements or job.measurement in options.measurements)
    if isinstance(training, TrainJob):
        chosen = chosen and (not options.datasets or training.dataset in options.datasets)
        chosen = chosen and (not options.seeds or training.seed in options.seeds)
    return chosen


def _parser() -> argparse.ArgumentParser:
    parser = pass_through_parser(
        "matrix --design FILE",
        "Runs a study: the search of learning rates, the trainings, and the measurements of their checkpoints. What is "
        "among the results is skipped, a training that was stopped resumes from its last checkpoint, and a part that "
        "fails does not stop the others. Several processes may run side by side.",
    )
    parser.add_argument("--design", required=True, metavar="FILE", help="design of the study")
    parser.add_argument("--roots", nargs="+", default=[], metavar="DATASET=FOLDER", help="--data.root of datasets")
    parser.add_argument("--only", nargs="+", default=[], metavar="METHOD", help="methods; all by default")
    parser.add_argument("--datasets", nargs="+", default=[], metavar="DATASET", help="datasets; all by default")
    parser.add_argument("--seeds", type=int, nargs="+", default=[], help="seeds of training; all by default")
    parser.add_argument("--stage", nargs="+", choices=get_args(Stage), default=[], help="stages; all by default")
    parser.add_argument("--measurements", nargs="+", default=[], metavar="NAME", help="measurements; all by default")
    parser.add_argument("--output", type=Path, default=RUNS / "track", help="folder of the runs")
    parser.add_argument("--results", type=Path, default=Path(RECORDS).parent, help="folder of the results")
    parser.add_argument("--print", action="store_true", help="only print a command for each pending part")
    return parser


def _command(job: Job, options: argparse.Namespace) -> str:
    words = ["python", "-m", "benchmark", "matrix", "--design", str(options.design), "--stage", job.stage]
    words += job.selection
    words += ["--roots", *options.roots] if options.roots else []
    words += ["--output", str(options.output), "--results", str(options.results)]
    return shlex.join(words)
