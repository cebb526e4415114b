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

from systems.base import DiffusionSystem, LRSchedulerFactory, OptimizerFactory
from systems.checkpoints import CheckpointMismatchError
from systems.diffusion.analytic_dpm import AnalyticDPMScheduler
from systems.diffusion.dpm_solver import DPMSolverScheduler  # noqa: F401  # a choice for --model.scheduler
from systems.diffusion.prediction import noise_images, unknown_prediction_type, velocity
from systems.ops.cuda_graphs import Replay
from systems.spiking.neurons import SpikingNeuron

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
        final_clip: Whether the images that the sampler ends with are clamped to [-1, 1].

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
        final_clip: bool = False,
    ) -> None:
        super().__init__(optimizer, lr_scheduler)
        name, num_train_timesteps = type(scheduler).__name__, scheduler.config.num_train_timesteps
        if not 1 <= num_inference_steps <= num_train_timesteps:
            raise ValueError(
                f"num_inference_steps={num_inference_steps}; give a number from 1 to the {num_train_timesteps} "
                "steps of training"
            )
        if not hasattr(scheduler, "alphas_cumprod"):
            raise ValueError(
                f"scheduler {name} is no discrete Gaussian diffusion; give DDPMScheduler, DDIMScheduler, ..."
            )
        if scheduler.config.prediction_type not in ("epsilon", "sample", "v_prediction"):
            raise unknown_prediction_type(scheduler.config.prediction_type)
        if eta and "eta" not in inspect.signature(scheduler.step).parameters:
            raise ValueError(f"eta={eta} is an option of DDIM; {name} has none")
        self.network = network
        self.scheduler = double_tables(scheduler)
        self.num_inference_steps = num_inference_steps
        self.eta = eta
        self.final_clip = final_clip
        power = self.scheduler.alphas_cumprod.double()
        self.register_buffer("signal", power.sqrt().float(), persistent=False)
        self.register_buffer("sigma", (1 - power).sqrt().float(), persistent=False)
        _try_step(self.scheduler, num_inference_steps)

    @property
    def solver(self) -> str:
        """Name of the solver, with what tells it from others of its class."""
        config = self.scheduler.config
        options = [f"eta={self.eta:g}"] if self.eta else []
        options += [str(config[key]) for key in ("algorithm_type", "solver_order", "spacing", "form") if key in config]
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
            then = {key: checkpoint["gamma"].get(key, now) for key, now in self.firing.items()}
            if then != self.firing:
                warnings.warn(
                    f"Gamma was estimated with {then}, this network has {self.firing}; estimate it again with the same "
                    "options",
                    stacklevel=2,
                )

    @property
    def firing(self) -> dict[str, Any]:
        """What of the neurons may be changed at test time, and changes the statistic of Analytic-DPM."""
        neuron = next((module for module in self.network.modules() if isinstance(module, SpikingNeuron)), None)
        decay = {} if neuron is None else {"beta": neuron.beta}
        return {"threshold": self.threshold, "num_steps": self.num_steps} | decay

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
        noisy, v = self.diffuse(images, noise, t)
        targets = {"epsilon": noise, "sample": images, "v_prediction": v}
        target = targets[self.scheduler.config.prediction_type]
        return F.mse_loss((self.replay or self.network)(noisy, t).float(), target.float())

    def diffuse(self, images: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Adds noise to images, as DDPM does; `add_noise` of other schedulers is that of their own solver.

        Args:
            images: `x_0` `(B, C, H, W)`.
            noise: Standard normal, `(B, C, H, W)`.
            t: Diffusion steps `(B,)`.

        Returns:
            `x_t = a_t x_0 + sigma_t noise` and `v_t = a_t noise - sigma_t x_0`, `(B, C, H, W)`.
        """
        a, sigma = (self.get_buffer(name)[t].to(images.dtype).view(-1, 1, 1, 1) for name in ("signal", "sigma"))
        return noise_images(images, noise, a, sigma), velocity(images, noise, a, sigma)

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
        timesteps = scheduler.timesteps  # a solver's arithmetic is on the CPU, so that no step waits for a GPU
        network = Replay(self.network, self.network)
        for place, (t, now) in enumerate(zip(timesteps, timesteps.to(x.device), strict=True), start=1):
            prediction = network(scheduler.scale_model_input(x, t), now.expand(len(x))).to(x.dtype)
            x = scheduler.step(prediction, t, x, return_dict=False, **options)[0]
            yield x.clamp(-1, 1) if self.final_clip and place == len(timesteps) else x
