"""`python -m benchmark matrix`: trains and tests methods x datasets x seeds, each in its own process."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from subprocess import STDOUT, Popen
from typing import IO, Any, Literal

import yaml
from rich.table import Table

from benchmark.command_line import pass_through_parser
from benchmark.configs import find_configs
from benchmark.process import PARENT_VARIABLE
from benchmark.runs import RUNS, find_checkpoint, newest_run
from leaderboard.files import canonical_sha256
from leaderboard.record.entries import Entry, headline
from leaderboard.record.records import find_records, read_record
from leaderboard.reports.cells import evaluation_cell
from leaderboard.reports.terminal import terminal

BENCHMARK = (sys.executable, "-m", "benchmark")
PATH_OPTIONS = {
    "data.root": "root",
    "data.cache_dir": None,
    "evaluation.fad_dir": "fad_dir",
    "evaluation.inception_weights": "inception_weights",
    "evaluation.torchvision_weights": "torchvision_weights",
}
"""Options of `fit` that name files of this machine, and their counterparts in `leaderboard verify`."""
State = Literal["done before", "done", "failed", "stopped", "not begun", "runs elsewhere"]


@dataclass(frozen=True)
class Cell:
    """One training and its test.

    Args:
        config: Config file.
        seed: Seed of training.
        options: Options in addition to the config.
        output: Folder of all cells.
        draft: Whether the test may deviate from its protocol.
        verify: Whether the test is repeated and compared.
        start: Cell from whose last checkpoint this one starts.
        paths: Options of `PATH_OPTIONS`, which do not distinguish cells.
    """

    config: Path
    seed: int
    options: tuple[str, ...]
    output: Path
    draft: bool
    verify: bool = False
    start: Cell | None = None
    paths: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        """Folder of the run; its name has a hash of config, options and seed, so that other settings get another."""
        content = [yaml.safe_load(self.config.read_text()), self.options, self.seed]
        content += [self.start.folder.name] if self.start else []
        return self.output / f"{self.config.stem}-seed{self.seed}-{canonical_sha256(content)[:8]}"

    @property
    def entry(self) -> Entry | None:
        """The last record, or None before the test."""
        found = find_records([self.folder])
        return Entry(found[-1], read_record(found[-1])) if found else None

    @property
    def is_done(self) -> bool:
        """Whether there is a record, and a repetition that agrees if one is asked for."""
        entry = self.entry
        return entry is not None and (not self.verify or entry.repeated is not None)

    def stages(self) -> Iterator[list[str]]:
        """Yields the remaining commands: training or its continuation, test, and repetition of the test.

        Each must have ended before the next one is requested.

        Raises:
            FileNotFoundError: If the cell to start from has no checkpoint.
        """
        if self.entry is None:
            yield self.fit
            yield ["test", *["--draft"] * self.draft, *self.paths, f"--trainer.default_root_dir={self.folder}"]
        if self.verify and self.entry is not None:
            given = (path.removeprefix("--").partition("=") for path in self.paths)
            paths = [f"--{PATH_OPTIONS[key]}={value}" for key, _, value in given if PATH_OPTIONS[key]]
            yield ["leaderboard", "verify", str(self.entry.path), "--keep=true", *paths]

    @property
    def fit(self) -> list[str]:
        """Command of the training, or of its continuation if there is a checkpoint.

        Raises:
            FileNotFoundError: If the cell to start from has no checkpoint.
        """
        folder = f"--trainer.default_root_dir={self.folder}"
        try:
            newest_run(self.folder)
        except FileNotFoundError:
            fit = [f"--config={self.config}", f"--seed_everything={self.seed}", *self.paths, *self.options]
            if self.start:
                fit.append(f"--model.init_from={find_checkpoint(newest_run(self.start.folder))}")
        else:
            fit = ["--ckpt_path=last", *self.paths]
        return ["fit", *fit, folder]


def matrix(args: Sequence[str]) -> None:
    """Trains and tests methods on datasets with several seeds, or prints the commands that do so.

    Args:
        args: Arguments after `matrix`.

    Raises:
        SystemExit: With code 1 if a run failed, 130 or 143 if a signal ended it.
        ValueError: If an option is malformed.
        FileNotFoundError: If there is no config for a method and dataset.
    """
    if any(arg.partition("=")[0] == "--design" for arg in args):
        from benchmark.commands.track import track

        track(args)
        return
    options = _parser().parse_args(args)
    cells = _cells(options)
    pending = [cell for cell in cells if not cell.is_done]
    if options.print or options.slurm:
        started = {cell.start for cell in pending}  # run by the command of the cell that starts from them
        lines = [_command(cell, options) for cell in pending if cell not in started]
        print(_slurm(lines) if options.slurm else "\n".join(lines))
        return
    console = terminal()
    states: dict[Cell, State] = {cell: "not begun" if cell in pending else "done before" for cell in cells}
    stopped = 0
    for number, cell in enumerate(pending, start=1):
        name = f"{number}/{len(pending)} {cell.config.stem}, seed {cell.seed}"
        console.print(f"{name}: log in {cell.folder / 'log.txt'}", soft_wrap=True, highlight=False)
        code = _run(cell)
        states[cell] = "done" if code == 0 else "stopped" if code in (130, 143) else "failed"
        if states[cell] == "stopped":
            stopped = code
            break
    console.print(_table(states))
    if stopped or "failed" in states.values():
        sys.exit(stopped or 1)


def _parser() -> argparse.ArgumentParser:
    parser = pass_through_parser(
        "matrix",
        "Trains and tests every method on every dataset with every seed, one after another. A run that has a record "
        "is skipped (and verified with --verify), a run that was killed resumes from its last checkpoint, and a run "
        "that fails does not stop the others. `matrix --design FILE` runs a study instead; its options are listed by "
        "`matrix --design FILE --help`.",
    )
    parser.add_argument("--methods", nargs="+", required=True, metavar="METHOD", help="first part of the config's name")
    parser.add_argument("--datasets", nargs="+", required=True, metavar="DATASET", help="second part")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42], help="seeds of training")
    parser.add_argument("--configs", type=Path, default=Path("configs"), help="folder of METHOD_DATASET.yaml")
    parser.add_argument(
        "--start",
        nargs="+",
        default=[],
        metavar="METHOD=METHOD",
        help="method that starts from the last checkpoint of another one",
    )
    parser.add_argument("--roots", nargs="+", default=[], metavar="DATASET=FOLDER", help="--data.root of datasets")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="options of `fit` for all runs")
    parser.add_argument("--output", type=Path, default=RUNS / "matrix", help="folder of the runs")
    parser.add_argument("--verify", action="store_true", help="repeat each test and keep the repetition if it agrees")
    parser.add_argument("--draft", action="store_true", help="let the tests deviate from their protocol; never ranked")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--print", action="store_true", help="only print a command for each pending run")
    mode.add_argument("--slurm", action="store_true", help="only print a SLURM array script of these commands")
    return parser


def _cells(options: argparse.Namespace) -> list[Cell]:
    roots = parse_pairs("--roots", options.roots)
    if unknown := sorted(roots.keys() - set(options.datasets)):
        raise ValueError(f"--roots names {', '.join(unknown)}, which --datasets does not")
    starts = parse_pairs("--start", options.start)
    for method, first in starts.items():
        if first not in options.methods or method not in options.methods[options.methods.index(first) + 1 :]:
            raise ValueError(f"--start {method}={first} needs both in --methods, {first} before {method}")
    common = parse_pairs("--set", options.set)
    common_paths = tuple(f"--{key}={value}" for key, value in common.items() if key in PATH_OPTIONS)
    common_options = tuple(f"--{key}={value}" for key, value in common.items() if key not in PATH_OPTIONS)
    cells, configs = [], find_configs(options.configs)
    for seed in options.seeds:  # outer loop over seeds: a stopped matrix still has comparable runs
        for method in options.methods:
            for dataset in options.datasets:
                paths = common_paths + ((f"--data.root={roots[dataset]}",) if dataset in roots else ())
                config = configs / f"{method}_{dataset}.yaml"
                shared = (seed, common_options, options.output, options.draft, options.verify)
                start = None
                if method in starts:
                    start = Cell(configs / f"{starts[method]}_{dataset}.yaml", *shared, paths=paths)
                cells.append(Cell(config, *shared, start, paths))
    if missing := sorted({str(cell.config) for cell in cells if not cell.config.is_file()}):
        known = ", ".join(sorted(path.stem for path in configs.glob("*_*.yaml"))) or "none"
        raise FileNotFoundError(f"no {', '.join(missing)}; {configs}/ has: {known}")
    return list(dict.fromkeys(cells))


def parse_pairs(option: str, typed: Sequence[str]) -> dict[str, str]:
    """Returns the values of an option by their names.

    Args:
        option: The option, for the message.
        typed: Its values, `NAME=VALUE`.

    Raises:
        ValueError: If a value is malformed.
    """
    if wrong := [text for text in typed if not text.partition("=")[0] or "=" not in text]:
        raise ValueError(f"{option} {wrong[0]} has no name and value; give NAME=VALUE")
    return dict(text.split("=", 1) for text in typed)


def _run(cell: Cell) -> int:
    """Runs the remaining commands of a cell; returns 0, or the exit code of the one that failed."""
    cell.folder.mkdir(parents=True, exist_ok=True)
    with (cell.folder / "log.txt").open("ab") as log:
        try:
            for stage in cell.stages():
                if code := run_command(stage, log):
                    return code
        except FileNotFoundError as error:
            log.write(f"error: nothing to start from: {error}\n".encode())
            return 1
    return 0 if cell.is_done else 1


def run_command(command: Sequence[str], log: IO[bytes]) -> int:
    """Runs a command of the suite in its own process, which ends with this one; returns its exit code.

    Args:
        command: The command and its options.
        log: File that receives what it prints.
    """
    environment = os.environ | {PARENT_VARIABLE: str(os.getpid())}
    return _wait(Popen([*BENCHMARK, *command], stdout=log, stderr=STDOUT, env=environment))


def _wait(process: Popen[bytes]) -> int:
    """Waits for a process and forwards SIGINT and SIGTERM to it, so that it can save and exit."""
    forwarded: list[int] = []

    def forward(number: int, frame: Any) -> None:
        forwarded.append(number)
        process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 128 + forwarded[0] if forwarded else code


def _table(states: Mapping[Cell, State]) -> Table:
    table = Table(title="matrix", title_justify="left")
    for column in ("run", "seed", "state", "result", "why"):
        table.add_column(column, justify="right" if column == "seed" else "left", no_wrap=column in ("run", "state"))
    for cell, state in states.items():
        result = why = ""
        if state in ("done", "done before") and (entry := cell.entry) is not None:
            key, value = headline(entry.record)
            result = f"{key} {evaluation_cell(key, value)}{' (draft)' if entry.record.draft else ''}"
            result += ", repeated" if entry.repeated else ""
        if state == "failed":
            why = last_error(cell.folder / "log.txt")
        table.add_row(cell.config.stem, str(cell.seed), state, result, why)
    return table


def last_error(log: Path) -> str:
    """Returns the last message of an error in a log, or else its last line."""
    if not log.is_file():
        return f"no log at {log}"
    lines = log.read_text(errors="replace").splitlines()
    errors = [line for line in lines if "error:" in line.lower()] or [line for line in lines if line.strip()]
    return errors[-1].removeprefix("error: ") if errors else "killed; see its log"


def _command(cell: Cell, options: argparse.Namespace) -> str:
    """Returns a `matrix` command for one cell and the cell it starts from; run again, it resumes."""
    method, _, dataset = cell.config.stem.rpartition("_")
    words = ["python", "-m", "benchmark", "matrix", "--methods", method, "--datasets", dataset]
    if cell.start:
        first = cell.start.config.stem.rpartition("_")[0]
        words[5:6] = [first, method]
        words += ["--start", f"{method}={first}"]
    words += ["--seeds", str(cell.seed), "--configs", str(options.configs), "--output", str(options.output)]
    roots = [root for root in options.roots if root.startswith(f"{dataset}=")]
    words += ["--roots", *roots] if roots else []
    words += ["--set", *options.set] if options.set else []
    words += ["--draft"] if options.draft else []
    words += ["--verify"] if options.verify else []
    return shlex.join(words)


def _slurm(lines: Sequence[str]) -> str:
    quoted = "\n".join(f"  {shlex.quote(line)}" for line in lines)
    return f"""#!/bin/bash
#SBATCH --job-name=spiking-diffusion
#SBATCH --array=0-{max(len(lines) - 1, 0)}
#SBATCH --gres=gpu:1
#SBATCH --requeue
#SBATCH --signal=TERM@120
# Two minutes before the time limit a run saves and exits; submitted again, it resumes.
commands=(
{quoted}
)
srun --ntasks=1 bash -c "exec ${{commands[$SLURM_ARRAY_TASK_ID]}}\""""
