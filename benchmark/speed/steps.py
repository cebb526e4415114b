"""Speed of training and denoising steps, against the floor set by their convolutions and matrix products."""

from __future__ import annotations

import copy
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any, cast
from unittest.mock import Mock, patch

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.data import DataLoader

from benchmark.speed.timing import (
    WARM_UP,
    Products,
    Rows,
    autocast,
    build_config,
    median_seconds,
    medians,
    queued,
    wait,
)
from systems.base import DiffusionSystem
from systems.ops.wkv import _WKV
from systems.spiking.neurons import SpikingNeuron


class _Clock(Callback):
    """Times training steps without the loader, alternating with their floor, and measures the memory that a step saves.

    The first step records the products of the floor, the last one measures memory; neither is timed.
    """

    def __init__(self, timed: int) -> None:
        self.seconds: dict[int, list[float]] = {}
        self.floors: dict[int, list[float]] = {}
        self.saved: dict[int, _Saved] = {}
        self._timed = timed
        self._recording = ExitStack()
        self._products = Products()
        self._floor: Callable[[], None] | None = None
        self._start = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Starts the clock, and the recording of products or memory in the first or last step."""
        if batch_idx == 0:
            self._products, self._floor = self._recording.enter_context(Products()), None
        elif batch_idx > self._timed:
            saved = self.saved[trainer.current_epoch] = _Saved(pl_module)
            self._recording.enter_context(saved_tensors_hooks(saved.keep, lambda tensor: tensor))
        wait(pl_module.device)
        self._start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stops the clock and times the floor."""
        device = pl_module.device
        wait(device)
        seconds = time.perf_counter() - self._start
        self._recording.close()
        if 0 < batch_idx <= self._timed:
            self._floor = self._floor or self._products.work()
            floor = median_seconds(self._floor, 1, device, warm_up=0, calls=queued(device))
            self.seconds.setdefault(trainer.current_epoch, []).append(seconds)
            self.floors.setdefault(trainer.current_epoch, []).append(floor)

    def median(self, epoch: int = 0) -> tuple[float, float]:
        """Returns the median seconds of the steps of an epoch and of their floor, without the first `WARM_UP`."""
        seconds, floor = (statistics.median(times[epoch][WARM_UP:]) for times in (self.seconds, self.floors))
        return seconds, floor


class _Saved:
    """Bytes that the forward pass saves for the backward pass, without the parameters.

    `with_small_spikes` counts one byte per element for tensors of zeros and ones.
    """

    def __init__(self, network: nn.Module) -> None:
        self._seen = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
        self.bytes = self.with_small_spikes = 0

    def keep(self, tensor: Tensor) -> Tensor:
        """Counts the memory of a tensor once."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            binary = bool(((tensor == 0) | (tensor == 1)).all())
            self.bytes += storage.nbytes()
            self.with_small_spikes += storage.nbytes() // tensor.element_size() if binary else storage.nbytes()
        return tensor


def measure_steps(
    configs: Sequence[str], batch_size: int, precision: str, device: torch.device, repetitions: int
) -> Rows:
    """Times a training and a denoising step of each configuration, and the floor of each step.

    The floor is the time of only the step's convolutions and matrix products, in the same shapes, dtypes and layouts.
    Steps and floors alternate, so that a slowdown of the machine affects both. The memory that a training step saves is
    compared with plain autograd through neurons stepped by hand, counting their spikes as bytes. "WKV" is the share of
    WKV in a denoising step.
    """
    rows = []
    for name in configs:
        cli = build_config(name)
        system, image_shape = cast(DiffusionSystem, cli.model), cli.datamodule.image_shape
        stepped = copy.deepcopy(system)
        for module in stepped.modules():
            if isinstance(module, SpikingNeuron):
                module.forward = module.stepwise  # type: ignore[method-assign]
        clip = cli.trainer.gradient_clip_val
        clock = train_on_random_images(system, image_shape, batch_size, WARM_UP + repetitions, precision, clip)
        plain = train_on_random_images(stepped, image_shape, batch_size, 0, precision, clip)
        for stage in clock.seconds:
            step = f"training, stage {stage + 1}" if len(clock.seconds) > 1 else "training"
            saved, most = clock.saved[stage].bytes, plain.saved[stage].with_small_spikes
            memory = {"saved MiB": saved / 2**20, "of plain autograd": f"{saved / most:.2f}"}
            rows.append(_row(name, step, *clock.median(stage)) | memory)
        rows.append(_denoising(name, system.to(device).eval(), image_shape, batch_size, precision, repetitions))
    return rows


def _denoising(
    name: str,
    system: DiffusionSystem,
    image_shape: tuple[int, int, int],
    batch_size: int,
    precision: str,
    repetitions: int,
) -> dict[str, Any]:
    """Times one step of the sampler, its floor, and for RWKV the step with the values in place of WKV."""

    def chain() -> Iterator[Tensor]:
        while True:
            images = system.trajectory(torch.arange(batch_size), image_shape)
            next(images)  # noise
            yield from images

    def without_wkv() -> None:
        with patch.object(_WKV, "apply", values):
            next(simpler)

    values = Mock(side_effect=lambda k, v, w, u: v)
    step, simpler = chain(), chain()
    with torch.no_grad(), autocast(precision, system.device):
        next(step)  # warm-up
        with Products() as products:
            next(step)
        works: dict[str, Callable[[], object]] = {"step": lambda: next(step), "floor": products.work()}
        without_wkv()
        if values.called:
            works["without WKV"] = without_wkv
        seconds = medians(works, repetitions, system.device, WARM_UP, calls=queued(system.device))
    row = _row(name, "denoising", seconds["step"], seconds["floor"])
    if "without WKV" in seconds:
        row["WKV"] = f"{1 - seconds['without WKV'] / seconds['step']:.2f}"
    return row


def _row(name: str, step: str, seconds: float, floor: float) -> dict[str, Any]:
    times = {"ms": 1e3 * seconds, "floor ms": 1e3 * floor, "over floor": seconds / floor}
    return {"config": name, "step": step} | times | {"saved MiB": "", "of plain autograd": "", "WKV": ""}


def train_on_random_images(
    system: DiffusionSystem,
    image_shape: tuple[int, int, int],
    batch_size: int,
    timed: int,
    precision: Any,
    clip: float | None,
) -> _Clock:
    """Trains on random images, with classes if the system needs them, for `timed` steps and two more (see `_Clock`)."""
    clock = _Clock(timed)
    count, classes = (timed + 2) * batch_size, getattr(system, "num_classes", 0)
    images: list[Any] = list(torch.rand(count, *image_shape) * 2 - 1)
    if classes:
        images = list(zip(images, torch.randint(classes, (count,)), strict=True))
    trainer = Trainer(
        max_epochs=2 if system.trains_in_parts else 1,
        devices=1,
        precision=precision,
        gradient_clip_val=clip,
        callbacks=[clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # warns that random images collapse the codebook
        trainer.fit(system, DataLoader(images, batch_size))  # type: ignore[arg-type]
    return clock
