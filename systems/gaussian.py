"""Gaussian diffusion in pixel space (DDPM, arXiv 2006.11239); diffusers' schedulers are noise schedule and solver."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn
from torch.nn import functional as F

from systems.analytic_dpm import AnalyticDPMScheduler
from systems.base import DiffusionSystem, LRSchedulerFactory, OptimizerFactory
from systems.checkpoints import CheckpointMismatchError

PROCESS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type")


def double_tables(scheduler: SchedulerMixin) -> SchedulerMixin:
    """Recomputes a scheduler's noise tables in float64 from its float32 betas, as the published codes have them.

    diffusers multiplies the 1000 factors of `alphas_cumprod` in float32, an error that a chain of 1000 steps amplifies
    beyond 1e-5. The tables are only ever used one number at a time, so images keep their precision.
    """
    if not scheduler.config.get("rescale_betas_zero_snr", False):  # such tables are no plain product
        first_is_final = getattr(scheduler, "final_alpha_cumprod", None) == scheduler.alphas_cumprod[0]
        scheduler.betas = scheduler.betas.double()
        scheduler.alphas = 1 - scheduler.betas
        scheduler.alphas_cumprod = scheduler.alphas.cumprod(0)
        if first_is_final:
            scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    return scheduler


def _try_step(scheduler: SchedulerMixin, num_inference_steps: int) -> None:
    """Takes one step on zeros, since schedulers check their options only then.

    Raises:
        ValueError: If the solver does not work with its options, such as the prediction type.
    """
    scheduler, x = copy.deepcopy(scheduler), torch.zeros(1, 1, 2, 2)
    if isinstance(scheduler, AnalyticDPMScheduler):
        scheduler.gamma = torch.ones(scheduler.config.num_train_timesteps)
    try:
        with torch.random.fork_rng(devices=[]):
            scheduler.set_timesteps(num_inference_steps)
            scheduler.step(x, scheduler.timesteps[0], x)
    except (ValueError, NotImplementedError, TypeError, IndexError) as error:
        raise ValueError(
            f"{type(scheduler).__name__} does not work with prediction_type={scheduler.config.prediction_type!r} and "
            f"num_inference_steps={num_inference_steps} ({error}); give another solver or other options"
        ) from error


class GaussianDiffusion(DiffusionSystem):
    """Trains a network `(x_t, t)` by mean squared error and samples with any solver of diffusers that fits.

    Args:
        network: Takes `(B, C, H, W)` and steps `(B,)`, returns `(B, C, H, W)`.
        scheduler: Noise schedule, prediction type and solver in one; another solver may be given for testing.
        num_inference_steps: Diffusion steps of the sampler.
        eta: Noise of DDIM from 0 (none) to 1; other solvers have no such option.
        optimizer: Makes the optimiser.
        lr_scheduler: Makes the learning-rate schedule.

    Raises:
        ValueError: If the scheduler or the number of steps does not fit.
    """

    def __init__(
        self,
        network: nn.Module,
        scheduler: SchedulerMixin,
        num_inference_steps: int,
        eta: float,
        optimizer: OptimizerFactory,
        lr_scheduler: LRSchedulerFactory | None,
    ) -> None:
        super().__init__(optimizer, lr_scheduler)
        name, num_train_timesteps = type(scheduler).__name__, scheduler.config.num_train_timesteps
        if not 1 <= num_inference_steps <= num_train_timesteps:
            raise ValueError(
                f"num_inference_steps={num_inference_steps}; give a number from 1 to the {num_train_timesteps} "
                "steps of training"
            )
        if not hasattr(scheduler, "alphas_cumprod") or not hasattr(scheduler, "add_noise"):
            raise ValueError(
                f"scheduler {name} is no discrete Gaussian diffusion; give DDPMScheduler, DDIMScheduler, ..."
            )
        if scheduler.config.prediction_type not in ("epsilon", "sample", "v_prediction"):
            raise ValueError(
                f"prediction_type={scheduler.config.prediction_type!r}; give epsilon, sample or v_prediction"
            )
        if eta and "eta" not in inspect.signature(scheduler.step).parameters:
            raise ValueError(f"eta={eta} is an option of DDIM; {name} has none")
        self.network = network
        self.scheduler = double_tables(scheduler)
        self.num_inference_steps = num_inference_steps
        self.eta = eta
        _try_step(self.scheduler, num_inference_steps)

    @property
    def solver(self) -> str:
        """Name of the solver, with what tells it from others of its class."""
        config = self.scheduler.config
        options = [f"eta={self.eta:g}"] if self.eta else []
        options += [str(config[key]) for key in ("algorithm_type", "solver_order", "form") if key in config]
        options += [f"gamma={Path(config['gamma']).name}"] if config.get("gamma") else []
        name = type(self.scheduler).__name__.removesuffix("Scheduler")
        return f"{name}({', '.join(options)})" if options else name

    @property
    def nfe(self) -> int:
        """Network evaluations per image, as many as the solver has time points."""
        scheduler = copy.deepcopy(self.scheduler)
        scheduler.set_timesteps(self.num_inference_steps)
        return len(scheduler.timesteps)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the diffusion process that the network was trained on."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["process"] = self.process

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint of another method, network or diffusion process."""
        super().on_load_checkpoint(checkpoint)
        self.check_process(checkpoint, "the checkpoint")
        if isinstance(self.scheduler, AnalyticDPMScheduler) and self.scheduler.gamma is None and "gamma" in checkpoint:
            self.scheduler.set_gamma(checkpoint["gamma"]["values"])
            if checkpoint["gamma"]["threshold"] != self.threshold:
                warnings.warn(
                    f"Gamma was estimated at threshold={checkpoint['gamma']['threshold']}, this is threshold="
                    f"{self.threshold}; estimate it again with the same option",
                    stacklevel=2,
                )

    @property
    def process(self) -> dict[str, Any]:
        """What a scheduler must share with that of training: noise schedule and prediction type."""
        return {key: self.scheduler.config[key] for key in PROCESS}

    def check_process(self, checkpoint: Mapping[str, Any], source: str) -> None:
        """Checks that a checkpoint was trained on this diffusion process, as far as it says.

        Raises:
            CheckpointMismatchError: If noise schedule or prediction type differ; lists what does.
        """
        process = checkpoint.get("process", self.process)
        trained = {key: process.get(key) for key in self.process}
        different = [
            f"{k}={trained[k]} but --model.scheduler has {v}" for k, v in self.process.items() if trained[k] != v
        ]
        if different:
            raise CheckpointMismatchError(
                f"{source} was trained with {'; '.join(different)}; give the scheduler the values of training, it is "
                "the solver alone that may change"
            )

    def loss(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Mean squared error of the prediction at a uniform random step for each image, unweighted."""
        noise = torch.randn(images.shape, generator=generator, device=images.device, dtype=images.dtype)
        t = torch.randint(
            self.scheduler.config.num_train_timesteps, (len(images),), generator=generator, device=images.device
        )
        prediction = self.network(self.scheduler.add_noise(images, noise, t), t)
        if self.scheduler.config.prediction_type == "epsilon":
            target = noise
        elif self.scheduler.config.prediction_type == "sample":
            target = images
        else:
            target = self.scheduler.get_velocity(images, noise, t)
        return F.mse_loss(prediction.float(), target.float())

    def trajectory(self, seeds: Tensor, image_shape: tuple[int, int, int]) -> Iterator[Tensor]:
        """Yields `x_T`, ..., `x_0` `(B, C, H, W)`; image `k` draws its noise from a generator seeded by `seeds[k]`."""
        scheduler = copy.deepcopy(self.scheduler)  # solvers keep a history
        scheduler.set_timesteps(self.num_inference_steps)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds.tolist()]
        accepted = inspect.signature(scheduler.step).parameters
        options = {k: v for k, v in {"generator": generators, "eta": self.eta}.items() if k in accepted}
        x = randn_tensor((len(seeds), *image_shape), generator=generators, device=self.device, dtype=self.dtype)
        x = x * scheduler.init_noise_sigma
        yield x
        for t in scheduler.timesteps:
            steps = t.to(x.device).expand(len(x))
            prediction = self.network(scheduler.scale_model_input(x, t), steps).to(x.dtype)
            x = scheduler.step(prediction, t, x, return_dict=False, **options)[0]
            yield x
