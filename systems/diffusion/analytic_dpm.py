"""Analytic-DPM: ancestral and implicit sampling with the optimal reverse variance, as a diffusers scheduler.

F. Bao, C. Li, J. Zhu, B. Zhang, "Analytic-DPM: an Analytic Estimate of the Optimal Reverse Variance in Diffusion
Probabilistic Models", ICLR 2022, https://arxiv.org/abs/2201.06503; used by SDM (arXiv 2408.16467, Table 6).

For a step from `t` to `s < t` let `a = sqrt(alphas_cumprod)`, `v = 1 - alphas_cumprod`, and `x_0` the prediction. The
forward process fixes `q(x_s | x_t, x_0) = N(mean, lambda^2)`, with `lambda^2 = v_s (1 - a_t^2 / a_s^2) / v_t` for DDPM
and 0 for DDIM, and

    mean  = a_s x_0 + k (x_t - a_t x_0),   k = sqrt((v_s - lambda^2) / v_t)
    sigma = lambda^2 + (a_s - k a_t)^2 cov(x_0 | x_t)                      (theorem 1)
    cov   = (v_t / a_t^2) (1 - Gamma_t),   clipped to [0, 1] as images lie in [-1, 1]

where `Gamma_t = E |eps_t|^2 / d` is the mean square of the predicted noise over noisy training images. The statistic
belongs to a trained network: `python -m benchmark estimate-gamma` adds it to a checkpoint. The standard deviation of
the last noisy step is bounded to a visible noise of 2 grey levels; a final noiseless step returns `x_0`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from systems.checkpoints import load_checkpoint
from systems.diffusion._released import ReleasedScheduler
from systems.diffusion.prediction import noise_images, to_noise, to_x0

LAST_VARIANCE = (2 * (2 / 255) * math.sqrt(math.pi / 2)) ** 2
"""Bound on the variance of the step to `t = 0`: mean absolute noise of 2 of 255 grey levels (section 4.2)."""


class AnalyticDPMScheduler(ReleasedScheduler):
    """Sampler with the optimal reverse variance; noise schedule and forward process are DDPM's.

    Args:
        form: Steps of DDPM (published) or DDIM.
        gamma: File with the statistic (.npy, .safetensors, .pt), for instance of another network as in the paper;
            None uses the checkpoint's own. If it has one entry more than diffusion steps, the first is ignored.
        **kwargs: Arguments of `ReleasedScheduler`.
    """

    @register_to_config
    def __init__(
        self,
        form: Literal["ddpm", "ddim"] = "ddpm",
        gamma: str | None = None,
        **kwargs: Any,
    ) -> None:
        if form not in ("ddpm", "ddim"):
            raise ValueError(f"form={form!r} is unknown; choose 'ddpm' or 'ddim'")
        super().__init__(**kwargs)
        self.gamma: Tensor | None = None
        """Statistic `Gamma_t` `(num_train_timesteps,)`, float64."""
        if gamma is not None:
            self.set_gamma(read_gamma(gamma))

    def set_gamma(self, gamma: Tensor) -> None:
        """Sets the statistic.

        Args:
            gamma: `(num_train_timesteps,)`, or one entry more, of which the first is ignored.

        Raises:
            ValueError: If the shape does not fit or values are negative or not finite.
        """
        steps = self.config.num_train_timesteps
        if gamma.shape not in ((steps,), (steps + 1,)):
            raise ValueError(
                f"Gamma has shape {tuple(gamma.shape)}, expected ({steps},): one number per diffusion step"
            )
        gamma = gamma[-steps:].double()
        if not (gamma.isfinite() & (gamma >= 0)).all():
            raise ValueError("Gamma contains negative or non-finite numbers, which a mean square cannot have")
        self.gamma = gamma

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Sets the time grid of the released samplers: evenly spaced from the last step, always ending at 0.

        If the `num_inference_steps` points do not include 0, it is appended, so that there are
        `num_inference_steps + 1` network evaluations except when every step is used.
        """
        last = self.config.num_train_timesteps - 1
        stride = self.config.num_train_timesteps / num_inference_steps
        grid = [max(int(last - stride * j), 0) for j in range(num_inference_steps)]
        self.num_inference_steps = num_inference_steps
        self.grid = grid if grid[-1] == 0 else [*grid, 0]
        self.timesteps = torch.tensor(self.grid, device=device)

    def previous_timestep(self, timestep: int) -> int:
        """Returns the point of the grid after `timestep`, -1 after the last."""
        successors = dict(zip(self.grid, self.grid[1:], strict=False))
        return successors.get(int(timestep), -1)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> DDPMSchedulerOutput | tuple[Tensor, Tensor]:
        """Takes one step of the chain.

        Args:
            model_output: Prediction of the network `(B, C, H, W)`.
            timestep: Diffusion step `t`, a point of the grid.
            sample: `x_t` `(B, C, H, W)`.
            generator: Source of the noise, shared or one per image.
            return_dict: Whether to return a `DDPMSchedulerOutput` instead of `(x_s, x_0)`.

        Raises:
            ValueError: If the statistic is missing or the prediction type unknown.
        """
        t = int(timestep)
        s = self.previous_timestep(t)
        x_0 = self._predict_x0(model_output, t, sample)
        if s < 0:
            previous = x_0.clamp(-1, 1)  # as released: the final images are always clamped
        else:
            a_t, a_s, k, variance = self._coefficients(t, s)
            noise = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)
            previous = a_s * x_0 + k * (sample - a_t * x_0) + math.sqrt(variance) * noise
        return DDPMSchedulerOutput(prev_sample=previous, pred_original_sample=x_0) if return_dict else (previous, x_0)

    def variance(self, timestep: int, previous: int) -> float:
        """Returns the variance of the reverse step from `timestep` to `previous`."""
        return self._coefficients(timestep, previous)[3]

    def _coefficients(self, t: int, s: int) -> tuple[float, float, float, float]:
        """Returns `a_t`, `a_s`, `k` and `sigma` (the variance) of the step from `t` to `s`."""
        cumulative_t, cumulative_s = float(self.alphas_cumprod[t]), float(self.alphas_cumprod[s])
        a_t, a_s = math.sqrt(cumulative_t), math.sqrt(cumulative_s)
        v_t, v_s = 1 - cumulative_t, 1 - cumulative_s
        posterior = v_s * (1 - cumulative_t / cumulative_s) / v_t if self.config.form == "ddpm" else 0.0  # lambda^2
        k = math.sqrt((v_s - posterior) / v_t)
        return a_t, a_s, k, self._variance(t, s, posterior, (a_s - k * a_t) ** 2)

    def _variance(self, t: int, s: int, posterior: float, weight: float) -> float:
        """Returns `lambda^2 + weight * cov(x_0 | x_t)` with `lambda^2 = posterior`."""
        if self.gamma is None:
            raise ValueError(
                "Analytic-DPM needs the network's statistic Gamma, which the checkpoint lacks; add it with "
                "`python -m benchmark estimate-gamma`, or give a file: --model.scheduler.gamma FILE"
            )
        cumulative = float(self.alphas_cumprod[t])
        covariance = min(max((1 - cumulative) / cumulative * (1 - float(self.gamma[t])), 0.0), 1.0)
        variance = min(posterior + weight * covariance, 1.0)
        return min(variance, LAST_VARIANCE) if s == 0 else variance

    def _predict_x0(self, prediction: Tensor, t: int, x_t: Tensor) -> Tensor:
        cumulative = float(self.alphas_cumprod[t])
        x_0 = to_x0(prediction, x_t, math.sqrt(cumulative), math.sqrt(1 - cumulative), self.config.prediction_type)
        return x_0.clamp(-1, 1) if self.config.clip_sample else x_0


@torch.no_grad()
def estimate_gamma(
    network: nn.Module,
    scheduler: SchedulerMixin,
    images: Tensor,
    batch_size: int,
    seed: int = 0,
    progress: Callable[[Sequence[Tensor]], Iterable[Tensor]] = iter,
) -> Tensor:
    """Estimates a network's statistic `Gamma_t` `(num_train_timesteps,)`, in float64.

    Args:
        network: Maps `(B, C, H, W)` and steps `(B,)` to a prediction `(B, C, H, W)`.
        scheduler: Noise schedule and prediction type.
        images: Training images `(M, C, H, W)` in [-1, 1], on the device of the network.
        batch_size: Images per network evaluation; a batch mixes diffusion steps if there are fewer images.
        seed: Seed of the noise, which is drawn anew for each image and step.
        progress: Wraps the iterable of batches, for instance in a progress bar.
    """
    generator = torch.Generator().manual_seed(seed)
    count, num_steps = len(images), scheduler.config.num_train_timesteps
    power = scheduler.alphas_cumprod.double()
    signal, noise_level = power.sqrt().to(images), (1 - power).sqrt().to(images)
    sums = torch.zeros(num_steps, dtype=torch.float64, device=images.device)
    for pairs in progress(torch.arange(count * num_steps, device=images.device).split(batch_size)):
        t, chosen = pairs // count, images[pairs % count]
        a, sigma = (part[t].view(-1, 1, 1, 1) for part in (signal, noise_level))
        noise = torch.randn(chosen.shape, generator=generator, dtype=images.dtype).to(images.device)
        x_t = noise_images(chosen, noise, a, sigma)
        prediction = to_noise(network(x_t, t).to(images.dtype), x_t, a, sigma, scheduler.config.prediction_type)
        sums.index_add_(0, t, prediction.double().square().flatten(1).sum(1))
    return sums.cpu() / images.numel()


def read_gamma(path: str | Path) -> Tensor:
    """Reads the statistic `Gamma` from a file with one array.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it does not contain exactly one array.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"--model.scheduler.gamma {path} is not a file; give .npy, .safetensors or .pt")
    try:
        if path.suffix == ".npy":
            content = torch.from_numpy(np.load(path, allow_pickle=False))
        else:
            content = load_checkpoint(path)
            if isinstance(content, dict):
                (content,) = content.values()
        return torch.as_tensor(content).double().flatten()
    except Exception as error:
        raise ValueError(f"{path} must contain exactly one array of numbers: {str(error).splitlines()[0]}") from None
