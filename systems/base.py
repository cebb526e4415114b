"""Base class of the methods: a system generates images from seeds and is trained by a loss on images."""

from __future__ import annotations

import hashlib
import os
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from inspect import signature
from pathlib import Path
from typing import Any, Self

import lightning as L
import torch
from diffusers.utils.torch_utils import randn_tensor
from jsonargparse import ArgumentError, ArgumentParser
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from systems.checkpoints import (
    UNKNOWN_DATA,
    CheckpointMismatchError,
    check_method,
    check_state,
    read_suite,
    training_data_of,
    with_network_prefix,
    with_training_data,
)
from systems.figures import Figure

OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer]
LRSchedulerFactory = Callable[[Optimizer], LRScheduler]
Batch = Tensor | tuple[Tensor, Tensor]
"""Training images `(B, C, H, W)`; with their classes `(B,)` for a method that asks for them."""


def images_of(batch: Batch) -> Tensor:
    """Returns the images of a training batch."""
    return batch if isinstance(batch, Tensor) else batch[0]


class NonFiniteSamplesError(RuntimeError):
    """Generated images contain NaN or infinite values, so that they cannot be measured or drawn."""


class DiffusionSystem(L.LightningModule):
    """Base of the methods: images are generated from seeds, and a loss on images trains the module.

    A subclass implements `loss` and `trajectory`; the four Lightning stages, records and cost follow from them. A model
    that generates in one shot yields one tensor from `trajectory`. The attributes and properties below have defaults
    for such a model:

    | name | default | meaning |
    |---|---|---|
    | `method` | class name in lower case | name in records and run folders |
    | `network` | the module itself | the part that generates; its parameters are counted |
    | `num_steps` | 1 | SNN time steps `T` |
    | `num_inference_steps` | 1 | diffusion steps of the sampler |
    | `nfe` | `num_inference_steps` | network evaluations per image |
    | `solver` | `one shot`, or `NFE steps` | name of the sampler in records |

    `check_contract` names everything that is missing or wrong. The test and prediction loaders yield seeds, one for
    each image to generate.

    Args:
        optimizer: Creates the optimiser from the parameters; None is Adam with the defaults of torch.
        lr_scheduler: Creates a learning-rate schedule that is stepped after every optimiser step; None keeps the rate
            constant.
    """

    method: str
    """Name of the method in records and run folders."""
    num_steps: int = 1
    """SNN time steps `T`."""
    num_inference_steps: int = 1
    """Diffusion steps of the sampler."""
    threshold: float | None = None
    """Firing threshold of all neurons, where the method has one."""
    network: nn.Module
    """Network that generates the images; by default the module itself."""
    configuration: dict[str, Any] | None = None
    """Resolved configuration of the run, `model` and `data`, as JSON; stored in checkpoints."""
    conditional: float | None = None
    """Scale of guidance of a method that generates images of given classes, 1 without guidance; else None."""
    with_labels: bool = False
    """Whether `loss` receives pairs of images and their classes `(B,)` instead of images; set it before training."""
    is_generated = False
    """True while `test_step` should skip generation because this batch was restored from an interrupted test."""
    training_data: list[dict[str, Any]]
    """Data that the weights were trained on, oldest first, as the data modules describe them; `UNKNOWN_DATA` among them
    for weights of unknown origin, empty before the first training. It is updated whenever a checkpoint is saved."""
    trains_in_parts: bool = False
    """Whether a training step leaves some parameters without gradient (needs DDP's `find_unused_parameters`)."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Names a method without a name of its own after its class, so that no record carries its parent's name."""
        super().__init_subclass__(**kwargs)
        if "method" not in vars(cls):
            cls.method = cls.__name__.lower()

    def __init__(
        self, optimizer: OptimizerFactory | None = None, lr_scheduler: LRSchedulerFactory | None = None
    ) -> None:
        super().__init__()
        self.training_data = []
        self._optimizer = optimizer or Adam
        self._lr_scheduler = lr_scheduler

    def __getattr__(self, name: str) -> Any:
        """Returns the module itself as its `network`, unless a subclass sets one."""
        return self if name == "network" and name not in self._modules else super().__getattr__(name)

    @abstractmethod
    def loss(self, batch: Any, generator: torch.Generator | None = None) -> Tensor:
        """Returns the scalar loss of a batch; `generator` makes it reproducible.

        Args:
            batch: Images `(B, C, H, W)` in [-1, 1], or images and their classes for a method that asks for them.
            generator: Source of all random draws.
        """

    @abstractmethod
    def trajectory(self, seeds: Tensor, image_shape: tuple[int, int, int]) -> Iterator[Tensor]:
        """Yields the images `(B, C, H, W)` at the start and after each diffusion step; the last are the samples.

        Args:
            seeds: One seed per image, `(B,)`. Only `seeds[k]` determines the noise of image `k`, so that it does not
                depend on its batch or on the number of devices (up to rounding).
            image_shape: `(C, H, W)`.
        """

    def setup(self, stage: str) -> None:
        """Asks the data module, if there is one, for labels if the method is trained on classes."""
        data: Any = getattr(self.trainer, "datamodule", None)
        if stage in ("fit", "validate") and data is not None:
            data.with_labels = self.with_labels

    @property
    def solver(self) -> str:
        """Name and settings of the sampler, for records."""
        return "one shot" if self.nfe == 1 else f"{self.nfe} steps"

    @property
    def nfe(self) -> int:
        """Network evaluations per image."""
        return self.num_inference_steps

    @property
    def step_network(self) -> nn.Module:
        """Part of `network` that runs in each step of the chain."""
        return self.network

    def check_contract(self) -> None:
        """Checks that a subclass defines what training, sampling and records need.

        Raises:
            NotImplementedError: If something is missing or of the wrong type; names all of it.
        """
        problems = [
            f"implement `{name}{signature(function)}`: {function.__doc__.splitlines()[0]}"
            for name in ("loss", "trajectory")
            if getattr(type(self), name) is (function := getattr(DiffusionSystem, name))
        ]
        for name, count in (("loss", 2), ("trajectory", 2)):
            try:
                signature(getattr(self, name)).bind(*range(count))
            except TypeError:
                expected, found = (signature(getattr(kind, name)) for kind in (DiffusionSystem, type(self)))
                problems.append(f"`{name}` must accept {expected}, found {found}")
        if isinstance(steps := getattr(type(self), "num_inference_steps", None), property) and steps.fset is None:
            problems.append("`num_inference_steps` must be an attribute that can be set, found a read-only property")
        for name in ("method", "solver"):
            if not isinstance(value := getattr(self, name), str) or not value:
                problems.append(f"`{name}` must be a name, found {value!r}")
        for name in ("num_steps", "num_inference_steps", "nfe"):
            if not isinstance(value := getattr(self, name), int) or value < 1:
                problems.append(f"`{name}` must be an integer of at least 1, found {value!r}")
        if not isinstance(self.network, nn.Module):
            problems.append(f"`network` must be an nn.Module, found {type(self.network).__name__}")
        if problems:
            raise NotImplementedError(
                f"{type(self).__module__}.{type(self).__name__} is not a complete method: {'; '.join(problems)} "
                "(systems/base.py, DiffusionSystem)"
            )

    def noise(self, seeds: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Returns standard normal noise `(B, *shape)` on the module's device; row `k` is drawn with `seeds[k]`."""
        generators = [torch.Generator().manual_seed(seed) for seed in seeds.tolist()]
        return randn_tensor((len(seeds), *shape), generator=generators, device=self.device, dtype=self.dtype)

    def labels(self, seeds: Tensor) -> Tensor | None:
        """Returns the class of the image of each seed, `(B,)`; None for a method without classes."""
        return None

    @torch.no_grad()
    def sample(self, seeds: Tensor, image_shape: tuple[int, int, int]) -> Tensor:
        """Returns one image per seed, `(B, C, H, W)`; values may lie slightly outside [-1, 1].

        Raises:
            NonFiniteSamplesError: If a value is not finite.
        """
        steps = self.trajectory(seeds, image_shape)
        if not isinstance(steps, Iterator):
            raise TypeError(f"{self.method}: `trajectory` returns {type(steps).__name__}; it must yield images")
        expected, last = (len(seeds), *image_shape), deque(steps, maxlen=1)
        if not last or tuple(last[0].shape) != expected:
            found = f"images of shape {tuple(last[0].shape)}" if last else "nothing"
            raise ValueError(f"{self.method}: `trajectory` yields {found}, expected images of shape {expected}")
        images = last[0]
        finite = images.isfinite().flatten(1).all(1).cpu()
        if not finite.all():
            bad = seeds.cpu()[~finite].tolist()
            shown = ", ".join(map(str, bad[:5])) + (", ..." if len(bad) > 5 else "")
            weights = "" if all(p.isfinite().all() for p in self.network.parameters()) else ", and so do the weights"
            raise NonFiniteSamplesError(
                f"{len(bad)} of {len(images)} generated images contain NaN or infinity (seeds {shown}){weights}; "
                f"training diverged, or the sampler {self.solver} with {self.num_inference_steps} steps overflows: "
                "choose an earlier checkpoint, another solver, more steps or --trainer.precision 32-true"
            )
        return images

    @property
    def generates(self) -> bool:
        """Whether training has reached the part that generates, so that samples are meaningful."""
        return True

    def reconstruction_metrics(self, batches: Iterable[Tensor]) -> dict[str, tuple[float, float]]:
        """Returns reconstruction metrics of the method's autoencoder, each with its uncertainty.

        Methods without an autoencoder return none.

        Args:
            batches: Images `(B, C, H, W)` in [-1, 1].
        """
        return {}

    def figures(self) -> dict[str, Figure]:
        """Returns plots of learned quantities by name; they are drawn together with the samples during training."""
        return {}

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seeds the random draws of a step from seed, epoch, batch and process only.

        A resumed training therefore draws the same numbers as an uninterrupted one, and a step can be repeated.
        """
        if seed := os.environ.get("PL_GLOBAL_SEED"):  # set by `seed_everything`, unless it is disabled
            step = f"{seed} {self.current_epoch} {batch_idx} {self.global_rank}"
            number = int.from_bytes(hashlib.sha256(step.encode()).digest()[:8], "big")
            torch.default_generator.manual_seed(number)  # torch.manual_seed is 100 times slower
            if self.device.type != "cpu":
                torch.get_device_module(self.device).manual_seed(number)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Returns the loss of a batch of images."""
        loss = self.loss(batch)
        if loss.dim():
            raise ValueError(f"{self.method}: `loss` returns the shape {tuple(loss.shape)}, expected a scalar")
        self.log("train/loss", loss, prog_bar=True, sync_dist=True, batch_size=len(images_of(batch)))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Logs the loss with the same random draws in every epoch, for any number of processes.

        Batches are distributed over the processes in turn; batches that only pad the last turn have weight 0.
        """
        index = batch_idx * self.trainer.world_size + self.global_rank  # global batch index across all processes
        loader: Any = self.trainer.val_dataloaders
        images = images_of(batch)
        weight = len(images) if index * loader.batch_size < len(loader.dataset) else 0
        generator = torch.Generator(images.device).manual_seed(index)
        self.log("val/loss", self.loss(batch, generator), prog_bar=True, sync_dist=True, batch_size=weight)

    def test_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
        """Returns the images `(B, C, H, W)` of a batch of seeds `(B,)`, or None if they were restored."""
        return None if self.is_generated else self.predict_step(batch, batch_idx)

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Returns the images `(B, C, H, W)` of a batch of seeds `(B,)`."""
        return self.sample(batch, self._image_shape)

    @property
    def _image_shape(self) -> tuple[int, int, int]:
        shape: tuple[int, int, int] = self.trainer.datamodule.image_shape  # type: ignore[attr-defined]
        return shape

    def configure_optimizers(self) -> Any:
        """Returns the optimiser and, if set, its learning-rate schedule, which counts steps."""
        optimizer = self._optimizer(p for p in self.parameters() if p.requires_grad)
        optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]  # else gradients of fused optimisers are not clipped
        if self._lr_scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self._lr_scheduler(optimizer), "interval": "step"},
        }

    @property
    def process(self) -> dict[str, Any]:
        """Options of the diffusion process that must not change after training, such as its number of steps."""
        return {}

    def check_process(self, checkpoint: Mapping[str, Any], source: str) -> None:
        """Checks that a checkpoint was trained on this diffusion process, if it records one.

        Raises:
            CheckpointMismatchError: If options differ; lists them.
        """
        trained = checkpoint.get("process", self.process)
        different = [f"{k}={trained.get(k)} instead of {v}" for k, v in self.process.items() if trained.get(k) != v]
        if different:
            raise CheckpointMismatchError(
                f"{source} was trained with {', '.join(different)}; use the --model options of training"
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Stores the method's name, process, configuration and the data it was trained on in the checkpoint."""
        checkpoint["method"] = self.method
        checkpoint["process"] = self.process
        if self.configuration is not None:
            checkpoint["configuration"] = self.configuration
        if self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING:
            data = getattr(self._trainer, "datamodule", None)
            self.training_data = with_training_data(self.training_data, getattr(data, "training_data", UNKNOWN_DATA))
        checkpoint["training_data"] = self.training_data

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Rejects a checkpoint of another method, network or diffusion process with a single message."""
        check_method(checkpoint, self.method, "the checkpoint")
        checkpoint["state_dict"] = with_network_prefix(checkpoint["state_dict"], self)
        check_state(checkpoint["state_dict"], self, "the checkpoint")
        self.check_process(checkpoint, "the checkpoint")
        self.training_data = training_data_of(checkpoint)

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]  # Lightning's further options concern hyper-parameter files
        cls, checkpoint_path: str | Path, map_location: str | torch.device = "cpu"
    ) -> Self:
        """Builds the method of a checkpoint from the configuration in it, with its weights, in evaluation mode.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it cannot be read, contains no configuration, or is of another class.
            CheckpointMismatchError: If it is not a checkpoint of the suite.
        """
        content = read_suite(checkpoint_path)
        if "configuration" not in content:
            raise ValueError(
                f"{checkpoint_path} contains no configuration, as written by version 0.2 and before; load it "
                "by its run folder: `benchmark.load(RUN)`"
            )
        return cls.from_configuration(content["configuration"]["model"], content).to(map_location)

    @classmethod
    def from_configuration(cls, model: Mapping[str, Any], checkpoint: dict[str, Any] | None = None) -> Self:
        """Builds a method from its configuration, in evaluation mode.

        Args:
            model: `class_path` and `init_args`, as in `config.yaml`.
            checkpoint: Content of a checkpoint whose weights to load.

        Raises:
            ValueError: If the configuration does not fit this class.
            CheckpointMismatchError: If the weights do not fit.
        """
        parser = ArgumentParser(exit_on_error=False)
        parser.add_subclass_arguments(cls, "model")
        try:
            system: Self = parser.instantiate(parser.parse_object({"model": dict(model)})).model
        except ArgumentError as error:
            raise ValueError(
                f"the configuration of {model.get('class_path')} is not one of {cls.__name__}: {error}"
            ) from error
        if checkpoint is not None:
            system.on_load_checkpoint(checkpoint)
            system.load_state_dict(checkpoint["state_dict"])
        return system.eval()
