"""Resuming a training: configured options win over the same options in the restored state, or are refused."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

COUNTERS = ("_step_count", "_last_lr", "_is_initial", "_get_lr_called_within_step")
"""Entries in the state of a learning-rate schedule that follow from the others."""
NEW_RUN = "start a new run (the same command without --ckpt_path)"


class Resume(Callback):
    """Lets the options of `fit` win over a checkpoint: only moments, counters and best values are restored.

    Learning rate, betas, weight decay and the like are written into the optimiser's state, and a learning-rate schedule
    is computed anew up to the present step, as if the training had begun with the present options. A change that the
    restored state does not permit is refused.
    """

    def __init__(self) -> None:
        self._step: int | None = None

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Writes the configured options into the checkpoint, before the rest of it is restored.

        Raises:
            ValueError: If an option is not compatible with the checkpoint.
        """
        if trainer.state.fn != TrainerFn.FITTING:
            return
        _check_length(trainer, checkpoint)
        self._step = int(checkpoint["global_step"])
        if "averaging_state" in checkpoint and not any(isinstance(c, WeightAveraging) for c in _callbacks(trainer)):
            raise ValueError(
                "the training was begun with averaged weights, which cannot be omitted when it resumes; give the same "
                f"`--trainer.callbacks+=EMAWeightAveraging`, or {NEW_RUN}"
            )
        for callback in _callbacks(trainer):
            if state := checkpoint.get("callbacks", {}).get(callback.state_key):
                _configure_callback(callback, state)
        changes = configure_optimizers(checkpoint, pl_module.configure_optimizers())
        if changes and trainer.is_global_zero:
            print(f"resumed with {', '.join(changes)}", flush=True)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints a line if there was nothing left to train."""
        if self._step == trainer.global_step and trainer.is_global_zero:
            print(
                f"nothing to train: the checkpoint is at step {self._step}, where the training ends; to continue, "
                "raise --trainer.max_steps or --trainer.max_epochs"
            )


class CPUTime(Callback):
    """Adds up the CPU time of a training, also over the processes that resumed it; every checkpoint contains it.

    Seconds of the process with its threads. The work of a killed process after its last checkpoint is not counted.
    """

    def __init__(self) -> None:
        self._before = 0.0
        self._started = time.process_time()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock."""
        self._started = time.process_time()

    def state_dict(self) -> dict[str, float]:
        """Returns the time so far."""
        return {"seconds": self._before + time.process_time() - self._started}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """Continues from the time at the checkpoint."""
        self._before = state_dict["seconds"]

    @staticmethod
    def read(checkpoint: Mapping[str, Any]) -> float:
        """Returns the time in a checkpoint; 0 if it has none."""
        return float(checkpoint.get("callbacks", {}).get(CPUTime.__qualname__, {}).get("seconds", 0.0))


def configure_optimizers(checkpoint: dict[str, Any], configured: Any) -> list[str]:
    """Replaces the options of optimisers and schedules in a checkpoint by the configured ones.

    Args:
        checkpoint: Checkpoint to change, with `optimizer_states` and `lr_schedulers`.
        configured: Result of `DiffusionSystem.configure_optimizers`.

    Returns:
        The changes, as `name=value instead of value`.

    Raises:
        ValueError: If the state of an optimiser does not fit the configured one.
    """
    optimizers, schedules = _as_lists(configured)
    changes: dict[str, None] = {}
    states = checkpoint.get("lr_schedulers", [])
    if checkpoint.get("optimizer_states"):
        states += [{} for _ in schedules[len(states) :]]
        del states[len(schedules) :]
    for schedule, state in zip(schedules, states, strict=False):
        _advance(schedule, int(state.get("last_epoch", checkpoint["global_step"])))
        new = schedule.state_dict()
        if not _equal(_options(new), _options(state)):
            changes |= dict.fromkeys(_differences(_options(state), _options(new)))
            state.clear()
            state.update(new)
    for optimizer, state in zip(optimizers, checkpoint.get("optimizer_states", []), strict=False):
        _check_moments(optimizer, state)
        if len(state["param_groups"]) == len(optimizer.param_groups):  # torch refuses other numbers
            for old, group in zip(state["param_groups"], optimizer.param_groups, strict=True):
                new = {key: value for key, value in group.items() if key != "params"}
                saved = {key: value for key, value in old.items() if key != "params"}
                changes |= dict.fromkeys(_differences(saved, new))
                for key in saved:
                    if key not in new:
                        del old[key]
                old.update({key: value for key, value in new.items() if not _equal(saved.get(key), value)})
    return list(changes)


def _check_length(trainer: Trainer, checkpoint: Mapping[str, Any]) -> None:
    """Checks that the training is not to end before the checkpoint.

    Raises:
        ValueError: If it is.
    """
    step, epoch = int(checkpoint["global_step"]), int(checkpoint["epoch"])
    if loops := checkpoint.get("loops", {}).get("fit_loop"):
        at_end = loops["epoch_loop.batch_progress"]["is_last_batch"]
        epoch = int(loops["epoch_progress"]["current"]["ready" if at_end else "processed"])
    for name, value, done in (
        ("max_steps", trainer.max_steps, step),
        ("max_epochs", -1 if trainer.max_epochs is None else trainer.max_epochs, epoch),
    ):
        if 0 <= value < done:
            raise ValueError(
                f"--trainer.{name}={value}, but the checkpoint is at step {step}, epoch {epoch}; give {done} or more, "
                f"or {NEW_RUN}"
            )


def _check_moments(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Checks that the saved state of an optimiser has what the configured class needs for each parameter.

    Raises:
        ValueError: If it does not, as after a change of the class.
    """
    saved = {key for entry in state["state"].values() for key, value in entry.items() if value is not None}
    arguments = signature(type(optimizer)).parameters
    parameter = nn.Parameter(torch.zeros(1))
    parameter.grad = torch.zeros(1)
    probe = type(optimizer)([parameter], **{k: v for k, v in optimizer.defaults.items() if k in arguments})
    probe.step()
    needed = {key for key, value in probe.state[parameter].items() if value is not None}
    if state["state"] and saved != needed:
        raise ValueError(
            f"the checkpoint has the optimiser state {', '.join(sorted(saved)) or 'of no moments'}, but "
            f"{type(optimizer).__name__} as configured needs {', '.join(sorted(needed)) or 'none'}; resume with the "
            f"optimiser of the run's config.yaml, or {NEW_RUN}"
        )


def _configure_callback(callback: Callback, state: dict[str, Any]) -> None:
    """Replaces the options in the state of a callback, such as EarlyStopping's patience, by the configured ones."""
    if isinstance(callback, ModelCheckpoint) and callback.dirpath is not None and state.get("dirpath") is not None:
        _keep_best(callback, state)
    for name in signature(type(callback)).parameters:
        if name in state and hasattr(callback, name):
            state[name] = getattr(callback, name)


def _keep_best(callback: ModelCheckpoint, state: dict[str, Any]) -> None:
    """Finds the kept checkpoints in the present folder of the run, and forgets those beyond `save_top_k`.

    No file is deleted.
    """
    folder = Path(str(callback.dirpath))
    found = {str(folder / Path(path).name): value for path, value in state["best_k_models"].items()}
    best_first = sorted(found.items(), key=lambda item: float(item[1]), reverse=callback.mode == "max")
    kept = [(path, value) for path, value in best_first if Path(path).is_file()]
    if callback.save_top_k >= 0:
        kept = kept[: callback.save_top_k]
    worst = kept[-1] if kept else ("", torch.tensor(-math.inf if callback.mode == "max" else math.inf))
    state["best_k_models"] = dict(kept)
    state["kth_best_model_path"], state["kth_value"] = worst
    for name in ("best_model_path", "last_model_path"):
        if state.get(name):
            state[name] = str(folder / Path(state[name]).name)


def _callbacks(trainer: Trainer) -> list[Callback]:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks


def _as_lists(configured: Any) -> tuple[list[Optimizer], list[LRScheduler]]:
    """Returns optimisers and schedules from the forms in which Lightning accepts them."""
    if isinstance(configured, dict):
        return [configured["optimizer"]], [configured["lr_scheduler"]["scheduler"]]
    if isinstance(configured, tuple):
        return configured
    return (configured if isinstance(configured, list) else [configured]), []


def _advance(schedule: LRScheduler, steps: int) -> None:
    """Steps a new schedule, whose optimiser does not step."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*lr_scheduler.step.*before.*optimizer.step.*")
        for _ in range(steps):
            schedule.step()


def _options(state: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in state.items() if key not in COUNTERS}


def _equal(first: Any, second: Any) -> bool:
    """Whether two values are equal up to the rounding of another version of torch."""
    if isinstance(first, float | int) and isinstance(second, float | int):
        return math.isclose(first, second, rel_tol=1e-6)
    if isinstance(first, dict) and isinstance(second, dict):
        first, second = _options(first), _options(second)
        return first.keys() == second.keys() and all(_equal(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple) and isinstance(second, list | tuple):
        return len(first) == len(second) and all(map(_equal, first, second))
    return bool(first == second)


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Describes the options that changed; additions of a new version or another class are not changes of a value."""
    return [
        f"{name}={_shown(value)} instead of {_shown(old[name])}"
        for name, value in new.items()
        if name in old and not name.startswith("_") and not _equal(old[name], value)
    ]


def _shown(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
