"""Run folders `runs/<dataset>-<method>-<time>/` with all files of one training: config, checkpoints, logs, records."""

from __future__ import annotations

import re
import secrets
import warnings
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from datamodules import ImageDataModule
from leaderboard.files import file_sha256
from leaderboard.record.renamed import FORMER, PRESENT, is_former
from systems.base import DiffusionSystem
from systems.checkpoints import read_trained

RUNS = Path("runs")
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


def training_seed(run: Path) -> Any:
    """Returns `seed_everything` from the config of a run, or None if the config cannot be read."""
    try:
        config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    return config.get("seed_everything") if isinstance(config, dict) else None


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
    return max(checkpoints, key=lambda path: path.stat().st_mtime).parent.parent


def find_checkpoint(run: Path, which: str = "last") -> Path:
    """Returns the last or the best checkpoint of a run.

    Args:
        run: Run folder.
        which: `last`, or `best` by validation loss.

    Raises:
        FileNotFoundError: If the run has no such checkpoint.
    """
    found = sorted((run / "checkpoints").glob(f"{which}*.ckpt"), key=lambda path: path.stat().st_mtime)
    if not found:
        there = ", ".join(sorted(path.name for path in (run / "checkpoints").glob("*.ckpt"))) or "none"
        raise FileNotFoundError(f"run {run} has no {which!r} checkpoint; it has: {there}")
    return found[-1]


def load_run(checkpoint: Path) -> tuple[DiffusionSystem, ImageDataModule]:
    """Builds the system of a run with the weights of a checkpoint, in evaluation mode, and its datamodule.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        ValueError: If it is not in a run folder.
    """
    if not checkpoint.is_file():
        raise FileNotFoundError(f"--ckpt_path {checkpoint} is not a file; give a checkpoint (*.ckpt)")
    run = run_of(checkpoint)
    if run is None:
        raise ValueError(f"--ckpt_path {checkpoint} is not in a run folder; give one under runs/RUN/checkpoints/")
    config = yaml.safe_load(update_config((run / "config.yaml").read_text()))
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(DiffusionSystem, "model")
    parser.add_subclass_arguments(ImageDataModule, "data")
    built = parser.instantiate(parser.parse_object({key: config[key] for key in ("model", "data")}))
    system: DiffusionSystem = built.model
    content = read_trained(checkpoint, system.method)
    system.on_load_checkpoint(content)
    system.load_state_dict(content["state_dict"])
    return system.eval(), built.data
