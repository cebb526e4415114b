"""What keeps a training from being lost: whole checkpoint files, stops by signal, and a loss that is no number."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.cli import SaveConfigCallback
from torch import Tensor

from leaderboard.files import write_atomic
from systems.checkpoints import read_suite, save_checkpoint

LOST = re.compile("gloo|nccl|peer|heartbeat", re.IGNORECASE)
"""What torch.distributed says when another process is gone."""


SAME_SIGNAL = 2.0
"""Seconds within which further signals count as the first, passed on by several."""


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints whole or not at all, and reads them without running code.

    Lightning moves a file from the system's temporary folder, which on another file system is a copy that a kill cuts.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Writes beside the final place and renames."""
        save_checkpoint(checkpoint, path)

    def load_checkpoint(self, path: Any, map_location: Any | None = None, weights_only: bool | None = None) -> Any:
        """Reads tensors and plain values of the suite, always to the CPU first."""
        return read_suite(path, "pytorch-lightning_version")


class DivergenceError(RuntimeError):
    """A loss or a weight is no finite number; the message says where, and what to go on from."""


class LastCheckpoint(Checkpoint):
    """Keeps `last.ckpt`: after every epoch, every few steps if wanted, and when a signal ends the training.

    SIGINT (Ctrl+C) and SIGTERM are obeyed after the step that is running, by all processes alike; the exit codes are
    130 and 143. A second signal ends the process at once, unless it comes within two seconds: a terminal, a launcher
    and a cluster may each pass on the same one.

    Args:
        every_n_train_steps: Steps between checkpoints within an epoch; none keeps those of whole epochs.
    """

    def __init__(self, every_n_train_steps: int | None = None) -> None:
        if every_n_train_steps is not None and every_n_train_steps < 1:
            raise ValueError(f"--last.every_n_train_steps={every_n_train_steps}; give 1 or more, or null")
        self.every_n_train_steps = every_n_train_steps
        self.path = Path()
        self._signal: int | None = None
        self._noted = 0.0
        self._step = 0
        self._saved_step = 0  # nothing is worth saving before the first

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Takes the run folder of all processes."""
        self.path = Path(trainer.log_dir or ".") / "checkpoints" / "last.ckpt"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Obeys signals from here on; Lightning restores their handlers when the training ends."""
        self._step = self._saved_step = trainer.global_step
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                signal.signal(number, self._note)
            except ValueError:  # not the main thread, which alone may
                return

    def _note(self, number: int, frame: FrameType | None) -> None:
        """Remembers a signal; a second one gets the system's answer."""
        if self._signal is None:
            self._signal, self._noted = number, time.monotonic()
            print(f"\n{signal.Signals(number).name}: saving after this step (once more: stop at once)", flush=True)
        elif time.monotonic() - self._noted > SAME_SIGNAL:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Saves where it is due, and where training ends within an epoch; the last step of one is left to its end.

        Nothing is saved while gradients are accumulated, since no checkpoint holds them; a signal waits for the step.
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
        """Begins with the next epoch where a checkpoint was written at the end of one.

        Lightning, when the end is a number of steps, would take one more batch of the old epoch and then leave one out.
        """
        loops = checkpoint.get("loops", {}).get("fit_loop", {})
        if not loops or not loops["epoch_loop.batch_progress"]["is_last_batch"]:
            return
        batches = loops["epoch_loop.batch_progress"]
        batches |= {"is_last_batch": False, "current": dict.fromkeys(batches["current"], 0)}
        for progress in (batches["total"], loops["epoch_progress"]["total"], loops["epoch_progress"]["current"]):
            progress |= dict.fromkeys(progress, progress["ready"])

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Says what a broken connection means: a process that dies ends all."""
        if trainer.world_size > 1 and isinstance(exception, RuntimeError) and LOST.search(str(exception)):
            go_on = f"; go on with `python -m benchmark fit --ckpt_path {self.path}`" if self.path.is_file() else ""
            print(
                f"process {trainer.global_rank} of {trainer.world_size} lost another one, whose own message or exit "
                f"code says why; the training ends{go_on}",
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
                f"stopped by {signal.Signals(number).name} after step {trainer.global_step}; go on with "
                f"`python -m benchmark fit --ckpt_path {self.path}`",
                flush=True,
            )
            raise SystemExit(128 + number)

    def _agreed_signal(self, trainer: Trainer) -> int:
        """The signal that any process got, or 0: all must stop after the same step."""
        if trainer.world_size == 1:
            return self._signal or 0
        number = torch.tensor(self._signal or 0, device=trainer.strategy.root_device)
        return int(trainer.strategy.reduce(number, reduce_op="max"))


class DivergenceGuard(Callback):
    """Ends a training whose loss or weights are no finite numbers, before they reach a checkpoint.

    The loss of a step on a GPU is looked at in the next step, when it is known without waiting for it.
    """

    def __init__(self) -> None:
        self._place = ""
        self._pending: tuple[Tensor, torch.cuda.Event, str] | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Tensor, batch_idx: int) -> None:
        """Notes what would reproduce this step."""
        self._place = (
            f"step {trainer.global_step} (epoch {trainer.current_epoch}, batch {batch_idx}, process "
            f"{trainer.global_rank} of {trainer.world_size}, seed_everything {os.environ.get('PL_GLOBAL_SEED', 'off')})"
        )

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Looks at the loss.

        Raises:
            DivergenceError: If it is NaN or infinite.
        """
        self._look(trainer)
        if not loss.is_cuda:
            self._check(loss, self._place, trainer)
            return
        known = torch.cuda.Event()
        self._pending = loss.detach().to("cpu", non_blocking=True), known, self._place
        known.record()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Looks at the last loss.

        Raises:
            DivergenceError: If it is NaN or infinite.
        """
        self._look(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Looks at the loss and at the weights, which a gradient can spoil while the loss is still finite.

        Raises:
            DivergenceError: If one is NaN or infinite.
        """
        self._look(trainer)
        for name, tensor in checkpoint["state_dict"].items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise DivergenceError(f"{name} is not finite after {self._place}; {self._advice(trainer)}")

    def _look(self, trainer: Trainer) -> None:
        if self._pending is None:
            return
        (loss, known, place), self._pending = self._pending, None
        known.synchronize()
        self._check(loss, place, trainer)

    def _check(self, loss: Tensor, place: str, trainer: Trainer) -> None:
        if not torch.isfinite(loss).all():
            raise DivergenceError(f"the loss is {float(loss.detach())} at {place}; {self._advice(trainer)}")

    @staticmethod
    def _advice(trainer: Trainer) -> str:
        last = next((c.path for c in trainer.checkpoint_callbacks if isinstance(c, LastCheckpoint)), None)
        good = f"the last good checkpoint is {last}" if last and last.is_file() else "there is no checkpoint yet"
        return (
            f"{good}. Lower the learning rate, clip gradients (--trainer.gradient_clip_val 1.0) or raise --trainer."
            "precision; the same step with the same options diverges again"
        )


class BestCheckpoint(ModelCheckpoint):
    """Keeps the weights of the lowest validation loss; none where no image is held out."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Looks for validation images when training starts."""
        if stage == "fit" and not trainer.datamodule.val_dataloader():  # type: ignore[attr-defined]
            self.monitor, self.save_top_k = None, 0
        super().setup(trainer, pl_module, stage)


class SaveFitConfig(SaveConfigCallback):
    """Keeps the configuration of training in the run folder; later stages leave it as it is."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Waits: what is refused later must not have replaced the configuration of a run that shall go on."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves when training starts, whole or not at all."""
        folder = trainer.log_dir  # asks all processes
        if folder is not None and trainer.is_global_zero:
            write_atomic(Path(folder) / self.config_filename, self.parser.dump(self.config, skip_unset=False))
