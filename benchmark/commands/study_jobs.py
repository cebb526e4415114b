"""Parts of a study: the search of a method, its trainings and the measurements of their checkpoints."""

from __future__ import annotations

import contextlib
import resource
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock

from benchmark.commands.export import export
from benchmark.commands.matrix import Cell, last_error, run_command
from benchmark.commands.zoo import add_to_zoo
from benchmark.runs import WEIGHTS, find_checkpoint, newest_run
from benchmark.studies import Place, read_json, write_json
from leaderboard.add import add
from leaderboard.files import file_sha256, write_atomic
from leaderboard.record.entries import RECORDS, Entry
from leaderboard.record.records import find_records, read_record, record_name, redact_paths, write_record
from systems.checkpoints import read_suite, save_checkpoint

Stage = Literal["search", "train", "measure"]
MAX_LR = "model.lr_scheduler.init_args.max_lr"
"""Option that is searched."""
POINTS = 50
"""Number of points of a stored loss curve."""
CPU_SECONDS = "cpu_seconds.txt"
"""File in the folder of a training with the CPU time of the processes that have ended."""
DIVERGED = ("the loss is nan", "the loss is inf", "is not finite after")
"""Words of the errors that end a training with too large a learning rate."""


@dataclass(frozen=True)
class SearchJob:
    """Search of one method."""

    place: Place
    method: str
    stage: Stage = "search"

    @property
    def name(self) -> str:
        """Name for people."""
        return f"search {self.method}"

    @property
    def needs(self) -> tuple[SearchJob | TrainJob, ...]:
        """Parts that must have ended before."""
        return ()

    @property
    def selection(self) -> list[str]:
        """Options that select it."""
        return ["--only", self.method]

    @property
    def result(self) -> Path:
        """File of all tried values and the choice."""
        return self.place.curves / "search" / f"{self.method}.json"

    @property
    def lock(self) -> Path:
        """File that another process locks while it runs this."""
        return self.place.output / "locks" / f"search-{self.method}"

    @property
    def log(self) -> Path:
        """Log of the last command."""
        return self.place.output / "search" / f"{self.method}.txt"

    @property
    def is_done(self) -> bool:
        """Whether the choice is among the results."""
        return self.result.is_file()

    def run(self) -> int:
        """Tries all values; returns 0, or the exit code of the training that was stopped or failed."""
        place, search = self.place, self.place.study.search
        options = place.study.methods[self.method].instead.get("search", search.options)
        tried: list[dict[str, Any]] = []
        seconds = 0.0
        for rate in search.learning_rates:
            cell = _cell(place, self.method, search.dataset, search.seed, options | {MAX_LR: rate}, "search")
            cell = _with_average(cell, search.decay)
            code = _fit(cell, self.log)
            seconds += _cpu_seconds(cell)
            if code and (code in (130, 143) or not any(words in last_error(self.log) for words in DIVERGED)):
                return code
            for averaged in (False, True):
                loss = None if code else _validation_loss(cell, averaged, self.log)
                tried.append({"learning_rate": rate, "averaged": averaged, "validation_loss": loss})
        found = [entry for entry in tried if entry["validation_loss"] is not None]
        if not found:
            return 1
        best = min(found, key=lambda entry: float(entry["validation_loss"]))
        content = {
            "design": place.design,
            "method": self.method,
            "dataset": search.dataset,
            "seed": search.seed,
            "options": options,
            "tried": tried,
            "chosen": {name: best[name] for name in ("learning_rate", "averaged")},
            "cpu_seconds": round(seconds),
        }
        write_json(self.result, content)
        return 0


@dataclass(frozen=True)
class TrainJob:
    """Training of one method on one dataset with one seed."""

    place: Place
    method: str
    dataset: str
    seed: int
    stage: Stage = "train"

    @property
    def name(self) -> str:
        """Name for people."""
        return f"train {self.key}"

    @property
    def key(self) -> str:
        """Name of its files."""
        return f"{self.method}_{self.dataset}-seed{self.seed}"

    @property
    def needs(self) -> tuple[SearchJob | TrainJob, ...]:
        """Parts that must have ended before."""
        return (self.search,)

    @property
    def selection(self) -> list[str]:
        """Options that select it."""
        return ["--only", self.method, "--datasets", self.dataset, "--seeds", str(self.seed)]

    @property
    def result(self) -> Path:
        """File that describes the training."""
        return self.place.curves / "trainings" / f"{self.key}.json"

    @property
    def lock(self) -> Path:
        """File that another process locks while it runs this or measures it."""
        return self.place.output / "locks" / self.key

    @property
    def log(self) -> Path:
        """Log of the last command."""
        return self.place.output / f"{self.key}.txt"

    @property
    def is_done(self) -> bool:
        """Whether the training is among the results."""
        return self.result.is_file()

    @property
    def config(self) -> Path:
        """Its configuration file."""
        return self.place.config(self.method, self.dataset)

    @property
    def search(self) -> SearchJob:
        """Search that chooses its learning rate."""
        return SearchJob(self.place, self.place.study.methods[self.method].config or self.method)

    @property
    def cell(self) -> Cell:
        """The training with the choice of the search, which must have ended."""
        chosen = read_json(self.search.result)["chosen"]
        options = {MAX_LR: chosen["learning_rate"]}
        cell = _cell(self.place, self.method, self.dataset, self.seed, options, "trainings")
        return _with_average(cell, self.place.study.decay) if chosen["averaged"] else cell

    def run(self) -> int:
        """Trains, after the search unless that is done; returns 0, or the exit code of what was stopped or failed."""
        with FileLock(self.search.lock):
            if not self.search.is_done and (code := self.search.run()):
                append_line(self.log, f"error: its search failed: {last_error(self.search.log)}")
                return code
        if code := _fit(self.cell, self.log):
            return code
        write_json(self.result, self._description())
        return 0

    def _description(self) -> dict[str, Any]:
        place, study = self.place, self.place.study
        run = newest_run(self.cell.folder)
        last = find_checkpoint(run)
        images = study.steps * study.batch_size
        checkpoints = {str(study.steps): file_sha256(last)}
        for path in sorted((run / "checkpoints").glob("step=*.ckpt")):
            if (step := path.stem.removeprefix("step=")) != str(study.steps):
                checkpoints[step] = file_sha256(path)
        trained_on = read_suite(last)["training_data"][-1]
        losses = _scalars(run, "train/loss")
        width = max(1, len(losses) // POINTS)
        windows = [losses[i : i + width] for i in range(0, len(losses), width)]
        return {
            "design": place.design,
            "method": self.method,
            "dataset": self.dataset,
            "seed": self.seed,
            "chosen": read_json(self.search.result)["chosen"],
            "images": images,
            "epochs": round(images / trained_on["images"], 3),
            "cpu_seconds": round(_cpu_seconds(self.cell)),
            "checkpoints": checkpoints,
            "train_loss": [[w[-1][0], float(f"{statistics.fmean(v for _, v in w):.4g}")] for w in windows],
            "validation_loss": [[step, float(f"{value:.4g}")] for step, value in _scalars(run, "val/loss")],
            "records": {},
        }


@dataclass(frozen=True)
class MeasureJob:
    """Test of one checkpoint of a training."""

    training: TrainJob
    measurement: str
    steps: int
    stage: Stage = "measure"

    @property
    def place(self) -> Place:
        """The study."""
        return self.training.place

    @property
    def name(self) -> str:
        """Name for people."""
        return f"measure {self.training.key}, {self.key}"

    @property
    def key(self) -> str:
        """Name among the records of its training."""
        return f"{self.measurement}-{self.steps}"

    @property
    def needs(self) -> tuple[SearchJob | TrainJob, ...]:
        """Parts that must have ended before."""
        return (self.training,)

    @property
    def selection(self) -> list[str]:
        """Options that select it."""
        return [*self.training.selection, "--measurements", self.measurement]

    @property
    def lock(self) -> Path:
        """File that another process locks while it runs this."""
        return self.training.lock

    @property
    def log(self) -> Path:
        """Log of the last command."""
        return self.training.log

    @property
    def is_done(self) -> bool:
        """Whether its record is among the results."""
        return self.training.is_done and self.key in read_json(self.training.result)["records"]

    def run(self) -> int:
        """Tests and copies the record to the results; returns 0, or the exit code of a test that did not end.

        Without the run folder, on another machine, it tests the rounded weights of the zoo.
        """
        if not self.training.is_done:
            append_line(self.log, f"error: {self.training.key} is not trained; run it with --stage train first")
            return 1
        study = self.place.study
        measurement, member = study.measurements[self.measurement], study.methods[self.training.method]
        options: dict[str, Any] = {}
        if checkpoint := self._find_checkpoint():
            tested, run = _half(checkpoint) if measurement.half else checkpoint, checkpoint.parent.parent
        elif self._is_in_zoo:
            tested, run = self._zoo_folder / WEIGHTS, self.place.output / "from-zoo" / self.training.key
            options |= member.options | {"trainer.default_root_dir": run}
            options |= {f"evaluation.design.{name}": value for name, value in self.place.design.items()}
        else:
            append_line(
                self.log,
                f"error: the checkpoint of {self.training.key} after {self.steps} steps is neither under "
                f"{self.place.output} nor in {self.place.zoo}; copy the run from the machine that trained it, or "
                "measure it there",
            )
            return 1
        options |= member.instead.get(self.measurement, measurement.options)
        command = ["test", f"--ckpt_path={tested}", *["--draft"] * measurement.draft]
        command += [] if checkpoint else [f"--config={self.training.config}"]
        command += [f"--{key}={value}" for key, value in options.items()] + self.place.data_root(self.training.dataset)
        before = set(find_records([run]))
        if code := _run(command, self.log):
            return code
        (path,) = set(find_records([run])) - before
        record = redact_paths(read_record(path))
        if checkpoint and self._goes_into_zoo:
            add_to_zoo(tested.parent, checkpoint, Entry(path, record), self._zoo_folder)
        if measurement.draft:
            write_record(record, self.place.curves / "records")
        else:
            with self.log.open("a") as log, contextlib.redirect_stderr(log):  # receives why a record is refused
                try:
                    add(str(path), str(self.place.results / Path(RECORDS).name))
                except SystemExit:
                    return 1
        content = read_json(self.training.result)
        content["records"][self.key] = record_name(record)
        write_json(self.training.result, content)
        return 0

    def _find_checkpoint(self) -> Path | None:
        """Returns the checkpoint in the folder of the training, or None if it is not there."""
        sha256 = read_json(self.training.result)["checkpoints"].get(str(self.steps))
        start = f"{self.training.config.stem}-seed{self.training.seed}-"
        found = self.place.output.glob(f"trainings/{start}*/*/checkpoints/*.ckpt")
        return next((path for path in sorted(found) if file_sha256(path) == sha256), None)

    @property
    def _is_in_zoo(self) -> bool:
        """Whether the zoo has these weights, rounded: the record of this step names the hash of the file."""
        names = read_json(self.training.result)["records"]
        name = names.get(f"{self.place.study.rounded}-{self.steps}")
        weights = self._zoo_folder / WEIGHTS
        recorded = [read_record(path) for path in find_records([self.place.results]) if path.name == name]
        checkpoints = [record.checkpoint.sha256 for record in recorded if record.checkpoint]
        return weights.is_file() and file_sha256(weights) in checkpoints

    @property
    def _zoo_folder(self) -> Path:
        return self.place.zoo / f"{self.training.method}_{self.training.dataset}"

    @property
    def _goes_into_zoo(self) -> bool:
        study, training = self.place.study, self.training
        is_first = self.measurement == study.rounded and training.seed == study.search.seed
        return is_first and training.dataset in study.zoo


Job = SearchJob | TrainJob | MeasureJob


def _cell(place: Place, method: str, dataset: str, seed: int, options: dict[str, Any], folder: str) -> Cell:
    """Returns a training of a method with these options in addition to its configuration."""
    member = place.study.methods[method]
    config = place.config(method, dataset)
    typed = tuple(f"--{key}={value}" for key, value in (member.options | options).items())
    return Cell(config, seed, typed, place.output / folder, draft=False, paths=tuple(place.data_root(dataset)))


def _with_average(cell: Cell, decay: float) -> Cell:
    """Returns a training whose weights are averaged, too."""
    average = ("--trainer.callbacks+=EMAWeightAveraging", f"--trainer.callbacks.init_args.decay={decay}")
    return replace(cell, options=(*cell.options, *average))


def _fit(cell: Cell, log: Path) -> int:
    """Trains, or resumes a training; adds its CPU time to a file in the folder of the cell; returns the exit code."""
    earlier, before = _cpu_seconds(cell), resource.getrusage(resource.RUSAGE_CHILDREN)
    code = _run(cell.fit, log)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    write_atomic(cell.folder / CPU_SECONDS, f"{earlier + seconds:.1f}\n")
    return code


def _run(command: Sequence[str], log: Path) -> int:
    """Runs a command of the suite, whose output replaces the log; returns its exit code."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as file:
        return run_command(command, file)


def _half(checkpoint: Path) -> Path:
    """Returns the weights of a checkpoint, rounded to 16 bits, in a folder made by `export` within its run."""
    folder = checkpoint.parent.parent / f"half-{checkpoint.stem}"
    if not folder.exists():
        export(str(checkpoint), str(folder), half=True)
    return folder / WEIGHTS


def _cpu_seconds(cell: Cell) -> float:
    """CPU time of a training so far, with validation, checkpoints and the start of the processes.

    Of processes that were killed together with this one, only the time up to their last checkpoints is known.
    """
    from benchmark.callbacks.resume import CPUTime  # Lightning takes seconds to import

    path = cell.folder / CPU_SECONDS
    counted = float(path.read_text()) if path.is_file() else 0.0
    try:
        return max(counted, CPUTime.read(read_suite(find_checkpoint(newest_run(cell.folder)))))
    except FileNotFoundError:  # killed before the first checkpoint, or diverged
        return counted


def _validation_loss(cell: Cell, averaged: bool, log: Path) -> float:
    """Returns the validation loss of the weights after the last step, or of their average."""
    from benchmark.stages import run_stage  # Lightning takes seconds to import

    checkpoint = find_checkpoint(newest_run(cell.folder))
    if not averaged:
        content = read_suite(checkpoint)
        content["state_dict"] = content.pop("current_model_state")
        checkpoint = checkpoint.with_stem("current")
        save_checkpoint(content, checkpoint)
    with log.open("a") as file, contextlib.redirect_stdout(file):
        cli = run_stage(["validate", f"--ckpt_path={checkpoint}", "--trainer.logger=false", *cell.paths])
    return float(cli.trainer.callback_metrics["val/loss"])


def _scalars(run: Path, tag: str) -> list[tuple[int, float]]:
    """Returns what was logged under a name, by step; of a step that a resumed training repeated, the last value."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # slow to import

    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    found = events.Scalars(tag) if tag in events.Tags()["scalars"] else []
    return sorted({event.step + 1: event.value for event in found}.items())


def append_line(path: Path, line: str) -> None:
    """Appends a line to a log, which is made if necessary."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(f"{line}\n")
