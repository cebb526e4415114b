"""Run folders `runs/<dataset>-<method>-<time>/` with all files of one training: config, checkpoints, logs, records."""

from __future__ import annotations

import ast
import re
import secrets
import warnings
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from benchmark.zoo import find_in_zoo
from datamodules import ImageDataModule
from leaderboard.files import file_sha256, free_path
from leaderboard.record.renamed import FORMER, PRESENT, is_former
from systems.base import DiffusionSystem
from systems.checkpoints import CheckpointMismatchError, read_suite

RUNS = Path("runs")
WEIGHTS = "model.safetensors"
"""Weights in a folder made by `export`."""
GAMMA = "-gamma"
"""Suffix of a copy with Gamma: the original is not changed, so that its records can still be verified."""
BEST = "BestCheckpoint"
"""Beginning of the key under which a checkpoint contains the state of the callback that saves the best ones."""
MOVED = {
    "systems.analytic_dpm.AnalyticDPMScheduler": "systems.AnalyticDPMScheduler",
    "systems.analytic_dpm.StridedDDPMScheduler": "systems.StridedDDPMScheduler",
    "systems.analytic_dpm.StridedDDIMScheduler": "systems.StridedDDIMScheduler",
    "systems.dpm_solver.DPMSolverScheduler": "systems.DPMSolverScheduler",
    "benchmark.faults.DivergenceGuard": "benchmark.callbacks.checkpointing.DivergenceGuard",
    "benchmark.faults.LastCheckpoint": "benchmark.callbacks.checkpointing.LastCheckpoint",
    "benchmark.faults.WholeCheckpointIO": "benchmark.callbacks.checkpointing.AtomicCheckpointIO",
    "benchmark.stages.BestCheckpoint": "benchmark.callbacks.checkpointing.BestCheckpoint",
    "benchmark.monitor.ImageProgressBar": "benchmark.callbacks.monitor.ImageProgressBar",
    "benchmark.monitor.ProgressLines": "benchmark.callbacks.monitor.ProgressLines",
    "benchmark.monitor.TrainingMonitor": "benchmark.callbacks.monitor.TrainingMonitor",
    "benchmark.png.PNGWriter": "benchmark.callbacks.png.PNGWriter",
    "leaderboard.evaluation.Evaluation": "leaderboard.evaluation.callback.Evaluation",
}
"""Class paths that configs of version 0.1 may contain, and the present ones."""
_FORMER = re.compile(rf"(\bclass_path['\"]?:\s*['\"]?)(?:systems\.(?:sdit\.)?)?{FORMER}\b(?!\.)")
_GRAPHS = re.compile(r"^graphs:.*\n?(?:[ \t]+.*\n?)*", re.MULTILINE)


def new_run(folder: Path, dataset: str, method: str, checkpoint: Path | None = None) -> Path:
    """Returns the path of a new run folder, without creating it.

    Args:
        folder: Folder of the runs.
        dataset: Name of the dataset.
        method: Name of the method.
        checkpoint: Checkpoint outside a run folder that is to be tested; its folder is always the same, so that an
            interrupted test resumes.
    """
    if checkpoint and checkpoint.is_file():
        return folder / f"{dataset}-{method}-{file_sha256(checkpoint)[:8]}"
    return folder / f"{dataset}-{method}-{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


def run_of(checkpoint: Path) -> Path | None:
    """Returns the run folder that contains a checkpoint, or None if it is not in one."""
    run = checkpoint.parent.parent
    return run if (run / "config.yaml").is_file() else None


def update_config(text: str) -> str:
    """Returns the text of a config with the class paths of earlier versions replaced and removed options left out.

    `SDiT` with the options of `SpikingRWKV` is replaced by that class, which had this name before.

    Args:
        text: YAML, as written to `config.yaml` of a run by this or an earlier version; any other text is unchanged.
    """
    for old, new in MOVED.items():
        text = re.sub(rf"(?<![\w.]){re.escape(old)}(?![\w.])", new, text)
    if _FORMER.search(text) and is_former(_model(text)):
        text = _FORMER.sub(rf"\g<1>systems.{PRESENT}", text)
    if (found := _GRAPHS.search(text)) is None:
        return text
    if re.search(r"enabled:\s*true\b", found[0], re.IGNORECASE):
        warnings.warn(
            "`graphs.enabled: true` of the config has no effect: training through CUDA graphs was removed. The "
            "network is trained without them; remove the lines `graphs:` from the config to silence this warning",
            stacklevel=2,
        )
    return text[: found.start()] + text[found.end() :]


def _model(text: str) -> Any:
    """Returns the `model` of a config, or None if the text is not a config."""
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError:
        return None
    return config.get("model") if isinstance(config, dict) else None


def training_seed(checkpoint: Path) -> Any:
    """Returns `seed_everything` of the training of a checkpoint, or None if it is not known."""
    try:
        return configuration_of(checkpoint).get("seed_everything")
    except (OSError, ValueError, CheckpointMismatchError, yaml.YAMLError, AttributeError, TypeError):
        return None


def newest_run(folder: Path) -> Path:
    """Returns the run whose checkpoint was written last.

    Raises:
        FileNotFoundError: If there is no run with a checkpoint.
    """
    checkpoints = [path for path in folder.glob("*/checkpoints/*.ckpt") if run_of(path)]
    if not checkpoints:
        raise FileNotFoundError(
            f"no run with a checkpoint under {folder}/; train one with "
            "`python -m benchmark fit --config configs/quickstart.yaml`, or name a checkpoint: "
            "`--config CONFIG --ckpt_path CHECKPOINT`"
        )
    return max(checkpoints, key=lambda path: (path.stat().st_mtime_ns, path)).parent.parent


def find_checkpoint(run: Path, which: str = "last") -> Path:
    """Returns the last or the best checkpoint of a run, or its copy with Gamma.

    Args:
        run: Run folder.
        which: `last`, the one with the most training steps, or `best`, the one of `BestCheckpoint` with the best
            monitored value. The file that was written last decides between equal ones.

    Raises:
        FileNotFoundError: If the run has no such checkpoint.
    """
    files = sorted((run / "checkpoints").glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    found = [path for path in files if (path.stem == "last" or path.stem.startswith("last-")) == (which == "last")]
    if len(found) > 1 or which == "best":
        found = _by_steps(found) if which == "last" else _by_score(found)
    if not found:
        there = ", ".join(sorted(path.name for path in files)) or "none"
        raise FileNotFoundError(f"run {run} has no {which!r} checkpoint; it has: {there}")
    return found[-1]


def gamma_path(checkpoint: Path) -> Path:
    """Returns a new name for the copy of a checkpoint that contains Gamma."""
    return free_path(checkpoint.with_stem(_without_gamma(checkpoint) + GAMMA))


def _without_gamma(path: Path) -> str:
    """Returns the stem of a checkpoint, or of the checkpoint that it is a copy of."""
    return re.sub(rf"{GAMMA}(-\d+)?$", "", path.stem)


def _by_steps(paths: list[Path]) -> list[Path]:
    """Sorts checkpoints by training steps; drops a copy whose original was replaced by further training."""
    steps = {path: read_suite(path).get("global_step", 0) for path in paths}
    originals = {path.stem: step for path, step in steps.items()}
    current = [path for path in paths if originals.get(_without_gamma(path), steps[path]) == steps[path]]
    return sorted(current, key=lambda path: steps[path])


def _by_score(paths: list[Path]) -> list[Path]:
    """Sorts the checkpoints that `BestCheckpoint` saved by the value it monitored, the best last.

    Every one contains the state of the callback at the time, which includes its own value. If the training was resumed
    with another `--checkpoint.monitor` or mode, only the present one counts.
    """
    scores: dict[str, list[tuple[float, Path]]] = {}
    for path in paths:
        for key, state in read_suite(path).get("callbacks", {}).items():
            saved = {Path(name).stem: float(value) for name, value in state.get("best_k_models", {}).items()}
            if key.startswith(BEST) and _without_gamma(path) in saved:
                scores.setdefault(key, []).append((saved[_without_gamma(path)], path))
    if not scores:
        return []
    key, found = list(scores.items())[-1]  # of the newest file
    sign = -1 if ast.literal_eval(key.removeprefix(BEST))["mode"] == "min" else 1
    return [path for _, path in sorted(found, key=lambda pair: sign * pair[0])]


def checkpoint_in(path: Path, which: str = "last") -> Path:
    """Returns the weights in an exported folder, the checkpoint `which` of a run folder, or the file itself.

    Args:
        path: Folder, file, or `zoo:NAME` for a trained model that comes with the suite.
        which: Checkpoint of a run folder.

    Raises:
        FileNotFoundError: If the zoo has no such model, or a run folder no such checkpoint.
    """
    path = find_in_zoo(path)
    if not path.is_dir():
        return path
    return path / WEIGHTS if (path / WEIGHTS).is_file() else find_checkpoint(path, which)


def configuration_of(checkpoint: Path) -> dict[str, Any]:
    """Returns `model`, `data`, `seed_everything` and `trainer.precision` of a checkpoint, as far as they are known.

    They are read from the run folder or the exported folder that contains it, or else from the checkpoint itself.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        ValueError: If it has no configuration.
    """
    if not checkpoint.is_file():
        raise FileNotFoundError(f"{checkpoint} is not a file; name a checkpoint (*.ckpt)")
    exported = checkpoint.parent / "config.yaml" if checkpoint.name == WEIGHTS else None
    run = run_of(checkpoint)
    if exported is not None and exported.is_file():
        config = yaml.safe_load(update_config(exported.read_text(encoding="utf-8")))
    elif run is not None:
        config = yaml.safe_load(update_config((run / "config.yaml").read_text(encoding="utf-8")))
    else:
        config = read_suite(checkpoint).get("configuration")
    if config is None:
        raise ValueError(
            f"{checkpoint} is not in a run folder and contains no configuration; name its config too: `--config CONFIG`"
        )
    return portable(config)


def portable(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a model needs on another machine: `model`, `data`, `seed_everything` and `trainer.precision`.

    Without the precision, another processor would choose its fastest one, and results would not repeat.
    """
    chosen = {key: config[key] for key in ("seed_everything", "model", "data") if key in config}
    trainer = config.get("trainer")
    precision = trainer.get("precision") if isinstance(trainer, Mapping) else None
    return chosen if precision is None else chosen | {"trainer": {"precision": precision}}


def load_run(checkpoint: Path) -> tuple[DiffusionSystem, ImageDataModule]:
    """Builds the system of a checkpoint with its weights, in evaluation mode, and its datamodule.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        ValueError: If it has no configuration (see `configuration_of`).
    """
    config = configuration_of(checkpoint)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(ImageDataModule, "data")
    data: ImageDataModule = parser.instantiate(parser.parse_object({"data": config["data"]})).data
    return DiffusionSystem.from_configuration(config["model"], read_suite(checkpoint)), data
