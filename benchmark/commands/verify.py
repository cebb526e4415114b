"""`python -m benchmark leaderboard verify`: repeats the evaluation behind a record and compares."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import yaml
from rich.console import Console
from rich.text import Text

from benchmark.runs import RUNS
from leaderboard.files import file_sha256, write_atomic
from leaderboard.record.entries import Entry
from leaderboard.record.records import REDACTED, Record, read_record, record_text, redact_paths
from leaderboard.record.repetition import Repetition
from leaderboard.reports.compare import show
from leaderboard.reports.terminal import terminal

_PLACES = {
    "root": ("data", "init_args"),
    "inception_weights": ("evaluation",),
    "torchvision_weights": ("evaluation",),
    "extractor": ("evaluation",),
    "fad_dir": ("evaluation",),
    "gamma": ("model", "init_args", "scheduler", "init_args"),
}
"""Options that name files or folders, and where in a configuration they are."""
_TRAINER = ("accelerator", "precision", "deterministic", "benchmark", "inference_mode", "limit_test_batches")


def verify(
    record: str,
    checkpoint: str | None = None,
    root: str | None = None,
    accelerator: str | None = None,
    inception_weights: str | None = None,
    torchvision_weights: str | None = None,
    extractor: str | None = None,
    fad_dir: str | None = None,
    gamma: str | None = None,
    output: str = "verifications",
    keep: bool = False,
) -> None:
    """Repeats the evaluation behind a record, from its own configuration and checkpoint, and compares.

    The repetition runs on one device and goes on where it was interrupted. It leaves a record of its own under
    `output`; record and run folder stay as they are, unless the repetition is to be kept there.

    Args:
        record: Record file.
        checkpoint: Its checkpoint; looked for by its hash in the run folder of the record and under runs/ if not given.
        root: Folder of the dataset, if it lies elsewhere than in the record.
        accelerator: Device to run on, if not that of the record: cpu, gpu.
        inception_weights: Local file of the 2015 Inception weights, if it lies elsewhere.
        torchvision_weights: Local file of torchvision's Inception weights, if it lies elsewhere.
        extractor: File of another small extractor, if it lies elsewhere.
        fad_dir: Folder of the published autoencoders, if it lies elsewhere.
        gamma: File with the statistic of Analytic-DPM, if it lies elsewhere.
        output: Folder for what the repetition leaves.
        keep: Whether a repetition that agrees is kept beside the record, so that leaderboards call the row verified:
            of records/X.json as repetitions/X.json.

    Raises:
        SystemExit: With code 1 if the repetition does not agree, with code 2 if there could be none.
    """
    console = terminal()
    try:
        recorded = read_record(record)
        found = _find_checkpoint(recorded, Path(record), checkpoint)
        if recorded.checkpoint and file_sha256(found) != recorded.checkpoint.sha256:
            rows = [("checkpoint sha256", recorded.checkpoint.sha256, file_sha256(found))]
            show(console, "not repeated, since this is not what was measured", ("", "record", "given"), rows)
            _finish(console, False, f"{found} is another checkpoint than that of {record}")
        given = {
            "root": root,
            "inception_weights": inception_weights,
            "torchvision_weights": torchvision_weights,
            "extractor": extractor,
            "fad_dir": fad_dir,
            "gamma": gamma,
        }
        settings = _settings(recorded, accelerator, {k: v for k, v in given.items() if v is not None})
        repeated = _repeat(settings, found, Path(output) / Path(record).stem)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"cannot verify {ascii(record)[1:-1]}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    repetition = Repetition(recorded, repeated)
    _compare(console, repetition)
    if keep and repetition.agrees:
        write_atomic(Entry(Path(record), recorded).repetition, record_text(redact_paths(repeated)))
    agrees = "agrees" if repetition.agrees else "does not agree"
    _finish(console, repetition.agrees, f"{record} {agrees} with its repetition")


def _finish(console: Console, agrees: bool, message: str) -> None:
    console.print(
        Text(f"{'verified' if agrees else 'failed'}: {message}", style="green" if agrees else "red"), soft_wrap=True
    )
    if not agrees:
        raise SystemExit(1)


def _find_checkpoint(record: Record, path: Path, given: str | None) -> Path:
    """Returns the checkpoint given, or the file with the recorded hash.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If the record names none.
    """
    if given is not None:
        if not Path(given).is_file():
            raise FileNotFoundError(f"--checkpoint {given} is not a file")
        return Path(given)
    if record.checkpoint is None:
        raise ValueError("it was measured right after training and names no checkpoint; give it: --checkpoint PATH")
    named = record.config.get("ckpt_path")
    places = [Path(named)] if isinstance(named, str) and "\0" not in named else []
    places += sorted((path.parent.parent / "checkpoints").glob("*.ckpt"))
    places += sorted(RUNS.glob("*/checkpoints/*.ckpt"))
    for place in places:
        if place.is_file() and file_sha256(place) == record.checkpoint.sha256:
            return place
    raise FileNotFoundError(
        f"its checkpoint {record.checkpoint.name!r} with the SHA-256 {record.checkpoint.sha256} is neither in its run "
        f"folder nor under {RUNS}/; give it: --checkpoint PATH"
    )


def _settings(record: Record, accelerator: str | None, given: dict[str, str]) -> dict[str, Any]:
    """Returns the configuration of the repetition: what a result depends on, and no file or callback besides.

    Args:
        record: What is repeated.
        accelerator: Device, if not that of the record.
        given: Files and folders that lie elsewhere than in the record, by option.

    Raises:
        ValueError: If the record's configuration is not that of a test, or does not say where a file lies.
    """
    parts = {name: record.config.get(name) for name in ("model", "data", "evaluation", "trainer")}
    settings = cast(dict[str, Any], _with_infinities(parts))
    data = settings["data"]
    options = data.setdefault("init_args", {}) if isinstance(data, dict) else None
    if not all(isinstance(part, dict) for part in (*settings.values(), options)):
        raise ValueError(f"its configuration lacks one of {', '.join(parts)}: it was not measured by `benchmark test`")
    assert options is not None
    settings["seed_everything"] = record.seeds.get("training", 0)  # any: it decides nothing of a test
    settings["trainer"] = {name: settings["trainer"].get(name) for name in _TRAINER} | {"devices": 1}
    if accelerator is not None:
        settings["trainer"]["accelerator"] = accelerator
    settings["evaluation"]["keep_samples"] = False
    options.pop("cache_dir", None)
    for option, place in _PLACES.items():
        part: Any = settings
        for name in place:
            part = part.get(name) if isinstance(part, dict) else None
        if not isinstance(part, dict):
            if option in given:
                raise ValueError(f"--{option} {given[option]}: its configuration has no place for this option")
        elif option in given:
            part[option] = given[option]
        elif str(part.get(option)).startswith(REDACTED):
            raise ValueError(f"it does not say where {part[option]} lies; give it: --{option} PATH")
    return settings


def _with_infinities(value: Any) -> Any:
    """Copies a JSON value, and turns the text that stands for an infinite number in a record back into it."""
    if isinstance(value, dict):
        return {name: _with_infinities(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_with_infinities(item) for item in value]
    return float(value) if value in ("Infinity", "-Infinity", "NaN") else value


def _repeat(settings: dict[str, Any], checkpoint: Path, folder: Path) -> Record:
    """Runs the evaluation in a folder of its own and returns the new record.

    Raises:
        ValueError: If this version of the suite does not take the configuration.
    """
    from benchmark.stages import run_stage  # Lightning takes seconds to import
    from leaderboard.evaluation.callback import Evaluation

    logger = {"save_dir": str(folder.parent), "name": "", "version": folder.name}
    settings["trainer"]["logger"] = {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": logger}
    settings["trainer"]["default_root_dir"] = str(folder)
    config = folder / "config.yaml"
    write_atomic(config, yaml.safe_dump(settings, sort_keys=False))
    try:
        cli = run_stage(["test", "--config", str(config), "--ckpt_path", str(checkpoint)])
    except SystemExit:
        raise ValueError(f"this version of the suite does not take its configuration, {config}") from None
    callbacks: Iterable[Any] = cli.trainer.callbacks  # type: ignore[attr-defined]
    (record,) = (callback.record for callback in callbacks if isinstance(callback, Evaluation))
    assert record is not None, "a test without a record"
    return record


def _compare(console: Console, repetition: Repetition) -> None:
    """Shows both records side by side."""
    header = ("", "record", "repetition", "difference", "agrees")
    show(console, "metrics, to agree within the recorded uncertainty", header, repetition.metrics)
    show(console, "cost of an image, to agree within 1 %", header, repetition.costs)
    show(console, "code, data and weights", ("", "record", "repetition"), repetition.provenance)
