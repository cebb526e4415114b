"""Progress in the terminal, and scalars, firing rates and pictures in TensorBoard."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from torch.utils.tensorboard import SummaryWriter

from datamodules import ImageDataModule
from leaderboard.files import write_atomic
from leaderboard.pictures import enlargement, grid, rows_of_classes
from systems.base import DiffusionSystem, images_of
from systems.spiking.adapter import spikes_of, spiking_layers


class ImageProgressBar(TQDMProgressBar):
    """Progress bar that counts images, not batches, while sampling.

    On a GPU it is redrawn every ten steps in training, since reading the loss waits for the GPU.
    """

    def on_train_start(self, trainer: Trainer, *args: Any) -> None:
        """Sets how often the bar is redrawn."""
        super().on_train_start(trainer, *args)
        if trainer.strategy.root_device.type != "cpu":
            self._refresh_rate = 10

    def on_test_batch_start(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Sets the total number of images at the first batch."""
        super().on_test_batch_start(trainer, *args, **kwargs)
        self._start(self.test_progress_bar, trainer.test_dataloaders, args)

    def on_predict_batch_start(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Sets the total number of images at the first batch."""
        super().on_predict_batch_start(trainer, *args, **kwargs)
        self._start(self.predict_progress_bar, trainer.predict_dataloaders, args)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        """Counts the images of a batch."""
        self.test_progress_bar.update(len(batch))

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        """Counts the images of a batch."""
        self.predict_progress_bar.update(len(batch))

    @staticmethod
    def _start(bar: Any, loader: Any, args: tuple[Any, ...]) -> None:
        batch_idx = args[2]
        if batch_idx == 0:
            bar.unit = "img"
            bar.reset(total=len(loader.sampler))


class ProgressLines(ProgressBar):
    """Progress as lines, for logs and pipes: after 2, 4 and 8 minutes, then every 10, and at the end of training."""

    FIRST = 120.0
    """Seconds until the first line; the time between two lines doubles up to `LONGEST`."""
    LONGEST = 600.0

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._done = self._start = 0
        self._clock = self._next = 0.0

    def enable(self) -> None:
        """Turns the lines on."""
        self._enabled = True

    def disable(self) -> None:
        """Turns the lines off, as Lightning does in all processes but the first."""
        self._enabled = False

    def on_train_start(self, trainer: Trainer, *args: Any) -> None:
        """Starts the clock, at the step that the training resumes from."""
        self._begin(trainer.global_step)

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Writes a line when one is due."""
        if self._is_due():
            self._write("step", trainer.global_step, trainer.estimated_stepping_batches, self._losses())

    def on_train_end(self, trainer: Trainer, *args: Any) -> None:
        """Writes the last line."""
        if self._enabled and trainer.global_step > self._start:
            self._write("step", trainer.global_step, trainer.global_step, self._losses())

    def on_test_start(self, *args: Any) -> None:
        """Starts the clock."""
        self._begin()

    def on_predict_start(self, *args: Any) -> None:
        """Starts the clock."""
        self._begin()

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        """Counts the images of a batch."""
        self._count_images(len(batch), trainer.test_dataloaders)

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        """Counts the images of a batch."""
        self._count_images(len(batch), trainer.predict_dataloaders)

    def _begin(self, done: int = 0) -> None:
        self._done = self._start = done
        self._clock, self._next = time.monotonic(), self.FIRST

    def _count_images(self, count: int, loader: Any) -> None:
        self._done += count
        if self._is_due():
            self._write("image", self._done, len(loader.sampler))

    def _is_due(self) -> bool:
        seconds = time.monotonic() - self._clock
        if not self._enabled or seconds < self._next:
            return False
        self._next = seconds + min(seconds, self.LONGEST)
        return True

    def _losses(self) -> str:
        return "".join(f", {name} {float(value):.4g}" for name, value in self.trainer.progress_bar_metrics.items())

    def _write(self, unit: str, done: int, total: float, values: str = "") -> None:
        seconds = time.monotonic() - self._clock
        line = f"{unit} {done:,}"
        if done < total < math.inf:
            left = seconds / max(1, done - self._start) * (total - done)
            line += f" of {total:,}, {timedelta(seconds=round(left))} left"
        print(f"{line}, after {timedelta(seconds=round(seconds))}{values}", flush=True)


class TrainingMonitor(Callback):
    """Logs gradient norm, images/s and firing rates; every few epochs also samples, a denoising strip and plots.

    A layer that is silent (rate 0) or saturated (rate 1) in a logged step is observed in every step until the next
    logged one. If its rate stays the same throughout, a warning names the layer, once.

    Args:
        every_n_epochs: Epochs between pictures; 0 draws none.
        num_images: Images in the grid of samples.
        num_inference_steps: Diffusion steps of the pictures, at most the method's own number, which null uses.
    """

    def __init__(self, every_n_epochs: int = 10, num_images: int = 16, num_inference_steps: int | None = 50) -> None:
        self.every_n_epochs = every_n_epochs
        self.num_images = num_images
        self.num_inference_steps = num_inference_steps
        self._hooks: list[RemovableHandle] = []
        self._counts: dict[str, tuple[Tensor, int]] = {}  # spikes and elements of each layer in this step
        self._stuck: dict[str, Tensor] = {}  # layers that stayed at rate 0 or 1 since the last logged step
        self._suspects: dict[str, float] = {}  # layers of rate 0 or 1 in the last logged step, and the rate
        self._warned: set[str] = set()
        self._due = False
        self._clock = self._seconds = 0.0  # of training only, without validation and pictures
        self._images = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock, since a training resumed within an epoch has no `on_train_epoch_start`."""
        self._clock = time.perf_counter()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restarts the clock, after validation and pictures."""
        self._clock = time.perf_counter()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Tensor, batch_idx: int) -> None:
        """Adds hooks to all neurons in a logged step, and to suspects in every step."""
        self._due = self._is_logged_step(trainer)
        if self._due or self._suspects:
            for name, module in spiking_layers(pl_module):
                if self._due or name in self._suspects:
                    self._hooks.append(module.register_forward_hook(self._watch(name)))

    def _watch(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            spikes = spikes_of(output)
            total, elements = self._counts.get(name, (0, 0))  # a layer may run several times
            self._counts[name] = total + (spikes != 0).sum(), elements + spikes.numel()

        return hook

    def _take_rates(self) -> dict[str, Tensor]:
        """Returns the firing rate of each observed layer in this step, and follows those of suspects."""
        rates = {name: total / elements for name, (total, elements) in self._counts.items()}
        self._counts.clear()
        for name in self._suspects.keys() & rates.keys():
            same = rates[name] == self._suspects[name]
            self._stuck[name] = self._stuck.get(name, torch.ones_like(same)) & same
        return rates

    def _warn_of_stuck_layers(self, step: int, rates: dict[str, float]) -> None:
        """Warns once of each layer whose rate was 0 or 1 in every step since the last logged one."""
        for name, stuck in self._stuck.items():
            if bool(stuck) and name not in self._warned:
                self._warned.add(name)
                state, remedy = ("silent", "lower") if self._suspects[name] == 0 else ("saturated", "raise")
                warnings.warn(
                    f"layer {name} is {state}: firing rate {self._suspects[name]:g} in every step since the last "
                    f"logged step before {step}. If it stays so, {remedy} --model.threshold, or change the "
                    f"learning rate; its rate is firing_rate/{name.removeprefix('network.')} in TensorBoard",
                    stacklevel=2,
                )
        self._suspects = {name: rate for name, rate in rates.items() if rate in (0, 1) and name not in self._warned}
        self._stuck.clear()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Logs the gradient norm before clipping."""
        if self._is_logged_step(trainer):
            gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
            pl_module.log("train/grad_norm", torch.nn.utils.get_total_norm(gradients))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Tensor, batch_idx: int
    ) -> None:
        """Logs throughput and firing rates."""
        now = time.perf_counter()
        self._seconds += now - self._clock
        self._clock = now
        self._images += len(images_of(batch)) * trainer.world_size
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        rates = self._take_rates()
        if not self._due:
            return
        values = {f"firing_rate/{name.removeprefix('network.')}": rate for name, rate in rates.items()}
        if rates:
            stacked = torch.stack(list(rates.values()))
            values["train/firing_rate"] = stacked.mean()
            self._warn_of_stuck_layers(trainer.global_step, dict(zip(rates, stacked.tolist(), strict=True)))
        values["train/images_per_second"] = torch.tensor(self._images / self._seconds)
        self._images, self._seconds = 0, 0.0
        pl_module.log_dict(values)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draws the pictures every `every_n_epochs` epochs and after the last one."""
        last = trainer.global_step == trainer.max_steps or trainer.current_epoch + 1 == trainer.max_epochs
        due = self.every_n_epochs and ((trainer.current_epoch + 1) % self.every_n_epochs == 0 or last)
        board = next((logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)), None)
        if due and board is not None and isinstance(pl_module, DiffusionSystem):
            self._draw(trainer, pl_module, board.experiment)

    @torch.no_grad()
    def _draw(self, trainer: Trainer, system: DiffusionSystem, board: SummaryWriter) -> None:
        folder = Path(trainer.log_dir or ".")  # collective call: every rank must reach it
        if system.generates:
            self._draw_samples(trainer, system, board)
        for name, figure in system.figures().items() if trainer.is_global_zero else ():
            content = BytesIO()
            figure.savefig(content, format="png", dpi=150)
            write_atomic(folder / "plots" / f"{name}.png", content.getvalue())
            board.add_figure(name, figure, trainer.global_step)

    def _draw_samples(self, trainer: Trainer, system: DiffusionSystem, board: SummaryWriter) -> None:
        data: ImageDataModule = trainer.datamodule  # type: ignore[attr-defined]
        steps, training = system.num_inference_steps, system.training
        system.num_inference_steps = min(self.num_inference_steps or steps, steps)
        system.eval()
        try:
            seeds = torch.arange(self.num_images)
            states = [data.to_uint8(x) for x in system.trajectory(seeds, data.image_shape)]
        except ValueError as error:  # pictures are not a reason to end a training
            warnings.warn(f"the samples of step {trainer.global_step} are not drawn: {error}", stacklevel=2)
            return
        finally:
            system.num_inference_steps = steps
            system.train(training)
        shown = [states[round(i * (len(states) - 1) / 9)][:8] for i in range(10)]
        strip = torch.stack(shown, dim=1).flatten(0, 1)  # one row per image, from x_T to x_0
        scale = enlargement(strip.shape[-1])
        labels, samples = system.labels(seeds), states[-1].cpu()
        samples = samples if labels is None else rows_of_classes(samples, labels, columns=4)
        board.add_image("samples", grid(samples, columns=4, scale=scale), trainer.global_step)
        board.add_image("denoising", grid(strip, columns=10, scale=scale), trainer.global_step)

    @staticmethod
    def _is_logged_step(trainer: Trainer) -> bool:
        interval: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # 0 logs nothing
        return interval > 0 and (trainer.global_step + 1) % interval == 0
