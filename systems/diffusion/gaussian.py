"""Gaussian diffusion in pixel space (DDPM, arXiv 2006.11239).

Noise schedule and sampler come from a diffusers scheduler.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn
from torch.nn import functional as F

from systems.base import DiffusionSystem, LRSchedulerFactory, OptimizerFactory
from systems.checkpoints import CheckpointMismatchError
from systems.diffusion.analytic_dpm import AnalyticDPMScheduler
from systems.diffusion.chains import check_schedule, double_tables, start_chain, take_step, try_chain
from systems.diffusion.dpm_solver import DPMSolverScheduler  # noqa: F401  # a choice for --model.scheduler
from systems.diffusion.prediction import noise_images, unknown_prediction_type, velocity
from systems.networks.checks import check_range
from systems.ops.cuda_graphs import Replay
from systems.spiking.neurons import SpikingNeuron

PROCESS_KEYS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type")
"""Options of a scheduler that must not change after training; the betas only where they change the schedule."""


class GaussianDiffusion(DiffusionSystem):
    """Trains a network `(x_t, t)` with a mean squared error and samples with any compatible diffusers scheduler.

    Args:
        network: Maps `(B, C, H, W)` and steps `(B,)` to a prediction `(B, C, H, W)`.
        scheduler: Noise schedule, prediction type and sampler; the sampler may differ at test time.
        num_inference_steps: Diffusion steps of the sampler.
        eta: Noise of DDIM from 0 (none) to 1; other schedulers have no such option.
        optimizer: Creates the optimiser.
        lr_scheduler: Creates the learning-rate schedule.
        final_clip: Whether the final images of the sampler are clamped to [-1, 1].

    Raises:
        ValueError: If the scheduler or the number of steps does not fit.
    """

    predicts_variance = False
    """Whether the network also predicts the variance of each step."""

    def __init__(
        self,
        network: nn.Module,
        scheduler: SchedulerMixin,
        num_inference_steps: int,
        eta: float = 0.0,
        optimizer: OptimizerFactory | None = None,
        lr_scheduler: LRSchedulerFactory | None = None,
        final_clip: bool = False,
    ) -> None:
        super().__init__(optimizer, lr_scheduler)
        name = type(scheduler).__name__
        check_range("num_inference_steps", num_inference_steps, 1, scheduler.config.num_train_timesteps)
        if not hasattr(scheduler, "alphas_cumprod"):
            raise ValueError(
                f"{name} has no discrete noise schedule (`alphas_cumprod`); use DDPMScheduler, DDIMScheduler, ..."
            )
        if scheduler.config.prediction_type not in ("epsilon", "sample", "v_prediction"):
            raise unknown_prediction_type(scheduler.config.prediction_type)
        if eta and "eta" not in inspect.signature(scheduler.step).parameters:
            raise ValueError(f"eta={eta} is an option of DDIM, which {name} does not have; leave it at 0")
        self.network = network
        self.scheduler = scheduler
        is_real = not scheduler.alphas_cumprod.is_meta  # a module on the meta device has sizes only
        if is_real:
            check_schedule(scheduler)
            double_tables(scheduler)
        self.num_inference_steps = num_inference_steps
        self.eta = eta
        self.final_clip = final_clip
        power = self.scheduler.alphas_cumprod.double()
        self.register_buffer("signal", power.sqrt().float(), persistent=False)
        self.register_buffer("sigma", (1 - power).sqrt().float(), persistent=False)
        if is_real:
            try_chain(scheduler, num_inference_steps, 2 if self.passes_variance else 1)

    @property
    def solver(self) -> str:
        """Name of the scheduler, with its distinguishing options."""
        config = self.scheduler.config
        options = [f"eta={self.eta:g}"] if self.eta else []
        options += [str(config[key]) for key in ("algorithm_type", "solver_order", "spacing", "form") if key in config]
        options += [f"gamma={Path(config['gamma']).name}"] if config.get("gamma") else []
        name = type(self.scheduler).__name__.removesuffix("Scheduler")
        return f"{name}({', '.join(options)})" if options else name

    @property
    def nfe(self) -> int:
        """Network evaluations per image, one per time point of the scheduler."""
        return len(start_chain(self.scheduler, self.num_inference_steps).timesteps)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Rejects a checkpoint of another method, network or diffusion process."""
        super().on_load_checkpoint(checkpoint)
        if isinstance(self.scheduler, AnalyticDPMScheduler) and self.scheduler.gamma is None and "gamma" in checkpoint:
            self.scheduler.set_gamma(checkpoint["gamma"]["values"])
            estimated = {k: checkpoint["gamma"].get(k, now) for k, now in self.gamma_conditions.items()}
            if estimated != self.gamma_conditions:
                warnings.warn(
                    f"Gamma was estimated with {estimated}, this network has {self.gamma_conditions}; estimate it "
                    "again with the same options",
                    stacklevel=2,
                )

    @property
    def gamma_conditions(self) -> dict[str, Any]:
        """Neuron settings that can be changed at test time and invalidate Gamma."""
        neuron = next((module for module in self.network.modules() if isinstance(module, SpikingNeuron)), None)
        decay = {} if neuron is None or isinstance(neuron.beta, Tensor) else {"beta": neuron.beta}
        return {"threshold": self.threshold, "num_steps": self.num_steps} | decay

    @property
    def process(self) -> dict[str, Any]:
        """What every scheduler of this network must share: options, and the signal powers of all training steps."""
        config = self.scheduler.config
        return {k: config[k] for k in PROCESS_KEYS if k in config} | {"alphas_cumprod": self.scheduler.alphas_cumprod}

    def check_process(self, checkpoint: Mapping[str, Any], source: str) -> None:
        """Checks that a checkpoint was trained on this diffusion process, if it records one.

        The noise schedules are compared by their signal powers, whatever the options that define them. Checkpoints of
        earlier versions record only the options.

        Raises:
            CheckpointMismatchError: If noise schedule or prediction type differ; lists the differences.
        """
        if "process" not in checkpoint:
            return
        trained, now, name = checkpoint["process"], self.process, type(self.scheduler).__name__
        power, table = now.pop("alphas_cumprod").double(), trained.get("alphas_cumprod")
        same = isinstance(table, Tensor) and _equal_schedules(table.double(), power)
        different = [
            f"{key}={trained.get(key)} but --model.scheduler has {value}"
            for key, value in now.items()
            if trained.get(key) != value and not (same and key.startswith("beta"))  # other betas, the same schedule
        ]
        if not same and not different:
            recorded = isinstance(table, Tensor)
            options = {key: trained[key] for key in PROCESS_KEYS if key in trained}
            before = (table if recorded else DDPMScheduler(**options).alphas_cumprod).double()
            t = int(((before - power).abs() / (power + 1e-4)).argmax())
            found = (
                f"another noise schedule (signal power {float(before[t]):.3g} at step {t}, but --model.scheduler, "
                f"{name}, has {float(power[t]):.3g}; for instance by rescale_betas_zero_snr or trained_betas)"
            )
            if recorded or not now.keys() >= set(PROCESS_KEYS):
                different = [found]
            elif not _equal_schedules(before, power):
                warnings.warn(f"{source}, of an earlier version, may have been trained with {found}", stacklevel=2)
        if different:
            raise CheckpointMismatchError(
                f"{source} was trained with {'; '.join(different)}; use the noise schedule it was trained with, and a "
                "scheduler that has its options; only the sampler may change"
            )

    def loss(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Returns `E[(eps - eps_theta(a_t x_0 + sigma_t eps, t))^2]`, unweighted (L_simple, Ho et al. 2020, eq. 14).

        Steps `t` are uniform, one per image. The target is `eps`, or `x_0` or `v_t` according to `prediction_type`.

        Args:
            images: `x_0` `(B, C, H, W)` in [-1, 1].
            generator: Source of the steps and the noise.
        """
        noise = torch.randn(images.shape, generator=generator, device=images.device, dtype=images.dtype)
        t = torch.randint(
            self.scheduler.config.num_train_timesteps, (len(images),), generator=generator, device=images.device
        )
        noisy, v = self.diffuse(images, noise, t)
        targets = {"epsilon": noise, "sample": images, "v_prediction": v}
        target = targets[self.scheduler.config.prediction_type]
        prediction = self.network(noisy, t)
        if prediction.shape != target.shape:
            raise ValueError(
                f"{self.method}: the network returns the shape {tuple(prediction.shape)} for images of shape "
                f"{tuple(target.shape)}; it must return the same shape"
            )
        return F.mse_loss(prediction.float(), target.float())

    def diffuse(self, images: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Adds noise to images, as in DDPM; the `add_noise` of other schedulers follows their own time grids.

        Args:
            images: `x_0` `(B, C, H, W)`.
            noise: Standard normal, `(B, C, H, W)`.
            t: Diffusion steps `(B,)`.

        Returns:
            `x_t = a_t x_0 + sigma_t noise` and `v_t = a_t noise - sigma_t x_0`, `(B, C, H, W)`.
        """
        a, sigma = (self.get_buffer(name)[t].to(images.dtype).view(-1, 1, 1, 1) for name in ("signal", "sigma"))
        return noise_images(images, noise, a, sigma), velocity(images, noise, a, sigma)

    @property
    def passes_variance(self) -> bool:
        """Whether the sampler uses a variance predicted by the network."""
        variance_type = str(self.scheduler.config.get("variance_type"))
        return self.predicts_variance and variance_type.startswith("learned")

    def _predictor(self, seeds: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """Returns a function of `x_t` `(B, C, H, W)` and `t` `(B,)` that predicts what the scheduler takes.

        Args:
            seeds: Seeds of the images, `(B,)`.
        """
        return Replay(self.network, self.network)

    def trajectory(self, seeds: Tensor, image_shape: tuple[int, int, int]) -> Iterator[Tensor]:
        """Yields `x_T`, ..., `x_0` `(B, C, H, W)`; the noise of image `k` is drawn with the seed `seeds[k]`."""
        scheduler = start_chain(self.scheduler, self.num_inference_steps)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds.tolist()]
        accepted = inspect.signature(scheduler.step).parameters
        options = {k: v for k, v in {"generator": generators, "eta": self.eta}.items() if k in accepted}
        x = randn_tensor((len(seeds), *image_shape), generator=generators, device=self.device, dtype=self.dtype)
        x = x * scheduler.init_noise_sigma
        yield x
        timesteps = scheduler.timesteps  # schedulers compute with these on the CPU, without GPU synchronisation
        predict = self._predictor(seeds)
        for index, (t, t_device) in enumerate(zip(timesteps, timesteps.to(x.device), strict=True)):
            prediction = predict(scheduler.scale_model_input(x, t), t_device.expand(len(x))).to(x.dtype)
            x = take_step(scheduler, index, prediction, x, **options)
            yield x.clamp(-1, 1) if self.final_clip and index + 1 == len(timesteps) else x


def _equal_schedules(a: Tensor, b: Tensor) -> bool:
    """Whether two tables of signal powers are equal up to rounding in float32."""
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-3, atol=1e-7)
