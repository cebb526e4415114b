"""Speed of training and denoising steps, against their floor."""

from __future__ import annotations

import copy
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.data import DataLoader

from benchmark.speed.timing import WARM_UP, Products, Rows, _autocast, _build, median_seconds, medians, queued, wait
from systems.base import DiffusionSystem
from systems.spiking.neurons import SpikingNeuron

# Training and denoising steps


class _Clock(Callback):
    """Times training steps without their loader, in turn with their floor, and counts the memory that one step saves.

    The first step is there to note the products, the last one for the memory.
    """

    def __init__(self, timed: int) -> None:
        self.seconds: dict[int, list[float]] = {}
        self.floors: dict[int, list[float]] = {}
        self.saved: dict[int, _Saved] = {}
        self._timed = timed
        self._watching = ExitStack()
        self._products = Products()
        self._floor: Callable[[], None] | None = None
        self._start = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Starts the clock, or what else this step is for."""
        if batch_idx == 0:
            self._products, self._floor = self._watching.enter_context(Products()), None
        elif batch_idx > self._timed:
            saved = self.saved[trainer.current_epoch] = _Saved(pl_module)
            self._watching.enter_context(saved_tensors_hooks(saved.keep, lambda tensor: tensor))
        wait(pl_module.device)
        self._start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stops the clock, and times the floor."""
        device = pl_module.device
        wait(device)
        seconds = time.perf_counter() - self._start
        self._watching.close()
        if 0 < batch_idx <= self._timed:
            self._floor = self._floor or self._products.work()
            floor = median_seconds(self._floor, 1, device, warm_up=0, calls=queued(device))
            self.seconds.setdefault(trainer.current_epoch, []).append(seconds)
            self.floors.setdefault(trainer.current_epoch, []).append(floor)

    def median(self, epoch: int = 0) -> tuple[float, float]:
        """Returns the median times of the steps of an epoch, and of their floor, after a warm-up."""
        seconds, floor = (statistics.median(times[epoch][WARM_UP:]) for times in (self.seconds, self.floors))
        return seconds, floor


class _Saved:
    """Bytes that the forward pass keeps for the backward pass, without the parameters.

    `with_small_spikes` counts a byte for each element of what is 0 or 1 throughout.
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
    """Times the training and the denoising step of configurations, and the floor of each step.

    The floor is the time of the step's convolutions and matrix products alone, of the same shapes, dtypes and layouts.
    Steps and floors take turns, so that what slows the machine slows them alike.
    What a training step saves is compared with plain autograd of neurons stepped by hand, whose spikes take a byte.
    """
    rows = []
    for name in configs:
        cli = _build(name)
        system, image_shape = cast(DiffusionSystem, cli.model), cli.datamodule.image_shape
        stepped = copy.deepcopy(system)
        for module in stepped.modules():
            if isinstance(module, SpikingNeuron):
                module.forward = module.stepwise  # type: ignore[method-assign]
        clip = cli.trainer.gradient_clip_val
        clock = _train(system, image_shape, batch_size, WARM_UP + repetitions, precision, clip)
        plain = _train(stepped, image_shape, batch_size, 0, precision, clip)
        for stage in clock.seconds:
            step = f"training, stage {stage + 1}" if len(clock.seconds) > 1 else "training"
            saved, most = clock.saved[stage].bytes, plain.saved[stage].with_small_spikes
            memory = {"saved MiB": saved / 2**20, "of plain autograd": f"{saved / most:.2f}"}
            rows.append(_row(name, step, *clock.median(stage)) | memory)
        times = _denoising(system.to(device).eval(), image_shape, batch_size, precision, repetitions)
        rows.append(_row(name, "denoising", *times) | {"saved MiB": "", "of plain autograd": ""})
    return rows


def _denoising(
    system: DiffusionSystem, image_shape: tuple[int, int, int], batch_size: int, precision: str, repetitions: int
) -> tuple[float, float]:
    """Returns the time of one step of the sampler and its floor."""

    def endless() -> Iterator[Tensor]:
        while True:
            chain = system.trajectory(torch.arange(batch_size), image_shape)
            next(chain)  # noise
            yield from chain

    chain = endless()
    with torch.no_grad(), _autocast(precision, system.device):
        next(chain)  # to warm up
        with Products() as products:
            next(chain)
        works = {"step": lambda: next(chain), "floor": products.work()}
        seconds = medians(works, repetitions, system.device, WARM_UP, calls=queued(system.device))
    return seconds["step"], seconds["floor"]


def _row(name: str, step: str, seconds: float, floor: float) -> dict[str, Any]:
    return {"config": name, "step": step, "ms": 1e3 * seconds, "floor ms": 1e3 * floor, "over floor": seconds / floor}


def _train(
    system: DiffusionSystem,
    image_shape: tuple[int, int, int],
    batch_size: int,
    timed: int,
    precision: Any,
    clip: float | None,
) -> _Clock:
    """Trains on random images."""
    clock = _Clock(timed)
    images = list(torch.rand((timed + 2) * batch_size, *image_shape) * 2 - 1)
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
        warnings.simplefilter("ignore", UserWarning)  # random images collapse a codebook
        trainer.fit(system, DataLoader(images, batch_size))  # type: ignore[arg-type]
    return clock
