"""`python -m benchmark leaderboard verify`: repeats the evaluation of a record and compares the results."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import yaml
from rich.console import Console
from rich.text import Text

from benchmark.runs import RUNS, WEIGHTS, checkpoint_in
from benchmark.zoo import zoo_folders
from leaderboard.files import file_sha256, write_atomic
from leaderboard.record.entries import Entry
from leaderboard.record.records import REDACTED, Record, read_record, record_text, redact_paths
from leaderboard.record.repetition import Repetition
from leaderboard.reports.compare import show
from leaderboard.reports.terminal import terminal

_PATH_OPTIONS = {
    "root": ("data", "init_args"),
    "inception_weights": ("evaluation",),
    "torchvision_weights": ("evaluation",),
    "extractor": ("evaluation",),
    "fad_dir": ("evaluation",),
    "gamma": ("model", "init_args", "scheduler", "init_args"),
}
"""Options that are paths, and the section of a config that contains each."""
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
    by: str | None = None,
) -> None:
    """Repeats the evaluation of a record with its config and checkpoint, and compares the results.

    The repetition runs on one device; interrupted, it can be resumed. It writes its own record under `output`; the
    original record and its run folder are not changed, except that `keep` adds a file.

    Args:
        record: Record file.
        checkpoint: Checkpoint of the record; null searches for its hash in the run folder of the record, runs/ and the
            zoo.
        root: Folder of the dataset, if not as in the record.
        accelerator: Device, if not as in the record: cpu or gpu.
        inception_weights: Local file of the 2015 Inception weights, if not as in the record.
        torchvision_weights: Local file of torchvision's Inception weights, if not as in the record.
        extractor: File of another small extractor, if not as in the record.
        fad_dir: Folder of the published autoencoders, if not as in the record.
        gamma: File with Gamma of Analytic-DPM, if not as in the record.
        output: Folder for the files of the repetition.
        keep: Whether a repetition that agrees is saved next to the record, records/X.json as repetitions/X.json, so
            that leaderboards mark the row as repeated.
        by: Name of the person or group that repeats the evaluation of others. `keep` then saves
            repetitions/NAME/X.json, and leaderboards mark the row as verified.

    Raises:
        SystemExit: With code 1 if the repetition does not agree, with code 2 if it could not run.
    """
    console = terminal()
    try:
        _check_name(by, keep)
        recorded = read_record(record)
        if recorded.images is not None:
            raise ValueError(
                "it measured images that other code made: measure them again with `evaluate --images`; the same images "
                f"have the fingerprint {recorded.images.fingerprint}"
            )
        _check_packages(recorded)
        found = _find_checkpoint(recorded, Path(record), checkpoint)
        if recorded.checkpoint and file_sha256(found) != recorded.checkpoint.sha256:
            rows = [("checkpoint sha256", recorded.checkpoint.sha256, file_sha256(found))]
            show(console, "not repeated: another checkpoint was measured", ("", "record", "given"), rows)
            _finish(console, False, f"{found} is not the checkpoint of {record}")
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
        entry = Entry(Path(record), recorded)
        kept = entry.repetition if by is None else entry.verification(by)
        write_atomic(kept, record_text(redact_paths(repeated)))
    agrees = "agrees" if repetition.agrees else "does not agree"
    old, new = recorded.code.external or {}, repeated.code.external or {}
    edited = ", ".join(name for name in old if name not in new or new[name].sha256 != old[name].sha256)
    _finish(
        console,
        repetition.agrees,
        f"{record} {agrees} with its repetition{f' by other source code of {edited}' if edited else ''}",
    )


def _finish(console: Console, agrees: bool, message: str) -> None:
    console.print(
        Text(f"{'verified' if agrees else 'failed'}: {message}", style="green" if agrees else "red"), soft_wrap=True
    )
    if not agrees:
        raise SystemExit(1)


def _check_name(name: str | None, keep: bool) -> None:
    """Checks the name of who repeats an evaluation, which becomes the name of a folder.

    Raises:
        ValueError: If it is not suitable, or nothing would be kept.
    """
    if name is None:
        return
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9 ._+-]{0,58}[A-Za-z0-9]", name) or name.casefold() == "records":
        raise ValueError(
            f"--by {name[:80]!a} is not a suitable name: use 2 to 60 letters, digits, spaces and . _ + -, with "
            "a letter or digit at both ends, and not 'records'"
        )
    if not keep:
        raise ValueError(f"--by {name} names who repeats the evaluation, but nothing is kept: add --keep true")


def _check_packages(record: Record) -> None:
    """Checks that the packages outside the suite that a record depends on can be imported.

    Raises:
        ValueError: If one is missing; names all of them, with version and commit.
    """
    missing = [
        f"{name} {code}"
        for name, code in (record.code.external or {}).items()
        if name != "__main__" and find_spec(name) is None
    ]
    if missing:
        raise ValueError(
            f"its code is in a package that is not found here: {', '.join(missing)}; install it, or run in the folder "
            "that contains it"
        )


def _find_checkpoint(record: Record, path: Path, given: str | None) -> Path:
    """Returns the given checkpoint, or the file with the recorded hash.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the record names no checkpoint.
    """
    if given is not None:
        given = str(checkpoint_in(Path(given)))
        if not Path(given).is_file():
            raise FileNotFoundError(f"--checkpoint {given} is not a file")
        return Path(given)
    if record.checkpoint is None:
        raise ValueError(
            "the record names no checkpoint, as it was measured right after training; add --checkpoint PATH"
        )
    named = record.config.get("ckpt_path")
    candidates = [Path(named)] if isinstance(named, str) and "\0" not in named else []
    candidates += sorted((path.parent.parent / "checkpoints").glob("*.ckpt"))
    candidates += sorted(RUNS.glob("*/checkpoints/*.ckpt"))
    candidates += [folder / WEIGHTS for folder in zoo_folders()]
    for path in candidates:
        if path.is_file() and file_sha256(path) == record.checkpoint.sha256:
            return path
    raise FileNotFoundError(
        f"its checkpoint {record.checkpoint.name!r} with the SHA-256 {record.checkpoint.sha256} is neither in its run "
        f"folder nor under {RUNS}/ nor in the zoo; add --checkpoint PATH"
    )


def _settings(record: Record, accelerator: str | None, given: dict[str, str]) -> dict[str, Any]:
    """Returns the config of the repetition: the settings that a result depends on, and no others.

    Args:
        record: Record to repeat.
        accelerator: Device, if not as in the record.
        given: Paths of files and folders that differ from the record, by option.

    Raises:
        ValueError: If the config of the record is not the config of a test, or lacks the path of a file.
    """
    parts = {name: record.config.get(name) for name in ("model", "data", "evaluation", "trainer")}
    settings = cast(dict[str, Any], _with_infinities(parts))
    data = settings["data"]
    options = data.setdefault("init_args", {}) if isinstance(data, dict) else None
    if not all(isinstance(part, dict) for part in (*settings.values(), options)):
        raise ValueError(f"its config lacks one of {', '.join(parts)}: it was not measured by `benchmark test`")
    assert options is not None
    settings["seed_everything"] = record.seeds.get("training", 0)  # any value: a test does not depend on it
    settings["trainer"] = {name: settings["trainer"].get(name) for name in _TRAINER} | {"devices": 1}
    if accelerator is not None:
        settings["trainer"]["accelerator"] = accelerator
    settings["evaluation"]["keep_samples"] = False
    options.pop("cache_dir", None)
    for option, section in _PATH_OPTIONS.items():
        part: Any = settings
        for name in section:
            part = part.get(name) if isinstance(part, dict) else None
        if not isinstance(part, dict):
            if option in given:
                raise ValueError(f"--{option} {given[option]}: its config has no such option")
        elif option in given:
            part[option] = given[option]
        elif str(part.get(option)).startswith(REDACTED):
            raise ValueError(f"it does not contain the path of {part[option]}; add --{option} PATH")
    return settings


def _with_infinities(value: Any) -> Any:
    """Copies a JSON value and replaces the strings that stand for numbers that are not finite by these numbers."""
    if isinstance(value, dict):
        return {name: _with_infinities(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_with_infinities(item) for item in value]
    return float(value) if value in ("Infinity", "-Infinity", "NaN") else value


def _repeat(settings: dict[str, Any], checkpoint: Path, folder: Path) -> Record:
    """Runs the evaluation in a new folder and returns the new record.

    Raises:
        ValueError: If this version of the suite does not accept the config.
    """
    from benchmark.stages import BenchmarkCLI, run_stage  # Lightning takes seconds to import
    from leaderboard.evaluation.callback import Evaluation

    class RepetitionCLI(BenchmarkCLI):
        """Writes to `folder`, not to the run folder of the checkpoint."""

        def before_instantiate_classes(self) -> None:
            super().before_instantiate_classes()
            self.run_folder = folder

    settings["trainer"]["logger"] = False
    config = folder / "config.yaml"
    write_atomic(config, yaml.safe_dump(settings, sort_keys=False))
    try:
        cli = run_stage(["test", "--config", str(config), "--ckpt_path", str(checkpoint)], RepetitionCLI)
    except SystemExit:
        raise ValueError(f"this version of the suite does not accept its config, {config}") from None
    callbacks: Iterable[Any] = cli.trainer.callbacks  # type: ignore[attr-defined]
    (record,) = (callback.record for callback in callbacks if isinstance(callback, Evaluation))
    assert record is not None, "a test without a record"
    return record


def _compare(console: Console, repetition: Repetition) -> None:
    """Prints both records side by side."""
    header = ("", "record", "repetition", "difference", "agrees")
    show(console, "metrics, to agree within the recorded uncertainty", header, repetition.metrics)
    show(console, "cost of an image, to agree within 1 %", header, repetition.costs)
    show(console, "code, data and weights", ("", "record", "repetition"), repetition.provenance)
