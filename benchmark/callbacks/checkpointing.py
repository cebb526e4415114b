"""Fault tolerance: atomic checkpoints, clean exit on SIGINT and SIGTERM, abort on a loss that is not finite."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import yaml
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.core.saving import save_hparams_to_yaml
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from leaderboard.files import file_sha256, write_atomic
from systems.checkpoints import read_suite, save_checkpoint

LOST_PEER = re.compile("gloo|nccl|peer|heartbeat", re.IGNORECASE)
"""Messages of torch.distributed when another process is gone."""
SAME_SIGNAL = 2.0
"""Seconds within which further signals count as copies of the first."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints atomically, and reads them without running code.

    Lightning moves each file from the system's temporary folder. Onto another file system that is a copy, which a kill
    can truncate.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Writes a temporary file in the same folder and renames it."""
        save_checkpoint(checkpoint, path)

    def load_checkpoint(self, path: Any, map_location: Any | None = None, weights_only: bool | None = None) -> Any:
        """Reads tensors and plain values of a checkpoint of the suite, to the CPU."""
        return read_suite(path, "pytorch-lightning_version")


class DivergenceError(RuntimeError):
    """A loss or a weight is not finite; the message names the step and the checkpoint to resume from."""


class LastCheckpoint(Checkpoint):
    """Saves `last.ckpt` after every epoch, every few steps if wanted, and when a signal ends the training.

    SIGINT (Ctrl+C) and SIGTERM end the training after the running step, in all processes; the exit codes are 130 and
    143. A second signal ends the process at once, unless it comes within two seconds of the first: a terminal, a
    launcher and a cluster may each send the same one.

    Args:
        every_n_train_steps: Training steps between checkpoints within an epoch; null saves at the end of epochs only.
    """

    def __init__(self, every_n_train_steps: int | None = None) -> None:
        if every_n_train_steps is not None and every_n_train_steps < 1:
            raise ValueError(f"--last.every_n_train_steps={every_n_train_steps}; give 1 or more, or null")
        self.every_n_train_steps = every_n_train_steps
        self.path = Path()
        self._signal: int | None = None
        self._signal_time = 0.0
        self._step = 0
        self._saved_step = 0  # so that nothing is saved before the first step

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Sets the path in the run folder, which all processes share."""
        self.path = Path(trainer.log_dir or ".") / "checkpoints" / "last.ckpt"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Installs the signal handlers; Lightning restores the former ones when the training ends."""
        self._step = self._saved_step = trainer.global_step
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                signal.signal(number, self._on_signal)
            except ValueError:  # only the main thread may set a handler
                return

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """Remembers the first signal; a second one gets the system's default action."""
        if self._signal is None:
            self._signal, self._signal_time = number, time.monotonic()
            print(f"\n{signal.Signals(number).name}: saving after this step (once more: stop at once)", flush=True)
        elif time.monotonic() - self._signal_time > SAME_SIGNAL:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Saves when due, and when the training ends within an epoch; the last step of an epoch is saved at its end.

        Between batches of an accumulated step nothing is saved, since a checkpoint does not contain gradients: a signal
        takes effect after the step.
        """
        before, self._step = self._step, trainer.global_step
        if trainer.is_last_batch or trainer.global_step == before:
            return
        due = bool(self.every_n_train_steps) and trainer.global_step % (self.every_n_train_steps or 1) == 0
        self._save(trainer, due or trainer.should_stop or trainer.global_step == trainer.max_steps)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves after every epoch."""
        self._save(trainer, due=True)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Starts at the next epoch if the checkpoint was written at the end of one.

        If `max_steps` ended the training, Lightning would draw one more batch of the old epoch and skip one later.
        """
        loops = checkpoint.get("loops", {}).get("fit_loop", {})
        if not loops or not loops["epoch_loop.batch_progress"]["is_last_batch"]:
            return
        batches = loops["epoch_loop.batch_progress"]
        batches |= {"is_last_batch": False, "current": dict.fromkeys(batches["current"], 0)}
        for progress in (batches["total"], loops["epoch_progress"]["total"], loops["epoch_progress"]["current"]):
            progress |= dict.fromkeys(progress, progress["ready"])

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Explains a broken connection: if one process dies, all end."""
        if trainer.world_size > 1 and isinstance(exception, RuntimeError) and LOST_PEER.search(str(exception)):
            resume = f"; resume with `python -m benchmark fit --ckpt_path {self.path}`" if self.path.is_file() else ""
            print(
                f"process {trainer.global_rank} of {trainer.world_size} lost the connection to another one, whose own "
                f"message or exit code says why; the training ends{resume}",
                flush=True,
            )

    def _save(self, trainer: Trainer, due: bool) -> None:
        number = self._agreed_signal(trainer)
        if (due or number) and trainer.global_step != self._saved_step and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            trainer.save_checkpoint(self.path, weights_only=False)
            self._saved_step = trainer.global_step
        if number:
            if not trainer.is_global_zero:
                raise SystemExit(0)  # the launcher kills the first process if another fails
            print(
                f"stopped by {signal.Signals(number).name} after step {trainer.global_step}; resume with "
                f"`python -m benchmark fit --ckpt_path {self.path}`",
                flush=True,
            )
            raise SystemExit(128 + number)

    def _agreed_signal(self, trainer: Trainer) -> int:
        """Returns the signal that any process received, or 0, so that all stop after the same step."""
        if trainer.world_size == 1:
            return self._signal or 0
        number = torch.tensor(self._signal or 0, device=trainer.strategy.root_device)
        return int(trainer.strategy.reduce(number, reduce_op="max"))


class DivergenceGuard(Callback):
    """Aborts the training if the loss or a weight is not finite, before it reaches a checkpoint.

    On a GPU the loss of a step is checked in the next step, so that the CPU does not wait for it.
    """

    def __init__(self) -> None:
        self._step_info = ""
        self._pending: tuple[Tensor, torch.cuda.Event, str] | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Tensor, batch_idx: int) -> None:
        """Records what is needed to reproduce this step."""
        self._step_info = (
            f"step {trainer.global_step} (epoch {trainer.current_epoch}, batch {batch_idx}, process "
            f"{trainer.global_rank} of {trainer.world_size}, seed_everything {os.environ.get('PL_GLOBAL_SEED', 'off')})"
        )

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Checks the loss.

        Raises:
            DivergenceError: If it is NaN or infinite.
        """
        self._check_pending(trainer)
        if not loss.is_cuda:
            self._check(loss, self._step_info, trainer)
            return
        copied = torch.cuda.Event()
        self._pending = loss.detach().to("cpu", non_blocking=True), copied, self._step_info
        copied.record()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checks the loss of the last step.

        Raises:
            DivergenceError: If it is NaN or infinite.
        """
        self._check_pending(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Checks the loss and the weights, which can overflow while the loss is still finite.

        Raises:
            DivergenceError: If one is NaN or infinite.
        """
        self._check_pending(trainer)
        for name, tensor in checkpoint["state_dict"].items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise DivergenceError(f"{name} is not finite after {self._step_info}; {self._advice(trainer)}")

    def _check_pending(self, trainer: Trainer) -> None:
        if self._pending is None:
            return
        (loss, copied, step_info), self._pending = self._pending, None
        copied.synchronize()
        self._check(loss, step_info, trainer)

    def _check(self, loss: Tensor, step_info: str, trainer: Trainer) -> None:
        if not torch.isfinite(loss).all():
            raise DivergenceError(f"the loss is {float(loss.detach())} at {step_info}; {self._advice(trainer)}")

    @staticmethod
    def _advice(trainer: Trainer) -> str:
        last = next((c.path for c in trainer.checkpoint_callbacks if isinstance(c, LastCheckpoint)), None)
        checkpoint = f"the last good checkpoint is {last}" if last and last.is_file() else "there is no checkpoint yet"
        return (
            f"{checkpoint}. Lower the learning rate, clip gradients (--trainer.gradient_clip_val 1.0) or raise "
            "--trainer.precision; the same step with the same options diverges again"
        )


class BestCheckpoint(ModelCheckpoint):
    """Saves the weights with the lowest validation loss; saves none if there are no validation images."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Turns itself off if there are no validation images."""
        if stage == "fit" and not trainer.datamodule.val_dataloader():  # type: ignore[attr-defined]
            self.monitor, self.save_top_k = None, 0
        super().setup(trainer, pl_module, stage)


class SaveFitConfig(SaveConfigCallback):
    """Saves the config of `fit` in the run folder and passes it to the loggers; other stages do not change it.

    If a resumed training has other options, the former config is kept as `config-until-step-<step>.yaml`.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Does nothing: the config is saved in `on_train_start`, so that a failed start does not overwrite a run's."""

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Checks options that apply only to the start of a run.

        Raises:
            ValueError: If the seed or the initial weights differ from those of the run.
        """
        path = self._path(trainer)
        if trainer.state.fn != TrainerFn.FITTING or not path.is_file():
            return
        former, present = yaml.safe_load(path.read_text(encoding="utf-8")), yaml.safe_load(self._text())
        seeds = former.get("seed_everything"), present.get("seed_everything")
        if seeds[0] != seeds[1]:
            raise ValueError(
                f"--seed_everything={seeds[1]}, but the training was begun with {seeds[0]}, and a record contains one "
                "seed; omit the option, or start a new run (the same command without --ckpt_path)"
            )
        starts = [(config["model"].get("init_args") or {}).get("init_from") for config in (former, present)]
        old, new = (Path(start) if start else None for start in starts)
        moved = old and new and (not old.is_file() or (new.is_file() and file_sha256(old) == file_sha256(new)))
        if old != new and not moved:
            raise ValueError(
                f"--model.init_from={new} has no effect, since the weights come from --ckpt_path (the training was "
                f"begun with {old}); omit it, or start a new run (the same command without --ckpt_path)"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves the config atomically when training starts."""
        path, text = self._path(trainer), self._text()
        config = yaml.safe_load(text)
        for logger in trainer.loggers:
            logger.log_hyperparams(config)
            if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:  # it does not replace its own file
                save_hparams_to_yaml(Path(logger.log_dir) / logger.NAME_HPARAMS_FILE, logger.hparams)
        if not trainer.is_global_zero:
            return
        if path.is_file():
            former = path.read_text(encoding="utf-8")
            kept = path.with_stem(f"{path.stem}-until-step-{trainer.global_step}")
            if yaml.safe_load(former) | {"ckpt_path": None} != config and not kept.exists():
                write_atomic(kept, former)
        write_atomic(path, text)

    def _path(self, trainer: Trainer) -> Path:
        return Path(trainer.log_dir or ".") / self.config_filename  # collective call: every rank must reach it

    def _text(self) -> str:
        """Returns the config as YAML, without the checkpoint, so that it describes a whole training."""
        config = self.config.clone()
        config.ckpt_path = None
        text: str = self.parser.dump(config, skip_unset=False)
        return text
